#include "cc/cache/device_cache.h"

#include <algorithm>
#include <cstring>

#include "cc/cache/row_codec.h"
#include "cc/cache/static_placement.h"

namespace hps {
namespace {

uint64_t BucketsOf(uint64_t capacity_rows) {
  return std::max<uint64_t>(capacity_rows / cuda::kCacheWays + (capacity_rows % cuda::kCacheWays != 0),
                            cuda::kMinBuckets);
}

uint64_t IndexBytes(uint64_t num_buckets) {
  return num_buckets * sizeof(cuda::CacheBucket) + sizeof(cuda::CacheActivity);
}
cuda::RowFormat FormatOf(const CacheSpec& spec) {
  return spec.int8_rows ? cuda::RowFormat::kInt8 : cuda::RowFormat::kFloat32;
}
// Of so many rows in each bucket.
uint64_t RowBytes(uint64_t num_buckets, uint32_t ways, const CacheSpec& spec) {
  return num_buckets * ways * cuda::StoredRowBytes(FormatOf(spec), spec.row_bytes);
}
bool Exchanges(const CacheSpec& spec) { return spec.device_ways > 0 && spec.device_ways < cuda::kCacheWays; }
bool HoldsWhole(const CacheSpec& spec) { return spec.type == CacheType::kStatic || spec.type == CacheType::kUvm; }

// An exchange visits a bucket when each of its rows has been asked for about once since it did so last; so what is read
// often has its marks by then, and what is read seldom has none. Not fewer keys, for the launch's sake, and not more.
constexpr uint64_t kFewestAsked = 4096, kMostAsked = 65'536;
uint64_t KeysOfExchange(uint64_t slots) { return std::clamp(slots, kFewestAsked, kMostAsked); }

std::span<const std::byte> BytesOf(const std::vector<cuda::CacheBucket>& buckets) {
  return std::as_bytes(std::span(buckets));
}

}  // namespace

Result<DeviceResources> DeviceResources::Open(std::shared_ptr<cuda::Device> device,
                                              const WorkspacePoolOptions& workspaces,
                                              std::shared_ptr<DeviceAllocator> allocator) {
  DeviceResources resources;
  resources.context = DeviceContext::Make(std::move(device), std::move(allocator));
  HPS_ASSIGN_OR_RETURN(resources.writer, CacheWriter::Open(resources.context));
  HPS_ASSIGN_OR_RETURN(std::unique_ptr<WorkspacePool> pool, WorkspacePool::Open(resources.context, workspaces));
  resources.workspaces = std::move(pool);
  return resources;
}

CacheMemory DeviceCache::MemoryOf(const CacheSpec& spec) {
  const uint64_t num_buckets = BucketsOf(spec.capacity_rows);
  return {.device_bytes = IndexBytes(num_buckets) + RowBytes(num_buckets, spec.device_ways, spec),
          .pinned_bytes = RowBytes(num_buckets, cuda::kCacheWays - spec.device_ways, spec)};
}

Result<std::shared_ptr<DeviceCache>> DeviceCache::Allocate(const DeviceResources& resources, const CacheSpec& spec,
                                                           uint64_t num_buckets) {
  if (spec.row_bytes == 0 || spec.row_bytes % 4 != 0) {
    return InvalidArgument(spec.name + ": rows of " + std::to_string(spec.row_bytes) +
                           " bytes; a cache needs a positive multiple of 4");
  }
  if (spec.device_ways > cuda::kCacheWays ||
      (!HoldsWhole(spec) && (spec.device_ways < cuda::kCacheWays || spec.int8_rows))) {
    return InvalidArgument(spec.name +
                           ": rows in pinned memory (at most seven of a bucket) and 8-bit rows are for caches that "
                           "hold whole tables; use \"embedding_cache_type\": \"static\"");
  }
  // The device numbers rows by 32 bits.
  if (num_buckets > 0xFFFFFFFE / cuda::kCacheWays) {
    return InvalidArgument(spec.name + ": a cache of " + std::to_string(num_buckets * cuda::kCacheWays) +
                           " rows; 4294967288 is the most, use a smaller gpucacheper");
  }
  std::shared_ptr<DeviceCache> cache(new DeviceCache(resources, spec));
  DeviceContext& context = *resources.context;
  HPS_ASSIGN_OR_RETURN(cache->buckets_, DeviceMemory::Allocate(context, IndexBytes(num_buckets),
                                                               "the keys of the cache of " + spec.name));
  const uint32_t pinned_ways = cuda::kCacheWays - spec.device_ways;
  if (pinned_ways > 0) {
    HPS_ASSIGN_OR_RETURN(cache->pinned_rows_,
                         PinnedMemory::Allocate(context, RowBytes(num_buckets, pinned_ways, spec),
                                                "the rows of the cache of " + spec.name +
                                                    " (they must fit the host's memory once for each device; use "
                                                    "\"embedding_cache_type\": \"dynamic\")"));
  }
  if (spec.device_ways > 0) {
    HPS_ASSIGN_OR_RETURN(cache->rows_,
                         DeviceMemory::Allocate(context, RowBytes(num_buckets, spec.device_ways, spec),
                                                "the rows of the cache of " + spec.name +
                                                    " (use a smaller gpucacheper, or fewer models on this device)"));
  }
  cache->spec_.capacity_rows = num_buckets * cuda::kCacheWays;
  cuda::CacheTable& table = cache->cache_.table;
  table.buckets = reinterpret_cast<cuda::CacheBucket*>(cache->buckets_.get());
  table.num_buckets = num_buckets;
  table.rows = spec.device_ways == 0 ? cache->pinned_rows_.device() : cache->rows_.get();
  if (Exchanges(spec)) {
    table.device_ways = spec.device_ways;
    table.pinned_rows = cache->pinned_rows_.device();
  }
  table.format = FormatOf(spec);
  table.row_bytes = spec.row_bytes;
  table.activity = reinterpret_cast<cuda::CacheActivity*>(table.buckets + num_buckets);
  cache->cache_.number = context.NextCache();
  return cache;
}

Result<std::shared_ptr<DeviceCache>> DeviceCache::Make(const DeviceResources& resources, const CacheSpec& spec) {
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<DeviceCache> cache, Allocate(resources, spec, BucketsOf(spec.capacity_rows)));
  HPS_RETURN_IF_ERROR(resources.writer->Clear(cache->cache_.table));
  HPS_RETURN_IF_ERROR(resources.writer->Flush());  // queries on other streams must find it empty
  return cache;
}

