// The hash map store: tables in this process's memory ("hash_map", and "parallel_hash_map", which is the same).
//
// Reads take no locks and never wait for writers; a row costs its own bytes and about 16 bytes of index. Rows live as
// long as the process. Beyond table_store.h: rows are addressable (Table::Locate); a deadline is looked at once, before
// the batch; a table holds at most 2^32 - 2 rows; writes to a dropped table that is still held go to that table.

#ifndef HPS_STORAGE_HASH_MAP_STORE_H_
#define HPS_STORAGE_HASH_MAP_STORE_H_

#include <cstdint>
#include <memory>

#include "hps/executor.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

struct HashMapOptions {
  uint32_t num_partitions = 16;                // of each table; writers of different partitions do not meet
  uint64_t allocation_rate_bytes = 256 << 20;  // memory for rows is committed in steps of at most so much
  Executor* executor = nullptr;                // for large writes; not owned; null: the caller's thread
};

// kInvalidArgument: num_partitions outside 1 .. 4096, or allocation_rate_bytes of 0.
Result<std::unique_ptr<TableStore>> OpenHashMapStore(const HashMapOptions& options);

}  // namespace hps

#endif  // HPS_STORAGE_HASH_MAP_STORE_H_
