// The suites of caches and lookups over the first GPU and, where there are several, over the last one, which is not the
// threads' current device. Built where CUDA is, run by `./dev test-gpu`; without a GPU it fails.

#include <iostream>
#include <string>
#include <vector>

#include "cc/tests/cache_conformance.h"
#include "cc/tests/device_lookup_suite.h"
#include "cc/tests/sparse_device_suite.h"
#include "cc/tests/whole_cache_suite.h"
#include "cuda_kernels/device.h"

namespace hps::testing {
namespace {

std::shared_ptr<cuda::Device> OpenGpu(int ordinal) {
  int error = 0;
  std::shared_ptr<cuda::Device> device = cuda::OpenCudaDevice(ordinal, &error);
  if (device == nullptr) std::cout << "no GPU: " << cuda::ErrorText(error) << std::endl;
  return device;
}

std::vector<CacheFixture> Gpus() {
  int count = 0;
  (void)cuda::CudaDeviceCount(&count);
  std::vector<CacheFixture> gpus = {{"Gpu0", [] { return OpenGpu(0); }}};
  if (count > 1) gpus.push_back({"Gpu" + std::to_string(count - 1), [count] { return OpenGpu(count - 1); }});
  return gpus;
}

INSTANTIATE_TEST_SUITE_P(All, CacheConformance, ::testing::ValuesIn(Gpus()),
                         [](const auto& info) { return info.param.name; });

INSTANTIATE_TEST_SUITE_P(All, DeviceLookupSuite, ::testing::ValuesIn(Gpus()),
                         [](const auto& info) { return info.param.name; });

INSTANTIATE_TEST_SUITE_P(All, SparseDeviceSuite, ::testing::ValuesIn(Gpus()),
                         [](const auto& info) { return info.param.name; });

INSTANTIATE_TEST_SUITE_P(All, WholeCacheSuite,
                         ::testing::Combine(::testing::ValuesIn(Gpus()), ::testing::ValuesIn(RowLayouts())),
                         WholeCacheSuite::NameOf);

}  // namespace
}  // namespace hps::testing