Result<std::shared_ptr<DeviceCache>> DeviceCache::MakeWhole(const DeviceResources& resources, const CacheSpec& spec,
                                                            const RowScan& scan) {
  std::vector<Key> keys;
  HPS_RETURN_IF_ERROR(scan([&](std::span<const Key> chunk, ConstRowBuffer) -> Status {
    keys.insert(keys.end(), chunk.begin(), chunk.end());
    return OkStatus();
  }));
  const uint64_t num_buckets =
      std::max(StaticPlacement::BucketsFor(keys.size()), spec.capacity_rows == 0 ? 0 : BucketsOf(spec.capacity_rows));
  StaticPlacement placement(spec.name, num_buckets);
  HPS_RETURN_IF_ERROR(placement.Add(keys));
  keys = {};
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<DeviceCache> cache, Allocate(resources, spec, num_buckets));
  CacheWriter& writer = *resources.writer;
  HPS_RETURN_IF_ERROR(writer.Clear(cache->cache_.table));
  HPS_RETURN_IF_ERROR(writer.Upload(cache->buckets_.get(), BytesOf(placement.Finish())));
  // The host writes pinned rows itself, when the device has done the above.
  if (spec.device_ways < cuda::kCacheWays) HPS_RETURN_IF_ERROR(writer.Flush());
  HPS_RETURN_IF_ERROR(cache->FillWhole(placement, scan));
  cache->cache_.table.whole = HoldsWhole(spec);
  return cache;
}

