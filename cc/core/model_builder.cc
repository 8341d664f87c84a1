// Order of things, per model: persistent and volatile tables are filled, the persistent store is flushed, the caches of
// devices are made and filled from what the tiers hold, the persistent store's record is written (the
// moment at which the version exists there), other generations of its tables are dropped, and only then is the Model
// handed out. Nothing can fail after the record is written.
//
// A table that is loaded for the first time has generation 0, under the name that the predecessor gives it. Before its
// rows come in, the record names it with an empty fingerprint, so that the next start can tell a load that was cut
// short from a table that another program has written.
//
// A shared volatile store is switched last (shared_tier.h): its rows are then never of a version that this node's
// database does not have.
//
// Lock order: the claim of a shared store (waiting for another node, or another server of this process), then
// load_mutex. Loads into persistent stores are serialised in the process (load_mutex), because two servers may share a
// database; nothing else is locked while it is held.

#include "cc/core/model_builder.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <random>

#include "cc/base/system_limits.h"
#include "cc/core/host_memory.h"
#include "cc/core/model_record.h"
#include "cc/core/shared_tables.h"
#include "cc/core/shared_tier.h"
#include "cc/core/single_flight.h"
#include "cc/core/volatile_share.h"
#include "hps/log.h"
#include "hps/model_reader.h"

namespace hps {
namespace {

std::mutex& PersistentLoadMutex() {
  static std::mutex* mutex = new std::mutex;
  return *mutex;
}

constexpr char kAnyVersion[] = "";

class Builder {
 public:
  Builder(const ModelConfig& config, const ServerResources& resources, const BuildOptions& options)
      : config_(config),
        resources_(resources),
        options_(options),
        volatile_(resources.volatile_store.get()),
        persistent_(resources.persistent_store.get()) {
    if (volatile_ && volatile_->capabilities().shared) shared_.emplace(*volatile_, config.name, options.claim);
  }

  Result<std::shared_ptr<Model>> Build() {
    if (!options_.shared.empty()) {
      HPS_RETURN_IF_ERROR(BuildOverShared().WithContext("model '" + config_.name + "'"));
      return model_;
    }
    if (shared_) HPS_RETURN_IF_ERROR(PrepareShared().WithContext("model '" + config_.name + "'"));
    std::unique_lock<std::mutex> lock;
    if (Writable()) lock = std::unique_lock(PersistentLoadMutex());
    if (persistent_) {
      HPS_ASSIGN_OR_RETURN(old_record_, ReadModelRecord(*persistent_, config_.name));
      new_record_ = old_record_;  // tables that the configuration does not name stay what they are
    }
    model_->config = config_;
    // Caught here, because what was begun must be undone.
    Status status = WithinLimits("its tables cannot be loaded", [&] { return BuildTables(); });
    if (!status.ok()) {
      Undo();
      return status.WithContext("model '" + config_.name + "'");
    }
    return model_;
  }

 private:
  bool Writable() const { return persistent_ && persistent_->capabilities().writable; }

  // What the rows of a table are: the folder they come from, or came from when a database was filled.
  Result<std::string> Fingerprint(const TableConfig& table, const ModelRecord& record) {
    if (persistent_ && (!Writable() || !options_.load_persistent)) {
      const auto found = record.tables.find(table.name);
      if (found != record.tables.end() && !found->second.fingerprint.empty()) return found->second.fingerprint;
      // Written by another program: nobody can say whether the shared tier holds the same rows. Loading them again is
      // always right.
      return "a database without a record, seen by " + std::to_string(std::random_device{}());
    }
    return FolderFingerprint(table);
  }

  // Taken once: all tiers agree on what was loaded.
  Result<std::string> FolderFingerprint(const TableConfig& table) {
    std::string& known = fingerprints_[table.name];
    if (known.empty()) {
      HPS_ASSIGN_OR_RETURN(known, FingerprintTableFolder(table.path, table.width));
    }
    return known;
  }

