// What the device cache keeps: hit rates of its rule of replacement beside LRU and other rules, simulated on the host.
//
// A cache with a tenth of the table's rows is asked in batches, as the device is: marks are set while a batch is looked
// up, its missing keys are inserted behind it, each once. "present" is the rule of cuda_kernels/cache_bucket.h, by its
// own functions; "lru" is exact and fully associative, of equal size, and fed in the same batches. hit_writes is the
// part of the hits that write a mark. Workloads:
//   zipf   Zipf 1.05; counted after a warm-up of five times the cache's rows
//   scan   the same, and every fourth key is one that comes once; the others are counted
//   shift  the hot keys change at once; counted are the next `rows` of the cache and, as "shifted", what follows
//   flat   uniform keys
// Each line of output is JSON: first the run, then one a workload, batch and rule.
// Usage: cache_replacement_benchmark [table_rows]     (default 1000000)

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <list>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "benchmarks/native/run_record.h"
#include "cuda_kernels/cache_bucket.h"

namespace hps::cuda {
namespace {

// A rule of replacement of one bucket. Choose gives the way for a new key; free ways have been used up.
struct Rule {
  const char* name;
  std::function<uint64_t(uint64_t state, int way)> mark;  // the state after a hit
  std::function<int(uint64_t* state)> choose;
  std::function<uint64_t(uint64_t state, int way)> arrive;  // the state after a new key has come
};

uint64_t Bits(uint64_t state, int way) { return (state >> (2 * way)) & 3; }
uint64_t WithBits(uint64_t state, int way, uint64_t bits) {
  return (state & ~(uint64_t{3} << (2 * way))) | (bits << (2 * way));
}
int Hand(uint64_t state) { return static_cast<int>((state >> 23) % kCacheWays); }

uint64_t MarkPresent(uint64_t state, int way) { return state | StateNextRef(state, way); }
uint64_t ArriveUnread(uint64_t state, int way) { return WithBits(state, way, 0); }
uint64_t ArriveReadOnce(uint64_t state, int way) { return WithBits(state, way, 1); }
uint64_t MarkOnce(uint64_t state, int way) { return Bits(state, way) == 0 ? WithBits(state, way, 1) : state; }
uint64_t MarkCount(uint64_t state, int way) {
  return Bits(state, way) < 3 ? WithBits(state, way, Bits(state, way) + 1) : state;
}
// The way with the lowest count; all are lowered until that is 0.
int ChooseLowest(uint64_t* state) {
  for (;;) {
    for (int i = 0; i < kCacheWays; ++i) {
      const int way = (Hand(*state) + i) % kCacheWays;
      if (Bits(*state, way) == 0) return way;
    }
    for (int way = 0; way < kCacheWays; ++way) *state = WithBits(*state, way, Bits(*state, way) - 1);
  }
}
// A hand goes round and lowers what it passes.
int ChooseByHand(uint64_t* state) {
  for (int i = 0;; ++i) {
    const int way = (Hand(*state) + i) % kCacheWays;
    if (Bits(*state, way) == 0) return way;
    *state = WithBits(*state, way, Bits(*state, way) - 1);
  }
}
// As present, and every `kEvery`-th eviction of a bucket ages all marks.
template <int kEvery>
int ChooseAgeing(uint64_t* state) {
  if ((*state >> 23) % kEvery == 0) *state = StateAged(*state);
  return ChooseWay(state);
}
int ChooseAny(uint64_t*) {
  static std::mt19937_64 random(7);
  return static_cast<int>(random() % kCacheWays);
}

const std::vector<Rule>& Rules() {
  static const std::vector<Rule> rules = {
      {"present", MarkPresent, ChooseWay, ArriveUnread},
      {"present, new rows read once", MarkPresent, ChooseWay, ArriveReadOnce},
      {"present, aged every 4th eviction", MarkPresent, ChooseAgeing<4>, ArriveUnread},
      {"present, aged every 16th eviction", MarkPresent, ChooseAgeing<16>, ArriveUnread},
      {"one mark", MarkOnce, ChooseWay, ArriveUnread},
      {"one mark, hand", MarkOnce, ChooseByHand, ArriveUnread},
      {"counts to three", MarkCount, ChooseLowest, ArriveUnread},
      {"counts to three, hand", MarkCount, ChooseByHand, ArriveUnread},
      {"random", [](uint64_t state, int) { return state; }, ChooseAny, ArriveUnread},
  };
  return rules;
}

struct Tally {
  uint64_t asked = 0, hits = 0, writes = 0;
};

class Cache {
 public:
  virtual ~Cache() = default;
  virtual void Ask(const std::vector<int64_t>& keys, const std::function<bool(int64_t)>& counts, Tally* tally) = 0;
};

class BucketCache final : public Cache {
 public:
  BucketCache(const Rule& rule, uint64_t rows) : rule_(rule), buckets_(rows / kCacheWays) {
    for (uint64_t b = 0; b < buckets_.size(); ++b) {
      std::fill_n(buckets_[b].keys, kCacheWays, FillerOf(b, buckets_.size()));
      buckets_[b].state = 0;
    }
  }
  void Ask(const std::vector<int64_t>& keys, const std::function<bool(int64_t)>& counts, Tally* tally) override {
    missing_.clear();
    for (const int64_t key : keys) {
      CacheBucket& bucket = BucketOf(key);
      const bool counted = counts(key);
      tally->asked += counted;
      const int way = WayOf(bucket, key);
      if (way < 0) {
        missing_.push_back(key);
        continue;
      }
      const uint64_t marked = rule_.mark(bucket.state, way);
      tally->hits += counted;
      tally->writes += counted && marked != bucket.state;
      bucket.state = marked;
    }
    for (const int64_t key : missing_) {
      CacheBucket& bucket = BucketOf(key);
      if (WayOf(bucket, key) >= 0) continue;
      int way = 0;
      while (way < kCacheWays && (bucket.state & StateHolds(way))) ++way;
      if (way == kCacheWays) way = rule_.choose(&bucket.state);
      bucket.state = rule_.arrive(bucket.state | StateHolds(way), way) + kStateVersionOne;
      bucket.keys[way] = key;
    }
  }

