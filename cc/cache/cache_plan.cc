#include "cc/cache/cache_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cc/cache/device_cache.h"
#include "cc/cache/static_placement.h"

namespace hps {
namespace {

constexpr uint32_t kMostWorkers = 4096;

// Keys that a lookup of the largest configured batch asks for; the most of uint64 where it is more.
uint64_t LargestBatch(const ModelConfig& model) {
  uint64_t positions = 0;
  for (const TableConfig& table : model.tables) {
    const uint64_t keys = uint64_t{model.max_batch_size} * table.max_keys_per_sample;  // of 32 bits each
    if (__builtin_add_overflow(positions, keys, &positions)) return std::numeric_limits<uint64_t>::max();
  }
  return positions;
}

Status CheckModel(const ModelConfig& model, size_t num_tables, int num_devices) {
  const std::string context = "model '" + model.name + "': ";
  if (num_tables != model.tables.size()) {
    return Internal(context + std::to_string(num_tables) + " row counts for " + std::to_string(model.tables.size()) +
                    " tables");
  }
  if (model.enable_pagelock && model.cache_type != CacheType::kStatic) {
    return InvalidArgument(context +
                           "enable_pagelock puts the rows of static caches into pinned host memory, but its "
                           "embedding_cache_type is not \"static\"; set that, or leave enable_pagelock out");
  }
  if (model.fp8_quant && model.cache_type == CacheType::kDynamic) {
    return InvalidArgument(context +
                           "fp8_quant keeps the rows of caches that hold whole tables as 8-bit values, but its "
                           "embedding_cache_type is \"dynamic\"; set \"static\" or \"uvm\", or leave fp8_quant out");
  }
  if (!(model.gpucacheper > 0.0 && model.gpucacheper <= 1.0)) {
    return InvalidArgument(context + "gpucacheper is " + std::to_string(model.gpucacheper) +
                           "; it is the part of a table's rows that the cache holds, above 0 and at most 1");
  }
  if (const uint64_t keys = LargestBatch(model); keys > LookupWorkspace::kMostPositions) {
    return InvalidArgument(
        context + "max_batch_size times maxnum_catfeature_query_per_table_per_sample of its tables is " +
        std::to_string(keys) + " keys in one lookup; " + std::to_string(LookupWorkspace::kMostPositions) +
        " is the most on a GPU, which reserves memory for so many: give what batches will really have");
  }
  if (model.worker_buffers > kMostWorkers) {
    return InvalidArgument(context + "num_of_worker_buffer_in_pool is " + std::to_string(model.worker_buffers) +
                           "; it reserves memory for so many lookups side by side on a GPU, and " +
                           std::to_string(kMostWorkers) + " is the most");
  }
  if (model.deployed_devices.empty()) {
    return InvalidArgument(context +
                           "deployed_device_list is empty; name the GPUs that get a cache, or set "
                           "\"gpucache\": false");
  }
  for (size_t i = 0; i < model.deployed_devices.size(); ++i) {
    const int device = model.deployed_devices[i];
    if (device < 0 || device >= num_devices) {
      return InvalidArgument(
          context + "deployed_device_list names GPU " + std::to_string(device) + ", but this process sees " +
          std::to_string(num_devices) +
          " (numbered from 0, after CUDA_VISIBLE_DEVICES); name one of those, or set \"gpucache\": false");
    }
    if (std::count(model.deployed_devices.begin(), model.deployed_devices.end(), device) > 1) {
      return InvalidArgument(context + "deployed_device_list names GPU " + std::to_string(device) + " twice");
    }
  }
  return OkStatus();
}

// Of the seven rows of a bucket, for a part above 0; rounded up.
uint32_t SeventhsOf(double part) {
  const auto ways = static_cast<uint32_t>(std::ceil(part * cuda::kCacheWays - 1e-9));
  return std::clamp<uint32_t>(ways, 1, cuda::kCacheWays);
}

TableCachePlan PlanTable(const ModelConfig& model, size_t table, uint64_t rows) {
  const TableConfig& config = model.tables[table];
  TableCachePlan plan;
  plan.spec.name = "model '" + model.name + "', table '" + config.name + "'";
  plan.spec.row_bytes = config.width * sizeof(float);
  plan.spec.default_value = config.default_value;
  plan.spec.type = model.cache_type;
  plan.spec.int8_rows = model.fp8_quant;
  if (model.enable_pagelock) plan.spec.device_ways = 0;
  if (model.cache_type == CacheType::kUvm) plan.spec.device_ways = SeventhsOf(model.gpucacheper);
  const bool whole = model.cache_type != CacheType::kDynamic || (model.init_ec && model.gpucacheper >= 1.0);
  if (whole) {
    plan.start = CacheStart::kWhole;
    plan.spec.capacity_rows = StaticPlacement::BucketsFor(rows) * cuda::kCacheWays;
  } else {
    plan.start = model.init_ec ? CacheStart::kPreload : CacheStart::kEmpty;
    plan.spec.capacity_rows = static_cast<uint64_t>(std::ceil(static_cast<double>(rows) * model.gpucacheper));
  }
  plan.memory = DeviceCache::MemoryOf(plan.spec);
  return plan;
}

// A call asks the largest batch of every table at once, and may miss all of it.
WorkspaceSize PlanWorkspace(const ModelConfig& model) {
  const uint64_t positions = LargestBatch(model);
  uint64_t staging = 0;
  for (const TableConfig& table : model.tables) {
    staging += uint64_t{model.max_batch_size} * table.max_keys_per_sample * table.width * sizeof(float);
  }
  WorkspaceSize size;
  size.positions = static_cast<uint32_t>(std::max<uint64_t>(positions, 1));
  if (model.cache_type == CacheType::kDynamic) size.staging_bytes = LookupWorkspace::StagingBytes(positions, staging);
  return size;
}

std::chrono::milliseconds Milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<int64_t>(std::min(std::max(seconds, 0.0) * 1000.0, 1e15)));
}

}  // namespace

