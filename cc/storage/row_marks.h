// RowMarks: what a bounded table notes beside each row about its use, so that an eviction can choose.
//
// One mark a slot: the time of the last use (4 bytes; evict_oldest), or a count of uses (1 byte; evict_least_used).
// evict_random, and a table without a margin, have none.
//
// Thread safety: marks are advice. All access is relaxed; two readers that count at the same moment may count once.

#ifndef HPS_STORAGE_ROW_MARKS_H_
#define HPS_STORAGE_ROW_MARKS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "cc/storage/overflow.h"

namespace hps {

enum class RowMark { kNone, kTime, kUses };

// What a table with these options keeps, and the part of it that reading a row changes.
inline RowMark KeptMark(const OverflowOptions& options) {
  if (!options.bounded() || options.policy == OverflowPolicy::kEvictRandom) return RowMark::kNone;
  return options.policy == OverflowPolicy::kEvictOldest ? RowMark::kTime : RowMark::kUses;
}
inline RowMark ReadMark(const OverflowOptions& options) {
  const RowMark kept = KeptMark(options);
  return kept == RowMark::kTime && !options.refresh_time_after_fetch ? RowMark::kNone : kept;
}
constexpr size_t MarkBytes(RowMark mark) {
  return mark == RowMark::kNone ? 0 : mark == RowMark::kTime ? sizeof(uint32_t) : sizeof(uint8_t);
}

// A count of uses in one byte: exact up to 16, above that 8 steps for each doubling, taken with the probability that
// makes them right on average. So a row that everybody reads is seldom written to.
class UseCount {
 public:
  static constexpr uint8_t kExact = 16;
  static constexpr uint8_t kStepsPerDoubling = 8;

  static uint8_t Halved(uint8_t count) { return count < kExact ? count / 2 : count - kStepsPerDoubling; }
  // Whether one more use moves the count on. *random is the caller's state, changed where chance decides.
  static bool Moves(uint8_t count, uint64_t* random) {
    if (count < kExact) return true;
    if (count == UINT8_MAX) return false;
    *random = *random * 6364136223846793005ull + 1442695040888963407ull;
    const int doublings = 1 + (count - kExact) / kStepsPerDoubling;
    return *random >> 32 < uint64_t{1} << (32 - (doublings < 32 ? doublings : 32));
  }
  // The uses that a count stands for, on average.
  static double Uses(uint8_t count) {
    if (count < kExact) return count;
    const int above = count - kExact;
    return static_cast<double>(uint64_t{1} << (above / kStepsPerDoubling)) * (kExact + 2 * (above % kStepsPerDoubling));
  }
};

class RowMarks {
 public:
  using Time = std::atomic_ref<uint32_t>;
  using Uses = std::atomic_ref<uint8_t>;

  static uint32_t GetTime(std::byte* mark) { return TimeAt(mark).load(std::memory_order_relaxed); }
  // Stores only what changes: a line that many readers share stays shared.
  static void SetTime(std::byte* mark, uint32_t now) {
    if (GetTime(mark) != now) TimeAt(mark).store(now, std::memory_order_relaxed);
  }
  static uint8_t GetUses(std::byte* mark) { return UsesAt(mark).load(std::memory_order_relaxed); }
  static void SetUses(std::byte* mark, uint8_t count) { UsesAt(mark).store(count, std::memory_order_relaxed); }
  static void AddUse(std::byte* mark, uint64_t* random) {
    const uint8_t count = GetUses(mark);
    if (UseCount::Moves(count, random)) SetUses(mark, count + 1);
  }

 private:
  static Time TimeAt(std::byte* mark) { return Time(*reinterpret_cast<uint32_t*>(mark)); }
  static Uses UsesAt(std::byte* mark) { return Uses(*reinterpret_cast<uint8_t*>(mark)); }
};

// The time of marks: it moves on with every write, and while the table is only read, once a second. Times are compared
// by their distance: a row that nobody used for 2^32 writes and that no eviction met looks young again.
class MarkClock {
 public:
  // The first of `count` moments, later than all before; for one upsert.
  uint32_t Advance(uint32_t count) { return now_.fetch_add(count, std::memory_order_relaxed) + 1; }
  // For one read; `second` is a clock that the caller reads.
  uint32_t Now(uint64_t second) {
    uint64_t seen = second_.load(std::memory_order_relaxed);
    if (seen != second && second_.compare_exchange_strong(seen, second, std::memory_order_relaxed)) return Advance(1);
    return now_.load(std::memory_order_relaxed);
  }
  uint32_t Last() const { return now_.load(std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<uint32_t> now_{0};
  std::atomic<uint64_t> second_{0};
};

}  // namespace hps

#endif  // HPS_STORAGE_ROW_MARKS_H_
