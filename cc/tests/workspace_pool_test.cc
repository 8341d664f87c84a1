// Workspaces: lent, waited for, grown, trimmed, and used by one stream after another.

#include "cc/cache/workspace_pool.h"

#include <gtest/gtest.h>

#include <thread>

#include "cc/tests/cache_fixture.h"

namespace hps::testing {
namespace {

class WorkspacePoolTest : public ::testing::Test {
 protected:
  std::unique_ptr<WorkspacePool> Open(const WorkspacePoolOptions& options) {
    return Value(WorkspacePool::Open(context_, options));
  }
  static Deadline In(std::chrono::milliseconds time) { return std::chrono::steady_clock::now() + time; }

  const std::shared_ptr<HostDevice> device_ = std::make_shared<HostDevice>();
  const std::shared_ptr<DeviceContext> context_ = DeviceContext::Make(device_);
};

TEST_F(WorkspacePoolTest, ReservesTheConfiguredSizeAtTheStart) {
  const auto pool = Open({.reserved = 3, .limit = 3, .size = {1000, 1 << 16}});
  const uint64_t allocations = device_->allocations();
  EXPECT_EQ(pool->stats().workspaces, 3u);
  for (int i = 0; i < 10; ++i) {
    const auto lease = Value(pool->Acquire(1000, kNoDeadline));
    EXPECT_EQ(lease->size().positions, 1000u);
    ASSERT_OK(lease->PrepareFill(100, 60'000, nullptr));
    EXPECT_EQ(pool->stats().lent, 1u);
  }
  EXPECT_EQ(device_->allocations(), allocations);
  EXPECT_EQ(pool->stats().lent, 0u);
}

TEST_F(WorkspacePoolTest, MakesMoreUpToTheLimitThenWaits) {
  const auto pool = Open({.reserved = 1, .limit = 2, .size = {16, 0}});
  auto first = Value(pool->Acquire(16, kNoDeadline));
  auto second = Value(pool->Acquire(16, kNoDeadline));
  ExpectError(pool->Acquire(16, In(std::chrono::milliseconds(10))).status(), StatusCode::kDeadlineExceeded,
              {"2 workspaces", "num_of_worker_buffer_in_pool"});
  std::atomic<bool> cancelled{true};
  ExpectError(pool->Acquire(16, kNoDeadline, &cancelled).status(), StatusCode::kCancelled, {"workspace"});
  EXPECT_EQ(pool->stats().waits, 2u);
  std::thread waiter([&] { EXPECT_TRUE(pool->Acquire(16, In(std::chrono::seconds(30))).ok()); });
  std::atomic<bool> go_on{false};
  std::thread cancellable([&] { EXPECT_TRUE(pool->Acquire(16, kNoDeadline, &go_on).ok()); });
  WaitUntil([&] { return pool->stats().waits == 4; }, "both to wait");
  first = {};
  waiter.join();
  cancellable.join();
}

TEST_F(WorkspacePoolTest, WithoutMemoryForAnotherOneItWaits) {
  const auto pool = Open({.reserved = 1, .limit = 4, .size = {16, 0}});
  auto first = Value(pool->Acquire(16, kNoDeadline));
  device_->FailAllocation(1);
  ExpectError(pool->Acquire(16, In(std::chrono::milliseconds(10))).status(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(pool->stats().workspaces, 1u);
  const auto empty = Open({.reserved = 0, .limit = 4, .size = {16, 0}});
  device_->FailAllocation(1);
  ExpectError(empty->Acquire(16, kNoDeadline).status(), StatusCode::kResourceExhausted, {"16 keys"});
  EXPECT_TRUE(empty->Acquire(16, kNoDeadline).ok());
}

TEST_F(WorkspacePoolTest, GrowsToTheBatchAndTrimsWhatIsNotNeeded) {
  const auto pool = Open({.reserved = 1, .limit = 4, .size = {16, 1024}});
  {
    const auto large = Value(pool->Acquire(5000, kNoDeadline));
    EXPECT_GE(large->size().positions, 5000u);
    ASSERT_OK(large->PrepareFill(4000, 200'000, nullptr));
    const auto other = Value(pool->Acquire(10, kNoDeadline));
  }
  ASSERT_OK(pool->Trim());  // that batch was since the last call
  EXPECT_EQ(pool->stats().workspaces, 1u);
  { const auto small = Value(pool->Acquire(3, kNoDeadline)); }
  ASSERT_OK(pool->Trim());
  ASSERT_OK(pool->Trim());
  const auto lease = Value(pool->Acquire(1, kNoDeadline));
  EXPECT_EQ(lease->size().positions, 16u);
  EXPECT_EQ(lease->size().staging_bytes, 1024u);
}

TEST_F(WorkspacePoolTest, AGrowthThatFailsKeepsTheWorkspace) {
  const auto pool = Open({.reserved = 1, .limit = 1, .size = {16, 0}});
  device_->FailAllocation(2);  // the second of the growth
  ExpectError(pool->Acquire(5000, kNoDeadline).status(), StatusCode::kResourceExhausted, {"5000 keys"});
  EXPECT_EQ(pool->stats().lent, 0u);
  EXPECT_EQ(Value(pool->Acquire(16, kNoDeadline))->size().positions, 16u);
  ExpectError(pool->Acquire((1u << 30) + 1, kNoDeadline).status(), StatusCode::kInvalidArgument, {"split it"});
}

// The dedup table's stamps begin anew after 2^32 queries; the old ones must not be taken for new.
TEST_F(WorkspacePoolTest, StampsBeginAnew) {
  const auto resources = Value(DeviceResources::Open(device_, {.reserved = 1, .limit = 1, .size = {64, 0}}));
  const auto cache = Value(DeviceCache::Make(resources, SpecOf(4, 700)));
  const Asked asked(*device_, cache, 0, KeyRange(0, 10));
  const cuda::QueryPart part{cache->table(), asked.device_keys.get(), 10, kCacheDefault, asked.rows.get()};
  const auto lease = Value(resources.workspaces->Acquire(10, kNoDeadline));
  for (uint32_t stamp : {0u, 0xFFFFFFFDu}) {
    lease->set_stamp(stamp);
    for (int i = 0; i < 5; ++i) {
      ASSERT_OK(lease->Query(std::span(&part, 1), nullptr));
      ASSERT_OK(lease->Wait(nullptr, In(std::chrono::seconds(30)), nullptr));
      EXPECT_EQ(lease->missing_positions(), 10u);
      EXPECT_EQ(lease->missing().size(), 10u);
      ASSERT_OK(lease->End(nullptr));
    }
  }
}

// A use waits for what the last one has left on another stream.
TEST_F(WorkspacePoolTest, UsesOnDifferentStreamsAreOrdered) {
  const auto resources = Value(DeviceResources::Open(device_, {.reserved = 1, .limit = 1, .size = {64, 0}}));
  const auto cache = Value(DeviceCache::Make(resources, SpecOf(4, 700)));
  TestStream one(*device_), two(*device_);
  const Asked first(*device_, cache, 0, KeyRange(0, 10)), second(*device_, cache, 0, KeyRange(0, 20));
  const auto query = [&](const Asked& asked, DeviceStream stream) {
    const auto lease = Value(resources.workspaces->Acquire(20, kNoDeadline));
    const cuda::QueryPart part{cache->table(), asked.device_keys.get(), static_cast<uint32_t>(asked.keys.size()),
                               kCacheDefault, asked.rows.get()};
    ASSERT_OK(lease->Query(std::span(&part, 1), stream));
    ASSERT_OK(lease->End(stream));
  };
  device_->HoldStream(one.get(), true);
  query(first, one.get());
  query(second, two.get());
  const Deadline end = In(std::chrono::milliseconds(200));  // time enough for one that does not wait
  while (device_->QueryStream(two.get()) != 0 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  EXPECT_EQ(device_->QueryStream(two.get()), cuda::kErrorNotReady);
  device_->HoldStream(one.get(), false);
  EXPECT_EQ(second.Versions(two.get()), std::vector<int>(20, 0));
  EXPECT_EQ(device_->SynchronizeStream(one.get()), 0);
}

TEST_F(WorkspacePoolTest, ManyThreadsShareAFew) {
  const auto pool = Open({.reserved = 2, .limit = 3, .size = {16, 0}});
  std::atomic<int> lent{0}, most{0};
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (uint32_t i = 0; i < 200; ++i) {
        const auto lease = Value(pool->Acquire(1 + (i * 7 + t) % 40, In(std::chrono::seconds(60))));
        const int now = ++lent;
        for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) continue;
        --lent;
        if (i % 50 == 0) EXPECT_TRUE(pool->Trim().ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(most, 3);
  EXPECT_EQ(pool->stats().lent, 0u);
  EXPECT_LE(pool->stats().workspaces, 3u);
}

}  // namespace
}  // namespace hps::testing
