// The suite of servers with caches over the GPUs of the machine: the first two, or the only one under both numbers.
// Built where CUDA is, run by `./dev test-gpu`; without a GPU it fails.

#include <cstdlib>
#include <iostream>

#include "cc/tests/device_server_suite.h"
#include "tests/gpu/stream_graph.h"

namespace hps::testing {
namespace {

std::shared_ptr<cuda::Device> OpenGpu(int ordinal) {
  int count = 0;
  int error = cuda::CudaDeviceCount(&count);
  std::shared_ptr<cuda::Device> device;
  if (error == 0) device = cuda::OpenCudaDevice(ordinal < count ? ordinal : 0, &error);
  if (device == nullptr) {
    std::cerr << "no GPU: " << cuda::ErrorText(error) << std::endl;
    std::exit(1);
  }
  static const bool told = [&] {
    std::cout << (count > 1 ? "two GPUs: " : "one GPU for both devices: ") << device->info().name << std::endl;
    return true;
  }();
  (void)told;
  return device;
}

ServerFixture Gpus() {
  ServerFixture fixture;
  fixture.name = "Gpu";
  fixture.open = OpenGpu;
  fixture.begin_capture = [](cuda::Device&, cudaStream_t stream) { return BeginCapture(stream); };
  fixture.end_capture = [](cuda::Device&, cudaStream_t stream) -> ServerFixture::Graph {
    int error = 0;
    const std::shared_ptr<StreamGraph> graph = StreamGraph::EndCapture(stream, &error);
    if (graph == nullptr) {
      std::cout << "the capture has failed: " << cuda::ErrorText(error) << std::endl;
      return nullptr;
    }
    return [graph](cudaStream_t on) { return graph->Replay(on); };
  };
  return fixture;
}

INSTANTIATE_TEST_SUITE_P(All, DeviceServerSuite, ::testing::Values(Gpus()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(All, DeviceRowsSuite, ::testing::Values(Gpus()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(All, SharedTablesSuite, ::testing::Values(Gpus()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(All, ManyModelsSuite, ::testing::Values(Gpus()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(All, SharingScenarios, ::testing::Values(Gpus()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace hps::testing
