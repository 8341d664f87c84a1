// RowSlots: which slots of the slab one partition may write next, and which it must not write yet.
//
// A retired slot is handed out again only when no reader is left that may have its address (epoch.h).
// Thread safety: none; used under the partition's mutex.

#ifndef HPS_STORAGE_ROW_SLOTS_H_
#define HPS_STORAGE_ROW_SLOTS_H_

#include <cstdint>
#include <deque>
#include <vector>

#include "cc/storage/row_slab.h"
#include "hps/status.h"

namespace hps {

class RowSlots {
 public:
  explicit RowSlots(RowSlab* slab) : slab_(slab) {}

  // A slot that nobody reads. `rows` is how many the partition has; it decides how many are taken from the slab.
  Status Take(uint64_t rows, uint32_t* slot);
  // Gives back a slot that was never published.
  void PutBack(uint32_t slot) { free_.push_back(slot); }
  // Gives back a slot that has just been made unreachable for new readers.
  void Retire(uint32_t slot);

  // Memory of the lists.
  uint64_t list_bytes() const;

 private:
  struct Batch {
    uint64_t epoch;
    std::vector<uint32_t> slots;
  };

  RowSlab* const slab_;
  SlotRun run_;
  std::vector<uint32_t> free_;
  std::vector<uint32_t> pending_;  // retired, not yet tagged
  std::deque<Batch> retired_;      // in the order of their epochs
  uint32_t takes_until_check_ = 0;
};

}  // namespace hps

#endif  // HPS_STORAGE_ROW_SLOTS_H_