uint64_t WholeTableBytes(uint64_t rows, uint32_t row_bytes) {
  CacheSpec spec;
  spec.row_bytes = row_bytes;
  spec.capacity_rows = StaticPlacement::BucketsFor(rows) * cuda::kCacheWays;
  return DeviceCache::MemoryOf(spec).device_bytes;
}

Result<std::vector<DevicePlan>> PlanCaches(const ModelConfig& model, std::span<const uint64_t> table_rows,
                                           int num_devices, CacheParts parts) {
  std::vector<DevicePlan> plans;
  if (!model.gpucache) return plans;
  HPS_RETURN_IF_ERROR(CheckModel(model, table_rows.size(), num_devices));
  DevicePlan plan;
  for (size_t i = 0; i < table_rows.size() && parts != CacheParts::kWorkspaces; ++i) {
    plan.tables.push_back(PlanTable(model, i, table_rows[i]));
    plan.device_bytes += plan.tables[i].memory.device_bytes;
    plan.pinned_bytes += plan.tables[i].memory.pinned_bytes;
  }
  plan.workspaces.reserved = parts == CacheParts::kTables ? 0 : std::max(model.worker_buffers, 1u);
  plan.workspaces.limit = std::max(4 * plan.workspaces.reserved, 16u);
  plan.workspaces.size = PlanWorkspace(model);
  const auto add = [&](uint64_t bytes, uint64_t* sum) {  // up to the most there is
    if (__builtin_mul_overflow(bytes, uint64_t{plan.workspaces.reserved}, &bytes) ||
        __builtin_add_overflow(*sum, bytes, sum)) {
      *sum = std::numeric_limits<uint64_t>::max();
    }
  };
  add(LookupWorkspace::PinnedBytes(plan.workspaces.size), &plan.pinned_bytes);
  add(LookupWorkspace::DeviceBytes(plan.workspaces.size), &plan.device_bytes);
  plan.hit_rate_threshold = model.hit_rate_threshold;
  if (model.cache_type == CacheType::kDynamic) plan.refresh_fraction = model.cache_refresh_percentage_per_iteration;
  plan.refresh_delay = Milliseconds(model.refresh_delay_seconds);
  plan.refresh_interval = Milliseconds(model.refresh_interval_seconds);
  for (const int device : model.deployed_devices) {
    plan.device = device;
    plans.push_back(plan);
  }
  return plans;
}

}  // namespace hps