 private:
  CacheBucket& BucketOf(int64_t key) { return buckets_[FirstBucket(CacheHash(key), buckets_.size())]; }
  static int WayOf(const CacheBucket& bucket, int64_t key) {
    for (int way = 0; way < kCacheWays; ++way) {
      if (bucket.keys[way] == key) return way;
    }
    return -1;
  }

  const Rule& rule_;
  std::vector<CacheBucket> buckets_;
  std::vector<int64_t> missing_;
};

class LruCache final : public Cache {
 public:
  explicit LruCache(uint64_t rows) : rows_(rows) { places_.reserve(rows + 1); }
  void Ask(const std::vector<int64_t>& keys, const std::function<bool(int64_t)>& counts, Tally* tally) override {
    missing_.clear();
    for (const int64_t key : keys) {
      const bool counted = counts(key);
      tally->asked += counted;
      const auto place = places_.find(key);
      if (place == places_.end()) {
        missing_.push_back(key);
        continue;
      }
      tally->hits += counted;
      tally->writes += counted;
      order_.splice(order_.begin(), order_, place->second);
    }
    for (const int64_t key : missing_) {
      if (places_.contains(key)) continue;
      if (places_.size() == rows_) {
        places_.erase(order_.back());
        order_.pop_back();
      }
      order_.push_front(key);
      places_[key] = order_.begin();
    }
  }

