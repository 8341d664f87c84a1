// The suite of lookups over caches, without faults of the device: over the host device everywhere
// (device_lookup_test.cc), over a GPU where there is one (cuda_cache_test.cc).

#ifndef HPS_TESTS_DEVICE_LOOKUP_SUITE_H_
#define HPS_TESTS_DEVICE_LOOKUP_SUITE_H_

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cc/tests/cache_fixture.h"

namespace hps::testing {

// What both kinds of tests look up with: one cache over tables in a map.
template <typename DeviceType>
class DeviceLookupFixture {
 protected:
  void Open(std::shared_ptr<DeviceType> device) {
    device_ = std::move(device);
    ASSERT_NE(device_, nullptr);
    resources_ = Value(DeviceResources::Open(device_, {.reserved = 1, .limit = 4, .size = {64, 0}}));
    cache_ = Value(DeviceCache::Make(resources_, SpecOf(4, 7000)));
  }
  DeviceLookup Lookups(std::optional<double> threshold = std::nullopt) {
    return DeviceLookup(resources_, source_, inserts_, {threshold});
  }
  // Looks keys of table 0 up; expects each in the version that `version` tells, 0: default.
  void Expect(const DeviceLookup& lookups, const std::vector<Key>& keys, const std::function<int(Key)>& version,
              LookupReport* report = nullptr) {
    const Asked asked(*device_, cache_, 0, keys);
    const CachedLookup lookup = asked.lookup();
    LookupReport local;
    ASSERT_OK(lookups.Lookup(std::span(&lookup, 1), nullptr, {}, report != nullptr ? report : &local));
    const std::vector<int> versions = asked.Versions();
    for (size_t i = 0; i < keys.size(); ++i) ASSERT_EQ(versions[i], version(keys[i])) << "key " << keys[i];
  }

  std::shared_ptr<DeviceType> device_;
  const std::shared_ptr<MapSource> source_ = std::make_shared<MapSource>(std::vector<uint32_t>{4, 16, 7});
  DeviceResources resources_;
  std::shared_ptr<DeviceCache> cache_;
  std::shared_ptr<InsertQueue> inserts_ = std::make_shared<InsertQueue>();
};

class DeviceLookupSuite : public ::testing::TestWithParam<CacheFixture>, public DeviceLookupFixture<cuda::Device> {
 protected:
  void SetUp() override { Open(GetParam().open()); }
};

}  // namespace hps::testing

#endif  // HPS_TESTS_DEVICE_LOOKUP_SUITE_H_
