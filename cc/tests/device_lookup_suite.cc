// Exact and deferred misses, reports, and updates that race with fills.

#include "cc/tests/device_lookup_suite.h"

#include <atomic>
#include <random>
#include <set>
#include <thread>

#include "cc/cache/cache_refresher.h"

namespace hps::testing {
namespace {

bool IsHost(const cuda::Device& device) { return dynamic_cast<const HostDevice*>(&device) != nullptr; }
// 0 for a GPU, which does not count.
uint64_t QueryLaunches(const cuda::Device& device) {
  const auto* host = dynamic_cast<const HostDevice*>(&device);
  return host == nullptr ? 0 : host->launches(HostDevice::kQuery);
}

uint64_t NotServed(const CacheStats& stats) {
  return stats.rows_missed + stats.rows_deferred + stats.rows_defaulted + stats.rows_repeated;
}

}  // namespace

TEST_P(DeviceLookupSuite, MissesAreFetchedOnceAndKept) {
  source_->Put(0, KeyRange(0, 100), 1);
  const DeviceLookup lookups = Lookups();
  std::vector<Key> keys = KeyRange(50, 100);  // 100 .. 149 are nowhere
  keys.insert(keys.end(), {60, 60, 120, 61});
  const auto version = [](Key key) { return key < 100 ? 1 : 0; };
  LookupReport report;
  Expect(lookups, keys, version, &report);
  EXPECT_EQ(report.keys, 104u);
  EXPECT_EQ(report.rows_from_cache, 0u);
  EXPECT_EQ(report.rows_from_volatile, 50u);
  EXPECT_EQ(report.rows_from_default, 50u);
  EXPECT_EQ(report.rows_repeated, 4u);
  std::vector<Key> asked = source_->TakeAsked();
  EXPECT_EQ(std::set<Key>(asked.begin(), asked.end()).size(), asked.size());

  Expect(lookups, keys, version, &report);
  EXPECT_EQ(report.rows_from_cache, 53u);
  EXPECT_EQ(report.rows_from_volatile, 0u);
  EXPECT_EQ(report.rows_from_default, 50u);
  EXPECT_EQ(report.rows_repeated, 1u);
  asked = source_->TakeAsked();
  EXPECT_EQ(asked.size(), 50u) << "only keys that no tier holds are asked again";

  source_->Put(0, {120}, 5);  // a new key is seen at once
  Expect(lookups, {120}, [](Key) { return 5; });
  const int fetches = source_->fetches();
  Expect(lookups, KeyRange(50, 50), version);
  EXPECT_EQ(source_->fetches(), fetches) << "all hit: no tier is asked";
}

TEST_P(DeviceLookupSuite, CachesCountWhatReportsSay) {
  source_->Put(0, KeyRange(0, 100), 1);
  const DeviceLookup lookups = Lookups(0.9);
  LookupReport all;
  const auto look = [&](const std::vector<Key>& keys) {
    const Asked asked(*device_, cache_, 0, keys);
    const CachedLookup lookup = asked.lookup();
    LookupReport report;
    ASSERT_OK(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, &report));
    EXPECT_EQ(report.keys, report.rows_from_cache + report.rows_from_volatile + report.rows_from_persistent +
                               report.rows_from_default + report.rows_deferred + report.rows_repeated +
                               report.rows_unwaited);
    asked.Versions();  // waits for the stream, which writes to `asked`
    all.keys += report.keys;
    all.rows_repeated += report.rows_repeated;
    all.rows_from_cache += report.rows_from_cache;
    all.rows_from_volatile += report.rows_from_volatile;
    all.rows_from_default += report.rows_from_default;
    all.rows_deferred += report.rows_deferred;
  };
  look(KeyRange(0, 60));
  look(KeyRange(0, 63));
  inserts_->Drain();
  ASSERT_OK(cache_->Flush());
  look(KeyRange(0, 120));
  source_->AfterRead([&](const FetchLimits&) { ASSERT_OK(UpdateTo(*cache_, {5}, 1)); });
  ASSERT_OK(cache_->Erase(std::vector<Key>{5, 6}));
  ASSERT_OK(cache_->Flush());
  look({5, 5, 6});
  const CacheStats stats = cache_->stats();
  EXPECT_EQ(stats.keys_asked, all.keys);
  EXPECT_EQ(stats.rows_served, all.rows_from_cache);
  EXPECT_EQ(stats.rows_missed, all.rows_from_volatile + all.rows_from_default);
  EXPECT_EQ(stats.rows_deferred, all.rows_deferred);
  EXPECT_EQ(stats.rows_deferred, 3u);
  EXPECT_EQ(stats.rows_defaulted, 0u);
  EXPECT_EQ(stats.rows_repeated, all.rows_repeated);
  EXPECT_EQ(stats.rows_repeated, 1u);
  EXPECT_EQ(stats.fills_outdated, 1u);
  EXPECT_EQ(stats.rows_outdated, 1u);
}

