// What empty_kernel_op.cc needs of CUDA.

#ifndef HPS_BENCHMARKS_EMPTY_KERNEL_H_
#define HPS_BENCHMARKS_EMPTY_KERNEL_H_

#include <cstdint>

struct CUstream_st;

namespace hps {

// A zero word of the host that kernels see at *on_device; nullptr where there is no memory.
uint32_t* MappedWord(uint32_t** on_device);
// Launches a kernel that writes the stamp there.
int LaunchEmptyKernel(uint32_t* on_device, uint32_t stamp, CUstream_st* stream);

}  // namespace hps

#endif  // HPS_BENCHMARKS_EMPTY_KERNEL_H_
