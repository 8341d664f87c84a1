// Lock order: stop_mutex_, mutex_. Tables are written with neither held.

#include "cc/core/promoter.h"

#include <cstring>
#include <utility>

#include "cc/base/hash.h"

namespace hps {
namespace {

size_t Bytes(const PromotionBatch& batch) { return batch.rows.size() + batch.keys.size() * sizeof(Key); }

void Count(Counter* counter, size_t rows) {
  if (counter != nullptr && rows > 0) counter->Add(rows);
}

}  // namespace

Promoter::Promoter() : thread_([this] { Run(); }) {}

Promoter::~Promoter() { Stop(); }

void Promoter::Stop() {
  std::deque<PromotionBatch> dropped;  // freed after the lock
  std::lock_guard stop_lock(stop_mutex_);
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    dropped.swap(queue_);
    queued_bytes_ = 0;
  }
  for (const PromotionBatch& batch : dropped) Count(batch.counters.dropped, batch.keys.size());
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

uint64_t Promoter::Mark(const Table& table, Key key) {
  return SlotHash(static_cast<uint64_t>(key) ^ SlotHash(reinterpret_cast<uintptr_t>(&table))) | 1;
}

// Two rows with one mark are as good as never met; the second would only not be promoted this time.
void Promoter::DropRepeated(PromotionBatch* batch) {
  const size_t row_bytes = batch->table->spec().row_bytes;
  size_t kept = 0;
  for (size_t i = 0; i < batch->keys.size(); ++i) {
    const uint64_t mark = Mark(*batch->table, batch->keys[i]);
    uint64_t& place = filter_[mark / 2 % kFilterSlots];
    if (place == mark) continue;
    place = mark;
    if (kept != i) {
      batch->keys[kept] = batch->keys[i];
      std::memcpy(batch->rows.data() + kept * row_bytes, batch->rows.data() + i * row_bytes, row_bytes);
    }
    ++kept;
  }
  Count(batch->counters.repeated, batch->keys.size() - kept);
  batch->keys.resize(kept);
  batch->rows.resize(kept * row_bytes);
}

void Promoter::Forget(const PromotionBatch& batch) {
  for (const Key key : batch.keys) {
    const uint64_t mark = Mark(*batch.table, key);
    uint64_t& place = filter_[mark / 2 % kFilterSlots];
    if (place == mark) place = 0;
  }
}

void Promoter::Enqueue(PromotionBatch batch) {
  {
    std::lock_guard lock(mutex_);
    // Full or not, a batch that repeats what is queued takes no place.
    if (!stopping_) DropRepeated(&batch);
    if (batch.keys.empty()) return;
    if (stopping_ || queued_bytes_ + Bytes(batch) > kQueueBytes) {
      Forget(batch);
      Count(batch.counters.dropped, batch.keys.size());
      return;
    }
    queued_bytes_ += Bytes(batch);
    queue_.push_back(std::move(batch));
  }
  changed_.notify_all();
}

void Promoter::Drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return stopping_ || (queue_.empty() && !busy_); });
}

Status Promoter::Write(const PromotionBatch& batch) {
  if (batch.breaker != nullptr) HPS_RETURN_IF_ERROR(batch.breaker->Admit());
  const size_t row_bytes = batch.table->spec().row_bytes;
  Status status = batch.table->Upsert(batch.keys, {batch.rows.data(), row_bytes}, {.only_absent = true});
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

void Promoter::Run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    PromotionBatch batch = std::move(queue_.front());
    queue_.pop_front();
    queued_bytes_ -= Bytes(batch);
    busy_ = true;
    lock.unlock();
    // A table that was dropped or closed meanwhile is no news; the rows are simply not promoted.
    const bool written = Write(batch).ok();
    Count(written ? batch.counters.promoted : batch.counters.dropped, batch.keys.size());
    lock.lock();
    Forget(batch);
    busy_ = false;
    lock.unlock();
    batch = {};  // may free a table
    changed_.notify_all();
    lock.lock();
  }
}

}  // namespace hps
