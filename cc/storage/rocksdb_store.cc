// A table reads and writes its keys in the order in which RocksDB keeps them: neighbours share blocks when read and
// paths in the memtable when written. Large reads are cut into pieces for the executor, each piece into batches.
//
// Lock order: Session::mutex_ is innermost and held for a copy only; RocksDbFamily::write_mutex is held while writing.

#include "cc/storage/rocksdb_store.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <utility>

#include "cc/base/fork_guard.h"
#include "cc/base/system_limits.h"
#include "cc/storage/rocksdb_database.h"
#include "cc/storage/row_copy.h"
#include "cc/storage/stored_order.h"
#include "cc/storage/table_memory.h"

namespace hps {
namespace {

constexpr std::string_view kKind = "rocks_db";
constexpr std::string_view kRecordPrefix = "hps.record/";
constexpr std::string_view kReservedName = "default";
constexpr size_t kParallelGrain = 256;              // keys; about a millisecond of reading
constexpr size_t kMostBatchKeys = size_t{1} << 16;  // batches are no larger, whatever is configured
constexpr size_t kMostBatchBytes = size_t{16} << 20;
constexpr size_t kScanChunkBytes = size_t{1} << 20;
constexpr size_t kCountedBytes = size_t{16} << 20;  // tables up to here are counted, larger ones estimated

std::string_view Bytes(const std::byte* data, size_t size) { return {reinterpret_cast<const char*>(data), size}; }

// RocksDB itself reports by status, but memory and threads may run out inside it.
template <typename Body>
auto Guarded(const std::string& where, Body&& body) -> decltype(body()) {
  return WithinLimits(where, std::forward<Body>(body));
}

// What a store and its tables have in common: the way to the database until Close.
class Session {
 public:
  Session(std::shared_ptr<RocksDbDatabase> database, const RocksDbOptions& options)
      : options(options), database_(std::move(database)), where_(database_->Where()) {}

  // The caller holds the database while it works. kFailedPrecondition after Close.
  Result<std::shared_ptr<RocksDbDatabase>> Pin() const {
    std::lock_guard lock(mutex_);
    if (database_ == nullptr) return FailedPrecondition(where_ + " was closed; open the store again");
    return database_;
  }
  std::shared_ptr<RocksDbDatabase> Release() {
    std::lock_guard lock(mutex_);
    return std::exchange(database_, nullptr);
  }

  const RocksDbOptions options;

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<RocksDbDatabase> database_;  // guarded by mutex_
  const std::string where_;
};

class RocksDbTable final : public Table {
 public:
  RocksDbTable(std::shared_ptr<Session> session, std::shared_ptr<RocksDbFamily> family, TableSpec spec)
      : session_(std::move(session)), family_(std::move(family)), spec_(std::move(spec)) {}

  const TableSpec& spec() const override { return spec_; }
  Status Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const override;
  Status Locate(std::span<const Key>, std::span<const std::byte*>) const override {
    return Unimplemented(std::string(kKind) + " rows do not lie in memory; use Fetch");
  }
  Status Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) override;
  Status Erase(std::span<const Key> keys, uint64_t* erased) override;
  Status Scan(const ScanVisitor& visitor) const override;
  Result<TableStats> Stats() const override;

  // kFailedPrecondition if the first stored row is not of this table's sizes.
  Status CheckStoredSizes(RocksDbDatabase& database) const;

 private:
  // The stored bytes of a key; they are the first of its own.
  std::string_view Stored(const Key& key) const {
    return {reinterpret_cast<const char*>(&key), static_cast<size_t>(spec_.key_bytes)};
  }
  Result<Key> FromStored(const std::string& where, std::string_view stored) const;
  Status CheckRow(const std::string& where, Key key, std::string_view row) const;
  Status CheckKey(const std::string& where, Key key) const;
  Status CheckStride(const std::string& where, size_t stride_bytes) const;
  Status RequireNotDropped(const std::string& where) const;