// Every key has its place; rows follow, those of the device as updates. Nobody else knows the cache yet, but tiers may
// change.
Status DeviceCache::FillWhole(const StaticPlacement& placement, const RowScan& scan) {
  CacheWriter& writer = *resources_.writer;
  std::vector<bool> written(placement.slots());
  std::vector<Key> placed;
  std::vector<std::byte> rows;
  WriteCounters loading;
  HPS_RETURN_IF_ERROR(scan([&](std::span<const Key> chunk, ConstRowBuffer buffer) -> Status {
    const auto row_of = [&](size_t i) { return buffer.data + i * buffer.stride_bytes; };
    size_t others = 0;
    for (size_t i = 0; i < chunk.size(); ++i) {
      const auto slot = placement.SlotOf(chunk[i]);
      if (slot) written[*slot] = true;
      std::byte* const pinned = slot ? PinnedRow(*slot) : nullptr;
      if (pinned != nullptr) EncodeRow(cache_.table.format, spec_.row_bytes, row_of(i), pinned);
      if (!slot || pinned != nullptr) ++others;
    }
    if (others == chunk.size()) return OkStatus();
    if (others == 0) return writer.Update(cache_, chunk, buffer, &loading);
    placed.clear();
    rows.clear();
    for (size_t i = 0; i < chunk.size(); ++i) {
      const auto slot = placement.SlotOf(chunk[i]);
      if (!slot || PinnedRow(*slot) != nullptr) continue;
      placed.push_back(chunk[i]);
      rows.insert(rows.end(), row_of(i), row_of(i) + spec_.row_bytes);
    }
    return writer.Update(cache_, placed, {rows.data(), spec_.row_bytes}, &loading);
  }));
  std::vector<Key> gone;
  for (uint64_t slot = 0; slot < placement.slots(); ++slot) {
    if (const auto key = placement.KeyAt(slot); key && !written[slot]) gone.push_back(*key);
  }
  HPS_RETURN_IF_ERROR(writer.Erase(cache_, gone, &loading));
  return writer.Flush();
}

std::byte* DeviceCache::PinnedRow(uint64_t slot) const {
  const uint64_t bucket = slot / cuda::kCacheWays, way = slot % cuda::kCacheWays;
  if (way < spec_.device_ways) return nullptr;
  const uint64_t index = bucket * (cuda::kCacheWays - spec_.device_ways) + way - spec_.device_ways;
  return pinned_rows_.get() + index * cuda::StoredRowBytes(cache_.table.format, spec_.row_bytes);
}

void DeviceCache::CountAsked(uint64_t keys) {
  if (!Exchanges(spec_)) return;
  const uint64_t step = KeysOfExchange(spec_.capacity_rows);
  const uint64_t before = asked_.fetch_add(keys, std::memory_order_relaxed);
  const uint64_t steps = (before + keys) / step - before / step;
  if (steps > 0) resources_.writer->TryExchange(cache_, steps * (step / cuda::kCacheWays + 1), &next_exchanged_);
}

// Released, so that who sees the keys sees what was missing of them.
void DeviceCache::CountAnswered(uint64_t keys) {
  if (keys > 0) answered_.fetch_add(keys, std::memory_order_release);
}

void DeviceCache::CountMissing(Missing what, uint64_t keys, uint64_t repeated) {
  missing_[static_cast<size_t>(what)].fetch_add(keys, std::memory_order_relaxed);
  if (repeated > 0) repeated_.fetch_add(repeated, std::memory_order_relaxed);
}

void DeviceCache::CountOutdated(uint64_t rows) {
  if (rows == 0) return;
  counters_.outdated.fetch_add(rows, std::memory_order_relaxed);
  fills_outdated_.fetch_add(rows, std::memory_order_relaxed);
}

Status DeviceCache::Preload(const RowScan& scan) {
  const Stamp read_at = Now();
  uint64_t rows = 0;
  bool full = false;
  const Status status = scan([&](std::span<const Key> chunk, ConstRowBuffer buffer) -> Status {
    const size_t count = std::min<uint64_t>(chunk.size(), spec_.capacity_rows - rows);
    rows += count;
    HPS_RETURN_IF_ERROR(Insert(chunk.first(count), buffer, read_at));
    full = rows == spec_.capacity_rows;
    return full ? Cancelled("enough") : OkStatus();
  });
  if (!status.ok() && !full) return status;
  return Flush();
}

// A lookup that runs holds the cache, so only what ended ones have left on their streams is waited for. Hits leave
// nothing that tells when they are done, and lookups of several models may have been here: all streams are waited for.
DeviceCache::~DeviceCache() {
  (void)resources_.writer->Flush();
  (void)resources_.context->device().Synchronize();
}

