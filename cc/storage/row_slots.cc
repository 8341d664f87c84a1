// Invariant: each slot of the partition is in exactly one place: the index, run_, free_, pending_ or a batch.

#include "cc/storage/row_slots.h"

#include <algorithm>

#include "hps/epoch.h"

namespace hps {
namespace {

// One epoch, a contended counter, is taken for so many retired slots.
constexpr size_t kBatchSlots = 128;
// The oldest batch is looked at again after so many slots: a long-lived reader must not make every write scan threads.
constexpr uint32_t kTakesBetweenChecks = 32;
constexpr uint64_t kRunBytes = 64 << 10;

}  // namespace

Status RowSlots::Take(uint64_t rows, uint32_t* slot) {
  if (free_.empty() && !retired_.empty() && takes_until_check_-- == 0) {
    takes_until_check_ = kTakesBetweenChecks;
    if (retired_.front().epoch < SafeEpoch()) {
      free_ = std::move(retired_.front().slots);
      retired_.pop_front();
      takes_until_check_ = 0;
    }
  }
  if (!free_.empty()) {
    *slot = free_.back();
    free_.pop_back();
    return OkStatus();
  }
  if (run_.first == run_.last) {
    // Long runs keep writers from the slab's lock; one of 1/32 of the rows bounds what lies unused.
    const uint64_t most = std::max<uint64_t>(kRunBytes / slab_->row_bytes(), 1);
    HPS_RETURN_IF_ERROR(slab_->TakeRun(static_cast<uint32_t>(std::clamp<uint64_t>(rows / 32, 1, most)), &run_));
  }
  *slot = run_.first++;
  return OkStatus();
}

void RowSlots::Retire(uint32_t slot) {
  pending_.push_back(slot);
  if (pending_.size() < kBatchSlots) return;
  retired_.push_back({RetireEpoch(), std::move(pending_)});
  pending_.clear();
}

uint64_t RowSlots::list_bytes() const {
  uint64_t slots = free_.capacity() + pending_.capacity();
  for (const Batch& batch : retired_) slots += batch.slots.capacity();
  return slots * sizeof(uint32_t) + retired_.size() * sizeof(Batch);
}

}  // namespace hps
