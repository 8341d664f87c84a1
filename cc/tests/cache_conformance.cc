// The clauses. Rows prove their key and version (core_fixture.h: Row).

#include "cc/tests/cache_conformance.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iostream>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <thread>

namespace hps::testing {
namespace {

constexpr Key kKeyMin = std::numeric_limits<Key>::min();
constexpr Key kKeyMax = std::numeric_limits<Key>::max();
const std::vector<Key> kExtremes = {0, -1, 1, kKeyMin, kKeyMin + 1, kKeyMax, kKeyMax - 1};

using Versions = std::map<Key, uint32_t>;

uint64_t Seed() {
  const char* text = std::getenv("HPS_TEST_SEED");
  const uint64_t seed = text != nullptr ? std::strtoull(text, nullptr, 10) : std::random_device{}();
  std::cout << "HPS_TEST_SEED=" << seed << std::endl;
  return seed;
}

std::vector<float> RowsOf(const std::vector<Key>& keys, uint32_t version, uint32_t width) {
  std::vector<float> rows;
  for (const Key key : keys) {
    const std::vector<float> row = Row(key, version, width);
    rows.insert(rows.end(), row.begin(), row.end());
  }
  return rows;
}
ConstRowBuffer Buffer(const std::vector<float>& rows, uint32_t width) {
  return {reinterpret_cast<const std::byte*>(rows.data()), width * sizeof(float)};
}
uint32_t WidthOf(const EmbeddingCache& cache) { return cache.spec().row_bytes / sizeof(float); }

Status Insert(EmbeddingCache& cache, const std::vector<Key>& keys, uint32_t version) {
  const std::vector<float> rows = RowsOf(keys, version, WidthOf(cache));
  return cache.Insert(keys, Buffer(rows, WidthOf(cache)), cache.Now());
}
Status Update(EmbeddingCache& cache, const std::vector<Key>& keys, uint32_t version) {
  const std::vector<float> rows = RowsOf(keys, version, WidthOf(cache));
  return cache.Update(keys, Buffer(rows, WidthOf(cache)));
}

// The version of a row, 0 for the default row, -1 for anything else.
int VersionOf(Key key, const float* row, uint32_t width) {
  if (std::all_of(row, row + width, [](float x) { return x == kCacheDefault; })) return 0;
  const auto version = static_cast<uint32_t>(row[0]);
  const std::vector<float> expected = Row(key, version, width);
  return std::equal(expected.begin(), expected.end(), row) ? static_cast<int>(version) : -1;
}

// Asks for the keys and checks all that the contract says of the answer: rows, defaults, and what is missing.
void ExpectHeld(DeviceCache& cache, const std::vector<Key>& keys, const Versions& held) {
  cuda::Device& device = cache.resources().context->device();
  const uint32_t width = WidthOf(cache);
  const DeviceArray<Key> asked(device, keys);
  const DeviceArray<float> answer(device, keys.size() * width);
  std::vector<CacheMiss> misses;
  ASSERT_OK(cache.Query(asked.get(), static_cast<uint32_t>(keys.size()), answer.get(), nullptr, &misses, kNoDeadline));
  const std::vector<float> rows = answer.Get();
  std::set<Key> missing, told;
  for (size_t i = 0; i < keys.size(); ++i) {
    const auto found = held.find(keys[i]);
    const int expected = found == held.end() ? 0 : static_cast<int>(found->second);
    ASSERT_EQ(VersionOf(keys[i], rows.data() + i * width, width), expected) << "key " << keys[i] << " at " << i;
    if (expected == 0) missing.insert(keys[i]);
  }
  for (const CacheMiss& miss : misses) {
    ASSERT_LT(miss.position, keys.size());
    ASSERT_EQ(keys[miss.position], miss.key);
    ASSERT_TRUE(told.insert(miss.key).second) << "key " << miss.key << " is told missing twice";
  }
  ASSERT_EQ(told, missing);
}

Versions VersionsOf(const std::vector<Key>& keys, uint32_t version) {
  Versions versions;
  for (const Key key : keys) versions[key] = version;
  return versions;
}

// Keys with one first bucket.
std::vector<Key> KeysOfOneBucket(uint64_t num_buckets, size_t count, Key from = 0) {
  std::vector<Key> keys;
  for (Key key = from; keys.size() < count; ++key) {
    if (cuda::FirstBucket(cuda::CacheHash(key), num_buckets) == 3) keys.push_back(key);
  }
  return keys;
}

std::vector<Key> DumpAll(DeviceCache& cache, uint64_t step) {
  std::vector<Key> keys;
  for (uint64_t first = 0; first < cache.num_buckets(); first += step) {
    EXPECT_TRUE(cache.Dump(first, std::min(first + step, cache.num_buckets()), &keys).ok());
  }
  return keys;
}

}  // namespace

void CacheConformance::SetUp() {
  device_ = GetParam().open();
  ASSERT_NE(device_, nullptr);
  resources_ = Value(DeviceResources::Open(device_, {.reserved = 2, .limit = 8, .size = {1024, 1 << 16}}));
}

std::shared_ptr<DeviceCache> CacheConformance::Make(uint32_t width, uint64_t capacity_rows) {
  return Value(DeviceCache::Make(resources_, {.name = "model 'm', table 't'",
                                              .row_bytes = width * 4,
                                              .capacity_rows = capacity_rows,
                                              .default_value = kCacheDefault}));
}

TEST_P(CacheConformance, EmptyCacheMissesEveryKey) {
  const auto cache = Make(8, 1000);
  EXPECT_GE(cache->spec().capacity_rows, 1000u);
  EXPECT_EQ(cache->spec().capacity_rows, cache->num_buckets() * 7);
  ExpectHeld(*cache, {5, 5, 6, 5}, {});
  ExpectHeld(*cache, kExtremes, {});
  EXPECT_TRUE(DumpAll(*cache, 16).empty());
}

TEST_P(CacheConformance, RowsOfAnyWidthAndKeysOfAnyValue) {
  for (const uint32_t width : {1, 2, 3, 4, 7, 16, 64, 128, 130}) {
    const auto cache = Make(width, 7000);
    std::vector<Key> keys = KeyRange(100, 300);
    keys.insert(keys.end(), kExtremes.begin(), kExtremes.end());
    ASSERT_OK(Insert(*cache, keys, 1));
    ASSERT_OK(cache->Flush());
    std::vector<Key> asked = KeyRange(90, 400);
    asked.insert(asked.end(), kExtremes.begin(), kExtremes.end());
    asked.insert(asked.end(), keys.begin(), keys.end());
    ASSERT_NO_FATAL_FAILURE(ExpectHeld(*cache, asked, VersionsOf(keys, 1))) << width;
  }
}

TEST_P(CacheConformance, EmptyBatchesAreLegal) {
  const auto cache = Make(4, 100);
  ASSERT_OK(cache->Insert({}, {}, cache->Now()));
  ASSERT_OK(cache->Update({}, {}));
  ASSERT_OK(cache->Refresh({}, {}, cache->Now()));
  ASSERT_OK(cache->Erase({}));
  ExpectHeld(*cache, {}, {});
}

TEST_P(CacheConformance, InsertLeavesRowsThatAreThere) {
  const auto cache = Make(8, 7000);
  ASSERT_OK(Insert(*cache, KeyRange(0, 100), 1));
  ASSERT_OK(Insert(*cache, KeyRange(50, 100), 2));
  ASSERT_OK(cache->Flush());
  Versions held = VersionsOf(KeyRange(0, 150), 2);
  for (Key key = 0; key < 100; ++key) held[key] = 1;
  ExpectHeld(*cache, KeyRange(0, 200), held);
}

TEST_P(CacheConformance, UpdateOverwritesOnlyWhatIsThere) {
  const auto cache = Make(8, 7000);
  ASSERT_OK(Insert(*cache, KeyRange(0, 100), 1));
  ASSERT_OK(Update(*cache, KeyRange(50, 100), 2));
  ASSERT_OK(cache->Flush());
  Versions held = VersionsOf(KeyRange(0, 100), 1);
  for (Key key = 50; key < 100; ++key) held[key] = 2;
  ExpectHeld(*cache, KeyRange(0, 200), held);
  EXPECT_EQ(cache->stats().rows_updated, 100u);
}

TEST_P(CacheConformance, LaterRowOfARepeatedKeyWins) {
  const auto cache = Make(8, 7000);
  const std::vector<Key> keys = KeyRange(0, 64);
  ASSERT_OK(Insert(*cache, keys, 1));
  std::vector<Key> updated;
  std::vector<float> rows;
  for (uint32_t version = 2; version < 40; ++version) {
    updated.insert(updated.end(), keys.begin(), keys.end());
    const std::vector<float> more = RowsOf(keys, version, 8);
    rows.insert(rows.end(), more.begin(), more.end());
  }
  ASSERT_OK(cache->Update(updated, Buffer(rows, 8)));
  ASSERT_OK(cache->Flush());
  ExpectHeld(*cache, keys, VersionsOf(keys, 39));
}

TEST_P(CacheConformance, UpdatesOfOneKeyKeepTheirOrder) {
  const auto cache = Make(4, 100);
  ASSERT_OK(Insert(*cache, {7}, 1));
  for (uint32_t version = 2; version <= 200; ++version) ASSERT_OK(Update(*cache, {7}, version));
  ASSERT_OK(cache->Flush());
  ExpectHeld(*cache, {7}, {{7, 200}});
}

TEST_P(CacheConformance, EraseRemovesAndLeavesTheOthers) {
  const auto cache = Make(8, 7000);
  std::vector<Key> keys = KeyRange(0, 100);
  keys.insert(keys.end(), kExtremes.begin() + 3, kExtremes.end());
  ASSERT_OK(Insert(*cache, keys, 1));
  ASSERT_OK(cache->Erase(KeyRange(40, 20)));
  ASSERT_OK(cache->Erase(std::vector<Key>{12345, kKeyMax}));
  ASSERT_OK(cache->Flush());
  Versions held = VersionsOf(keys, 1);
  for (Key key = 40; key < 60; ++key) held.erase(key);
  held.erase(kKeyMax);
  ASSERT_NO_FATAL_FAILURE(ExpectHeld(*cache, keys, held));
  ASSERT_OK(Insert(*cache, {45}, 3));
  ASSERT_OK(cache->Flush());
  held[45] = 3;
  ExpectHeld(*cache, keys, held);
}

TEST_P(CacheConformance, DumpGivesTheKeysOfEachRangeOnce) {
  const auto cache = Make(4, 3000);
  const std::vector<Key> keys = KeyRange(-300, 600);
  ASSERT_OK(Insert(*cache, keys, 1));
  for (const uint64_t step : {1ull, 7ull, 100ull, 1ull << 40}) {
    const std::vector<Key> dumped = DumpAll(*cache, std::min(step, cache->num_buckets()));
    EXPECT_EQ(std::set<Key>(dumped.begin(), dumped.end()), std::set<Key>(keys.begin(), keys.end()));
    EXPECT_EQ(dumped.size(), keys.size());
  }
  std::vector<Key> none;
  ASSERT_OK(cache->Dump(5, 5, &none));
  EXPECT_TRUE(none.empty());
}

TEST_P(CacheConformance, RowsMayLieApart) {
  const auto cache = Make(4, 700);
  const std::vector<Key> keys = KeyRange(0, 50);
  std::vector<float> rows(keys.size() * 7, 99.0f);
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::vector<float> row = Row(keys[i], 1, 4);
    std::copy(row.begin(), row.end(), rows.begin() + static_cast<ptrdiff_t>(i * 7));
  }
  ASSERT_OK(cache->Insert(keys, {reinterpret_cast<const std::byte*>(rows.data()), 28}, cache->Now()));
  ASSERT_OK(cache->Flush());
  ExpectHeld(*cache, keys, VersionsOf(keys, 1));
}

