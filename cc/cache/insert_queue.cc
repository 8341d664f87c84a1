// Lock order: stop_mutex_, mutex_. Tiers and devices are asked with neither held.

#include "cc/cache/insert_queue.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cc/base/hash.h"

namespace hps {

InsertQueue::InsertQueue(size_t most_keys) : most_keys_(most_keys), thread_([this] { Run(); }) {}

InsertQueue::~InsertQueue() { Stop(); }

void InsertQueue::Stop() {
  std::deque<InsertBatch> dropped;  // freed after the lock
  std::lock_guard stop_lock(stop_mutex_);
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    cancelled_.store(true);
    dropped.swap(queue_);
    for (const InsertBatch& batch : dropped) {
      stats_.dropped += batch.keys.size();
      stats_.queued -= batch.keys.size();
    }
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

uint64_t InsertQueue::Mark(const InsertBatch& batch, Key key) {
  return SlotHash(static_cast<uint64_t>(key) ^ SlotHash(reinterpret_cast<uintptr_t>(batch.cache.get()))) | 1;
}

void InsertQueue::Forget(const InsertBatch& batch) {
  for (const Key key : batch.keys) {
    const uint64_t mark = Mark(batch, key);
    uint64_t& place = filter_[mark / 2 % kFilterSlots];
    if (place == mark) place = 0;
  }
}

void InsertQueue::Enqueue(InsertBatch batch) {
  {
    std::lock_guard lock(mutex_);
    const size_t asked = batch.keys.size();
    if (!stopping_) {
      std::erase_if(batch.keys,
                    [&](Key key) { return filter_[Mark(batch, key) / 2 % kFilterSlots] == Mark(batch, key); });
      stats_.repeated += asked - batch.keys.size();
    }
    if (batch.keys.empty()) return;
    if (stopping_ || stats_.queued + batch.keys.size() > most_keys_) {
      stats_.dropped += batch.keys.size();
      return;
    }
    for (const Key key : batch.keys) filter_[Mark(batch, key) / 2 % kFilterSlots] = Mark(batch, key);
    stats_.queued += batch.keys.size();
    queue_.push_back(std::move(batch));
  }
  changed_.notify_all();
}

void InsertQueue::Drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return stopping_ || (queue_.empty() && busy_ == nullptr); });
}

void InsertQueue::Remove(const DeviceCache* cache) {
  std::deque<InsertBatch> kept, dropped;  // the latter freed after the lock
  std::unique_lock lock(mutex_);
  for (InsertBatch& batch : queue_) {
    const bool removed = batch.cache.get() == cache;
    if (removed) {
      Forget(batch);
      stats_.dropped += batch.keys.size();
      stats_.queued -= batch.keys.size();
    }
    (removed ? dropped : kept).push_back(std::move(batch));
  }
  queue_.swap(kept);
  if (busy_ == cache) cancelled_.store(true);
  changed_.wait(lock, [&] { return busy_ != cache; });
  lock.unlock();
}

InsertQueue::Stats InsertQueue::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

Status InsertQueue::last_error() const {
  std::lock_guard lock(mutex_);
  return last_error_;
}

Status InsertQueue::Insert(const InsertBatch& batch, std::span<const Key> keys, uint64_t* absent) {
  const size_t row_bytes = batch.cache->spec().row_bytes;
  const EmbeddingCache::Stamp read_at = batch.cache->Now();
  rows_.resize(keys.size() * row_bytes);
  const auto found = std::make_unique<bool[]>(keys.size());
  const RowRequest request{batch.table, keys, rows_.data(), found.get()};
  LookupReport report;
  HPS_RETURN_IF_ERROR(batch.source->Fetch(std::span(&request, 1), {.cancelled = &cancelled_}, &report));
  std::vector<Key> held;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!found[i]) continue;
    if (held.size() != i) std::memcpy(rows_.data() + held.size() * row_bytes, rows_.data() + i * row_bytes, row_bytes);
    held.push_back(keys[i]);
  }
  *absent = keys.size() - held.size();
  return batch.cache->Insert(held, {rows_.data(), row_bytes}, read_at);
}

void InsertQueue::Run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    InsertBatch batch = std::move(queue_.front());
    queue_.pop_front();
    busy_ = batch.cache.get();
    cancelled_.store(false);
    lock.unlock();
    Stats done;
    Status status;
    const size_t step = std::max<size_t>(kPieceBytes / batch.cache->spec().row_bytes, 1);
    for (size_t first = 0; first < batch.keys.size() && status.ok(); first += step) {
      const auto keys = std::span(batch.keys).subspan(first, std::min(step, batch.keys.size() - first));
      uint64_t absent = 0;
      status = Insert(batch, keys, &absent);
      if (!status.ok()) break;
      done.absent += absent;
      done.inserted += keys.size() - absent;
    }
    lock.lock();
    Forget(batch);
    stats_.queued -= batch.keys.size();
    stats_.absent += done.absent;
    stats_.inserted += done.inserted;
    if (!status.ok()) {
      const bool ended = status.code() == StatusCode::kCancelled;  // by Stop or Remove
      (ended ? stats_.dropped : stats_.failed) += batch.keys.size() - done.absent - done.inserted;
      if (!ended) last_error_ = status;
    }
    lock.unlock();
    batch = {};  // may free a cache
    lock.lock();
    busy_ = nullptr;
    changed_.notify_all();
  }
}

}  // namespace hps
