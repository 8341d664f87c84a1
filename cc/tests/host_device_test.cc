// The host device keeps the promises of cuda_kernels/device.h: order within and between streams, memory, refusals, and
// the launches' rules that the caches do not use themselves.

#include "cc/cache/host_device.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <set>

#include "cc/tests/cache_conformance.h"

namespace hps::testing {
namespace {

using cuda::CacheBucket;
using cuda::CacheTable;
using cuda::kCacheWays;

class HostDeviceTest : public ::testing::Test {
 protected:
  struct Table {
    Table(cuda::Device& device, uint64_t num_buckets, uint32_t width)
        : buckets(device, num_buckets), rows(device, num_buckets * kCacheWays * width), activity(device, 1) {
      table = {buckets.get(), num_buckets, rows.get(), width * 4, false, activity.get()};
      EXPECT_EQ(device.Clear(table, nullptr), 0);
      EXPECT_EQ(device.SynchronizeStream(nullptr), 0);
    }
    DeviceArray<CacheBucket> buckets;
    DeviceArray<float> rows;
    DeviceArray<cuda::CacheActivity> activity;
    CacheTable table;
  };
  // Returns how many rows another one had to go for.
  uint32_t Insert(const Table& table, const std::vector<int64_t>& keys, bool spill) {
    const DeviceArray<int64_t> device_keys(device_, keys);
    const DeviceArray<float> rows(device_, std::vector<float>(keys.size() * table.table.row_bytes / 4, 1.0f));
    const DeviceArray<uint32_t> evicted(device_, std::vector<uint32_t>{0});
    EXPECT_EQ(device_.Insert(table.table, device_keys.get(), rows.get(), static_cast<uint32_t>(keys.size()), spill,
                             evicted.get(), nullptr),
              0);
    return evicted.Get()[0];
  }
  std::set<int64_t> Dump(const Table& table) {
    const DeviceArray<int64_t> keys(device_, table.table.num_buckets * kCacheWays);
    const DeviceArray<uint32_t> count(device_, std::vector<uint32_t>{0});
    EXPECT_EQ(device_.Dump(table.table, 0, table.table.num_buckets, keys.get(), count.get(), nullptr), 0);
    const uint32_t number = count.Get()[0];
    const std::vector<int64_t> dumped = keys.Get();
    std::set<int64_t> result(dumped.begin(), dumped.begin() + number);
    EXPECT_EQ(result.size(), number) << "a key twice";
    return result;
  }

