// How fast the device cache adds up rows, 32 keys to an output row, every key resident, beside a ceiling on the same
// GPU in the same run: a kernel that adds up rows by index after it has hashed each key and read one random sector of
// 32 bytes for it (the best of several shapes); and one that reads 64 bytes for it, as much as a bucket has. Each line
// of output is one measurement in JSON; sums are checked.
//
//   told      LaunchPooledQuery: the host learns what is missing
//   whole     the same over a table that gives up no rows (static caches): no marks
//
// Keys are uniform over the resident rows, or follow Zipf's law with exponent 1.05. Times are medians of five rounds of
// 32 batches of different keys.
//
// Usage: device_pooling_benchmark [COMMIT]

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "benchmarks/native/full_cache.cuh"
#include "cuda_kernels/device_pooling.h"

namespace hps::cuda {
namespace {

constexpr uint32_t kBag = 32;
constexpr uint32_t kMostRows = 1 << 16;

struct Ceilings {
  const int64_t* keys;
  const uint4* sectors;
  uint64_t num_sectors;
  const float4* rows;
  uint64_t num_rows;
  float4* output;
  uint32_t count;  // output rows
};

__device__ void Add(float4* sum, const float4& x) {
  sum->x += x.x;
  sum->y += x.y;
  sum->z += x.z;
  sum->w += x.w;
}

// 32 or 64 bytes, by two threads; all zeros.
template <int kSectors>
__device__ uint4 LoadSectors(const Ceilings& at, uint64_t hash, uint32_t half) {
  const uint4* const from = at.sectors + __umul64hi(hash, at.num_sectors / kSectors) * (2 * kSectors) + half;
  uint4 value = __ldg(from);
  if (kSectors == 2) value.x += __ldg(from + 2).x;
  return value;
}

// kLanes threads of 16 bytes an output row, kKeys of its rows at once; each thread goes after each key.
template <int kLanes, int kKeys, int kSectors>
__global__ void __launch_bounds__(256) CeilingByGroup(Ceilings at) {
  const uint32_t lane = threadIdx.x % kLanes;
  const uint32_t r = (blockIdx.x * blockDim.x + threadIdx.x) / kLanes;
  if (r >= at.count) return;
  float4 sum = {};
#pragma unroll 1
  for (uint32_t first = 0; first < kBag; first += kKeys) {
    uint64_t place[kKeys];
    uint4 sector[kKeys];
    float4 value[kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) place[k] = CacheHash(__ldg(at.keys + r * uint64_t{kBag} + first + k));
#pragma unroll
    for (int k = 0; k < kKeys; ++k) sector[k] = LoadSectors<kSectors>(at, place[k], lane & 1);
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {  // the sectors hold zeros; the row's place has to wait for them all the same
      place[k] = __umul64hi(CacheHash(static_cast<int64_t>(place[k] + sector[k].x)), at.num_rows);
    }
#pragma unroll
    for (int k = 0; k < kKeys; ++k) value[k] = __ldcs(at.rows + place[k] * kLanes + lane);
#pragma unroll
    for (int k = 0; k < kKeys; ++k) Add(&sum, value[k]);
  }
  __stcs(at.output + r * uint64_t{kLanes} + lane, sum);
}

// A warp an output row: two threads read each sector, kKeys rows of each group of kLanes threads at once.
template <int kLanes, int kKeys, int kSectors>
__global__ void __launch_bounds__(256) CeilingByWarp(Ceilings at) {
  constexpr int kGroups = 32 / kLanes;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t r = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (r >= at.count) return;
  uint32_t places[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint64_t hash = CacheHash(__ldg(at.keys + r * uint64_t{kBag} + half * 16 + lane / 2));
    const uint4 sector = LoadSectors<kSectors>(at, hash, lane & 1);
    places[half] = static_cast<uint32_t>(__umul64hi(CacheHash(static_cast<int64_t>(hash + sector.x)), at.num_rows));
  }
  float4 sum = {};
#pragma unroll 1
  for (int first = 0; first < static_cast<int>(kBag); first += kKeys * kGroups) {
    float4 value[kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const int i = first + k * kGroups + static_cast<int>(lane) / kLanes;
      const uint32_t low = __shfl_sync(0xFFFFFFFF, places[0], i % 16 * 2);
      const uint32_t high = __shfl_sync(0xFFFFFFFF, places[1], i % 16 * 2);
      value[k] = __ldcs(at.rows + uint64_t{i < 16 ? low : high} * kLanes + lane % kLanes);
    }
#pragma unroll
    for (int k = 0; k < kKeys; ++k) Add(&sum, value[k]);
  }
#pragma unroll
  for (int other = kLanes; other < 32; other *= 2) {
    const float4 x = {__shfl_xor_sync(0xFFFFFFFF, sum.x, other), __shfl_xor_sync(0xFFFFFFFF, sum.y, other),
                      __shfl_xor_sync(0xFFFFFFFF, sum.z, other), __shfl_xor_sync(0xFFFFFFFF, sum.w, other)};
    Add(&sum, x);
  }
  if (lane < kLanes) __stcs(at.output + r * uint64_t{kLanes} + lane, sum);
}

__global__ void CountWrongSums(const int64_t* keys, uint32_t rows, const float* output, uint32_t width,
                               uint32_t* wrong) {
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < uint64_t{rows} * width; i += step) {
    double sum = 0, size = 0;
    for (uint32_t k = 0; k < kBag; ++k) {
      const double x = Element(keys[i / width * kBag + k], static_cast<uint32_t>(i % width));
      sum += x;
      size += fabs(x);
    }
    if (!(fabs(output[i] - sum) <= size * 1e-6)) atomicAdd(wrong, 1u);
  }
}

class Benchmark : FullCache {
 public:
  Benchmark(uint32_t width, uint64_t capacity)
      : FullCache(width, capacity), sectors_(capacity / 2), splits_(kMostRows + 1), words_(2) {
    CHECK(cudaMemset(sectors_.get(), 0, capacity / 2 * sizeof(uint4)));
    CHECK(cudaMemset(words_.get(), 0, 16));
    CHECK(cudaHostAlloc(&result_, sizeof(PooledResult), cudaHostAllocMapped));
    std::memset(result_, 0, sizeof(PooledResult));
    workspace_ = {counters_.get(), words_.get(), nullptr};
    CHECK(cudaHostGetDevicePointer(&workspace_.result, result_, 0));
    std::vector<int64_t> splits(kMostRows + 1);
    for (size_t r = 0; r < splits.size(); ++r) splits[r] = static_cast<int64_t>(r * kBag);
    CHECK(cudaMemcpy(splits_.get(), splits.data(), splits.size() * 8, cudaMemcpyHostToDevice));
  }
  ~Benchmark() { cudaFreeHost(result_); }

