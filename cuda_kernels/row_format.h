// RowFormat: how the rows of a device cache lie in memory. Queries give float32 whatever the format. The same code runs
// on the device and on the host.
//
// kInt8: a row is one float32, the scale, and a signed byte for each value, filled up with zeros to a multiple of 4; a
// value is byte * scale. The scale is a 127th of the row's largest absolute value A, so that every value is off by at
// most A * (1/254 + 2^-20), and by 2e-43 more where A is that small. A row with a value that is not finite becomes NaN
// in all its values. Why not e4m3: docs/design/0012.

#ifndef HPS_CUDA_KERNELS_ROW_FORMAT_H_
#define HPS_CUDA_KERNELS_ROW_FORMAT_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_kernels/cache_bucket.h"

namespace hps::cuda {

enum class RowFormat : uint32_t { kFloat32, kInt8 };

inline constexpr uint32_t kInt8ValuesAt = sizeof(float);  // behind the scale

// Bytes of a row in memory, of which queries make `row_bytes` bytes of float32.
HPS_HOST_DEVICE uint32_t StoredRowBytes(RowFormat format, uint32_t row_bytes) {
  return format == RowFormat::kFloat32 ? row_bytes : kInt8ValuesAt + (row_bytes / 4 + 3) / 4 * 4;
}

HPS_HOST_DEVICE uint32_t FloatBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
HPS_HOST_DEVICE float BitsFloat(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Absolute values compare as these bits do, NaN above all.
HPS_HOST_DEVICE uint32_t MagnitudeBits(float value) { return FloatBits(value) & 0x7FFFFFFF; }

// The scale of a row, by the largest MagnitudeBits of its values.
HPS_HOST_DEVICE float Int8Scale(uint32_t largest) {
  if (largest >= 0x7F800000) return BitsFloat(0x7FC00000);
  const float scale = BitsFloat(largest) / 127.0f;
  // Of the largest floats the division may round up, and the way back would end in infinity.
  return MagnitudeBits(scale * 127.0f) < 0x7F800000 ? scale : BitsFloat(FloatBits(scale) - 1);
}
HPS_HOST_DEVICE int8_t Int8Of(float value, float scale) {
  if (!(scale > 0.0f)) return 0;
  const float steps = rintf(value / scale);
  return static_cast<int8_t>(steps > 127.0f ? 127.0f : steps < -127.0f ? -127.0f : steps);
}

}  // namespace hps::cuda

#endif  // HPS_CUDA_KERNELS_ROW_FORMAT_H_
