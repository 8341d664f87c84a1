// HashMapPartition: the writer's side of one part of a hash map table.
//
// Writers lock the partition of a key. An update writes a fresh slot, swaps the index entry and retires the old slot; a
// full hashed index is replaced by a larger one. A key that comes into a partition that is full (overflow.h) first
// makes others leave, in steps between which other writers get their turn. Readers never come here: they probe the
// dense index and what the partition has published as its hashed index, under an EpochGuard.
//
// Thread safety: any thread; everything but rows(), evicted_rows() and wrote_dense() locks.

#ifndef HPS_STORAGE_HASH_MAP_PARTITION_H_
#define HPS_STORAGE_HASH_MAP_PARTITION_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>

#include "cc/storage/dense_index.h"
#include "cc/storage/hash_map_eviction.h"
#include "cc/storage/hash_map_index.h"
#include "cc/storage/row_slab.h"
#include "cc/storage/row_slots.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

// What readers see of a partition.
using PublishedIndex = std::atomic<const HashMapIndex*>;

class alignas(64) HashMapPartition {
 public:
  // Partition `number` of `num_partitions`. The options, the slab, the dense index and *published_index belong to the
  // table. `index` has room for the expected rows, or none.
  HashMapPartition(uint32_t number, uint32_t num_partitions, const OverflowOptions& overflow, RowSlab* slab,
                   DenseIndex* dense_index, std::shared_ptr<HashMapIndex> index, PublishedIndex* published_index);

  uint64_t rows() const { return rows_.load(std::memory_order_relaxed); }
  uint64_t evicted_rows() const { return evicted_rows_.load(std::memory_order_relaxed); }
  // The hashed index of this moment, kept by the pointer.
  std::shared_ptr<const HashMapIndex> SharedIndex() const;
  // Memory of the hashed index and the lists of slots. An index counts in full as soon as it holds a row.
  uint64_t memory_bytes() const;
  // Whether a row of the dense index was ever written through this partition.
  bool wrote_dense() const { return wrote_dense_.load(std::memory_order_relaxed); }

  // Writes the rows keys[i] for i in `order`, in that order; `now` is the time of their marks. On kResourceExhausted
  // the rows before the failed one are in.
  Status Upsert(std::span<const uint32_t> order, std::span<const Key> keys, ConstRowBuffer rows, bool only_absent,
                uint32_t now);
  // Removes keys[i] for i in `order`; returns how many were there.
  uint64_t Erase(std::span<const uint32_t> order, std::span<const Key> keys);

 private:
  // What one call of Upsert writes.
  struct Batch {
    std::span<const uint32_t> order;
    std::span<const Key> keys;
    ConstRowBuffer rows;
    bool only_absent;
    uint32_t now;
  };

  std::unique_lock<std::mutex> Lock();
  void LetOthersIn(std::unique_lock<std::mutex>& lock);
  Status UpsertOne(const Batch& batch, uint32_t i, std::unique_lock<std::mutex>& lock);
  void MakeRoom(const Batch& batch, std::unique_lock<std::mutex>& lock);
  uint32_t RowEntry(Key key) const;
  void MarkWritten(uint32_t slot, uint32_t old_entry, uint32_t now);
  bool EraseOne(Key key);
  HashMapIndex::Bucket* Home(Key key) const { return index_->Home(PlaceOf(key, num_partitions_).fraction); }
  template <typename Prefetch, typename Body>
  void ForEachPrefetched(std::span<const uint32_t> order, std::span<const Key> keys, Prefetch prefetch, Body body);
  Status Rebuild();
  void AddRows(int64_t count) { rows_.store(rows_.load(std::memory_order_relaxed) + count, std::memory_order_relaxed); }

  const uint32_t num_partitions_;
  RowSlab* const slab_;
  DenseIndex* const dense_index_;
  PublishedIndex* const published_index_;  // == index_.get()
  const uint64_t margin_;
  const uint64_t target_rows_;
  std::atomic<uint64_t> rows_{0};          // written under mutex_
  std::atomic<uint64_t> evicted_rows_{0};  // written under mutex_
  std::atomic<bool> wrote_dense_{false};   // written under mutex_
  std::atomic<uint32_t> waiting_{0};       // writers that want mutex_
  std::atomic<uint32_t> turns_{0};         // how often writers got it

  mutable std::mutex mutex_;
  std::shared_ptr<HashMapIndex> index_;         // guarded by mutex_
  RowSlots slots_;                              // guarded by mutex_
  const std::unique_ptr<EvictionSweep> sweep_;  // what it points to is guarded by mutex_; null without a margin
};

}  // namespace hps

#endif  // HPS_STORAGE_HASH_MAP_PARTITION_H_
