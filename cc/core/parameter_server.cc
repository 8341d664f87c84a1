// Lock order: load_mutex_ (one load, replacement or unload at a time), then slots_mutex_ (the map of models), then the
// mutex inside a ModelSlot. Lookups take only the last, for the time of copying a pointer. LiveServers::mutex is a
// leaf. In a forked child no lock is touched: threads that do not exist there may have held them.

#include "hps/parameter_server.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>

#include "cc/base/fork_guard.h"
#include "cc/core/model.h"
#include "cc/core/model_builder.h"
#include "cc/core/server_stats.h"
#include "cc/storage/hash_map_store.h"
#include "cc/storage/rocksdb_store.h"
#include "hps/log.h"

namespace hps {
namespace {

Status ClosedStatus() {
  return FailedPrecondition("the parameter server was closed; open it again (hps.Init or hps.ParameterServer)");
}

std::string Join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "'" : ", '") + name + "'";
  return text.empty() ? "none" : text;
}

// For closing at exit; servers are not kept alive by it.
struct LiveServers {
  std::mutex mutex;
  std::vector<std::weak_ptr<ParameterServer>> servers;
};

// Databases must be closed before the destructors of their library's static objects run. Those come to life, at the
// latest, when a database is opened, and handlers run before what was made before them: so one is added after each
// opening until a database has been among them.
void CloseAllAtExit(bool database) {
  static std::atomic<int> added{0};
  static std::atomic<uint64_t> database_generation{ForkGeneration()};
  const int wanted = database ? 2 : 1;
  int seen = added.load();
  while (seen < wanted) {
    if (!added.compare_exchange_weak(seen, wanted)) continue;
    if (database) database_generation = ForkGeneration();
    const auto at_exit = [](int exit_status, void*) {
      if (added == 2 && database_generation != ForkGeneration()) {
        // In a forked child those destructors wait for threads that are not there.
        std::fflush(nullptr);
        ::_exit(exit_status);
      }
      if (Status closed = ParameterServer::CloseAll(); !closed.ok()) Log(LogLevel::kWarning, closed.ToString());
    };
    if (::on_exit(at_exit, nullptr) != 0) Log(LogLevel::kWarning, "no more functions can be added to run at exit");
    return;
  }
}

}  // namespace

class ParameterServer::Impl {
 public:
  Impl(ServerConfig config, const ServerOptions& options) : config_(std::move(config)), options_(options) {}

