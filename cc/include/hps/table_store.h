// TableStore and Table: the contract of every storage tier (hash map, Redis, RocksDB).
//
// A store holds named tables; a table maps 64-bit keys to rows of a fixed number of bytes. All operations are batched.
// Every key value is legal (-1, 0, INT64_MIN, INT64_MAX included).
//
// Reads: a row is found whole or reported missing, and the buffer of a missing row is left untouched. Under concurrent
// writes a reader sees the whole old or the whole new row, never a mixture.
// Thread safety: all methods of an open store and its tables may be called from several threads at once. A Table
// stays usable (its rows readable) while somebody holds its pointer, also after DropTable; after TableStore::Close its
// calls return kFailedPrecondition.
// Errors: a missing key is never one. Each status names the store, the table and the remedy.

#ifndef HPS_TABLE_STORE_H_
#define HPS_TABLE_STORE_H_

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hps/status.h"

namespace hps {

using Key = int64_t;
using Deadline = std::chrono::steady_clock::time_point;
inline constexpr Deadline kNoDeadline = Deadline::max();

struct TableSpec {
  std::string name;            // "hps_et.<model>.<table>", with "@<generation>" when it is not the first
  size_t row_bytes = 0;        // > 0; 4 * width for float32 rows
  int key_bytes = 8;           // 8, or 4 where supportlonglong is false; how keys are laid out in stored databases
  uint64_t expected_rows = 0;  // a hint for CreateTable: memory for so many rows is set aside exactly
};

// Row i begins at data + i * stride_bytes; stride_bytes >= row_bytes.
struct RowBuffer {
  std::byte* data = nullptr;
  size_t stride_bytes = 0;
};
struct ConstRowBuffer {
  const std::byte* data = nullptr;
  size_t stride_bytes = 0;
};

struct FetchRequest {
  std::span<const Key> keys;                                          // (n); duplicates are allowed
  std::optional<std::span<const uint32_t>> positions = std::nullopt;  // which keys, ascending; absent: all
  RowBuffer rows;                                                     // (n); the row of keys[i] is written at index i
  size_t output_bytes =
      0;  // a hint: size of the whole output these rows are a part of; SIZE_MAX: not read by the caller
  Deadline deadline = kNoDeadline;
  const std::atomic<bool>* cancelled = nullptr;  // true: the caller gave up; stores that wait look at it (kCancelled)
};

struct UpsertOptions {
  bool only_absent = false;  // leave rows that are already there as they are (promotion from a lower tier)
  bool bulk = false;         // part of a load: durable only after TableStore::Flush
};

// Called by Scan with chunks of (keys, rows packed at row_bytes); a non-OK status ends the scan and is returned by it.
using ScanVisitor = std::function<Status(std::span<const Key> keys, ConstRowBuffer rows)>;

struct TableStats {
  uint64_t rows = 0;  // exact, unless rows_estimated
  bool rows_estimated = false;
  uint64_t memory_bytes = 0;  // anonymous memory of this process held for the table (touched pages)
  uint64_t disk_bytes = 0;
  uint64_t evicted_rows = 0;  // rows that a bounded store gave up by itself since the table was created or opened
};

class Table {
 public:
  virtual ~Table() = default;

  virtual const TableSpec& spec() const = 0;

  // Copies the row of each selected key that is present. The positions of the others are appended to *misses in
  // ascending order. On error neither the rows nor *misses say anything.
  virtual Status Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const = 0;

  // Writes the address of the row of keys[i] to rows[i], nullptr where the key is absent. Only where the store's
  // capabilities say `addressable`; others return kUnimplemented. The caller holds an EpochGuard (epoch.h) from before
  // the call until it has finished reading: addresses stay valid and their rows unchanged while it lives.
  virtual Status Locate(std::span<const Key> keys, std::span<const std::byte*> rows) const = 0;

  // Inserts or overwrites. Where a key occurs twice in one call the later row wins (with only_absent: the earlier).
  virtual Status Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options = {}) = 0;

  // Removes keys; absent ones are ignored. *erased, if given, is set to how many were there.
  virtual Status Erase(std::span<const Key> keys, uint64_t* erased = nullptr) = 0;

  // Visits every row that was there during the whole scan exactly once, in no particular order, in chunks.
  virtual Status Scan(const ScanVisitor& visitor) const = 0;

  virtual Result<TableStats> Stats() const = 0;
};

struct StoreCapabilities {
  bool persistent = false;                                        // rows outlive the process
  bool shared = false;                                            // other processes see the same rows
  bool bounded = false;                                           // may evict rows by itself
  uint64_t capacity_rows = std::numeric_limits<uint64_t>::max();  // bounded: rows of a table that a load may write
                                                                  // without making it evict
  bool addressable = false;  // rows lie in this process's memory: Table::Locate works
  bool writable = true;      // false: opened read-only, every write is kFailedPrecondition
};

// A table that is going to be created and filled with spec.expected_rows rows.
struct TableLoad {
  TableSpec spec;
  uint64_t dense_rows = 0;  // rows whose keys are in 0 .. expected_rows - 1: cheaper in some stores
};

class TableStore {
 public:
  virtual ~TableStore() = default;

  // "hash_map", "redis_cluster", "rocks_db": the name used in configuration, reports and metrics.
  virtual std::string_view kind() const = 0;
  virtual StoreCapabilities capabilities() const = 0;
  // About how much of this host's memory such loads take, at their highest. 0: the rows go elsewhere.
  virtual uint64_t MemoryFor(std::span<const TableLoad> /*loads*/) const { return 0; }

  // kNotFound if there is no such table; kFailedPrecondition if its stored rows have another size.
  virtual Result<std::shared_ptr<Table>> OpenTable(const TableSpec& spec) = 0;
  // kAlreadyExists if there is one of that name. Where several processes or threads create one name at once, exactly
  // one of them succeeds, also in a shared store.
  virtual Result<std::shared_ptr<Table>> CreateTable(const TableSpec& spec) = 0;
  // kNotFound if there is no such table. Open Table pointers stay readable.
  virtual Status DropTable(std::string_view name) = 0;
  virtual Result<std::vector<std::string>> ListTables() const = 0;

  // Small records kept beside the tables, with the same durability as the store (a persistent store syncs them).
  virtual Result<std::optional<std::string>> ReadRecord(std::string_view name) const = 0;
  virtual Status WriteRecord(std::string_view name, std::string_view value) = 0;
  virtual Status EraseRecord(std::string_view name) = 0;

  // Where a store knows which openings of it are still there: a name of this one that no other has ever had, and
  // whether the one of a given name has been closed, or its process has died. Elsewhere the name is empty, and none is
  // known to be gone.
  virtual std::string MemberName() const { return ""; }
  virtual bool MemberIsGone(std::string_view /*name*/) const { return false; }

  // kDataLoss where the file or folder that holds the rows was deleted or replaced under the open store: it serves on,
  // but what it holds is lost when it closes, and others do not find it. Quick. Stores without such a place: OK.
  virtual Status CheckPlace() const { return OkStatus(); }

  // Makes all earlier upserts, bulk ones included, as durable as the store can.
  virtual Status Flush() = 0;
  // Idempotent. Later calls on the store and its tables return kFailedPrecondition.
  virtual Status Close() = 0;
};

}  // namespace hps

#endif  // HPS_TABLE_STORE_H_