CacheStats DeviceCache::stats() const {
  CacheStats stats;
  stats.keys_asked = answered_.load(std::memory_order_acquire);
  const auto missing = [&](Missing what) {
    return missing_[static_cast<size_t>(what)].load(std::memory_order_relaxed);
  };
  stats.rows_missed = missing(Missing::kFetched);
  stats.rows_deferred = missing(Missing::kDeferred);
  stats.rows_defaulted = missing(Missing::kDefaulted);
  stats.rows_repeated = repeated_.load(std::memory_order_relaxed);
  stats.fills_outdated = fills_outdated_.load(std::memory_order_relaxed);
  stats.rows_inserted = counters_.inserted.load(std::memory_order_relaxed);
  stats.rows_evicted = counters_.evicted.load(std::memory_order_relaxed);
  stats.rows_updated = counters_.updated.load(std::memory_order_relaxed);
  stats.rows_refreshed = counters_.refreshed.load(std::memory_order_relaxed);
  stats.rows_erased = counters_.erased.load(std::memory_order_relaxed);
  stats.rows_outdated = counters_.outdated.load(std::memory_order_relaxed);
  stats.device_bytes = buckets_.bytes() + rows_.bytes();
  stats.pinned_bytes = pinned_rows_.bytes();
  cuda::CacheActivity activity;
  if (whole() && resources_.writer->Download(&activity, cache_.table.activity, sizeof(activity)).ok()) {
    stats.rows_defaulted += activity.untold_missing;
    stats.rows_exchanged = activity.exchanged;
  }
  const uint64_t not_served = stats.rows_missed + stats.rows_deferred + stats.rows_defaulted + stats.rows_repeated;
  stats.rows_served = stats.keys_asked - std::min(stats.keys_asked, not_served);
  return stats;
}

Status DeviceCache::Query(const Key* keys, uint32_t count, void* rows, DeviceStream stream,
                          std::vector<CacheMiss>* misses, Deadline deadline) {
  misses->clear();
  HPS_RETURN_IF_ERROR(resources_.context->CheckAlive());
  if (count == 0) return OkStatus();
  CountAsked(count);
  HPS_ASSIGN_OR_RETURN(WorkspacePool::Lease workspace, resources_.workspaces->Acquire(count, deadline));
  const cuda::QueryPart part{cache_.table, keys, count, spec_.default_value, rows};
  Status status = workspace->Query(std::span(&part, 1), stream);
  if (status.ok()) status = workspace->Wait(stream, deadline, nullptr);
  if (status.ok()) {
    for (const cuda::MissingKey& missing : workspace->missing()) misses->push_back({missing.key, missing.position});
    CountMissing(whole() ? Missing::kDefaulted : Missing::kFetched, misses->size(),
                 workspace->missing_positions() - misses->size());
    CountAnswered(count);
  }
  const Status ended = workspace->End(stream);
  return status.ok() ? ended : status;
}

Status DeviceCache::Insert(std::span<const Key> keys, ConstRowBuffer rows, Stamp read_at) {
  if (HoldsWhole(spec_)) {
    return FailedPrecondition(
        spec_.name +
        ": the cache (static or uvm) holds the whole table, with the rows it was loaded with; use "
        "\"embedding_cache_type\": \"dynamic\" for one that takes new rows");
  }
  return resources_.writer->Insert(cache_, keys, rows, read_at, &counters_);
}

Status DeviceCache::Update(std::span<const Key> keys, ConstRowBuffer rows) {
  return resources_.writer->Update(cache_, keys, rows, &counters_);
}

Status DeviceCache::Refresh(std::span<const Key> keys, ConstRowBuffer rows, Stamp read_at) {
  return resources_.writer->Refresh(cache_, keys, rows, read_at, &counters_);
}

Status DeviceCache::Erase(std::span<const Key> keys) { return resources_.writer->Erase(cache_, keys, &counters_); }

Status DeviceCache::Dump(uint64_t first, uint64_t last, std::vector<Key>* keys) {
  if (first > last || last > num_buckets()) {
    return InvalidArgument(spec_.name + ": buckets [" + std::to_string(first) + ", " + std::to_string(last) +
                           ") of a cache of " + std::to_string(num_buckets()));
  }
  return resources_.writer->Dump(cache_.table, first, last, keys);
}

}  // namespace hps
