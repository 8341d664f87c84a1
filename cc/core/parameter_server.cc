// Lock order: load_mutex_ (one load, replacement or unload at a time), then slots_mutex_ (the map of models), then the
// mutex inside a ModelSlot; the updates of a slot (RowUpdates) come between the first two. Lookups take only the last,
// for the time of copying a pointer. SharedTables' and LiveServers' mutexes are leaves. In a forked child no lock is
// touched: threads that do not exist there may have held them.

#include "hps/parameter_server.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <tuple>

#include "cc/base/fork_guard.h"
#include "cc/base/stand_back.h"
#include "cc/base/system_limits.h"
#include "cc/core/model.h"
#include "cc/core/model_builder.h"
#include "cc/core/server_stats.h"
#include "cc/core/shared_tables.h"
#include "cc/core/volatile_share.h"
#include "cc/storage/hash_map_store.h"
#include "cc/storage/multi_process_store.h"
#include "cc/storage/redis_store.h"
#include "cc/storage/rocksdb_store.h"
#include "hps/log.h"
#include "hps/model_reader.h"

namespace hps {
namespace {

constexpr std::chrono::milliseconds kLongestProbe{1000};
constexpr std::chrono::milliseconds kLookupPatience{200};

Status ClosedStatus() {
  return FailedPrecondition("the parameter server was closed; open it again (hps.Init or hps.ParameterServer)");
}

std::string Join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "'" : ", '") + name + "'";
  return text.empty() ? "none" : text;
}

// Writes large batches on all threads until StandBack: while the server starts; then on few that stand back.
class LoadExecutor final : public Executor {
 public:
  LoadExecutor(Executor& all, int few) : all_(all), few_(NewBackgroundPool(few)) {}
  void StandBack() { stand_back_ = true; }
  int parallelism() const override { return chosen().parallelism(); }
  void ParallelFor(size_t count, size_t grain, const std::function<void(size_t, size_t)>& body) override {
    chosen().ParallelFor(count, grain, body);
  }

