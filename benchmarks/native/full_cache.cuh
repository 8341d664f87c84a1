// What the benchmarks of the device cache share: a cache on the first GPU that is full, keys of its rows, and the time
// of launches. Each row tells its key, so that answers can be checked.

#ifndef HPS_BENCHMARKS_FULL_CACHE_CUH_
#define HPS_BENCHMARKS_FULL_CACHE_CUH_

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <utility>
#include <vector>

#include "benchmarks/native/run_record.h"
#include "cuda_kernels/device_cache.h"

namespace hps::cuda {

inline constexpr int kBatches = 32;
inline constexpr int kRounds = 5;
inline constexpr uint32_t kMostKeys = 1 << 20;

inline void Check(int error, int line) {
  if (error == 0) return;
  std::fprintf(stderr, "line %d: %s\n", line, cudaGetErrorString(static_cast<cudaError_t>(error)));
  std::exit(1);
}
#define CHECK(call) Check(static_cast<int>(call), __LINE__)

template <typename T>
class Array {
 public:
  explicit Array(size_t count) { CHECK(cudaMalloc(&data_, count * sizeof(T))); }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data_); }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

// Memory of the device, or pinned memory of the host as the device sees it.
class RowMemory {
 public:
  RowMemory(size_t bytes, bool pinned) : pinned_(pinned) {
    if (bytes == 0) return;
    if (!pinned) {
      CHECK(cudaMalloc(&data_, bytes));
    } else {
      CHECK(cudaHostAlloc(&host_, bytes, cudaHostAllocMapped));
      CHECK(cudaHostGetDevicePointer(&data_, host_, 0));
    }
  }
  RowMemory(const RowMemory&) = delete;
  ~RowMemory() { pinned_ ? cudaFreeHost(host_) : cudaFree(data_); }
  void* get() const { return data_; }

 private:
  const bool pinned_;
  void* host_ = nullptr;
  void* data_ = nullptr;
};

// How the rows of a cache lie.
struct RowPlaces {
  RowFormat format = RowFormat::kFloat32;
  uint32_t device_ways = kCacheWays;  // the others lie in pinned memory
  bool pinned = false;                // these too
};

static __global__ void MakeKeys(int64_t* keys, uint64_t first, uint32_t count) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) keys[i] = static_cast<int64_t>(CacheHash(static_cast<int64_t>(first + i)));
}
__host__ __device__ inline float Element(int64_t key, uint32_t column) {
  return static_cast<float>(CacheHash(key + column * 0x9E3779B97F4A7C15) >> 40);
}
static __global__ void MakeRows(const int64_t* keys, uint32_t count, float* rows, uint32_t width) {
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < uint64_t{count} * width; i += step) {
    rows[i] = Element(keys[i / width], static_cast<uint32_t>(i % width));
  }
}
static __global__ void CountWrong(const int64_t* keys, uint32_t count, const float* rows, uint32_t width,
                                  float tolerance, uint32_t* wrong) {
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < uint64_t{count} * width; i += step) {
    const float error = fabsf(rows[i] - Element(keys[i / width], static_cast<uint32_t>(i % width)));
    if (!(error <= tolerance)) atomicAdd(wrong, 1u);
  }
}

class FullCache {
 public:
  FullCache(uint32_t width, uint64_t capacity, const RowPlaces& places = {})
      : width_(width),
        num_buckets_(capacity / kCacheWays),
        buckets_(num_buckets_),
        rows_(num_buckets_ * places.device_ways * StoredRowBytes(places.format, width * 4), places.pinned),
        other_rows_(num_buckets_ * (kCacheWays - places.device_ways) * StoredRowBytes(places.format, width * 4), true),
        activity_(1),
        keys_(uint64_t{kBatches} * kMostKeys),
        output_(uint64_t{kMostKeys} * width),
        counters_(64) {
    CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CHECK(cudaMemset(counters_.get(), 0, 256));
    table_ = {buckets_.get(),  num_buckets_,  rows_.get(),        width * 4,        false,
              activity_.get(), places.format, places.device_ways, other_rows_.get()};
    Fill();
  }
  ~FullCache() { cudaStreamDestroy(stream_); }

 protected:
  // Of an element as the format keeps it: Element() is below 2^24.
  float Tolerance() const { return table_.format == RowFormat::kFloat32 ? 0.0f : 0x1p24f / 250.0f; }

