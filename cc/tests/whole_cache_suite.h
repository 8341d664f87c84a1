// The suite of caches that hold a whole table, in each way that their rows may lie: over the host device everywhere
// (whole_cache_test.cc), over a GPU where there is one (cuda_cache_test.cc).

#ifndef HPS_TESTS_WHOLE_CACHE_SUITE_H_
#define HPS_TESTS_WHOLE_CACHE_SUITE_H_

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cc/tests/cache_fixture.h"

namespace hps::testing {

struct RowLayout {
  std::string name;  // letters and digits
  uint32_t device_ways = 7;
  bool int8 = false;
};
std::vector<RowLayout> RowLayouts();

class WholeCacheSuite : public ::testing::TestWithParam<std::tuple<CacheFixture, RowLayout>> {
 public:
  static std::string NameOf(const ::testing::TestParamInfo<ParamType>& info) {
    return std::get<0>(info.param).name + std::get<1>(info.param).name;
  }

 protected:
  void SetUp() override;
  const RowLayout& layout() const { return std::get<1>(GetParam()); }

  CacheSpec Spec(uint32_t width) const;
  // A cache of these keys, all of one version.
  Result<std::shared_ptr<DeviceCache>> TryMake(uint32_t width, const std::vector<Key>& keys, uint32_t version = 1);
  std::shared_ptr<DeviceCache> Make(uint32_t width, const std::vector<Key>& keys, uint32_t version = 1) {
    return Value(TryMake(width, keys, version));
  }
  Status Update(DeviceCache& cache, const std::vector<Key>& keys, uint32_t version);
  // Each key in this version, 0: the default value; by a query that tells what is missing and by one that does not.
  void Expect(DeviceCache& cache, const std::vector<Key>& keys, const std::function<uint32_t(Key)>& version);
  // What a query gives of a row.
  std::vector<float> Stored(Key key, uint32_t version, uint32_t width) const;
  // The version of a row among `versions`, 0 for the default value, -1 for anything else.
  int VersionOf(Key key, const float* row, uint32_t width, std::span<const uint32_t> versions) const;
  // How many of the keys have their rows in memory of the device.
  size_t OnDevice(const DeviceCache& cache, const std::vector<Key>& keys) const;

  std::shared_ptr<cuda::Device> device_;
  DeviceResources resources_;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_WHOLE_CACHE_SUITE_H_