// Three tables in one call: hits, misses and deferred keys of each; the third is a cache of a whole table.
TEST_P(DeviceLookupSuite, EachTableHasItsCounts) {
  source_->Put(0, KeyRange(0, 100), 1);
  source_->Put(1, KeyRange(0, 100), 2);
  const auto wide = Value(DeviceCache::Make(resources_, SpecOf(16, 7000)));
  CacheSpec spec = SpecOf(7, 0);
  spec.type = CacheType::kStatic;
  const std::vector<float> row(7, 3.0f);
  const auto whole = Value(DeviceCache::MakeWhole(resources_, spec, [&](const ScanVisitor& visitor) -> Status {
    const Key key = 5;
    return visitor(std::span(&key, 1), {reinterpret_cast<const std::byte*>(row.data()), 28});
  }));
  const DeviceLookup lookups = Lookups(0.75);
  const auto look = [&](const std::vector<Key>& narrow_keys, const std::vector<Key>& wide_keys,
                        const std::vector<Key>& whole_keys) {
    const Asked first(*device_, cache_, 0, narrow_keys), second(*device_, wide, 1, wide_keys),
        third(*device_, whole, 2, whole_keys);
    const CachedLookup calls[] = {first.lookup(), second.lookup(), third.lookup()};
    LookupReport report;
    ASSERT_OK(lookups.Lookup(calls, nullptr, {}, &report));
    first.Versions();  // waits for the stream
    inserts_->Drain();
    ASSERT_OK(cache_->Flush());
  };
  const auto expect = [](const DeviceCache& cache, const CacheStats& expected) {
    const CacheStats stats = cache.stats();
    EXPECT_EQ(stats.keys_asked, expected.keys_asked);
    EXPECT_EQ(stats.rows_served, expected.rows_served);
    EXPECT_EQ(stats.rows_missed, expected.rows_missed);
    EXPECT_EQ(stats.rows_deferred, expected.rows_deferred);
    EXPECT_EQ(stats.rows_defaulted, expected.rows_defaulted);
    EXPECT_EQ(stats.rows_repeated, expected.rows_repeated);
    EXPECT_EQ(stats.keys_asked, stats.rows_served + NotServed(stats));
  };
  // One table misses, and repeats: all of it is that table's.
  look({1, 1, 1, 2}, {}, {5, 5});
  expect(*cache_, {.keys_asked = 4, .rows_missed = 2, .rows_repeated = 2});
  expect(*wide, {});
  expect(*whole, {.keys_asked = 2, .rows_served = 2});
  // All hit in one, one is deferred in another, the third has a default.
  look({1, 2, 1, 2}, {1, 2, 3, 4, 5, 6, 7, 8}, {5, 6});
  look({1}, {1, 2, 3, 4, 5, 6, 7, 9}, {});
  expect(*cache_, {.keys_asked = 9, .rows_served = 5, .rows_missed = 2, .rows_repeated = 2});
  expect(*wide, {.keys_asked = 16, .rows_served = 7, .rows_missed = 8, .rows_deferred = 1});
  expect(*whole, {.keys_asked = 4, .rows_served = 3, .rows_defaulted = 1});
  // Two miss 3 + 1 keys with 5 + 3 further positions. These are shared out 6 : 2, but the first has 5 left.
  look({20, 21, 22, 20, 21, 22, 20, 21}, {30, 30, 30, 30}, {});
  expect(*cache_, {.keys_asked = 17, .rows_served = 5, .rows_missed = 5, .rows_repeated = 7});
  expect(*wide, {.keys_asked = 20, .rows_served = 7, .rows_missed = 9, .rows_deferred = 1, .rows_repeated = 3});
  // A lookup that fails has asked; one that was not launched has not.
  source_->Fail(Unavailable("gone"));
  const Asked missing(*device_, cache_, 0, {50, 51});
  const CachedLookup lookup = missing.lookup();
  EXPECT_EQ(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, nullptr).code(), StatusCode::kUnavailable);
  expect(*cache_, {.keys_asked = 19, .rows_served = 5, .rows_missed = 7, .rows_repeated = 7});
}

