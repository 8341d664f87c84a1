// Launch interface of the device code: raw pointers and a stream, nothing of CUDA's headers, of TensorFlow or of cc/.
//
// All calls are asynchronous in `stream` and safe from any thread. Pointers are device memory (or host memory that the
// device can read) and must stay valid until the stream has passed the call. Return value: 0, or the cudaError_t that
// made the launch impossible; errors inside a kernel appear at the next synchronisation, as usual in CUDA.

#ifndef HPS_CUDA_KERNELS_GATHER_H_
#define HPS_CUDA_KERNELS_GATHER_H_

#include <cstddef>
#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as in CUDA's own headers, so that both may be included

namespace hps::cuda {

// Copies rows by index: output[i] = table[indices[i]], each row_bytes long, packed.
// An index below 0 or at or above table_rows names no row: each 4-byte element of output[i] becomes default_value.
//   table    [table_rows, row_bytes], may be null where table_rows is 0
//   indices  [count]
//   output   [count, row_bytes], must not overlap table
// row_bytes is any positive multiple of 4. It is fastest where it and both pointers are multiples of 16.
int LaunchGather(const void* table, int64_t table_rows, size_t row_bytes, const int64_t* indices, int64_t count,
                 float default_value, void* output, cudaStream_t stream);

// "no CUDA-capable device is detected" and the like, for messages.
const char* ErrorText(int error);

}  // namespace hps::cuda

#endif  // HPS_CUDA_KERNELS_GATHER_H_