TEST_P(CacheConformance, BatchesOfManyPiecesAndRowsLargerThanAPiece) {
  const auto cache = Make(128, 70'000);
  const std::vector<Key> keys = KeyRange(0, 20'000);  // 10 MB
  ASSERT_OK(Insert(*cache, keys, 1));
  ASSERT_OK(Update(*cache, keys, 2));
  ASSERT_OK(cache->Flush());
  const std::vector<Key> left = DumpAll(*cache, 5000);
  EXPECT_GT(left.size(), keys.size() * 99 / 100);
  ASSERT_NO_FATAL_FAILURE(ExpectHeld(*cache, keys, VersionsOf(left, 2)));
  const uint32_t wide = static_cast<uint32_t>(CacheWriter::kPieceBytes / 4 + 10);
  const auto large = Make(wide, 16);
  ASSERT_OK(Insert(*large, {1, 2, 3}, 1));
  ASSERT_OK(large->Flush());
  ExpectHeld(*large, {3, 4, 1, 2}, VersionsOf({1, 2, 3}, 1));
}

TEST_P(CacheConformance, FullCacheGivesUpRowsAndCountsThem) {
  const auto cache = Make(4, 700);
  std::set<Key> inserted;
  for (int round = 0; round < 10; ++round) {
    const std::vector<Key> keys = KeyRange(round * 200, 200);
    inserted.insert(keys.begin(), keys.end());
    ASSERT_OK(Insert(*cache, keys, 1));
  }
  ASSERT_OK(cache->Flush());
  const std::vector<Key> left = DumpAll(*cache, 50);
  EXPECT_LE(left.size(), cache->spec().capacity_rows);
  EXPECT_EQ(left.size() + cache->stats().rows_evicted, inserted.size());
  std::vector<Key> all(inserted.begin(), inserted.end());
  ExpectHeld(*cache, all, VersionsOf(left, 1));
}

TEST_P(CacheConformance, RowsThatAreReadStay) {
  const auto cache = Make(4, 1400);
  const std::vector<Key> hot = KeyRange(0, 400);
  ASSERT_OK(Insert(*cache, hot, 1));
  ASSERT_OK(cache->Flush());
  std::vector<Key> left = DumpAll(*cache, 50);
  const DeviceArray<Key> asked(*device_, hot);
  const DeviceArray<float> rows(*device_, hot.size() * 4);
  for (int round = 0; round < 20; ++round) {
    std::vector<CacheMiss> misses;
    for (int i = 0; i < 2; ++i) ASSERT_OK(cache->Query(asked.get(), 400, rows.get(), nullptr, &misses, kNoDeadline));
    ASSERT_OK(Insert(*cache, KeyRange(1000 + round * 200, 200), 1));
    ASSERT_OK(cache->Flush());
  }
  left = DumpAll(*cache, 50);
  const std::set<Key> kept(left.begin(), left.end());
  const auto hot_left = std::count_if(hot.begin(), hot.end(), [&](Key key) { return kept.contains(key); });
  EXPECT_GT(hot_left, 380);
}

TEST_P(CacheConformance, AllKeysInOneBucket) {
  const auto cache = Make(4, 7 * 64);
  const std::vector<Key> keys = KeysOfOneBucket(cache->num_buckets(), 300);
  ASSERT_OK(Insert(*cache, keys, 1));
  ASSERT_OK(Update(*cache, keys, 2));
  ASSERT_OK(cache->Flush());
  const std::vector<Key> left = DumpAll(*cache, 64);
  EXPECT_EQ(left.size(), 7u);
  ASSERT_NO_FATAL_FAILURE(ExpectHeld(*cache, keys, VersionsOf(left, 2)));
  ASSERT_OK(cache->Erase(keys));
  ASSERT_OK(cache->Flush());
  ExpectHeld(*cache, keys, {});
}

TEST_P(CacheConformance, RowsReadBeforeAnUpdateAreLeftOut) {
  const auto cache = Make(4, 7000);
  const std::vector<Key> keys = KeyRange(0, 50);
  const EmbeddingCache::Stamp before = cache->Now();
  ASSERT_OK(Update(*cache, {3, 4}, 2));  // not there: no effect but that it is remembered
  ASSERT_OK(cache->Erase(std::vector<Key>{5}));
  const std::vector<float> old = RowsOf(keys, 1, 4);
  ASSERT_OK(cache->Insert(keys, Buffer(old, 4), before));
  ASSERT_OK(cache->Flush());
  Versions held = VersionsOf(keys, 1);
  for (const Key key : {3, 4, 5}) held.erase(key);
  ASSERT_NO_FATAL_FAILURE(ExpectHeld(*cache, keys, held));
  EXPECT_EQ(cache->stats().rows_outdated, 3u);

  ASSERT_OK(Insert(*cache, keys, 2));
  const EmbeddingCache::Stamp again = cache->Now();
  ASSERT_OK(Update(*cache, {7}, 3));
  ASSERT_OK(cache->Refresh(keys, Buffer(RowsOf(keys, 2, 4), 4), again));
  ASSERT_OK(cache->Flush());
  held = VersionsOf(keys, 2);
  held[7] = 3;
  ExpectHeld(*cache, keys, held);
}

TEST_P(CacheConformance, CachesOfOneDeviceAreSeparate) {
  const auto one = Make(4, 700), two = Make(8, 700);
  const std::vector<Key> keys = KeyRange(0, 20);
  const EmbeddingCache::Stamp stamp = two->Now();
  ASSERT_OK(Insert(*one, keys, 1));
  ASSERT_OK(Update(*one, keys, 2));
  ASSERT_OK(two->Insert(keys, Buffer(RowsOf(keys, 5, 8), 8), stamp));  // an update of the other cache is none of it
  ASSERT_OK(one->Flush());
  ASSERT_NO_FATAL_FAILURE(ExpectHeld(*two, keys, VersionsOf(keys, 5)));
  ExpectHeld(*one, keys, VersionsOf(keys, 2));
}

TEST_P(CacheConformance, WholeTableIsResident) {
  const std::vector<Key> keys = KeyRange(-5000, 20'000);
  const RowScan scan = [&](const ScanVisitor& visitor) -> Status {
    for (size_t first = 0; first < keys.size(); first += 3000) {
      const std::vector<Key> chunk(keys.begin() + static_cast<ptrdiff_t>(first),
                                   keys.begin() + static_cast<ptrdiff_t>(std::min(first + 3000, keys.size())));
      const std::vector<float> rows = RowsOf(chunk, 1, 16);
      HPS_RETURN_IF_ERROR(visitor(chunk, Buffer(rows, 16)));
    }
    return OkStatus();
  };
  const CacheSpec spec{.name = "whole", .row_bytes = 64, .default_value = kCacheDefault, .type = CacheType::kStatic};
  const auto cache = Value(DeviceCache::MakeWhole(resources_, spec, scan));
  EXPECT_TRUE(cache->whole());
  EXPECT_LE(cache->spec().capacity_rows, keys.size() * 100 / 94);
  ASSERT_NO_FATAL_FAILURE(ExpectHeld(*cache, keys, VersionsOf(keys, 1)));
  ExpectHeld(*cache, KeyRange(100'000, 1000), {});
  ASSERT_OK(Update(*cache, keys, 2));
  ASSERT_OK(cache->Flush());
  ASSERT_NO_FATAL_FAILURE(ExpectHeld(*cache, keys, VersionsOf(keys, 2)));
  ExpectError(Insert(*cache, keys, 3), StatusCode::kFailedPrecondition, {"whole", "static", "dynamic"});
}

// Keys that come and go between the scans: rows that nobody gave must not be served.
TEST_P(CacheConformance, AWholeTableMayChangeWhileItIsScanned) {
  int scans = 0;
  const RowScan scan = [&](const ScanVisitor& visitor) -> Status {
    const bool first = scans++ == 0;
    const std::vector<Key> chunk = first ? KeyRange(0, 1000) : KeyRange(100, 1000);
    HPS_RETURN_IF_ERROR(visitor(chunk, Buffer(RowsOf(chunk, 1, 4), 4)));
    return visitor(KeyRange(500, 10), Buffer(RowsOf(KeyRange(500, 10), 2, 4), 4));  // again, newer
  };
  for (const CacheType type : {CacheType::kStatic, CacheType::kDynamic}) {
    scans = 0;
    const CacheSpec spec{.name = "whole", .row_bytes = 16, .default_value = kCacheDefault, .type = type};
    const auto cache = Value(DeviceCache::MakeWhole(resources_, spec, scan));
    Versions held = VersionsOf(KeyRange(100, 900), 1);
    for (Key key = 500; key < 510; ++key) held[key] = 2;
    ASSERT_NO_FATAL_FAILURE(ExpectHeld(*cache, KeyRange(0, 1200), held));
  }
}

TEST_P(CacheConformance, PreloadFillsTheCacheAndEndsTheScan) {
  const auto cache = Make(4, 700);
  int chunks = 0;
  const RowScan scan = [&](const ScanVisitor& visitor) -> Status {
    for (; chunks < 100; ++chunks) {
      const std::vector<Key> chunk = KeyRange(chunks * 150, 150);
      HPS_RETURN_IF_ERROR(visitor(chunk, Buffer(RowsOf(chunk, 1, 4), 4)));
    }
    return OkStatus();
  };
  ASSERT_OK(cache->Preload(scan));
  EXPECT_LT(chunks, 6);
  const std::vector<Key> held = DumpAll(*cache, 100);
  EXPECT_GT(held.size(), cache->spec().capacity_rows * 8 / 10);
  ASSERT_NO_FATAL_FAILURE(ExpectHeld(*cache, KeyRange(0, 1000), VersionsOf(held, 1)));
  const auto large = Make(4, 7000);
  chunks = 98;
  ASSERT_OK(large->Preload(scan));
  EXPECT_EQ(DumpAll(*large, 100).size(), 300u);
  ExpectError(large->Preload([](const ScanVisitor&) { return Unavailable("the tier is down"); }),
              StatusCode::kUnavailable, {"down"});
}

TEST_P(CacheConformance, RefusesWhatDoesNotFit) {
  CacheSpec spec{.name = "model 'm', table 't'", .row_bytes = 6, .capacity_rows = 100};
  ExpectError(DeviceCache::Make(resources_, spec).status(), StatusCode::kInvalidArgument, {"table 't'", "6 bytes"});
  spec.row_bytes = 0;
  ExpectError(DeviceCache::Make(resources_, spec).status(), StatusCode::kInvalidArgument, {"0 bytes"});
  spec = {.name = "x", .row_bytes = 4, .capacity_rows = uint64_t{1} << 33};
  ExpectError(DeviceCache::Make(resources_, spec).status(), StatusCode::kInvalidArgument, {"gpucacheper"});
  const auto cache = Make(4, 100);
  std::vector<Key> keys;
  ExpectError(cache->Dump(0, cache->num_buckets() + 1, &keys), StatusCode::kInvalidArgument, {"buckets"});
  ExpectError(cache->Dump(2, 1, &keys), StatusCode::kInvalidArgument, {"buckets [2, 1)"});
}

// After an insert: a key that is there has the version it had or the new one, which *held is told.
void NoteInserted(DeviceCache& cache, Key key, uint32_t version, Versions* held) {
  cuda::Device& device = cache.resources().context->device();
  const uint32_t width = WidthOf(cache);
  const DeviceArray<Key> asked(device, std::vector<Key>{key});
  const DeviceArray<float> answer(device, width);
  std::vector<CacheMiss> misses;
  ASSERT_OK(cache.Flush());
  ASSERT_OK(cache.Query(asked.get(), 1, answer.get(), nullptr, &misses, kNoDeadline));
  const int found = VersionOf(key, answer.Get().data(), width);
  const auto before = held->find(key);
  const bool old = before != held->end() && found == static_cast<int>(before->second);
  ASSERT_TRUE(found == 0 || found == static_cast<int>(version) || old) << "key " << key << " version " << found;
  if (found > 0) (*held)[key] = static_cast<uint32_t>(found);
}

// Against a map, for a cache so large that nothing is evicted but by a full bucket, which the map learns from Dump.
TEST_P(CacheConformance, AgreesWithAModel) {
  std::mt19937_64 random(Seed());
  for (int turn = 0; turn < 3; ++turn) {
    const auto cache = Make(static_cast<uint32_t>(1 + random() % 20), 300 + random() % 3000);
    Versions held;
    uint32_t version = 0;
    const auto some = [&] {
      std::set<Key> keys;
      const size_t count = random() % 200;
      for (size_t i = 0; i < count; ++i) keys.insert(static_cast<Key>(random() % 500) - 250);
      if (random() % 4 == 0) keys.insert(kExtremes.begin(), kExtremes.end());
      return std::vector<Key>(keys.begin(), keys.end());
    };
    for (int step = 0; step < 60; ++step) {
      const std::vector<Key> keys = some();
      switch (random() % 5) {
        case 0:
        case 1:
          ASSERT_OK(Insert(*cache, keys, ++version));
          // A key that was there may have been pushed out by another one of the batch and then put in anew.
          for (const Key key : keys) ASSERT_NO_FATAL_FAILURE(NoteInserted(*cache, key, version, &held));
          break;
        case 2:
          ASSERT_OK(Update(*cache, keys, ++version));
          for (const Key key : keys) {
            if (held.contains(key)) held[key] = version;
          }
          break;
        case 3:
          ASSERT_OK(cache->Erase(keys));
          for (const Key key : keys) held.erase(key);
          break;
        default: break;
      }
      ASSERT_OK(cache->Flush());
      const std::vector<Key> dumped = DumpAll(*cache, 1 + random() % 100);
      const std::set<Key> left(dumped.begin(), dumped.end());
      ASSERT_EQ(left.size(), dumped.size());
      for (const Key key : left) ASSERT_TRUE(held.contains(key)) << key;
      std::erase_if(held, [&](const auto& entry) { return !left.contains(entry.first); });
      std::vector<Key> asked = some();
      asked.insert(asked.end(), keys.begin(), keys.end());
      ASSERT_NO_FATAL_FAILURE(ExpectHeld(*cache, asked, held));
    }
  }
}

// Readers check every row while writers change, evict and erase them.
void StormOf(DeviceCache& cache_under_test, const std::vector<Key>& keys) {
  DeviceCache* const cache = &cache_under_test;
  cuda::Device* const device = &cache->resources().context->device();
  const uint32_t width = WidthOf(*cache);
  ASSERT_OK(Insert(*cache, keys, 1));
  std::atomic<bool> done{false};
  std::atomic<uint64_t> rows_found{0};
  const auto read = [&](uint64_t seed) {
    std::mt19937_64 random(seed);
    TestStream stream(*device);
    std::vector<Key> asked(300);
    for (Key& key : asked) key = keys[random() % keys.size()];
    const DeviceArray<Key> device_keys(*device, asked);
    const DeviceArray<float> answer(*device, asked.size() * width);
    while (!done) {
      std::vector<CacheMiss> misses;
      ASSERT_OK(cache->Query(device_keys.get(), static_cast<uint32_t>(asked.size()), answer.get(), stream.get(),
                             &misses, kNoDeadline));
      const std::vector<float> rows = answer.Get(stream.get());
      for (size_t i = 0; i < asked.size(); ++i) {
        const int version = VersionOf(asked[i], rows.data() + i * width, width);
        ASSERT_GE(version, 0) << "a torn or foreign row of key " << asked[i];
        rows_found += version > 0;
      }
    }
  };
  std::atomic<uint32_t> next_version{2};
  const auto write = [&](uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int round = 0; round < 150; ++round) {
      std::vector<Key> some(40);
      for (Key& key : some) key = keys[random() % keys.size()];
      const uint32_t version = next_version++;
      if (random() % 3 == 0) ASSERT_OK(cache->Erase(some));
      if (random() % 2 == 0) ASSERT_OK(Insert(*cache, some, version));
      ASSERT_OK(Update(*cache, some, version));
    }
  };
  std::vector<std::thread> readers, writers;
  for (uint64_t i = 0; i < 2; ++i) readers.emplace_back(read, i + 1);
  for (uint64_t i = 0; i < 2; ++i) writers.emplace_back(write, i + 11);
  for (std::thread& thread : writers) thread.join();
  WaitUntil([&] { return rows_found > 0; }, "a row to be read");
  done = true;
  for (std::thread& thread : readers) thread.join();
  ASSERT_OK(cache->Flush());
  const std::vector<Key> left = DumpAll(*cache, 7);
  EXPECT_EQ(std::set<Key>(left.begin(), left.end()).size(), left.size()) << "a key twice";
}

TEST_P(CacheConformance, RowsAreWholeUnderConcurrentWrites) { StormOf(*Make(40, 7 * 20), KeyRange(0, 200)); }

TEST_P(CacheConformance, RowsAreWholeUnderConcurrentWritesInOneBucket) {
  const auto cache = Make(33, 7 * 16);
  StormOf(*cache, KeysOfOneBucket(cache->num_buckets(), 20));
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(CacheConformance);

}  // namespace hps::testing
