// Tiers and devices are asked without mutex_.

#include "cc/cache/insert_queue.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cc/base/system_limits.h"

namespace hps {

void InsertQueue::Stop() {
  {
    std::lock_guard lock(mutex_);
    ended_ = true;
    cancelled_.store(true);
  }
  worker_.Stop();
}

void InsertQueue::Enqueue(InsertBatch batch) {
  if (!worker_.stopped()) {
    size_t kept = 0;
    const size_t repeated =
        queued_.Add(batch.cache.get(), batch.keys, [&](size_t i) { batch.keys[kept++] = batch.keys[i]; });
    batch.keys.resize(kept);
    std::lock_guard lock(mutex_);
    stats_.repeated += repeated;
  }
  if (batch.keys.empty()) return;
  const size_t count = batch.keys.size();
  auto owned = std::make_shared<InsertBatch>(std::move(batch));
  const InsertBatch* const waiting = owned.get();
  {
    std::lock_guard lock(mutex_);
    stats_.queued += count;
    waiting_.emplace(waiting, std::move(owned));
  }
  if (!worker_.Offer(count, [this, waiting](bool drop) { Take(waiting, drop); })) Take(waiting, /*drop=*/true);
}

void InsertQueue::Remove(const DeviceCache* cache) {
  std::vector<std::shared_ptr<InsertBatch>> dropped;  // freed after the lock
  std::unique_lock lock(mutex_);
  for (auto place = waiting_.begin(); place != waiting_.end();) {
    if (place->second->cache.get() != cache) {
      ++place;
      continue;
    }
    Drop(*place->second);
    dropped.push_back(std::move(place->second));
    place = waiting_.erase(place);
  }
  if (busy_ == cache) cancelled_.store(true);
  let_go_.wait(lock, [&] { return busy_ != cache; });
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
  HPS_RETURN_IF_ERROR(batch.source->Fetch(std::span(&request, 1), {.cancelled = &cancelled_}, {}, &report));
  std::vector<Key> held;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!found[i]) continue;
    if (held.size() != i) std::memcpy(rows_.data() + held.size() * row_bytes, rows_.data() + i * row_bytes, row_bytes);
    held.push_back(keys[i]);
  }
  *absent = keys.size() - held.size();
  return batch.cache->Insert(held, {rows_.data(), row_bytes}, read_at);
}

void InsertQueue::Drop(const InsertBatch& batch) {
  queued_.Remove(batch.cache.get(), batch.keys);
  stats_.dropped += batch.keys.size();
  stats_.queued -= batch.keys.size();
}

// By the thread, or by whoever stops or finds the queue full.
void InsertQueue::Take(const InsertBatch* waiting, bool drop) {
  std::unique_lock lock(mutex_);
  const auto place = waiting_.find(waiting);
  if (place == waiting_.end()) return;  // Remove was here
  std::shared_ptr<InsertBatch> batch = std::move(place->second);
  waiting_.erase(place);
  if (drop) {
    Drop(*batch);
    lock.unlock();
    return;
  }
  busy_ = batch->cache.get();
  if (!ended_) cancelled_.store(false);
  lock.unlock();
  Stats done;
  const Status status = Run(*batch, &done);
  queued_.Remove(batch->cache.get(), batch->keys);
  lock.lock();
  stats_.queued -= batch->keys.size();
  stats_.absent += done.absent;
  stats_.inserted += done.inserted;
  if (!status.ok()) {
    const bool ended = status.code() == StatusCode::kCancelled;  // by Stop or Remove
    (ended ? stats_.dropped : stats_.failed) += batch->keys.size() - done.absent - done.inserted;
    if (!ended) last_error_ = status;
  }
  lock.unlock();
  batch.reset();  // may free a cache
  lock.lock();
  busy_ = nullptr;
  let_go_.notify_all();
}

Status InsertQueue::Run(const InsertBatch& batch, Stats* done) {
  const size_t step = std::max<size_t>(kPieceBytes / batch.cache->spec().row_bytes, 1);
  for (size_t first = 0; first < batch.keys.size(); first += step) {
    const auto keys = std::span(batch.keys).subspan(first, std::min(step, batch.keys.size() - first));
    uint64_t absent = 0;
    HPS_RETURN_IF_ERROR(WithinLimits("rows for a cache", [&] { return Insert(batch, keys, &absent); }));
    done->absent += absent;
    done->inserted += keys.size() - absent;
  }
  return OkStatus();
}

}  // namespace hps
