// Who owns what:
// - Database: one open rocksdb::DB and all its column family handles. Held by the stores over it and by each running
//   operation, so that closing never pulls it from under a call.
// - Family: one column family; its handle is destroyed with it, or with the database if that goes first.
//
// Invariant: nothing is written to a dropped family. RocksDB would take that for a diverged memtable and refuse all
// further writes.
// Lock order: registry, Database::mutex_, RocksDbFamily::write_mutex, Database::log_mutex_. Families are released with
// no lock held.

#include "cc/storage/rocksdb_database.h"

#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/listener.h>
#include <rocksdb/options.h>
#include <rocksdb/slice.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>
#include <utility>

#include "hps/log.h"

namespace hps {
namespace {

namespace fs = std::filesystem;

constexpr const char* kCurrentFile = "CURRENT";               // every database has one
constexpr size_t kWriteBufferBytes = size_t{64} << 20;        // one memtable
constexpr size_t kWriteBufferTotalBytes = size_t{256} << 20;  // all memtables of a database
constexpr size_t kWalTotalBytes = size_t{256} << 20;
constexpr size_t kBlockCacheBytes = size_t{64} << 20;  // all tables of a database

std::string Located(std::string_view path) { return "rocks_db \"" + std::string(path) + "\""; }

rocksdb::Slice ToSlice(std::string_view bytes) { return rocksdb::Slice(bytes.data(), bytes.size()); }
std::string_view ToView(const rocksdb::Slice& bytes) { return std::string_view(bytes.data(), bytes.size()); }

bool Contains(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

// `where` names the database, and the table where there is one.
Status MapStatus(const rocksdb::Status& status, const std::string& where) {
  if (status.ok()) return OkStatus();
  const std::string text = where + ": " + status.ToString();
  if (status.IsCorruption()) {
    if (Contains(text, "format_version")) {
      return FailedPrecondition(
          text + "; the files were written by a newer RocksDB: write them again with table format_version 5");
    }
    return DataLoss(text + "; restore the folder, or delete it and load the model again");
  }
  if (status.IsNoSpace()) return ResourceExhausted(text + "; free disk space");
  if (status.IsMemoryLimit()) return ResourceExhausted(text);
  if (status.IsTimedOut()) return DeadlineExceeded(text);
  if (status.IsPathNotFound()) return DataLoss(text + "; a file of the database is missing");
  if (status.IsIOError()) {
    if (Contains(text, "lock hold by") || Contains(text, "While lock file")) {
      return Unavailable(text +
                         "; the database is locked by another process: close it there, or open it with read_only");
    }
    if (Contains(text, "Permission denied") || Contains(text, "Read-only file system")) {
      return FailedPrecondition(text + "; change the permissions, or open it with read_only");
    }
    return Unavailable(text);
  }
  if (status.IsBusy() || status.IsTryAgain()) return Unavailable(text);
  if (status.IsInvalidArgument()) {
    if (Contains(text, "comparator")) {
      return InvalidArgument(text +
                             "; keys are raw bytes in bytewise order here (in rocksdict: Options(raw_mode=True))");
    }
    return InvalidArgument(text);
  }
  if (status.IsNotSupported() || status.IsShutdownInProgress()) return FailedPrecondition(text);
  return Internal(text);
}

Status MapError(const std::error_code& error, const std::string& what) {
  const std::string text = what + ": " + error.message();
  if (error == std::errc::no_space_on_device) return ResourceExhausted(text + "; free disk space");
  if (error == std::errc::not_a_directory) return InvalidArgument(text + "; a part of the path is a file");
  return FailedPrecondition(text);
}

// Takes RocksDB's own errors to the host's log, each run of equal ones once. The usual log file in the database folder
// is left out: it would make read-only opening write, and see WriteErrors on full disks.
class ErrorLogger final : public rocksdb::Logger {
 public:
  explicit ErrorLogger(std::string where) : rocksdb::Logger(rocksdb::ERROR_LEVEL), where_(std::move(where)) {}
  using rocksdb::Logger::Logv;
  void Logv(const char* format, va_list arguments) override {
    char buffer[512];
    std::vsnprintf(buffer, sizeof(buffer), format, arguments);
    std::string text = buffer;
    while (text.ends_with('\n')) text.pop_back();
    {
      std::lock_guard lock(mutex_);
      if (std::exchange(last_, text) == text) return;
    }
    Log(LogLevel::kWarning, where_ + ": " + text);
  }

 private:
  const std::string where_;
  std::mutex mutex_;
  std::string last_;
};

// Knows whether an error (a full disk, mostly) has stopped all writing until RocksDB has recovered. Debian's RocksDB is
// built with assertions and ends the process when a file is touched again after its write failed, so nothing may be
// synced meanwhile.
class WriteErrors final : public rocksdb::EventListener {
 public:
  void OnBackgroundError(rocksdb::BackgroundErrorReason, rocksdb::Status* error) override {
    std::lock_guard lock(mutex_);
    error_ = *error;
  }
  void OnErrorRecoveryEnd(const rocksdb::BackgroundErrorRecoveryInfo& recovery) override {
    std::lock_guard lock(mutex_);
    error_ = recovery.new_bg_error;
  }
  rocksdb::Status error() const {
    std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  mutable std::mutex mutex_;
  rocksdb::Status error_;
};

rocksdb::DBOptions DatabaseOptions(const RocksDbOptions& options) {
  rocksdb::DBOptions result;
  result.create_if_missing = !options.read_only;
  result.IncreaseParallelism(static_cast<int>(std::min<uint32_t>(options.num_threads, 1024)));
  result.db_write_buffer_size = kWriteBufferTotalBytes;
  result.max_total_wal_size = kWalTotalBytes;
  result.bytes_per_sync = 1 << 20;
  result.stats_dump_period_sec = 0;
  result.stats_persist_period_sec = 0;
  return result;
}

// Written for whole-key lookups: bloom filters on files and memtables, a hash index inside blocks. Format 5 is what
// both Debian's RocksDB and newer ones read. Float rows hardly compress, so they are not.
rocksdb::ColumnFamilyOptions FamilyOptions(const std::shared_ptr<rocksdb::Cache>& cache) {
  rocksdb::BlockBasedTableOptions table;
  table.format_version = 5;
  table.block_cache = cache;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  table.data_block_index_type = rocksdb::BlockBasedTableOptions::kDataBlockBinaryAndHash;
  table.data_block_hash_table_util_ratio = 0.75;

  rocksdb::ColumnFamilyOptions result;
  result.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  result.memtable_prefix_bloom_size_ratio = 0.02;
  result.memtable_whole_key_filtering = true;
  result.write_buffer_size = kWriteBufferBytes;
  result.max_write_buffer_number = 3;
  result.compression = rocksdb::kNoCompression;
  return result;
}

class Database;

struct Family final : RocksDbFamily {
  Family(const std::string& family_name, std::weak_ptr<Database> family_database, rocksdb::ColumnFamilyHandle* of)
      : RocksDbFamily(family_name), database(std::move(family_database)), handle(of) {}
  ~Family() override;

  const std::weak_ptr<Database> database;
  rocksdb::ColumnFamilyHandle* const handle;
};

rocksdb::ColumnFamilyHandle* HandleOf(RocksDbFamily& family) { return static_cast<Family&>(family).handle; }

class Database final : public RocksDbDatabase, public std::enable_shared_from_this<Database> {
 public:
  // `path` is canonical and has been checked by PrepareFolder.
  Database(std::string path, bool read_only) : RocksDbDatabase(std::move(path), read_only) {}
  ~Database() override;
  Status Start(const RocksDbOptions& options);

  std::shared_ptr<RocksDbFamily> Find(std::string_view name) override;
  Result<std::shared_ptr<RocksDbFamily>> Create(const std::string& name) override;
  Status Drop(std::string_view name) override;
  std::vector<std::string> Names() override;
  Status Read(RocksDbFamily& family, std::span<const std::string_view> keys, Deadline deadline,
              const ReadVisitor& visit) override;
  Status Scan(RocksDbFamily& family, const ScanVisitor& visit) override;
  Status Write(RocksDbFamily& family, std::span<const RocksDbChange> changes, bool bulk) override;
  Result<std::optional<std::string>> ReadRecord(std::string_view key) override;
  Status WriteRecord(std::string_view key, std::optional<std::string_view> value) override;
  RocksDbFamilyStats Stats(RocksDbFamily& family) override;
  uint64_t Sequence() override { return db_->GetLatestSequenceNumber(); }
  Status Flush() override;

  const std::string& path() const { return path_; }
  Status DestroyHandle(rocksdb::ColumnFamilyHandle* handle);

  bool registered = false;  // guarded by Registry::mutex

 private:
  std::shared_ptr<Family> Adopt(const std::string& name, rocksdb::ColumnFamilyHandle* handle);
  Status Map(const rocksdb::Status& status) const { return MapStatus(status, Where()); }
  Status Map(const rocksdb::Status& status, const RocksDbFamily& family) const {
    return MapStatus(status, Where(family.name));
  }

  std::shared_ptr<rocksdb::Cache> cache_;
  const std::shared_ptr<WriteErrors> write_errors_ = std::make_shared<WriteErrors>();
  std::unique_ptr<rocksdb::DB> db_;
  std::shared_mutex log_mutex_;            // held shared to write, exclusively while the log is synced
  std::atomic<bool> bulk_pending_{false};  // rows were written past the log since the last flush

  std::mutex mutex_;                                                      // guards the next two
  std::map<std::string, std::shared_ptr<Family>, std::less<>> families_;  // those that exist; without "default"
  std::set<rocksdb::ColumnFamilyHandle*> handles_;                        // all that must be destroyed before db_
};

Family::~Family() {
  if (std::shared_ptr<Database> open = database.lock()) {
    if (Status status = open->DestroyHandle(handle); !status.ok()) Log(LogLevel::kWarning, status.ToString());
  }
}

Status Database::Start(const RocksDbOptions& options) {
  cache_ = rocksdb::NewLRUCache(kBlockCacheBytes);
  rocksdb::DBOptions database_options = DatabaseOptions(options);
  database_options.info_log = std::make_shared<ErrorLogger>(Where());
  database_options.listeners = {write_errors_};
  const rocksdb::ColumnFamilyOptions family_options = FamilyOptions(cache_);
  // RocksDB opens all column families or none.
  std::vector<std::string> names = {rocksdb::kDefaultColumnFamilyName};
  if (fs::exists(fs::path(path_) / kCurrentFile)) {
    HPS_RETURN_IF_ERROR(Map(rocksdb::DB::ListColumnFamilies(database_options, path_, &names)));
  }
  std::vector<rocksdb::ColumnFamilyDescriptor> descriptors;
  for (const std::string& name : names) descriptors.emplace_back(name, family_options);

  rocksdb::DB* db = nullptr;
  std::vector<rocksdb::ColumnFamilyHandle*> handles;
  HPS_RETURN_IF_ERROR(Map(read_only_ ? rocksdb::DB::OpenForReadOnly(database_options, path_, descriptors, &handles, &db)
                                     : rocksdb::DB::Open(database_options, path_, descriptors, &handles, &db)));
  db_.reset(db);
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == rocksdb::kDefaultColumnFamilyName) {
      handles_.insert(handles[i]);
    } else {
      families_[names[i]] = Adopt(names[i], handles[i]);
    }
  }
  return OkStatus();
}

Database::~Database() {
  if (db_ == nullptr) return;
  families_.clear();
  for (rocksdb::ColumnFamilyHandle* handle : handles_) {
    if (Status status = Map(db_->DestroyColumnFamilyHandle(handle)); !status.ok()) {
      Log(LogLevel::kWarning, status.ToString());
    }
  }
  if (Status status = Map(db_->Close()); !status.ok()) Log(LogLevel::kWarning, status.ToString());
}

std::shared_ptr<Family> Database::Adopt(const std::string& name, rocksdb::ColumnFamilyHandle* handle) {
  handles_.insert(handle);
  return std::make_shared<Family>(name, weak_from_this(), handle);
}

std::shared_ptr<RocksDbFamily> Database::Find(std::string_view name) {
  std::lock_guard lock(mutex_);
  auto found = families_.find(name);
  return found == families_.end() ? nullptr : found->second;
}

Result<std::shared_ptr<RocksDbFamily>> Database::Create(const std::string& name) {
  HPS_RETURN_IF_ERROR(RequireWritable());
  std::lock_guard lock(mutex_);
  if (families_.contains(name)) return AlreadyExists(Where(name) + ": exists already; open or drop it");
  rocksdb::ColumnFamilyHandle* handle = nullptr;
  HPS_RETURN_IF_ERROR(Map(db_->CreateColumnFamily(FamilyOptions(cache_), name, &handle)));
  std::shared_ptr<Family> family = Adopt(name, handle);
  families_[name] = family;
  return std::shared_ptr<RocksDbFamily>(std::move(family));
}

Status Database::Drop(std::string_view name) {
  HPS_RETURN_IF_ERROR(RequireWritable());
  std::shared_ptr<Family> family;  // outlives the lock: releasing it locks again
  std::lock_guard lock(mutex_);
  auto found = families_.find(name);
  if (found == families_.end()) return NotFound(Where(name) + ": no such table");
  family = found->second;
  std::lock_guard write_lock(family->write_mutex);
  HPS_RETURN_IF_ERROR(Map(db_->DropColumnFamily(family->handle)));
  family->dropped = true;
  families_.erase(found);
  return OkStatus();
}

std::vector<std::string> Database::Names() {
  std::lock_guard lock(mutex_);
  std::vector<std::string> names;
  for (const auto& [name, family] : families_) names.push_back(name);
  return names;
}

Status Database::Read(RocksDbFamily& family, std::span<const std::string_view> keys, Deadline deadline,
                      const ReadVisitor& visit) {
  rocksdb::ReadOptions options;
  if (deadline != kNoDeadline) {
    const auto left = std::chrono::duration_cast<std::chrono::microseconds>(deadline - Deadline::clock::now());
    if (left.count() <= 0) return DeadlineExceeded(Where(family.name) + ": the deadline has passed");
    options.deadline = std::chrono::microseconds(rocksdb::Env::Default()->NowMicros()) + left;
  }
  std::vector<rocksdb::Slice> slices;
  slices.reserve(keys.size());
  for (std::string_view key : keys) slices.push_back(ToSlice(key));
  std::vector<rocksdb::PinnableSlice> rows(keys.size());
  std::vector<rocksdb::Status> statuses(keys.size());
  db_->MultiGet(options, HandleOf(family), keys.size(), slices.data(), rows.data(), statuses.data(),
                /*sorted_input=*/true);
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!statuses[i].ok() && !statuses[i].IsNotFound()) return Map(statuses[i], family);
    HPS_RETURN_IF_ERROR(visit(i, statuses[i].ok() ? std::optional(ToView(rows[i])) : std::nullopt));
  }
  return OkStatus();
}

