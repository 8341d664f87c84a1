// What a margin costs the hash map store, and what its policies keep, each policy beside none in the same run.
//
// Each line of output is one measurement in JSON. Times are processor time of one thread. "fetch": every batch follows
// a write, so that a policy that notes times stores one for each row that is read. "fresh": keys that were never there,
// at the margin. "hit_rate": a cache over a table with ten times its rows, Zipf 1.05, missed rows are promoted; beside
// an exact LRU that holds as many rows as the margin allows. Usage:
//   hash_map_eviction_benchmark [rows]     (default 1000000)

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "benchmarks/native/hash_map_benchmark.h"
#include "cc/storage/hash_map_store.h"

namespace hps {
namespace {

struct Policy {
  const char* name;
  std::optional<OverflowPolicy> policy;
  bool refresh = false;
};
constexpr Policy kPolicies[] = {{"none", std::nullopt},
                                {"random", OverflowPolicy::kEvictRandom},
                                {"oldest", OverflowPolicy::kEvictOldest},
                                {"oldest, refreshed", OverflowPolicy::kEvictOldest, true},
                                {"least_used", OverflowPolicy::kEvictLeastUsed}};

struct Opened {
  std::unique_ptr<TableStore> store;
  std::shared_ptr<Table> table;
};

Opened Open(const Policy& policy, uint64_t margin, uint32_t num_partitions, size_t row_bytes, uint64_t expected_rows) {
  HashMapOptions options;
  options.num_partitions = num_partitions;
  if (policy.policy) options.overflow = {.margin = margin, .policy = *policy.policy};
  options.overflow.refresh_time_after_fetch = policy.refresh;
  auto store = OpenHashMapStore(options);
  Check(store.status());
  auto table = (*store)->CreateTable({.name = "t", .row_bytes = row_bytes, .expected_rows = expected_rows});
  Check(table.status());
  return {std::move(*store), *table};
}

void MeasureFetch(size_t rows, size_t width, bool dense, bool zipf) {
  const size_t row_bytes = width * 4;
  std::vector<std::byte> block(kBatch * row_bytes);
  std::vector<Key> keys(rows);
  for (size_t i = 0; i < rows; ++i) keys[i] = KeyOf(i, dense);
  std::vector<Key> asked = DrawIds(rows, zipf, 1);
  for (Key& key : asked) key = KeyOf(static_cast<uint64_t>(key), dense);
  std::vector<Opened> tables;
  std::vector<BatchBody> bodies;
  std::vector<uint32_t> misses;
  tables.reserve(std::size(kPolicies));
  for (const Policy& policy : kPolicies) {
    tables.push_back(Open(policy, rows / 16 * 11 / 10, 16, row_bytes, rows));
    Table& table = *tables.back().table;
    for (size_t first = 0; first < rows; first += kBatch) {
      Check(table.Upsert({keys.data() + first, std::min(kBatch, rows - first)}, {block.data(), row_bytes}));
    }
    bodies.push_back([&](int, int batch) {
      Check(table.Upsert({keys.data(), 1}, {block.data(), row_bytes}));
      misses.clear();
      Check(table.Fetch({.keys = {asked.data() + batch * kBatch, kBatch}, .rows = {block.data(), row_bytes}}, &misses));
      if (!misses.empty()) Check(Internal("rows are missing"));
    });
  }
  const std::vector<double> rates = MillionIdsPerSecond(1, bodies);
  for (size_t i = 0; i < rates.size(); ++i) {
    std::printf(
        "{\"measure\": \"fetch\", \"rows\": %zu, \"width\": %zu, \"keys\": \"%s\", \"ids\": \"%s\", \"policy\": "
        "\"%s\", "
        "\"mids\": %.1f, \"over_none\": %.2f, \"bytes_per_row\": %.1f}\n",
        rows, width, dense ? "dense" : "hashed", zipf ? "zipf" : "uniform", kPolicies[i].name, rates[i],
        rates[i] / rates[0], static_cast<double>(tables[i].table->Stats()->memory_bytes) / static_cast<double>(rows));
  }
  std::fflush(stdout);
}

// One partition of `rows` rows: how long the upsert of one row takes that makes a fifth of them leave.
void MeasureEviction(size_t rows, bool dense, const Policy& policy) {
  constexpr size_t kRowBytes = 64;
  const Opened opened = Open(policy, rows, 1, kRowBytes, rows);
  std::vector<std::byte> block(kBatch * kRowBytes);
  std::vector<Key> keys(kBatch);
  std::vector<double> milliseconds;
  uint64_t next = 0;
  const auto put = [&](size_t count) {
    for (size_t i = 0; i < count; ++i, ++next) keys[i] = KeyOf(next, dense && next < rows);
    const double start = ThreadSeconds();
    Check(opened.table->Upsert({keys.data(), count}, {block.data(), kRowBytes}));
    return ThreadSeconds() - start;
  };
  while (next < rows) put(std::min(kBatch, rows - next));
  for (int round = 0; round < 5; ++round) {
    const uint64_t before = opened.table->Stats()->evicted_rows;
    milliseconds.push_back(put(1) * 1e3);
    if (opened.table->Stats()->evicted_rows == before) Check(Internal("nothing was evicted"));
    while (opened.table->Stats()->rows < rows) put(std::min<size_t>(kBatch, rows - opened.table->Stats()->rows));
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  std::printf(
      "{\"measure\": \"eviction\", \"partition_rows\": %zu, \"keys\": \"%s\", \"policy\": \"%s\", \"median_ms\": %.1f, "
      "\"most_ms\": %.1f}\n",
      rows, dense ? "dense at first" : "hashed", policy.name, milliseconds[2], milliseconds.back());
  std::fflush(stdout);
}

// Keys that were never there, in batches of 8,192, until each row has been replaced `kMargins` times.
void MeasureFresh(size_t rows, size_t width, uint32_t num_partitions) {
  constexpr size_t kFreshBatch = 8'192;
  constexpr size_t kMargins = 8;
  const size_t row_bytes = width * 4;
  std::vector<std::byte> block(kFreshBatch * row_bytes);
  std::vector<Key> keys(kFreshBatch);
  for (const Policy& policy : kPolicies) {
    const Opened opened = Open(policy, rows / num_partitions, num_partitions, row_bytes, rows);
    uint64_t next = 0;
    std::vector<double> seconds(kMargins + 1);
    double longest = 0;
    for (size_t round = 0; round <= kMargins; ++round) {
      for (size_t done = 0; done < rows; done += kFreshBatch) {
        // Without a policy the table would grow for ever: the same keys again, which writes over rows.
        for (Key& key : keys) key = KeyOf(policy.policy ? next++ : next++ % rows, false);
        const double start = ThreadSeconds();
        Check(opened.table->Upsert(keys, {block.data(), row_bytes}));
        const double took = ThreadSeconds() - start;
        seconds[round] += took;
        if (round > 1) longest = std::max(longest, took);
      }
    }
    const TableStats stats = *opened.table->Stats();
    std::printf(
        "{\"measure\": \"fresh\", \"rows\": %zu, \"width\": %zu, \"partitions\": %u, \"policy\": \"%s\", "
        "\"insert_mrows\": %.2f, \"mrows_second_margin\": %.2f, \"mrows_last_margin\": %.2f, \"longest_batch_ms\": "
        "%.1f, "
        "\"bytes_per_margin_row\": %.1f}\n",
        rows, width, num_partitions, policy.policy ? policy.name : "none (rows written over)", rows / seconds[0] / 1e6,
        rows / seconds[1] / 1e6, rows / seconds[kMargins] / 1e6, longest * 1e3,
        static_cast<double>(stats.memory_bytes) / static_cast<double>(rows));
    std::fflush(stdout);
  }
}

// Holds the `capacity` keys that were used last.
class Lru {
 public:
  explicit Lru(size_t capacity) : capacity_(capacity) {}
  bool Use(Key key) {
    const auto found = places_.find(key);
    if (found != places_.end()) {
      order_.splice(order_.begin(), order_, found->second);
      return true;
    }
    order_.push_front(key);
    places_[key] = order_.begin();
    if (order_.size() > capacity_) {
      places_.erase(order_.back());
      order_.pop_back();
    }
    return false;
  }

 private:
  const size_t capacity_;
  std::list<Key> order_;
  std::unordered_map<Key, std::list<Key>::iterator> places_;
};

void MeasureHitRate(size_t universe, double part) {
  constexpr size_t kRowBytes = 16;
  const auto capacity = static_cast<size_t>(static_cast<double>(universe) * part);
  const size_t ask = std::bit_floor(std::min<size_t>(4'096, capacity / 16));  // ids in a lookup
  std::vector<Key> ids;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    const std::vector<Key> more = DrawIds(universe, /*zipf=*/true, seed);
    ids.insert(ids.end(), more.begin(), more.end());
  }
  for (Key& id : ids) id = KeyOf(static_cast<uint64_t>(id), false);
  const size_t counted_from = ids.size() / 2;  // what comes before fills the cache
  const auto print = [&](const char* name, size_t hits, double kept) {
    std::printf(
        "{\"measure\": \"hit_rate\", \"table_rows\": %zu, \"margin_rows\": %zu, \"policy\": \"%s\", \"hit_rate\": "
        "%.4f, "
        "\"rows_kept\": %.2f}\n",
        universe, capacity, name, static_cast<double>(hits) / static_cast<double>(ids.size() - counted_from), kept);
    std::fflush(stdout);
  };
  for (const double kept : {1.0, 0.9}) {
    Lru lru(static_cast<size_t>(kept * static_cast<double>(capacity)));
    size_t hits = 0;
    for (size_t i = 0; i < ids.size(); ++i) hits += lru.Use(ids[i]) && i >= counted_from;
    print("exact LRU", hits, kept);
  }
  std::vector<std::byte> block(ask * kRowBytes);
  for (const Policy& policy : kPolicies) {
    if (!policy.policy) continue;
    const Opened opened = Open(policy, capacity / 16, 16, kRowBytes, 0);
    size_t hits = 0;
    double kept = 0;
    std::vector<uint32_t> misses;
    std::vector<Key> missed;
    for (size_t first = 0; first < ids.size(); first += ask) {
      misses.clear();
      Check(opened.table->Fetch({.keys = {ids.data() + first, ask}, .rows = {block.data(), kRowBytes}}, &misses));
      missed.clear();
      for (const uint32_t position : misses) missed.push_back(ids[first + position]);
      Check(opened.table->Upsert(missed, {block.data(), kRowBytes}, {.only_absent = true}));
      if (first < counted_from) continue;
      hits += ask - misses.size();
      kept += static_cast<double>(opened.table->Stats()->rows) / static_cast<double>(capacity) * ask;
    }
    print(policy.name, hits, kept / static_cast<double>(ids.size() - counted_from));
  }
}

}  // namespace
}  // namespace hps

int main(int argc, char** argv) {
  const size_t rows = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1'000'000;
  for (const size_t width : {16, 64}) {
    for (const bool dense : {true, false}) {
      for (const bool zipf : {false, true}) hps::MeasureFetch(rows, width, dense, zipf);
    }
  }
  for (const hps::Policy& policy : hps::kPolicies) {
    if (!policy.policy) continue;
    for (const bool dense : {true, false}) hps::MeasureEviction(rows, dense, policy);
  }
  for (const uint32_t partitions : {1, 16}) hps::MeasureFresh(rows, 16, partitions);
  for (const double part : {0.01, 0.1}) hps::MeasureHitRate(rows, part);
}
