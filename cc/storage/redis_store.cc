// Tables come and go under their descriptions ("hps.table/<name>"): a table exists while its description does. Creating
// sets the fields of the description one by one, only where they are absent: who sets the first one has created the
// table, and who finds a half-written description completes it. Dropping marks the description with the time, removes
// the rows, then the description; who finds the mark waits, and finishes the work if it is old. Lock order:
// tables_mutex_ guards the map of states and is not held over commands.

#include "cc/storage/redis_store.h"

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "cc/storage/redis_row_tasks.h"
#include "cc/storage/redis_secrets.h"
#include "cc/storage/redis_session.h"
#include "cc/storage/redis_table.h"

namespace hps {
namespace {

constexpr std::string_view kKind = "redis_cluster";
constexpr size_t kSampleRows = 64;  // of each partition of a table that has no description
constexpr uint32_t kMostPartitions = 65536;
constexpr int64_t kDropSeconds = 60;  // no drop takes so long: who began it has died

struct Description {
  uint32_t num_partitions = 0;
  uint64_t row_bytes = 0;      // 0: not written yet
  int key_bytes = 0;           // 0: not written yet
  std::string id;              // of this very table; empty: not written yet
  bool old = false;            // RedisLayout::Version::kOld
  int64_t dropping_since = 0;  // seconds of the clock; 0: it is not being dropped

  RedisLayout Layout(std::string_view name) const {
    return RedisLayout(old ? RedisLayout::Version::kOld : RedisLayout::Version::kCurrent, std::string(name),
                       num_partitions, key_bytes == 4 ? 4 : 8);
  }
};

// Hosts' clocks need agree to a minute only.
int64_t Now() { return std::chrono::system_clock::to_time_t(std::chrono::system_clock::now()); }

uint64_t ParseNumber(const RedisReply& reply) {
  return reply.kind == RedisReply::Kind::kString ? std::strtoull(reply.text.c_str(), nullptr, 10) : 0;
}

class RedisStore final : public TableStore {
 public:
  explicit RedisStore(std::shared_ptr<RedisSession> session) : session_(std::move(session)) {}
  ~RedisStore() override { (void)Close(); }

  std::string_view kind() const override { return kKind; }
  StoreCapabilities capabilities() const override {
    const RedisStoreOptions& options = session_->options;
    return {.shared = true,
            .bounded = options.overflow.bounded(),
            .capacity_rows = CapacityRows(options.overflow, options.num_partitions)};
  }

  Result<std::shared_ptr<Table>> OpenTable(const TableSpec& spec) override {
    const std::string where = session_->Where(spec.name);
    HPS_RETURN_IF_ERROR(Check(spec));
    auto description = Find(spec);
    if (!description.ok()) return description.status().WithContext(where);
    if (!description->has_value()) return NotFound(where + ": no such table" + Hint(spec));
    HPS_RETURN_IF_ERROR(Agree(where, **description, spec));
    return MakeRedisTable(session_, StateOf(spec.name, **description), spec);
  }

  Result<std::shared_ptr<Table>> CreateTable(const TableSpec& spec) override {
    const std::string where = session_->Where(spec.name);
    HPS_RETURN_IF_ERROR(Check(spec));
    auto description = Find(spec);
    if (!description.ok()) return description.status().WithContext(where);
    if (description->has_value()) return AlreadyExists(where + ": there is a table of that name; open it or drop it");
    Description made;
    auto created = Describe(spec, /*old=*/false, &made.id);
    if (!created.ok()) return created.status().WithContext(where);
    if (!*created) return AlreadyExists(where + ": another process has just created it; open it");
    made.num_partitions = session_->options.num_partitions;
    made.key_bytes = spec.key_bytes;
    return MakeRedisTable(session_, StateOf(spec.name, made), spec);
  }

  Status DropTable(std::string_view name) override {
    HPS_RETURN_IF_ERROR(session_->CheckOpen());
    const TableSpec spec = {.name = std::string(name)};
    auto description = Find(spec, /*adopt=*/false);
    if (!description.ok()) return description.status().WithContext(session_->Where(name));
    if (!description->has_value()) return NotFound(session_->Where(name) + ": no such table" + Hint(spec));
    return Drop(name, **description).WithContext(session_->Where(name));
  }

