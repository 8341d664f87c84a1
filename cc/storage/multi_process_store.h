// The multi-process hash map store ("multi_process_hash_map"): one copy of the tables for several processes of one
// host, in shared memory.
//
// Every process that opens the store with the same name and configuration sees the same tables, rows and records. Reads
// take no locks and never wait for a writer, in whatever process; writers lock a partition of a table. A process may be
// killed at any instruction: nothing stays locked, no row is torn, none is lost but one that was being written, and its
// memory is found again by the next writer.
//
// Rows live as long as the shared memory: it is removed by the last process to close the store where auto_remove is
// set, else it stays (/dev/shm) until somebody removes the file or the host restarts. What a crash of the last process
// left behind is used again by the next one with the same configuration.
//
// Beyond table_store.h: rows are not addressable; a deadline is looked at once, before the batch; a partition holds at
// most 2^32 - 3 rows; writes to a dropped table that is still held go to that table. TableStats::memory_bytes is shared
// memory. With an overflow margin a key that comes into a full partition makes
// rows leave down to the target, the fresh one counted, before it is written (overflow.h); a time (of evict_oldest, in
// upserts to the partition) or a count of uses costs 4 bytes a row. Memory is taken from
// /dev/shm as tables grow, and used again after they are dropped, but not given back before the file is removed.

#ifndef HPS_STORAGE_MULTI_PROCESS_STORE_H_
#define HPS_STORAGE_MULTI_PROCESS_STORE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "cc/storage/overflow.h"
#include "hps/executor.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

struct MultiProcessOptions {
  std::string name = "hctr_mp_hash_map_database";  // of the file in /dev/shm
  uint64_t bytes = uint64_t{16} << 30;             // the most it may have; it takes only what it needs
  bool auto_remove = true;
  uint32_t num_partitions = 16;                // of each table; writers of different partitions do not meet
  int key_bytes = 8;                           // TableSpec::key_bytes of all tables
  uint64_t allocation_rate_bytes = 256 << 20;  // memory is asked of the system in steps of at most so much
  OverflowOptions overflow;
  Executor* executor = nullptr;  // for large writes; not owned; null: the caller's thread
};

// kInvalidArgument: an option out of range. kFailedPrecondition: there is shared memory of that name which is of
// another layout, another user or another program. kResourceExhausted: /dev/shm is full, or 256 processes are attached.
// kUnavailable: a process that was opening or closing it has not moved on for half a minute.
Result<std::unique_ptr<TableStore>> OpenMultiProcessStore(const MultiProcessOptions& options);

// For tests: whether every unit of memory, every slot and every count of a store of this kind is accounted for.
Status CheckMultiProcessStore(TableStore& store);

}  // namespace hps

#endif  // HPS_STORAGE_MULTI_PROCESS_STORE_H_
