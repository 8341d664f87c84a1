#include "cc/core/promoter.h"

#include <cstring>
#include <utility>

#include "cc/base/system_limits.h"

namespace hps {
namespace {

size_t Bytes(const PromotionBatch& batch) { return batch.rows.size() + batch.keys.size() * sizeof(Key); }

void Count(Counter* counter, size_t rows) {
  if (counter != nullptr && rows > 0) counter->Add(rows);
}

}  // namespace

void Promoter::DropRepeated(PromotionBatch* batch) {
  const size_t row_bytes = batch->table->spec().row_bytes;
  size_t kept = 0;
  const size_t repeated = queued_.Add(batch->table.get(), batch->keys, [&](size_t i) {
    if (kept != i) {
      batch->keys[kept] = batch->keys[i];
      std::memcpy(batch->rows.data() + kept * row_bytes, batch->rows.data() + i * row_bytes, row_bytes);
    }
    ++kept;
  });
  Count(batch->counters.repeated, repeated);
  batch->keys.resize(kept);
  batch->rows.resize(kept * row_bytes);
}

void Promoter::Enqueue(PromotionBatch batch) {
  if (worker_.stopped()) return Count(batch.counters.dropped, batch.keys.size());
  // Full or not, a batch that repeats what is queued takes no place.
  DropRepeated(&batch);
  if (batch.keys.empty()) return;
  const auto queued = std::make_shared<const PromotionBatch>(std::move(batch));
  const bool taken = worker_.Offer(Bytes(*queued), [this, queued](bool dropped) { Promote(*queued, dropped); });
  if (!taken) Promote(*queued, /*dropped=*/true);
}

void Promoter::Promote(const PromotionBatch& batch, bool dropped) {
  // A table that was dropped or closed meanwhile is no news; the rows are simply not promoted.
  const bool written = !dropped && Write(batch).ok();
  queued_.Remove(batch.table.get(), batch.keys);
  Count(written ? batch.counters.promoted : batch.counters.dropped, batch.keys.size());
}

Status Promoter::Write(const PromotionBatch& batch) {
  if (batch.breaker != nullptr) HPS_RETURN_IF_ERROR(batch.breaker->Admit());
  const size_t row_bytes = batch.table->spec().row_bytes;
  Status status = WithinLimits("promoted rows", [&] {
    return batch.table->Upsert(batch.keys, {batch.rows.data(), row_bytes}, {.only_absent = true});
  });
  if (batch.breaker == nullptr) return status;
  const bool no_answer = status.code() == StatusCode::kUnavailable || status.code() == StatusCode::kDeadlineExceeded;
  if (status.ok()) {
    batch.breaker->Succeeded();
  } else if (no_answer) {
    batch.breaker->Failed(status);
  } else {
    batch.breaker->Undecided();
  }
  return status;
}

}  // namespace hps