  Status PrepareShared() {
    ModelRecord record;
    if (persistent_) {
      HPS_ASSIGN_OR_RETURN(record, ReadModelRecord(*persistent_, config_.name));
    }
    for (const TableConfig& table : config_.tables) {
      wanted_[table.name] = kAnyVersion;
      if (!options_.load_volatile && !persistent_) continue;
      auto fingerprint = Fingerprint(table, record);
      if (!fingerprint.ok()) return fingerprint.status().WithContext(Context(table));
      wanted_[table.name] = std::move(fingerprint).value();
    }
    std::map<std::string, SharedTier::Wanted> wanted;
    for (const TableConfig& table : config_.tables) {
      wanted[table.name] = {wanted_[table.name], Spec(table)};
      if (SharedTierIsAlone() && options_.load_volatile) {
        HPS_ASSIGN_OR_RETURN(wanted[table.name].rows, FolderRows(table));
      }
    }
    const bool gives_up_rows = volatile_->capabilities().bounded;
    return shared_->Prepare(
        wanted,
        {.load = options_.load_volatile, .alone = SharedTierIsAlone(), .whole = SharedTierIsAlone() && !gives_up_rows});
  }

  // Whether a row that a load leaves out of the shared tier is served by no tier, and is meant to be there.
  bool SharedTierIsAlone() const { return shared_ && !persistent_ && options_.initial_cache_rate >= 1.0; }

  // What the record says of the tables that were filled. At the end of all loads: the load of one table may have pushed
  // out rows of another.
  Status CountSharedRows() {
    for (size_t i = 0; i < config_.tables.size(); ++i) {
      const TableConfig& table = config_.tables[i];
      const ModelTable& built = model_->tables[i];
      const auto found = shared_contents_.find(table.name);
      if (found == shared_contents_.end()) continue;
      SharedTier::Contents& contents = found->second;
      const Table& stored = *built.stack.volatile_tier.table;
      const uint64_t written = built.load.rows_written.back();
      HPS_ASSIGN_OR_RETURN(const TableStats stats, stored.Stats());
      if (stats.rows_estimated) continue;
      contents.rows = stats.rows;
      if (contents.all_rows > 0 || stats.rows >= written) continue;
      Status lost = DataLoss("rows were lost");
      if (built.source == "folder") lost = CheckNothingLost(stored, table.path, written, *volatile_).status();
      if (lost.ok()) continue;  // duplicates
      if (SharedTierIsAlone() || lost.code() != StatusCode::kDataLoss) return lost.WithContext(Context(table));
      contents.all_rows = written;  // the persistent tier serves what is lost; nodes without one must know
    }
    return OkStatus();
  }

  static std::string Context(const TableConfig& table) { return "table '" + table.name + "' (" + table.path + ")"; }

  Status BuildTables() {
    HPS_RETURN_IF_ERROR(CheckMemory());
    for (const TableConfig& table : config_.tables) {
      HPS_RETURN_IF_ERROR(BuildTable(table).WithContext(Context(table)));
    }
    if (Writable() && record_changed_) {
      HPS_RETURN_IF_ERROR(persistent_->Flush());
      HPS_RETURN_IF_ERROR(RecordHeldRows());
    }
    HPS_RETURN_IF_ERROR(BuildCaches());
    if (Writable() && record_changed_) {
      HPS_RETURN_IF_ERROR(WriteModelRecord(*persistent_, config_.name, new_record_));
      record_changed_ = false;  // the version exists there: nothing to undo
      created_persistent_.clear();
    }
    if (shared_) {
      HPS_RETURN_IF_ERROR(CountSharedRows());
      HPS_RETURN_IF_ERROR(shared_->Publish(shared_contents_));
    }
    if (Writable() && options_.load_persistent) DropOtherGenerations();
    return OkStatus();
  }

  // The tiers and caches are those of the shared tables; counters and workspaces are the model's own.
  Status BuildOverShared() {
    model_->config = config_;
    std::vector<std::shared_ptr<const Model>> versions;
    model_->tables.reserve(config_.tables.size());
    std::vector<CachedTable> tables;
    for (size_t i = 0; i < config_.tables.size(); ++i) {
      const TableConfig& table = config_.tables[i];
      HPS_ASSIGN_OR_RETURN(versions.emplace_back(), options_.shared[i]->slot.Current());
      const TierStack& from = versions.back()->tables.front().stack;
      ModelTable& built = model_->tables.emplace_back();
      built.name = table.name;
      built.source = "shared";
      built.shared = options_.shared[i];
      built.stack.default_row = from.default_row;
      InitStack(table, &built.stack);
      built.stack.volatile_tier.table = from.volatile_tier.table;
      built.stack.persistent_tier.table = from.persistent_tier.table;
      tables.push_back({.stack = &built.stack, .shared = versions.back()->caches.get()});
    }
    return BuildCaches(tables, CacheParts::kWorkspaces);
  }

