// What the kernels of the device cache share: tiles of threads that serve one key together, and access to buckets.
//
// A tile is 4 to 32 neighbouring threads. Thread i of it holds quarter i % 4 of a bucket (two keys, or the last key and
// the state), so that one load instruction reads a whole bucket.
//
// Memory order: everything that another kernel may change is read past the first-level caches (which are not coherent).
// A reader's second look at the bucket is issued after the row has arrived in registers, because the stores of the row
// stand between; a writer fences between locking, writing, and unlocking.

#ifndef HPS_CUDA_KERNELS_DEVICE_CACHE_ACCESS_CUH_
#define HPS_CUDA_KERNELS_DEVICE_CACHE_ACCESS_CUH_

#include <cuda_runtime.h>

#include "cuda_kernels/device_cache.h"

namespace hps::cuda {

struct BucketQuarter {
  uint64_t low, high;
};

__device__ __forceinline__ BucketQuarter LoadQuarter(const CacheBucket* bucket, int quarter) {
  BucketQuarter value;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(value.low), "=l"(value.high)
               : "l"(reinterpret_cast<const char*>(bucket) + 16 * quarter)
               : "memory");
  return value;
}
__device__ __forceinline__ uint64_t LoadWord(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t LoadState(const CacheBucket* bucket) { return LoadWord(&bucket->state); }
__device__ __forceinline__ unsigned long long* StateAddress(CacheBucket* bucket) {
  return reinterpret_cast<unsigned long long*>(&bucket->state);
}

// Changes begun in the lower half, ended in the upper one.
__device__ __forceinline__ uint64_t LoadActivity(const CacheActivity* activity) {
  return LoadWord(reinterpret_cast<const uint64_t*>(activity));
}
__device__ __forceinline__ bool IsBusy(uint64_t activity) {
  return static_cast<uint32_t>(activity) != static_cast<uint32_t>(activity >> 32);
}

// Four neighbouring lanes with the quarters of one bucket: the way that holds their key, or -1.
__device__ __forceinline__ int GroupWayOf(const BucketQuarter& bucket, int64_t key, int quarter,
                                          unsigned mask = 0xFFFFFFFF) {
  int way = static_cast<int64_t>(bucket.low) == key                   ? 2 * quarter
            : quarter < 3 && static_cast<int64_t>(bucket.high) == key ? 2 * quarter + 1
                                                                      : -1;
  way = max(way, __shfl_xor_sync(mask, way, 1));
  return max(way, __shfl_xor_sync(mask, way, 2));
}

template <int kLanes>
struct Tile {
  int lane;
  unsigned mask;

  __device__ Tile() : lane(static_cast<int>(threadIdx.x) % kLanes) {
    const int warp_lane = static_cast<int>(threadIdx.x) & 31;
    mask = kLanes == 32 ? 0xFFFFFFFFu : ((1u << kLanes) - 1) << (warp_lane / kLanes * kLanes);
  }
  __device__ int quarter() const { return lane & 3; }
  __device__ void Sync() const { __syncwarp(mask); }
  template <typename T>
  __device__ T Broadcast(T value, int from) const {
    return __shfl_sync(mask, value, from, kLanes);
  }
  // The state (quarter 3 holds it) and the way that holds the key, or -1: the answers of the first four lanes for all.
  // Beside a writer other lanes may have read something else, and then the tile would part for ever.
  __device__ uint64_t StateOf(const BucketQuarter& quarter) const {
    return Broadcast(static_cast<unsigned long long>(quarter.high), 3);
  }
  __device__ int WayOf(const BucketQuarter& bucket, int64_t key) const {
    return Broadcast(GroupWayOf(bucket, key, quarter(), mask), 0);
  }
};

// Version and, in the lowest bit, the lock.
__device__ __forceinline__ uint32_t VersionOf(uint64_t state) { return static_cast<uint32_t>(state >> 22); }

// Two neighbouring lanes with the halves of one bucket: the way that holds their key, or -1. (Quarters 0 and 2 in the one
// lane and 1 and 3 in the other would give each load one sector of 32 bytes: measured, and slower where keys are hot.
// The two loads of this way meet in the same sectors.)
struct BucketHalf {
  BucketQuarter low, high;
};
__device__ __forceinline__ BucketHalf LoadHalf(const CacheBucket* bucket, int half) {
  const BucketQuarter low = LoadQuarter(bucket, 2 * half);
  return {low, LoadQuarter(bucket, 2 * half + 1)};
}
__device__ __forceinline__ int HalfWayIn(const BucketHalf& bucket, int64_t key, int half) {
  int way = -1;
  if (static_cast<int64_t>(bucket.low.low) == key) way = 4 * half;
  if (static_cast<int64_t>(bucket.low.high) == key) way = 4 * half + 1;
  if (static_cast<int64_t>(bucket.high.low) == key) way = 4 * half + 2;
  if (half == 0 && static_cast<int64_t>(bucket.high.high) == key) way = 3;
  return max(way, __shfl_xor_sync(0xFFFFFFFF, way, 1));
}
// *state is that of the bucket in the second lane, and a key in the first.
__device__ __forceinline__ int HalfWayOf(const CacheBucket* bucket, int64_t key, int half, uint64_t* state) {
  const BucketHalf loaded = LoadHalf(bucket, half);
  *state = loaded.high.high;
  return HalfWayIn(loaded, key, half);
}
// A second look behind the row, by a whole warp: whether key or version have changed, or a writer was there; the same
// answer in both lanes. `version` is that of the state that HalfWayOf gave in the second lane. First the keys, then,
// when they have arrived, the states: so a key was in its place under the version that both looks at the state have
// seen, and the row was its row.
__device__ __forceinline__ bool HalfChanged(const CacheBucket* bucket, int64_t key, int way, int half,
                                            uint32_t version) {
  bool changed = false;
  if (half == 0 && way >= 0) {
    changed = LoadWord(reinterpret_cast<const uint64_t*>(&bucket->keys[way])) != static_cast<uint64_t>(key);
  }
  unsigned all = __ballot_sync(0xFFFFFFFF, changed);
  if (half == 1 && way >= 0) {
    changed = VersionOf(LoadState(bucket)) != version || (version & 1) != 0;
  }
  all |= __ballot_sync(0xFFFFFFFF, changed);
  return (all >> (threadIdx.x & 30) & 3) != 0;
}

// Whether keys or version of a bucket changed between two looks, or a writer was there; this thread's quarter of it.
__device__ __forceinline__ bool QuarterChanged(const BucketQuarter& before, const BucketQuarter& after, int quarter) {
  if (before.low != after.low) return true;
  if (quarter != 3) return before.high != after.high;
  return ((before.high ^ after.high) & ~kStateRefs) != 0 || (before.high & kStateLocked) != 0;
}

inline bool IsValid(const CacheTable& table) {
  return table.row_bytes > 0 && table.row_bytes % 4 == 0 && table.num_buckets >= kMinBuckets &&
         table.activity != nullptr && table.device_ways > 0 && table.device_ways <= kCacheWays &&
         (table.device_ways == kCacheWays || table.pinned_rows != nullptr);
}

}  // namespace hps::cuda

#endif  // HPS_CUDA_KERNELS_DEVICE_CACHE_ACCESS_CUH_