  // The selected keys in stored order, equal ones by position. kOutOfRange for a key that the table cannot hold.
  Result<std::vector<KeyIndex>> Sort(const std::string& where, std::span<const Key> keys,
                                     std::optional<std::span<const uint32_t>> positions = std::nullopt) const;
  // Calls visit(key_index, row), row empty where absent, for each of the sorted keys.
  template <typename Visit>
  Status Read(RocksDbDatabase& database, std::span<const KeyIndex> sorted, const ReadLimits& limits,
              Visit&& visit) const;
  // Writes batches of changes made by change(key_index), for keys in order.
  template <typename MakeChange>
  Status Write(RocksDbDatabase& database, std::span<const KeyIndex> keys, MakeChange&& change);
  // Drops repetitions of a key, and keys whose presence in the table is not `present`.
  Status Keep(RocksDbDatabase& database, bool present, std::vector<KeyIndex>* sorted) const;
  Result<uint64_t> CountRows(RocksDbDatabase& database) const;

  const std::shared_ptr<Session> session_;
  const std::shared_ptr<RocksDbFamily> family_;
  const TableSpec spec_;
};

Result<Key> RocksDbTable::FromStored(const std::string& where, std::string_view stored) const {
  if (stored.size() != static_cast<size_t>(spec_.key_bytes)) {
    return DataLoss(where + ": a key has " + std::to_string(stored.size()) + " bytes instead of " +
                    std::to_string(spec_.key_bytes) + "; load the model again");
  }
  Key key;
  int32_t short_key;
  if (spec_.key_bytes == 4) {
    std::memcpy(&short_key, stored.data(), sizeof(short_key));
    return Key{short_key};
  }
  std::memcpy(&key, stored.data(), sizeof(key));
  return key;
}

Status RocksDbTable::CheckRow(const std::string& where, Key key, std::string_view row) const {
  if (row.size() == spec_.row_bytes) return OkStatus();
  return DataLoss(where + ": the row of key " + std::to_string(key) + " has " + std::to_string(row.size()) +
                  " bytes instead of " + std::to_string(spec_.row_bytes) + "; load the model again");
}

Status RocksDbTable::CheckKey(const std::string& where, Key key) const {
  if (spec_.key_bytes != 4 || key == static_cast<int32_t>(key)) return OkStatus();
  return OutOfRange(where + ": key " + std::to_string(key) +
                    " does not fit in the table's 4-byte keys; set supportlonglong to true and load the model again");
}

Status RocksDbTable::CheckStride(const std::string& where, size_t stride_bytes) const {
  if (stride_bytes >= spec_.row_bytes) return OkStatus();
  return InvalidArgument(where + ": a stride of " + std::to_string(stride_bytes) + " bytes is less than the row of " +
                         std::to_string(spec_.row_bytes));
}

Status RocksDbTable::RequireNotDropped(const std::string& where) const {
  if (!family_->dropped) return OkStatus();
  return FailedPrecondition(where + " was dropped; open the table again");
}

Result<std::vector<KeyIndex>> RocksDbTable::Sort(const std::string& where, std::span<const Key> keys,
                                                 std::optional<std::span<const uint32_t>> positions) const {
  std::vector<KeyIndex> sorted(positions ? positions->size() : keys.size());
  for (size_t i = 0; i < sorted.size(); ++i) {
    const uint32_t position = positions ? (*positions)[i] : static_cast<uint32_t>(i);
    const Key key = keys[position];
    HPS_RETURN_IF_ERROR(CheckKey(where, key));
    sorted[i] = {key, position};
  }
  SortStored(&sorted);
  return sorted;
}

template <typename Visit>
Status RocksDbTable::Read(RocksDbDatabase& database, std::span<const KeyIndex> sorted, const ReadLimits& limits,
                          Visit&& visit) const {
  const size_t batch_keys = std::min<size_t>(session_->options.max_get_batch_size, kMostBatchKeys);
  std::vector<std::string_view> keys;
  while (!sorted.empty()) {
    // A batch is so many different keys, with all their repetitions.
    keys.clear();
    size_t end = 0;
    for (; end < sorted.size(); ++end) {
      if (end > 0 && sorted[end].key == sorted[end - 1].key) continue;
      if (keys.size() == batch_keys) break;
      keys.push_back(Stored(sorted[end].key));
    }
    size_t next = 0;
    HPS_RETURN_IF_ERROR(
        database.Read(*family_, keys, limits, [&](size_t i, std::optional<std::string_view> row) -> Status {
          for (; next < end && Stored(sorted[next].key) == keys[i]; ++next) {
            HPS_RETURN_IF_ERROR(visit(sorted[next], row));
          }
          return OkStatus();
        }));
    sorted = sorted.subspan(end);
  }
  return OkStatus();
}

Status RocksDbTable::Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const {
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, session_->Pin());
  const std::string where = database->Where(spec_.name);
  return Guarded(where, [&]() -> Status {
    HPS_RETURN_IF_ERROR(CheckStride(where, request.rows.stride_bytes));
    HPS_ASSIGN_OR_RETURN(const std::vector<KeyIndex> keys, Sort(where, request.keys, request.positions));
    HPS_RETURN_IF_ERROR(database->FinishBulk(*family_));
    const ReadLimits limits = {request.deadline, request.cancelled};
    std::mutex mutex;  // guards the next two
    Status status;
    std::vector<uint32_t> missing;
    auto read = [&](size_t first, size_t last) {
      std::vector<uint32_t> piece_missing;
      Status piece_status = Guarded(where, [&] {
        return Read(*database, std::span(keys).subspan(first, last - first), limits,
                    [&](const KeyIndex& key, std::optional<std::string_view> row) -> Status {
                      if (!row) {
                        piece_missing.push_back(static_cast<uint32_t>(key.index));
                        return OkStatus();
                      }
                      HPS_RETURN_IF_ERROR(CheckRow(where, key.key, *row));
                      CopyRow(request.rows.data + key.index * request.rows.stride_bytes,
                              reinterpret_cast<const std::byte*>(row->data()), row->size());
                      return OkStatus();
                    });
      });
      std::lock_guard lock(mutex);
      if (status.ok()) status = std::move(piece_status);
      missing.insert(missing.end(), piece_missing.begin(), piece_missing.end());
    };
    const size_t threads = session_->options.num_threads;
    const size_t grain = std::max(kParallelGrain, (keys.size() + threads - 1) / threads);
    Executor* executor = session_->options.executor;
    (executor != nullptr ? *executor : InlineExecutor()).ParallelFor(keys.size(), grain, read);
    HPS_RETURN_IF_ERROR(status);
    std::sort(missing.begin(), missing.end());
    misses->insert(misses->end(), missing.begin(), missing.end());
    return OkStatus();
  });
}

