// EvictionSweep: chooses the rows that leave a full partition, a few thousand at a time.
//
// A sweep goes over the partition in steps. Each step looks at a share of the rows that hashing (and for dense keys a
// stride) has picked, and takes out of it the share of those that must go: the oldest, the least used, or any. So a
// partition of up to kStepRows rows is judged as a whole, and of a larger one each part like all of it; nothing is
// sorted, and no step takes longer because the partition is large.
//
// Thread safety: under the partition's mutex, which may be released between steps.

#ifndef HPS_STORAGE_HASH_MAP_EVICTION_H_
#define HPS_STORAGE_HASH_MAP_EVICTION_H_

#include <bitset>
#include <cstdint>
#include <vector>

#include "cc/storage/dense_index.h"
#include "cc/storage/hash_map_index.h"
#include "cc/storage/row_slab.h"
#include "cc/storage/row_slots.h"

namespace hps {

// The rows of the upsert that needs room: they leave last.
class SparedSlots {
 public:
  void Add(uint32_t slot) {
    slots_.push_back(slot);
    filter_.set(slot % filter_.size());
  }
  void Seal();  // after the last Add
  bool Contains(uint32_t slot) const { return filter_.test(slot % filter_.size()) && Search(slot); }

 private:
  bool Search(uint32_t slot) const;

  std::bitset<(1 << 17)> filter_;
  std::vector<uint32_t> slots_;
};

class EvictionSweep {
 public:
  static constexpr uint64_t kStepRows = 16'384;

  // Partition `number` of `num_partitions`.
  EvictionSweep(RowSlab* slab, DenseIndex* dense_index, RowSlots* slots, uint32_t number, uint32_t num_partitions)
      : slab_(slab),
        dense_index_(dense_index),
        slots_(slots),
        number_(number),
        num_partitions_(num_partitions),
        random_(number + 1) {}

  // Before the first step of an eviction from a partition of `rows` rows.
  void Begin(uint64_t rows);
  // Evicts some of the `surplus` rows by which the partition's `rows` are too many, and at least all of them when a
  // whole sweep's worth of steps has been taken; returns how many. `now` is the time of marks. `dense`: whether the
  // partition has rows in the dense index.
  uint64_t Step(HashMapIndex* index, uint64_t rows, uint64_t surplus, uint32_t now, bool dense,
                const SparedSlots& spared);

  // Frees what the steps of an eviction needed.
  void Rest() { candidates_ = {}; }

 private:
  // A row that may go. place: the key in the dense index, or a way of the hashed one.
  struct Candidate {
    uint64_t place;
    uint64_t rank;  // the lower, the sooner it goes
  };

  uint64_t Rank(uint32_t slot, uint32_t now, const SparedSlots& spared);
  uint32_t Random() {
    random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(random_ >> 32);
  }

  RowSlab* const slab_;
  DenseIndex* const dense_index_;
  RowSlots* const slots_;
  const uint32_t number_;
  const uint32_t num_partitions_;

  uint64_t steps_ = 0;       // of the current sweep
  uint64_t next_step_ = 0;   // == steps_: the sweep is over
  uint64_t rows_ahead_ = 0;  // rows that the sweep has not met, about
  uint64_t random_;
  std::vector<Candidate> candidates_;  // scratch
};

}  // namespace hps

#endif  // HPS_STORAGE_HASH_MAP_EVICTION_H_
