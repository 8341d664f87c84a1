// Copying rows out of and into shared memory while others may write or read them.
//
// What is read may be torn: the reader finds out afterwards (multi_process_table.h), before it uses or shows it. Reads
// are wide moves where the machine has them, which no store of a writer can disturb in a way that matters, and atomic
// words for the thread sanitizer and for other machines. Between reading and checking there is a fence, which no read
// is moved across.

#ifndef HPS_STORAGE_SHARED_ROW_H_
#define HPS_STORAGE_SHARED_ROW_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__) && !defined(__SANITIZE_THREAD__)
#define HPS_WIDE_SHARED_READS
#include <emmintrin.h>
#endif

namespace hps {

// Words of shared memory.
template <typename Word>
inline Word LoadWord(const std::byte* place) {
  return std::atomic_ref<Word>(*reinterpret_cast<Word*>(const_cast<std::byte*>(place))).load(std::memory_order_relaxed);
}
template <typename Word>
inline void StoreWord(std::byte* place, Word word) {
  std::atomic_ref<Word>(*reinterpret_cast<Word*>(place)).store(word, std::memory_order_relaxed);
}
// REQUIRES whole words of 8 bytes.
inline void ZeroWords(std::byte* place, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; i += 8) StoreWord<uint64_t>(place + i, 0);
}

// Whole words of a row; what the row has not of the last one is zero. REQUIRES `to` aligned to Word.
template <typename Word>
inline void StoreSharedRow(std::byte* to, const std::byte* row, size_t bytes) {
  size_t i = 0;
  Word word;
  for (; i + sizeof(Word) <= bytes; i += sizeof(Word)) {
    std::memcpy(&word, row + i, sizeof(Word));
    StoreWord(to + i, word);
  }
  if (i == bytes) return;
  word = 0;
  std::memcpy(&word, row + i, bytes - i);
  StoreWord(to + i, word);
}

// REQUIRES `from` aligned to Word, and room for whole words at `to`, which is aligned to 16 bytes.
template <typename Word>
inline void LoadSharedRow(std::byte* to, const std::byte* from, size_t bytes) {
  size_t i = 0;
#ifdef HPS_WIDE_SHARED_READS
  // As wide as they are read again, or the processor would have to wait for the stores.
  for (; i + 16 <= bytes; i += 16) {
    _mm_store_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#endif
  for (; i < bytes; i += sizeof(Word)) {
    const Word word = LoadWord<Word>(from + i);
    std::memcpy(to + i, &word, sizeof(Word));
  }
}

}  // namespace hps

#endif  // HPS_STORAGE_SHARED_ROW_H_