  // Close may be called meanwhile.
  Status Start() {
    std::lock_guard load_lock(load_mutex_);
    HPS_RETURN_IF_ERROR(CheckBuilt(config_));
    for (const std::string& line : config_.warnings) Log(LogLevel::kWarning, line);
    for (const std::string& line : config_.information) Log(LogLevel::kInfo, line);
    WarnWithoutGpu();
    resources_->long_keys = config_.long_keys;
    resources_->executor = NewThreadPool(static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 64u)));
    HPS_RETURN_IF_ERROR(OpenStores());
    CloseAllAtExit(resources_->persistent_store != nullptr);
    if (config_.volatile_db.cache_missed_embeddings && resources_->volatile_store && resources_->persistent_store) {
      resources_->promoter =
          std::make_unique<Promoter>(resources_->metrics.FindCounter("hps_rows_promoted_total", {}),
                                     resources_->metrics.FindCounter("hps_rows_promotion_dropped_total", {}));
    }
    for (const ModelConfig& model : config_.models) HPS_RETURN_IF_ERROR(LoadLocked(model, /*replace=*/false));
    return OkStatus();
  }

  ~Impl() {
    Status closed = Close();
    if (!closed.ok()) Log(LogLevel::kWarning, "while closing: " + closed.ToString());
  }

  Result<LookupSession> NewSession(std::string_view model) const {
    HPS_RETURN_IF_ERROR(CheckProcess());
    {
      std::lock_guard lock(slots_mutex_);
      auto found = slots_.find(model);
      if (found != slots_.end()) return LookupSession(found->second);
      if (closed_) return ClosedStatus();
    }
    return NoSuchModel(model);
  }

  Status Load(const ModelConfig& config, bool replace) {
    HPS_RETURN_IF_ERROR(CheckProcess());
    std::lock_guard load_lock(load_mutex_);
    return LoadLocked(config, replace);
  }

  Status Unload(std::string_view name) {
    HPS_RETURN_IF_ERROR(CheckProcess());
    std::lock_guard load_lock(load_mutex_);
    std::shared_ptr<ModelSlot> slot;
    {
      std::lock_guard lock(slots_mutex_);
      if (closed_) return ClosedStatus();
      if (auto found = slots_.find(name); found != slots_.end()) slot = slots_.extract(found).mapped();
    }
    if (!slot) return NoSuchModel(name);
    DropVolatileTables(*slot->Withdraw(NotFound("model '" + slot->name() + "' was unloaded")), *resources_);
    return OkStatus();
  }

  std::vector<std::string> ModelNames() const {
    std::vector<std::string> names;
    for (const auto& slot : Slots()) names.push_back(slot->name());
    return names;
  }

  std::vector<std::shared_ptr<ModelSlot>> Slots() const {
    std::vector<std::shared_ptr<ModelSlot>> slots;
    if (!CheckProcess().ok()) return slots;
    std::lock_guard lock(slots_mutex_);
    for (const auto& [name, slot] : slots_) slots.push_back(slot);
    return slots;
  }

  Status Close() {
    if (!CheckProcess().ok()) return OkStatus();
    std::vector<std::shared_ptr<TableStore>> stores;
    std::map<std::string, std::shared_ptr<ModelSlot>, std::less<>> slots;
    {
      std::lock_guard lock(slots_mutex_);
      closed_ = true;
      stores = {resources_->volatile_store, resources_->persistent_store};
      slots.swap(slots_);
    }
    for (auto& [name, slot] : slots) slot->Withdraw(ClosedStatus());
    Status status;
    for (auto& store : stores) {
      if (!store) continue;
      Status closed = store->Close();
      if (status.ok()) status = std::move(closed);
    }
    // A load that runs has lost its stores and ends with the next rows it writes.
    std::lock_guard load_lock(load_mutex_);
    if (resources_->promoter) resources_->promoter->Stop();  // but stays: lookups that still run may use it
    return status;
  }

  // kFailedPrecondition in a child of the process that opened the server.
  Status CheckProcess() const { return CheckNotForked(resources_->fork_generation); }
  bool closed() const { return closed_; }
  const ServerConfig& config() const { return config_; }
  const ServerResources& resources() const { return *resources_; }

 private:
  // REQUIRES: load_mutex_ is held.
  Status LoadLocked(const ModelConfig& config, bool replace) {
    if (closed_) return ClosedStatus();
    HPS_RETURN_IF_ERROR(CheckBuiltModel(config));
    std::shared_ptr<ModelSlot> slot = FindSlot(config.name);
    if (slot && !replace) {
      return AlreadyExists("model '" + config.name + "' is loaded already; use ReplaceModel for a new version");
    }
    if (!slot && replace) return NoSuchModel(config.name);
    std::shared_ptr<const Model> old;
    if (slot) {
      HPS_ASSIGN_OR_RETURN(old, slot->Current());
      HPS_RETURN_IF_ERROR(CheckReplaceable(old->config, config));
    }
    BuildOptions options;
    options.initial_cache_rate = config_.volatile_db.initial_cache_rate;
    options.cache_missed_embeddings = config_.volatile_db.cache_missed_embeddings;
    options.show_progress = options_.show_progress;
    HPS_ASSIGN_OR_RETURN(std::shared_ptr<Model> model, BuildModel(config, *resources_, options));
    if (old) model->version = old->version + 1;
    if (!slot) slot = std::make_shared<ModelSlot>(config.name, resources_);
    {
      std::lock_guard lock(slots_mutex_);
      if (closed_) return ClosedStatus();
      slot->Publish(std::move(model));
      slots_[config.name] = std::move(slot);
    }
    if (old) DropVolatileTables(*old, *resources_);
    return OkStatus();
  }

  // What CheckBuilt says of a model that came after the configuration.
  Status CheckBuiltModel(const ModelConfig& model) const {
    ServerConfig config = config_;
    config.models = {model};
    return CheckBuilt(config);
  }

  Status NoSuchModel(std::string_view model) const {
    return NotFound("there is no model '" + std::string(model) + "'; loaded models: " + Join(ModelNames()));
  }

  // Callers know tables by number and width, so a new version may add tables but not move or reshape them.
  Status CheckReplaceable(const ModelConfig& old, const ModelConfig& config) const {
    for (size_t i = 0; i < old.tables.size(); ++i) {
      const TableConfig& before = old.tables[i];
      const bool same =
          i < config.tables.size() && config.tables[i].name == before.name && config.tables[i].width == before.width;
      if (same) continue;
      return InvalidArgument("model '" + old.name + "' cannot be replaced: its new version must have table '" +
                             before.name + "' of width " + std::to_string(before.width) + " as table number " +
                             std::to_string(i) +
                             ", as the loaded one has; to change tables unload the model and load "
                             "the new one");
    }
    return OkStatus();
  }

  std::shared_ptr<ModelSlot> FindSlot(std::string_view name) const {
    std::lock_guard lock(slots_mutex_);
    auto found = slots_.find(name);
    return found == slots_.end() ? nullptr : found->second;
  }

  Status OpenStores() {
    std::shared_ptr<TableStore> volatile_store;
    std::shared_ptr<TableStore> persistent_store;
    const VolatileConfig& cache = config_.volatile_db;
    if (cache.type == VolatileType::kHashMap) {
      HashMapOptions options;
      options.num_partitions = cache.num_partitions;
      options.allocation_rate_bytes = cache.allocation_rate_bytes;
      options.overflow = {cache.overflow_margin, cache.overflow_policy, cache.overflow_resolution_target,
                          cache.refresh_time_after_fetch};
      options.max_get_batch_size = cache.max_get_batch_size;
      options.max_set_batch_size = cache.max_set_batch_size;
      options.executor = resources_->executor.get();
      HPS_ASSIGN_OR_RETURN(volatile_store, OpenHashMapStore(options));
    }
    const PersistentConfig& database = config_.persistent_db;
    if (database.type == PersistentType::kRocksDb) {
      RocksDbOptions options;
      options.path = database.path;
      options.num_threads = database.num_threads;
      options.read_only = database.read_only;
      options.max_get_batch_size = database.max_get_batch_size;
      options.max_set_batch_size = database.max_set_batch_size;
      options.executor = resources_->executor.get();
      HPS_ASSIGN_OR_RETURN(persistent_store, OpenRocksDbStore(options));
    }
    std::lock_guard lock(slots_mutex_);
    if (closed_) return ClosedStatus();
    resources_->volatile_store = std::move(volatile_store);
    resources_->persistent_store = std::move(persistent_store);
    return OkStatus();
  }

  void WarnWithoutGpu() const {
    for (const ModelConfig& model : config_.models) {
      if (!model.gpucache || model.deployed_devices.empty()) continue;
      Log(LogLevel::kWarning,
          "gpucache is true (model '" + model.name +
              "'), but no GPU cache is available here: lookups are served by the CPU; set \"gpucache\": false to "
              "silence this");
      return;
    }
  }

  const ServerConfig config_;
  const ServerOptions options_;
  const std::shared_ptr<ServerResources> resources_ = std::make_shared<ServerResources>();
  std::mutex load_mutex_;
  mutable std::mutex slots_mutex_;
  std::map<std::string, std::shared_ptr<ModelSlot>, std::less<>> slots_;
  std::atomic<bool> closed_{false};
};

