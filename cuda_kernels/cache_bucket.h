// CacheBucket: one set of the device cache, and the rules by which keys find it. The same code runs on the device and,
// in the host's tests, on the CPU.
//
// A bucket is 64 bytes: seven keys and one word of state. A lookup reads it in one access (the device fetches 64 bytes
// from memory whatever one asks for), and the row of way w of bucket b lies at slot 7 * b + w, so nothing else is read
// before the row. A way without a row holds a filler, a key that belongs in another bucket: readers compare keys and
// need no valid bits.
//
// The word of state, from bit 0 on:
//   14  two bits a way: 00, 01, 11 = read never, once, often since it came or since the last eviction here.
//    7  one bit a way: it holds a row.
//    1  overflowed: a key whose first bucket this is may be in its second one.
//    1  locked by a writer, who may be writing keys and rows of this bucket.
//   41  version, one more after each writer.
// Readers take no lock: they copy the row, read the bucket again, and begin anew where its keys or version have changed
// or a writer was there.

#ifndef HPS_CUDA_KERNELS_CACHE_BUCKET_H_
#define HPS_CUDA_KERNELS_CACHE_BUCKET_H_

#include <cstdint>

#ifdef __CUDACC__
#define HPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HPS_HOST_DEVICE inline
#endif

namespace hps::cuda {

inline constexpr int kCacheWays = 7;

struct alignas(64) CacheBucket {
  int64_t keys[kCacheWays];
  uint64_t state;
};
static_assert(sizeof(CacheBucket) == 64);

inline constexpr uint64_t kStateRefs = (uint64_t{1} << 14) - 1;
inline constexpr uint64_t kStateOverflowed = uint64_t{1} << 21;
inline constexpr uint64_t kStateLocked = uint64_t{1} << 22;
inline constexpr uint64_t kStateVersionOne = uint64_t{1} << 23;

HPS_HOST_DEVICE uint64_t StateHolds(int way) { return uint64_t{1} << (14 + way); }
HPS_HOST_DEVICE int StateRef(uint64_t state, int way) {
  const int bits = static_cast<int>(state >> (2 * way)) & 3;
  return bits == 3 ? 2 : bits;
}
// The bit to set when a row was read; 0 where all are set.
HPS_HOST_DEVICE uint64_t StateNextRef(uint64_t state, int way) {
  const uint64_t bits = (state >> (2 * way)) & 3;
  return bits == 3 ? 0 : (bits == 0 ? uint64_t{1} : uint64_t{2}) << (2 * way);
}
// All ways read one time less.
HPS_HOST_DEVICE uint64_t StateAged(uint64_t state) {
  const uint64_t high = state & 0x2AAA;  // 11 becomes 01, 01 becomes 00
  return (state & ~kStateRefs) | (high >> 1);
}
// The way to give to a new key: one without a row, else the one that was read least; ties go round with the version.
// *state is aged where every way was read.
HPS_HOST_DEVICE int ChooseWay(uint64_t* state) {
  const int start = static_cast<int>((*state >> 23) % kCacheWays);
  for (;;) {
    int best = -1;
    for (int i = 0; i < kCacheWays; ++i) {
      const int way = start + i < kCacheWays ? start + i : start + i - kCacheWays;
      if (!(*state & StateHolds(way))) return way;
      if (best < 0 && StateRef(*state, way) == 0) best = way;
    }
    if (best >= 0) return best;
    *state = StateAged(*state);
  }
}

// What should change places where only the first device_ways ways have rows in device memory: a row of the others that
// was read often, and among the first a free way or else the row that was read least, if that was not often. Returns
// false where there is nothing to do; that is soon, for each exchange leaves one more row that was read often in front.
HPS_HOST_DEVICE bool ChooseExchange(uint64_t state, int device_ways, int* near, int* far) {
  *near = *far = -1;
  int least = 2;
  for (int way = 0; way < kCacheWays; ++way) {
    const int reads = (state & StateHolds(way)) != 0 ? StateRef(state, way) : -1;
    if (way < device_ways) {
      if (reads < least) *near = way, least = reads;
    } else if (reads == 2) {
      *far = way;
    }
  }
  return *near >= 0 && *far >= 0;
}
// The state when those two have changed places.
HPS_HOST_DEVICE uint64_t StateExchanged(uint64_t state, int near, int far) {
  const uint64_t near_refs = (state >> (2 * near)) & 3, far_refs = (state >> (2 * far)) & 3;
  const bool near_holds = (state & StateHolds(near)) != 0, far_holds = (state & StateHolds(far)) != 0;
  state &= ~(uint64_t{3} << (2 * near) | uint64_t{3} << (2 * far) | StateHolds(near) | StateHolds(far));
  return state | far_refs << (2 * near) | near_refs << (2 * far) | (far_holds ? StateHolds(near) : 0) |
         (near_holds ? StateHolds(far) : 0);
}

HPS_HOST_DEVICE uint64_t CacheHash(int64_t key) {
  uint64_t x = static_cast<uint64_t>(key);
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}
HPS_HOST_DEVICE uint64_t MapToBuckets(uint64_t hash, uint64_t num_buckets) {
#ifdef __CUDA_ARCH__
  return __umul64hi(hash, num_buckets);
#else
  __extension__ using uint128 = unsigned __int128;
  return static_cast<uint64_t>((static_cast<uint128>(hash) * num_buckets) >> 64);
#endif
}
HPS_HOST_DEVICE uint64_t FirstBucket(uint64_t hash, uint64_t num_buckets) { return MapToBuckets(hash, num_buckets); }
HPS_HOST_DEVICE uint64_t SecondBucket(uint64_t hash, uint64_t num_buckets) {
  return MapToBuckets((hash ^ (hash >> 29)) * 0x9E3779B97F4A7C15ULL, num_buckets);
}
// A key that belongs in neither way to `bucket`. REQUIRES: num_buckets >= kMinBuckets.
inline constexpr uint64_t kMinBuckets = 16;
HPS_HOST_DEVICE int64_t FillerOf(uint64_t bucket, uint64_t num_buckets) {
  int64_t key = 0;
  for (;; ++key) {
    const uint64_t hash = CacheHash(key);
    if (FirstBucket(hash, num_buckets) != bucket && SecondBucket(hash, num_buckets) != bucket) return key;
  }
}

}  // namespace hps::cuda

#endif  // HPS_CUDA_KERNELS_CACHE_BUCKET_H_