Status Database::Scan(RocksDbFamily& family, const ScanVisitor& visit) {
  rocksdb::ReadOptions options;
  options.fill_cache = false;  // leaves the block cache to the lookups
  options.readahead_size = 2 << 20;
  // An iterator sees the table as it was when the iterator was made.
  std::unique_ptr<rocksdb::Iterator> row(db_->NewIterator(options, HandleOf(family)));
  for (row->SeekToFirst(); row->Valid(); row->Next()) {
    HPS_RETURN_IF_ERROR(visit(ToView(row->key()), ToView(row->value())));
  }
  return Map(row->status(), family);
}

Status Database::Write(RocksDbFamily& family, std::span<const RocksDbChange> changes, bool bulk) {
  rocksdb::WriteBatch batch;
  for (const RocksDbChange& change : changes) {
    const rocksdb::Slice key = ToSlice(change.key);
    HPS_RETURN_IF_ERROR(
        Map(change.row ? batch.Put(HandleOf(family), key, ToSlice(*change.row)) : batch.Delete(HandleOf(family), key),
            family));
  }
  rocksdb::WriteOptions options;
  options.disableWAL = bulk;
  std::shared_lock lock(log_mutex_);
  HPS_RETURN_IF_ERROR(Map(db_->Write(options, &batch), family));
  if (bulk) bulk_pending_ = true;  // after the write: no earlier flush may clear this
  return OkStatus();
}

