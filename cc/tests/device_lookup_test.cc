// Lookups over caches: exact and deferred misses, reports, faults of device and tiers, and updates that race with
// fills.

#include "cc/cache/device_lookup.h"

#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <set>
#include <thread>

#include "cc/cache/cache_refresher.h"
#include "cc/core/tier_row_source.h"
#include "cc/tests/cache_fixture.h"
#include "cc/tests/fake_table.h"

namespace hps::testing {
namespace {

constexpr std::chrono::seconds kSoon{20};

class DeviceLookupTest : public ::testing::Test {
 protected:
  void SetUp() override {
    resources_ = Value(DeviceResources::Open(device_, {.reserved = 1, .limit = 4, .size = {64, 0}}));
    cache_ = Value(DeviceCache::Make(resources_, SpecOf(4, 7000)));
  }
  DeviceLookup Lookups(std::optional<double> threshold = std::nullopt) {
    return DeviceLookup(resources_, source_, inserts_, {threshold, {}});
  }
  // Looks keys of table 0 up; expects each in the version that `versions` tells, 0: default.
  void Expect(const DeviceLookup& lookups, const std::vector<Key>& keys, const std::function<int(Key)>& version,
              LookupReport* report = nullptr) {
    const Asked asked(*device_, cache_, 0, keys);
    const CachedLookup lookup = asked.lookup();
    LookupReport local;
    ASSERT_OK(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, report != nullptr ? report : &local));
    const std::vector<int> versions = asked.Versions();
    for (size_t i = 0; i < keys.size(); ++i) ASSERT_EQ(versions[i], version(keys[i])) << "key " << keys[i];
  }