TEST_P(DeviceLookupSuite, ManyTablesInOneCall) {
  source_->Put(0, KeyRange(0, 50), 1);
  source_->Put(1, KeyRange(0, 50), 2);
  source_->Put(2, KeyRange(0, 50), 3);
  std::vector<std::shared_ptr<DeviceCache>> caches{cache_, Value(DeviceCache::Make(resources_, SpecOf(16, 700))),
                                                   Value(DeviceCache::Make(resources_, SpecOf(7, 700)))};
  for (const size_t tables : {3, 48, 49, 120}) {
    for (int turn = 0; turn < 2; ++turn) {
      std::vector<std::unique_ptr<Asked>> asked;
      std::vector<CachedLookup> lookups;
      for (size_t i = 0; i < tables; ++i) {
        std::vector<Key> keys = KeyRange(static_cast<Key>(i % 7), i % 4 == 1 ? 0 : 60);
        asked.push_back(std::make_unique<Asked>(*device_, caches[i % 3], i % 3, std::move(keys)));
        lookups.push_back(asked.back()->lookup());
      }
      const uint64_t launches = QueryLaunches(*device_);
      LookupReport report;
      ASSERT_OK(Lookups().Lookup(lookups, nullptr, {}, &report));
      if (IsHost(*device_)) EXPECT_EQ(QueryLaunches(*device_) - launches, (tables + 47) / 48);
      EXPECT_EQ(report.keys,
                report.rows_from_cache + report.rows_from_volatile + report.rows_from_default + report.rows_repeated);
      for (const auto& part : asked) {
        const std::vector<int> versions = part->Versions();
        for (size_t i = 0; i < part->keys.size(); ++i) {
          ASSERT_EQ(versions[i], part->keys[i] < 50 ? static_cast<int>(part->table) + 1 : 0) << part->keys[i];
        }
      }
    }
  }
}

TEST_P(DeviceLookupSuite, NothingToAsk) {
  LookupReport report;
  ASSERT_OK(Lookups().Lookup({}, nullptr, {}, &report));
  EXPECT_EQ(report.keys, 0u);
  Expect(Lookups(), {}, [](Key) { return 0; });
  EXPECT_EQ(QueryLaunches(*device_), 0u);
}

TEST_P(DeviceLookupSuite, BelowTheThresholdTheAnswerIsExactAboveItIsDeferred) {
  source_->Put(0, KeyRange(0, 200), 1);
  const DeviceLookup lookups = Lookups(0.5);
  LookupReport report;
  const auto there = [](Key) { return 1; };
  Expect(lookups, KeyRange(0, 100), there, &report);  // nothing was there: exact
  EXPECT_EQ(report.rows_deferred, 0u);

  Expect(
      lookups, KeyRange(0, 150), [](Key key) { return key < 100 ? 1 : 0; }, &report);  // two thirds were there
  EXPECT_EQ(report.rows_from_cache, 100u);
  EXPECT_EQ(report.rows_deferred, 50u);
  EXPECT_EQ(report.rows_from_volatile, 0u);
  inserts_->Drain();
  ASSERT_OK(cache_->Flush());
  EXPECT_EQ(inserts_->stats().inserted, 50u);
  Expect(lookups, KeyRange(0, 150), there, &report);
  EXPECT_EQ(report.rows_from_cache, 150u);

  // A repeated missing key counts with its repetitions.
  std::vector<Key> keys = KeyRange(0, 10);
  keys.insert(keys.end(), 20, 160);
  Expect(lookups, keys, there, &report);
  EXPECT_EQ(report.rows_deferred, 0u);
  EXPECT_EQ(report.rows_repeated, 19u);

  // Above 1: never deferred. 0: always.
  Expect(Lookups(1.5), KeyRange(161, 1), there, &report);
  Expect(
      Lookups(0.0), KeyRange(170, 3), [](Key) { return 0; }, &report);
  EXPECT_EQ(report.rows_deferred, 3u);
  // 1: only where nothing is missing, so exact as well.
  Expect(Lookups(1.0), KeyRange(100, 70), there, &report);
}