  void Run() {
    for (const double zipf : {0.0, 1.05}) {
      PickKeys(zipf);
      for (const uint32_t rows : {128u, 512u, 2'048u, 32'768u, 65'536u}) Measure(rows, zipf);
    }
  }

 private:
  // Of the largest batches there are fewer.
  const int64_t* Keys(int batch, uint32_t rows) const {
    const uint64_t batches = uint64_t{kBatches} * kMostKeys / (uint64_t{rows} * kBag);
    return keys_.get() + static_cast<uint64_t>(batch) % batches * rows * kBag;
  }

  template <int kLanes, int kKeys, int kSectors>
  double ByGroup(uint32_t rows) {
    return Microseconds([&](int i) {
      CeilingByGroup<kLanes, kKeys, kSectors><<<(rows * kLanes + 255) / 256, 256, 0, stream_>>>(CeilingAt(i, rows));
    });
  }
  template <int kLanes, int kKeys, int kSectors>
  double ByWarp(uint32_t rows) {
    return Microseconds([&](int i) {
      CeilingByWarp<kLanes, kKeys, kSectors><<<(rows * 32 + 255) / 256, 256, 0, stream_>>>(CeilingAt(i, rows));
    });
  }
  Ceilings CeilingAt(int batch, uint32_t rows) const {
    return {Keys(batch, rows),
            sectors_.get(),
            num_buckets_ * kCacheWays / 4,
            reinterpret_cast<const float4*>(rows_.get()),
            num_buckets_ * kCacheWays,
            reinterpret_cast<float4*>(output_.get()),
            rows};
  }
  template <int kLanes, int kSectors>
  double Best(uint32_t rows) {
    return std::min({ByGroup<kLanes, 2, kSectors>(rows), ByGroup<kLanes, 4, kSectors>(rows),
                     ByGroup<kLanes, 8, kSectors>(rows), ByWarp<kLanes, (kLanes == 4 ? 2 : 4), kSectors>(rows),
                     ByWarp<kLanes, (kLanes == 4 ? 4 : 8), kSectors>(rows)});
  }
  template <int kSectors>
  double Ceiling(uint32_t rows) {
    return width_ == 16 ? Best<4, kSectors>(rows) : width_ == 64 ? Best<16, kSectors>(rows) : Best<32, kSectors>(rows);
  }

  void Ask(int batch, uint32_t rows, bool whole) {
    PooledPart part;
    part.query = {table_, Keys(batch, rows), rows * kBag, -1.0f, nullptr};
    part.query.table.whole = whole;
    part.rows = rows;
    part.pooling = Pooling::kSum;
    part.row_splits = splits_.get();
    part.output = output_.get();
    CHECK(LaunchPooledQuery(&part, 1, workspace_, ++stamp_, stream_));
  }
  void CheckSums(uint32_t rows) {
    CHECK(cudaMemsetAsync(counters_.get() + 32, 0, 4, stream_));
    CountWrongSums<<<4096, 256, 0, stream_>>>(Keys(kBatches - 1, rows), rows, output_.get(), width_,
                                              counters_.get() + 32);
    uint32_t wrong = 0;
    CHECK(cudaMemcpyAsync(&wrong, counters_.get() + 32, 4, cudaMemcpyDeviceToHost, stream_));
    CHECK(cudaStreamSynchronize(stream_));
    CHECK(cudaMemsetAsync(output_.get(), 0xFF, uint64_t{rows} * width_ * 4, stream_));
    if (wrong == 0 && result_->done == uint64_t{stamp_} << 32) return;
    std::fprintf(stderr, "%u sums of %u rows of width %u are wrong, or the device tells %llx\n", wrong, rows, width_,
                 static_cast<unsigned long long>(result_->done));
    std::exit(1);
  }

  void Measure(uint32_t rows, double zipf) {
    const double ceiling = Ceiling<1>(rows), bucket_ceiling = Ceiling<2>(rows);
    const double told = Microseconds([&](int i) { Ask(i, rows, false); });
    CheckSums(rows);
    const double whole = Microseconds([&](int i) { Ask(i, rows, true); });
    CheckSums(rows);
    std::printf(
        "{\"kind\": \"device_cache_pooled\", \"width\": %u, \"resident_rows\": %zu, \"zipf\": %.2f, \"keys\": %u, "
        "\"output_rows\": %u, \"ceiling_us\": %.2f, \"told_us\": %.2f, \"told_ratio\": %.3f, \"whole_us\": %.2f, "
        "\"whole_ratio\": %.3f, \"bucket_ceiling_us\": %.2f, \"told_gkeys\": %.2f}\n",
        width_, resident_.size(), zipf, rows * kBag, rows, ceiling, told, ceiling / told, whole, ceiling / whole,
        bucket_ceiling, rows * kBag / told * 1e-3);
  }

  Array<uint4> sectors_;
  Array<int64_t> splits_;
  Array<uint64_t> words_;
  PooledResult* result_ = nullptr;
  PooledWorkspace workspace_;
  uint32_t stamp_ = 0;
};

}  // namespace
}  // namespace hps::cuda

int main(int argc, char** argv) {
  return hps::cuda::RunEachWidth<hps::cuda::Benchmark>("device_pooling_benchmark", argc, argv);
}
