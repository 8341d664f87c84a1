// Lookups over the host device: the suite, and what needs a device that stands still, fails or has no memory left.

#include "cc/cache/device_lookup.h"

#include <gtest/gtest.h>

#include <atomic>
#include <new>
#include <thread>

#include "cc/core/tier_row_source.h"
#include "cc/tests/device_lookup_suite.h"
#include "cc/tests/fake_table.h"

namespace hps::testing {
namespace {

INSTANTIATE_TEST_SUITE_P(All, DeviceLookupSuite,
                         ::testing::Values(CacheFixture{"HostDevice", [] { return std::make_shared<HostDevice>(); }}),
                         [](const auto& info) { return info.param.name; });

constexpr std::chrono::seconds kSoon{20};

class DeviceLookupTest : public ::testing::Test, public DeviceLookupFixture<HostDevice> {
 protected:
  void SetUp() override { Open(std::make_shared<HostDevice>()); }
};

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
  EXPECT_EQ(cache_->stats().rows_defaulted, 10u);
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
  std::atomic<bool> gone{false}, released{false};
  std::thread release([&] {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
    while (!gone && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    released = true;
    device_->Hold(false);
  });
  // The cache is the first to go: its memory must outlive the query.
  const_cast<std::shared_ptr<DeviceCache>&>(asked->cache).reset();
  EXPECT_TRUE(released);
  gone = true;
  release.join();
}

// Models that share a cache have workspaces of their own: the cache waits for what is left with any of them.
TEST_F(DeviceLookupTest, ASharedCacheWaitsForTheLookupsOfAllWhoShareIt) {
  source_->Put(0, KeyRange(0, 100), 1);
  DeviceResources others = resources_;
  others.workspaces = Value(WorkspacePool::Open(resources_.context, {.reserved = 1, .size = {64, 0}}));
  const DeviceLookup lookups(others, source_, inserts_, {});
  Expect(lookups, KeyRange(0, 10), [](Key) { return 1; });
  Expect(Lookups(), KeyRange(0, 20), [](Key) { return 1; });
  EXPECT_EQ(source_->fetches(), 2) << "each has brought in what the other one finds";

  TestStream stream(*device_);
  auto asked = std::make_unique<Asked>(*device_, std::move(cache_), 0, KeyRange(50, 10));
  // Of a lookup with misses the host is done, and the rows are on their way to the cache.
  source_->AfterRead([&](const FetchLimits&) { device_->HoldStream(stream.get(), true); });
  {
    const CachedLookup lookup = asked->lookup();
    ASSERT_OK(lookups.Lookup(std::span(&lookup, 1), stream.get(), {}, nullptr));
  }
  std::atomic<bool> released{false};
  std::thread release([&] {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
    while (std::chrono::steady_clock::now() < end) std::this_thread::yield();
    released = true;
    device_->HoldStream(stream.get(), false);
  });
  const_cast<std::shared_ptr<DeviceCache>&>(asked->cache).reset();
  EXPECT_TRUE(released) << "the cache has gone before its last fill";
  release.join();
  EXPECT_EQ(asked->Versions(stream.get()), std::vector<int>(10, 1));
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

// The word of a query that misses nothing is the end of it: the next one may follow on any stream.
TEST_F(DeviceLookupTest, HitsRecordNoEvents) {
  source_->Put(0, KeyRange(0, 100), 1);
  Expect(Lookups(), KeyRange(0, 50), [](Key) { return 1; });
  const uint64_t recorded = device_->events_recorded();
  EXPECT_GT(recorded, 0u) << "the fill is ordered before updates by one";
  for (int i = 0; i < 3; ++i) Expect(Lookups(), KeyRange(0, 50), [](Key) { return 1; });
  EXPECT_EQ(device_->events_recorded(), recorded);
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
  auto device = std::make_shared<HostDevice>();
  const auto allocator = std::make_shared<HostAllocator>(size_t{32} << 20);
  {
    const auto resources = Value(DeviceResources::Open(device, {.size = {64, 0}}, allocator));
    EXPECT_EQ(device->allocated_bytes(), 0u);
    const auto cache = Value(DeviceCache::Make(resources, SpecOf(16, 10'000)));
    EXPECT_EQ(cache->stats().device_bytes,
              DeviceCache::MemoryOf({.row_bytes = 64, .capacity_rows = 10'000}).device_bytes);
    ExpectError(DeviceCache::Make(resources, SpecOf(64, 1'000'000, "model 'big', table 't'")).status(),
                StatusCode::kResourceExhausted, {"model 'big'", "gpucacheper"});
    ASSERT_OK(UpdateTo(*cache, {1}, 1));
  }
  EXPECT_EQ(allocator->left(), size_t{32} << 20);
}

// The rows that are there are on their way before the last ones have been read.
TEST_F(DeviceLookupTest, RowsGoToTheDeviceWhileOthersAreFetched) {
  cache_ = Value(DeviceCache::Make(resources_, SpecOf(16, 120'000)));
  for (const auto& [keys, copies] : {std::pair{20'000, true}, {2'000, false}}) {  // the latter are read in place
    const std::vector<Key> asked_keys = KeyRange(keys * 10, static_cast<size_t>(keys));
    source_->Put(1, asked_keys, 1);
    const Asked asked(*device_, cache_, 1, asked_keys);
    const CachedLookup lookup = asked.lookup();
    uint64_t before = 0, in_the_middle = 0;
    source_->ArriveInPieces(asked_keys.size() / 40, 1, [&](int pieces) {
      if (pieces == 1) before = device_->copies();
      if (pieces == 30) in_the_middle = device_->copies();
      return OkStatus();
    });
    ASSERT_OK(Lookups().Lookup(std::span(&lookup, 1), nullptr, {}, nullptr));
    EXPECT_EQ(in_the_middle > before, copies);
    EXPECT_EQ(device_->copies() > in_the_middle, copies);
    EXPECT_EQ(asked.Versions(), std::vector<int>(asked_keys.size(), 1));
  }
}

// Copies are on a stream that stands still when memory runs out: who uses the workspace next waits for them.
TEST_F(DeviceLookupTest, AnExceptionAmongThePiecesIsAnEndLikeOthers) {
  const std::vector<Key> keys = KeyRange(0, 20'000);
  cache_ = Value(DeviceCache::Make(resources_, SpecOf(16, 120'000)));
  source_->Put(1, keys, 1);
  TestStream first(*device_), second(*device_);
  const Asked asked(*device_, cache_, 1, keys), again(*device_, cache_, 1, keys);
  const CachedLookup lookup = asked.lookup(), other = again.lookup();
  source_->ArriveInPieces(500, 1, [&](int pieces) -> Status {
    if (pieces == 1) device_->HoldStream(first.get(), true);
    if (pieces == 30) throw std::bad_alloc();
    return OkStatus();
  });
  const uint64_t before = device_->copies();
  EXPECT_THROW((void)Lookups().Lookup(std::span(&lookup, 1), first.get(), {}, nullptr), std::bad_alloc);
  ASSERT_GT(device_->copies(), before);
  source_->ArriveInPieces(0, 1);
  ExpectError(Lookups().Lookup(std::span(&other, 1), second.get(),
                               {.deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(20)}, nullptr),
              StatusCode::kDeadlineExceeded, {"device"});
  device_->HoldStream(first.get(), false);
  ASSERT_OK(Lookups().Lookup(std::span(&other, 1), second.get(), {}, nullptr));
  EXPECT_EQ(again.Versions(second.get()), std::vector<int>(keys.size(), 1));
  asked.Versions(first.get());  // waits for the stream
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

// Many rows, read by several threads in pieces; absent ones are in most pieces. With a lower tier those wait for it.
TEST_F(TierRowSourceTest, RowsInMemoryComeInPieces) {
  auto device = std::make_shared<HostDevice>();
  const auto resources = Value(DeviceResources::Open(device, {.size = {64, 0}}));
  const auto pool = NewThreadPool(4);
  constexpr size_t kKeys = 50'000;
  const auto absent = [](Key key) { return key % 400 == 7; };
  for (Key key = 0; key < static_cast<Key>(kKeys); ++key) {
    if (!absent(key)) volatile_->Put(key, 1);
  }
  for (const bool has_lower : {false, true}) {
    TierStack stack = MakeStack(volatile_, has_lower ? persistent_ : nullptr);
    stack.volatile_tier.addressable = true;
    if (has_lower) persistent_->Put(407, 2);
    const auto source = std::make_shared<TierRowSource>(std::vector<const TierStack*>{&stack}, nullptr, *pool, *pool);
    const auto cache = Value(DeviceCache::Make(resources, SpecOf(kWidth, 8 * kKeys)));
    const DeviceLookup lookups(resources, source, nullptr, {});
    const Asked asked(*device, cache, 0, KeyRange(0, kKeys));
    const CachedLookup lookup = asked.lookup();
    for (int turn = 0; turn < 2; ++turn) {
      LookupReport report;
      ASSERT_OK(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, &report));
      EXPECT_EQ(report.rows_from_default, kKeys / 400 - (has_lower ? 1 : 0));
      const std::vector<int> versions = asked.Versions();
      for (size_t i = 0; i < kKeys; ++i) {
        const auto key = static_cast<Key>(i);
        ASSERT_EQ(versions[i], has_lower && key == 407 ? 2 : absent(key) ? 0 : 1) << key;
      }
    }
  }
}

}  // namespace
}  // namespace hps::testing