template <typename MakeChange>
Status RocksDbTable::Write(RocksDbDatabase& database, std::span<const KeyIndex> keys, MakeChange&& change) {
  const size_t batch_rows =
      std::clamp<size_t>(kMostBatchBytes / spec_.row_bytes, 1, session_->options.max_set_batch_size);
  std::vector<RocksDbChange> changes;
  while (!keys.empty()) {
    const auto batch = keys.first(std::min(keys.size(), batch_rows));
    keys = keys.subspan(batch.size());
    changes.clear();
    for (const KeyIndex& key : batch) changes.push_back(change(key));
    HPS_RETURN_IF_ERROR(database.Write(*family_, changes));
  }
  return OkStatus();
}

Status RocksDbTable::Keep(RocksDbDatabase& database, bool present, std::vector<KeyIndex>* sorted) const {
  std::vector<KeyIndex> kept;
  HPS_RETURN_IF_ERROR(
      Read(database, *sorted, ReadLimits{}, [&](const KeyIndex& key, std::optional<std::string_view> row) -> Status {
        const bool repeated = !kept.empty() && kept.back().key == key.key;
        if (row.has_value() == present && !repeated) kept.push_back(key);
        return OkStatus();
      }));
  *sorted = std::move(kept);
  return OkStatus();
}