TEST_P(DeviceLookupSuite, TheThresholdIsEachTablesOwn) {
  source_->Put(0, KeyRange(0, 100), 1);
  source_->Put(1, KeyRange(0, 100), 2);
  const auto other = Value(DeviceCache::Make(resources_, SpecOf(16, 700)));
  const DeviceLookup lookups = Lookups(0.6);
  Expect(lookups, KeyRange(0, 90), [](Key) { return 1; });
  const Asked warm(*device_, cache_, 0, KeyRange(0, 100)), cold(*device_, other, 1, KeyRange(0, 100));
  const CachedLookup both[] = {warm.lookup(), cold.lookup()};
  LookupReport report;
  ASSERT_OK(lookups.Lookup(both, nullptr, {}, &report));
  EXPECT_EQ(report.rows_deferred, 10u);
  EXPECT_EQ(report.rows_from_volatile, 100u);
  const std::vector<int> versions = warm.Versions();
  for (Key key = 0; key < 100; ++key) EXPECT_EQ(versions[static_cast<size_t>(key)], key < 90 ? 1 : 0);
  EXPECT_EQ(cold.Versions(), std::vector<int>(100, 2));
}

TEST_P(DeviceLookupSuite, DeferredKeysBeyondTheQueueAreDroppedAndCounted) {
  inserts_ = std::make_shared<InsertQueue>(25);
  source_->Put(0, KeyRange(0, 100), 1);
  std::atomic<bool> go{false};
  source_->AfterRead([&](const FetchLimits&) {
    while (!go) std::this_thread::yield();
  });
  const DeviceLookup lookups = Lookups(0.0);
  const auto nothing = [](Key) { return 0; };
  Expect(lookups, KeyRange(0, 10), nothing);
  Expect(lookups, KeyRange(0, 10), nothing);   // queued already
  Expect(lookups, KeyRange(10, 10), nothing);  // fits
  Expect(lookups, KeyRange(20, 10), nothing);  // does not
  EXPECT_EQ(inserts_->stats().repeated, 10u);
  EXPECT_EQ(inserts_->stats().dropped, 10u);
  go = true;
  inserts_->Drain();
  EXPECT_EQ(inserts_->stats().inserted, 20u);
  EXPECT_EQ(inserts_->stats().queued, 0u);
  source_->Fail(Unavailable("the tier is down"));
  Expect(lookups, KeyRange(40, 5), nothing);
  inserts_->Drain();
  EXPECT_EQ(inserts_->stats().failed, 5u);
  ExpectError(inserts_->last_error(), StatusCode::kUnavailable, {"tier is down"});
  inserts_->Stop();
  Expect(lookups, KeyRange(50, 5), nothing);
  EXPECT_EQ(inserts_->stats().dropped, 15u);
}

TEST_P(DeviceLookupSuite, StopCancelsAFetchUnderWay) {
  source_->Put(0, KeyRange(0, 100), 1);
  std::atomic<bool> reading{false};
  source_->AfterRead([&](const FetchLimits& limits) {
    reading = true;
    while (!limits.cancelled->load()) std::this_thread::yield();
  });
  Expect(Lookups(0.0), KeyRange(0, 10), [](Key) { return 0; });
  WaitUntil([&] { return reading.load(); }, "the fetch");
  inserts_->Stop();
  EXPECT_EQ(inserts_->stats().dropped, 10u);
  EXPECT_EQ(inserts_->stats().queued, 0u);
}

