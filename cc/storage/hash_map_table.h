// HashMapTable: one table of the hash map store.
//
// One slab of rows; a dense index for the keys below the expected number of rows, and hashed indexes for all others,
// one a partition. Reads take no lock and run as a pipeline of three stages, so that the memory accesses of many keys
// overlap. Large batches are written partition by partition on the store's executor.

#ifndef HPS_STORAGE_HASH_MAP_TABLE_H_
#define HPS_STORAGE_HASH_MAP_TABLE_H_

#include <atomic>
#include <deque>
#include <memory>
#include <vector>

#include "cc/storage/hash_map_partition.h"
#include "cc/storage/hash_map_store.h"
#include "cc/storage/row_slab.h"
#include "hps/executor.h"
#include "hps/table_store.h"

namespace hps {

class HashMapTable final : public Table {
 public:
  // `closed` is shared with the store. kInvalidArgument: a row size out of range; kResourceExhausted: no memory for the
  // expected rows.
  static Result<std::shared_ptr<Table>> Create(const TableSpec& spec, const HashMapOptions& options,
                                               std::shared_ptr<const std::atomic<bool>> closed);
  ~HashMapTable() override;

  const TableSpec& spec() const override { return spec_; }
  Status Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const override;
  Status Locate(std::span<const Key> keys, std::span<const std::byte*> rows) const override;
  Status Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) override;
  Status Erase(std::span<const Key> keys, uint64_t* erased) override;
  Status Scan(const ScanVisitor& visitor) const override;
  Result<TableStats> Stats() const override;

 private:
  // What readers may still look at when the table itself is gone.
  struct Contents {
    Contents(const TableSpec& spec, const HashMapOptions& options)
        : overflow(options.overflow),
          slab(spec.row_bytes, PlannedRows(spec, options), options.allocation_rate_bytes, KeptMark(overflow)),
          indexes(options.num_partitions) {}

    uint32_t num_partitions() const { return static_cast<uint32_t>(indexes.size()); }
    // The partition that writes a key. Neighbours in the dense index stay together, so that writers do not share its
    // cache lines.
    uint32_t PartitionOf(Key key) const {
      return dense_index.Covers(key) ? static_cast<uint32_t>(dense_index.BlockOf(key)) % num_partitions()
                                     : PlaceOf(key, num_partitions()).partition;
    }

    const OverflowOptions overflow;
    MarkClock clock;
    RowSlab slab;
    DenseIndex dense_index;
    std::vector<PublishedIndex> indexes;      // one a partition
    std::deque<HashMapPartition> partitions;  // for writers
  };

  HashMapTable(const TableSpec& spec, const HashMapOptions& options, std::shared_ptr<const std::atomic<bool>> closed,
               std::shared_ptr<Contents> contents);

  // The rows that a table sets memory aside for: no more than it may hold.
  static uint64_t PlannedRows(const TableSpec& spec, const HashMapOptions& options);

  Status CheckOpen() const;
  Status CheckStride(size_t stride_bytes) const;
  Status CheckWanted(const FetchRequest& request) const;
  // kMark: what reading a row notes beside it.
  template <RowMark kMark, typename KeyAt, typename Prefetch, typename Use>
  void ForEachRow(size_t count, KeyAt key_at, Prefetch prefetch, Use use) const;
  // Fetches keys, or positions, [first, last).
  template <RowMark kMark, size_t kRowBytes, bool kStream>
  void FetchRows(const FetchRequest& request, size_t first, size_t last, std::vector<uint32_t>* misses) const;
  template <RowMark kMark>
  Status FetchPieces(const FetchRequest& request, std::vector<uint32_t>* misses) const;

  const TableSpec spec_;
  const HashMapOptions options_;
  const std::shared_ptr<const std::atomic<bool>> closed_;
  std::shared_ptr<Contents> contents_;
};

}  // namespace hps

#endif  // HPS_STORAGE_HASH_MAP_TABLE_H_
