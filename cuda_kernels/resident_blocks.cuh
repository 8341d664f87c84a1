// How many blocks of a kernel a device holds at once, asked of the runtime once for each kernel and device.
//
// Thread safety: any thread.

#ifndef HPS_CUDA_KERNELS_RESIDENT_BLOCKS_CUH_
#define HPS_CUDA_KERNELS_RESIDENT_BLOCKS_CUH_

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace hps::cuda {

// Of kNumKernels kernels, all launched with kThreads threads a block.
template <int kNumKernels, int kThreads>
class ResidentBlocks {
 public:
  // On the current device, at least 1. `number` tells the kernels apart: [0, kNumKernels).
  uint32_t Of(const void* kernel, int number) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 1;
    std::atomic<uint32_t>* const place = device < kMaxDevices ? &known_[device][number] : nullptr;
    uint32_t blocks = place != nullptr ? place->load(std::memory_order_relaxed) : 0;
    if (blocks != 0) return blocks;
    int each = 0, processors = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    blocks = static_cast<uint32_t>(std::max(1, each * processors));
    if (place != nullptr) place->store(blocks, std::memory_order_relaxed);
    return blocks;
  }

 private:
  static constexpr int kMaxDevices = 64;
  std::atomic<uint32_t> known_[kMaxDevices][kNumKernels] = {};
};

}  // namespace hps::cuda

#endif  // HPS_CUDA_KERNELS_RESIDENT_BLOCKS_CUH_
