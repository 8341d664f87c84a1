// Gather: consecutive threads copy consecutive words of a row, so that a warp reads and writes whole lines.
//
// Invariants: `Word` is the widest type to which the row size and both pointers are aligned; a row is `row_words`
// words; grid-stride loops make any count legal for any grid.

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_kernels/gather.h"

namespace hps::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65536;

template <typename Word>
__device__ Word Filled(float value);
template <>
__device__ float Filled<float>(float value) {
  return value;
}
template <>
__device__ float2 Filled<float2>(float value) {
  return make_float2(value, value);
}
template <>
__device__ float4 Filled<float4>(float value) {
  return make_float4(value, value, value, value);
}

template <typename Word>
__global__ void Gather(const Word* __restrict__ table, int64_t table_rows, int64_t row_words,
                       const int64_t* __restrict__ indices, int64_t total_words, float default_value,
                       Word* __restrict__ output) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t word = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; word < total_words; word += step) {
    const int64_t row = word / row_words;
    const int64_t index = indices[row];
    const bool present = index >= 0 && index < table_rows;
    output[word] = present ? table[index * row_words + (word - row * row_words)] : Filled<Word>(default_value);
  }
}

template <typename Word>
int Launch(const void* table, int64_t table_rows, size_t row_bytes, const int64_t* indices, int64_t count,
           float default_value, void* output, cudaStream_t stream) {
  const int64_t row_words = static_cast<int64_t>(row_bytes / sizeof(Word));
  const int64_t total_words = count * row_words;
  const int64_t blocks = std::min((total_words + kThreads - 1) / kThreads, kMaxBlocks);
  Gather<Word><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(static_cast<const Word*>(table), table_rows,
                                                                       row_words, indices, total_words, default_value,
                                                                       static_cast<Word*>(output));
  return cudaGetLastError();
}

}  // namespace

int LaunchGather(const void* table, int64_t table_rows, size_t row_bytes, const int64_t* indices, int64_t count,
                 float default_value, void* output, cudaStream_t stream) {
  if (row_bytes == 0 || row_bytes % sizeof(float) != 0 || count < 0 || table_rows < 0) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  const uintptr_t alignment = reinterpret_cast<uintptr_t>(table) | reinterpret_cast<uintptr_t>(output) | row_bytes;
  const auto launch = alignment % sizeof(float4) == 0   ? Launch<float4>
                      : alignment % sizeof(float2) == 0 ? Launch<float2>
                                                        : Launch<float>;
  return launch(table, table_rows, row_bytes, indices, count, default_value, output, stream);
}

const char* ErrorText(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace hps::cuda
