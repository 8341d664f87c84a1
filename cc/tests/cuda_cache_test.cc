// The suites of caches and lookups over the first GPU. Built where CUDA is, run by `./dev test-gpu`; without a GPU it
// fails.

#include <iostream>

#include "cc/tests/cache_conformance.h"
#include "cc/tests/device_lookup_suite.h"
#include "cuda_kernels/device.h"

namespace hps::testing {
namespace {

std::shared_ptr<cuda::Device> OpenFirstGpu() {
  int error = 0;
  std::shared_ptr<cuda::Device> device = cuda::OpenCudaDevice(0, &error);
  if (device == nullptr) std::cout << "no GPU: " << cuda::ErrorText(error) << std::endl;
  return device;
}

INSTANTIATE_TEST_SUITE_P(All, CacheConformance, ::testing::Values(CacheFixture{"Gpu", OpenFirstGpu}),
                         [](const auto& info) { return info.param.name; });

INSTANTIATE_TEST_SUITE_P(All, DeviceLookupSuite, ::testing::Values(CacheFixture{"Gpu", OpenFirstGpu}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace hps::testing
