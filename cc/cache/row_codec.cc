#include "cc/cache/row_codec.h"

#include <algorithm>
#include <cstring>

namespace hps {

using cuda::RowFormat;

void EncodeRow(RowFormat format, uint32_t row_bytes, const void* row, void* stored) {
  if (format == RowFormat::kFloat32) {
    std::memcpy(stored, row, row_bytes);
    return;
  }
  const uint32_t width = row_bytes / sizeof(float);
  const auto value = [row](uint32_t i) {
    float x = 0;
    std::memcpy(&x, static_cast<const char*>(row) + i * sizeof(float), sizeof(x));
    return x;
  };
  uint32_t largest = 0;
  for (uint32_t i = 0; i < width; ++i) largest = std::max(largest, cuda::MagnitudeBits(value(i)));
  const float scale = cuda::Int8Scale(largest);
  std::memset(stored, 0, cuda::StoredRowBytes(format, row_bytes));
  std::memcpy(stored, &scale, sizeof(scale));
  auto* const bytes = static_cast<int8_t*>(stored) + cuda::kInt8ValuesAt;
  for (uint32_t i = 0; i < width; ++i) bytes[i] = cuda::Int8Of(value(i), scale);
}

void DecodeRow(RowFormat format, uint32_t row_bytes, const void* stored, void* row) {
  if (format == RowFormat::kFloat32) {
    std::memcpy(row, stored, row_bytes);
    return;
  }
  float scale = 0;
  std::memcpy(&scale, stored, sizeof(scale));
  const auto* const bytes = static_cast<const int8_t*>(stored) + cuda::kInt8ValuesAt;
  for (uint32_t i = 0; i < row_bytes / sizeof(float); ++i) {
    const float x = static_cast<float>(bytes[i]) * scale;
    std::memcpy(static_cast<char*>(row) + i * sizeof(float), &x, sizeof(x));
  }
}

}  // namespace hps
