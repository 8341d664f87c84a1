// Rows of a cache's format on the host: what the device does to them, said plainly, and for the host that writes rows
// itself.
//
// Thread safety: plain functions.

#ifndef HPS_CACHE_ROW_CODEC_H_
#define HPS_CACHE_ROW_CODEC_H_

#include "cuda_kernels/row_format.h"

namespace hps {

// row_bytes of float32 into StoredRowBytes, and back. Neither needs any alignment.
void EncodeRow(cuda::RowFormat format, uint32_t row_bytes, const void* row, void* stored);
void DecodeRow(cuda::RowFormat format, uint32_t row_bytes, const void* stored, void* row);

}  // namespace hps

#endif  // HPS_CACHE_ROW_CODEC_H_
