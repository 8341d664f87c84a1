// MultiProcessTable: one table of the multi-process store, as one process has it open.
//
// Reading without locks, beside writers that reuse memory at once: a reader finds the entry of a key, copies the row it
// names, and then looks again whether the entry, the marks of its line (which count changes) and the partition's index
// are what they were. If so the row was the key's all the time, since a slot is written to only after those have
// changed. If not, somebody has written meanwhile and the reader tries again; each repetition is paid for by a write
// that was finished, so all together the readers and writers always get on. Nothing that a reader finds is believed
// before that second look, and no address outside the shared memory comes of it.
//
// A dead reader leaves nothing but its pin of the table (shared_heap.h).

#ifndef HPS_STORAGE_MULTI_PROCESS_TABLE_H_
#define HPS_STORAGE_MULTI_PROCESS_TABLE_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cc/base/fork_guard.h"
#include "cc/storage/multi_process_partition.h"
#include "cc/storage/overflow.h"
#include "cc/storage/shared_heap.h"
#include "hps/executor.h"
#include "hps/table_store.h"

namespace hps {

// What a store and its tables share. The heap is used under an EpochGuard after a look at `closed`; closing retires it.
struct MultiProcessState {
  MultiProcessState(std::shared_ptr<SharedHeap> attached, const OverflowOptions& rule, Executor* pool)
      : overflow(rule), executor(pool), heap(attached.get()), owner(std::move(attached)) {}

  // "multi_process_hash_map: ..." unless calls may go on.
  Status CheckOpen() const;

  const OverflowOptions overflow;
  Executor* const executor;
  SharedHeap* const heap;
  const uint64_t fork_generation = ForkGeneration();
  std::atomic<bool> closed{false};

  std::mutex mutex;                          // before the heap's lock
  std::shared_ptr<SharedHeap> owner;         // guarded by mutex; null once closed
  std::map<uint64_t, uint32_t> open_tables;  // guarded by mutex: how many Tables there are for each pinned table
};

class MultiProcessTable final : public Table {
 public:
  // `offset` is a table that the caller has pinned and counted in open_tables.
  MultiProcessTable(TableSpec spec, uint64_t offset, std::shared_ptr<MultiProcessState> state);
  ~MultiProcessTable() override;

  const TableSpec& spec() const override { return spec_; }
  Status Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const override;
  Status Locate(std::span<const Key> keys, std::span<const std::byte*> rows) const override;
  Status Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) override;
  Status Erase(std::span<const Key> keys, uint64_t* erased) override;
  Status Scan(const ScanVisitor& visitor) const override;
  Result<TableStats> Stats() const override;

  // For tests.
  Status Check();

 private:
  struct Probe;

  Status CheckStride(size_t stride_bytes) const;
  MultiProcessPartition Partition(uint32_t number) const { return {state_->heap, table_, number, &state_->overflow}; }
  bool Covers(Key key) const { return static_cast<uint64_t>(key) < table_->expected_rows; }
  uint32_t PartitionOf(Key key) const;

  void Begin(Key key, Probe* probe) const;
  const std::byte* FindEntry(Key key, Probe* probe) const;
  bool Unchanged(const Probe& probe, uint32_t entry, uint32_t marks) const;
  enum class Read { kRow, kMissing, kDamaged };
  template <typename Word, size_t kRowBytes>
  Read ReadRow(Key key, Probe* probe, std::byte* to) const;
  template <typename Word, size_t kRowBytes, bool kStream>
  Status FetchRows(const FetchRequest& request, size_t count, std::vector<uint32_t>* misses) const;
  void Touch(const SharedPartition& partition, uint32_t slot) const;
  void AppendKeys(const SharedPartition& partition, std::vector<Key>* keys) const;

  const TableSpec spec_;
  const uint64_t offset_;
  const std::shared_ptr<MultiProcessState> state_;
  std::byte* const base_;
  SharedTable* const table_;
  const uint32_t num_partitions_;
  const uint64_t dense_block_lines_;
  const bool touches_;  // reading a row changes its time or count
};

}  // namespace hps

#endif  // HPS_STORAGE_MULTI_PROCESS_TABLE_H_
