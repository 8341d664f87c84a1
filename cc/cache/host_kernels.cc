// Invariant: a bucket's keys, state and rows are read and written under its lock only; two locks are taken together by
// std::scoped_lock, which knows no order.

#include "cc/cache/host_kernels.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <unordered_map>

#include "cuda_kernels/device.h"

namespace hps {
namespace {

using cuda::CacheBucket;
using cuda::CacheTable;
using cuda::kCacheWays;

constexpr uint64_t kFull = uint64_t{0x7F} << 14;

std::byte* RowOf(const CacheTable& table, const CacheBucket* bucket, int way) {
  return static_cast<std::byte*>(table.rows) +
         (static_cast<uint64_t>(bucket - table.buckets) * kCacheWays + static_cast<uint64_t>(way)) * table.row_bytes;
}

int WayOf(const CacheBucket& bucket, int64_t key) {
  for (int way = 0; way < kCacheWays; ++way) {
    if (bucket.keys[way] == key) return way;
  }
  return -1;
}

// Calls body(first, second) with the buckets of the key, or nullptr in place of the second, locked. The second one is
// taken where the key may be there and, with_second, where the first one is full.
template <typename Body>
auto WithKey(const CacheTable& table, int64_t key, bool with_second, BucketLocks& locks, Body body) {
  const uint64_t hash = cuda::CacheHash(key);
  CacheBucket* const first = table.buckets + cuda::FirstBucket(hash, table.num_buckets);
  CacheBucket* const second = table.buckets + cuda::SecondBucket(hash, table.num_buckets);
  {
    std::scoped_lock lock(locks.Of(first));
    const bool full = (first->state & kFull) == kFull;
    const bool needs_second = (first->state & cuda::kStateOverflowed) || (with_second && full);
    if (WayOf(*first, key) >= 0 || !needs_second || first == second) {
      return body(first, static_cast<CacheBucket*>(nullptr));
    }
    if (&locks.Of(first) == &locks.Of(second)) return body(first, second);
  }
  std::scoped_lock lock(locks.Of(first), locks.Of(second));
  return body(first, second);
}

// Returns whether another row had to go.
bool InsertKey(const CacheTable& table, int64_t key, const void* row, bool spill, BucketLocks& locks) {
  return WithKey(table, key, spill, locks, [&](CacheBucket* first, CacheBucket* second) {
    if (WayOf(*first, key) >= 0 || (second != nullptr && WayOf(*second, key) >= 0)) return false;
    CacheBucket* target = first;
    uint64_t state = first->state;
    int way = cuda::ChooseWay(&state);
    bool evicts = (state & cuda::StateHolds(way)) != 0;
    if (evicts && spill && second != nullptr) {
      uint64_t other = second->state;
      const int other_way = cuda::ChooseWay(&other);
      if (!(other & cuda::StateHolds(other_way))) {
        evicts = false;
        first->state |= cuda::kStateOverflowed;
        first->state += cuda::kStateVersionOne;
        target = second;
        way = other_way;
        state = other;
      }
    }
    target->state = (state & ~(uint64_t{3} << (2 * way))) | cuda::StateHolds(way);
    target->state += cuda::kStateVersionOne;
    target->keys[way] = key;
    std::memcpy(RowOf(table, target, way), row, table.row_bytes);
    return evicts;
  });
}

}  // namespace

int CheckTable(const CacheTable& table) {
  const bool valid = table.row_bytes > 0 && table.row_bytes % 4 == 0 && table.num_buckets >= cuda::kMinBuckets &&
                     table.activity != nullptr;
  return valid ? 0 : cuda::kErrorInvalidValue;
}

int CheckQuery(const std::vector<cuda::QueryPart>& parts, const cuda::QueryWorkspace& workspace, uint32_t stamp) {
  if (parts.size() > cuda::kMaxQueryParts || stamp == 0) return cuda::kErrorInvalidValue;
  uint64_t positions = 0;
  for (const cuda::QueryPart& part : parts) {
    if (CheckTable(part.table) != 0) return cuda::kErrorInvalidValue;
    positions += part.count;
  }
  return positions > workspace.max_positions ? cuda::kErrorInvalidValue : 0;
}

bool HostReadRow(const CacheTable& table, int64_t key, void* output, BucketLocks& locks) {
  return WithKey(table, key, false, locks, [&](CacheBucket* first, CacheBucket* second) {
    for (CacheBucket* bucket : {first, second}) {
      if (bucket == nullptr) continue;
      const int way = WayOf(*bucket, key);
      if (way < 0) continue;
      std::memcpy(output, RowOf(table, bucket, way), table.row_bytes);
      if (!table.whole) bucket->state |= cuda::StateNextRef(bucket->state, way);
      return true;
    }
    return false;
  });
}

void HostClear(const CacheTable& table, BucketLocks& locks) {
  *table.activity = {};
  for (uint64_t b = 0; b < table.num_buckets; ++b) {
    CacheBucket& bucket = table.buckets[b];
    std::scoped_lock lock(locks.Of(&bucket));
    std::fill(bucket.keys, bucket.keys + kCacheWays, cuda::FillerOf(b, table.num_buckets));
    bucket.state = 0;
  }
}

namespace {

int64_t KeyOf(const cuda::QueryPart& part, uint64_t i) { return part.keys[i * part.key_stride]; }
float* OutputRow(const cuda::QueryPart& part, uint64_t i) {
  return reinterpret_cast<float*>(static_cast<std::byte*>(part.output) + i * cuda::OutputStride(part));
}

}  // namespace

void HostUntoldQuery(const std::vector<cuda::QueryPart>& parts, BucketLocks& locks) {
  for (const cuda::QueryPart& part : parts) {
    const size_t row_words = part.table.row_bytes / sizeof(float);
    for (uint32_t i = 0; i < part.count; ++i) {
      float* const output = OutputRow(part, i);
      const int64_t key = KeyOf(part, i);
      if (HostReadRow(part.table, key, output, locks)) continue;
      std::fill(output, output + row_words, part.default_value);
      std::atomic_ref(part.table.activity->untold_missing).fetch_add(1, std::memory_order_relaxed);
    }
  }
}

// The device finds a key's first occurrence by workspace.first_wins; here the order of the loop does.
void HostQuery(const std::vector<cuda::QueryPart>& parts, const cuda::QueryWorkspace& workspace, uint32_t stamp,
               BucketLocks& locks) {
  uint32_t missing_positions = 0, missing_keys = 0, first_position = 0;
  std::unordered_map<int64_t, uint32_t> leaders;
  for (const cuda::QueryPart& part : parts) {
    leaders.clear();
    const size_t row_words = part.table.row_bytes / sizeof(float);
    for (uint32_t i = 0; i < part.count; ++i) {
      float* const output = OutputRow(part, i);
      const int64_t key = KeyOf(part, i);
      if (HostReadRow(part.table, key, output, locks)) continue;
      std::fill(output, output + row_words, part.default_value);
      const uint32_t position = first_position + i;
      const auto [leader, is_first] = leaders.emplace(key, position);
      if (is_first) {
        workspace.unique_of[position] = missing_keys;
        workspace.missing[missing_keys++] = {key, position, 0};
      }
      workspace.positions[missing_positions] = position;
      workspace.leaders[missing_positions++] = leader->second;
    }
    first_position += part.count;
  }
  if (missing_positions != 0) workspace.result->missing_keys = missing_keys;
  std::atomic_ref(workspace.result->done)
      .store((static_cast<uint64_t>(stamp) << 32) | missing_positions, std::memory_order_release);
}

void HostFill(const std::vector<cuda::QueryPart>& parts, const cuda::QueryWorkspace& workspace,
              const cuda::FillRequest& request, BucketLocks& locks) {
  std::vector<uint64_t> begins;
  uint64_t positions = 0;
  for (const cuda::QueryPart& part : parts) {
    begins.push_back(positions);
    positions += part.count;
  }
  const auto part_of = [&](uint32_t position) {
    return static_cast<size_t>(std::upper_bound(begins.begin(), begins.end(), position) - begins.begin()) - 1;
  };
  const auto* staging = static_cast<const std::byte*>(request.staging);
  const auto offset_of = [&](uint32_t key, const cuda::CacheTable& table) {
    return request.row_offsets != nullptr ? request.row_offsets[key] : uint64_t{key} * table.row_bytes;
  };
  for (uint32_t i = 0; i < request.missing_positions; ++i) {
    const uint32_t position = workspace.positions[i];
    const size_t part = part_of(position);
    const uint64_t offset = offset_of(workspace.unique_of[workspace.leaders[i]], parts[part].table);
    if (offset == cuda::kNoRow) continue;
    const uint32_t row_bytes = parts[part].table.row_bytes;
    std::memcpy(OutputRow(parts[part], position - begins[part]), staging + offset, row_bytes);
  }
  for (uint32_t i = 0; i < request.missing_keys; ++i) {
    const cuda::MissingKey& missing = workspace.missing[i];
    const cuda::CacheTable& table = parts[part_of(missing.position)].table;
    const uint64_t offset = offset_of(i, table);
    if (offset != cuda::kNoRow) InsertKey(table, missing.key, staging + offset, request.spill, locks);
  }
}

void HostInsert(const CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, bool spill,
                uint32_t* evicted, BucketLocks& locks) {
  for (uint32_t i = count; i-- > 0;) {
    const void* row = static_cast<const std::byte*>(rows) + uint64_t{i} * table.row_bytes;
    const bool evicts = InsertKey(table, keys[i], row, spill, locks);
    if (evicts && evicted != nullptr) std::atomic_ref(*evicted).fetch_add(1, std::memory_order_relaxed);
  }
}

void HostUpdate(const CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, BucketLocks& locks) {
  for (uint32_t i = count; i-- > 0;) {
    const void* row = static_cast<const std::byte*>(rows) + uint64_t{i} * table.row_bytes;
    WithKey(table, keys[i], false, locks, [&](CacheBucket* first, CacheBucket* second) {
      for (CacheBucket* bucket : {first, second}) {
        const int way = bucket == nullptr ? -1 : WayOf(*bucket, keys[i]);
        if (way < 0) continue;
        std::memcpy(RowOf(table, bucket, way), row, table.row_bytes);
        bucket->state += cuda::kStateVersionOne;
      }
    });
  }
}

void HostErase(const CacheTable& table, const int64_t* keys, uint32_t count, BucketLocks& locks) {
  for (uint32_t i = 0; i < count; ++i) {
    WithKey(table, keys[i], false, locks, [&](CacheBucket* first, CacheBucket* second) {
      for (CacheBucket* bucket : {first, second}) {
        const int way = bucket == nullptr ? -1 : WayOf(*bucket, keys[i]);
        if (way < 0) continue;
        bucket->keys[way] = cuda::FillerOf(static_cast<uint64_t>(bucket - table.buckets), table.num_buckets);
        bucket->state &= ~(cuda::StateHolds(way) | uint64_t{3} << (2 * way));
        bucket->state += cuda::kStateVersionOne;
      }
    });
  }
}

void HostDump(const CacheTable& table, uint64_t first, uint64_t last, int64_t* keys, uint32_t* count,
              BucketLocks& locks) {
  for (uint64_t b = first; b < last; ++b) {
    const CacheBucket& bucket = table.buckets[b];
    std::scoped_lock lock(locks.Of(&bucket));
    for (int way = 0; way < kCacheWays; ++way) {
      if (bucket.state & cuda::StateHolds(way)) keys[(*count)++] = bucket.keys[way];
    }
  }
}

}  // namespace hps
