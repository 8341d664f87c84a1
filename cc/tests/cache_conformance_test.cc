// The caches over the host device through the conformance suite.

#include "cc/tests/cache_conformance.h"

#include "cc/cache/host_device.h"

namespace hps::testing {
namespace {

INSTANTIATE_TEST_SUITE_P(All, CacheConformance,
                         ::testing::Values(CacheFixture{"HostDevice", [] { return std::make_shared<HostDevice>(); }}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace hps::testing