  Status BuildCaches() {
    std::vector<CachedTable> tables;
    for (const ModelTable& table : model_->tables) tables.push_back({&table.stack, shared_.has_value()});
    return BuildCaches(tables, options_.cache_parts);
  }

  Status BuildCaches(std::span<const CachedTable> tables, CacheParts parts) {
    if (!ModelCaches::Wanted(config_, resources_.devices.get())) return OkStatus();
    CacheBuildOptions options;
    options.parts = parts;
    options.long_keys = resources_.long_keys;
    options.executor = resources_.executor.get();
    options.io_executor = resources_.executor.get();
    options.cancelled = options_.cancelled;
    HPS_ASSIGN_OR_RETURN(model_->caches,
                         ModelCaches::Build(config_, tables, options, *resources_.devices, resources_.metrics));
    return OkStatus();
  }

  // What the loaded tables hold now: repeated keys of a folder are one row. `hps inspect` takes fewer for lost rows.
  Status RecordHeldRows() {
    for (const ModelTable& table : model_->tables) {
      const auto loaded = folder_rows_.find(table.name);
      if (loaded == folder_rows_.end()) continue;
      HPS_ASSIGN_OR_RETURN(const TableStats stats, table.stack.persistent_tier.table->Stats());
      // An estimate may count a row that was written twice as two, but there are no more than in the folder. That there
      // are none is only said of a folder without rows.
      const uint64_t folder_rows = loaded->second;
      new_record_.tables[table.name].rows =
          stats.rows_estimated ? std::clamp(stats.rows, std::min<uint64_t>(folder_rows, 1), folder_rows) : stats.rows;
    }
    return OkStatus();
  }

  // Refuses before anything is loaded what could only end in the process being killed.
  Status CheckMemory() {
    const std::optional<uint64_t> available =
        options_.available_memory_bytes ? options_.available_memory_bytes : AvailableMemoryBytes();
    if (!available) return OkStatus();
    std::vector<TableLoad> cached;
    std::vector<TableLoad> stored;
    std::vector<const std::string*> folders;  // of `cached`
    for (const TableConfig& table : config_.tables) {
      const bool stores = Writable() && options_.load_persistent;
      const bool caches =
          volatile_ && options_.load_volatile && !(shared_ && shared_->Holds(table.name, wanted_[table.name]));
      if (!stores && !caches) continue;
      HPS_ASSIGN_OR_RETURN(const uint64_t rows, FolderRows(table));
      TableSpec spec = Spec(table);
      if (stores) {
        HPS_ASSIGN_OR_RETURN(const bool there, InDatabase(table));
        spec.expected_rows = rows;
        if (!there) stored.push_back({spec});
      }
      if (!caches) continue;
      const auto cache_rows = CacheRows(rows);
      if (!cache_rows.ok()) return cache_rows.status().WithContext(Context(table));
      spec.expected_rows = *cache_rows;
      cached.push_back({spec});
      folders.push_back(&table.path);
    }
    const uint64_t passing = stored.empty() ? 0 : persistent_->MemoryFor(stored);
    const auto needed = [&] { return passing + (cached.empty() ? 0 : volatile_->MemoryFor(cached)); };
    if (needed() <= *available) return OkStatus();
    // Keys of 0 to rows - 1 take less. That is looked at only where it decides.
    for (size_t i = 0; i < cached.size(); ++i) {
      HPS_ASSIGN_OR_RETURN(const DenseKeys dense, CountDenseKeys(*folders[i], cached[i].spec.expected_rows));
      cached[i].dense_rows = dense.rows;
    }
    if (needed() <= *available) return OkStatus();
    return ResourceExhausted("its tables need " + std::to_string(needed() >> 20) + " MiB of memory and " +
                             std::to_string(*available >> 20) + " MiB are available" +
                             (passing > 0 ? " (" + std::to_string(passing >> 20) + " MiB while they are loaded into " +
                                                std::string(persistent_->kind()) + ")"
                                          : "") +
                             "; use a persistent_db with a smaller initial_cache_rate, or a host with more memory");
  }

