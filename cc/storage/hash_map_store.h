// The hash map store: tables in this process's memory ("hash_map", and "parallel_hash_map", which is the same).
//
// Reads take no locks and never wait for writers; a row costs its own bytes and about 16 bytes of index. Rows live as
// long as the process. Beyond table_store.h: rows are addressable (Table::Locate); a deadline and a cancellation are
// looked at before each max_get_batch_size keys; a table holds at most 2^32 - 2 rows; writes to a dropped table that is
// still held go to that table.
//
// With an overflow margin the store is bounded (overflow.h): a key that comes into a full partition makes rows leave
// down to the target, the fresh one counted, before it is written; so a partition never holds more than its margin, and
// from the first eviction on never less than its target by evictions. The choice is made among 16,384 rows at a time. A
// row that bounded tables hold costs 4 bytes more with evict_oldest, 1 more with evict_least_used, none with
// evict_random. "The rows of the upsert" that leave last are those of one piece (max_set_batch_size). A scan may visit
// a key twice that was evicted and written again meanwhile.

#ifndef HPS_STORAGE_HASH_MAP_STORE_H_
#define HPS_STORAGE_HASH_MAP_STORE_H_

#include <cstdint>
#include <memory>

#include "cc/storage/overflow.h"
#include "hps/executor.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

struct HashMapOptions {
  uint32_t num_partitions = 16;                // of each table; writers of different partitions do not meet
  uint64_t allocation_rate_bytes = 256 << 20;  // memory for rows is committed in steps of at most so much
  OverflowOptions overflow = {};
  // Keys that are read under one announcement to writers (epoch.h), who cannot use the memory of old rows before it
  // ends; and rows that a partition writes under one hold of its lock.
  uint32_t max_get_batch_size = 10'000;
  uint32_t max_set_batch_size = 10'000;
  Executor* executor = nullptr;  // for large writes; not owned; null: the caller's thread
};

// kInvalidArgument: num_partitions outside 1 .. 4096, allocation_rate_bytes, a batch size or the margin of 0, or a
// resolution target that is not between 0 and 1.
Result<std::unique_ptr<TableStore>> OpenHashMapStore(const HashMapOptions& options);

}  // namespace hps

#endif  // HPS_STORAGE_HASH_MAP_STORE_H_