Status RocksDbTable::Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) {
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, session_->Pin());
  HPS_RETURN_IF_ERROR(database->RequireWritable());
  const std::string where = database->Where(spec_.name);
  return Guarded(where, [&]() -> Status {
    HPS_RETURN_IF_ERROR(CheckStride(where, rows.stride_bytes));
    if (options.bulk && !options.only_absent) {
      for (const Key key : keys) HPS_RETURN_IF_ERROR(CheckKey(where, key));
      std::shared_lock lock(family_->write_mutex);
      HPS_RETURN_IF_ERROR(RequireNotDropped(where));
      return database->AddBulk(*family_, spec_.key_bytes, spec_.row_bytes, keys, rows);
    }
    HPS_RETURN_IF_ERROR(database->FinishBulk(*family_));
    HPS_ASSIGN_OR_RETURN(std::vector<KeyIndex> sorted, Sort(where, keys));
    std::shared_lock shared(family_->write_mutex, std::defer_lock);
    std::unique_lock exclusive(family_->write_mutex, std::defer_lock);
    options.only_absent ? exclusive.lock() : shared.lock();
    HPS_RETURN_IF_ERROR(RequireNotDropped(where));
    if (options.only_absent) HPS_RETURN_IF_ERROR(Keep(*database, /*present=*/false, &sorted));
    return Write(*database, sorted, [&](const KeyIndex& key) {
      return RocksDbChange{Stored(key.key), Bytes(rows.data + key.index * rows.stride_bytes, spec_.row_bytes)};
    });
  });
}

Status RocksDbTable::Erase(std::span<const Key> keys, uint64_t* erased) {
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, session_->Pin());
  HPS_RETURN_IF_ERROR(database->RequireWritable());
  const std::string where = database->Where(spec_.name);
  return Guarded(where, [&]() -> Status {
    HPS_ASSIGN_OR_RETURN(std::vector<KeyIndex> sorted, Sort(where, keys));
    HPS_RETURN_IF_ERROR(database->FinishBulk(*family_));
    std::lock_guard lock(family_->write_mutex);
    HPS_RETURN_IF_ERROR(RequireNotDropped(where));
    HPS_RETURN_IF_ERROR(Keep(*database, /*present=*/true, &sorted));
    HPS_RETURN_IF_ERROR(Write(*database, sorted, [&](const KeyIndex& key) {
      return RocksDbChange{Stored(key.key), std::nullopt};
    }));
    if (erased != nullptr) *erased = sorted.size();
    return OkStatus();
  });
}

Status RocksDbTable::Scan(const ScanVisitor& visitor) const {
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, session_->Pin());
  const std::string where = database->Where(spec_.name);
  return Guarded(where, [&]() -> Status {
    HPS_RETURN_IF_ERROR(database->FinishBulk(*family_));
    const size_t chunk_rows = std::clamp<size_t>(kScanChunkBytes / spec_.row_bytes, 1, 65536);
    std::vector<Key> keys;
    std::vector<std::byte> rows;
    keys.reserve(chunk_rows);
    rows.reserve(chunk_rows * spec_.row_bytes);
    auto visit = [&]() -> Status {
      if (keys.empty()) return OkStatus();
      HPS_RETURN_IF_ERROR(visitor(keys, {rows.data(), spec_.row_bytes}));
      keys.clear();
      rows.clear();
      return OkStatus();
    };
    HPS_RETURN_IF_ERROR(database->Scan(*family_, [&](std::string_view stored, std::string_view row) -> Status {
      HPS_ASSIGN_OR_RETURN(const Key key, FromStored(where, stored));
      HPS_RETURN_IF_ERROR(CheckRow(where, key, row));
      keys.push_back(key);
      const auto* bytes = reinterpret_cast<const std::byte*>(row.data());
      rows.insert(rows.end(), bytes, bytes + row.size());
      return keys.size() == chunk_rows ? visit() : OkStatus();
    }));
    return visit();
  });
}