  // Whether the database holds this version of the folder.
  Result<bool> InDatabase(const TableConfig& table) {
    const auto found = old_record_.tables.find(table.name);
    if (found == old_record_.tables.end() || found->second.fingerprint.empty()) return false;
    const auto fingerprint = FolderFingerprint(table);
    if (!fingerprint.ok()) return fingerprint.status().WithContext(Context(table));
    return *fingerprint == found->second.fingerprint;
  }

  Result<uint64_t> CacheRows(uint64_t rows) const {
    if (!volatile_) return uint64_t{0};
    return VolatileShare(rows, options_.initial_cache_rate, *volatile_, persistent_ != nullptr);
  }

  // Rows in the table's folder; 0 where a read-only persistent store stands in for it and there is no folder.
  Result<uint64_t> FolderRows(const TableConfig& table) {
    auto reader = OpenTableFolder(table.path, table.width);
    if (!reader.ok()) {
      if (persistent_ && (!Writable() || !options_.load_persistent)) return uint64_t{0};
      return reader.status().WithContext(Context(table));
    }
    return (*reader)->rows();
  }

  Status BuildTable(const TableConfig& table) {
    ModelTable& model_table = model_->tables.emplace_back();
    model_table.name = table.name;
    TierStack& stack = model_table.stack;
    stack.default_row.assign(table.width, table.default_value);
    InitStack(table, &stack);

    LoadOptions load;
    load.table = config_.name + "/" + table.name;
    load.long_keys = resources_.long_keys;
    load.cancelled = options_.cancelled;
    load.progress = [this, log = options_.show_progress ? LogLoadProgress(load.table)
                                                        : LoadProgressCallback()](const LoadProgress& progress) {
      if (shared_) shared_->KeepClaim();
      if (log) log(progress);
    };

    bool fill_persistent = false;
    bool persistent_empty = false;
    if (persistent_) HPS_RETURN_IF_ERROR(OpenPersistent(table, &stack, &fill_persistent, &persistent_empty));
    const bool from_folder = !persistent_ || fill_persistent || persistent_empty;
    uint64_t rows = 0;
    bool rows_estimated = false;
    std::unique_ptr<ModelReader> reader;
    if (!from_folder) {
      HPS_ASSIGN_OR_RETURN(TableStats stats, stack.persistent_tier.table->Stats());
      rows = stats.rows;
      rows_estimated = stats.rows_estimated;
    } else if (fill_persistent || (volatile_ && options_.load_volatile)) {
      HPS_ASSIGN_OR_RETURN(reader, OpenTableFolder(table.path, table.width));
      rows = reader->rows();
    }
    uint64_t cache_rows = 0;
    if (options_.load_volatile) {
      HPS_ASSIGN_OR_RETURN(cache_rows, CacheRows(rows));
    }
    bool fill_volatile = false;
    if (volatile_) HPS_RETURN_IF_ERROR(OpenVolatile(table, cache_rows, &stack, &fill_volatile));
    if (volatile_ && !persistent_ && !options_.load_volatile) {
      HPS_RETURN_IF_ERROR(CheckFilledByOthers(table.name, *stack.volatile_tier.table));
    }

    model_table.source = from_folder ? "folder" : "persistent";
    if (from_folder) {
      std::vector<Table*> targets;
      if (fill_persistent) {
        targets.push_back(stack.persistent_tier.table.get());
        load.row_limits.push_back(rows);
      }
      if (fill_volatile) {
        targets.push_back(stack.volatile_tier.table.get());
        load.row_limits.push_back(cache_rows);
      }
      if (targets.empty()) model_table.source = "volatile";
      if (!targets.empty()) HPS_RETURN_IF_ERROR(LoadTable(*reader, targets, load, &model_table.load));
      if (fill_volatile && !persistent_) HPS_RETURN_IF_ERROR(CheckNothingEvicted(*stack.volatile_tier.table));
    } else if (fill_volatile) {
      // The count of the persistent table may be an estimate.
      const bool all = options_.initial_cache_rate >= 1.0;
      if (!all) load.row_limits = {cache_rows};
      if (all && volatile_->capabilities().bounded) load.row_limits = {volatile_->capabilities().capacity_rows};
      HPS_RETURN_IF_ERROR(CopyTable(*stack.persistent_tier.table, *stack.volatile_tier.table, load, &model_table.load));
    }
    if (shared_ && fill_volatile) {
      const uint64_t written = model_table.load.rows_written.back();
      const bool cut = !load.row_limits.empty() && written >= load.row_limits.back();
      // Of an estimate nobody knows whether that was all.
      const bool left_out = cut && (rows_estimated || written < rows);
      shared_contents_[table.name] = {.all_rows = left_out ? std::max({rows, written, uint64_t{1}}) : 0};
    }
    // Around the table last of all: what has been opened and filled is the store's own.
    if (stack.persistent_tier.table) {
      const MetricLabels labels = Labels(table, "persistent");
      stack.persistent_tier.table = std::make_shared<SingleFlightTable>(
          stack.persistent_tier.table, resources_.metrics.FindCounter("hps_keys_waited_total", labels));
    }
    return OkStatus();
  }

