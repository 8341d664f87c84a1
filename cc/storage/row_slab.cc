// Invariants: slots below next_slot_ lie in committed memory; a run never crosses the end of a region.
// Lock order: mutex_ is a leaf.

#include "cc/storage/row_slab.h"

#include <algorithm>
#include <string>
#include <utility>

namespace hps {
namespace {

constexpr uint64_t kPageBytes = 4096;
// Without a hint the first region is one page.
constexpr uint64_t kFirstRegionBytes = 4096;
// From here on a huge page that is partly unused costs a few per cent at most.
constexpr uint64_t kHugePageRegionBytes = 32 << 20;

uint64_t FirstRegionSlots(size_t row_bytes, uint64_t expected_rows) {
  return std::bit_ceil(
      std::max<uint64_t>({std::min<uint64_t>(expected_rows, RowSlab::kMaxSlots), kFirstRegionBytes / row_bytes, 1}));
}

}  // namespace

RowSlab::RowSlab(size_t row_bytes, uint64_t expected_rows, uint64_t allocation_rate_bytes, RowMark mark)
    : row_bytes_(row_bytes),
      expected_rows_(expected_rows),
      allocation_rate_bytes_(allocation_rate_bytes),
      mark_(mark),
      mark_bytes_(MarkBytes(mark)),
      first_region_bits_(std::bit_width(FirstRegionSlots(row_bytes, expected_rows)) - 1),
      mark_regions_(mark == RowMark::kNone ? 0 : kMaxRegions) {}

Status RowSlab::TakeRun(uint32_t wanted, SlotRun* run) {
  const std::lock_guard lock(mutex_);
  if (next_slot_ >= kMaxSlots) {
    return ResourceExhausted("the table holds " + std::to_string(kMaxSlots) +
                             " rows, the most that one hash map table can; split it");
  }
  const size_t region = std::bit_width(next_slot_ >> first_region_bits_);
  const uint64_t first = RegionFirst(region);
  AnonymousMemory& memory = regions_[region];
  if (memory.data() == nullptr) {
    const uint64_t region_bytes = (RegionLast(region) - first) * row_bytes_;
    if (mark_bytes_ > 0) {
      const uint64_t marks_bytes = (RegionLast(region) - first) * mark_bytes_;
      AnonymousMemory& marks = mark_regions_[region];
      HPS_ASSIGN_OR_RETURN(marks, AnonymousMemory::Reserve(marks_bytes, region_bytes >= kHugePageRegionBytes));
      mark_origins_[region].store(reinterpret_cast<uintptr_t>(marks.data()) - first * mark_bytes_,
                                  std::memory_order_relaxed);
    }
    HPS_ASSIGN_OR_RETURN(memory, AnonymousMemory::Reserve(region_bytes, region_bytes >= kHugePageRegionBytes));
    origins_[region].store(reinterpret_cast<uintptr_t>(memory.data()) - first * row_bytes_, std::memory_order_relaxed);
  }
  const uint64_t last = std::min({next_slot_ + wanted, RegionLast(region), uint64_t{kMaxSlots}});
  const uint64_t needed_bytes = (last - first) * row_bytes_;
  if (needed_bytes > memory.committed_bytes()) {
    // A step ends where the expected rows do, so that huge pages do not reach beyond them.
    uint64_t target_bytes = std::min<uint64_t>(memory.committed_bytes() + allocation_rate_bytes_, memory.bytes());
    const uint64_t expected_bytes = expected_rows_ * row_bytes_;
    if (region == 0 && needed_bytes <= expected_bytes) target_bytes = std::min(target_bytes, expected_bytes);
    HPS_RETURN_IF_ERROR(memory.Commit(std::max(target_bytes, needed_bytes)));
  }
  if (mark_bytes_ > 0) {
    AnonymousMemory& marks = mark_regions_[region];
    const uint64_t committed_slots = memory.committed_bytes() / row_bytes_;
    HPS_RETURN_IF_ERROR(marks.Commit(std::min<uint64_t>(committed_slots * mark_bytes_, marks.bytes())));
  }
  *run = {static_cast<uint32_t>(next_slot_), static_cast<uint32_t>(last)};
  next_slot_ = last;
  return OkStatus();
}

uint64_t RowSlab::touched_bytes() const {
  const std::lock_guard lock(mutex_);
  uint64_t bytes = 0;
  for (size_t region = 0; region < kMaxRegions && RegionFirst(region) < next_slot_; ++region) {
    const uint64_t used = std::min(next_slot_, RegionLast(region)) - RegionFirst(region);
    for (const size_t slot_bytes : {row_bytes_, mark_bytes_}) {
      bytes += (used * slot_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    }
  }
  return bytes;
}

}  // namespace hps
