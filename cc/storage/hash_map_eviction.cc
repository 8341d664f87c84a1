// Invariant: a sweep of n steps meets every row that stays where it is once, in one n-th of the hashed index or in one
// of every n blocks of dense keys; so a step sees rows of all ages, also of a table that was loaded in the order of its
// keys.

#include "cc/storage/hash_map_eviction.h"

#include <algorithm>
#include <limits>

namespace hps {
namespace {

constexpr uint64_t kDensePlace = uint64_t{1} << 63;
constexpr uint64_t kLastToGo = std::numeric_limits<uint64_t>::max();

}  // namespace

void SparedSlots::Seal() { std::sort(slots_.begin(), slots_.end()); }
bool SparedSlots::Search(uint32_t slot) const { return std::binary_search(slots_.begin(), slots_.end(), slot); }

// Chance decides among equals: they would otherwise leave in the order of the index and empty one part of it.
uint64_t EvictionSweep::Rank(uint32_t slot, uint32_t now, const SparedSlots& spared) {
  if (spared.Contains(slot)) return kLastToGo;
  uint32_t worth = 0;
  switch (slab_->mark()) {
    case RowMark::kNone: break;
    case RowMark::kTime: {
      const uint32_t age = now - RowMarks::GetTime(slab_->Mark(slot));
      // A reader may be a moment ahead of `now`.
      worth = age >= UINT32_MAX - UINT16_MAX ? UINT32_MAX - 1 : UINT32_MAX - 1 - age;
      break;
    }
    case RowMark::kUses: {
      const uint8_t uses = RowMarks::GetUses(slab_->Mark(slot));
      RowMarks::SetUses(slab_->Mark(slot), UseCount::Halved(uses));
      worth = uses;
    }
  }
  return uint64_t{worth} << 32 | Random();
}

void EvictionSweep::Begin(uint64_t rows) {
  steps_ = rows / kStepRows + 1;
  next_step_ = 0;
  rows_ahead_ = rows;
}

uint64_t EvictionSweep::Step(HashMapIndex* index, uint64_t rows, uint64_t surplus, uint32_t now, bool dense,
                             const SparedSlots& spared) {
  if (next_step_ == steps_) Begin(rows);  // other writers have filled up what the sweep had left
  const uint64_t step = next_step_++;

  // The rows of this step, at first with their slot in place of their rank.
  candidates_.clear();
  __extension__ using uint128 = unsigned __int128;
  const auto part = [&](uint64_t i) { return static_cast<uint64_t>(uint128{index->num_buckets()} * i / steps_); };
  const uint64_t first_bucket = part(step);
  const uint64_t last_bucket = part(step + 1);
  for (uint64_t bucket = first_bucket; bucket < last_bucket; ++bucket) {
    for (size_t way = 0; way < HashMapIndex::kWays; ++way) {
      const uint32_t entry = index->WayAt(bucket, way).row_entry();
      if (entry != 0) candidates_.push_back({bucket * 8 + way, entry - 1});
    }
  }
  if (dense) {
    for (uint64_t block = number_ + step * num_partitions_; block < dense_index_->num_blocks();
         block += steps_ * num_partitions_) {
      dense_index_->VisitBlock(block, [&](Key key, uint32_t slot) {
        candidates_.push_back({kDensePlace | static_cast<uint64_t>(key), slot});
      });
    }
  }

  constexpr size_t kAhead = 16;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    if (slab_->mark() != RowMark::kNone && i + kAhead < candidates_.size()) {
      __builtin_prefetch(slab_->Mark(static_cast<uint32_t>(candidates_[i + kAhead].rank)));
    }
    candidates_[i].rank = Rank(static_cast<uint32_t>(candidates_[i].rank), now, spared);
  }

  // Their share of what must go; the last step takes what is left.
  const uint64_t ahead = std::max<uint64_t>(next_step_ == steps_ ? 0 : rows_ahead_, candidates_.size());
  uint64_t leaving = std::min<uint64_t>(surplus, candidates_.size());
  if (ahead > candidates_.size()) {
    leaving =
        std::min<uint64_t>(leaving, static_cast<uint64_t>((uint128{surplus} * candidates_.size() + ahead - 1) / ahead));
  }
  rows_ahead_ -= std::min<uint64_t>(rows_ahead_, candidates_.size());
  if (leaving < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(leaving), candidates_.end(),
                     [](const Candidate& a, const Candidate& b) { return a.rank < b.rank; });
  }
  for (uint64_t i = 0; i < leaving; ++i) {
    const uint64_t place = candidates_[i].place;
    if ((place & kDensePlace) != 0) {
      const Key key = static_cast<Key>(place & ~kDensePlace);
      const uint32_t entry = dense_index_->Find(key);
      dense_index_->Erase(key);
      slots_->Retire(entry - 1);
    } else {
      const HashMapIndex::Way way = index->WayAt(place / 8, place % 8);
      index->Erase(way);
      slots_->Retire(way.row_entry() - 1);
    }
  }
  return leaving;
}

}  // namespace hps