  MetricLabels Labels(const TableConfig& table, const char* tier = nullptr) const {
    MetricLabels labels = {{"model", config_.name}, {"table", table.name}};
    if (tier != nullptr) labels.push_back({"tier", tier});
    return labels;
  }

  void InitStack(const TableConfig& table, TierStack* stack) {
    MetricsRegistry& metrics = resources_.metrics;
    const auto init_tier = [&](const Tier& common, const char* name) {
      const MetricLabels labels = Labels(table, name);
      Tier tier = common;
      tier.rows_served = metrics.FindCounter("hps_rows_served_total", labels);
      tier.rows_skipped = metrics.FindCounter("hps_rows_skipped_total", labels);
      tier.fetches_failed = metrics.FindCounter("hps_fetches_failed_total", labels);
      tier.fetch_seconds = metrics.FindHistogram("hps_fetch_duration_seconds", labels);
      return tier;
    };
    stack->volatile_tier = init_tier(resources_.volatile_tier, "volatile");
    stack->persistent_tier = init_tier(resources_.persistent_tier, "persistent");
    const MetricLabels labels = Labels(table);
    stack->metrics = {metrics.FindCounter("hps_lookups_done_total", labels),
                      metrics.FindCounter("hps_keys_asked_total", labels),
                      metrics.FindCounter("hps_rows_served_total", Labels(table, "default")),
                      metrics.FindCounter("hps_rows_unavailable_total", labels)};
    if (!options_.cache_missed_embeddings || resources_.promoter == nullptr) return;
    const MetricLabels up = Labels(table, "volatile");
    stack->promoter = resources_.promoter.get();
    stack->promotions = {metrics.FindCounter("hps_rows_promoted_total", up),
                         metrics.FindCounter("hps_rows_promotion_dropped_total", up),
                         metrics.FindCounter("hps_rows_promotion_repeated_total", up)};
  }

