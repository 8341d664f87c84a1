// Rows hold values of many sizes, so that a row of another key or version is taken for this one by no tolerance.

#include "cc/tests/whole_cache_suite.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <random>
#include <set>
#include <thread>

#include "cc/cache/row_codec.h"

namespace hps::testing {
namespace {

// Also 1, 2, 3: rows whose length is no multiple of 16 bytes.
const std::vector<uint32_t> kWidths = {1, 2, 3, 4, 7, 16, 30, 64, 128, 130, 300};

std::vector<float> Values(Key key, uint32_t version, uint32_t width) {
  std::vector<float> row(width);
  const int scale = static_cast<int>(SlotHash(static_cast<uint64_t>(key) * 7 + version) % 17) - 8;
  for (uint32_t j = 0; j < width; ++j) {
    const uint64_t hash = SlotHash(static_cast<uint64_t>(key) * 131 + version * 1'000'003ull + j);
    row[j] = std::ldexp(static_cast<float>(static_cast<int>(hash % 20'001) - 10'000), scale);
  }
  return row;
}

std::vector<float> RowsOf(const std::vector<Key>& keys, uint32_t version, uint32_t width) {
  std::vector<float> rows;
  for (const Key key : keys) {
    const std::vector<float> row = Values(key, version, width);
    rows.insert(rows.end(), row.begin(), row.end());
  }
  return rows;
}
ConstRowBuffer Buffer(const std::vector<float>& rows, uint32_t width) {
  return {reinterpret_cast<const std::byte*>(rows.data()), width * sizeof(float)};
}
uint32_t WidthOf(const DeviceCache& cache) { return cache.spec().row_bytes / sizeof(float); }

}  // namespace

std::vector<RowLayout> RowLayouts() {
  return {{"Device"},     {"Pinned", 0},  {"Int8", 7, true},       {"PinnedInt8", 0, true},
          {"Shared1", 1}, {"Shared4", 4}, {"Shared6Int8", 6, true}};
}

void WholeCacheSuite::SetUp() {
  device_ = std::get<0>(GetParam()).open();
  ASSERT_NE(device_, nullptr);
  resources_ = Value(DeviceResources::Open(device_, {.reserved = 2, .limit = 8, .size = {1024, 1 << 16}}));
}

CacheSpec WholeCacheSuite::Spec(uint32_t width) const {
  return {.name = "model 'm', table 't'",
          .row_bytes = width * 4,
          .default_value = kCacheDefault,
          .type = layout().device_ways % 7 == 0 ? CacheType::kStatic : CacheType::kUvm,
          .device_ways = layout().device_ways,
          .int8_rows = layout().int8};
}

Result<std::shared_ptr<DeviceCache>> WholeCacheSuite::TryMake(uint32_t width, const std::vector<Key>& keys,
                                                              uint32_t version) {
  return DeviceCache::MakeWhole(resources_, Spec(width), [&](const ScanVisitor& visitor) -> Status {
    for (size_t first = 0; first < keys.size(); first += 900) {
      const auto begin = keys.begin() + static_cast<ptrdiff_t>(first);
      const std::vector<Key> chunk(begin, begin + static_cast<ptrdiff_t>(std::min<size_t>(900, keys.size() - first)));
      HPS_RETURN_IF_ERROR(visitor(chunk, Buffer(RowsOf(chunk, version, width), width)));
    }
    return OkStatus();
  });
}

Status WholeCacheSuite::Update(DeviceCache& cache, const std::vector<Key>& keys, uint32_t version) {
  const std::vector<float> rows = RowsOf(keys, version, WidthOf(cache));
  return cache.Update(keys, Buffer(rows, WidthOf(cache)));
}

std::vector<float> WholeCacheSuite::Stored(Key key, uint32_t version, uint32_t width) const {
  std::vector<float> row = Values(key, version, width);
  if (!layout().int8) return row;
  std::vector<char> stored(cuda::StoredRowBytes(cuda::RowFormat::kInt8, width * 4));
  EncodeRow(cuda::RowFormat::kInt8, width * 4, row.data(), stored.data());
  DecodeRow(cuda::RowFormat::kInt8, width * 4, stored.data(), row.data());
  return row;
}

size_t WholeCacheSuite::OnDevice(const DeviceCache& cache, const std::vector<Key>& keys) const {
  std::vector<cuda::CacheBucket> buckets(cache.num_buckets());
  EXPECT_EQ(device_->Copy(buckets.data(), cache.table().buckets, buckets.size() * sizeof(buckets[0]), nullptr), 0);
  EXPECT_EQ(device_->SynchronizeStream(nullptr), 0);
  size_t there = 0;
  const std::set<Key> wanted(keys.begin(), keys.end());
  for (const cuda::CacheBucket& bucket : buckets) {
    for (uint32_t way = 0; way < cache.table().device_ways; ++way) {
      there += (bucket.state & cuda::StateHolds(static_cast<int>(way))) != 0 && wanted.contains(bucket.keys[way]);
    }
  }
  return there;
}

int WholeCacheSuite::VersionOf(Key key, const float* row, uint32_t width, std::span<const uint32_t> versions) const {
  if (std::all_of(row, row + width, [](float x) { return x == kCacheDefault; })) return 0;
  for (const uint32_t version : versions) {
    const std::vector<float> expected = Stored(key, version, width);
    if (std::equal(expected.begin(), expected.end(), row)) return static_cast<int>(version);
  }
  return -1;
}

void WholeCacheSuite::Expect(DeviceCache& cache, const std::vector<Key>& keys,
                             const std::function<uint32_t(Key)>& version) {
  const uint32_t width = WidthOf(cache);
  const auto count = static_cast<uint32_t>(keys.size());
  const DeviceArray<Key> asked(*device_, keys);
  DeviceArray<float> answer(*device_, keys.size() * width);
  for (const bool told : {true, false}) {
    if (told) {
      std::vector<CacheMiss> misses;
      ASSERT_OK(cache.Query(asked.get(), count, answer.get(), nullptr, &misses, kNoDeadline));
      std::set<Key> expected, missing;
      for (const Key key : keys) {
        if (version(key) == 0) expected.insert(key);
      }
      for (const CacheMiss& miss : misses) missing.insert(miss.key);
      ASSERT_EQ(missing, expected);
    } else {
      answer.Set(std::vector<float>(keys.size() * width));
      const cuda::QueryPart part{cache.table(), asked.get(), count, kCacheDefault, answer.get()};
      ASSERT_EQ(device_->UntoldQuery(&part, 1, nullptr), 0);
    }
    const std::vector<float> rows = answer.Get();
    for (size_t i = 0; i < keys.size(); ++i) {
      const uint32_t expected = version(keys[i]);
      ASSERT_EQ(VersionOf(keys[i], rows.data() + i * width, width, std::span(&expected, 1)), static_cast<int>(expected))
          << "key " << keys[i] << " at " << i << ", width " << width;
    }
  }
}

TEST_P(WholeCacheSuite, EveryKeyIsResidentInRowsOfAnyWidth) {
  for (const uint32_t width : kWidths) {
    std::vector<Key> keys = KeyRange(-500, 700);
    keys.insert(keys.end(), {std::numeric_limits<Key>::min(), std::numeric_limits<Key>::max()});
    const auto cache = Make(width, keys);
    EXPECT_TRUE(cache->whole());
    EXPECT_LE(cache->spec().capacity_rows, keys.size() * 100 / 94);
    const CacheMemory memory = DeviceCache::MemoryOf(cache->spec());
    EXPECT_EQ(cache->stats().device_bytes, memory.device_bytes);
    EXPECT_EQ(cache->stats().pinned_bytes, memory.pinned_bytes);
    if (layout().device_ways == 0) EXPECT_LT(memory.device_bytes, cache->num_buckets() * 64 + 64);
    const auto version = [](Key key) { return key < -500 || (key >= 200 && key < 1'000'000) ? 0u : 1u; };
    std::vector<Key> asked = KeyRange(-520, 800);
    asked.push_back(std::numeric_limits<Key>::max());
    ASSERT_NO_FATAL_FAILURE(Expect(*cache, asked, version));
    const CacheStats stats = cache->stats();  // Expect has asked twice, and told the cache of one time
    EXPECT_EQ(stats.rows_defaulted, 200u);
    EXPECT_EQ(stats.keys_asked, asked.size());
  }
}

TEST_P(WholeCacheSuite, UpdatesOverwriteAndErasesRemove) {
  for (const uint32_t width : {3u, 64u}) {
    const std::vector<Key> keys = KeyRange(0, 3000);
    const auto cache = Make(width, keys);
    ASSERT_OK(Update(*cache, KeyRange(1000, 1500), 2));
    ASSERT_OK(cache->Erase(KeyRange(2000, 100)));
    ASSERT_OK(Update(*cache, KeyRange(2050, 10), 3));  // erased: no effect
    ASSERT_OK(Update(*cache, {5'000}, 3));             // not there
    ASSERT_OK(cache->Refresh(KeyRange(10, 5), Buffer(RowsOf(KeyRange(10, 5), 4, width), width), cache->Now()));
    ASSERT_OK(cache->Flush());
    Expect(*cache, KeyRange(0, 3010), [](Key key) -> uint32_t {
      if (key >= 3000 || (key >= 2000 && key < 2100)) return 0;
      if (key >= 10 && key < 15) return 4;
      return key >= 1000 && key < 2500 ? 2 : 1;
    });
    ExpectError(cache->Insert(KeyRange(2000, 1), Buffer(RowsOf({2000}, 1, width), width), cache->Now()),
                StatusCode::kFailedPrecondition, {"table 't'", "dynamic"});
  }
}

TEST_P(WholeCacheSuite, ATableMayChangeBetweenItsScans) {
  int scans = 0;
  const auto cache = Value(DeviceCache::MakeWhole(resources_, Spec(8), [&](const ScanVisitor& visitor) -> Status {
    const std::vector<Key> chunk = scans++ == 0 ? KeyRange(0, 1000) : KeyRange(100, 1000);
    HPS_RETURN_IF_ERROR(visitor(chunk, Buffer(RowsOf(chunk, 1, 8), 8)));
    return visitor(KeyRange(500, 10), Buffer(RowsOf(KeyRange(500, 10), 2, 8), 8));  // again, newer
  }));
  Expect(*cache, KeyRange(0, 1200), [](Key key) -> uint32_t {
    return key < 100 || key >= 1000 ? 0 : key >= 500 && key < 510 ? 2 : 1;
  });
}

TEST_P(WholeCacheSuite, SeveralTablesInOneCallAndOthersBeside) {
  const std::vector<Key> keys = KeyRange(0, 500);
  const auto narrow = Make(7, keys), wide = Make(128, keys, 2),
             dynamic = Value(DeviceCache::Make(resources_, SpecOf(16, 7000)));
  ASSERT_OK(UpdateTo(*dynamic, keys, 1));  // not there: all of its keys miss
  const DeviceArray<Key> asked(*device_, keys);
  const DeviceArray<float> first(*device_, 500 * 7), second(*device_, 500 * 128), third(*device_, 500 * 16);
  const auto source = std::make_shared<MapSource>(std::vector<uint32_t>{7, 128, 16});
  source->Put(2, keys, 5);
  const DeviceLookup lookups(resources_, source, nullptr, {});
  std::vector<CachedLookup> parts = {{narrow, 0, asked.get(), 500, first.get()},
                                     {wide, 1, asked.get(), 500, second.get()},
                                     {dynamic, 2, asked.get(), 500, third.get()}};
  for (const size_t tables : {2, 3}) {
    LookupReport report;
    ASSERT_OK(lookups.Lookup(std::span(parts).first(tables), nullptr, {}, &report));
    EXPECT_EQ(report.rows_unwaited, tables == 2 ? 1000u : 0u);
    const std::vector<float> a = first.Get(), b = second.Get(), c = third.Get();
    for (size_t i = 0; i < keys.size(); ++i) {
      const uint32_t one = 1, two = 2;
      ASSERT_EQ(VersionOf(keys[i], a.data() + i * 7, 7, std::span(&one, 1)), 1);
      ASSERT_EQ(VersionOf(keys[i], b.data() + i * 128, 128, std::span(&two, 1)), 2);
      if (tables == 3) ASSERT_EQ(VersionOfRow(keys[i], c.data() + i * 16, 16), 5);
    }
  }
}

TEST_P(WholeCacheSuite, RowsAreWholeBesideUpdates) {
  for (const uint32_t width : {5u, 64u, 160u}) {
    const std::vector<Key> keys = KeyRange(0, 300);
    const auto cache = Make(width, keys);
    std::atomic<bool> done{false};
    std::atomic<uint64_t> answers{0};
    std::vector<uint32_t> versions(12);
    for (uint32_t v = 0; v < versions.size(); ++v) versions[v] = v + 1;
    std::vector<std::thread> readers;
    for (int r = 0; r < 2; ++r) {
      readers.emplace_back([&, r] {
        std::mt19937 random(static_cast<unsigned>(r));
        TestStream stream(*device_);
        std::vector<Key> asked(200);
        for (Key& key : asked) key = static_cast<Key>(random() % keys.size());
        const DeviceArray<Key> device_keys(*device_, asked);
        const DeviceArray<float> rows(*device_, asked.size() * width);
        const cuda::QueryPart part{cache->table(), device_keys.get(), 200, kCacheDefault, rows.get()};
        while (!done) {
          ASSERT_EQ(device_->UntoldQuery(&part, 1, stream.get()), 0);
          const std::vector<float> answer = rows.Get(stream.get());
          for (size_t i = 0; i < asked.size(); ++i) {
            ASSERT_GT(VersionOf(asked[i], answer.data() + i * width, width, versions), 0) << "a torn row";
          }
          cache->CountAsked(5000);  // rows change places meanwhile
          ++answers;
        }
      });
    }
    for (const uint32_t version : versions) ASSERT_OK(Update(*cache, keys, version));
    ASSERT_OK(cache->Flush());
    WaitUntil([&] { return answers > 2; }, "an answer");
    done = true;
    for (std::thread& reader : readers) reader.join();
    Expect(*cache, keys, [](Key) { return 12u; });
  }
}

// Rows that are read often come to lie in memory of the device, also when others become the ones that are.
TEST_P(WholeCacheSuite, OftenReadRowsComeToTheDevice) {
  if (layout().device_ways % 7 == 0) {  // nothing can change places
    const auto cache = Make(16, KeyRange(0, 1000));
    cache->CountAsked(1'000'000);
    ASSERT_OK(cache->Flush());
    EXPECT_EQ(cache->stats().rows_exchanged, 0u);
    return;
  }
  const std::vector<Key> keys = KeyRange(0, 5000);
  const auto cache = Make(16, keys);
  const DeviceLookup lookups(resources_, std::make_shared<MapSource>(std::vector<uint32_t>{16}), nullptr, {});
  std::mt19937_64 random(7);
  uint64_t exchanged = 0;
  for (const Key first : {700, 3500}) {
    const std::vector<Key> hot = KeyRange(first, 250);
    // So many find a place: a bucket has places for some, and whose hot rows are more keeps the others out.
    const double places = layout().device_ways == 1 ? 0.75 : 0.97;
    for (int round = 0; round < 50; ++round) {
      std::vector<Key> some = hot;  // half of the reads go to a twentieth of the rows
      for (int i = 0; i < 500; ++i) some.push_back(hot[random() % hot.size()]);
      for (int i = 0; i < 750; ++i) some.push_back(keys[random() % keys.size()]);
      const Asked asked(*device_, cache, 0, some);
      const CachedLookup lookup = asked.lookup();
      ASSERT_OK(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, nullptr));
      (void)asked.rows.Get();
      ASSERT_OK(cache->Flush());  // a writer that is busy starts no exchange
    }
    EXPECT_GT(OnDevice(*cache, hot), static_cast<size_t>(places * static_cast<double>(hot.size())));
    EXPECT_GT(cache->stats().rows_exchanged, exchanged);
    exchanged = cache->stats().rows_exchanged;
  }
  ASSERT_NO_FATAL_FAILURE(Expect(*cache, keys, [](Key) { return 1u; }));
  // A place that is given up is taken by a row that is read often.
  const size_t there = OnDevice(*cache, keys);
  ASSERT_OK(cache->Erase(KeyRange(3500, 125)));
  const std::vector<Key> rest = KeyRange(0, 2500);
  const Asked asked(*device_, cache, 0, rest);
  for (int round = 0; round < 40; ++round) {
    const CachedLookup lookup = asked.lookup();
    ASSERT_OK(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, nullptr));
    (void)asked.rows.Get();
    ASSERT_OK(cache->Flush());
  }
  EXPECT_GT(OnDevice(*cache, keys), there - 40);
  Expect(*cache, keys, [](Key key) -> uint32_t { return key >= 3500 && key < 3625 ? 0 : 1; });
}

TEST_P(WholeCacheSuite, PooledSumsAreTheRowsSumsToTheBit) {
  const std::vector<Key> keys = KeyRange(0, 2000);
  for (const uint32_t width : {5u, 16u, 128u, 200u}) {
    const auto cache = Make(width, keys);
    const DeviceLookup lookups(resources_, std::make_shared<MapSource>(std::vector<uint32_t>{width}), nullptr, {});
    std::mt19937_64 random(width);
    std::vector<Key> asked(700);
    for (Key& key : asked) key = static_cast<Key>(random() % 2050);  // some are nowhere
    std::vector<int64_t> splits = {0, 1, 1, 20, 33, 400, 700};
    std::vector<float> weights(asked.size());
    for (float& weight : weights) weight = static_cast<float>(random() % 100) / 16.0f;
    const size_t rows = splits.size() - 1;
    const DeviceArray<Key> device_keys(*device_, asked);
    const DeviceArray<int64_t> device_splits(*device_, splits);
    const DeviceArray<float> device_weights(*device_, weights), answer(*device_, rows * width);
    for (const bool weighted : {false, true}) {
      PooledLookup lookup;
      lookup.cache = cache;
      lookup.keys = device_keys.get();
      lookup.part = {.width = width,
                     .keys = device_keys.get(),
                     .count = static_cast<uint32_t>(asked.size()),
                     .rows = static_cast<uint32_t>(rows),
                     .row_splits = device_splits.get(),
                     .weights = weighted ? device_weights.get() : nullptr,
                     .combiner = Combiner::kSum,
                     .output = answer.get()};
      ASSERT_OK(lookups.LookupPooled(std::span(&lookup, 1), nullptr, {}, nullptr));
      const std::vector<float> sums = answer.Get();
      for (size_t r = 0; r < rows; ++r) {
        for (uint32_t j = 0; j < width; ++j) {
          const auto n = static_cast<uint32_t>(splits[r + 1] - splits[r]);
          std::vector<float> values;
          double sum = 0;
          for (int64_t i = splits[r]; i < splits[r + 1]; ++i) {
            const Key key = asked[static_cast<size_t>(i)];
            values.push_back(key < 2000 ? Stored(key, 1, width)[j] : kCacheDefault);
            sum += double{weights[static_cast<size_t>(i)]} * double{values.back()};
          }
          float expected = n == 0 ? 0.0f : static_cast<float>(sum);
          if (n > 0 && !weighted) {
            const uint32_t head = cuda::PooledHead(n);
            expected = values[0];
            for (uint32_t i = 1; i < head; ++i) expected += values[i];
            for (uint32_t i = head; i < n; i += 8) {
              float block = values[i];
              for (uint32_t k = 1; k < 8; ++k) block += values[i + k];
              expected += block;
            }
          }
          ASSERT_EQ(sums[r * width + j], expected) << "row " << r << ", column " << j << ", width " << width;
        }
      }
    }
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(WholeCacheSuite);

}  // namespace hps::testing