Result<TableStats> RocksDbTable::Stats() const {
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, session_->Pin());
  return Guarded(database->Where(spec_.name), [&]() -> Result<TableStats> {
    HPS_RETURN_IF_ERROR(database->FinishBulk(*family_));
    const RocksDbFamilyStats family = database->Stats(*family_);
    TableStats stats{.rows = family.estimated_rows,
                     .rows_estimated = family.estimated_rows > kCountedBytes / spec_.row_bytes,
                     .memory_bytes = family.memory_bytes,
                     .disk_bytes = family.disk_bytes};
    if (!stats.rows_estimated) {
      HPS_ASSIGN_OR_RETURN(stats.rows, CountRows(*database));
    }
    return stats;
  });
}

Result<uint64_t> RocksDbTable::CountRows(RocksDbDatabase& database) const {
  std::lock_guard lock(family_->count_mutex);
  const uint64_t sequence = database.Sequence();
  if (family_->counted_sequence == sequence) return family_->counted_rows;
  uint64_t rows = 0;
  HPS_RETURN_IF_ERROR(database.Scan(*family_, [&](std::string_view, std::string_view) {
    ++rows;
    return OkStatus();
  }));
  family_->counted_sequence = sequence;
  return family_->counted_rows = rows;
}

Status RocksDbTable::CheckStoredSizes(RocksDbDatabase& database) const {
  size_t key_bytes = static_cast<size_t>(spec_.key_bytes);
  size_t row_bytes = spec_.row_bytes;
  const Status end = Cancelled("one row is enough");
  const Status status = database.Scan(*family_, [&](std::string_view key, std::string_view row) {
    key_bytes = key.size();
    row_bytes = row.size();
    return end;
  });
  if (!status.ok() && status.code() != end.code()) return status;
  const std::string where = database.Where(spec_.name);
  if (key_bytes != static_cast<size_t>(spec_.key_bytes)) {
    return FailedPrecondition(where + " holds keys of " + std::to_string(key_bytes) +
                              " bytes, the configuration asks for " + std::to_string(spec_.key_bytes) +
                              "; change supportlonglong, or drop the table and load the model again");
  }
  if (row_bytes != spec_.row_bytes) {
    return FailedPrecondition(where + " holds rows of " + std::to_string(row_bytes) +
                              " bytes, the configuration asks for " + std::to_string(spec_.row_bytes) +
                              "; change embedding_vecsize_per_table, or drop the table and load the model again");
  }
  return OkStatus();
}

class RocksDbStore final : public TableStore {
 public:
  explicit RocksDbStore(std::shared_ptr<Session> session) : session_(std::move(session)) {}

  std::string_view kind() const override { return kKind; }
  StoreCapabilities capabilities() const override {
    return {.persistent = true, .writable = !session_->options.read_only};
  }
  uint64_t MemoryFor(std::span<const TableLoad> loads) const override {
    uint64_t bytes = 0;
    for (const TableLoad& load : loads) bytes += RocksDbLoadBytes(load.spec.expected_rows, load.spec.row_bytes);
    return std::min(bytes, kRocksDbBulkBytes);
  }

