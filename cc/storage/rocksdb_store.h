// RocksDB store: tables that outlive the process, one column family each, in one database folder.
//
// Format (the predecessor's, so that either opens the other's folder): column family name = TableSpec::name; key = the
// raw little-endian key, 8 bytes, or 4 (two's complement) where TableSpec::key_bytes is 4; value = the raw row. Tables
// of other programs in the folder are opened and listed, never changed. Records are keys "hps.record/<name>" of the
// column family "default". A table of 4-byte keys refuses keys outside int32 with kOutOfRange, in reads too.
//
// Durability: an upsert or erase that returned OK survives the death of the process (it is in the operating system's
// hands; a power cut may take the last seconds). Flush survives a power cut. Bulk upserts skip the log and survive
// nothing before Flush, or an orderly close. Records are synced one by one.
//
// Bulk upserts wait in memory (256 MiB for all tables, then in files beside the tables) until Flush, Close, or the next
// other call on the table, which therefore sees them; then they become sorted files of the table in one step, whole or
// not at all. Reading a table in the midst of its load is correct and slow. If that step fails (disk full), the call
// that caused it fails, and the next one tries again. DropTable brings in rows that wait if the
// table is held, and forgets them otherwise.
//
// Damage: every block is checked when it is read, and the log when the folder is opened. kDataLoss names the file and
// the remedy. What looks the same as a process that was killed while it wrote cannot be told from it: the log cut
// short, or gone, after a kill. After an orderly Close the log holds nothing.
//
// One folder, one database: RocksDB's lock allows one writing process. Inside a process, opening the same folder again
// gives another store over the same database. Each store is closed on its own: Close ends this store and its tables
// only, and the database closes when its last store has been closed, or dropped together with its tables. With
// read_only any number of processes may open the folder; they see its state at the time of opening.
//
// Statistics: rows of a table of up to 16 MiB are counted; above that they are RocksDB's estimate, in which overwritten
// rows count each time until they are compacted. Blocks are in the system's page cache and in no table's memory_bytes.
// Thread safety: as in table_store.h.

#ifndef HPS_STORAGE_ROCKSDB_STORE_H_
#define HPS_STORAGE_ROCKSDB_STORE_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "hps/executor.h"
#include "hps/table_store.h"

namespace hps {

struct RocksDbOptions {
  std::string path;                     // folder; made, with its parents, unless read_only
  uint32_t num_threads = 16;            // flushes, compactions, loads: of the folder's first store; pieces of a Fetch
  bool read_only = false;               // must be the same for all stores of a folder in a process
  uint32_t max_get_batch_size = 10000;  // most keys in one MultiGet (never more than 1024)
  uint32_t max_set_batch_size = 10000;  // most rows in one write batch (of at most 16 MiB), which is written as a whole
  Executor* executor = nullptr;         // spreads large reads; not owned, outlives the store; nullptr: inline
};

// kInvalidArgument: the path is a file or a folder of other things, or a number is 0. kNotFound: read_only and no
// database there. kUnavailable: another process holds the lock. kFailedPrecondition: no permission, opened before with
// another read_only, written in a newer format, or RocksDB was in use before this process was forked. kDataLoss:
// damaged files, named. kResourceExhausted: disk full.
Result<std::unique_ptr<TableStore>> OpenRocksDbStore(const RocksDbOptions& options);

// For the exit of the process, once all stores are closed: opens no database any more (kFailedPrecondition) and waits
// until operations that still run have let go of the last one, before the library's static objects are destroyed under
// them. False where one is open after `limit`.
bool EndRocksDb(std::chrono::milliseconds limit);

}  // namespace hps

#endif  // HPS_STORAGE_ROCKSDB_STORE_H_
