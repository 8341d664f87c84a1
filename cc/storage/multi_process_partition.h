// MultiProcessPartition: the writer's side of one part of a table in shared memory.
//
// Writers of all processes lock the partition of a key. An update writes a free slot, swaps the index entry and counts
// the change in the marks of the entry's line; only then may the old slot be written again. A full index is replaced by
// a larger one, whose predecessor is free at once: readers find out that they looked at what is not the table any more
// (multi_process_table.h).
//
// A process may die at any instruction. The next one to lock makes the list of free slots and the counts anew from the
// index, which is right at every instant. A row that was being written is then there as a whole or not at all.
//
// Thread safety: any thread of any process; everything locks. REQUIRES that the table is open (pinned) meanwhile.

#ifndef HPS_STORAGE_MULTI_PROCESS_PARTITION_H_
#define HPS_STORAGE_MULTI_PROCESS_PARTITION_H_

#include <cstdint>
#include <span>

#include "cc/storage/overflow.h"
#include "cc/storage/shared_heap.h"
#include "cc/storage/shared_layout.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

class MultiProcessPartition {
 public:
  MultiProcessPartition(SharedHeap* heap, SharedTable* table, uint32_t number, const OverflowOptions* overflow)
      : heap_(*heap),
        base_(heap->base()),
        table_(*table),
        number_(number),
        shared_(table->partitions()[number]),
        overflow_(*overflow) {}

  // Writes the rows keys[i] for i in `order`, in that order. On kResourceExhausted the rows before the failed one are
  // in.
  Status Upsert(std::span<const uint32_t> order, std::span<const Key> keys, ConstRowBuffer rows, bool only_absent);
  // Removes keys[i] for i in `order`; returns how many were there.
  uint64_t Erase(std::span<const uint32_t> order, std::span<const Key> keys);

  // kInternal where index, slots and counts do not agree: for tests.
  Status Check();

  // Region 0 of a new table, which is not linked yet. REQUIRES the heap's lock.
  static Status AllocateFirstRegion(SharedHeap& heap, SharedTable& table, uint32_t number);

 private:
  // Where a key's entry is, or would be.
  struct Place {
    HashBuckets::Way way;       // of a hashed key
    DenseLine* line = nullptr;  // of a dense key
    size_t number = 0;          // in the line
    uint32_t entry = 0;         // slot + 1, 0: no row

    uint32_t* marks() const { return line != nullptr ? &line->marks : &way.bucket->marks; }
  };

  auto Lock() {
    return RobustLock(shared_.mutex, [this] { Repair(); });
  }

  HashBuckets Index() const;
  bool Covers(Key key) const { return static_cast<uint64_t>(key) < table_.expected_rows; }
  const void* Line(Key key) const;
  template <typename Prefetch, typename Body>
  void ForEachPrefetched(std::span<const uint32_t> order, std::span<const Key> keys, Prefetch prefetch, Body body);
  // Calls visit(place, key) for every way that is claimed (also without a row) and every dense entry with a row.
  template <typename Visit>
  void ForEachPlace(Visit visit) const;

  Status UpsertOne(Key key, const std::byte* row, bool only_absent);
  bool EraseOne(Key key);
  void Remove(const Place& place);
  Status Find(Key key, bool reserve, Place* place);
  Status MakeDenseIndex();
  Status ReplaceIndex();

  Status TakeSlot(uint32_t* slot);
  void FreeSlot(uint32_t slot);
  void WriteRow(std::byte* to, const std::byte* row);
  std::byte* Row(uint32_t slot) const { return PlaceOfSlot(base_, table_, shared_, slot).row; }
  std::byte* Meta(uint32_t slot) const { return MetaOfSlot(table_, PlaceOfSlot(base_, table_, shared_, slot)); }
  template <typename Visit>
  void ForEachUsedSlotNumber(Visit visit) const;
  void Repair();

  void MakeRoom(std::span<const uint32_t> order, std::span<const Key> keys);

  SharedHeap& heap_;
  std::byte* const base_;
  SharedTable& table_;
  const uint32_t number_;
  SharedPartition& shared_;
  const OverflowOptions& overflow_;
};

}  // namespace hps

#endif  // HPS_STORAGE_MULTI_PROCESS_PARTITION_H_