TEST_P(DeviceLookupSuite, AFailingTierFailsTheLookupAndNothingIsKept) {
  source_->Put(0, KeyRange(0, 10), 1);
  source_->Fail(Unavailable("the tier is down"));
  const Asked asked(*device_, cache_, 0, KeyRange(0, 10));
  const CachedLookup lookup = asked.lookup();
  ExpectError(Lookups().Lookup(std::span(&lookup, 1), nullptr, {}, nullptr), StatusCode::kUnavailable, {"tier"});
  EXPECT_EQ(resources_.workspaces->stats().lent, 0u);
  source_->Fail(OkStatus());
  Expect(Lookups(), KeyRange(0, 10), [](Key) { return 1; });
}

// The tiers were read, then the update came: it finds no row in the cache, and the old row is on its way.
TEST_P(DeviceLookupSuite, AnUpdateBetweenReadAndFillIsNotUndone) {
  source_->Put(0, KeyRange(0, 10), 1);
  bool updated = false;
  source_->AfterRead([&](const FetchLimits&) {
    if (std::exchange(updated, true)) return;
    source_->Put(0, {3, 4}, 2);
    ASSERT_OK(UpdateTo(*cache_, {3, 4}, 2));
    source_->Erase(0, 5);
    ASSERT_OK(cache_->Erase(std::vector<Key>{5}));
  });
  Expect(Lookups(), KeyRange(0, 10), [](Key) { return 1; });  // may be old: it began before the update
  EXPECT_EQ(cache_->stats().rows_outdated, 3u);
  Expect(Lookups(), KeyRange(0, 10), [](Key key) { return key == 3 || key == 4 ? 2 : key == 5 ? 0 : 1; });
}

TEST_P(DeviceLookupSuite, ADeferredInsertDoesNotUndoAnUpdate) {
  source_->Put(0, KeyRange(0, 10), 1);
  bool updated = false;
  source_->AfterRead([&](const FetchLimits&) {
    if (std::exchange(updated, true)) return;
    source_->Put(0, {3}, 2);
    ASSERT_OK(UpdateTo(*cache_, {3}, 2));
  });
  Expect(Lookups(0.0), KeyRange(0, 10), [](Key) { return 0; });
  inserts_->Drain();
  ASSERT_OK(cache_->Flush());
  Expect(Lookups(), KeyRange(0, 10), [](Key key) { return key == 3 ? 2 : 1; });
}

