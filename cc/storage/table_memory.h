// How many bytes of the host's memory tables take, before they are made: the one place for these sums.
//
// The check before a load (TableStore::MemoryFor) and `hps memory` use them; tests/test_memory_plan.py holds them
// within 10 % of what loaded tables are then measured to take.
//
// Thread safety: plain functions.

#ifndef HPS_STORAGE_TABLE_MEMORY_H_
#define HPS_STORAGE_TABLE_MEMORY_H_

#include <cstdint>
#include <span>

#include "cc/storage/overflow.h"
#include "hps/table_store.h"

namespace hps {

// A table that is created for `rows` rows and filled with them. REQUIRES dense_rows <= rows.
struct TableShape {
  uint64_t rows = 0;
  uint64_t dense_rows = 0;  // of these, keys in 0 .. rows - 1
  uint64_t row_bytes = 0;
  uint32_t num_partitions = 1;
  OverflowOptions overflow = {};
  bool hashed_early = true;  // among the first 1/16 of the rows are other keys than those in 0 .. rows - 1
};

// Anonymous memory of a hash_map table, as the kernel hands it out.
uint64_t HashMapTableBytes(const TableShape& shape);
// What no hash_map table of so many rows exceeds, also one that grew to it row by row.
uint64_t HashMapLimitBytes(const TableShape& shape);
// Buckets of one partition's hashed index for the share of `rows` that chance sends it.
uint64_t HashMapBuckets(uint64_t rows, uint32_t num_partitions, const OverflowOptions& overflow);

// StoreCapabilities::capacity_rows; Redis has CapacityRows itself.
uint64_t HashMapCapacityRows(const OverflowOptions& overflow, uint32_t num_partitions);
uint64_t SharedCapacityRows(const OverflowOptions& overflow, uint32_t num_partitions);

// Shared memory of a multi_process_hash_map table.
uint64_t SharedTableBytes(const TableShape& shape);
// What shared memory of at most `bytes` takes besides its tables.
uint64_t SharedMemoryOwnBytes(uint64_t bytes);

// The most that rows on their way into sorted files take, of all tables of a RocksDB database together.
inline constexpr uint64_t kRocksDbBulkBytes = uint64_t{256} << 20;
// What loading a table takes of it.
uint64_t RocksDbLoadBytes(uint64_t rows, uint64_t row_bytes);

// The sum over tables: TableStore::MemoryFor of a store.
uint64_t LoadedBytes(std::span<const TableLoad> loads, uint32_t num_partitions, const OverflowOptions& overflow,
                     uint64_t (*table_bytes)(const TableShape&));

}  // namespace hps

#endif  // HPS_STORAGE_TABLE_MEMORY_H_
