// What it costs a query of a table that is held whole that its rows lie elsewhere or are smaller, beside rows of
// float32 in device memory on the same GPU in the same run. Each line of output is one measurement in JSON; rows are
// checked.
//
//   float32          in device memory, as they are
//   int8             8-bit values with a scale (fp8_quant)
//   pinned           float32 in pinned memory of the host (enable_pagelock)
//   shared N of 7    N ways of a bucket in device memory, the others in pinned memory, rows change places (uvm)
//
// Keys are uniform over the rows, or follow Zipf's law with exponent 1.05; those of `shared` are asked and exchanged
// for a while before. Times are medians of five rounds of 32 batches.
//
// Usage: device_rows_benchmark [COMMIT]

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>

#include "benchmarks/native/full_cache.cuh"
#include "cuda_kernels/device_cache.h"

namespace hps::cuda {
namespace {

class Rows : FullCache {
 public:
  Rows(uint32_t width, uint64_t capacity, const RowPlaces& places) : FullCache(width, capacity, places) {
    table_.whole = true;
  }

  // Microseconds of a query, by exponent and keys.
  std::map<std::pair<double, uint32_t>, double> Measure() {
    std::map<std::pair<double, uint32_t>, double> times;
    for (const double zipf : {0.0, 1.05}) {
      PickKeys(zipf);
      if (table_.device_ways < kCacheWays) Settle();
      for (const uint32_t count : {1u << 12, 1u << 16, 1u << 19}) {
        times[{zipf, count}] = Microseconds([&](int i) { Ask(i, count); });
        CheckRows(count);
      }
    }
    return times;
  }

 private:
  void Ask(int batch, uint32_t count) {
    const QueryPart part{table_, Keys(batch, count), count, -1.0f, output_.get()};
    CHECK(LaunchUntoldQuery(&part, 1, stream_));
  }
  void Settle() {
    for (int round = 0; round < 4; ++round) {
      for (int i = 0; i < kBatches; ++i) {
        Ask(i, 1 << 18);
        if (i % 4 == 3) CHECK(LaunchExchange(table_, 0, num_buckets_, stream_));
      }
    }
    CHECK(cudaStreamSynchronize(stream_));
  }
};

class Benchmark {
 public:
  Benchmark(uint32_t width, uint64_t capacity) : width_(width), capacity_(capacity) {}

  void Run() const {
    const std::pair<const char*, RowPlaces> kinds[] = {
        {"float32", {}},
        {"int8", {.format = RowFormat::kInt8}},
        {"pinned", {.pinned = true}},
        {"shared 1 of 7", {.device_ways = 1}},
        {"shared 4 of 7", {.device_ways = 4}},
    };
    std::map<std::pair<double, uint32_t>, double> plain;
    for (const auto& [name, places] : kinds) {
      const auto times = Rows(width_, capacity_, places).Measure();
      if (plain.empty()) plain = times;
      for (const auto& [what, time] : times) {
        std::printf(
            "{\"kind\": \"device_cache_rows\", \"rows\": \"%s\", \"width\": %u, \"zipf\": %.2f, \"keys\": %u, "
            "\"us\": %.2f, \"times_float32\": %.2f, \"row_gb_per_s\": %.1f}\n",
            name, width_, what.first, what.second, time, time / plain[what], what.second * width_ * 4e-3 / time);
      }
    }
  }

 private:
  const uint32_t width_;
  const uint64_t capacity_;
};

}  // namespace
}  // namespace hps::cuda

int main(int argc, char** argv) {
  return hps::cuda::RunEachWidth<hps::cuda::Benchmark>("device_rows_benchmark", argc, argv,
                                                       {{16, 4'000'000}, {64, 1'000'000}, {128, 500'000}});
}
