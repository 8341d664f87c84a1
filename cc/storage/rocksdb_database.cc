// Who owns what:
// - Database: one open rocksdb::DB and all its column family handles. Held by the stores over it and by each running
//   operation, so that closing never pulls it from under a call.
// - Family: one column family; its handle is destroyed with it, or with the database if that goes first.
//
// Invariant: nothing is written to a dropped family. RocksDB would take that for a diverged memtable and refuse all
// further writes.
// Lock order: registry, Database::mutex_, RocksDbFamily::write_mutex, ::bulk_mutex, Database::log_mutex_. Families are
// released with no lock held.

#include "cc/storage/rocksdb_database.h"

#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/listener.h>
#include <rocksdb/options.h>
#include <rocksdb/slice.h>
#include <rocksdb/sst_file_writer.h>
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
#include <system_error>
#include <thread>
#include <utility>

#include "cc/base/system_limits.h"
#include "cc/storage/rocksdb_folder.h"
#include "cc/storage/rocksdb_manifest.h"
#include "cc/storage/table_memory.h"
#include "hps/log.h"

namespace hps {
namespace {

namespace fs = std::filesystem;

constexpr size_t kWriteBufferBytes = size_t{64} << 20;        // one memtable
constexpr size_t kWriteBufferTotalBytes = size_t{256} << 20;  // all memtables of a database
constexpr size_t kWalTotalBytes = size_t{256} << 20;
constexpr size_t kBulkBatchBytes = size_t{2} << 20;      // fewer bulk rows go through a memtable
constexpr size_t kBulkFileBytes = size_t{128} << 20;     // most in one sorted file, about
constexpr size_t kBulkFileLeastBytes = size_t{2} << 20;  // least, where several threads write them
constexpr size_t kBlockBytes = 2 << 10;
constexpr const char* kBulkFolder = "hps_bulk";  // files on their way into the database; RocksDB does not look at it

rocksdb::Slice ToSlice(std::string_view bytes) { return rocksdb::Slice(bytes.data(), bytes.size()); }
std::string_view ToView(const rocksdb::Slice& bytes) { return std::string_view(bytes.data(), bytes.size()); }

bool Contains(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

// `where` names the database, and the table where there is one.
Status MapStatus(const rocksdb::Status& status, const std::string& where) {
  if (status.ok()) return OkStatus();
  std::string text = where + ": " + status.ToString();
  // RocksDB looks for a missing table file under its old suffix last, and names that.
  if (const size_t at = text.find(".ldb"); at != std::string::npos) text.replace(at, 4, ".sst");
  if (status.IsCorruption()) {
    if (Contains(text, "format_version")) {
      return FailedPrecondition(
          text + "; the files were written by a newer RocksDB: write them again with table format_version 5");
    }
    return DataLoss(text + kRestoreRocksDb);
  }
  if (status.IsNoSpace()) return ResourceExhausted(text + "; free disk space");
  if (status.IsMemoryLimit()) return NoMemory(text);
  if (status.IsTimedOut()) return DeadlineExceeded(text);
  if (status.IsPathNotFound()) return DataLoss(text + "; a file of the database is missing" + kRestoreRocksDb);
  if (status.IsIOError()) {
    for (const int error : {EMFILE, ENFILE, EFBIG, ENOMEM}) {
      if (Contains(text, std::generic_category().message(error))) return *LimitReached(error, text);
    }
    if (Contains(text, "lock hold by current process")) {
      return Unavailable(text + "; an opening in this process failed half-way and left it: restart the process");
    }
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
  // An unfinished record at the end is what a killed process leaves; any other damage of the log is an error.
  // (RocksDB's own choice is to forget silently what follows a damaged record.)
  result.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  result.bytes_per_sync = 1 << 20;
  // Opening with several threads ends the process where one of them cannot be started (see CheckThreads below).
  if (AddressSpaceIsLimited()) result.max_file_opening_threads = 1;
  result.stats_dump_period_sec = 0;
  result.stats_persist_period_sec = 0;
  return result;
}

// Written for whole-key lookups: bloom filters on files and memtables, a hash index inside small blocks. Format 5 is
// what both Debian's RocksDB and newer ones read. Float rows hardly compress, so they are not. There is no block cache:
// the system's page cache does that job, and taking a small block from there is cheaper than the cache's bookkeeping.
// (Set in place: a copy of these options in our code looks like a race to the thread sanitizer, see rocksdb_races.h.)
void SetFamilyOptions(rocksdb::ColumnFamilyOptions* options) {
  rocksdb::BlockBasedTableOptions table;
  table.format_version = 5;
  table.no_block_cache = true;
  table.block_size = kBlockBytes;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  table.data_block_index_type = rocksdb::BlockBasedTableOptions::kDataBlockBinaryAndHash;
  table.data_block_hash_table_util_ratio = 0.75;

  options->table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  options->memtable_prefix_bloom_size_ratio = 0.02;
  options->memtable_whole_key_filtering = true;
  options->write_buffer_size = kWriteBufferBytes;
  options->max_write_buffer_number = 3;
  options->compression = rocksdb::kNoCompression;
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
  // `path` is canonical and has been checked by PrepareRocksDbFolder.
  Database(std::string path, bool read_only) : RocksDbDatabase(std::move(path), read_only) {}
  ~Database() override;
  Status Start(const RocksDbOptions& options);

  Status CheckFolder() const override { return read_only_ ? OkStatus() : CheckPlace(); }
  Status CheckPlace() const override { return folder_ ? folder_->Check(Where()) : OkStatus(); }
  std::shared_ptr<RocksDbFamily> Find(std::string_view name) override;
  Result<std::shared_ptr<RocksDbFamily>> Create(const std::string& name) override;
  Status Drop(std::string_view name) override;
  std::vector<std::string> Names() override;
  Status Read(RocksDbFamily& family, std::span<const std::string_view> keys, const ReadLimits& limits,
              const ReadVisitor& visit) override;
  Status Scan(RocksDbFamily& family, const ScanVisitor& visit) override;
  Status Write(RocksDbFamily& family, std::span<const RocksDbChange> changes) override {
    return Write(family, changes, rocksdb::WriteOptions());
  }
  Status AddBulk(RocksDbFamily& family, int key_bytes, size_t row_bytes, std::span<const Key> keys,
                 ConstRowBuffer rows) override;
  Status FinishBulk(RocksDbFamily& family) override;
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
  // *changed: it failed because a process that writes the database did so meanwhile.
  Status TryStart(const RocksDbOptions& options, bool* changed);
  Status Write(RocksDbFamily& family, std::span<const RocksDbChange> changes, const rocksdb::WriteOptions& options);
  // The caller holds write_mutex, shared, and bulk_mutex of the family, which is not dropped.
  Status FinishBulkLocked(RocksDbFamily& family);
  Status WriteBulk(RocksDbFamily& family, const BulkRows& rows);
  Status IngestBulk(RocksDbFamily& family, const BulkRows& rows);
  Status WriteSortedFile(RocksDbFamily& family, const BulkRows& rows, BulkRows::Range range, const std::string& path,
                         bool* written);
  std::vector<std::shared_ptr<Family>> Families();
  fs::path BulkFolder() const { return fs::path(path_) / kBulkFolder; }

  // The cause, where what failed is that the folder went away meanwhile.
  Status OrFolderGone(Status status) const {
    if (!status.ok()) HPS_RETURN_IF_ERROR(CheckFolder());
    return status;
  }

  Status Map(const rocksdb::Status& status) const { return MapStatus(status, Where()); }
  Status Map(const rocksdb::Status& status, const RocksDbFamily& family) const {
    return MapStatus(status, Where(family.name));
  }

  const std::shared_ptr<WriteErrors> write_errors_ = std::make_shared<WriteErrors>();
  std::unique_ptr<rocksdb::DB> db_;
  std::unique_ptr<OpenRocksDbFolder> folder_;  // once it is open
  std::shared_mutex log_mutex_;                // held shared to write, exclusively while the log is synced
  std::atomic<bool> unlogged_{false};          // rows were written past the log since the last flush
  size_t threads_ = 1;                         // that write sorted files
  BulkMemory bulk_memory_{.limit_bytes = kRocksDbBulkBytes};
  std::atomic<uint64_t> bulk_files_{0};

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
  constexpr int kAttempts = 50;
  Status status;
  bool changed = true;
  for (int attempt = 0; changed && attempt < kAttempts; ++attempt) status = TryStart(options, &changed);
  return status;
}

Status Database::TryStart(const RocksDbOptions& options, bool* changed) {
  *changed = false;
  // RocksDB's own threads, and those that open its files, cannot be refused: the folder's lock would stay, or worse.
  constexpr size_t kOpeningThreads = 20;
  HPS_RETURN_IF_ERROR(CheckThreads(std::min<size_t>(options.num_threads, 1024) + kOpeningThreads, Where()));
  rocksdb::DBOptions database_options = DatabaseOptions(options);
  database_options.info_log = std::make_shared<ErrorLogger>(Where());
  database_options.listeners = {write_errors_};
  // RocksDB opens all column families or none.
  std::vector<std::string> names = {rocksdb::kDefaultColumnFamilyName};
  const std::string manifest = ManifestState(path_);
  // A file may be deleted between our reading of its name and our opening of it.
  const auto missed_file = [&](const rocksdb::Status& status) {
    return read_only_ && !status.ok() && Contains(status.ToString(), "No such file");
  };
  if (fs::exists(fs::path(path_) / kRocksDbCurrentFile)) {
    HPS_RETURN_IF_ERROR(CheckManifest(path_, Where()));
    const rocksdb::Status listed = rocksdb::DB::ListColumnFamilies(database_options, path_, &names);
    *changed = missed_file(listed);
    HPS_RETURN_IF_ERROR(Map(listed));
  }
  std::vector<rocksdb::ColumnFamilyDescriptor> descriptors(names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    descriptors[i].name = names[i];
    SetFamilyOptions(&descriptors[i].options);
  }

  rocksdb::DB* db = nullptr;
  std::vector<rocksdb::ColumnFamilyHandle*> handles;
  const rocksdb::Status opened = read_only_
                                     ? rocksdb::DB::OpenForReadOnly(database_options, path_, descriptors, &handles, &db)
                                     : rocksdb::DB::Open(database_options, path_, descriptors, &handles, &db);
  if (opened.IsCorruption() && !Contains(opened.ToString(), path_) &&
      !Contains(opened.ToString(), kRocksDbCurrentFile)) {
    return MapStatus(opened, Where() + ", in " + RocksDbLogFiles(path_));
  }
  *changed = missed_file(opened);
  HPS_RETURN_IF_ERROR(Map(opened));
  db_.reset(db);
  // Rows that go from the log into a table file, after RocksDB has read the MANIFEST and before it reads the logs, are
  // seen in neither.
  *changed = read_only_ && ManifestState(path_) != manifest;
  if (*changed) {
    for (rocksdb::ColumnFamilyHandle* handle : handles) (void)db_->DestroyColumnFamilyHandle(handle);
    db_ = nullptr;
    return Unavailable(Where() + ": another process wrote to it whenever it was opened here; try again");
  }
  // Before anything can fail: RocksDB ends the process that closes a database and has handles left.
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == rocksdb::kDefaultColumnFamilyName) {
      handles_.insert(handles[i]);
    } else {
      families_[names[i]] = Adopt(names[i], handles[i]);
    }
  }
  // Twice the cores: a thread waits while its file is synced.
  threads_ = std::clamp<size_t>(options.num_threads, 1, std::max(2 * std::thread::hardware_concurrency(), 1u));
  HPS_ASSIGN_OR_RETURN(folder_, OpenRocksDbFolder::Open(path_, Where()));
  if (!read_only_) {
    std::error_code error;
    fs::remove_all(BulkFolder(), error);  // what a load that was cut short has left
    if (error) return MapFileError(error, Where() + ": cannot remove \"" + BulkFolder().string() + "\"");
    NoteManifest(path_);
  }
  return OkStatus();
}

Database::~Database() {
  if (db_ == nullptr) return;
  for (const auto& [name, family] : families_) {
    // A table may outlive the database with rows that could not be brought in, and they count in bulk_memory_.
    std::lock_guard lock(family->bulk_mutex);
    family->bulk_pending = false;
    family->bulk.reset();
  }
  families_.clear();
  const Status folder = CheckFolder();
  if (!folder.ok()) Log(LogLevel::kWarning, folder.ToString());
  for (rocksdb::ColumnFamilyHandle* handle : handles_) {
    // What stands in the log goes into table files: then a log that gets lost or damaged takes nothing with it, and
    // opening is quick.
    if (!read_only_ && folder.ok() && write_errors_->error().ok()) {
      const rocksdb::Status flushed = db_->Flush(rocksdb::FlushOptions(), handle);
      if (!flushed.ok() && !flushed.IsColumnFamilyDropped()) Log(LogLevel::kWarning, Map(flushed).ToString());
    }
    if (Status status = Map(db_->DestroyColumnFamilyHandle(handle)); !status.ok()) {
      Log(LogLevel::kWarning, status.ToString());
    }
  }
  if (Status status = Map(db_->Close()); !status.ok()) Log(LogLevel::kWarning, status.ToString());
  if (!read_only_ && folder.ok()) NoteManifest(path_);
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
  HPS_RETURN_IF_ERROR(CheckFolder());
  std::lock_guard lock(mutex_);
  if (families_.contains(name)) return AlreadyExists(Where(name) + ": exists already; open or drop it");
  rocksdb::ColumnFamilyHandle* handle = nullptr;
  rocksdb::ColumnFamilyOptions options;
  SetFamilyOptions(&options);
  HPS_RETURN_IF_ERROR(Map(db_->CreateColumnFamily(options, name, &handle)));
  std::shared_ptr<Family> family = Adopt(name, handle);
  families_[name] = family;
  return std::shared_ptr<RocksDbFamily>(std::move(family));
}

Status Database::Drop(std::string_view name) {
  HPS_RETURN_IF_ERROR(RequireWritable());
  std::shared_ptr<Family> family;  // outlives the lock: releasing it locks again
  // Who holds the table goes on reading it, so the rows that still wait to be written must get there first.
  if (std::shared_ptr<RocksDbFamily> held = Find(name); held != nullptr && held.use_count() > 2) {
    if (Status written = FinishBulk(*held); !written.ok()) Log(LogLevel::kWarning, written.ToString());
  }
  std::lock_guard lock(mutex_);
  auto found = families_.find(name);
  if (found == families_.end()) return NotFound(Where(name) + ": no such table");
  family = found->second;
  std::lock_guard write_lock(family->write_mutex);
  HPS_RETURN_IF_ERROR(Map(db_->DropColumnFamily(family->handle)));
  family->dropped = true;
  {
    std::lock_guard bulk_lock(family->bulk_mutex);
    family->bulk_pending = false;
    family->bulk.reset();
  }
  families_.erase(found);
  return OkStatus();
}

std::vector<std::string> Database::Names() {
  std::lock_guard lock(mutex_);
  std::vector<std::string> names;
  for (const auto& [name, family] : families_) names.push_back(name);
  return names;
}

Status Database::Read(RocksDbFamily& family, std::span<const std::string_view> keys, const ReadLimits& limits,
                      const ReadVisitor& visit) {
  const size_t most = std::min(keys.size(), kMostKeys);
  std::vector<rocksdb::Slice> slices(most);
  std::vector<rocksdb::PinnableSlice> rows(most);
  std::vector<rocksdb::Status> statuses(most);
  for (size_t first = 0; first < keys.size(); first += most) {
    const size_t count = std::min(most, keys.size() - first);
    rocksdb::ReadOptions options;
    if (limits.cancelled != nullptr && limits.cancelled->load(std::memory_order_relaxed)) {
      return Cancelled(Where(family.name) + ": the caller gave up");
    }
    if (limits.deadline != kNoDeadline) {
      const auto left = std::chrono::duration_cast<std::chrono::microseconds>(limits.deadline - Deadline::clock::now());
      if (left.count() <= 0) return DeadlineExceeded(Where(family.name) + ": the deadline has passed");
      options.deadline = std::chrono::microseconds(rocksdb::Env::Default()->NowMicros()) + left;
    }
    for (size_t i = 0; i < count; ++i) {
      slices[i] = ToSlice(keys[first + i]);
      rows[i].Reset();
      statuses[i] = rocksdb::Status();
    }
    db_->MultiGet(options, HandleOf(family), count, slices.data(), rows.data(), statuses.data(), /*sorted_input=*/true);
    for (size_t i = 0; i < count; ++i) {
      if (!statuses[i].ok() && !statuses[i].IsNotFound()) return Map(statuses[i], family);
      HPS_RETURN_IF_ERROR(visit(first + i, statuses[i].ok() ? std::optional(ToView(rows[i])) : std::nullopt));
    }
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

Status Database::Write(RocksDbFamily& family, std::span<const RocksDbChange> changes,
                       const rocksdb::WriteOptions& options) {
  rocksdb::WriteBatch batch;
  for (const RocksDbChange& change : changes) {
    const rocksdb::Slice key = ToSlice(change.key);
    HPS_RETURN_IF_ERROR(
        Map(change.row ? batch.Put(HandleOf(family), key, ToSlice(*change.row)) : batch.Delete(HandleOf(family), key),
            family));
  }
  std::shared_lock lock(log_mutex_);
  HPS_RETURN_IF_ERROR(Map(db_->Write(options, &batch), family));
  if (options.disableWAL) unlogged_ = true;  // after the write: no earlier flush may clear this
  return OkStatus();
}

Status Database::AddBulk(RocksDbFamily& family, int key_bytes, size_t row_bytes, std::span<const Key> keys,
                         ConstRowBuffer rows) {
  if (keys.empty()) return OkStatus();
  std::lock_guard lock(family.bulk_mutex);
  if (family.bulk != nullptr && (family.bulk->row_bytes() != row_bytes || family.bulk_key_bytes != key_bytes ||
                                 family.bulk->runs() >= BulkRows::kMaxRuns)) {
    HPS_RETURN_IF_ERROR(FinishBulkLocked(family));
  }
  if (family.bulk == nullptr) {
    family.bulk = std::make_unique<BulkRows>(Where(family.name), BulkFolder(), row_bytes, &bulk_memory_, threads_);
    family.bulk_key_bytes = key_bytes;
  }
  family.bulk_pending = true;
  return OrFolderGone(family.bulk->Add(keys, rows));
}

Status Database::FinishBulk(RocksDbFamily& family) {
  if (!family.bulk_pending.load(std::memory_order_acquire)) return OkStatus();
  std::shared_lock write_lock(family.write_mutex);
  std::lock_guard lock(family.bulk_mutex);
  return FinishBulkLocked(family);
}

Status Database::FinishBulkLocked(RocksDbFamily& family) {
  if (family.bulk == nullptr) return OkStatus();
  HPS_RETURN_IF_ERROR(CheckFolder());
  HPS_RETURN_IF_ERROR(Map(write_errors_->error(), family));
  BulkRows& rows = *family.bulk;
  rows.Sort();
  HPS_RETURN_IF_ERROR(OrFolderGone(rows.runs() == 0 && rows.bytes() <= kBulkBatchBytes ? WriteBulk(family, rows)
                                                                                       : IngestBulk(family, rows)));
  {
    std::lock_guard lock(family.count_mutex);
    family.counted_sequence.reset();
  }
  family.bulk.reset();
  family.bulk_pending.store(false, std::memory_order_release);
  return OkStatus();
}

Status Database::WriteBulk(RocksDbFamily& family, const BulkRows& rows) {
  std::vector<Key> keys;
  std::vector<const std::byte*> places;
  const Status visited = rows.Visit({0, UINT64_MAX}, [&](const Key& key, const std::byte* row) {
    keys.push_back(key);
    places.push_back(row);
    return OkStatus();
  });
  HPS_RETURN_IF_ERROR(visited);
  std::vector<RocksDbChange> changes;
  for (size_t i = 0; i < keys.size(); ++i) {
    changes.push_back({{reinterpret_cast<const char*>(&keys[i]), static_cast<size_t>(family.bulk_key_bytes)},
                       std::string_view(reinterpret_cast<const char*>(places[i]), rows.row_bytes())});
  }
  rocksdb::WriteOptions past_the_log;
  past_the_log.disableWAL = true;
  return Write(family, changes, past_the_log);
}

// Sorted files of disjoint ranges, written side by side, become part of the family in one step.
Status Database::IngestBulk(RocksDbFamily& family, const BulkRows& rows) {
  const size_t parts = std::max<size_t>(std::min<size_t>(threads_, rows.bytes() / kBulkFileLeastBytes + 1),
                                        rows.bytes() / kBulkFileBytes + 1);
  HPS_ASSIGN_OR_RETURN(const std::vector<BulkRows::Range> ranges, rows.Cut(parts));
  std::error_code error;
  fs::create_directory(BulkFolder(), error);
  if (error) return MapFileError(error, Where(family.name) + ": cannot make \"" + BulkFolder().string() + "\"");
  const uint64_t first_file = bulk_files_.fetch_add(ranges.size());

  std::atomic<size_t> next{0};
  std::mutex mutex;  // guards the next two
  Status status;
  std::vector<std::string> files;
  const auto fail = [&](Status failed) {
    std::lock_guard lock(mutex);
    if (status.ok()) status = std::move(failed);
    next = ranges.size();
  };
  const auto work = [&] {
    try {
      for (size_t i; (i = next++) < ranges.size();) {
        const std::string path = (BulkFolder() / (std::to_string(first_file + i) + ".sst")).string();
        bool written = false;
        Status file_status = WriteSortedFile(family, rows, ranges[i], path, &written);
        if (!file_status.ok()) fail(std::move(file_status));
        std::lock_guard lock(mutex);
        if (written) files.push_back(path);
      }
    } catch (const std::exception& error) {
      fail(NoMemory(Where(family.name) + ": " + error.what()));
    }
  };
  {
    std::vector<std::jthread> helpers;
    for (size_t i = 1; i < std::min(threads_, ranges.size()); ++i) {
      try {
        helpers.emplace_back(work);
      } catch (const std::system_error&) {
        break;  // no more threads: those that run do the work
      }
    }
    work();
  }
  if (status.ok() && !files.empty()) {
    rocksdb::IngestExternalFileOptions options;
    options.move_files = true;
    options.write_global_seqno = false;
    std::shared_lock lock(log_mutex_);
    status = Map(db_->IngestExternalFile(HandleOf(family), files, options), family);
  }
  for (const std::string& file : files) fs::remove(file, error);  // an ingested one has another name by now
  return status;
}

Status Database::WriteSortedFile(RocksDbFamily& family, const BulkRows& rows, BulkRows::Range range,
                                 const std::string& path, bool* written) {
  rocksdb::Options options;
  SetFamilyOptions(&options);
  options.bytes_per_sync = 1 << 20;
  rocksdb::SstFileWriter writer(rocksdb::EnvOptions(options), options, HandleOf(family),
                                /*invalidate_page_cache=*/false);
  const auto key_bytes = static_cast<size_t>(family.bulk_key_bytes);
  HPS_RETURN_IF_ERROR(rows.Visit(range, [&](const Key& key, const std::byte* row) -> Status {
    if (!*written) {
      HPS_RETURN_IF_ERROR(Map(writer.Open(path), family));
      *written = true;
    }
    const rocksdb::Status put = writer.Put(rocksdb::Slice(reinterpret_cast<const char*>(&key), key_bytes),
                                           rocksdb::Slice(reinterpret_cast<const char*>(row), rows.row_bytes()));
    return put.ok() ? OkStatus() : Map(put, family);
  }));
  return *written ? Map(writer.Finish(), family) : OkStatus();
}

std::vector<std::shared_ptr<Family>> Database::Families() {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Family>> families;
  for (const auto& [name, family] : families_) families.push_back(family);
  return families;
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
  HPS_RETURN_IF_ERROR(CheckFolder());
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
  HPS_RETURN_IF_ERROR(CheckFolder());
  HPS_RETURN_IF_ERROR(Map(write_errors_->error()));
  const std::vector<std::shared_ptr<Family>> families = Families();
  for (const std::shared_ptr<Family>& family : families) HPS_RETURN_IF_ERROR(FinishBulk(*family));
  if (unlogged_.exchange(false)) {
    for (const std::shared_ptr<Family>& family : families) {
      rocksdb::Status status = db_->Flush(rocksdb::FlushOptions(), family->handle);
      if (status.ok() || status.IsColumnFamilyDropped()) continue;
      unlogged_ = true;
      return OrFolderGone(MapStatus(status, Where(family->name)));
    }
  }
  std::lock_guard lock(log_mutex_);
  HPS_RETURN_IF_ERROR(Map(write_errors_->error()));
  NoteManifest(path_);  // it names the rows' files by now
  HPS_RETURN_IF_ERROR(OrFolderGone(Map(db_->FlushWAL(/*sync=*/true))));
  return CheckFolder();
}

Status Database::DestroyHandle(rocksdb::ColumnFamilyHandle* handle) {
  std::lock_guard lock(mutex_);
  handles_.erase(handle);
  return Map(db_->DestroyColumnFamilyHandle(handle));
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
    if (registry.ended)
      return FailedPrecondition(LocatedRocksDb(path) + ": the process is ending; no database is opened");
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
  HPS_ASSIGN_OR_RETURN(const std::string path, PrepareRocksDbFolder(options.path, options.read_only));
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<Database> database, OpenShared(path, options));
  return std::shared_ptr<RocksDbDatabase>(std::move(database));
}

bool EndRocksDb(std::chrono::milliseconds limit) {
  Registry& registry = OpenDatabases();
  std::unique_lock lock(registry.mutex);
  registry.ended = true;
  return registry.closed.wait_for(lock, limit, [&] { return registry.live == 0; });
}

std::string RocksDbDatabase::Where() const { return LocatedRocksDb(path_); }

std::string RocksDbDatabase::Where(std::string_view table) const {
  return Where() + ", table \"" + std::string(table) + "\"";
}

Status RocksDbDatabase::RequireWritable() const {
  if (!read_only_) return OkStatus();
  return FailedPrecondition(Where() + " was opened with read_only; open it without to write");
}

}  // namespace hps
