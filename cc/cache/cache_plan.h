// CachePlan: what a model's configuration means on each of its devices, before anything is allocated.
//
// Keys of ps.json that are read here: gpucache, deployed_device_list, embedding_cache_type, gpucacheper, init_ec,
// hit_rate_threshold, num_of_worker_buffer_in_pool, max_batch_size, maxnum_catfeature_query_per_table_per_sample,
// default_value_for_each_table, cache_refresh_percentage_per_iteration, refresh_delay, refresh_interval,
// enable_pagelock, fp8_quant.
//
// Thread safety: plain values and functions.

#ifndef HPS_CACHE_CACHE_PLAN_H_
#define HPS_CACHE_CACHE_PLAN_H_

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "cc/cache/workspace_pool.h"
#include "hps/config.h"
#include "hps/embedding_cache.h"

namespace hps {

enum class CacheStart {
  kEmpty,    // init_ec is off
  kPreload,  // so many rows as there is room for (DeviceCache::Preload)
  kWhole,    // every row is placed, or the start fails (DeviceCache::MakeWhole)
};

// What of a model is planned.
enum class CacheParts {
  kAll,
  kTables,      // the caches alone: rows that models share
  kWorkspaces,  // what lookups need beside caches that others have made: a model whose tables are shared
};

struct TableCachePlan {
  CacheSpec spec;
  CacheStart start = CacheStart::kEmpty;
  CacheMemory memory;  // of the cache
};

// One for each device; equal but for the number.
struct DevicePlan {
  int device = 0;
  std::vector<TableCachePlan> tables;  // none of kWorkspaces
  WorkspacePoolOptions workspaces;
  std::optional<double> hit_rate_threshold;
  // Refresh is on where the fraction is above 0 and the caches are dynamic.
  double refresh_fraction = 0.0;
  std::chrono::milliseconds refresh_delay{0};
  std::chrono::milliseconds refresh_interval{0};  // 0: only by call
  // Memory of the device for caches and workspaces; the writer's buffers, one pair a device, are not in it.
  uint64_t device_bytes = 0;
  uint64_t pinned_bytes = 0;  // likewise of the host; no two devices share any
};

// Memory of the device that a cache takes which holds all of a table there.
uint64_t WholeTableBytes(uint64_t rows, uint32_t row_bytes);

// table_rows[i] is how many rows table i has. No plans where gpucache is false. kInvalidArgument: a device that is not
// among the `num_devices` there are, or named twice; keys that do not go together.
Result<std::vector<DevicePlan>> PlanCaches(const ModelConfig& model, std::span<const uint64_t> table_rows,
                                           int num_devices, CacheParts parts = CacheParts::kAll);

}  // namespace hps

#endif  // HPS_CACHE_CACHE_PLAN_H_