  Result<std::vector<std::string>> ListTables() const override {
    HPS_RETURN_IF_ERROR(session_->CheckOpen());
    std::set<std::string> names;
    const auto topology = session_->cluster->topology();
    for (const auto& node : topology->masters) {
      std::string cursor = "0";
      do {
        // A superset of all the names that RedisTableOfKey knows.
        RedisCommandTask task(0, {"SCAN", cursor, "MATCH", "h[pc]*", "COUNT", "1000"});
        task.node = node->name;
        RedisTask* const pointer = &task;
        const Status status = session_->cluster->Run(std::span(&pointer, 1), kNoDeadline);
        if (!status.ok()) return status.WithContext(session_->Where());
        if (task.reply.elements.size() != 2) return Internal(session_->Where() + ": SCAN in a form that is not known");
        for (const RedisReply& key : task.reply.elements[1].elements) {
          if (const auto name = RedisTableOfKey(key.text)) names.emplace(*name);
        }
        cursor = task.reply.elements[0].text;
      } while (cursor != "0");
    }
    return std::vector<std::string>(names.begin(), names.end());
  }

  Result<std::optional<std::string>> ReadRecord(std::string_view name) const override {
    HPS_RETURN_IF_ERROR(session_->CheckOpen());
    auto reply = session_->Call({"GET", RedisRecordKey(name)});
    if (!reply.ok()) return reply.status().WithContext(session_->Where());
    if (reply->kind != RedisReply::Kind::kString) return std::optional<std::string>();
    return std::optional<std::string>(std::move(reply->text));
  }
  Status WriteRecord(std::string_view name, std::string_view value) override {
    return Change({"SET", RedisRecordKey(name), std::string(value)});
  }
  Status EraseRecord(std::string_view name) override { return Change({"DEL", RedisRecordKey(name)}); }

  // How durable rows are is the servers' affair.
  Status Flush() override { return session_->CheckOpen(); }

  Status Close() override {
    if (!CheckNotForked(session_->fork_generation).ok()) return OkStatus();
    if (session_->closed.exchange(true)) return OkStatus();
    std::map<std::string, std::weak_ptr<RedisTableState>, std::less<>> tables;
    {
      std::lock_guard lock(tables_mutex_);
      tables.swap(tables_);
      for (size_t i = 0; i < moved_.size(); ++i) tables.emplace("/" + std::to_string(i), moved_[i]);
      moved_.clear();
    }
    for (auto& [name, table] : tables) {
      if (const auto state = table.lock()) state->FreeMoved();  // nobody can read it from now on
    }
    session_->worker.Stop();
    session_->cluster->Close();
    return OkStatus();
  }

 private:
  Status Check(const TableSpec& spec) const {
    HPS_RETURN_IF_ERROR(session_->CheckOpen());
    const std::string where = session_->Where(spec.name);
    if (spec.name.empty() || spec.name.find_first_of("{}") != std::string::npos) {
      return InvalidArgument(where + ": no table may be named so");
    }
    if (spec.row_bytes == 0 || (spec.key_bytes != 4 && spec.key_bytes != 8)) {
      return InvalidArgument(where + ": rows of " + std::to_string(spec.row_bytes) + " bytes with keys of " +
                             std::to_string(spec.key_bytes) + "; rows take at least 1 byte and keys 4 or 8");
    }
    return OkStatus();
  }

  Status Change(std::vector<std::string> words) {
    HPS_RETURN_IF_ERROR(session_->CheckOpen());
    return session_->Call(std::move(words)).status().WithContext(session_->Where());
  }

  std::shared_ptr<RedisTableState> StateOf(const std::string& name, const Description& description) {
    std::lock_guard lock(tables_mutex_);
    std::weak_ptr<RedisTableState>& known = tables_[name];
    std::shared_ptr<RedisTableState> state = known.lock();
    if (state == nullptr || state->place()->dropped || state->id() != description.id) {
      state = std::make_shared<RedisTableState>(session_, description.Layout(name), name, description.id);
      known = state;
    }
    return state;
  }