Result<std::optional<std::string>> Database::ReadRecord(std::string_view key) {
  std::string value;
  rocksdb::Status status = db_->Get(rocksdb::ReadOptions(), ToSlice(key), &value);
  if (status.IsNotFound()) return std::optional<std::string>();
  HPS_RETURN_IF_ERROR(Map(status));
  return std::optional<std::string>(std::move(value));
}

Status Database::WriteRecord(std::string_view key, std::optional<std::string_view> value) {
  rocksdb::WriteOptions synced;
  synced.sync = true;
  std::shared_lock lock(log_mutex_);
  return Map(value ? db_->Put(synced, ToSlice(key), ToSlice(*value)) : db_->Delete(synced, ToSlice(key)));
}

RocksDbFamilyStats Database::Stats(RocksDbFamily& family) {
  auto property = [&](const std::string& name) {
    uint64_t value = 0;
    db_->GetIntProperty(HandleOf(family), name, &value);
    return value;
  };
  using Properties = rocksdb::DB::Properties;
  return {.estimated_rows = property(Properties::kEstimateNumKeys),
          .memory_bytes = property(Properties::kSizeAllMemTables) + property(Properties::kEstimateTableReadersMem),
          .disk_bytes = property(Properties::kTotalSstFilesSize)};
}

Status Database::Flush() {
  if (read_only_) return OkStatus();
  HPS_RETURN_IF_ERROR(Map(write_errors_->error()));
  if (bulk_pending_.exchange(false)) {
    std::vector<std::shared_ptr<Family>> families;
    {
      std::lock_guard lock(mutex_);
      for (const auto& [name, family] : families_) families.push_back(family);
    }
    for (const std::shared_ptr<Family>& family : families) {
      rocksdb::Status status = db_->Flush(rocksdb::FlushOptions(), family->handle);
      if (status.ok() || status.IsColumnFamilyDropped()) continue;
      bulk_pending_ = true;
      return MapStatus(status, Where(family->name));
    }
  }
  std::lock_guard lock(log_mutex_);
  HPS_RETURN_IF_ERROR(Map(write_errors_->error()));
  return Map(db_->FlushWAL(/*sync=*/true));
}

