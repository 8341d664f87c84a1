// What the native benchmarks share: ids, a clock of processor time, and bodies that take turns.

#ifndef HPS_BENCHMARKS_NATIVE_HASH_MAP_BENCHMARK_H_
#define HPS_BENCHMARKS_NATIVE_HASH_MAP_BENCHMARK_H_

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "hps/table_store.h"

namespace hps {

inline constexpr size_t kBatch = 65'536;
inline constexpr int kBatches = 16;  // different ids, so that the caches do not learn one batch
inline constexpr int kRounds = 7;    // the best of

inline void Check(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

// The processor time of the calling thread: other programs on the machine do not count.
inline double ThreadSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// Ids in [0, rows), by rank of popularity scattered over the table.
inline std::vector<Key> DrawIds(size_t rows, bool zipf, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Key> ids(kBatch * kBatches);
  if (!zipf) {
    for (Key& id : ids) id = static_cast<Key>(random() % rows);
    return ids;
  }
  constexpr double kExponent = 1.05;  // inverse of the continuous distribution function
  const double top = 1 - std::pow(static_cast<double>(rows), 1 - kExponent);
  std::uniform_real_distribution<double> uniform(0, 1);
  for (Key& id : ids) {
    const double rank = std::pow(1 - uniform(random) * top, 1 / (1 - kExponent));
    id = static_cast<Key>((static_cast<uint64_t>(rank) * 0x9E3779B97F4A7C15ull) % rows);
  }
  return ids;
}

using BatchBody = std::function<void(int thread, int batch)>;

// Runs each body over all batches on each thread, the bodies taking turns; returns million ids a second of processor
// time and thread, the best round of each.
inline std::vector<double> MillionIdsPerSecond(int threads, const std::vector<BatchBody>& bodies) {
  std::vector<double> best(bodies.size(), 1e9);
  for (int round = 0; round < kRounds; ++round) {
    for (size_t body = 0; body < bodies.size(); ++body) {
      std::vector<double> seconds(threads);
      const auto run = [&](int thread) {
        const double start = ThreadSeconds();
        for (int batch = 0; batch < kBatches; ++batch) bodies[body](thread, (batch + thread * 7) % kBatches);
        seconds[thread] = ThreadSeconds() - start;
      };
      std::vector<std::thread> others;
      for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
      run(0);
      for (std::thread& other : others) other.join();
      best[body] = std::min(best[body], *std::max_element(seconds.begin(), seconds.end()));
    }
  }
  for (double& rate : best) rate = static_cast<double>(kBatch) * kBatches / rate / 1e6;
  return best;
}

// Keys from all over 64 bits, or the ids themselves.
inline Key KeyOf(uint64_t id, bool dense) {
  return static_cast<Key>(dense ? id : (id * 0x9E3779B97F4A7C15ull) | (uint64_t{1} << 63));
}

}  // namespace hps

#endif  // HPS_BENCHMARKS_NATIVE_HASH_MAP_BENCHMARK_H_