  Result<std::shared_ptr<Table>> OpenTable(const TableSpec& spec) override {
    HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, session_->Pin());
    const std::string where = database->Where(spec.name);
    return Guarded(where, [&]() -> Result<std::shared_ptr<Table>> {
      HPS_RETURN_IF_ERROR(CheckSpec(where, spec));
      HPS_RETURN_IF_ERROR(database->CheckFolder());
      std::shared_ptr<RocksDbFamily> family = database->Find(spec.name);
      if (family == nullptr) {
        return NotFound(where + ": no such table" +
                        (session_->options.read_only ? "; load the model once with a server that may write (read_only "
                                                       "false)"
                                                     : ""));
      }
      HPS_RETURN_IF_ERROR(database->FinishBulk(*family));
      auto table = std::make_shared<RocksDbTable>(session_, std::move(family), spec);
      HPS_RETURN_IF_ERROR(table->CheckStoredSizes(*database));
      return std::shared_ptr<Table>(std::move(table));
    });
  }

  Result<std::shared_ptr<Table>> CreateTable(const TableSpec& spec) override {
    HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, session_->Pin());
    const std::string where = database->Where(spec.name);
    return Guarded(where, [&]() -> Result<std::shared_ptr<Table>> {
      HPS_RETURN_IF_ERROR(CheckSpec(where, spec));
      HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbFamily> family, database->Create(spec.name));
      return std::shared_ptr<Table>(std::make_shared<RocksDbTable>(session_, std::move(family), spec));
    });
  }

  Status DropTable(std::string_view name) override {
    return OnDatabase([&](RocksDbDatabase& database) { return database.Drop(name); });
  }

  Result<std::vector<std::string>> ListTables() const override {
    HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, session_->Pin());
    return database->Names();
  }

  Result<std::optional<std::string>> ReadRecord(std::string_view name) const override {
    HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, session_->Pin());
    return Guarded(database->Where(), [&] { return database->ReadRecord(RecordKey(name)); });
  }

  Status WriteRecord(std::string_view name, std::string_view value) override { return ChangeRecord(name, value); }

  Status EraseRecord(std::string_view name) override { return ChangeRecord(name, std::nullopt); }

  Status CheckPlace() const override {
    HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, session_->Pin());
    return database->CheckPlace();
  }

  Status Flush() override {
    return OnDatabase([](RocksDbDatabase& database) { return database.Flush(); });
  }

  Status Close() override {
    std::shared_ptr<RocksDbDatabase> database = session_->Release();
    if (database == nullptr) return OkStatus();
    return Guarded(database->Where(), [&] { return database->Flush(); });
  }

 private:
  static std::string RecordKey(std::string_view name) { return std::string(kRecordPrefix) + std::string(name); }

  static Status CheckSpec(const std::string& where, const TableSpec& spec) {
    if (spec.name.empty() || spec.name == kReservedName) return InvalidArgument(where + ": no table may be named so");
    if (spec.row_bytes == 0 || (spec.key_bytes != 4 && spec.key_bytes != 8)) {
      return InvalidArgument(where + ": rows of " + std::to_string(spec.row_bytes) + " bytes with keys of " +
                             std::to_string(spec.key_bytes) + "; rows take at least 1 byte and keys 4 or 8");
    }
    return OkStatus();
  }

  template <typename Body>
  Status OnDatabase(Body&& body) {
    HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, session_->Pin());
    return Guarded(database->Where(), [&] { return body(*database); });
  }

  Status ChangeRecord(std::string_view name, std::optional<std::string_view> value) {
    return OnDatabase([&](RocksDbDatabase& database) -> Status {
      HPS_RETURN_IF_ERROR(database.RequireWritable());
      return database.WriteRecord(RecordKey(name), value);
    });
  }

  const std::shared_ptr<Session> session_;
};

}  // namespace

Result<std::unique_ptr<TableStore>> OpenRocksDbStore(const RocksDbOptions& options) {
  const std::string where = std::string(kKind) + " \"" + options.path + "\"";
  // RocksDB has threads for the whole process, and would wait for them forever in a child that does not have them.
  static const uint64_t first_use = ForkGeneration();
  if (first_use != ForkGeneration()) {
    return FailedPrecondition(where +
                              ": RocksDB was in use before fork() and does not work in the child process; start "
                              "workers with the 'spawn' method (multiprocessing.get_context(\"spawn\"))");
  }
  return Guarded(where, [&]() -> Result<std::unique_ptr<TableStore>> {
    if (options.num_threads == 0 || options.max_get_batch_size == 0 || options.max_set_batch_size == 0) {
      return InvalidArgument(where + ": num_threads, max_get_batch_size and max_set_batch_size are at least 1");
    }
    HPS_ASSIGN_OR_RETURN(std::shared_ptr<RocksDbDatabase> database, RocksDbDatabase::Open(options));
    return std::unique_ptr<TableStore>(
        std::make_unique<RocksDbStore>(std::make_shared<Session>(std::move(database), options)));
  });
}

}  // namespace hps