Status Database::DestroyHandle(rocksdb::ColumnFamilyHandle* handle) {
  std::lock_guard lock(mutex_);
  handles_.erase(handle);
  return Map(db_->DestroyColumnFamilyHandle(handle));
}

// What an interrupted creation, or the system, may leave in a folder without a database.
bool MayLieInEmptyFolder(const std::string& name) {
  return name == "LOCK" || name == "IDENTITY" || name == "lost+found" || name.starts_with("LOG") ||
         name.starts_with("MANIFEST-") || name.ends_with(".dbtmp");
}

// Makes the folder where that is asked for; refuses what is no database. Returns its canonical path.
Result<std::string> PrepareFolder(const RocksDbOptions& options) {
  const std::string where = Located(options.path);
  if (options.path.empty()) return InvalidArgument(where + ": the path is empty");
  const fs::path path(options.path);
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::not_found) {
    if (options.read_only) return NotFound(where + ": no such folder, and read_only makes none");
    fs::create_directories(path, error);
    if (error) return MapError(error, where + ": cannot make the folder");
  } else if (error) {
    return MapError(error, where);
  } else if (status.type() != fs::file_type::directory) {
    return InvalidArgument(where + " is not a folder; name the folder of a RocksDB database, or one to be made");
  }
  if (!fs::exists(path / kCurrentFile, error)) {
    fs::directory_iterator entry(path, error);
    for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
      const std::string name = entry->path().filename().string();
      if (MayLieInEmptyFolder(name)) continue;
      return InvalidArgument(where + " is not a RocksDB database and holds other things (" + "\"" + name + "\"" +
                             "); name an empty or a new folder");
    }
    if (error) return MapError(error, where);
    if (options.read_only) return NotFound(where + ": the folder holds no database, and read_only makes none");
  }
  const fs::path canonical = fs::canonical(path, error);
  if (error) return MapError(error, where);
  return canonical.string();
}