  void PickKeys(double zipf) {
    std::mt19937_64 random(7);
    std::vector<int64_t> picked(uint64_t{kBatches} * kMostKeys);
    const auto rows = static_cast<double>(resident_.size());
    for (int64_t& key : picked) {
      const double u = static_cast<double>(random() >> 11) * 0x1p-53;
      // Zipf's law, by the inverse of its continuous form.
      const double rank = zipf == 0 ? u * rows : std::pow(1 + u * (std::pow(rows, 1 - zipf) - 1), 1 / (1 - zipf)) - 1;
      // Neighbours in rank are no neighbours in memory.
      const size_t place = std::min(resident_.size() - 1, static_cast<size_t>(rank));
      key = resident_[static_cast<size_t>(place * 1'000'000'007ull % resident_.size())];
    }
    CHECK(cudaMemcpy(keys_.get(), picked.data(), picked.size() * 8, cudaMemcpyHostToDevice));
  }

  const int64_t* Keys(int batch, uint32_t count) const { return keys_.get() + uint64_t(batch) * count; }

  // The rows that a batch was answered with must be right; nothing is left of them.
  void CheckRows(uint32_t count, int batch = kBatches - 1) {
    CHECK(cudaMemsetAsync(counters_.get() + 32, 0, 4, stream_));
    CountWrong<<<4096, 256, 0, stream_>>>(Keys(batch, count), count, output_.get(), width_, Tolerance(),
                                          counters_.get() + 32);
    uint32_t wrong = 0;
    CHECK(cudaMemcpyAsync(&wrong, counters_.get() + 32, 4, cudaMemcpyDeviceToHost, stream_));
    CHECK(cudaStreamSynchronize(stream_));
    CHECK(cudaMemsetAsync(output_.get(), 0xFF, uint64_t{count} * width_ * 4, stream_));
    if (wrong == 0) return;
    std::fprintf(stderr, "%u elements of %u rows of width %u are wrong\n", wrong, count, width_);
    std::exit(1);
  }

  double Microseconds(const std::function<void(int)>& launch) {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < kBatches; ++i) launch(i);
    for (int round = 0; round < kRounds; ++round) {
      CHECK(cudaEventRecord(begin, stream_));
      for (int i = 0; i < kBatches; ++i) launch(i);
      CHECK(cudaEventRecord(end, stream_));
      CHECK(cudaEventSynchronize(end));
      float milliseconds = 0;
      CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
      times.push_back(milliseconds);
    }
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    std::sort(times.begin(), times.end());
    return times[kRounds / 2] * 1e3 / kBatches;
  }

  const uint32_t width_;
  const uint64_t num_buckets_;
  Array<CacheBucket> buckets_;
  const RowMemory rows_, other_rows_;
  Array<CacheActivity> activity_;
  Array<int64_t> keys_;
  Array<float> output_;
  Array<uint32_t> counters_;  // from 32 on free for use
  CacheTable table_;
  cudaStream_t stream_ = nullptr;
  std::vector<int64_t> resident_;

 private:
  // Half as many rows again as there is room for: every bucket is full then, or nearly.
  void Fill() {
    CHECK(LaunchClear(table_, stream_));
    const uint64_t rows = num_buckets_ * kCacheWays * 3 / 2;
    for (uint64_t first = 0; first < rows; first += kMostKeys) {
      const auto count = static_cast<uint32_t>(std::min<uint64_t>(kMostKeys, rows - first));
      MakeKeys<<<kMostKeys / 256, 256, 0, stream_>>>(keys_.get(), first, count);
      MakeRows<<<4096, 256, 0, stream_>>>(keys_.get(), count, output_.get(), width_);
      CHECK(LaunchInsert(table_, keys_.get(), output_.get(), count, false, nullptr, stream_));
    }
    constexpr uint64_t kPiece = uint64_t{kBatches} * kMostKeys / kCacheWays;
    for (uint64_t first = 0; first < num_buckets_; first += kPiece) {
      CHECK(cudaMemsetAsync(counters_.get() + 32, 0, 4, stream_));
      CHECK(LaunchDump(table_, first, std::min(first + kPiece, num_buckets_), keys_.get(), counters_.get() + 32,
                       stream_));
      uint32_t found = 0;
      CHECK(cudaMemcpyAsync(&found, counters_.get() + 32, 4, cudaMemcpyDeviceToHost, stream_));
      CHECK(cudaStreamSynchronize(stream_));
      const size_t before = resident_.size();
      resident_.resize(before + found);
      CHECK(cudaMemcpy(resident_.data() + before, keys_.get(), found * 8ull, cudaMemcpyDeviceToHost));
    }
  }
};

// Runs Benchmark(width, resident rows).Run() for each width that is measured, behind the line of the run. The first
// argument is the commit, where git cannot tell it.
template <typename Benchmark>
int RunEachWidth(const char* command, int argc, char** argv,
                 const std::vector<std::pair<uint32_t, uint64_t>>& shapes = {
                     {16, 40'000'000}, {64, 10'000'000}, {128, 5'000'000}}) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf(
      "{\"kind\": \"run\", \"date\": \"%s\", \"command\": \"%s\", \"commit\": \"%s\", \"machine\": \"%s\", "
      "\"cuda\": \"%d.%d\"}\n",
      UtcNow().c_str(), command, argc > 1 ? argv[1] : Commit().c_str(), device.name, CUDART_VERSION / 1000,
      CUDART_VERSION % 1000 / 10);
  for (const auto& [width, rows] : shapes) Benchmark(width, rows).Run();
  return 0;
}

}  // namespace hps::cuda

#endif  // HPS_BENCHMARKS_FULL_CACHE_CUH_
