// Pooled lookups over the host device: the suite, and what needs a device that counts, stands still, fails or has no
// memory left.

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "cc/tests/sparse_device_suite.h"

namespace hps::testing {
namespace {

INSTANTIATE_TEST_SUITE_P(All, SparseDeviceSuite,
                         ::testing::Values(CacheFixture{"HostDevice", [] { return std::make_shared<HostDevice>(); }}),
                         [](const auto& info) { return info.param.name; });

class SparseDeviceTest : public ::testing::Test, public SparseDeviceFixture<HostDevice> {
 protected:
  void SetUp() override { OpenDevice(std::make_shared<HostDevice>()); }
};

TEST_F(SparseDeviceTest, AllHitIsOneLaunchAndOnlyTablesThatMissTakeMore) {
  Open(Model(CacheType::kDynamic));
  Bags bags = RandomBags(4, kWarm, 1), other = RandomBags(8, kWarm, 2);
  ExpectEqualToTheHost(bags, {});
  const auto count = [&](HostDevice::Launch kind) { return device_->launches(kind); };
  EXPECT_EQ(count(HostDevice::kPooledQuery), 1u);
  EXPECT_EQ(count(HostDevice::kQuery), 1u);
  EXPECT_EQ(count(HostDevice::kFill), 1u);
  EXPECT_EQ(count(HostDevice::kPool), 1u);
  const BagsOnDevice warm(*device_, bags, 16, {.rank = 2, .key_bytes = 4}), cold(*device_, other, 128);
  LookupReport report;
  ASSERT_OK(Look(warm, &report));
  EXPECT_EQ(report.rows_from_cache, bags.keys.size());
  EXPECT_EQ(count(HostDevice::kPooledQuery), 2u);
  EXPECT_EQ(count(HostDevice::kWiden), 1u);
  EXPECT_EQ(count(HostDevice::kSplits), 1u);
  EXPECT_EQ(count(HostDevice::kPool), 1u);
  const DeviceSparsePart both[] = {warm.part, cold.part};
  ASSERT_OK(session_->LookupSparseOnDevice(0, both, nullptr, {}, &report));
  EXPECT_EQ(report.rows_from_cache, bags.keys.size());
  EXPECT_EQ(report.rows_from_volatile + report.rows_repeated, other.keys.size());
  EXPECT_EQ(count(HostDevice::kPooledQuery), 3u);
  EXPECT_EQ(count(HostDevice::kQuery), 2u);
  EXPECT_EQ(count(HostDevice::kPool), 2u);
  ExpectBits(warm.Get(), Expected(bags), 16);
  ExpectBits(cold.Get(), Expected(other), 128);
}

// Rows on their way to be added up lie in the workspace: its next use must wait for the sums, not for the fill alone.
TEST_F(SparseDeviceTest, SumsBehindAFillBelongToTheUse) {
  Open(Model(CacheType::kDynamic));
  const Bags bags = RandomBags(8, kWarm, 1);
  const BagsOnDevice asked(*device_, bags, 128);
  const uint64_t before = device_->events_recorded();
  ASSERT_OK(Look(asked, nullptr));
  EXPECT_EQ(device_->launches(HostDevice::kPool), 1u);
  EXPECT_EQ(device_->events_recorded() - before, 2u) << "one behind the fill, one behind the sums";
  ASSERT_OK(Look(asked, nullptr));
  EXPECT_EQ(device_->events_recorded() - before, 2u) << "all hit";
}

TEST_F(SparseDeviceTest, DeadlineAndCancellationEndTheWait) {
  Open(Model(CacheType::kStatic));
  const Bags bags = RandomBags(4, kRows, 1);
  const BagsOnDevice asked(*device_, bags, 16, {.rank = 2});
  const TestStream stream(*device_);
  device_->Hold(true);
  ExpectError(Look(asked, nullptr, stream.get(),
                   {.deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(20)}),
              StatusCode::kDeadlineExceeded, {"model 'm'", "device"});
  std::atomic<bool> cancelled{false};
  std::thread cancel([&] {
    WaitUntil([&] { return device_->launches(HostDevice::kPooledQuery) == 2; }, "the second query");
    cancelled = true;
  });
  ExpectError(Look(asked, nullptr, stream.get(), {.cancelled = &cancelled}), StatusCode::kCancelled, {"device"});
  cancel.join();
  // What is left on the stream keeps its memory: a larger lookup elsewhere waits, and so does the cache's end.
  std::atomic<bool> released{false};
  std::thread release([&] {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
    while (std::chrono::steady_clock::now() < end) std::this_thread::yield();
    released = true;
    device_->Hold(false);
  });
  ASSERT_OK(server_->UnloadModel("m"));
  EXPECT_TRUE(released);
  release.join();
}

TEST_F(SparseDeviceTest, ALostDeviceIsTold) {
  Open(Model(CacheType::kDynamic));
  const BagsOnDevice asked(*device_, RandomBags(4, kRows, 1), 16);
  const TestStream stream(*device_);
  device_->Hold(true);
  std::thread fault([&] {
    WaitUntil([&] { return device_->launches(HostDevice::kPooledQuery) > 0; }, "the query");
    device_->Lose(cuda::kErrorLaunchFailure);
  });
  const Status status = Look(asked, nullptr, stream.get());
  fault.join();
  device_->Hold(false);
  ExpectError(status, StatusCode::kInternal, {"model 'm'", "device 0", "start the process anew"});
  ExpectError(Look(asked, nullptr, stream.get()), StatusCode::kInternal, {"device 0"});
}

// Each allocation of a lookup fails once; the same lookup with memory succeeds, and nothing is left over.
TEST_F(SparseDeviceTest, EachAllocationMayFail) {
  int failed = 0;
  for (uint64_t n = 1;; ++n) {
    Open(Model(CacheType::kDynamic));
    {
      const Bags bags = RandomBags(9, kRows, 1);
      const BagsOnDevice asked(*device_, bags, 130, {.rank = 2});
      device_->FailAllocation(n);
      const Status status = Look(asked);
      device_->FailAllocation(0);
      if (!status.ok()) {
        ExpectError(status, StatusCode::kResourceExhausted, {"model 'm'", "device 0", "bytes of"});
        ++failed;
        ASSERT_OK(Look(asked));
      }
      ExpectBits(asked.Get(), Expected(bags), 130);
      if (status.ok()) n = 1000;
    }
    session_.reset();
    ASSERT_OK(server_->Close());
    EXPECT_EQ(device_->allocations(), 0u);
    if (n >= 1000) break;
  }
  EXPECT_GE(failed, 2);
}

TEST_F(SparseDeviceTest, LongKeysAreRefusedWhereTheConfigurationHasShortOnes) {
  Open(Model(CacheType::kDynamic), /*long_keys=*/false);
  const Bags bags{.table = 4, .keys = {1, Key{1} << 40, 2}, .splits = {0, 3}};
  const BagsOnDevice asked(*device_, bags, 16);
  ExpectError(Look(asked), StatusCode::kOutOfRange, {std::to_string(Key{1} << 40), "supportlonglong"});
}

}  // namespace
}  // namespace hps::testing