// The open databases of this process, by canonical path. An entry outlives its database until that has really closed,
// so that whoever opens the folder next can wait for the lock to be free.
struct Registry {
  std::mutex mutex;
  std::condition_variable closed;
  std::map<std::string, std::weak_ptr<Database>> databases;
  int live = 0;        // databases that exist, registered or not
  bool ended = false;  // the process exits
};

Registry& OpenDatabases() {
  static Registry* registry = new Registry;  // never destroyed: stores may close at exit
  return *registry;
}

void CloseDatabase(Database* database) {
  const std::string path = database->path();
  const bool registered = database->registered;
  delete database;
  Registry& registry = OpenDatabases();
  std::unique_lock lock(registry.mutex, std::defer_lock);
  if (registered) lock.lock();  // one that could not be started goes under its opener's lock
  if (registered) registry.databases.erase(path);
  --registry.live;
  registry.closed.notify_all();
}

Result<std::shared_ptr<Database>> OpenShared(const std::string& path, const RocksDbOptions& options) {
  Registry& registry = OpenDatabases();
  std::shared_ptr<Database> database;  // outlives the lock: letting go of it may lock again
  std::unique_lock lock(registry.mutex);
  for (;;) {
    if (registry.ended) return FailedPrecondition(Located(path) + ": the process is ending; no database is opened");
    auto found = registry.databases.find(path);
    if (found == registry.databases.end()) break;
    database = found->second.lock();
    if (database != nullptr) {
      if (database->read_only() == options.read_only) return database;
      return FailedPrecondition(database->Where() + " is open in this process with read_only " +
                                (database->read_only() ? "true" : "false") +
                                "; use the same setting for all its users, or close the other first");
    }
    registry.closed.wait(lock);
  }
  database = std::shared_ptr<Database>(new Database(path, options.read_only), CloseDatabase);
  ++registry.live;
  if (Status started = database->Start(options); !started.ok()) {
    database.reset();
    return started;
  }
  registry.databases[path] = database;
  database->registered = true;
  return database;
}

}  // namespace

Result<std::shared_ptr<RocksDbDatabase>> RocksDbDatabase::Open(const RocksDbOptions& options) {
  HPS_ASSIGN_OR_RETURN(const std::string path, PrepareFolder(options));
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<Database> database, OpenShared(path, options));
  return std::shared_ptr<RocksDbDatabase>(std::move(database));
}

bool EndRocksDb(std::chrono::milliseconds limit) {
  Registry& registry = OpenDatabases();
  std::unique_lock lock(registry.mutex);
  registry.ended = true;
  return registry.closed.wait_for(lock, limit, [&] { return registry.live == 0; });
}

std::string RocksDbDatabase::Where() const { return Located(path_); }

std::string RocksDbDatabase::Where(std::string_view table) const {
  return Where() + ", table \"" + std::string(table) + "\"";
}

Status RocksDbDatabase::RequireWritable() const {
  if (!read_only_) return OkStatus();
  return FailedPrecondition(Where() + " was opened with read_only; open it without to write");
}

}  // namespace hps
