// ModelCaches: the caches of one version of a model on its devices, and the lookups over them.
//
// Thread safety: immutable once built, but for what metrics remember; all methods may be called from any thread.
// Ownership: the model owns it. It keeps the tables of the model's tiers alive, not the model.

#ifndef HPS_CORE_MODEL_CACHES_H_
#define HPS_CORE_MODEL_CACHES_H_

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cc/cache/cache_plan.h"
#include "cc/cache/device_lookup.h"
#include "cc/core/server_devices.h"
#include "cc/core/tier_stack.h"
#include "hps/config.h"
#include "hps/metrics.h"

namespace hps {

// A total that others count, brought into a counter of the registry, which never goes back.
// REQUIRES: external synchronisation.
class CountedTotal {
 public:
  explicit CountedTotal(Counter* counter) : counter_(counter) {}
  void Publish(uint64_t total) {
    if (total <= published_) return;
    counter_->Add(total - published_);
    published_ = total;
  }

 private:
  Counter* counter_;
  uint64_t published_ = 0;
};

struct ModelDevice {
  DevicePlan plan;
  DeviceResources resources;
  std::vector<std::shared_ptr<DeviceCache>> caches;  // by table
  bool shared = false;  // the caches are those of shared tables, which refresh and count them
  std::shared_ptr<InsertQueue> inserts;
  std::unique_ptr<DeviceLookup> lookup;
  // CacheStats of each table and WorkspacePool::Stats, as the registry knows them.
  mutable std::vector<std::vector<CountedTotal>> cache_totals;
  mutable std::vector<CountedTotal> pool_totals;
  mutable bool counted_elsewhere = false;  // CountOnFrom of a successor was called, or the caches are `shared`
  std::vector<Gauge*> cache_bytes;
  std::vector<Gauge*> pinned_bytes;
  std::array<Gauge*, 3> pool_gauges{};  // made, lent, bytes
};

class ModelCaches;

// One table's tiers, as its caches begin.
struct CachedTable {
  const TierStack* stack = nullptr;
  bool volatile_is_shared = false;  // others may have written newer rows, and other keys, there
  // Instead of caches of its own: those of a table that models share (shared_tables.h), on all devices of the model.
  const ModelCaches* shared = nullptr;
};

struct CacheBuildOptions {
  bool long_keys = true;
  Executor* executor = nullptr;     // outlives the caches
  Executor* io_executor = nullptr;  // likewise
  const std::atomic<bool>* cancelled = nullptr;
  CacheParts parts = CacheParts::kAll;  // kWorkspaces: all tables are shared
  const ModelCaches* kept = nullptr;  // of the version before, of the same tables: stay where the model has the device
};

class ModelCaches {
 public:
  // Lookups that ended after Stop are counted.
  ~ModelCaches();

  // Whether the model's configuration asks for caches and the process has devices.
  static bool Wanted(const ModelConfig& model, const ServerDevices* devices) {
    return devices != nullptr && devices->count() > 0 && model.gpucache && !model.deployed_devices.empty();
  }

  struct Planned {
    ModelConfig model;
    CacheParts parts = CacheParts::kAll;
  };
  // The plans of all models that want caches; their memory is checked against what is free now, before anything is
  // allocated. Errors: PlanCaches, CheckFreeMemory.
  static Status CheckPlans(std::span<const Planned> models,
                           const std::function<Result<uint64_t>(const TableConfig&)>& rows, ServerDevices& devices);

  // Plans, checks, makes and fills the caches of a model whose tiers are loaded. On error nothing is left.
  static Result<std::unique_ptr<ModelCaches>> Build(const ModelConfig& model, std::span<const CachedTable> tables,
                                                    const CacheBuildOptions& options, ServerDevices& devices,
                                                    MetricsRegistry& metrics);
  // nullptr: no cache there.
  const ModelDevice* Find(int device) const;
  const std::vector<ModelDevice>& devices() const { return devices_; }

  // When the model is published: refreshes as configured, workspaces are trimmed. `kept`: those that it was built with.
  void Start(ServerDevices& devices, const ModelCaches* kept = nullptr) const;
  // Before it is published: goes on counting the caches that were kept, where `before` stops.
  void CountOnFrom(const ModelCaches& before) const;
  // When it is no longer: what runs in the background lets go of the caches, but for those that `successor` has kept.
  void Stop(ServerDevices& devices, const ModelCaches* successor = nullptr) const;

  // To the caches of every device, after the tiers were written; waits until they are there. A device that has failed
  // is passed over: it answers nothing any more.
  Status Update(uint32_t table, std::span<const Key> keys, ConstRowBuffer rows) const;
  Status Erase(uint32_t table, std::span<const Key> keys) const;

  // Reads all cached rows anew from the tiers, on `device` or on all.
  Status Refresh(std::optional<int> device, const std::atomic<bool>* cancelled, RefreshReport* report) const;

  // Brings the counts of caches and workspaces into the registry. Last time: what they hold now counts as gone.
  void PublishMetrics(bool last = false) const;

 private:
  explicit ModelCaches(const ModelConfig& model) : model_(model.name) {}
  Status AddDevice(const DevicePlan& plan, std::span<const CachedTable> tables, const CacheBuildOptions& options,
                   ServerDevices& devices, MetricsRegistry& metrics);
  Status AddCaches(ModelDevice& device, std::span<const CachedTable> tables, const CacheBuildOptions& options);
  void AddMetrics(ModelDevice& device, MetricsRegistry& metrics);
  Status OnEach(uint32_t table, const std::function<Status(DeviceCache& cache)>& write) const;

  const std::string model_;
  std::vector<std::string> table_names_;
  std::shared_ptr<RowSource> source_;
  std::vector<ModelDevice> devices_;
  mutable std::mutex metrics_mutex_;  // guards what the devices' totals remember, and
  mutable bool retired_ = false;      // PublishMetrics was called for the last time
};

// The model's caches on the device. kInvalidArgument where there are none, saying what to do; `caches` may be nullptr.
Result<const ModelDevice*> FindCaches(const ModelConfig& model, const ModelCaches* caches, int device);

}  // namespace hps

#endif  // HPS_CORE_MODEL_CACHES_H_
