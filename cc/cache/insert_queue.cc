// Tiers and devices are asked without mutex_.

#include "cc/cache/insert_queue.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cc/base/system_limits.h"

namespace hps {

void InsertQueue::Stop() {
  cancelled_.store(true);
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
  const auto queued = std::make_shared<const InsertBatch>(std::move(batch));
  const size_t count = queued->keys.size();
  {
    std::lock_guard lock(mutex_);
    stats_.queued += count;
  }
  if (!worker_.Offer(count, [this, queued](bool dropped) { dropped ? Drop(*queued) : Run(*queued); })) Drop(*queued);
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

void InsertQueue::Drop(const InsertBatch& batch) {
  queued_.Remove(batch.cache.get(), batch.keys);
  std::lock_guard lock(mutex_);
  stats_.dropped += batch.keys.size();
  stats_.queued -= batch.keys.size();
}

void InsertQueue::Run(const InsertBatch& batch) {
  Stats done;
  Status status;
  const size_t step = std::max<size_t>(kPieceBytes / batch.cache->spec().row_bytes, 1);
  for (size_t first = 0; first < batch.keys.size() && status.ok(); first += step) {
    const auto keys = std::span(batch.keys).subspan(first, std::min(step, batch.keys.size() - first));
    uint64_t absent = 0;
    status = WithinLimits("rows for a cache", [&] { return Insert(batch, keys, &absent); });
    if (!status.ok()) break;
    done.absent += absent;
    done.inserted += keys.size() - absent;
  }
  queued_.Remove(batch.cache.get(), batch.keys);
  std::lock_guard lock(mutex_);
  stats_.queued -= batch.keys.size();
  stats_.absent += done.absent;
  stats_.inserted += done.inserted;
  if (status.ok()) return;
  (cancelled_ ? stats_.dropped : stats_.failed) += batch.keys.size() - done.absent - done.inserted;
  if (!cancelled_) last_error_ = status;
}

}  // namespace hps