  // Opens the table's current generation, or creates the one that the folder is to be loaded into (*fill). *empty: it
  // has no rows, and is not to be loaded.
  Status OpenPersistent(const TableConfig& table, TierStack* stack, bool* fill, bool* empty) {
    TableSpec spec = Spec(table);
    const auto found = old_record_.tables.find(table.name);
    const TableRecord* old = found == old_record_.tables.end() ? nullptr : &found->second;
    const bool complete = old != nullptr && !old->fingerprint.empty();
    const uint64_t generation = old ? old->generation : 0;
    spec.name = StoredTableName(config_.name, table.name, generation);
    std::shared_ptr<Table>& opened_table = stack->persistent_tier.table;
    if (!Writable() || !options_.load_persistent) {
      if (old && !complete) {
        return FailedPrecondition(std::string("its first load into the database was cut short; load it once without ") +
                                  (Writable() ? "\"initialize_after_startup\": false" : "read_only"));
      }
      auto opened = persistent_->OpenTable(spec);
      if (Writable() && opened.status().code() == StatusCode::kNotFound) {
        opened = persistent_->CreateTable(spec);
        if (opened.ok()) created_persistent_.push_back(spec.name);
      }
      if (!opened.ok()) return opened.status();
      opened_table = std::move(opened).value();
      HPS_ASSIGN_OR_RETURN(*empty, LacksItsRows(*opened_table, complete ? old : nullptr));
      if (!*empty) return OkStatus();
      const std::string what = complete ? "the database holds none of the " + std::to_string(old->rows) +
                                              " rows that were loaded into this table"
                                        : "the database holds no row of this table, and no record that it was loaded";
      if (!Writable()) {
        return FailedPrecondition(what +
                                  ": every key would be answered with the default value; load it once with a "
                                  "server that may write (persistent_db with read_only false and "
                                  "initialize_after_startup true)");
      }
      Log(LogLevel::kWarning, "model '" + config_.name + "', table '" + table.name + "': " + what +
                                  "; persistent_db.initialize_after_startup is false, so it stays empty, and keys that "
                                  "the volatile tier does not hold are answered with the default value");
      return OkStatus();
    }
    HPS_ASSIGN_OR_RETURN(std::string fingerprint, FolderFingerprint(table));
    if (complete && old->fingerprint == fingerprint) {
      auto opened = persistent_->OpenTable(spec);
      if (opened.ok()) {
        opened_table = std::move(opened).value();
        return OkStatus();
      }
      if (opened.status().code() != StatusCode::kNotFound) return opened.status();
      // The record outlived its table (somebody dropped it): load it again.
    }
    *fill = true;
    record_changed_ = true;
    HPS_ASSIGN_OR_RETURN(auto reader, OpenTableFolder(table.path, table.width));
    spec.expected_rows = reader->rows();
    const uint64_t new_generation = complete ? generation + 1 : generation;
    new_record_.tables[table.name] = {new_generation, std::move(fingerprint)};
    folder_rows_[table.name] = reader->rows();
    spec.name = StoredTableName(config_.name, table.name, new_generation);
    if (old) HPS_RETURN_IF_ERROR(DropLeftover(spec.name));
    auto created = persistent_->CreateTable(spec);
    if (created.ok()) {
      created_persistent_.push_back(spec.name);
      if (!old) HPS_RETURN_IF_ERROR(AnnounceFirstLoad(table.name));
    } else if (created.status().code() == StatusCode::kAlreadyExists) {
      // Without a record: written by another program. Its rows stay, the folder's are written over them.
      created = persistent_->OpenTable(spec);
    }
    if (!created.ok()) return created.status();
    opened_table = std::move(created).value();
    return OkStatus();
  }

  // Whether the table is empty, and not because it was loaded (`loaded`, or nullptr) from a folder without rows.
  static Result<bool> LacksItsRows(const Table& table, const TableRecord* loaded) {
    if (loaded != nullptr && loaded->rows == 0) return false;
    HPS_ASSIGN_OR_RETURN(const TableStats stats, table.Stats());
    return !stats.rows_estimated && stats.rows == 0;
  }

  // What an interrupted load of this generation left behind is incomplete and nobody's.
  Status DropLeftover(const std::string& name) {
    Status dropped = persistent_->DropTable(name);
    return dropped.code() == StatusCode::kNotFound ? OkStatus() : dropped;
  }

  Status AnnounceFirstLoad(const std::string& table) {
    ModelRecord announced = old_record_;
    for (const std::string& name : announced_) announced.tables[name] = {};
    announced.tables[table] = {};
    announced_.push_back(table);
    return WriteModelRecord(*persistent_, config_.name, announced);
  }

  // What the new version replaces, and what crashes left behind. A version that still serves keeps its tables open.
  void DropOtherGenerations() {
    const Result<std::vector<std::string>> stored = persistent_->ListTables();
    Status status = stored.status();
    for (const ModelTable& table : model_->tables) {
      for (size_t i = 0; status.ok() && i < stored->size(); ++i) {
        const std::string& name = (*stored)[i];
        if (!GenerationOf(name, config_.name, table.name)) continue;
        const auto& used = options_.tables_in_use;
        if (std::find(used.begin(), used.end(), name) != used.end()) continue;
        if (name != table.stack.persistent_tier.table->spec().name) status = persistent_->DropTable(name);
      }
    }
    if (!status.ok()) Log(LogLevel::kWarning, "old version of model '" + config_.name + "': " + status.ToString());
  }

