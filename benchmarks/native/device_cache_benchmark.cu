// How fast the device cache answers when every key is resident, beside the ceiling of a hash lookup on the same GPU in
// the same run: a kernel that reads each key, hashes it, reads one random sector of 32 bytes, and copies the row that
// it leads to (best of four shapes). Each line of output is one measurement in JSON; all rows are checked.
//
//   told      LaunchQuery: the host learns what is missing (dynamic caches)
//   telling_ceiling   the ceiling whose last block writes a word to the host, as `told` does
//   whole     LaunchUntoldQuery over a table that gives up no rows (static caches)
//   wall_us   from the launch until the host knows that nothing is missing, median and p99 of 2,000 calls
//   beside    the same for batches of 65,536 keys while another stream updates rows, at a tenth of the memory's rate
//
// Keys are uniform over the resident rows, or follow Zipf's law with exponent 1.05. Times are medians of five rounds of
// 32 batches of different keys; the resident rows are those of the issue's table where the GPU has room for them.
//
// Usage: device_cache_benchmark [COMMIT]

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "benchmarks/native/full_cache.cuh"
#include "cuda_kernels/device_cache.h"

namespace hps::cuda {
namespace {

constexpr int kCalls = 2200;  // of which the first 200 are not timed

// kLanes threads of 16 bytes a row, kKeys rows of each group of threads at once.
template <int kLanes, int kKeys>
__global__ void __launch_bounds__(256)
    Ceiling(const int64_t* keys, const uint4* sectors, uint64_t num_sectors, const float4* rows, uint64_t num_rows,
            float4* output, uint32_t count, uint32_t* blocks, volatile uint64_t* told) {
  const int lane = threadIdx.x % kLanes;
  const uint64_t first = (uint64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kLanes * kKeys;
  uint64_t place[kKeys];
  uint4 sector[kKeys];
  float4 value[kKeys];
#pragma unroll
  for (int k = 0; k < kKeys; ++k) place[k] = first + k < count ? CacheHash(keys[first + k]) : 0;
#pragma unroll
  for (int k = 0; k < kKeys; ++k) sector[k] = __ldg(sectors + __umul64hi(place[k], num_sectors) * 2 + (lane & 1));
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {  // the sectors hold zeros; the row's place has to wait for them all the same
    place[k] = __umul64hi(CacheHash(static_cast<int64_t>(place[k] + sector[k].x)), num_rows);
  }
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
    if (first + k < count) value[k] = __ldcs(rows + place[k] * kLanes + lane);
  }
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
    if (first + k < count) __stcs(output + (first + k) * kLanes + lane, value[k]);
  }
  if (told == nullptr) return;
  __syncthreads();
  if (threadIdx.x != 0 || atomicAdd(blocks, 1u) != gridDim.x - 1) return;
  *blocks = 0;
  *told = 1;
}

__global__ void Nothing() {}

class Benchmark : FullCache {
 public:
  Benchmark(uint32_t width, uint64_t capacity)
      : FullCache(width, capacity), sectors_(capacity / 2), first_wins_(2 * kMostKeys), lists_(3 * kMostKeys) {
    CHECK(cudaMemset(first_wins_.get(), 0, 2 * kMostKeys * sizeof(uint64_t)));
    CHECK(cudaMemset(sectors_.get(), 0, capacity / 2 * sizeof(uint4)));
    CHECK(cudaHostAlloc(&missing_, kMostKeys * sizeof(MissingKey), cudaHostAllocMapped));
    CHECK(cudaHostAlloc(&result_, sizeof(QueryResult), cudaHostAllocMapped));
    std::memset(result_, 0, sizeof(QueryResult));
    workspace_ = {first_wins_.get(),
                  2 * kMostKeys,
                  lists_.get(),
                  lists_.get() + kMostKeys,
                  lists_.get() + 2 * kMostKeys,
                  counters_.get(),
                  &launched_,
                  nullptr,
                  nullptr,
                  kMostKeys};
    CHECK(cudaHostGetDevicePointer(&workspace_.missing, missing_, 0));
    CHECK(cudaHostGetDevicePointer(&workspace_.result, result_, 0));
  }
  ~Benchmark() {
    cudaFreeHost(missing_);
    cudaFreeHost(result_);
  }