  const std::shared_ptr<HostDevice> device_ = std::make_shared<HostDevice>();
  const std::shared_ptr<MapSource> source_ = std::make_shared<MapSource>(std::vector<uint32_t>{4, 16, 7});
  DeviceResources resources_;
  std::shared_ptr<DeviceCache> cache_;
  std::shared_ptr<InsertQueue> inserts_ = std::make_shared<InsertQueue>();
};

TEST_F(DeviceLookupTest, MissesAreFetchedOnceAndKept) {
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

TEST_F(DeviceLookupTest, MetricsCountWhatReportsSay) {
  source_->Put(0, KeyRange(0, 100), 1);
  Counter from_cache, missed, deferred, unwaited, outdated;
  const DeviceLookup lookups(resources_, source_, inserts_,
                             {0.9, {&from_cache, &missed, &deferred, &unwaited, &outdated}});
  LookupReport all;
  const auto look = [&](const std::vector<Key>& keys) {
    const Asked asked(*device_, cache_, 0, keys);
    const CachedLookup lookup = asked.lookup();
    LookupReport report;
    ASSERT_OK(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, &report));
    EXPECT_EQ(report.keys, report.rows_from_cache + report.rows_from_volatile + report.rows_from_persistent +
                               report.rows_from_default + report.rows_deferred + report.rows_repeated +
                               report.rows_unwaited);
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
  EXPECT_EQ(from_cache.value(), all.rows_from_cache);
  EXPECT_EQ(missed.value(), all.rows_from_volatile + all.rows_from_default);
  EXPECT_EQ(deferred.value(), all.rows_deferred);
  EXPECT_EQ(deferred.value(), 3u);
  EXPECT_EQ(outdated.value(), 1u);
  EXPECT_EQ(cache_->stats().rows_outdated, 1u);
}

TEST_F(DeviceLookupTest, ManyTablesInOneCall) {
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
      const uint64_t launches = device_->launches(HostDevice::kQuery);
      LookupReport report;
      ASSERT_OK(Lookups().Lookup(lookups, nullptr, {}, &report));
      EXPECT_EQ(device_->launches(HostDevice::kQuery) - launches, (tables + 47) / 48);
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

TEST_F(DeviceLookupTest, NothingToAsk) {
  LookupReport report;
  ASSERT_OK(Lookups().Lookup({}, nullptr, {}, &report));
  EXPECT_EQ(report.keys, 0u);
  Expect(Lookups(), {}, [](Key) { return 0; });
  EXPECT_EQ(device_->launches(HostDevice::kQuery), 0u);
}

TEST_F(DeviceLookupTest, BelowTheThresholdTheAnswerIsExactAboveItIsDeferred) {
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

TEST_F(DeviceLookupTest, TheThresholdIsEachTablesOwn) {
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

TEST_F(DeviceLookupTest, DeferredKeysBeyondTheQueueAreDroppedAndCounted) {
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

TEST_F(DeviceLookupTest, StopCancelsAFetchUnderWay) {
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

TEST_F(DeviceLookupTest, WholeTablesAreNotWaitedFor) {
  const std::vector<Key> keys = KeyRange(0, 500);
  CacheSpec spec = SpecOf(4, 0);
  spec.type = CacheType::kStatic;
  cache_ = Value(DeviceCache::MakeWhole(resources_, spec, [&](const ScanVisitor& visitor) -> Status {
    std::vector<float> rows;
    for (const Key key : keys) {
      const std::vector<float> row = Row(key, 1, 4);
      rows.insert(rows.end(), row.begin(), row.end());
    }
    return visitor(keys, {reinterpret_cast<const std::byte*>(rows.data()), 16});
  }));
  TestStream stream(*device_);
  const Asked asked(*device_, cache_, 0, KeyRange(490, 20));
  const CachedLookup lookup = asked.lookup();
  LookupReport report;
  device_->Hold(true);  // a lookup that waited would not come back
  ASSERT_OK(Lookups().Lookup(std::span(&lookup, 1), stream.get(),
                             {.deadline = std::chrono::steady_clock::now() + kSoon}, &report));
  device_->Hold(false);
  EXPECT_EQ(report.rows_unwaited, 20u);
  std::vector<int> expected(20, 0);
  std::fill_n(expected.begin(), 10, 1);
  EXPECT_EQ(asked.Versions(stream.get()), expected);
  EXPECT_EQ(source_->fetches(), 0);
}

TEST_F(DeviceLookupTest, ACacheThatGoesWaitsForWhatItsLookupsLeft) {
  CacheSpec spec = SpecOf(4, 0);
  spec.type = CacheType::kStatic;
  const std::vector<Key> keys = KeyRange(0, 10);
  auto cache = Value(DeviceCache::MakeWhole(resources_, spec, [&](const ScanVisitor& visitor) -> Status {
    const std::vector<float> rows(40, 1.0f);
    return visitor(keys, {reinterpret_cast<const std::byte*>(rows.data()), 16});
  }));
  TestStream stream(*device_);
  auto asked = std::make_unique<Asked>(*device_, std::move(cache), 0, keys);
  device_->Hold(true);
  {
    const CachedLookup lookup = asked->lookup();
    ASSERT_OK(Lookups().Lookup(std::span(&lookup, 1), stream.get(), {}, nullptr));
  }
  std::thread release([&] {
    std::this_thread::yield();
    device_->Hold(false);
  });
  // The cache is the first to go: its memory must outlive the query.
  const_cast<std::shared_ptr<DeviceCache>&>(asked->cache).reset();
  EXPECT_EQ(device_->QueryStream(stream.get()), 0);
  release.join();
}

// Two devices over the same tiers: each has a cache of its own, and an update must be told to both.
TEST_F(DeviceLookupTest, DevicesHaveCachesOfTheirOwn) {
  source_->Put(0, KeyRange(0, 100), 1);
  auto second = std::make_shared<HostDevice>(HostDeviceOptions{.ordinal = 1});
  const auto resources = Value(DeviceResources::Open(second, {.size = {64, 0}}));
  const auto cache = Value(DeviceCache::Make(resources, SpecOf(4, 700)));
  const DeviceLookup there(resources, source_, inserts_, {});
  const Asked asked(*second, cache, 0, KeyRange(0, 100));
  const CachedLookup lookup = asked.lookup();
  Expect(Lookups(), KeyRange(0, 100), [](Key) { return 1; });
  LookupReport report;
  ASSERT_OK(there.Lookup(std::span(&lookup, 1), nullptr, {}, &report));
  EXPECT_EQ(report.rows_from_volatile, 100u) << "what the first device holds is not here";
  source_->Put(0, {7}, 2);
  for (DeviceCache* each : {cache_.get(), cache.get()}) {
    ASSERT_OK(UpdateTo(*each, {7}, 2));
    ASSERT_OK(each->Flush());
  }
  Expect(Lookups(), {7}, [](Key) { return 2; });
  ASSERT_OK(there.Lookup(std::span(&lookup, 1), nullptr, {}, &report));
  EXPECT_EQ(asked.Versions()[7], 2);
  // One that fails leaves the other alone.
  second->Lose(cuda::kErrorLaunchFailure);
  ExpectError(there.Lookup(std::span(&lookup, 1), nullptr, {}, nullptr), StatusCode::kInternal, {"device 1"});
  Expect(Lookups(), KeyRange(0, 100), [](Key key) { return key == 7 ? 2 : 1; });
}

// Faults -----------------------------------------------------------------------------------------------------------

TEST_F(DeviceLookupTest, AFailingTierFailsTheLookupAndNothingIsKept) {
  source_->Put(0, KeyRange(0, 10), 1);
  source_->Fail(Unavailable("the tier is down"));
  const Asked asked(*device_, cache_, 0, KeyRange(0, 10));
  const CachedLookup lookup = asked.lookup();
  ExpectError(Lookups().Lookup(std::span(&lookup, 1), nullptr, {}, nullptr), StatusCode::kUnavailable, {"tier"});
  EXPECT_EQ(resources_.workspaces->stats().lent, 0u);
  source_->Fail(OkStatus());
  Expect(Lookups(), KeyRange(0, 10), [](Key) { return 1; });
}

TEST_F(DeviceLookupTest, ADeviceThatFailsEndsTheWaitAndIsNotTriedAgain) {
  for (const auto& [error, code] : {std::pair(cuda::kErrorLaunchFailure, StatusCode::kInternal),
                                    std::pair(cuda::kErrorUncorrectableMemory, StatusCode::kDataLoss)}) {
    auto device = std::make_shared<HostDevice>(HostDeviceOptions{.ordinal = 3});
    const auto resources = Value(DeviceResources::Open(device, {.size = {64, 0}}));
    const auto cache = Value(DeviceCache::Make(resources, SpecOf(4, 700)));
    const DeviceLookup lookups(resources, source_, inserts_, {});
    const Asked asked(*device, cache, 0, KeyRange(0, 10));
    TestStream stream(*device);
    const CachedLookup lookup = asked.lookup();
    device->Hold(true);
    std::thread fault([&, error = error] {
      WaitUntil([&] { return device->launches(HostDevice::kQuery) > 0; }, "the query");
      device->Lose(error);
    });
    const Status status = lookups.Lookup(std::span(&lookup, 1), stream.get(), {}, nullptr);
    fault.join();
    device->Hold(false);
    ExpectError(status, code, {"device 3", device->ErrorText(error), "start the process anew"});
    const uint64_t launches = device->launches(HostDevice::kQuery);
    ExpectError(lookups.Lookup(std::span(&lookup, 1), stream.get(), {}, nullptr), code, {device->ErrorText(error)});
    ExpectError(UpdateTo(*cache, {1}, 1), code, {device->ErrorText(error)});
    std::vector<Key> keys;
    ExpectError(cache->Dump(0, 1, &keys), code, {device->ErrorText(error)});
    EXPECT_EQ(device->launches(HostDevice::kQuery), launches);
  }
}

TEST_F(DeviceLookupTest, DeadlineAndCancellationEndTheWait) {
  source_->Put(0, KeyRange(0, 10), 1);
  const Asked asked(*device_, cache_, 0, KeyRange(0, 10));
  const CachedLookup lookup = asked.lookup();
  TestStream stream(*device_);
  device_->Hold(true);
  ExpectError(Lookups().Lookup(std::span(&lookup, 1), stream.get(),
                               {.deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(20)}, nullptr),
              StatusCode::kDeadlineExceeded, {"device"});
  std::atomic<bool> cancelled{false};
  std::thread cancel([&] {
    WaitUntil([&] { return device_->launches(HostDevice::kQuery) == 2; }, "the second query");
    cancelled = true;
  });
  ExpectError(Lookups().Lookup(std::span(&lookup, 1), stream.get(), {.cancelled = &cancelled}, nullptr),
              StatusCode::kCancelled, {"device"});
  cancel.join();
  device_->Hold(false);
  // The same workspaces serve again, also on another stream.
  for (int i = 0; i < 5; ++i) Expect(Lookups(), KeyRange(0, 10), [](Key) { return 1; });
}

TEST_F(DeviceLookupTest, CachesOfAnotherDeviceAreRefused) {
  auto device = std::make_shared<HostDevice>(HostDeviceOptions{.ordinal = 1});
  const auto resources = Value(DeviceResources::Open(device, {.size = {64, 0}}));
  const auto cache = Value(DeviceCache::Make(resources, SpecOf(4, 700)));
  const CachedLookup lookup{cache, 0, nullptr, 1, nullptr};
  ExpectError(Lookups().Lookup(std::span(&lookup, 1), nullptr, {}, nullptr), StatusCode::kInvalidArgument,
              {"device 1", "device 0"});
}

// Every allocation fails once: a clear error, nothing lost, nothing leaked, and the same lookup with memory succeeds.
TEST(DeviceMemory, EachAllocationMayFail) {
  const auto source = std::make_shared<MapSource>(std::vector<uint32_t>{4});
  source->Put(0, KeyRange(0, 3000), 1);
  int failed_opens = 0, failed_lookups = 0;
  for (uint64_t n = 1;; ++n) {
    auto device = std::make_shared<HostDevice>();
    const int failures_before = failed_opens + failed_lookups;
    {
      constexpr size_t kMost = 3000;
      const DeviceArray<Key> keys(*device, KeyRange(0, kMost));
      const DeviceArray<float> rows(*device, kMost * 4);
      const auto use = [&]() -> Status {
        HPS_ASSIGN_OR_RETURN(const DeviceResources resources, DeviceResources::Open(device, {.size = {64, 0}}));
        HPS_ASSIGN_OR_RETURN(const auto cache, DeviceCache::Make(resources, SpecOf(4, 30'000)));
        const DeviceLookup lookups(resources, source, nullptr, {});
        for (const uint32_t count : {10u, 3000u, 100u}) {
          const CachedLookup lookup{cache, 0, keys.get(), count, rows.get()};
          Status status = lookups.Lookup(std::span(&lookup, 1), nullptr, {}, nullptr);
          if (!status.ok()) {
            ExpectError(status, StatusCode::kResourceExhausted, {"device 0", "bytes of"});
            ++failed_lookups;
            HPS_RETURN_IF_ERROR(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, nullptr));
          }
          const std::vector<float> answer = rows.Get();
          for (size_t i = 0; i < count; ++i) {
            if (VersionOfRow(static_cast<Key>(i), answer.data() + i * 4, 4) != 1) return Internal("a wrong row");
          }
        }
        return OkStatus();
      };
      device->FailAllocation(n);
      const Status status = use();
      if (!status.ok()) {
        ExpectError(status, StatusCode::kResourceExhausted, {"device 0", "bytes of"});
        ++failed_opens;
      }
    }
    EXPECT_EQ(device->allocations(), 0u) << "leaked when allocation " << n << " failed";
    if (failed_opens + failed_lookups == failures_before) break;
    ASSERT_LT(n, 100u);
  }
  EXPECT_GE(failed_opens, 8);
  EXPECT_GE(failed_lookups, 4);
}

TEST(DeviceMemory, ComesFromTheHostsAllocatorAndGoesBack) {
  class Allocator final : public DeviceAllocator {
   public:
    void* Allocate(size_t bytes) override {
      if (bytes > left) return nullptr;
      void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
      sizes[memory] = bytes;
      left -= bytes;
      return memory;
    }
    void Free(void* memory) override {
      left += sizes.at(memory);
      sizes.erase(memory);
      std::free(memory);
    }
    size_t left = size_t{32} << 20;
    std::map<void*, size_t> sizes;
  };
  auto device = std::make_shared<HostDevice>();
  const auto allocator = std::make_shared<Allocator>();
  {
    const auto resources = Value(DeviceResources::Open(device, {.size = {64, 0}}, allocator));
    EXPECT_EQ(device->allocated_bytes(), 0u);
    const auto cache = Value(DeviceCache::Make(resources, SpecOf(16, 10'000)));
    EXPECT_EQ(cache->stats().device_bytes, DeviceCache::DeviceBytes(10'000, 64));
    ExpectError(DeviceCache::Make(resources, SpecOf(64, 1'000'000, "model 'big', table 't'")).status(),
                StatusCode::kResourceExhausted, {"model 'big'", "gpucacheper"});
    ASSERT_OK(UpdateTo(*cache, {1}, 1));
  }
  EXPECT_EQ(allocator->left, size_t{32} << 20);
}

// Updates that race with fills ----------------------------------------------------------------------------------------

// The tiers were read, then the update came: it finds no row in the cache, and the old row is on its way.
TEST_F(DeviceLookupTest, AnUpdateBetweenReadAndFillIsNotUndone) {
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

// The fill was launched but not carried out when the update came: the update must not overtake it.
TEST_F(DeviceLookupTest, AnUpdateWaitsForFillsOnTheirWay) {
  source_->Put(0, KeyRange(0, 10), 1);
  TestStream stream(*device_);
  source_->AfterRead([&](const FetchLimits&) { device_->HoldStream(stream.get(), true); });
  const Asked asked(*device_, cache_, 0, KeyRange(0, 10));
  const CachedLookup lookup = asked.lookup();
  ASSERT_OK(Lookups().Lookup(std::span(&lookup, 1), stream.get(), {}, nullptr));
  source_->AfterRead({});
  source_->Put(0, {3}, 2);
  ASSERT_OK(UpdateTo(*cache_, {3}, 2));
  std::atomic<bool> flushed{false};
  std::thread flush([&] {
    EXPECT_EQ(cache_->Flush().code(), StatusCode::kOk);
    flushed = true;
  });
  // Time enough for an update that does not wait; one that does is not done.
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
  while (!flushed && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  EXPECT_FALSE(flushed);
  device_->HoldStream(stream.get(), false);
  flush.join();
  Expect(Lookups(), KeyRange(0, 10), [](Key key) { return key == 3 ? 2 : 1; });
}

TEST_F(DeviceLookupTest, ADeferredInsertDoesNotUndoAnUpdate) {
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

// Lookups from several streams, some exact and some deferred, beside updates, erasures and refresh, in a cache too
// small for the keys. While it runs no row is torn and none is older than what the key had before the lookup began; at
// rest the cache agrees with the tiers.
TEST_F(DeviceLookupTest, NoOldRowStaysAfterAStormOfUpdates) {
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

// Over the tiers of a model
// ---------------------------------------------------------------------------------------------

class TierRowSourceTest : public TierStackTest {};

TEST_F(TierRowSourceTest, RowsComeFromTheTiers) {
  auto device = std::make_shared<HostDevice>();
  const auto resources = Value(DeviceResources::Open(device, {.size = {64, 0}}));
  const auto cache = Value(DeviceCache::Make(resources, SpecOf(kWidth, 700)));
  for (Key key = 0; key < 10; ++key) volatile_->Put(key, 1);
  for (Key key = 10; key < 20; ++key) persistent_->Put(key, 2);
  const auto source = std::make_shared<TierRowSource>(std::vector<const TierStack*>{&stack_}, nullptr, InlineExecutor(),
                                                      InlineExecutor());
  const DeviceLookup lookups(resources, source, nullptr, {});
  const Asked asked(*device, cache, 0, KeyRange(0, 30));
  const CachedLookup lookup = asked.lookup();
  LookupReport report;
  ASSERT_OK(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, &report));
  EXPECT_EQ(report.rows_from_volatile, 10u);
  EXPECT_EQ(report.rows_from_persistent, 10u);
  EXPECT_EQ(report.rows_from_default, 10u);
  std::vector<int> expected(30, 0);
  std::fill_n(expected.begin(), 10, 1);
  std::fill_n(expected.begin() + 10, 10, 2);
  EXPECT_EQ(asked.Versions(), expected);
  ASSERT_OK(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, &report));
  EXPECT_EQ(report.rows_from_cache, 20u);
  persistent_->Fail(Unavailable("gone"));
  ExpectError(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, &report), StatusCode::kUnavailable, {"gone"});
  const CachedLookup wrong{cache, 7, asked.device_keys.get(), 1, asked.rows.get()};
  ASSERT_OK(cache->Erase(std::vector<Key>{0}));
  ASSERT_OK(cache->Flush());
  ExpectError(lookups.Lookup(std::span(&wrong, 1), nullptr, {}, &report), StatusCode::kInvalidArgument, {"table 7"});
}

}  // namespace
}  // namespace hps::testing
