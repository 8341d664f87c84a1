// Rows whose bytes prove themselves: a row says which version it is and every other byte follows from (key, version),
// so that a torn, shifted or foreign row is seen.

#ifndef HPS_TESTS_ROW_PATTERN_H_
#define HPS_TESTS_ROW_PATTERN_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "cc/base/hash.h"
#include "hps/table_store.h"

namespace hps::testing {

// The first four bytes are the version; then a stream that depends on key, version and position.
inline void FillRow(Key key, uint32_t version, std::span<std::byte> row) {
  uint64_t word = version;
  for (size_t i = 0; i < row.size(); i += 4) {
    if (i > 0) word = SlotHash(static_cast<uint64_t>(key) * 31 + version + i * 0x10001ull) >> 7;
    std::memcpy(row.data() + i, &word, std::min<size_t>(4, row.size() - i));
  }
}

// The version of the row if it is whole and belongs to `key`.
inline std::optional<uint32_t> RowVersion(Key key, std::span<const std::byte> row) {
  uint32_t version = 0;
  std::memcpy(&version, row.data(), std::min<size_t>(4, row.size()));
  std::vector<std::byte> expected(row.size());
  FillRow(key, version, expected);
  if (std::memcmp(expected.data(), row.data(), row.size()) != 0) return std::nullopt;
  return version;
}

// A buffer of `rows` rows, `stride_bytes` apart, filled with a byte that FillRow's rows do not consist of.
class RowBlock {
 public:
  static constexpr std::byte kUntouched{0xA5};

  RowBlock(size_t rows, size_t row_bytes, size_t stride_bytes)
      : row_bytes_(row_bytes), stride_bytes_(stride_bytes), bytes_(rows * stride_bytes, kUntouched) {}
  RowBlock(size_t rows, size_t row_bytes) : RowBlock(rows, row_bytes, row_bytes) {}

  // A block that holds the rows of `keys` in `version`.
  static RowBlock Of(std::span<const Key> keys, uint32_t version, size_t row_bytes, size_t stride_bytes = 0) {
    RowBlock block(keys.size(), row_bytes, stride_bytes == 0 ? row_bytes : stride_bytes);
    for (size_t i = 0; i < keys.size(); ++i) FillRow(keys[i], version, block.row(i));
    return block;
  }

  std::span<std::byte> row(size_t i) { return {bytes_.data() + i * stride_bytes_, row_bytes_}; }
  std::span<const std::byte> row(size_t i) const { return {bytes_.data() + i * stride_bytes_, row_bytes_}; }
  RowBuffer buffer() { return {bytes_.data(), stride_bytes_}; }
  ConstRowBuffer source() const { return {bytes_.data(), stride_bytes_}; }

  // Whether row i, or the bytes between it and the next, still hold nothing but the filling.
  bool RowUntouched(size_t i) const { return Untouched(i * stride_bytes_, row_bytes_); }
  bool GapUntouched(size_t i) const { return Untouched(i * stride_bytes_ + row_bytes_, stride_bytes_ - row_bytes_); }

 private:
  bool Untouched(size_t first, size_t count) const {
    for (size_t i = first; i < first + count; ++i) {
      if (bytes_[i] != kUntouched) return false;
    }
    return true;
  }

  size_t row_bytes_;
  size_t stride_bytes_;
  std::vector<std::byte> bytes_;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_ROW_PATTERN_H_