 private:
  const uint64_t rows_;
  std::list<int64_t> order_;
  std::unordered_map<int64_t, std::list<int64_t>::iterator> places_;
  std::vector<int64_t> missing_;
};

class Keys {
 public:
  Keys(uint64_t rows, bool zipf, uint64_t seed) : rows_(rows), zipf_(zipf), random_(seed) {}
  int64_t Next() {
    if (!zipf_) return static_cast<int64_t>(random_() % rows_);
    constexpr double kExponent = 1.05;  // inverse of the continuous distribution function
    const double top = 1 - std::pow(static_cast<double>(rows_), 1 - kExponent);
    const double rank = std::pow(1 - uniform_(random_) * top, 1 / (1 - kExponent));
    return static_cast<int64_t>((static_cast<uint64_t>(rank) + shift_) % rows_);
  }
  void Shift() { shift_ = rows_ / 2; }

 private:
  const uint64_t rows_;
  const bool zipf_;
  std::mt19937_64 random_;
  std::uniform_real_distribution<double> uniform_{0, 1};
  uint64_t shift_ = 0;
};

void Print(const char* workload, size_t batch, const char* rule, const Tally& tally) {
  std::printf(
      "{\"kind\": \"replacement\", \"workload\": \"%s\", \"batch\": %zu, \"rule\": \"%s\", \"hit_rate\": %.4f, "
      "\"hit_writes\": %.4f}\n",
      workload, batch, rule, static_cast<double>(tally.hits) / static_cast<double>(tally.asked),
      static_cast<double>(tally.writes) / static_cast<double>(std::max<uint64_t>(tally.hits, 1)));
  std::fflush(stdout);
}

void Simulate(const std::string& workload, size_t batch, const char* name, Cache& cache, uint64_t table_rows) {
  const uint64_t cache_rows = table_rows / 10;
  Keys source(table_rows, workload != "flat", 1);
  int64_t once = -1;
  std::vector<int64_t> keys(batch);
  const auto ask = [&](uint64_t number, Tally* tally) {
    for (uint64_t asked = 0; asked < number; asked += batch) {
      for (size_t i = 0; i < batch; ++i) keys[i] = workload == "scan" && i % 4 == 3 ? once-- : source.Next();
      cache.Ask(
          keys, [](int64_t key) { return key >= 0; }, tally);
    }
  };
  Tally warm_up, counted;
  ask(5 * cache_rows, &warm_up);
  if (workload == "shift") {
    source.Shift();
    ask(cache_rows, &counted);
    Print("shift", batch, name, counted);
    counted = {};
    ask(5 * cache_rows, &counted);
    Print("shifted", batch, name, counted);
    return;
  }
  ask(20 * cache_rows, &counted);
  Print(workload.c_str(), batch, name, counted);
}

void PrintRun(uint64_t rows) {
  std::printf(
      "{\"kind\": \"run\", \"date\": \"%s\", \"command\": \"cache_replacement_benchmark %llu\", \"commit\": \"%s\", "
      "\"machine\": {\"cpu\": \"%s\"}, \"note\": \"a simulation: no times\", \"table_rows\": %llu, \"cache_rows\": "
      "%llu}\n",
      UtcNow().c_str(), static_cast<unsigned long long>(rows), Commit().c_str(), CpuName().c_str(),
      static_cast<unsigned long long>(rows), static_cast<unsigned long long>(rows / 10));
}

}  // namespace
}  // namespace hps::cuda

int main(int argc, char** argv) {
  using namespace hps::cuda;
  const uint64_t rows = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1'000'000;
  if (rows < 10 * kCacheWays * kMinBuckets) {
    std::fprintf(stderr, "the table needs at least %llu rows\n", 10ull * kCacheWays * kMinBuckets);
    return 1;
  }
  PrintRun(rows);
  for (const char* workload : {"zipf", "scan", "shift", "flat"}) {
    for (const size_t batch : {size_t{64}, size_t{4096}}) {
      LruCache lru(rows / 10 / kCacheWays * kCacheWays);
      Simulate(workload, batch, "lru", lru, rows);
      for (const Rule& rule : Rules()) {
        BucketCache cache(rule, rows / 10);
        Simulate(workload, batch, rule.name, cache, rows);
      }
    }
  }
  return 0;
}
