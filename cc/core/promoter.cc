// Lock order: stop_mutex_, mutex_. Tables are written with neither held.

#include "cc/core/promoter.h"

namespace hps {

Promoter::Promoter(Counter* promoted_rows, Counter* dropped_rows)
    : promoted_rows_(promoted_rows), dropped_rows_(dropped_rows), thread_([this] { Run(); }) {}

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
  for (const PromotionBatch& batch : dropped) dropped_rows_->Add(batch.keys.size());
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Promoter::Enqueue(PromotionBatch batch) {
  const size_t bytes = batch.rows.size() + batch.keys.size() * sizeof(Key);
  {
    std::lock_guard lock(mutex_);
    if (stopping_ || queued_bytes_ + bytes > kQueueBytes) {
      dropped_rows_->Add(batch.keys.size());
      return;
    }
    queued_bytes_ += bytes;
    queue_.push_back(std::move(batch));
  }
  changed_.notify_all();
}

void Promoter::Drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return stopping_ || (queue_.empty() && !busy_); });
}

void Promoter::Run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    PromotionBatch batch = std::move(queue_.front());
    queue_.pop_front();
    queued_bytes_ -= batch.rows.size() + batch.keys.size() * sizeof(Key);
    busy_ = true;
    lock.unlock();
    const size_t row_bytes = batch.table->spec().row_bytes;
    Status status = batch.table->Upsert(batch.keys, {batch.rows.data(), row_bytes}, {.only_absent = true});
    // A table that was dropped or closed meanwhile is no news; the rows are simply not promoted.
    (status.ok() ? promoted_rows_ : dropped_rows_)->Add(batch.keys.size());
    batch = {};
    lock.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

}  // namespace hps