  Status OpenVolatile(const TableConfig& table, uint64_t rows, TierStack* stack, bool* fill) {
    TableSpec spec = Spec(table);
    spec.expected_rows = rows;
    if (shared_) {
      HPS_ASSIGN_OR_RETURN(stack->volatile_tier.table,
                           shared_->Open(table.name, spec, wanted_[table.name], options_.load_volatile, fill));
      return OkStatus();
    }
    // The version that is being replaced holds the bare name, or another number.
    for (uint64_t generation = 0;; ++generation) {
      spec.name = StoredTableName(config_.name, table.name, generation);
      auto created = volatile_->CreateTable(spec);
      if (created.ok()) {
        stack->volatile_tier.table = std::move(created).value();
        *fill = options_.load_volatile;
        return OkStatus();
      }
      if (created.status().code() != StatusCode::kAlreadyExists) return created.status();
    }
  }

  // Of the only tier of a model, into which nothing is to be loaded.
  Status CheckFilledByOthers(const std::string& name, const Table& table) const {
    HPS_ASSIGN_OR_RETURN(const TableStats stats, table.Stats());
    if (stats.rows > 0) return OkStatus();
    const std::string absent = shared_ ? shared_->WhyAbsent(name) : "";
    return FailedPrecondition(
        (absent.empty() ? "" : absent + "; ") +
        std::string("the volatile tier holds no row of this table, volatile_db.initialize_after_startup is false and "
                    "there is no persistent_db: every key would be answered with the default value; ") +
        (shared_ ? "load the model with another node first, or set initialize_after_startup to true here"
                 : "set initialize_after_startup to true: nobody else can fill a hash map of this process"));
  }

  TableSpec Spec(const TableConfig& table) const {
    TableSpec spec;
    spec.row_bytes = table.width * sizeof(float);
    spec.key_bytes = resources_.long_keys ? 8 : 4;
    return spec;
  }

  void Undo() {
    model_->caches.reset();
    if (shared_) shared_->Undo();
    DropVolatileTables(*model_, resources_);
    std::vector<Status> done;
    for (const std::string& name : created_persistent_) done.push_back(persistent_->DropTable(name));
    if (record_changed_) done.push_back(WriteModelRecord(*persistent_, config_.name, old_record_));
    for (const Status& status : done) {
      if (status.code() == StatusCode::kFailedPrecondition) continue;  // closed meanwhile: the next start clears up
      if (!status.ok()) Log(LogLevel::kWarning, "after a failed load: " + status.ToString());
    }
  }

  const ModelConfig& config_;
  const ServerResources& resources_;
  const BuildOptions& options_;
  TableStore* const volatile_;
  TableStore* const persistent_;
  std::optional<SharedTier> shared_;                             // where the volatile store is shared
  std::map<std::string, std::string> fingerprints_;              // of folders, by table
  std::map<std::string, std::string> wanted_;                    // fingerprint by table, for shared_
  std::map<std::string, SharedTier::Contents> shared_contents_;  // of the tables that shared_ was given rows for
  std::map<std::string, uint64_t> folder_rows_;                  // of the tables that the persistent store was given
  ModelRecord old_record_;
  ModelRecord new_record_;
  bool record_changed_ = false;
  std::vector<std::string> announced_;           // tables whose first load the stored record tells of
  std::vector<std::string> created_persistent_;  // names in the store
  const std::shared_ptr<Model> model_ = std::make_shared<Model>();
};

}  // namespace

Result<std::shared_ptr<Model>> BuildModel(const ModelConfig& config, const ServerResources& resources,
                                          const BuildOptions& options) {
  return Builder(config, resources, options).Build();
}

void DropVolatileTables(const Model& model, const ServerResources& resources) {
  if (!resources.volatile_store || resources.volatile_store->capabilities().shared) return;
  for (const ModelTable& table : model.tables) {
    if (!table.stack.volatile_tier.table || table.shared) continue;
    Status dropped = resources.volatile_store->DropTable(table.stack.volatile_tier.table->spec().name);
    if (!dropped.ok() && dropped.code() != StatusCode::kFailedPrecondition) {
      Log(LogLevel::kWarning, "model '" + model.config.name + "': " + dropped.ToString());
    }
  }
}

}  // namespace hps
