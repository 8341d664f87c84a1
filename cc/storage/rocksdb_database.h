// RocksDbDatabase: one open RocksDB folder, in terms of bytes. The only door to RocksDB; rocksdb_store.cc makes tables
// of it and holds the contract of table_store.h.
//
// Shared: opening a folder that this process has open returns the same database; it closes with its last user.
// Bulk rows wait in the family (bulk_rows.h) until FinishBulk brings them in, at once and as sorted files where they
// are many. Whoever reads or writes the family calls it first, so that nobody sees that they waited. Thread safety: all
// methods from several threads at once, except where a family's write_mutex is asked for. Errors: RocksDB's own, mapped
// to hps codes, naming the folder and the table; see rocksdb_store.h. C++ exceptions (no memory, no threads) may leave
// it: the caller catches them.

#ifndef HPS_STORAGE_ROCKSDB_DATABASE_H_
#define HPS_STORAGE_ROCKSDB_DATABASE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cc/storage/bulk_rows.h"
#include "cc/storage/rocksdb_store.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

// One column family. Held by the database while it exists and by every table over it, so that a dropped table stays
// readable until its last holder is gone.
struct RocksDbFamily {
  explicit RocksDbFamily(std::string family_name) : name(std::move(family_name)) {}
  virtual ~RocksDbFamily() = default;

  const std::string name;

  // Held shared to write, exclusively to drop or to write what depends on rows read before.
  std::shared_mutex write_mutex;
  bool dropped = false;  // guarded by write_mutex

  std::mutex bulk_mutex;  // guards the next two, and the change of the third
  std::unique_ptr<BulkRows> bulk;
  int bulk_key_bytes = 8;
  std::atomic<bool> bulk_pending{false};  // bulk holds rows

  std::mutex count_mutex;  // guards the next two: how many rows there were at that state of the database
  std::optional<uint64_t> counted_sequence;
  uint64_t counted_rows = 0;
};

// One write: the row of a key, or nothing to remove it.
struct RocksDbChange {
  std::string_view key;
  std::optional<std::string_view> row;
};

// When to give up; see FetchRequest.
struct ReadLimits {
  Deadline deadline = kNoDeadline;
  const std::atomic<bool>* cancelled = nullptr;
};

struct RocksDbFamilyStats {
  uint64_t estimated_rows = 0;
  uint64_t memory_bytes = 0;
  uint64_t disk_bytes = 0;
};

class RocksDbDatabase {
 public:
  // visit(i, row): the row of keys[i], or nothing; the bytes live until visit returns.
  using ReadVisitor = std::function<Status(size_t, std::optional<std::string_view>)>;
  using ScanVisitor = std::function<Status(std::string_view key, std::string_view row)>;

  // Makes the folder, or refuses it; see OpenRocksDbStore, and EndRocksDb. Looks at path, num_threads and read_only.
  static Result<std::shared_ptr<RocksDbDatabase>> Open(const RocksDbOptions& options);
  virtual ~RocksDbDatabase() = default;

  bool read_only() const { return read_only_; }
  // For messages: rocks_db "path"[, table "name"].
  std::string Where() const;
  std::string Where(std::string_view table) const;
  Status RequireWritable() const;

  // kDataLoss where the folder has been deleted or replaced, so that what is written would not be found again. Of a
  // database that only reads nothing is asked. All that makes families, and that stores for good, looks itself.
  virtual Status CheckFolder() const = 0;
  // The same, also of a database that only reads.
  virtual Status CheckPlace() const = 0;

  // Families, without the one named "default". Find: nullptr if there is none.
  virtual std::shared_ptr<RocksDbFamily> Find(std::string_view name) = 0;
  virtual Result<std::shared_ptr<RocksDbFamily>> Create(const std::string& name) = 0;
  virtual Status Drop(std::string_view name) = 0;
  virtual std::vector<std::string> Names() = 0;

  // keys: ascending bytewise, each once. Read in pieces of kMostKeys; the time limits are looked at before each.
  static constexpr size_t kMostKeys = 1024;
  virtual Status Read(RocksDbFamily& family, std::span<const std::string_view> keys, const ReadLimits& limits,
                      const ReadVisitor& visit) = 0;
  // Visits the rows as they were at the call, in the order of their keys, until visit fails.
  virtual Status Scan(RocksDbFamily& family, const ScanVisitor& visit) = 0;
  // All changes or none. The caller holds write_mutex of the family, which is not dropped.
  virtual Status Write(RocksDbFamily& family, std::span<const RocksDbChange> changes) = 0;

  // Takes rows that FinishBulk brings in. The caller holds write_mutex of the family, which is not dropped, shared.
  virtual Status AddBulk(RocksDbFamily& family, int key_bytes, size_t row_bytes, std::span<const Key> keys,
                         ConstRowBuffer rows) = 0;
  // Brings in what was added; nothing to do is cheap. The caller does not hold write_mutex. After an error the rows
  // wait on.
  virtual Status FinishBulk(RocksDbFamily& family) = 0;

  // Keys of the family "default"; writes are synced. No value: erase.
  virtual Result<std::optional<std::string>> ReadRecord(std::string_view key) = 0;
  virtual Status WriteRecord(std::string_view key, std::optional<std::string_view> value) = 0;

  virtual RocksDbFamilyStats Stats(RocksDbFamily& family) = 0;
  // Grows with every write to the database but those of FinishBulk, which clear a family's counted_sequence.
  virtual uint64_t Sequence() = 0;
  // Syncs everything written before, bulk writes included.
  virtual Status Flush() = 0;

 protected:
  RocksDbDatabase(std::string path, bool read_only) : path_(std::move(path)), read_only_(read_only) {}

  const std::string path_;  // canonical
  const bool read_only_;
};

}  // namespace hps

#endif  // HPS_STORAGE_ROCKSDB_DATABASE_H_
