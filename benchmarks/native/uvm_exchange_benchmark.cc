// What part of the reads of a uvm cache meets a row in memory of the device, simulated on the host by the kernels' own
// functions (cuda_kernels/cache_bucket.h): marks, exchanges in turn, ageing; for each number of ways on the device.
// "ideal" is that the rows with the largest probability lie there, whatever their buckets; "as_placed" that nothing is
// exchanged. link_rows: rows that exchanges move over the link, both ways, for each read. Workloads:
//   zipf   Zipf 1.05, after a warm-up of eight reads a row
//   shift  the hot keys change at once: the next four reads a row; "shifted": the four behind them
//   flat   uniform keys
// Each line of output is JSON: first the run, then one a workload and number of ways.
// Usage: uvm_exchange_benchmark [table_rows]     (default 1000000)

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "benchmarks/native/run_record.h"
#include "cc/cache/static_placement.h"

namespace hps::cuda {
namespace {

constexpr uint64_t kStep = 65'536;  // keys between exchanges: cc/cache/device_cache.cc

class UvmCache {
 public:
  UvmCache(const StaticPlacement& placement, std::vector<CacheBucket> buckets, uint64_t rows, int device_ways)
      : buckets_(std::move(buckets)), device_ways_(device_ways), bucket_of_(rows) {
    for (uint64_t key = 0; key < rows; ++key) {
      bucket_of_[key] = static_cast<uint32_t>(*placement.SlotOf(static_cast<Key>(key)) / kCacheWays);
    }
  }
  void Read(uint64_t key) {
    CacheBucket& bucket = buckets_[bucket_of_[key]];
    const auto* const found = std::find(bucket.keys, bucket.keys + kCacheWays, static_cast<Key>(key));
    const auto way = static_cast<int>(found - bucket.keys);
    bucket.state |= StateNextRef(bucket.state, way);
    ++reads_;
    near_ += way < device_ways_;
    if (reads_ % kStep == 0) Exchange(kStep / kCacheWays + 1);
  }
  void Exchange(uint64_t count) {
    for (count = std::min(count, buckets_.size()); count > 0; --count, next_ = (next_ + 1) % buckets_.size()) {
      CacheBucket& bucket = buckets_[next_];
      int near = 0, far = 0;
      while (ChooseExchange(bucket.state, device_ways_, &near, &far)) {
        link_rows_ += (bucket.state & StateHolds(near)) != 0 ? 2 : 1;
        std::swap(bucket.keys[near], bucket.keys[far]);
        bucket.state = StateExchanged(bucket.state, near, far);
      }
      bucket.state = StateAged(bucket.state);
    }
  }
  void Report(const char* workload, double ideal, double as_placed) {
    std::printf(
        "{\"kind\": \"uvm\", \"workload\": \"%s\", \"device_ways\": %d, \"on_device\": %.4f, \"ideal\": %.4f, "
        "\"as_placed\": %.4f, \"link_rows\": %.4f}\n",
        workload, device_ways_, static_cast<double>(near_) / static_cast<double>(reads_), ideal, as_placed,
        static_cast<double>(link_rows_) / static_cast<double>(reads_));
    Forget();
  }
  void Forget() { reads_ = near_ = link_rows_ = 0; }

 private:
  std::vector<CacheBucket> buckets_;
  const int device_ways_;
  std::vector<uint32_t> bucket_of_;
  uint64_t next_ = 0;
  uint64_t reads_ = 0, near_ = 0, link_rows_ = 0;
};

// Ranks by their probability, which is the larger the lower the rank.
class Ranks {
 public:
  Ranks(uint64_t rows, double exponent) : sums_(rows) {
    double sum = 0;
    for (uint64_t rank = 0; rank < rows; ++rank) {
      sums_[rank] = sum += std::pow(static_cast<double>(rank + 1), -exponent);
    }
  }
  uint64_t Draw(std::mt19937_64& random) const {
    const double at = std::uniform_real_distribution<double>(0, sums_.back())(random);
    return static_cast<uint64_t>(std::upper_bound(sums_.begin(), sums_.end() - 1, at) - sums_.begin());
  }
  double First(uint64_t count) const { return sums_[std::min<uint64_t>(count, sums_.size()) - 1] / sums_.back(); }

 private:
  std::vector<double> sums_;
};

int Main(uint64_t rows) {
  std::printf(
      "{\"kind\": \"run\", \"date\": \"%s\", \"command\": \"uvm_exchange_benchmark %llu\", \"commit\": \"%s\", "
      "\"machine\": {\"cpu\": \"%s\"}, \"note\": \"a simulation: no times\", \"table_rows\": %llu}\n",
      UtcNow().c_str(), static_cast<unsigned long long>(rows), Commit().c_str(), CpuName().c_str(),
      static_cast<unsigned long long>(rows));
  StaticPlacement placement("table", StaticPlacement::BucketsFor(rows));
  std::vector<Key> keys(rows);
  std::iota(keys.begin(), keys.end(), 0);
  if (const Status placed = placement.Add(keys); !placed.ok()) {
    std::fprintf(stderr, "%s\n", placed.ToString().c_str());
    return 1;
  }
  const std::vector<CacheBucket> buckets = placement.Finish();
  std::mt19937_64 random(1);
  std::shuffle(keys.begin(), keys.end(), random);  // by rank
  std::vector<Key> others = keys;
  std::shuffle(others.begin(), others.end(), random);
  const Ranks zipf(rows, 1.05), flat(rows, 0.0);
  for (int ways = 1; ways < kCacheWays; ++ways) {
    const double part = static_cast<double>(ways) / kCacheWays;
    const auto places = static_cast<uint64_t>(static_cast<double>(placement.slots()) * part);
    // The lowest ways are filled first.
    uint64_t held = 0;
    for (const CacheBucket& bucket : buckets) {
      for (int way = 0; way < ways; ++way) held += (bucket.state & StateHolds(way)) != 0;
    }
    const double as_placed = static_cast<double>(held) / static_cast<double>(rows);
    const auto run = [&](UvmCache& cache, const Ranks& ranks, const std::vector<Key>& hot, uint64_t reads) {
      for (uint64_t i = 0; i < reads; ++i) cache.Read(static_cast<uint64_t>(hot[ranks.Draw(random)]));
    };
    UvmCache cache(placement, buckets, rows, ways);
    run(cache, zipf, keys, 8 * rows);
    cache.Forget();
    run(cache, zipf, keys, 4 * rows);
    cache.Report("zipf", zipf.First(places), as_placed);
    run(cache, zipf, others, 4 * rows);
    cache.Report("shift", zipf.First(places), as_placed);
    run(cache, zipf, others, 4 * rows);
    cache.Report("shifted", zipf.First(places), as_placed);
    run(cache, flat, keys, 4 * rows);
    cache.Forget();
    run(cache, flat, keys, 4 * rows);
    cache.Report("flat", flat.First(places), as_placed);
  }
  return 0;
}

}  // namespace
}  // namespace hps::cuda

int main(int argc, char** argv) {
  const uint64_t rows = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1'000'000;
  if (rows < 1000 || rows > 4'000'000'000) {
    std::fprintf(stderr, "a table of 1000 to 4000000000 rows\n");
    return 1;
  }
  return hps::cuda::Main(rows);
}