  // The description of a table, completed where it was half-written, made where the table has none (`adopt`), and
  // nothing where there is no such table.
  Result<std::optional<Description>> Find(const TableSpec& spec, bool adopt = true) {
    HPS_ASSIGN_OR_RETURN(std::optional<Description> description, ReadDescription(spec.name));
    const Deadline end = std::chrono::steady_clock::now() + session_->options.patience;
    while (description && description->dropping_since != 0) {
      // Whoever drops it does so at this moment, unless it has died.
      if (Now() - description->dropping_since > kDropSeconds) {
        HPS_RETURN_IF_ERROR(Drop(spec.name, *description));
      } else if (std::chrono::steady_clock::now() > end) {
        return Unavailable("another process is dropping this table; try again in a minute");
      } else {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      HPS_ASSIGN_OR_RETURN(description, ReadDescription(spec.name));
    }
    if (description && (description->row_bytes == 0 || description->key_bytes == 0 || description->id.empty()) &&
        adopt) {
      std::string id;
      HPS_RETURN_IF_ERROR(Describe(spec, description->old, &id).status());
      HPS_ASSIGN_OR_RETURN(description, ReadDescription(spec.name));
    }
    if (description) return description;
    for (const bool old : {false, true}) {
      const RedisLayout layout(old ? RedisLayout::Version::kOld : RedisLayout::Version::kCurrent, spec.name,
                               session_->options.num_partitions, spec.key_bytes);
      HPS_ASSIGN_OR_RETURN(const std::vector<bool> there, PartitionsThere(layout));
      if (std::find(there.begin(), there.end(), true) == there.end()) continue;
      if (adopt) HPS_RETURN_IF_ERROR(CheckSample(layout, there, spec));
      Description found;
      if (adopt) HPS_RETURN_IF_ERROR(Describe(spec, old, &found.id).status());
      found.num_partitions = static_cast<uint32_t>(adopt ? layout.num_partitions() : there.size());
      found.row_bytes = spec.row_bytes;
      found.key_bytes = spec.key_bytes;
      found.old = old;
      return std::optional<Description>(found);
    }
    return std::optional<Description>();
  }

  Result<std::optional<Description>> ReadDescription(std::string_view name) const {
    HPS_ASSIGN_OR_RETURN(const RedisReply reply,
                         session_->Call({"HMGET", RedisDescriptionKey(name), "num_partitions", "row_bytes", "key_bytes",
                                         "layout", "dropping", "id"}));
    if (reply.elements.size() != 6 || reply.elements[0].kind == RedisReply::Kind::kNil) {
      return std::optional<Description>();
    }
    Description description;
    const uint64_t partitions = ParseNumber(reply.elements[0]);
    if (partitions == 0 || partitions > kMostPartitions) {
      return DataLoss("the description " + RedisDescriptionKey(name) + " cannot be understood: num_partitions is \"" +
                      reply.elements[0].text + "\"");
    }
    description.num_partitions = static_cast<uint32_t>(partitions);
    description.row_bytes = ParseNumber(reply.elements[1]);
    description.key_bytes = static_cast<int>(ParseNumber(reply.elements[2]));
    description.old = reply.elements[3].text == "4.1";
    description.dropping_since = static_cast<int64_t>(ParseNumber(reply.elements[4]));
    description.id = reply.elements[5].text;
    return std::optional<Description>(description);
  }

  // Sets what is not set. True: the table was not described before. *id: the table's.
  Result<bool> Describe(const TableSpec& spec, bool old, std::string* id) {
    const std::string key = RedisDescriptionKey(spec.name);
    const auto set = [&](const char* field, const std::string& value) {
      return session_->Call({"HSETNX", key, field, value});
    };
    // The layout comes first, so that no table of the old one is ever taken for one of the new.
    if (old) HPS_RETURN_IF_ERROR(session_->Call({"HSETNX", key, "layout", "4.1"}).status());
    HPS_ASSIGN_OR_RETURN(const RedisReply first,
                         set("num_partitions", std::to_string(session_->options.num_partitions)));
    HPS_RETURN_IF_ERROR(set("row_bytes", std::to_string(spec.row_bytes)).status());
    HPS_RETURN_IF_ERROR(set("key_bytes", std::to_string(spec.key_bytes)).status());
    if (capabilities().bounded) {  // for whoever looks for lost rows
      HPS_RETURN_IF_ERROR(set("overflow_margin", std::to_string(session_->options.overflow.margin)).status());
    }
    HPS_RETURN_IF_ERROR(set("id", RandomRedisId()).status());
    HPS_ASSIGN_OR_RETURN(RedisReply known, session_->Call({"HGET", key, "id"}));  // somebody may have been quicker
    *id = std::move(known.text);
    return first.integer == 1;
  }

  static Status Agree(const std::string& where, const Description& description, const TableSpec& spec,
                      uint32_t num_partitions) {
    const auto differs = [&](const char* what, uint64_t stored, uint64_t asked, const char* key) {
      return FailedPrecondition(where + " has " + what + " " + std::to_string(stored) +
                                ", the configuration asks for " + std::to_string(asked) + "; set " + key +
                                " to what the table has (the same on all hosts), or drop the table and load the model "
                                "again");
    };
    if (description.num_partitions != num_partitions) {
      return differs("num_partitions", description.num_partitions, num_partitions, "num_partitions");
    }
    if (description.row_bytes != spec.row_bytes) {
      return differs("rows whose number of bytes is", description.row_bytes, spec.row_bytes,
                     "embedding_vecsize_per_table (4 bytes each)");
    }
    if (description.key_bytes != spec.key_bytes) {
      return differs("keys whose number of bytes is", static_cast<uint64_t>(description.key_bytes),
                     static_cast<uint64_t>(spec.key_bytes), "supportlonglong (true: 8 bytes)");
    }
    return OkStatus();
  }
  Status Agree(const std::string& where, const Description& description, const TableSpec& spec) const {
    return Agree(where, description, spec, session_->options.num_partitions);
  }

  // Which partitions of a table without a description exist; twice as many are looked for as there should be.
  Result<std::vector<bool>> PartitionsThere(const RedisLayout& layout) const {
    std::deque<RedisCommandTask> tasks;
    for (uint32_t i = 0; i < 2 * layout.num_partitions(); ++i) {
      const std::string key = layout.ValuesKey(i);
      tasks.emplace_back(RedisSlot(key), std::vector<std::string>{"EXISTS", key});
    }
    HPS_RETURN_IF_ERROR(session_->Run(tasks));
    std::vector<bool> there;
    for (const RedisCommandTask& task : tasks) there.push_back(task.reply.integer == 1);
    return there;
  }

  // Whether a table of another program is what the configuration takes it for.
  Status CheckSample(const RedisLayout& layout, const std::vector<bool>& there, const TableSpec& spec) const {
    const std::string partitions = std::to_string(layout.num_partitions());
    const std::string remedy = "; set num_partitions to the number of the program that wrote it";
    if (std::find(there.begin() + layout.num_partitions(), there.end(), true) != there.end()) {
      return FailedPrecondition("another program wrote this table in more partitions than num_partitions, " +
                                partitions + remedy);
    }
    for (uint32_t i = 0; i < layout.num_partitions(); ++i) {
      if (!there[i]) continue;
      const std::string name = layout.ValuesKey(i);
      ScanTask task({&name, RedisSlot(name), layout.key_bytes()}, "0", kSampleRows);
      RedisTask* const pointer = &task;
      HPS_RETURN_IF_ERROR(session_->cluster->Run(std::span(&pointer, 1), kNoDeadline));
      for (size_t j = 0; j + 1 < task.elements.size(); j += 2) {
        const std::string& field = task.elements[j].text;
        const size_t row_bytes = task.elements[j + 1].text.size();
        if (field.size() != static_cast<size_t>(spec.key_bytes)) {
          return FailedPrecondition("another program wrote this table with keys of " + std::to_string(field.size()) +
                                    " bytes, the configuration asks for " + std::to_string(spec.key_bytes) +
                                    "; change supportlonglong");
        }
        if (row_bytes != spec.row_bytes) {
          return FailedPrecondition("another program wrote this table with rows of " + std::to_string(row_bytes) +
                                    " bytes, the configuration asks for " + std::to_string(spec.row_bytes) +
                                    "; change embedding_vecsize_per_table");
        }
        const Key key = RedisLayout::FromRaw(field.data(), spec.key_bytes);
        if (layout.PartitionOf(key) != i) {
          return FailedPrecondition("another program wrote this table with key " + std::to_string(key) +
                                    " in partition " + std::to_string(i) + ", by num_partitions " + partitions +
                                    " it belongs into partition " + std::to_string(layout.PartitionOf(key)) + remedy);
        }
      }
    }
    return OkStatus();
  }

  // Says where a table of nearly that name is: default names have been counted from 0 and from 1, and the oldest tables
  // have another prefix.
  std::string Hint(const TableSpec& spec) {
    constexpr std::string_view kDefault = ".sparse_embedding";
    constexpr std::string_view kPrefix = "hps_et.";
    std::vector<std::string> stems = {spec.name};
    if (const size_t at = spec.name.rfind(kDefault); at != std::string::npos) {
      const std::string digits = spec.name.substr(at + kDefault.size());
      if (!digits.empty() && digits.size() < 10 && digits.find_first_not_of("0123456789") == std::string::npos) {
        const uint64_t number = std::strtoull(digits.c_str(), nullptr, 10);
        const std::string stem = spec.name.substr(0, at) + std::string(kDefault);
        stems.push_back(stem + std::to_string(number + 1));
        if (number > 0) stems.push_back(stem + std::to_string(number - 1));
      }
    }
    std::vector<std::string> names;
    for (const std::string& stem : stems) {
      if (stem != spec.name) names.push_back(stem);
      if (stem.starts_with(kPrefix)) names.push_back("hctr_et." + stem.substr(kPrefix.size()));
    }
    for (const std::string& name : names) {
      auto description = ReadDescription(name);
      bool there = description.ok() && description->has_value();
      for (const auto version : {RedisLayout::Version::kCurrent, RedisLayout::Version::kOld}) {
        if (there) break;
        auto partitions = PartitionsThere(RedisLayout(version, name, session_->options.num_partitions, 8));
        there = partitions.ok() && std::find(partitions->begin(), partitions->end(), true) != partitions->end();
      }
      if (!there) continue;
      return ", but there is \"" + name + "\": " +
             (name.starts_with(kPrefix)
                  ? "tables without names are counted from 0 here, and from 1 by other versions; write its name into "
                    "embedding_table_names"
                  : "it has the prefix of versions 3.3 and 3.4; copy it to the prefix hps_et, or load the model again");
    }
    return "";
  }

  Status Drop(std::string_view name, const Description& description) {
    const std::string key = RedisDescriptionKey(name);
    const RedisLayout layout = description.Layout(name);
    HPS_RETURN_IF_ERROR(session_
                            ->Call({"HSET", key, "num_partitions", std::to_string(layout.num_partitions()), "layout",
                                    description.old ? "4.1" : "4.2", "dropping", std::to_string(Now())})
                            .status());
    std::shared_ptr<RedisTableState> state;
    {
      std::lock_guard lock(tables_mutex_);
      if (auto known = tables_.find(name); known != tables_.end()) {
        state = known->second.lock();
        tables_.erase(known);
        if (state != nullptr) moved_.push_back(state);
        std::erase_if(moved_, [](const auto& other) { return other.expired(); });
      }
    }
    if (state != nullptr) HPS_RETURN_IF_ERROR(state->MoveAway());
    std::deque<RedisCommandTask> tasks;
    for (uint32_t i = 0; i < layout.num_partitions(); ++i) {
      for (const std::string& hash : {layout.ValuesKey(i), layout.MetadataKey(i)}) {
        tasks.emplace_back(RedisSlot(hash), std::vector<std::string>{"UNLINK", hash});
      }
    }
    HPS_RETURN_IF_ERROR(session_->Run(tasks));
    return session_->Call({"UNLINK", key}).status();
  }

  const std::shared_ptr<RedisSession> session_;
  std::mutex tables_mutex_;
  std::map<std::string, std::weak_ptr<RedisTableState>, std::less<>> tables_;
  std::vector<std::weak_ptr<RedisTableState>> moved_;  // dropped and still held
};

Result<std::vector<RedisEndpoint>> ParseAddresses(const std::string& address) {
  std::vector<RedisEndpoint> endpoints;
  size_t first = 0;
  while (first <= address.size()) {
    const size_t end = std::min(address.find_first_of(",;", first), address.size());
    std::string text = address.substr(first, end - first);
    text.erase(0, text.find_first_not_of(' '));
    text.erase(text.find_last_not_of(' ') + 1);
    if (text.find_first_of("/@") != std::string::npos) {  // not shown: there may be a password in it
      return InvalidArgument(
          "an address is host:port, several parted by commas, without redis://, a login or a path; user_name, password "
          "and enable_tls are options of their own");
    }
    if (!ParseRedisEndpoint(text, kRedisDefaultPort, "", &endpoints.emplace_back())) {
      return InvalidArgument("\"" + text + "\" is not host[:port], several parted by commas, ports from 1 to 65535");
    }
    first = end + 1;
  }
  return endpoints;
}

}  // namespace

RedisStoreOptions RedisOptionsOf(const VolatileConfig& config) {
  RedisStoreOptions options;
  options.address = config.address;
  options.user_name = config.user_name;
  options.password = config.password;
  options.password_env = config.password_env;
  options.password_file = config.password_file;
  options.num_partitions = config.num_partitions;
  options.num_node_connections = config.num_node_connections;
  options.max_get_batch_size = config.max_get_batch_size;
  options.max_set_batch_size = config.max_set_batch_size;
  options.enable_tls = config.enable_tls;
  options.tls_ca_certificate = config.tls_ca_certificate;
  options.tls_client_certificate = config.tls_client_certificate;
  options.tls_client_key = config.tls_client_key;
  options.tls_server_name_identification = config.tls_server_name_identification;
  options.overflow = {.margin = config.overflow_margin,
                      .policy = config.overflow_policy,
                      .resolution_target = config.overflow_resolution_target,
                      .refresh_time_after_fetch = config.refresh_time_after_fetch};
  return options;
}

Result<std::unique_ptr<TableStore>> OpenRedisStore(const RedisStoreOptions& options) {
  const bool plain = options.address.find('@') == std::string::npos;
  const std::string where = std::string(kKind) + (plain ? " \"" + options.address + "\"" : "");
  auto opened = [&]() -> Result<std::unique_ptr<TableStore>> {
    if (options.num_partitions == 0 || options.num_partitions > kMostPartitions) {
      return InvalidArgument("num_partitions is " + std::to_string(options.num_partitions) + "; use 1 to 65536");
    }
    if (options.num_node_connections == 0 || options.max_get_batch_size == 0 || options.max_set_batch_size == 0) {
      return InvalidArgument("num_node_connections, max_get_batch_size and max_set_batch_size are at least 1");
    }
    RedisClusterOptions cluster_options;
    HPS_ASSIGN_OR_RETURN(cluster_options.seeds, ParseAddresses(options.address));
    HPS_ASSIGN_OR_RETURN(cluster_options.login, LoadRedisLogin(options));
    cluster_options.num_node_connections = options.num_node_connections;
    cluster_options.patience = options.patience;
    HPS_ASSIGN_OR_RETURN(std::shared_ptr<RedisCluster> cluster, RedisCluster::Open(std::move(cluster_options)));
    RedisStoreOptions kept = options;
    kept.password.clear();
    return std::unique_ptr<TableStore>(
        std::make_unique<RedisStore>(std::make_shared<RedisSession>(std::move(cluster), std::move(kept))));
  }();
  if (!opened.ok()) return opened.status().WithContext(where);
  return opened;
}

}  // namespace hps
