// Refresh of caches: rows, erased keys, tiers that are down, and the thread that does it again and again.

#include "cc/cache/cache_refresher.h"

#include <gtest/gtest.h>

#include "cc/tests/cache_fixture.h"

namespace hps::testing {
namespace {

class CacheRefresherTest : public ::testing::Test {
 protected:
  void SetUp() override {
    resources_ = Value(DeviceResources::Open(device_, {.size = {256, 0}}));
    cache_ = Value(DeviceCache::Make(resources_, SpecOf(4, 2000)));
    source_->Put(0, KeyRange(0, 200), 1);
    ASSERT_EQ(Look(KeyRange(0, 200)), std::vector<int>(200, 1));
    source_->TakeAsked();
  }
  // What the cache and, for keys that it misses, the tiers say.
  std::vector<int> Look(const std::vector<Key>& keys) {
    const Asked asked(*device_, cache_, 0, keys);
    const CachedLookup lookup = asked.lookup();
    EXPECT_TRUE(
        DeviceLookup(resources_, source_, nullptr, {}).Lookup(std::span(&lookup, 1), nullptr, {}, nullptr).ok());
    return asked.Versions();
  }
  std::vector<Key> Held() {
    std::vector<Key> keys;
    EXPECT_TRUE(cache_->Dump(0, cache_->num_buckets(), &keys).ok());
    std::sort(keys.begin(), keys.end());
    return keys;
  }

  const std::shared_ptr<HostDevice> device_ = std::make_shared<HostDevice>();
  const std::shared_ptr<MapSource> source_ = std::make_shared<MapSource>(std::vector<uint32_t>{4});
  DeviceResources resources_;
  std::shared_ptr<DeviceCache> cache_;
};

TEST_F(CacheRefresherTest, RowsAreReadAnewInSteps) {
  for (const double fraction : {0.1, 0.3, 1.0, 0.00001}) {
    const uint32_t version = source_->VersionOf(0, 0) + 1;
    source_->Put(0, KeyRange(0, 300), version);  // 200 .. 299 are not in the cache, and stay out
    RefreshReport report;
    ASSERT_OK(RefreshCache(*cache_, *source_, 0, fraction, nullptr, &report));
    EXPECT_EQ(report.rows_refreshed, 200u);
    EXPECT_EQ(report.rows_erased, 0u);
    EXPECT_EQ(report.steps, fraction < 0.01 ? cache_->num_buckets() : static_cast<uint64_t>(std::ceil(1.0 / fraction)));
    EXPECT_EQ(Held(), KeyRange(0, 200));
    EXPECT_EQ(Look(KeyRange(0, 200)), std::vector<int>(200, static_cast<int>(version)));
  }
}

TEST_F(CacheRefresherTest, KeysThatNoTierHoldsAreTakenOut) {
  for (Key key = 0; key < 50; ++key) source_->Erase(0, key);
  source_->SetUnavailable(true);
  RefreshReport report;
  ASSERT_OK(RefreshCache(*cache_, *source_, 0, 1.0, nullptr, &report));
  EXPECT_EQ(report.rows_kept, 50u) << "a tier that is down must not empty the cache";
  EXPECT_EQ(Held(), KeyRange(0, 200));
  source_->SetUnavailable(false);
  report = {};
  ASSERT_OK(RefreshCache(*cache_, *source_, 0, 1.0, nullptr, &report));
  EXPECT_EQ(report.rows_erased, 50u);
  EXPECT_EQ(Held(), KeyRange(50, 150));
}

TEST_F(CacheRefresherTest, ARefreshDoesNotUndoAnUpdate) {
  bool updated = false;
  source_->AfterRead([&](const FetchLimits&) {
    if (std::exchange(updated, true)) return;
    source_->Put(0, KeyRange(0, 200), 2);
    ASSERT_OK(UpdateTo(*cache_, KeyRange(0, 200), 2));
  });
  RefreshReport report;
  ASSERT_OK(RefreshCache(*cache_, *source_, 0, 1.0, nullptr, &report));
  EXPECT_EQ(Look(KeyRange(0, 200)), std::vector<int>(200, 2));
  EXPECT_EQ(cache_->stats().rows_outdated, 200u);
}

TEST_F(CacheRefresherTest, Refusals) {
  RefreshReport report;
  for (const double fraction : {0.0, -0.1, 1.01, std::nan("")}) {
    ExpectError(RefreshCache(*cache_, *source_, 0, fraction, nullptr, &report), StatusCode::kInvalidArgument,
                {"cache_refresh_percentage_per_iteration", "table 't'"});
  }
  const std::atomic<bool> cancelled{true};
  ExpectError(RefreshCache(*cache_, *source_, 0, 0.5, &cancelled, &report), StatusCode::kCancelled);
  source_->Fail(Unavailable("the tier is down"));
  ExpectError(RefreshCache(*cache_, *source_, 0, 0.5, nullptr, &report), StatusCode::kUnavailable, {"down"});
  EXPECT_EQ(Held(), KeyRange(0, 200));
}

TEST_F(CacheRefresherTest, TheThreadDoesItAgainAndAgain) {
  CacheRefresher refresher;
  refresher.Add({cache_, source_, 0, 0.25, std::chrono::milliseconds(1), std::chrono::milliseconds(1)});
  for (uint32_t version = 2; version < 5; ++version) {
    source_->Put(0, KeyRange(0, 200), version);
    const uint64_t done = refresher.stats().refreshes;
    WaitUntil([&] { return refresher.stats().refreshes >= done + 2; }, "a refresh that began after the change");
    EXPECT_EQ(Look(KeyRange(0, 200)), std::vector<int>(200, static_cast<int>(version)));
  }
  source_->Fail(Unavailable("the tier is down"));
  WaitUntil([&] { return refresher.stats().failures > 0; }, "a failure");
  ExpectError(refresher.last_error(), StatusCode::kUnavailable, {"down"});
  source_->Fail(OkStatus());
  const uint64_t done = refresher.stats().refreshes;
  WaitUntil([&] { return refresher.stats().refreshes > done; }, "a refresh after the failure");
}

TEST_F(CacheRefresherTest, OnceWithoutAnIntervalAndRemovedWhileItRuns) {
  {
    CacheRefresher refresher;
    refresher.Add({.cache = cache_, .source = source_, .fraction = 1.0});
    WaitUntil([&] { return refresher.stats().refreshes == 1; }, "the refresh");
    refresher.Stop();
    refresher.Stop();
    EXPECT_EQ(refresher.stats().refreshes, 1u);
  }
  std::atomic<bool> reading{false};
  source_->AfterRead([&](const FetchLimits& limits) {
    reading = true;
    while (limits.cancelled != nullptr && !limits.cancelled->load()) std::this_thread::yield();
  });
  CacheRefresher refresher;
  refresher.Add({.cache = cache_, .source = source_, .fraction = 1.0, .interval = std::chrono::milliseconds(1)});
  WaitUntil([&] { return reading.load(); }, "the refresh to begin");
  refresher.Remove(cache_.get());
  const int fetches = source_->fetches();
  EXPECT_EQ(cache_.use_count(), 1);
  EXPECT_EQ(refresher.stats().refreshes, 0u);
  EXPECT_EQ(source_->fetches(), fetches);
}

}  // namespace
}  // namespace hps::testing
