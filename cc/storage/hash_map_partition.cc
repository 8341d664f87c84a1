// Invariants
// - A key is in the dense index if that covers it, else in the hashed one; all writes of a key are under one mutex_.
// - rows_ counts the entries that name a slot; each such slot holds its whole row before it is published.
// - A slot leaves the index before it is retired. A hashed index is unpublished before it is retired; readers that
// still
//   probe it find the rows of that moment, for slots that are retired later wait for those readers too.
// Lock order: mutex_, then the slab's mutex; epochs take a leaf lock of their own.

#include "cc/storage/hash_map_partition.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "cc/storage/row_copy.h"
#include "hps/epoch.h"

namespace hps {

HashMapPartition::HashMapPartition(uint32_t number, uint32_t num_partitions, const OverflowOptions& overflow,
                                   RowSlab* slab, DenseIndex* dense_index, std::shared_ptr<HashMapIndex> index,
                                   PublishedIndex* published_index)
    : num_partitions_(num_partitions),
      slab_(slab),
      dense_index_(dense_index),
      published_index_(published_index),
      margin_(overflow.margin),
      target_rows_(overflow.target_rows()),
      index_(std::move(index)),
      slots_(slab),
      sweep_(overflow.bounded() ? std::make_unique<EvictionSweep>(slab, dense_index, &slots_, number, num_partitions)
                                : nullptr) {
  published_index_->store(index_.get(), std::memory_order_release);
}

std::unique_lock<std::mutex> HashMapPartition::Lock() {
  waiting_.fetch_add(1, std::memory_order_relaxed);
  std::unique_lock lock(mutex_);
  waiting_.fetch_sub(1, std::memory_order_relaxed);
  turns_.fetch_add(1, std::memory_order_relaxed);
  return lock;
}

// A mutex goes to whoever asks first, which would be the caller again; so wait until a waiting writer has had it.
void HashMapPartition::LetOthersIn(std::unique_lock<std::mutex>& lock) {
  if (waiting_.load(std::memory_order_relaxed) == 0) return;
  const uint32_t turns = turns_.load(std::memory_order_relaxed);
  lock.unlock();
  while (turns_.load(std::memory_order_relaxed) == turns && waiting_.load(std::memory_order_relaxed) != 0) {
    std::this_thread::yield();
  }
  lock = Lock();
}

std::shared_ptr<const HashMapIndex> HashMapPartition::SharedIndex() const {
  const std::lock_guard lock(mutex_);
  return index_;
}

uint64_t HashMapPartition::memory_bytes() const {
  const std::lock_guard lock(mutex_);
  return (index_->claimed() > 0 ? index_->memory_bytes() : 0) + slots_.list_bytes() +
         (sweep_ != nullptr ? sizeof(EvictionSweep) : 0);
}

// Calls body(i) for each i in order until it returns false, with the key's index line and prefetch(i) asked for before.
template <typename Prefetch, typename Body>
void HashMapPartition::ForEachPrefetched(std::span<const uint32_t> order, std::span<const Key> keys, Prefetch prefetch,
                                         Body body) {
  constexpr size_t kAhead = 16;
  for (size_t step = 0; step < order.size() + kAhead; ++step) {
    if (step < order.size()) {
      const Key key = keys[order[step]];
      const void* line = dense_index_->Covers(key) ? static_cast<const void*>(dense_index_->Home(key)) : Home(key);
      __builtin_prefetch(line, 1);
      prefetch(order[step]);
    }
    if (step >= kAhead && !body(order[step - kAhead])) return;
  }
}

Status HashMapPartition::Upsert(std::span<const uint32_t> order, std::span<const Key> keys, ConstRowBuffer rows,
                                bool only_absent, uint32_t now) {
  std::unique_lock lock = Lock();
  const Batch batch = {order, keys, rows, only_absent, now};
  Status status;
  ForEachPrefetched(
      order, keys, [&](uint32_t i) { PrefetchRow(rows.data + i * rows.stride_bytes, slab_->row_bytes()); },
      [&](uint32_t i) {
        status = UpsertOne(batch, i, lock);
        return status.ok();
      });
  return status;
}

uint32_t HashMapPartition::RowEntry(Key key) const {
  return dense_index_->Covers(key) ? dense_index_->Find(key) : index_->Find(key, Home(key));
}

Status HashMapPartition::UpsertOne(const Batch& batch, uint32_t i, std::unique_lock<std::mutex>& lock) {
  const Key key = batch.keys[i];
  if (rows() >= margin_ && RowEntry(key) == 0) MakeRoom(batch, lock);
  const bool dense = dense_index_->Covers(key);
  HashMapIndex::Way way;
  if (!dense) {
    if (index_->claimed() >= index_->claim_limit()) HPS_RETURN_IF_ERROR(Rebuild());
    way = index_->FindOrReserve(key, Home(key));
  }
  const uint32_t entry = dense ? dense_index_->Find(key) : way.row_entry();
  if (entry != 0 && batch.only_absent) return OkStatus();
  uint32_t slot;
  HPS_RETURN_IF_ERROR(slots_.Take(rows(), &slot));
  CopyRow(slab_->Row(slot), batch.rows.data + i * batch.rows.stride_bytes, slab_->row_bytes());
  MarkWritten(slot, entry, batch.now);
  if (dense) {
    dense_index_->Publish(key, slot);
    wrote_dense_.store(true, std::memory_order_relaxed);
  } else {
    index_->Publish(way, key, slot);
  }
  if (entry != 0) {
    slots_.Retire(entry - 1);
  } else {
    AddRows(1);
  }
  return OkStatus();
}

void HashMapPartition::MarkWritten(uint32_t slot, uint32_t old_entry, uint32_t now) {
  switch (slab_->mark()) {
    case RowMark::kNone: return;
    case RowMark::kTime: RowMarks::SetTime(slab_->Mark(slot), now); return;
    case RowMark::kUses: {
      RowMarks::SetUses(slab_->Mark(slot), old_entry == 0 ? 0 : RowMarks::GetUses(slab_->Mark(old_entry - 1)));
      uint64_t random = slot * 0x9E3779B97F4A7C15ull + now;
      RowMarks::AddUse(slab_->Mark(slot), &random);
    }
  }
}

// Leaves at most target_rows_ - 1 rows, so that with the one that comes the target is met; less only if other writers
// come in between, and never as many as margin_. May release the lock: whatever was looked up before is stale.
void HashMapPartition::MakeRoom(const Batch& batch, std::unique_lock<std::mutex>& lock) {
  // The rows that this batch has written, and those that it is about to write or (only_absent) to leave alone.
  SparedSlots spared;
  for (const uint32_t i : batch.order) {
    if (const uint32_t entry = RowEntry(batch.keys[i]); entry != 0) spared.Add(entry - 1);
  }
  spared.Seal();
  sweep_->Begin(rows());
  while (rows() >= target_rows_) {
    const uint64_t evicted =
        sweep_->Step(index_.get(), rows(), rows() - target_rows_ + 1, batch.now, wrote_dense(), spared);
    AddRows(-static_cast<int64_t>(evicted));
    evicted_rows_.store(evicted_rows() + evicted, std::memory_order_relaxed);
    if (rows() >= target_rows_) LetOthersIn(lock);
  }
  sweep_->Rest();
}

uint64_t HashMapPartition::Erase(std::span<const uint32_t> order, std::span<const Key> keys) {
  const std::unique_lock lock = Lock();
  uint64_t erased = 0;
  ForEachPrefetched(
      order, keys, [](uint32_t) {},
      [&](uint32_t i) {
        erased += EraseOne(keys[i]);
        return true;
      });
  AddRows(-static_cast<int64_t>(erased));
  return erased;
}

bool HashMapPartition::EraseOne(Key key) {
  uint32_t entry;
  if (dense_index_->Covers(key)) {
    entry = dense_index_->Find(key);
    if (entry == 0) return false;
    dense_index_->Erase(key);
  } else {
    const HashMapIndex::Way way = index_->FindForWrite(key, Home(key));
    entry = way.row_entry();
    if (entry == 0) return false;
    index_->Erase(way);
  }
  slots_.Retire(entry - 1);
  return true;
}

Status HashMapPartition::Rebuild() {
  // Room for half as many rows again, up to what the partition may hold; erased keys are left behind, so a table that
  // shrank gets a smaller array.
  uint64_t rows = 0;
  index_->ForEach([&](Key, uint32_t) { ++rows; });
  const uint64_t room = std::min(rows + rows / 2 + 8, std::max(margin_, rows));
  HPS_ASSIGN_OR_RETURN(auto created, HashMapIndex::Create(HashMapIndex::BucketsFor(room), 1));
  std::shared_ptr<HashMapIndex> next = std::move(created.front());
  // Keys keep their order from array to array (both map the same fraction), so both are walked from front to back.
  index_->ForEach([&](Key key, uint32_t slot) {
    next->Publish(next->FindOrReserve(key, next->Home(PlaceOf(key, num_partitions_).fraction)), key, slot);
  });
  published_index_->store(next.get(), std::memory_order_release);
  RetireObject(std::exchange(index_, std::move(next)));
  return OkStatus();
}

}  // namespace hps