  void Run() {
    MeasureBounds();
    for (const double zipf : {0.0, 1.05}) {
      PickKeys(zipf);
      for (const uint32_t count : {1u << 10, 1u << 14, 1u << 16, 1u << 20}) Measure(count, zipf);
      if (zipf == 0) MeasureBesideWriter(0.1);
    }
  }

 private:
  template <int kLanes, int kKeys>
  double CeilingOf(uint32_t count, bool tells) {
    const uint64_t threads = (uint64_t{count} + kKeys - 1) / kKeys * kLanes;
    return Microseconds([&](int i) {
      Ceiling<kLanes, kKeys><<<static_cast<unsigned>((threads + 255) / 256), 256, 0, stream_>>>(
          Keys(i, count), sectors_.get(), num_buckets_ * kCacheWays / 4, reinterpret_cast<const float4*>(rows_.get()),
          num_buckets_ * kCacheWays, reinterpret_cast<float4*>(output_.get()), count, counters_.get() + 33,
          tells ? &workspace_.result->done : nullptr);
    });
  }
  template <int kLanes>
  double CeilingOf(uint32_t count, bool tells) {
    return std::min({CeilingOf<kLanes, 1>(count, tells), CeilingOf<kLanes, 2>(count, tells),
                     CeilingOf<kLanes, 4>(count, tells), CeilingOf<kLanes, 8>(count, tells)});
  }
  double CeilingOf(uint32_t count, bool tells) {
    return width_ == 16   ? CeilingOf<4>(count, tells)
           : width_ == 64 ? CeilingOf<16>(count, tells)
                          : CeilingOf<32>(count, tells);
  }

  QueryPart Part(int batch, uint32_t count, bool whole) const {
    CacheTable table = table_;
    table.whole = whole;
    return {table, Keys(batch, count), count, -1.0f, output_.get()};
  }
  void Told(int batch, uint32_t count) {
    const QueryPart part = Part(batch, count, false);
    CHECK(LaunchQuery(&part, 1, workspace_, ++stamp_, stream_));
  }
  void Whole(int batch, uint32_t count) {
    const QueryPart part = Part(batch, count, true);
    CHECK(LaunchUntoldQuery(&part, 1, stream_));
  }

  // Beside updates of resident rows that read and write `share` of what a copy of the same memory moves.
  void MeasureBesideWriter(double share) {
    constexpr uint32_t kCount = 1 << 16;
    const std::vector<double> quiet = WallMicroseconds(kCount);
    cudaStream_t stream;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const Array<float> rows(uint64_t{kCount} * width_);
    const int64_t* const keys = Keys(kBatches / 2, kMostKeys);
    MakeRows<<<4096, 256, 0, stream>>>(keys, kCount, rows.get(), width_);
    CHECK(cudaStreamSynchronize(stream));
    const double batch_bytes = 2.0 * kCount * width_ * sizeof(float);
    const double pause = batch_bytes / (share * CopyBytesPerMicrosecond());
    std::atomic<bool> done{false};
    std::atomic<uint64_t> batches{0};
    std::thread writer([&] {
      CHECK(cudaSetDevice(0));
      for (double next = Now(); !done; next = std::max(next + pause, Now() - pause)) {
        while (Now() < next) {
        }
        CHECK(LaunchUpdate(table_, keys, rows.get(), kCount, stream));
        if (++batches % 4 == 0) CHECK(cudaStreamSynchronize(stream));  // no backlog
      }
      CHECK(cudaStreamSynchronize(stream));
    });
    const double begin = Now();
    const std::vector<double> beside = WallMicroseconds(kCount);
    const double bytes_per_us = static_cast<double>(batches) * batch_bytes / (Now() - begin);
    done = true;
    writer.join();
    CHECK(cudaStreamDestroy(stream));
    CheckRows(kCount, (kCalls - 1) % kBatches);
    std::printf(
        "{\"kind\": \"device_cache_beside_writer\", \"width\": %u, \"keys\": %u, \"quiet_us\": %.1f, "
        "\"quiet_p99_us\": %.1f, \"beside_us\": %.1f, \"beside_p99_us\": %.1f, \"p99_ratio\": %.2f, "
        "\"updates_of_copy_rate\": %.3f}\n",
        width_, kCount, Quantile(quiet, 50), Quantile(quiet, 99), Quantile(beside, 50), Quantile(beside, 99),
        Quantile(beside, 99) / Quantile(quiet, 99), bytes_per_us / CopyBytesPerMicrosecond());
  }
  static double Quantile(const std::vector<double>& sorted, size_t percent) {
    return sorted[sorted.size() * percent / 100];
  }
  // What no query can beat: the memory's rate, and a kernel that does nothing.
  void MeasureBounds() {
    const double empty = Microseconds([&](int) { Nothing<<<1, 32, 0, stream_>>>(); });
    std::printf("{\"kind\": \"device_bounds\", \"width\": %u, \"copy_gb_per_s\": %.0f, \"empty_us\": %.2f}\n", width_,
                CopyBytesPerMicrosecond() * 1e-3, empty);
  }

