// Caches of whole tables over the host device: the suite, and faults that can be ordered there.

#include "cc/cache/host_device.h"
#include "cc/tests/whole_cache_suite.h"

namespace hps::testing {
namespace {

INSTANTIATE_TEST_SUITE_P(All, WholeCacheSuite,
                         ::testing::Combine(::testing::Values(CacheFixture{
                                                "HostDevice", [] { return std::make_shared<HostDevice>(); }}),
                                            ::testing::ValuesIn(RowLayouts())),
                         WholeCacheSuite::NameOf);

class WholeCacheFaults : public WholeCacheSuite {};

INSTANTIATE_TEST_SUITE_P(All, WholeCacheFaults,
                         ::testing::Combine(::testing::Values(CacheFixture{
                                                "HostDevice", [] { return std::make_shared<HostDevice>(); }}),
                                            ::testing::ValuesIn(RowLayouts())),
                         WholeCacheSuite::NameOf);

// Each allocation fails once: a clear error, nothing left, and the next start succeeds.
TEST_P(WholeCacheFaults, EachAllocationMayFail) {
  auto& device = dynamic_cast<HostDevice&>(*device_);
  const uint64_t before = device.allocations();
  uint64_t n = 1;
  for (;; ++n) {
    device.FailAllocation(n);
    const auto cache = TryMake(16, KeyRange(0, 500));
    device.FailAllocation(0);
    if (cache.ok()) break;
    ExpectError(cache.status(), StatusCode::kResourceExhausted, {"device 0", "bytes of", "table 't'"});
    ASSERT_EQ(device.allocations(), before);
    ASSERT_LT(n, 10u);
  }
  EXPECT_GE(n, 3u);
}

TEST_P(WholeCacheFaults, MemoryIsWhatWasPlanned) {
  auto& device = dynamic_cast<HostDevice&>(*device_);
  const uint64_t device_bytes = device.allocated_bytes(), pinned_bytes = device.pinned_bytes();
  CacheSpec spec = Spec(30);
  spec.capacity_rows = 12'345;
  const CacheMemory planned = DeviceCache::MemoryOf(spec);
  const auto cache = Value(DeviceCache::MakeWhole(resources_, spec, [](const ScanVisitor&) { return OkStatus(); }));
  EXPECT_EQ(device.allocated_bytes() - device_bytes, planned.device_bytes);
  EXPECT_EQ(device.pinned_bytes() - pinned_bytes, planned.pinned_bytes);
}

TEST_P(WholeCacheFaults, AScanThatFailsLeavesNothing) {
  auto& device = dynamic_cast<HostDevice&>(*device_);
  const uint64_t before = device.allocations();
  int scans = 0;
  const auto cache = DeviceCache::MakeWhole(resources_, Spec(4), [&](const ScanVisitor& visitor) -> Status {
    if (scans++ == 1) return Unavailable("the tier is down");
    const std::vector<std::byte> rows(160);
    return visitor(KeyRange(0, 10), {rows.data(), 16});
  });
  ExpectError(cache.status(), StatusCode::kUnavailable, {"down"});
  EXPECT_EQ(device.allocations(), before);
}

}  // namespace
}  // namespace hps::testing
