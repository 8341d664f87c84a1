// Invariants
// - A key is in the dense index if that covers it, else in the hashed one; all writes of a key are under one mutex_.
// - rows_ counts the entries that name a slot; each such slot holds its whole row before it is published.
// - A slot leaves the index before it is retired. A hashed index is unpublished before it is retired; readers that
// still
//   probe it find the rows of that moment, for slots that are retired later wait for those readers too.
// Lock order: mutex_, then the slab's mutex; epochs take a leaf lock of their own.

#include "cc/storage/hash_map_partition.h"

#include <utility>

#include "cc/storage/row_copy.h"
#include "hps/epoch.h"

namespace hps {

HashMapPartition::HashMapPartition(uint32_t num_partitions, RowSlab* slab, DenseIndex* dense_index,
                                   std::shared_ptr<HashMapIndex> index, PublishedIndex* published_index)
    : num_partitions_(num_partitions),
      slab_(slab),
      dense_index_(dense_index),
      published_index_(published_index),
      index_(std::move(index)),
      slots_(slab) {
  published_index_->store(index_.get(), std::memory_order_release);
}

std::shared_ptr<const HashMapIndex> HashMapPartition::SharedIndex() const {
  const std::lock_guard lock(mutex_);
  return index_;
}

uint64_t HashMapPartition::memory_bytes() const {
  const std::lock_guard lock(mutex_);
  return (index_->claimed() > 0 ? index_->memory_bytes() : 0) + slots_.list_bytes();
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
                                bool only_absent) {
  const std::lock_guard lock(mutex_);
  const auto row = [&](uint32_t i) { return rows.data + i * rows.stride_bytes; };
  Status status;
  ForEachPrefetched(
      order, keys, [&](uint32_t i) { PrefetchRow(row(i), slab_->row_bytes()); },
      [&](uint32_t i) {
        status = UpsertOne(keys[i], row(i), only_absent);
        return status.ok();
      });
  return status;
}

Status HashMapPartition::UpsertOne(Key key, const std::byte* row, bool only_absent) {
  const bool dense = dense_index_->Covers(key);
  HashMapIndex::Way way;
  if (!dense) {
    if (index_->claimed() >= index_->claim_limit()) HPS_RETURN_IF_ERROR(Rebuild());
    way = index_->FindOrReserve(key, Home(key));
  }
  const uint32_t entry = dense ? dense_index_->Find(key) : way.row_entry();
  if (entry != 0 && only_absent) return OkStatus();
  uint32_t slot;
  HPS_RETURN_IF_ERROR(slots_.Take(rows(), &slot));
  CopyRow(slab_->Row(slot), row, slab_->row_bytes());
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

uint64_t HashMapPartition::Erase(std::span<const uint32_t> order, std::span<const Key> keys) {
  const std::lock_guard lock(mutex_);
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
  // Room for half as many rows again; erased keys are left behind, so a table that shrank gets a smaller array.
  uint64_t rows = 0;
  index_->ForEach([&](Key, uint32_t) { ++rows; });
  HPS_ASSIGN_OR_RETURN(auto created, HashMapIndex::Create(HashMapIndex::BucketsFor(rows + rows / 2 + 8), 1));
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