 private:
  Executor& chosen() const { return stand_back_ ? *few_ : all_; }
  Executor& all_;
  const std::unique_ptr<Executor> few_;
  std::atomic<bool> stand_back_{false};
};

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
      if (added == 2 && !EndRocksDb(std::chrono::seconds(10))) {
        Log(LogLevel::kWarning, "a database is still in use; the process ends without waiting for it");
        std::fflush(nullptr);
        ::_exit(exit_status);
      }
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
    return WithinLimits("the server cannot be started", [&] { return StartLocked(); });
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

  Status Load(const ModelConfig& config, bool replace, const std::atomic<bool>* cancelled) {
    HPS_RETURN_IF_ERROR(CheckProcess());
    std::lock_guard load_lock(load_mutex_);
    return BesideLookups("model '" + config.name + "' cannot be loaded",
                         [&] { return LoadLocked(config, replace, cancelled); });
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
    return BesideLookups("model '" + slot->name() + "' cannot be unloaded", [&] {
      LetGoOfModel(slot->Withdraw(NotFound("model '" + slot->name() + "' was unloaded")));
      return OkStatus();
    });
  }

  Status UpdateRows(std::string_view model, uint32_t table, std::span<const Key> keys, ConstRowBuffer rows) {
    HPS_ASSIGN_OR_RETURN(const std::shared_ptr<ModelSlot> slot, LoadedSlot(model));
    return slot->updates().Upsert(*slot, table, keys, rows);
  }

  Status EraseRows(std::string_view model, uint32_t table, std::span<const Key> keys) {
    HPS_ASSIGN_OR_RETURN(const std::shared_ptr<ModelSlot> slot, LoadedSlot(model));
    return slot->updates().Erase(*slot, table, keys);
  }

  Status RefreshCaches(std::string_view name, std::optional<int> device, const std::atomic<bool>* cancelled) {
    HPS_ASSIGN_OR_RETURN(const std::shared_ptr<ModelSlot> slot, LoadedSlot(name));
    HPS_ASSIGN_OR_RETURN(const std::shared_ptr<const Model> model, slot->Current());
    if (device) HPS_RETURN_IF_ERROR(FindCaches(model->config, model->caches.get(), *device).status());
    if (model->caches == nullptr) return OkStatus();
    RefreshReport report;
    return model->caches->Refresh(device, cancelled, &report);
  }

  // What the registry is told only when somebody looks.
  void PublishMetrics() const {
    const auto publish = [](const ModelSlot& slot) {
      if (auto model = slot.Current(); model.ok() && (*model)->caches != nullptr) (*model)->caches->PublishMetrics();
    };
    for (const auto& slot : Slots()) publish(*slot);
    for (const auto& held : shared_tables_.held()) publish(held.table->slot);
    if (resources_->devices != nullptr) PublishDeviceMetrics();
  }

  Readiness CheckReadiness() const {
    Readiness readiness;
    if (Status forked = CheckProcess(); !forked.ok()) return {.reason = forked.message()};
    if (closed_) return {.reason = ClosedStatus().message()};
    if (!started_) return {.reason = "the models of " + config_.origin + " are being loaded"};
    std::shared_ptr<const Model> any;  // with a table of which each tier can be asked for a row
    for (const auto& slot : Slots()) {
      if (auto model = slot->Current(); model.ok()) {
        readiness.models.push_back(slot->name());
        any = *model;
      }
    }
    readiness.ready = true;
    for (const auto& [name, store, tier_of] :
         {std::tuple("volatile", resources_->volatile_store, &TierStack::volatile_tier),
          std::tuple("persistent", resources_->persistent_store, &TierStack::persistent_tier)}) {
      if (!store) continue;
      const Tier& common =
          name == std::string_view("volatile") ? resources_->volatile_tier : resources_->persistent_tier;
      Readiness::TierState state{.tier = name, .store = std::string(store->kind())};
      state.needed = common.when_unavailable == WhenUnavailable::kFail;
      const Status answered = any ? ProbeTier(any->tables.front().stack.*tier_of, kLongestProbe) : OkStatus();
      state.reachable = answered.ok();
      state.error = answered.message();
      if (const Status place = store->CheckPlace(); !place.ok()) {
        if (!readiness.reason.empty()) readiness.reason += "; ";
        readiness.reason += std::string("the ") + name + " tier has lost its place: " + place.message();
      }
      if (!state.reachable) {
        readiness.ready &= !state.needed;
        if (!readiness.reason.empty()) readiness.reason += "; ";
        readiness.reason += state.needed ? answered.message() : "lookups do without a tier: " + answered.message();
      }
      readiness.tiers.push_back(std::move(state));
    }
    for (const auto& [number, device] : resources_->devices->opened()) {
      const Status alive = device.context->CheckAlive();
      if (alive.ok()) continue;
      readiness.ready = false;
      if (!readiness.reason.empty()) readiness.reason += "; ";
      readiness.reason += alive.message();
    }
    if (readiness.reason.empty()) readiness.reason = "ready";
    return readiness;
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
    const auto shared = shared_tables_.Clear(ClosedStatus());
    Status status;
    for (auto& store : stores) {
      if (!store) continue;
      Status closed = store->Close();
      if (status.ok()) status = std::move(closed);
    }
    // A load that runs has lost its stores and ends with the next rows it writes.
    std::lock_guard load_lock(load_mutex_);
    // These end, but stay: lookups that still run may use them.
    if (resources_->promoter) resources_->promoter->Stop();
    if (resources_->devices) resources_->devices->Stop();
    return status;
  }

  // kFailedPrecondition in a child of the process that opened the server.
  Status CheckProcess() const { return CheckNotForked(resources_->fork_generation); }
  bool closed() const { return closed_; }
  const ServerConfig& config() const { return config_; }
  const ServerResources& resources() const { return *resources_; }
  std::vector<SharedTables::Held> shared_tables() const {
    return CheckProcess().ok() ? shared_tables_.held() : std::vector<SharedTables::Held>();
  }

 private:
  // REQUIRES: load_mutex_ is held.
  Status StartLocked() {
    for (const std::string& line : config_.warnings) Log(LogLevel::kWarning, line);
    for (const std::string& line : config_.information) Log(LogLevel::kInfo, line);
    OpenDevices();
    resources_->long_keys = config_.long_keys;
    const int threads = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 64u));
    resources_->lookup_timeout = std::chrono::milliseconds(config_.lookup_timeout_ms);
    resources_->executor = NewThreadPool(threads);
    resources_->load_executor = std::make_unique<LoadExecutor>(*resources_->executor, std::max(1, threads / 2));
    HPS_RETURN_IF_ERROR(OpenStores());
    CloseAllAtExit(resources_->persistent_store != nullptr);
    if (config_.volatile_db.cache_missed_embeddings && resources_->volatile_store && resources_->persistent_store) {
      resources_->promoter = std::make_unique<Promoter>();
    }
    HPS_RETURN_IF_ERROR(CheckDevices(config_.models));
    for (const ModelConfig& model : config_.models) {
      HPS_RETURN_IF_ERROR(LoadLocked(model, /*replace=*/false, options_.cancelled));
    }
    static_cast<LoadExecutor&>(*resources_->load_executor).StandBack();
    started_ = true;
    return OkStatus();
  }

  // REQUIRES: load_mutex_ is held.
  Status LoadLocked(const ModelConfig& config, bool replace, const std::atomic<bool>* cancelled) {
    if (closed_) return ClosedStatus();
    HPS_RETURN_IF_ERROR(CheckBuiltModel(config));
    std::shared_ptr<ModelSlot> slot = FindSlot(config.name);
    if (slot && !replace) {
      return AlreadyExists("model '" + config.name + "' is loaded already; replace it to serve a new version");
    }
    if (!slot && replace) return NoSuchModel(config.name);
    std::shared_ptr<const Model> old;
    if (slot) {
      HPS_ASSIGN_OR_RETURN(old, slot->Current());
      HPS_RETURN_IF_ERROR(CheckReplaceable(old->config, config));
    }
    WarnWithoutGpu(config);
    BuildOptions options;
    options.initial_cache_rate = config_.volatile_db.initial_cache_rate;
    options.cache_missed_embeddings = config_.volatile_db.cache_missed_embeddings;
    options.show_progress = options_.show_progress;
    options.cancelled = cancelled;
    options.load_volatile = config_.volatile_db.initialize_after_startup;
    options.load_persistent = config_.persistent_db.initialize_after_startup;
    if (started_) HPS_RETURN_IF_ERROR(CheckDevices(std::span(&config, 1)));
    std::vector<std::shared_ptr<SharedTable>> shared;
    if (config.share_tables) {
      HPS_ASSIGN_OR_RETURN(shared, shared_tables_.Acquire(config, options));
      options.shared = shared;
    }
    if (slot) slot->updates().BeginVersion();
    Result<std::shared_ptr<Model>> built = BuildModel(config, *resources_, options);
    if (!built.ok()) {
      if (slot) slot->updates().AbandonVersion();
      shared_tables_.Release(config, shared);
      return built.status();
    }
    const std::shared_ptr<Model> model = *std::move(built);
    if (old) model->version = old->version + 1;
    if (!slot) slot = std::make_shared<ModelSlot>(config.name, resources_);
    Status published = slot->updates().EndVersion(*model, [&]() -> Status {
      std::lock_guard lock(slots_mutex_);
      if (closed_) return ClosedStatus();
      slot->Publish(model);
      slots_[config.name] = slot;
      return OkStatus();
    });
    if (!published.ok()) {
      DropVolatileTables(*model, *resources_);
      shared_tables_.Release(config, shared);
      return published;
    }
    if (model->caches) model->caches->Start(*resources_->devices);
    if (old) LetGoOfModel(std::move(old));
    // Last of all: what lookups of the old version find (tables that a store has lost) says nothing about the new one.
    std::vector<const TierStack*> stacks;
    for (const ModelTable& table : model->tables) stacks.push_back(&table.stack);
    TakeBackTiers(stacks, kLongestProbe);
    return OkStatus();
  }

  void OpenDevices() {
    DeviceSource source;
    if (options_.devices) source = *options_.devices;
    if (!options_.device_caches) source.count = [] { return 0; };
    resources_->devices = std::make_unique<ServerDevices>(std::move(source));
  }

  // Refuses, before anything of the models is loaded, what no device here can hold.
  Status CheckDevices(std::span<const ModelConfig> models) const {
    HPS_ASSIGN_OR_RETURN(const std::vector<ModelCaches::Planned> planned, shared_tables_.Plan(models));
    return ModelCaches::CheckPlans(
        planned,
        [this](const TableConfig& table) -> Result<uint64_t> {
          auto folder = OpenTableFolder(table.path, table.width);
          if (!folder.ok()) return uint64_t{0};  // the load says so, or has a database and then asks that
          const uint64_t rows = (*folder)->rows();
          if (!resources_->volatile_store || resources_->persistent_store) return rows;
          const auto share = VolatileShare(rows, config_.volatile_db.initial_cache_rate, *resources_->volatile_store,
                                           /*persistent=*/false);
          return share.ok() ? *share : rows;
        },
        *resources_->devices);
  }

  // Queues, refreshes and failures of devices.
  void PublishDeviceMetrics() const {
    std::lock_guard lock(device_totals_mutex_);
    MetricsRegistry& metrics = resources_->metrics;
    const auto publish = [&](const std::string& name, const MetricLabels& labels, uint64_t total) {
      const auto [found, added] = device_totals_.try_emplace({name, labels}, metrics.FindCounter(name, labels));
      found->second.Publish(total);
    };
    for (const auto& [number, device] : resources_->devices->opened()) {
      const MetricLabels labels = {{"device", std::to_string(number)}};
      metrics.FindGauge("hps_device_alive_state", labels)->Set(device.context->CheckAlive().ok());
      if (!device.inserts) continue;
      const InsertQueue::Stats inserts = device.inserts->stats();
      publish("hps_cache_keys_inserted_total", labels, inserts.inserted);
      publish("hps_cache_keys_absent_total", labels, inserts.absent);
      publish("hps_cache_keys_dropped_total", labels, inserts.dropped);
      publish("hps_cache_keys_repeated_total", labels, inserts.repeated);
      publish("hps_cache_keys_failed_total", labels, inserts.failed);
      metrics.FindGauge("hps_cache_keys_queued_count", labels)->Set(static_cast<int64_t>(inserts.queued));
    }
    const CacheRefresher* const refresher = resources_->devices->refresher();
    if (refresher == nullptr) return;
    const CacheRefresher::Stats stats = refresher->stats();
    publish("hps_cache_refreshes_done_total", {}, stats.refreshes);
    publish("hps_cache_refreshes_failed_total", {}, stats.failures);
    publish("hps_workspaces_trimmed_total", {}, stats.trims);
  }

  // Drops a version that is no longer published. Its memory is freed here, and not by the last lookup that uses it,
  // unless that lookup takes long.
  void LetGo(std::shared_ptr<const Model> model) {
    if (model->caches) model->caches->Stop(*resources_->devices);
    DropVolatileTables(*model, *resources_);
    const auto end = std::chrono::steady_clock::now() + kLookupPatience;
    while (model.use_count() > 1 && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

  // And of the tables that it shared.
  void LetGoOfModel(std::shared_ptr<const Model> model) {
    if (model == nullptr) return;
    std::vector<std::shared_ptr<SharedTable>> shared;
    for (const ModelTable& table : model->tables) {
      if (table.shared) shared.push_back(table.shared);
    }
    const ModelConfig config = model->config;
    LetGo(std::move(model));
    shared_tables_.Release(config, shared);
  }

  // Runs work that nobody who looks up waits for: once models are served, on a thread that leaves them room.
  // REQUIRES: load_mutex_ is held.
  template <typename Work>
  Status BesideLookups(const std::string& what, Work&& work) {
    Status status;
    std::thread thread;
    try {
      thread = std::thread([&] {
        StandBackForLookups();
        status = WithinLimits(what, work);
      });
    } catch (const std::system_error&) {  // no more threads
      return WithinLimits(what, work);
    }
    thread.join();
    return status;
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

  Result<std::shared_ptr<ModelSlot>> LoadedSlot(std::string_view name) const {
    HPS_RETURN_IF_ERROR(CheckProcess());
    std::shared_ptr<ModelSlot> slot = FindSlot(name);
    if (slot) return slot;
    if (closed_) return ClosedStatus();
    return NoSuchModel(name);
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
      options.executor = resources_->load_executor.get();
      HPS_ASSIGN_OR_RETURN(volatile_store, OpenHashMapStore(options));
    } else if (cache.type == VolatileType::kMultiProcessHashMap) {
      MultiProcessOptions options;
      options.name = cache.shared_memory_name;
      options.bytes = cache.shared_memory_bytes;
      options.auto_remove = cache.shared_memory_auto_remove;
      options.num_partitions = cache.num_partitions;
      options.key_bytes = config_.long_keys ? 8 : 4;
      options.allocation_rate_bytes = cache.allocation_rate_bytes;
      options.overflow = {cache.overflow_margin, cache.overflow_policy, cache.overflow_resolution_target,
                          cache.refresh_time_after_fetch};
      options.executor = resources_->load_executor.get();
      HPS_ASSIGN_OR_RETURN(volatile_store, OpenMultiProcessStore(options));
    }
    if (cache.type == VolatileType::kRedisCluster) {
      HPS_ASSIGN_OR_RETURN(volatile_store, OpenRedisStore(RedisOptionsOf(cache)));
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
    if (options_.adapt_store && volatile_store) volatile_store = options_.adapt_store("volatile", volatile_store);
    if (options_.adapt_store && persistent_store)
      persistent_store = options_.adapt_store("persistent", persistent_store);
    if (volatile_store) {
      resources_->volatile_tier = CommonTier("volatile", *volatile_store, cache.timeout_ms, cache.when_unavailable,
                                             &resources_->volatile_breaker);
      // Without a lower tier there is nothing to go on to (configurations made in code may say so all the same).
      if (!persistent_store && cache.when_unavailable == WhenUnavailable::kNextTier) {
        resources_->volatile_tier.when_unavailable = WhenUnavailable::kFail;
      }
    }
    if (persistent_store) {
      resources_->persistent_tier = CommonTier("persistent", *persistent_store, database.timeout_ms,
                                               database.when_unavailable, &resources_->persistent_breaker);
    }
    std::lock_guard lock(slots_mutex_);
    if (closed_) return ClosedStatus();
    resources_->volatile_store = std::move(volatile_store);
    resources_->persistent_store = std::move(persistent_store);
    return OkStatus();
  }

  // What all tables of a store have in common, and the store's circuit breaker.
  Tier CommonTier(const std::string& name, const TableStore& store, uint32_t timeout_ms, WhenUnavailable policy,
                  std::unique_ptr<CircuitBreaker>* breaker) {
    *breaker = std::make_unique<CircuitBreaker>(name, std::string(store.kind()), resources_->metrics);
    Tier tier;
    tier.addressable = store.capabilities().addressable;
    tier.timeout = std::chrono::milliseconds(timeout_ms);
    tier.when_unavailable = policy;
    tier.breaker = breaker->get();
    tier.option = name == "volatile" ? "volatile_db" : "persistent_db";
    return tier;
  }

  // Once. REQUIRES: load_mutex_ is held.
  void WarnWithoutGpu(const ModelConfig& model) {
    if (!model.gpucache || model.deployed_devices.empty() || resources_->devices->count() > 0) return;
    if (std::exchange(warned_without_gpu_, true)) return;
    std::string why;
    if (!options_.device_caches) {
      why = "they are switched off";
    } else if (DeviceCount(&why) > 0) {
      why = "the framework of this process uses no GPU";
    }
    Log(LogLevel::kWarning, "gpucache is true (model '" + model.name + "'), but no GPU cache is available here (" +
                                why + "): lookups are served by the CPU; set \"gpucache\": false to silence this");
  }

  const ServerConfig config_;
  const ServerOptions options_;
  const std::shared_ptr<ServerResources> resources_ = std::make_shared<ServerResources>();
  SharedTables shared_tables_{resources_, [this](std::shared_ptr<const Model> model) { LetGo(std::move(model)); }};
  std::mutex load_mutex_;
  bool warned_without_gpu_ = false;  // guarded by load_mutex_
  mutable std::mutex slots_mutex_;
  std::map<std::string, std::shared_ptr<ModelSlot>, std::less<>> slots_;
  std::atomic<bool> started_{false};  // the configuration's models are loaded
  std::atomic<bool> closed_{false};
  mutable std::mutex device_totals_mutex_;  // guards the following member; a leaf but for the registry's
  mutable std::map<std::pair<std::string, MetricLabels>, CountedTotal> device_totals_;
};

ParameterServer::ParameterServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

ParameterServer::~ParameterServer() {
  // A forked child must not even destroy it: that would wait for threads, and locks, of its parent.
  if (!impl_->CheckProcess().ok()) (void)impl_.release();
}

Result<std::shared_ptr<ParameterServer>> ParameterServer::Open(const ServerConfig& config,
                                                               const ServerOptions& options) {
  HPS_RETURN_IF_ERROR(CheckBuilt(config));
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
Status ParameterServer::LoadModel(const ModelConfig& model, const std::atomic<bool>* cancelled) {
  return impl_->Load(model, /*replace=*/false, cancelled);
}
Status ParameterServer::ReplaceModel(const ModelConfig& model, const std::atomic<bool>* cancelled) {
  return impl_->Load(model, /*replace=*/true, cancelled);
}
Status ParameterServer::UnloadModel(std::string_view model) { return impl_->Unload(model); }
Status ParameterServer::UpdateRows(std::string_view model, uint32_t table, std::span<const Key> keys,
                                   ConstRowBuffer rows) {
  return impl_->UpdateRows(model, table, keys, rows);
}
Status ParameterServer::EraseRows(std::string_view model, uint32_t table, std::span<const Key> keys) {
  return impl_->EraseRows(model, table, keys);
}
Status ParameterServer::RefreshCaches(std::string_view model, std::optional<int> device,
                                      const std::atomic<bool>* cancelled) {
  return impl_->RefreshCaches(model, device, cancelled);
}
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

Readiness ParameterServer::CheckReadiness() const { return impl_->CheckReadiness(); }
std::string ParameterServer::StatsJson() const {
  return ServerStatsJson(impl_->config(), impl_->resources(), impl_->Slots(), impl_->shared_tables());
}
std::string ParameterServer::PrometheusText() const {
  if (!impl_->CheckProcess().ok()) return "";
  impl_->PublishMetrics();
  return impl_->resources().metrics.PrometheusText();
}
std::string ParameterServer::PrometheusText(std::span<const std::shared_ptr<ParameterServer>> servers) {
  std::vector<std::pair<MetricLabels, const MetricsRegistry*>> registries;
  for (const auto& server : servers) {
    if (!server->impl_->CheckProcess().ok()) continue;
    server->impl_->PublishMetrics();
    registries.push_back({{{"server", ConfigHash(server->config())}}, &server->impl_->resources().metrics});
  }
  return MetricsRegistry::PrometheusText(registries);
}
const ServerConfig& ParameterServer::config() const { return impl_->config(); }
Status ParameterServer::Close() { return impl_->Close(); }
bool ParameterServer::closed() const { return impl_->closed(); }

}  // namespace hps
