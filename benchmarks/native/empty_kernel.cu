#include "benchmarks/native/empty_kernel.h"

namespace hps {
namespace {

__global__ void EmptyKernel(uint32_t* word, uint32_t stamp) { *word = stamp; }

}  // namespace

uint32_t* MappedWord(uint32_t** on_device) {
  void* word = nullptr;
  if (cudaHostAlloc(&word, sizeof(uint32_t), cudaHostAllocMapped) != cudaSuccess) return nullptr;
  if (cudaHostGetDevicePointer(reinterpret_cast<void**>(on_device), word, 0) != cudaSuccess) return nullptr;
  *static_cast<uint32_t*>(word) = 0;
  return static_cast<uint32_t*>(word);
}

int LaunchEmptyKernel(uint32_t* on_device, uint32_t stamp, CUstream_st* stream) {
  EmptyKernel<<<1, 1, 0, stream>>>(on_device, stamp);
  return cudaGetLastError();
}

}  // namespace hps