  HostDevice device_{HostDeviceOptions{.ordinal = 5, .memory_bytes = 8 << 20}};
};

TEST_F(HostDeviceTest, ACapturedStreamDoesNothingUntilItsGraphIsReplayed) {
  const TestStream stream(device_);
  const DeviceArray<int> from(device_, std::vector<int>{7}), to(device_, std::vector<int>{0});
  bool capturing = true;
  EXPECT_EQ(device_.IsCapturing(stream.get(), &capturing), 0);
  EXPECT_FALSE(capturing);
  ASSERT_EQ(device_.BeginCapture(stream.get()), 0);
  EXPECT_EQ(device_.BeginCapture(stream.get()), cuda::kErrorInvalidValue);
  EXPECT_EQ(device_.IsCapturing(stream.get(), &capturing), 0);
  EXPECT_TRUE(capturing);
  EXPECT_EQ(device_.Copy(to.get(), from.get(), sizeof(int), stream.get()), 0);
  HostGraph graph;
  ASSERT_EQ(device_.EndCapture(stream.get(), &graph), 0);
  EXPECT_EQ(graph.size(), 1u);
  EXPECT_EQ(to.Get(stream.get())[0], 0);
  for (const int value : {8, 9}) {
    EXPECT_EQ(device_.Copy(from.get(), &value, sizeof(int), stream.get()), 0);
    EXPECT_EQ(device_.Replay(graph, stream.get()), 0);
    EXPECT_EQ(to.Get(stream.get())[0], value);
  }

  // What cannot be captured spoils the capture, but the stream is of use again behind it.
  cudaEvent_t event = nullptr;
  ASSERT_EQ(device_.CreateEvent(&event), 0);
  const std::function<int()> mistakes[] = {
      [&] { return device_.QueryStream(stream.get()); }, [&] { return device_.SynchronizeStream(stream.get()); },
      [&] { return device_.RecordEvent(event, stream.get()); }, [&] { return device_.WaitEvent(stream.get(), event); }};
  for (const auto& mistake : mistakes) {
    ASSERT_EQ(device_.BeginCapture(stream.get()), 0);
    EXPECT_EQ(mistake(), cuda::kErrorCaptureFirst);
    EXPECT_EQ(device_.EndCapture(stream.get(), &graph), cuda::kErrorCaptureInvalidated);
    EXPECT_EQ(mistake(), 0);
  }
  device_.DestroyEvent(event);
  EXPECT_NE(device_.BeginCapture(nullptr), 0) << "the default stream";
  EXPECT_NE(device_.EndCapture(stream.get(), &graph), 0) << "none has begun";
}

// Who captures a stream in a way that forbids others the device has not broken it.
TEST_F(HostDeviceTest, ACapturesErrorsAreNotTheDevicesFailure) {
  const auto context =
      DeviceContext::Make(std::make_shared<HostDevice>(HostDeviceOptions{.ordinal = 5, .memory_bytes = 8 << 20}));
  for (int error = cuda::kErrorCaptureFirst; error <= cuda::kErrorCaptureLast; ++error) {
    ExpectError(context->Check(error, "a copy"), StatusCode::kFailedPrecondition,
                {"device 5", "a copy", "CUDA graph", "thread local"});
  }
  ASSERT_OK(context->CheckAlive());
  EXPECT_EQ(context->Check(cuda::kErrorLaunchFailure, "a copy").code(), StatusCode::kInternal);
  EXPECT_EQ(context->CheckAlive().code(), StatusCode::kInternal);
}

TEST_F(HostDeviceTest, StreamsKeepOrderAndEventsOrderStreams) {
  TestStream one(device_), two(device_);
  cudaEvent_t event = nullptr;
  ASSERT_EQ(device_.CreateEvent(&event), 0);
  EXPECT_EQ(device_.QueryEvent(event), 0) << "never recorded: done";
  const DeviceArray<int> memory(device_, std::vector<int>{0});
  const int values[] = {1, 2, 3};
  int seen = 0;
  device_.HoldStream(one.get(), true);
  EXPECT_EQ(device_.Copy(memory.get(), &values[0], 4, one.get()), 0);
  EXPECT_EQ(device_.Copy(memory.get(), &values[1], 4, one.get()), 0);
  EXPECT_EQ(device_.RecordEvent(event, one.get()), 0);
  EXPECT_EQ(device_.WaitEvent(two.get(), event), 0);
  EXPECT_EQ(device_.Copy(&seen, memory.get(), 4, two.get()), 0);
  EXPECT_EQ(device_.QueryStream(two.get()), cuda::kErrorNotReady);
  EXPECT_EQ(device_.QueryEvent(event), cuda::kErrorNotReady);
  device_.HoldStream(one.get(), false);
  EXPECT_EQ(device_.SynchronizeStream(two.get()), 0);
  EXPECT_EQ(seen, 2);
  EXPECT_EQ(device_.SynchronizeEvent(event), 0);
  EXPECT_EQ(device_.Zero(memory.get(), 4, two.get()), 0);
  EXPECT_EQ(device_.SynchronizeStream(two.get()), 0);
  EXPECT_EQ(memory.Get(), std::vector<int>{0});
  device_.DestroyEvent(event);
}

TEST_F(HostDeviceTest, MemoryIsBoundedCountedAndRubbish) {
  void* memory = nullptr;
  EXPECT_EQ(device_.Allocate(0, &memory), cuda::kErrorInvalidValue);
  EXPECT_EQ(device_.Allocate(9 << 20, &memory), cuda::kErrorOutOfMemory);
  ASSERT_EQ(device_.Allocate(6 << 20, &memory), 0);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % 256, 0u);
  EXPECT_NE(static_cast<unsigned char*>(memory)[12345], 0);
  void* more = nullptr;
  EXPECT_EQ(device_.Allocate(3 << 20, &more), cuda::kErrorOutOfMemory);
  uint64_t free = 0;
  EXPECT_EQ(device_.FreeMemory(&free), 0);
  EXPECT_EQ(free, uint64_t{2} << 20);
  void* pinned = nullptr;
  void* address = nullptr;
  ASSERT_EQ(device_.AllocateHost(16 << 20, &pinned, &address), 0) << "not memory of the device";
  EXPECT_EQ(device_.allocations(), 2u);
  device_.FreeHost(pinned);
  device_.Free(memory);
  device_.Free(nullptr);
  EXPECT_EQ(device_.allocations(), 0u);
  EXPECT_EQ(device_.allocated_bytes(), 0u);
  device_.FailAllocation(2);
  ASSERT_EQ(device_.Allocate(16, &memory), 0);
  EXPECT_EQ(device_.Allocate(16, &more), cuda::kErrorOutOfMemory);
  ASSERT_EQ(device_.Allocate(16, &more), 0);
  device_.Free(memory);
  device_.Free(more);
}

TEST_F(HostDeviceTest, ALostDeviceDoesNothingMore) {
  const DeviceArray<int> memory(device_, std::vector<int>{7});
  TestStream stream(device_);
  cudaEvent_t event = nullptr;
  ASSERT_EQ(device_.CreateEvent(&event), 0);
  device_.Hold(true);
  EXPECT_EQ(device_.Zero(memory.get(), 4, stream.get()), 0);
  EXPECT_EQ(device_.RecordEvent(event, stream.get()), 0);
  device_.Lose(cuda::kErrorLaunchFailure);
  device_.Hold(false);
  EXPECT_EQ(device_.SynchronizeEvent(event), cuda::kErrorLaunchFailure);
  EXPECT_EQ(device_.SynchronizeStream(stream.get()), cuda::kErrorLaunchFailure);
  EXPECT_EQ(device_.Zero(memory.get(), 4, stream.get()), cuda::kErrorLaunchFailure);
  void* more = nullptr;
  EXPECT_EQ(device_.Allocate(4, &more), cuda::kErrorLaunchFailure);
  device_.Lose(0);
  EXPECT_EQ(memory.Get(), std::vector<int>{7});
  device_.DestroyEvent(event);
}

// As tests/gpu/device_cache_check.cu asks of the GPU.
TEST_F(HostDeviceTest, RefusesWhatTheLaunchesRefuse) {
  const Table table(device_, 16, 4);
  cuda::QueryWorkspace workspace;
  workspace.max_positions = 8;
  cuda::QueryPart part{table.table, nullptr, 9, 0.0f, nullptr};
  EXPECT_EQ(device_.Query(&part, 1, workspace, 1, nullptr), cuda::kErrorInvalidValue);  // too many positions
  part.count = 1;
  EXPECT_EQ(device_.Query(&part, 1, workspace, 0, nullptr), cuda::kErrorInvalidValue);  // stamp 0
  const std::vector<cuda::QueryPart> many(cuda::kMaxQueryParts + 1, part);
  EXPECT_EQ(device_.Query(many.data(), static_cast<int>(many.size()), workspace, 1, nullptr), cuda::kErrorInvalidValue);
  EXPECT_EQ(device_.Fill(many.data(), 2, workspace, {.missing_positions = 1, .missing_keys = 1}, nullptr),
            cuda::kErrorInvalidValue);  // rows of two tables without offsets
  part.table.row_bytes = 6;
  EXPECT_EQ(device_.Query(&part, 1, workspace, 1, nullptr), cuda::kErrorInvalidValue);
  CacheTable small = table.table;
  small.num_buckets = 3;
  EXPECT_EQ(device_.Clear(small, nullptr), cuda::kErrorInvalidValue);
  EXPECT_EQ(device_.Insert(small, nullptr, nullptr, 1, false, nullptr, nullptr), cuda::kErrorInvalidValue);
  EXPECT_EQ(device_.Update(small, nullptr, nullptr, 1, nullptr), cuda::kErrorInvalidValue);
  EXPECT_EQ(device_.Erase(small, nullptr, 1, nullptr), cuda::kErrorInvalidValue);
  EXPECT_EQ(device_.Dump(table.table, 3, 17, nullptr, nullptr, nullptr), cuda::kErrorInvalidValue);
}

TEST_F(HostDeviceTest, SecondBucketsTakeWhatFirstOnesCannot) {
  std::mt19937_64 random(3);
  std::vector<int64_t> keys(4900);
  for (int64_t& key : keys) key = static_cast<int64_t>(random());
  const Table with(device_, 1000, 4), without(device_, 1000, 4);
  const uint32_t lost = Insert(with, keys, true), lost_without = Insert(without, keys, false);
  EXPECT_LT(lost, keys.size() / 50);
  EXPECT_LT(lost * 3, lost_without);
  const std::set<int64_t> held = Dump(with);
  EXPECT_EQ(held.size() + lost, keys.size());
  // Those in second buckets are there already, and are erased like the others.
  EXPECT_EQ(Insert(with, {held.begin(), held.end()}, true), 0u);
  EXPECT_EQ(Dump(with), held);
  const DeviceArray<int64_t> device_keys(device_, keys);
  ASSERT_EQ(device_.Erase(with.table, device_keys.get(), 4900, nullptr), 0);
  EXPECT_TRUE(Dump(with).empty());
  ASSERT_EQ(device_.Erase(without.table, device_keys.get(), 4900, nullptr), 0);
  EXPECT_TRUE(Dump(without).empty());
}

}  // namespace
}  // namespace hps::testing