ParameterServer::ParameterServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

ParameterServer::~ParameterServer() {
  // A forked child must not even destroy it: that would wait for threads, and locks, of its parent.
  if (!impl_->CheckProcess().ok()) (void)impl_.release();
}

Result<std::shared_ptr<ParameterServer>> ParameterServer::Open(const ServerConfig& config,
                                                               const ServerOptions& options) {
  std::shared_ptr<ParameterServer> server(new ParameterServer(std::make_unique<Impl>(config, options)));
  {
    auto& live = ProcessInstance<LiveServers>();
    std::lock_guard lock(live.mutex);
    std::erase_if(live.servers, [](const auto& other) { return other.expired(); });
    live.servers.push_back(server);
  }
  HPS_RETURN_IF_ERROR(server->impl_->Start().WithContext(config.origin));
  return server;
}

Result<std::shared_ptr<ParameterServer>> ParameterServer::Open(const std::string& config_path,
                                                               const ServerOptions& options) {
  HPS_ASSIGN_OR_RETURN(ServerConfig config, LoadConfig(config_path));
  return Open(config, options);
}

Result<LookupSession> ParameterServer::NewSession(std::string_view model) const { return impl_->NewSession(model); }
Status ParameterServer::LoadModel(const ModelConfig& model) { return impl_->Load(model, /*replace=*/false); }
Status ParameterServer::ReplaceModel(const ModelConfig& model) { return impl_->Load(model, /*replace=*/true); }
Status ParameterServer::UnloadModel(std::string_view model) { return impl_->Unload(model); }
std::vector<std::string> ParameterServer::ModelNames() const { return impl_->ModelNames(); }

Status ParameterServer::CloseAll() {
  std::vector<std::shared_ptr<ParameterServer>> servers;
  {
    auto& live = ProcessInstance<LiveServers>();
    std::lock_guard lock(live.mutex);
    for (const auto& server : live.servers) servers.push_back(server.lock());
  }
  Status status;
  for (const auto& server : servers) {
    if (!server) continue;
    Status closed = server->Close();
    if (status.ok()) status = std::move(closed);
  }
  return status;
}

std::string ParameterServer::StatsJson() const {
  return ServerStatsJson(impl_->config(), impl_->resources(), impl_->Slots());
}
std::string ParameterServer::PrometheusText() const {
  return impl_->CheckProcess().ok() ? impl_->resources().metrics.PrometheusText() : "";
}
const ServerConfig& ParameterServer::config() const { return impl_->config(); }
Status ParameterServer::Close() { return impl_->Close(); }
bool ParameterServer::closed() const { return impl_->closed(); }

}  // namespace hps
