// Copying one row: inline and in wide moves, since a call of memcpy costs as much as a short row itself.

#ifndef HPS_STORAGE_ROW_COPY_H_
#define HPS_STORAGE_ROW_COPY_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace hps {

inline void CopyRow(std::byte* to, const std::byte* from, size_t row_bytes) {
  constexpr size_t kBlock = 32;
  if (row_bytes < kBlock) {
    for (; row_bytes >= 4; row_bytes -= 4, to += 4, from += 4) std::memcpy(to, from, 4);
    for (; row_bytes > 0; --row_bytes) *to++ = *from++;
    return;
  }
  for (size_t offset = 0; offset + kBlock <= row_bytes; offset += kBlock) {
    std::memcpy(to + offset, from + offset, kBlock);
  }
  std::memcpy(to + row_bytes - kBlock, from + row_bytes - kBlock, kBlock);  // overlaps the last block
}

// Copies around the cache: for output that is larger than the cache anyway, memory is then not read before it is
// written. Needs StreamingPossible for each row, and StreamingDone before others read the rows.
#ifdef __SSE2__
inline bool StreamingPossible(const std::byte* to, size_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(to) | row_bytes) % 16 == 0;
}
inline void StreamRow(std::byte* to, const std::byte* from, size_t row_bytes) {
  for (size_t offset = 0; offset < row_bytes; offset += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + offset),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + offset)));
  }
}
inline void StreamingDone() { _mm_sfence(); }
#else
inline bool StreamingPossible(const std::byte*, size_t) { return false; }
inline void StreamRow(std::byte* to, const std::byte* from, size_t row_bytes) { CopyRow(to, from, row_bytes); }
inline void StreamingDone() {}
#endif

inline void PrefetchRow(const std::byte* row, size_t row_bytes) {
  constexpr size_t kMaxBytes = 512;  // further lines follow by the hardware's own prefetching
  const size_t bytes = row_bytes < kMaxBytes ? row_bytes : kMaxBytes;
  for (size_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(row + offset);
}

}  // namespace hps

#endif  // HPS_STORAGE_ROW_COPY_H_