// Rows of several tables come in pieces and in any order, some of them nowhere to be had; more than one copy's worth.
TEST_P(DeviceLookupSuite, RowsThatArriveInPieces) {
  constexpr size_t kKeys = 11'000;  // staging of them is copied
  const std::vector<std::shared_ptr<DeviceCache>> caches{Value(DeviceCache::Make(resources_, SpecOf(4, 40'000))),
                                                         Value(DeviceCache::Make(resources_, SpecOf(16, 40'000))),
                                                         Value(DeviceCache::Make(resources_, SpecOf(7, 40'000)))};
  const auto version = [](uint32_t table, Key key) { return key % 10 == 0 ? 0 : static_cast<int>(table) + 1; };
  for (uint32_t table = 0; table < 3; ++table) {
    std::vector<Key> there;
    for (Key key = 0; key < 4 * static_cast<Key>(kKeys); ++key) {
      if (version(table, key) > 0) there.push_back(key);
    }
    source_->Put(table, there, table + 1);
  }
  Key first = 0;
  // The last of it all at once, and in a call so small that nothing is copied.
  for (const auto& [piece, keys] :
       {std::pair{size_t{100}, kKeys}, {size_t{4500}, kKeys}, {size_t{0}, kKeys}, {size_t{16}, size_t{90}}}) {
    source_->ArriveInPieces(piece, 2);
    for (int turn = 0; turn < 2; ++turn) {
      std::vector<std::unique_ptr<Asked>> asked;
      std::vector<CachedLookup> lookups;
      for (uint32_t table = 0; table < 3; ++table) {
        std::vector<Key> some = KeyRange(first, keys);
        some.insert(some.end(), some.begin(), some.begin() + 50);  // asked twice
        asked.push_back(std::make_unique<Asked>(*device_, caches[table], table, std::move(some)));
        lookups.push_back(asked.back()->lookup());
      }
      LookupReport report;
      ASSERT_OK(Lookups().Lookup(lookups, nullptr, {}, &report));
      EXPECT_EQ(report.rows_from_default, 3 * keys / 10);
      if (turn == 0) EXPECT_EQ(report.rows_from_volatile, 3 * (keys - keys / 10));
      for (const auto& part : asked) {
        const std::vector<int> versions = part->Versions();
        for (size_t i = 0; i < part->keys.size(); ++i) {
          ASSERT_EQ(versions[i], version(part->table, part->keys[i])) << part->table << ": " << part->keys[i];
        }
      }
    }
    first += static_cast<Key>(keys);
  }
}

// What is on its way when the lookup ends early does no harm, to this call's cache and to the next call.
TEST_P(DeviceLookupSuite, AnEndInTheMiddleOfThePiecesLeavesNothingWrong) {
  const std::vector<Key> keys = KeyRange(0, 20'000);
  cache_ = Value(DeviceCache::Make(resources_, SpecOf(16, 120'000)));
  source_->Put(1, keys, 1);
  std::atomic<bool> cancelled{false};
  for (const bool cancels : {false, true}) {
    for (const int last : {1, 7, 25}) {
      source_->ArriveInPieces(600, 2, [&](int pieces) {
        if (pieces < last) return OkStatus();
        cancelled = true;
        return cancels ? Cancelled("given up") : Unavailable("the tier is down");
      });
      const Asked asked(*device_, cache_, 1, keys);
      const CachedLookup lookup = asked.lookup();
      cancelled = false;
      ExpectError(Lookups().Lookup(std::span(&lookup, 1), nullptr, {.cancelled = &cancelled}, nullptr),
                  cancels ? StatusCode::kCancelled : StatusCode::kUnavailable, {cancels ? "given up" : "tier"});
      EXPECT_EQ(resources_.workspaces->stats().lent, 0u);
      asked.Versions();  // waits for the stream
    }
  }
  // Other rows in the same staging.
  source_->Put(1, keys, 2);
  source_->ArriveInPieces(600, 2);
  const Asked asked(*device_, cache_, 1, keys);
  const CachedLookup lookup = asked.lookup();
  for (int turn = 0; turn < 2; ++turn) {
    LookupReport report;
    ASSERT_OK(Lookups().Lookup(std::span(&lookup, 1), nullptr, {}, &report));
    EXPECT_GE(report.rows_from_cache, turn == 0 ? 0u : keys.size() * 99 / 100);  // a bucket may be full
    EXPECT_EQ(report.rows_from_volatile, keys.size() - report.rows_from_cache);
    EXPECT_EQ(asked.Versions(), std::vector<int>(keys.size(), 2));
  }
}

// Some rows were read before the update and are on the device already, others are read after it.
TEST_P(DeviceLookupSuite, AnUpdateBetweenPiecesIsNotUndone) {
  const std::vector<Key> keys = KeyRange(0, 20'000);
  cache_ = Value(DeviceCache::Make(resources_, SpecOf(16, 120'000)));
  source_->Put(1, keys, 1);
  const auto updated = [](Key key) { return key % 100 == 3; };
  std::vector<Key> some;
  std::copy_if(keys.begin(), keys.end(), std::back_inserter(some), updated);
  source_->ArriveInPieces(600, 1, [&](int pieces) {
    if (pieces != 16) return OkStatus();
    source_->Put(1, some, 2);
    return UpdateTo(*cache_, some, 2);
  });
  const Asked asked(*device_, cache_, 1, keys);
  const CachedLookup lookup = asked.lookup();
  ASSERT_OK(Lookups().Lookup(std::span(&lookup, 1), nullptr, {}, nullptr));
  const std::vector<int> first = asked.Versions();
  EXPECT_GE(cache_->stats().rows_outdated, some.size());
  source_->ArriveInPieces(0, 1);
  LookupReport report;
  ASSERT_OK(Lookups().Lookup(std::span(&lookup, 1), nullptr, {}, &report));
  EXPECT_GE(report.rows_from_volatile, some.size());
  const std::vector<int> second = asked.Versions();
  int old = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    ASSERT_EQ(second[i], updated(keys[i]) ? 2 : 1) << keys[i];
    ASSERT_TRUE(first[i] == 1 || (first[i] == 2 && updated(keys[i]))) << keys[i];
    old += updated(keys[i]) && first[i] == 1;
  }
  EXPECT_GT(old, 0) << "no row was read before the update";
  EXPECT_LT(old, static_cast<int>(some.size())) << "no row was read after it";
}

// Lookups from several streams, some exact and some deferred, beside updates, erasures and refresh, in a cache too
// small for the keys. While it runs no row is torn; at rest the cache agrees with the tiers.
TEST_P(DeviceLookupSuite, NoOldRowStaysAfterAStormOfUpdates) {
  const std::vector<Key> keys = KeyRange(0, 300);
  source_->Put(0, keys, 1);
  cache_ = Value(DeviceCache::Make(resources_, SpecOf(4, 7 * 32)));
  std::atomic<bool> done{false};
  std::atomic<uint64_t> rows_checked{0};
  const auto look = [&](uint64_t seed, bool deferring) {
    std::mt19937_64 random(seed);
    TestStream stream(*device_);
    const DeviceLookup lookups = Lookups(deferring ? std::optional(0.3) : std::nullopt);
    std::vector<std::unique_ptr<Asked>> batches;
    for (int i = 0; i < 4; ++i) {
      std::vector<Key> asked(50);
      for (Key& key : asked) key = keys[random() % keys.size()];
      batches.push_back(std::make_unique<Asked>(*device_, cache_, 0, asked));
    }
    while (!done) {
      const Asked& asked = *batches[random() % batches.size()];
      const CachedLookup lookup = asked.lookup();
      ASSERT_OK(lookups.Lookup(std::span(&lookup, 1), stream.get(), {}, nullptr));
      for (const int version : asked.Versions(stream.get())) ASSERT_GE(version, deferring ? 0 : 1) << "a wrong row";
      rows_checked += asked.keys.size();
    }
  };
  const auto update = [&](uint64_t seed) {
    std::mt19937_64 random(seed);
    // Each writer has keys of its own, so that versions of a key come in order.
    for (uint32_t version = 2; version < 300; ++version) {
      std::vector<Key> some;
      for (int i = 0; i < 10; ++i) some.push_back(static_cast<Key>(random() % 150 * 2 + seed % 2));
      source_->Put(0, some, version);
      ASSERT_OK(UpdateTo(*cache_, some, version));
      if (version % 16 == 0) ASSERT_OK(cache_->Erase(some));
    }
  };
  CacheRefresher refresher;
  refresher.Add({.cache = cache_, .source = source_, .fraction = 0.3, .interval = std::chrono::milliseconds(1)});
  std::vector<std::thread> lookers, writers;
  for (uint64_t i = 0; i < 3; ++i) lookers.emplace_back(look, i + 1, i == 2);
  for (uint64_t i = 0; i < 2; ++i) writers.emplace_back(update, i + 20);
  for (std::thread& thread : writers) thread.join();
  WaitUntil([&] { return rows_checked > 0; }, "a lookup");
  WaitUntil([&] { return refresher.stats().refreshes > 0; }, "a refresh");
  refresher.Stop();
  done = true;
  for (std::thread& thread : lookers) thread.join();
  inserts_->Drain();
  ASSERT_OK(cache_->Flush());
  const int fetches = source_->fetches();
  std::vector<Key> held;
  ASSERT_OK(cache_->Dump(0, cache_->num_buckets(), &held));
  EXPECT_FALSE(held.empty());
  Expect(Lookups(), held, [&](Key key) { return static_cast<int>(source_->VersionOf(0, key)); });
  EXPECT_EQ(source_->fetches(), fetches) << "those rows came from the cache";
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(DeviceLookupSuite);

}  // namespace hps::testing
