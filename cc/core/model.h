// Model and ModelSlot: one version of a model as lookups see it, and the place where versions are exchanged.

#ifndef HPS_CORE_MODEL_H_
#define HPS_CORE_MODEL_H_

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cc/base/fork_guard.h"
#include "cc/core/circuit_breaker.h"
#include "cc/core/model_caches.h"
#include "cc/core/promoter.h"
#include "cc/core/row_updates.h"
#include "cc/core/server_devices.h"
#include "cc/core/tier_stack.h"
#include "cc/loader/table_loader.h"
#include "hps/config.h"
#include "hps/executor.h"
#include "hps/metrics.h"
#include "hps/table_store.h"

namespace hps {

struct SharedTable;

struct ModelTable {
  std::string name;
  TierStack stack;
  std::shared_ptr<SharedTable> shared = nullptr;  // whose tiers and caches these are; nullptr: the model's own
  std::string source;                             // where this version's rows came from: "folder" or "persistent"
  LoadReport load;
};

// Immutable once published.
struct Model {
  ModelConfig config;
  uint64_t version = 1;  // counts replacements
  std::vector<ModelTable> tables;
  std::unique_ptr<ModelCaches> caches;  // or nullptr: no device has one
};

// What sessions share with their server and keep alive. Members are destroyed bottom up: what has threads ends first.
// In a forked child they are not destroyed: their threads, for which that would wait, do not exist there.
struct ServerResources {
  ServerResources() = default;
  ServerResources(const ServerResources&) = delete;
  ServerResources& operator=(const ServerResources&) = delete;
  ~ServerResources() {
    if (fork_generation == ForkGeneration()) return;
    (void)devices.release();
    (void)promoter.release();
    (void)executor.release();
    (void)load_executor.release();
    new auto(std::move(persistent_store));
    new auto(std::move(volatile_store));
  }

  bool long_keys = true;
  uint64_t fork_generation = ForkGeneration();
  mutable MetricsRegistry metrics;              // thread-safe by itself
  std::chrono::milliseconds lookup_timeout{0};  // of lookups that bring no deadline; 0: none
  std::unique_ptr<Executor> executor;
  std::unique_ptr<Executor> load_executor;  // for large writes; leaves lookups room. Uses `executor`
  std::unique_ptr<CircuitBreaker> volatile_breaker;
  std::unique_ptr<CircuitBreaker> persistent_breaker;
  // What every table's tiers have in common; without table and counters.
  Tier volatile_tier;
  Tier persistent_tier;
  std::shared_ptr<TableStore> volatile_store;    // or nullptr
  std::shared_ptr<TableStore> persistent_store;  // or nullptr
  std::unique_ptr<Promoter> promoter;            // or nullptr
  std::unique_ptr<ServerDevices> devices;        // or nullptr
};

// Thread-safe. Readers take a reference to the current version; Publish exchanges it, and the old version lives until
// its last lookup has ended.
class ModelSlot {
 public:
  ModelSlot(std::string name, std::shared_ptr<ServerResources> resources)
      : name_(std::move(name)),
        resources_(std::move(resources)),
        lookup_seconds_(resources_->metrics.FindHistogram("hps_lookup_duration_seconds", {{"model", name_}})) {}

  const std::string& name() const { return name_; }
  ServerResources& resources() const { return *resources_; }
  Histogram& lookup_seconds() const { return *lookup_seconds_; }
  RowUpdates& updates() const { return updates_; }

  Result<std::shared_ptr<const Model>> Current() const {
    HPS_RETURN_IF_ERROR(CheckNotForked(resources_->fork_generation));
    std::lock_guard lock(mutex_);
    if (model_ == nullptr) return reason_;
    return model_;
  }
  // Returns the version that was current, nullptr at first.
  std::shared_ptr<const Model> Publish(std::shared_ptr<const Model> model) {
    std::lock_guard lock(mutex_);
    return std::exchange(model_, std::move(model));
  }
  // Later lookups get `reason`, an error. Returns the version that was current.
  std::shared_ptr<const Model> Withdraw(Status reason) {
    std::lock_guard lock(mutex_);
    reason_ = std::move(reason);
    return std::exchange(model_, nullptr);
  }

 private:
  const std::string name_;
  const std::shared_ptr<ServerResources> resources_;
  Histogram* const lookup_seconds_;
  mutable RowUpdates updates_;
  mutable std::mutex mutex_;
  std::shared_ptr<const Model> model_;
  Status reason_ = NotFound("the model is not loaded");
};

}  // namespace hps

#endif  // HPS_CORE_MODEL_H_
