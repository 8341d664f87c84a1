// A model's caches begin with what its tiers hold. Rows come from the lowest tier, which has every row; where others
// share the volatile store, its rows may be newer and go first (Preload keeps what is there) or last (MakeWhole
// overwrites).

#include "cc/core/model_caches.h"

#include <algorithm>

#include "cc/core/tier_row_source.h"

namespace hps {
namespace {

// What is counted of each table on each device.
struct CacheTotal {
  const char* metric;
  uint64_t CacheStats::*total;
};
constexpr CacheTotal kCacheTotals[] = {
    {"hps_cache_keys_asked_total", &CacheStats::keys_asked},
    {"hps_cache_rows_served_total", &CacheStats::rows_served},
    {"hps_cache_rows_missed_total", &CacheStats::rows_missed},
    {"hps_cache_rows_deferred_total", &CacheStats::rows_deferred},
    {"hps_cache_rows_defaulted_total", &CacheStats::rows_defaulted},
    {"hps_cache_rows_repeated_total", &CacheStats::rows_repeated},
    {"hps_cache_fills_outdated_total", &CacheStats::fills_outdated},
    {"hps_cache_rows_inserted_total", &CacheStats::rows_inserted},
    {"hps_cache_rows_evicted_total", &CacheStats::rows_evicted},
    {"hps_cache_rows_updated_total", &CacheStats::rows_updated},
    {"hps_cache_rows_refreshed_total", &CacheStats::rows_refreshed},
    {"hps_cache_rows_erased_total", &CacheStats::rows_erased},
    {"hps_cache_rows_outdated_total", &CacheStats::rows_outdated},
    {"hps_cache_rows_exchanged_total", &CacheStats::rows_exchanged},
};

RowScan ScanOf(const CachedTable& cached, CacheStart start, const std::atomic<bool>* cancelled) {
  return [cached, start, cancelled](const ScanVisitor& visitor) -> Status {
    const ScanVisitor visit = [&](std::span<const Key> keys, ConstRowBuffer rows) -> Status {
      if (cancelled != nullptr && cancelled->load(std::memory_order_relaxed))
        return Cancelled("the load was cancelled");
      return visitor(keys, rows);
    };
    const Table* const above = cached.stack->volatile_tier.table.get();
    const Table* const below = cached.stack->persistent_tier.table.get();
    if (below == nullptr) return above->Scan(visit);
    if (above == nullptr || !cached.volatile_is_shared) return below->Scan(visit);
    const bool above_first = start == CacheStart::kPreload;
    HPS_RETURN_IF_ERROR((above_first ? above : below)->Scan(visit));
    return (above_first ? below : above)->Scan(visit);
  };
}

// Rows in the tier that has every row; may be an estimate.
Result<uint64_t> RowsOf(const CachedTable& cached) {
  const TierStack& stack = *cached.stack;
  const Table* const lowest =
      stack.persistent_tier.table ? stack.persistent_tier.table.get() : stack.volatile_tier.table.get();
  HPS_ASSIGN_OR_RETURN(const TableStats stats, lowest->Stats());
  return stats.rows;
}

}  // namespace

Status ModelCaches::CheckPlans(std::span<const Planned> models,
                               const std::function<Result<uint64_t>(const TableConfig&)>& rows,
                               ServerDevices& devices) {
  std::vector<ServerDevices::Need> needs;
  for (const auto& [model, parts] : models) {
    if (!Wanted(model, &devices)) continue;
    std::vector<uint64_t> table_rows;
    for (const TableConfig& table : model.tables) {
      HPS_ASSIGN_OR_RETURN(const uint64_t count, rows(table));
      table_rows.push_back(count);
    }
    HPS_ASSIGN_OR_RETURN(const std::vector<DevicePlan> plans, PlanCaches(model, table_rows, devices.count(), parts));
    for (const DevicePlan& plan : plans)
      needs.push_back({model.name, plan.device, plan.device_bytes, plan.pinned_bytes});
  }
  return devices.CheckFreeMemory(needs);
}

Result<std::unique_ptr<ModelCaches>> ModelCaches::Build(const ModelConfig& model, std::span<const CachedTable> tables,
                                                        const CacheBuildOptions& options, ServerDevices& devices,
                                                        MetricsRegistry& metrics) {
  std::vector<uint64_t> table_rows(tables.size());
  for (size_t i = 0; i < tables.size() && options.parts != CacheParts::kWorkspaces; ++i) {
    HPS_ASSIGN_OR_RETURN(table_rows[i], RowsOf(tables[i]));
  }
  HPS_ASSIGN_OR_RETURN(const std::vector<DevicePlan> plans,
                       PlanCaches(model, table_rows, devices.count(), options.parts));
  std::vector<ServerDevices::Need> needs;
  for (const DevicePlan& plan : plans) {
    if (options.kept != nullptr && options.kept->Find(plan.device) != nullptr) continue;
    needs.push_back({model.name, plan.device, plan.device_bytes, plan.pinned_bytes});
  }
  HPS_RETURN_IF_ERROR(devices.CheckFreeMemory(needs));

  std::unique_ptr<ModelCaches> caches(new ModelCaches(model));
  for (const TableConfig& table : model.tables) caches->table_names_.push_back(table.name);
  // The caches' own copies: what works for a cache in the background must not keep the model alive, which owns it.
  const auto stacks = std::make_shared<std::vector<TierStack>>();
  std::vector<const TierStack*> addresses;
  for (const CachedTable& table : tables) stacks->push_back(*table.stack);
  for (const TierStack& stack : *stacks) addresses.push_back(&stack);
  caches->source_ = std::make_shared<TierRowSource>(std::move(addresses), stacks, *options.executor,
                                                    *options.io_executor, options.long_keys);
  caches->devices_.reserve(plans.size());
  for (const DevicePlan& plan : plans) {
    HPS_RETURN_IF_ERROR(caches->AddDevice(plan, tables, options, devices, metrics));
  }
  return caches;
}

Status ModelCaches::AddDevice(const DevicePlan& plan, std::span<const CachedTable> tables,
                              const CacheBuildOptions& options, ServerDevices& devices, MetricsRegistry& metrics) {
  HPS_ASSIGN_OR_RETURN(const ServerDevices::Shared shared, devices.Use(plan.device));
  ModelDevice& device = devices_.emplace_back();
  const ModelDevice* const kept = options.kept != nullptr ? options.kept->Find(plan.device) : nullptr;
  device.plan = kept != nullptr ? kept->plan : plan;
  device.inserts = shared.inserts;
  HPS_ASSIGN_OR_RETURN(std::unique_ptr<WorkspacePool> pool, WorkspacePool::Open(shared.context, plan.workspaces));
  device.resources = {shared.context, shared.writer, std::move(pool)};
  device.shared = options.parts == CacheParts::kWorkspaces;
  if (kept != nullptr) {
    device.caches = kept->caches;
  } else {
    HPS_RETURN_IF_ERROR(AddCaches(device, tables, options));
  }
  const DeviceLookupOptions lookup{.hit_rate_threshold = plan.hit_rate_threshold};
  device.lookup = std::make_unique<DeviceLookup>(device.resources, source_, shared.inserts, lookup);
  AddMetrics(device, metrics);
  return OkStatus();
}

Status ModelCaches::AddCaches(ModelDevice& device, std::span<const CachedTable> tables,
                              const CacheBuildOptions& options) {
  const DevicePlan& plan = device.plan;
  for (size_t i = 0; i < tables.size(); ++i) {
    std::shared_ptr<DeviceCache> cache;
    if (device.shared) {
      const ModelDevice* const there = tables[i].shared ? tables[i].shared->Find(plan.device) : nullptr;
      if (there == nullptr) return Internal("a shared table has no cache on device " + std::to_string(plan.device));
      device.caches.push_back(there->caches.front());
      continue;
    }
    const TableCachePlan& table = plan.tables[i];
    const RowScan scan = ScanOf(tables[i], table.start, options.cancelled);
    if (table.start == CacheStart::kWhole) {
      HPS_ASSIGN_OR_RETURN(cache, DeviceCache::MakeWhole(device.resources, table.spec, scan));
    } else {
      HPS_ASSIGN_OR_RETURN(cache, DeviceCache::Make(device.resources, table.spec));
      if (table.start == CacheStart::kPreload) HPS_RETURN_IF_ERROR(cache->Preload(scan));
    }
    device.caches.push_back(std::move(cache));
  }
  return OkStatus();
}

void ModelCaches::AddMetrics(ModelDevice& device, MetricsRegistry& metrics) {
  const std::string number = std::to_string(device.plan.device);
  device.counted_elsewhere = device.shared;
  for (size_t i = 0; i < device.caches.size() && !device.shared; ++i) {
    const MetricLabels labels = {{"model", model_}, {"table", table_names_[i]}, {"device", number}};
    std::vector<CountedTotal>& totals = device.cache_totals.emplace_back();
    for (const CacheTotal& each : kCacheTotals) totals.emplace_back(metrics.FindCounter(each.metric, labels));
    device.cache_bytes.push_back(metrics.FindGauge("hps_cache_memory_bytes", labels));
    device.pinned_bytes.push_back(metrics.FindGauge("hps_cache_pinned_bytes", labels));
  }
  const MetricLabels labels = {{"model", model_}, {"device", number}};
  device.pool_totals.emplace_back(metrics.FindCounter("hps_workspaces_waited_total", labels));
  device.pool_gauges = {metrics.FindGauge("hps_workspaces_made_count", labels),
                        metrics.FindGauge("hps_workspaces_lent_count", labels),
                        metrics.FindGauge("hps_workspaces_memory_bytes", labels)};
}

ModelCaches::~ModelCaches() {
  if (retired_) PublishMetrics(/*last=*/true);
}

const ModelDevice* ModelCaches::Find(int device) const {
  for (const ModelDevice& each : devices_) {
    if (each.plan.device == device) return &each;
  }
  return nullptr;
}

Result<const ModelDevice*> FindCaches(const ModelConfig& model, const ModelCaches* caches, int device) {
  const ModelDevice* const found = caches == nullptr ? nullptr : caches->Find(device);
  if (found != nullptr) return found;
  const std::string context = "model '" + model.name + "' has no cache on device " + std::to_string(device) + ": ";
  const std::string on_host = "; or look up in host memory";
  if (!model.gpucache) {
    return InvalidArgument(context +
                           "its \"gpucache\" is false; set it to true and name the device in its "
                           "deployed_device_list" +
                           on_host);
  }
  if (model.deployed_devices.empty()) {
    return InvalidArgument(context + "its deployed_device_list is empty; name the device there" + on_host);
  }
  if (caches == nullptr) {
    return InvalidArgument(context + "the server has no devices, its tiers serve the model" + on_host);
  }
  std::string there;
  for (const ModelDevice& each : caches->devices()) {
    there += (there.empty() ? "" : ", ") + std::to_string(each.plan.device);
  }
  return InvalidArgument(context + "its deployed_device_list is " + there +
                         "; look up there, or add the device to "
                         "the list and load the model anew" +
                         on_host);
}

void ModelCaches::Start(ServerDevices& devices, const ModelCaches* kept) const {
  CacheRefresher* const refresher = devices.refresher();
  for (const ModelDevice& device : devices_) {
    if (kept != nullptr && kept->Find(device.plan.device) != nullptr) continue;
    refresher->AddPool(device.resources.workspaces);
    const DevicePlan& plan = device.plan;
    const bool refreshes = plan.refresh_delay.count() > 0 || plan.refresh_interval.count() > 0;
    if (!(plan.refresh_fraction > 0.0) || !refreshes || device.shared) continue;
    for (uint32_t table = 0; table < device.caches.size(); ++table) {
      // They are filled a moment ago: without a delay the first refresh is an interval away.
      refresher->Add({device.caches[table], source_, table, plan.refresh_fraction,
                      plan.refresh_delay.count() > 0 ? plan.refresh_delay : plan.refresh_interval,
                      plan.refresh_interval});
    }
  }
}

void ModelCaches::CountOnFrom(const ModelCaches& before) const {
  std::scoped_lock lock(metrics_mutex_, before.metrics_mutex_);
  for (const ModelDevice& device : devices_) {
    const ModelDevice* const kept = before.Find(device.plan.device);
    if (kept == nullptr) continue;
    device.cache_totals = kept->cache_totals;
    kept->counted_elsewhere = true;
  }
}

// Shared caches stay: what waits for them in the insert queue is as good for other models.
void ModelCaches::Stop(ServerDevices& devices, const ModelCaches* successor) const {
  CacheRefresher* const refresher = devices.refresher();
  for (const ModelDevice& device : devices_) {
    if (device.shared || (successor != nullptr && successor->Find(device.plan.device) != nullptr)) continue;
    for (const auto& cache : device.caches) {
      if (refresher != nullptr) refresher->Remove(cache.get());
      device.inserts->Remove(cache.get());
    }
  }
  PublishMetrics(/*last=*/true);
}

// Devices work side by side: all are given their part before any is waited for.
Status ModelCaches::OnEach(uint32_t table, const std::function<Status(DeviceCache& cache)>& write) const {
  Status status;
  for (const auto& step :
       {write, std::function<Status(DeviceCache&)>([](DeviceCache& cache) { return cache.Flush(); })}) {
    for (const ModelDevice& device : devices_) {
      const Status done = step(*device.caches[table]);
      if (status.ok() && device.resources.context->CheckAlive().ok()) status = done;
    }
  }
  return status;
}

Status ModelCaches::Update(uint32_t table, std::span<const Key> keys, ConstRowBuffer rows) const {
  return OnEach(table, [&](DeviceCache& cache) { return cache.Update(keys, rows); });
}

Status ModelCaches::Erase(uint32_t table, std::span<const Key> keys) const {
  return OnEach(table, [&](DeviceCache& cache) { return cache.Erase(keys); });
}

Status ModelCaches::Refresh(std::optional<int> device, const std::atomic<bool>* cancelled,
                            RefreshReport* report) const {
  for (const ModelDevice& each : devices_) {
    if (device && each.plan.device != *device) continue;
    for (uint32_t table = 0; table < each.caches.size(); ++table) {
      DeviceCache& cache = *each.caches[table];
      if (cache.whole()) {
        return FailedPrecondition(
            cache.spec().name +
            ": its cache (static or uvm) holds the whole table as it was loaded and updated; replace the model to "
            "load new ones, or use \"embedding_cache_type\": \"dynamic\"");
      }
      HPS_RETURN_IF_ERROR(RefreshCache(cache, *source_, table, each.plan.refresh_fraction, cancelled, report));
    }
  }
  return OkStatus();
}

void ModelCaches::PublishMetrics(bool last) const {
  std::lock_guard lock(metrics_mutex_);
  retired_ = retired_ || last;
  const auto set = [this](Gauge* gauge, uint64_t value) { gauge->Set(retired_ ? 0 : static_cast<int64_t>(value)); };
  for (const ModelDevice& device : devices_) {
    for (size_t i = 0; i < device.caches.size() && !device.counted_elsewhere; ++i) {
      const CacheStats stats = device.caches[i]->stats();
      for (size_t t = 0; t < std::size(kCacheTotals); ++t) {
        device.cache_totals[i][t].Publish(stats.*kCacheTotals[t].total);
      }
      set(device.cache_bytes[i], stats.device_bytes);
      set(device.pinned_bytes[i], stats.pinned_bytes);
    }
    const WorkspacePool::Stats pool = device.resources.workspaces->stats();
    device.pool_totals[0].Publish(pool.waits);
    set(device.pool_gauges[0], pool.workspaces);
    set(device.pool_gauges[1], pool.lent);
    set(device.pool_gauges[2], pool.device_bytes);
  }
}

}  // namespace hps