  // Read and written.
  double CopyBytesPerMicrosecond() {
    if (copy_rate_ != 0) return copy_rate_;
    constexpr size_t kBytes = 512 << 20;
    const Array<char> from(kBytes), to(kBytes);
    const double time = Microseconds(
        [&](int) { CHECK(cudaMemcpyAsync(to.get(), from.get(), kBytes, cudaMemcpyDeviceToDevice, stream_)); });
    return copy_rate_ = 2.0 * kBytes / time;
  }

  std::vector<double> WallMicroseconds(uint32_t count) {
    std::vector<double> times;
    const volatile uint64_t* done = &result_->done;
    for (int i = 0; i < kCalls; ++i) {
      const auto begin = Now();
      Told(i % kBatches, count);
      while (*done >> 32 != stamp_) {
      }
      if (i >= 200) times.push_back(Now() - begin);
      if (static_cast<uint32_t>(*done) != 0) Check(cudaErrorUnknown, __LINE__);
      CHECK(cudaStreamSynchronize(stream_));
    }
    std::sort(times.begin(), times.end());
    return times;
  }
  static double Now() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) * 1e-3;
  }

  void Measure(uint32_t count, double zipf) {
    const double ceiling = CeilingOf(count, false), telling_ceiling = CeilingOf(count, true);
    const double told = Microseconds([&](int i) { Told(i, count); });
    CheckRows(count);
    const double whole = Microseconds([&](int i) { Whole(i, count); });
    CheckRows(count);
    std::printf(
        "{\"kind\": \"device_cache_hits\", \"width\": %u, \"resident_rows\": %zu, \"zipf\": %.2f, \"keys\": %u, "
        "\"ceiling_us\": %.2f, \"telling_ceiling_us\": %.2f, \"told_us\": %.2f, \"told_ratio\": %.3f, "
        "\"told_of_telling\": %.3f, \"whole_us\": %.2f, \"whole_ratio\": %.3f",
        width_, resident_.size(), zipf, count, ceiling, telling_ceiling, told, ceiling / told, telling_ceiling / told,
        whole, ceiling / whole);
    if (zipf == 0 && count <= 1 << 14) {
      const std::vector<double> times = WallMicroseconds(count);
      std::printf(", \"wall_us\": %.1f, \"wall_p99_us\": %.1f", times[times.size() / 2],
                  times[times.size() * 99 / 100]);
    }
    std::puts("}");
  }

  Array<uint4> sectors_;
  Array<uint64_t> first_wins_;
  Array<uint32_t> lists_;
  MissingKey* missing_ = nullptr;
  QueryResult* result_ = nullptr;
  QueryWorkspace workspace_;
  uint32_t launched_ = 0;
  uint32_t stamp_ = 0;
  double copy_rate_ = 0;
};

}  // namespace
}  // namespace hps::cuda

int main(int argc, char** argv) {
  return hps::cuda::RunEachWidth<hps::cuda::Benchmark>("device_cache_benchmark", argc, argv);
}
