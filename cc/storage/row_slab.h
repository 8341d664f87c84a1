// RowSlab: the rows of one hash map table, packed, addressed by slot numbers of 32 bits.
//
// Slots lie in regions: the first holds the expected rows, each further one as many as all before it together, so a
// row's address is one table look-up and one multiplication, and no row ever moves. A region is address space only;
// its memory is committed in steps of at most allocation_rate_bytes and touched when rows are written. Where marks are
// kept (row_marks.h), they lie in an array beside the rows of each region.
//
// Thread safety: Row may be called by any thread for slots it has learnt of through an acquire load; TakeRun and
// touched_bytes lock.

#ifndef HPS_STORAGE_ROW_SLAB_H_
#define HPS_STORAGE_ROW_SLAB_H_

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cc/storage/anonymous_memory.h"
#include "cc/storage/row_marks.h"
#include "hps/status.h"

namespace hps {

// Slots [first, last).
struct SlotRun {
  uint32_t first = 0;
  uint32_t last = 0;
};

class RowSlab {
 public:
  static constexpr uint32_t kMaxSlots = 0xFFFFFFFE;

  RowSlab(size_t row_bytes, uint64_t expected_rows, uint64_t allocation_rate_bytes, RowMark mark = RowMark::kNone);

  size_t row_bytes() const { return row_bytes_; }

  std::byte* Row(uint32_t slot) const {
    const size_t region = std::bit_width(uint64_t{slot} >> first_region_bits_);
    return reinterpret_cast<std::byte*>(origins_[region].load(std::memory_order_relaxed) + slot * row_bytes_);
  }

  RowMark mark() const { return mark_; }
  // The mark of a slot. REQUIRES mark() != kNone.
  std::byte* Mark(uint32_t slot) const {
    const size_t region = std::bit_width(uint64_t{slot} >> first_region_bits_);
    return reinterpret_cast<std::byte*>(mark_origins_[region].load(std::memory_order_relaxed) + slot * mark_bytes_);
  }

  // Hands out between 1 and `wanted` slots that were never used. kResourceExhausted if memory or slot numbers end.
  Status TakeRun(uint32_t wanted, SlotRun* run);

  // Memory that the slots handed out so far occupy once written, in whole pages.
  uint64_t touched_bytes() const;

 private:
  static constexpr size_t kMaxRegions = 33;

  uint64_t RegionFirst(size_t region) const {
    return region == 0 ? 0 : uint64_t{1} << (first_region_bits_ + region - 1);
  }
  uint64_t RegionLast(size_t region) const { return uint64_t{1} << (first_region_bits_ + region); }

  const size_t row_bytes_;
  const uint64_t expected_rows_;
  const uint64_t allocation_rate_bytes_;
  const RowMark mark_;
  const size_t mark_bytes_;
  const int first_region_bits_;  // the first region has 2^bits slots
  // Where slot 0 would lie if the region reached down to it. Written once, before a slot of the region is handed out.
  std::array<std::atomic<uintptr_t>, kMaxRegions> origins_{};
  std::array<std::atomic<uintptr_t>, kMaxRegions> mark_origins_{};

  mutable std::mutex mutex_;
  std::array<AnonymousMemory, kMaxRegions> regions_;  // guarded by mutex_
  std::vector<AnonymousMemory> mark_regions_;         // guarded by mutex_; empty without marks
  uint64_t next_slot_ = 0;                            // guarded by mutex_
};

}  // namespace hps

#endif  // HPS_STORAGE_ROW_SLAB_H_
