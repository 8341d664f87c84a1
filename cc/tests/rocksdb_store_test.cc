// What the conformance suite cannot ask of every store: the stored format, sharing and locking of a folder, durability
// under kill -9, and each refusal. Other processes are this program again, started with a role (see RunRole).

#include "cc/storage/rocksdb_store.h"

#include <gtest/gtest.h>
#include <rocksdb/db.h>
#include <rocksdb/options.h>
#include <sched.h>
#include <sys/mount.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "cc/tests/rocksdb_fixture.h"
#include "cc/tests/rocksdb_races.h"

namespace hps::testing {
namespace {

constexpr size_t kBatchRows = 50;

// ---- other processes --------------------------------------------------------------------------------------------

// Speaks in lines on standard output.
void RunRole(const std::string& role, const std::string& path) {
  if (role == "open_as_nobody" && ::geteuid() == 0 && ::setuid(65534) != 0) Say("setuid failed");
  if (role == "fill_small_disk") {
    if (::unshare(CLONE_NEWNS | (::geteuid() == 0 ? 0 : CLONE_NEWUSER)) != 0 ||
        ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        ::mount("tmpfs", path.c_str(), "tmpfs", 0, "size=100m") != 0) {
      Say("cannot mount");
      return;
    }
  }
  auto store = Open(path, role == "hold_read_only");
  if (!store.ok()) {
    Say(store.status().ToString());
    return;
  }
  if (role.starts_with("hold") || role.starts_with("open")) {
    Say("open");
    WaitForParent();
  } else {
    auto table = (*store)->CreateTable(kSpec);
    if (!table.ok()) {
      Say(table.status().ToString());
    } else if (role == "write_until_killed") {
      for (Key batch = 0;; ++batch) {
        const Status status = Put(**table, KeyRange(batch * static_cast<Key>(kBatchRows), kBatchRows), 1);
        Say(status.ok() ? std::to_string(batch) : status.ToString());
      }
    } else if (role == "bulk_load") {
      Status status = Put(**table, KeyRange(0, 20'000), 1, {.bulk = true});
      if (status.ok()) status = (*store)->Flush();
      if (status.ok()) status = Put(**table, KeyRange(20'000, 10), 1);
      Say(status.ToString());
      WaitForParent();
    } else if (role == "fill_small_disk") {
      const fs::path ballast = fs::path(path) / "ballast";
      Key rows = 0;  // acknowledged
      const auto fill = [&] {
        std::ofstream(ballast) << std::string(80 << 20, 'x');
        Status status;
        while (status.ok() && rows < 1'000'000) {
          status = Put(**table, KeyRange(rows, 1000), 1);
          if (status.ok()) rows += 1000;
        }
        return status;
      };
      Say(fill().ToString());
      Say(Put(**table, {-1}, 1).ToString());
      Say((*store)->Flush().ToString());
      fs::remove(ballast);
      Status status;
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
      do {
        status = Put(**table, {-1}, 1);
        std::this_thread::yield();
      } while (!status.ok() && std::chrono::steady_clock::now() < deadline);
      Say(status.ToString());
      Say((*store)->Close().ToString());
      store = Open(path);
      table = (*store)->OpenTable(kSpec);
      Say(fill().ToString());
      Say((*store)->Close().ToString());
      fs::remove(ballast);
      store = Open(path);
      table = (*store)->OpenTable(kSpec);
      Say(CountRows(**table, KeyRange(0, static_cast<size_t>(rows)), 1) == static_cast<size_t>(rows) ? "whole"
                                                                                                     : "lost");
      Say((*store)->Close().ToString());
    }
  }
}

// ---- format -----------------------------------------------------------------------------------------------------

// RocksDB as the predecessor configures it.
class PredecessorDatabase {
 public:
  explicit PredecessorDatabase(const fs::path& path) {
    options_.create_if_missing = true;
    options_.manual_wal_flush = true;
    options_.OptimizeForPointLookup(8);
    options_.OptimizeLevelStyleCompaction();
    options_.IncreaseParallelism(2);
    std::vector<std::string> names;
    if (!rocksdb::DB::ListColumnFamilies(options_, path, &names).ok()) names = {"default"};
    std::vector<rocksdb::ColumnFamilyDescriptor> descriptors;
    for (const std::string& name : names) descriptors.emplace_back(name, options_);
    const rocksdb::Status status = rocksdb::DB::Open(options_, path, descriptors, &handles_, &db_);
    EXPECT_TRUE(status.ok()) << status.ToString();
  }
  ~PredecessorDatabase() {
    for (rocksdb::ColumnFamilyHandle* handle : handles_) EXPECT_TRUE(db_->DestroyColumnFamilyHandle(handle).ok());
    EXPECT_TRUE(db_->Close().ok());
    delete db_;
  }

  rocksdb::ColumnFamilyHandle* Family(const std::string& name) {
    for (rocksdb::ColumnFamilyHandle* handle : handles_) {
      if (handle->GetName() == name) return handle;
    }
    rocksdb::ColumnFamilyHandle* handle = nullptr;
    EXPECT_TRUE(db_->CreateColumnFamily(options_, name, &handle).ok());
    handles_.push_back(handle);
    return handle;
  }
  template <typename StoredKey>
  void Write(const std::string& name, const std::vector<Key>& keys, const RowBlock& rows) {
    rocksdb::WriteBatch batch;
    for (size_t i = 0; i < keys.size(); ++i) {
      const auto key = static_cast<StoredKey>(keys[i]);
      const std::span<const std::byte> row = rows.row(i);
      EXPECT_TRUE(batch
                      .Put(Family(name), rocksdb::Slice(reinterpret_cast<const char*>(&key), sizeof(key)),
                           rocksdb::Slice(reinterpret_cast<const char*>(row.data()), row.size()))
                      .ok());
    }
    EXPECT_TRUE(db_->Write(rocksdb::WriteOptions(), &batch).ok());
    EXPECT_TRUE(db_->FlushWAL(true).ok());
  }
  std::string Read(const std::string& name, const std::string& key) {
    std::string value;
    const rocksdb::Status status = db_->Get(rocksdb::ReadOptions(), Family(name), key, &value);
    return status.ok() ? value : status.ToString();
  }
  void Flush(const std::string& name) { EXPECT_TRUE(db_->Flush(rocksdb::FlushOptions(), Family(name)).ok()); }

 private:
  rocksdb::Options options_;
  rocksdb::DB* db_ = nullptr;
  std::vector<rocksdb::ColumnFamilyHandle*> handles_;
};

TEST_F(RocksDbStore, OpensWhatThePredecessorWrote) {
  const std::vector<Key> keys = {0, 1, -1, 255, 256, 1'000'000'007, INT32_MIN, INT32_MAX};
  const TableSpec short_keys = {.name = "hps_et.dlrm.short", .row_bytes = 28, .key_bytes = 4};
  {
    PredecessorDatabase database(path_);
    database.Write<int64_t>(kSpec.name, keys, RowBlock::Of(keys, 7, kRowBytes));
    database.Flush(kSpec.name);  // one table in a file, the other in the log
    database.Write<uint32_t>(short_keys.name, keys, RowBlock::Of(keys, 8, 28));
    database.Write<int64_t>("of_another_program", {1}, RowBlock::Of(std::vector<Key>{1}, 9, 3));
  }
  for (bool read_only : {true, false}) {
    auto store = MustOpen(read_only);
    EXPECT_EQ(*store->ListTables(), (std::vector<std::string>{short_keys.name, kSpec.name, "of_another_program"}));
    auto table = store->OpenTable(kSpec);
    ASSERT_OK(table.status());
    EXPECT_EQ(CountRows(**table, keys, 7), keys.size());
    auto short_table = store->OpenTable(short_keys);
    ASSERT_OK(short_table.status());
    EXPECT_EQ(CountRows(**short_table, keys, 8), keys.size());
    std::vector<Key> scanned;
    ASSERT_OK((*short_table)->Scan([&](std::span<const Key> chunk, ConstRowBuffer) {
      scanned.insert(scanned.end(), chunk.begin(), chunk.end());
      return OkStatus();
    }));
    std::vector<Key> sorted = keys;
    std::sort(sorted.begin(), sorted.end());
    std::sort(scanned.begin(), scanned.end());
    EXPECT_EQ(scanned, sorted) << "4-byte keys are signed";
    EXPECT_EQ((*short_table)->Stats()->rows, keys.size());
    ASSERT_OK(store->Close());
  }
}

TEST_F(RocksDbStore, ThePredecessorReadsWhatWeWrote) {
  const std::vector<Key> keys = {258, -2};
  {
    auto store = MustOpen();
    ASSERT_OK(Put(**store->CreateTable(kSpec), keys, 3));
    ASSERT_OK(Put(**store->CreateTable({.name = "hps_et.m.short", .row_bytes = 4, .key_bytes = 4}), keys, 3));
    ASSERT_OK(store->WriteRecord("model/dlrm", "some text"));
  }
  PredecessorDatabase database(path_);
  const RowBlock rows = RowBlock::Of(keys, 3, kRowBytes);
  auto text = [](std::span<const std::byte> row) {
    return std::string(reinterpret_cast<const char*>(row.data()), row.size());
  };
  EXPECT_EQ(database.Read(kSpec.name, std::string("\x02\x01\0\0\0\0\0\0", 8)), text(rows.row(0)));
  EXPECT_EQ(database.Read(kSpec.name, "\xfe\xff\xff\xff\xff\xff\xff\xff"), text(rows.row(1)));
  EXPECT_EQ(database.Read("hps_et.m.short", "\xfe\xff\xff\xff"), std::string("\x03\0\0\0", 4));
  EXPECT_EQ(database.Read("default", "hps.record/model/dlrm"), "some text");
}

TEST_F(RocksDbStore, StoredRowsAndKeysOfAnotherSizeAreRefused) {
  Make({1, 2});
  auto store = MustOpen();
  TableSpec wider = kSpec;
  wider.row_bytes = 128;
  ExpectError(store->OpenTable(wider).status(), StatusCode::kFailedPrecondition, {kSpec.name, "64", "128"});
  TableSpec shorter = kSpec;
  shorter.key_bytes = 4;
  ExpectError(store->OpenTable(shorter).status(), StatusCode::kFailedPrecondition,
              {kSpec.name, "8 bytes", "asks for 4", "supportlonglong"});
}

TEST_F(RocksDbStore, ARowOfAnotherSizeIsDataLoss) {
  Make({1, 2});
  { PredecessorDatabase(path_).Write<int64_t>(kSpec.name, {70'000}, RowBlock::Of(std::vector<Key>{70'000}, 1, 12)); }
  auto store = MustOpen();
  auto table = store->OpenTable(kSpec);
  ASSERT_OK(table.status());
  EXPECT_EQ(CountRows(**table, {1, 2, 3}, 1), 2u);
  const std::vector<std::string> parts = {kSpec.name, "key 70000", "12 bytes", "64"};
  ExpectError(FetchStatus(**table, {1, 70'000}), StatusCode::kDataLoss, parts);
  ExpectError((*table)->Scan([](auto, auto) { return OkStatus(); }), StatusCode::kDataLoss, parts);
}

TEST_F(RocksDbStore, KeysOutsideFourBytesAreRefusedAndNotTruncated) {
  auto store = MustOpen();
  auto table = store->CreateTable({.name = "hps_et.m.short", .row_bytes = 4, .key_bytes = 4});
  ASSERT_OK(table.status());
  ASSERT_OK(Put(**table, {INT32_MIN, INT32_MAX, 0}, 1));
  for (Key key : {Key{INT32_MAX} + 1, Key{INT32_MIN} - 1, Key{1} << 32}) {
    const std::vector<std::string> parts = {"hps_et.m.short", std::to_string(key), "supportlonglong"};
    ExpectError(Put(**table, {0, key}, 2), StatusCode::kOutOfRange, parts);
    ExpectError(Put(**table, {0, key}, 2, {.only_absent = true}), StatusCode::kOutOfRange, parts);
    ExpectError(FetchStatus(**table, {0, key}), StatusCode::kOutOfRange, parts);
    ExpectError((*table)->Erase(std::vector<Key>{0, key}), StatusCode::kOutOfRange, parts);
  }
  EXPECT_EQ(CountRows(**table, {INT32_MIN, INT32_MAX, 0}, 1), 3u);
}

TEST_F(RocksDbStore, SpecsThatNoTableCanHaveAreRefused) {
  auto store = MustOpen();
  for (const TableSpec& spec :
       {TableSpec{.name = "default", .row_bytes = 4}, TableSpec{.name = "", .row_bytes = 4},
        TableSpec{.name = "t", .row_bytes = 0}, TableSpec{.name = "t", .row_bytes = 4, .key_bytes = 2}}) {
    ExpectError(store->CreateTable(spec).status(), StatusCode::kInvalidArgument, {});
    ExpectError(store->OpenTable(spec).status(), StatusCode::kInvalidArgument, {});
  }
  EXPECT_TRUE(store->ListTables()->empty());
}

// ---- one folder, several users ----------------------------------------------------------------------------------

TEST_F(RocksDbStore, StoresOfOneFolderShareTheDatabase) {
  auto first = MustOpen();
  auto table = first->CreateTable(kSpec);
  ASSERT_OK(table.status());
  fs::create_symlink(path_, directory_ / "link");
  auto second = Open(directory_ / "link" / ".." / "database" / "");
  ASSERT_OK(second.status());
  ASSERT_OK(Put(**table, {1, 2, 3}, 1));
  auto same_table = (*second)->OpenTable(kSpec);
  ASSERT_OK(same_table.status());
  EXPECT_EQ(CountRows(**same_table, {1, 2, 3, 4}, 1), 3u);

  ASSERT_OK(first->Close());
  EXPECT_EQ(FetchStatus(**table, {1}).code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(CountRows(**same_table, {1, 2, 3, 4}, 1), 3u) << "closing one store leaves the other";
  EXPECT_EQ(Child("hold", path_).ReadLine().substr(0, 11), "Unavailable") << "the database is still open";
  ASSERT_OK((*second)->Close());
  EXPECT_EQ(Child("hold", path_).ReadLine(), "open") << "the last Close frees the lock, tables held or not";
}

TEST_F(RocksDbStore, ATableKeepsTheDatabaseOfADroppedStoreOpen) {
  auto store = MustOpen();
  auto table = store->CreateTable(kSpec);
  store.reset();  // without Close
  ASSERT_OK(Put(**table, {1}, 1));
  EXPECT_EQ(CountRows(**table, {1}, 1), 1u);
  table->reset();
  EXPECT_EQ(Child("hold", path_).ReadLine(), "open");
}

TEST_F(RocksDbStore, ReadOnlyMustBeTheSameForAllUsersOfAProcess) {
  auto store = MustOpen();
  ExpectError(Open(path_, true).status(), StatusCode::kFailedPrecondition, {path_.string(), "read_only false"});
  ASSERT_OK(store->Close());
  store = MustOpen(true);
  ExpectError(Open(path_, false).status(), StatusCode::kFailedPrecondition, {path_.string(), "read_only true"});
}

TEST_F(RocksDbStore, AnotherProcessHoldsTheLock) {
  Child child("hold", path_);
  ASSERT_EQ(child.ReadLine(), "open");
  const Status status = Open(path_).status();
  ExpectError(status, StatusCode::kUnavailable, {path_.string(), "locked by another process", "read_only"});
  EXPECT_TRUE(IsRetryable(status.code()));
  child.Kill();
  EXPECT_TRUE(Open(path_).ok());
}

TEST_F(RocksDbStore, SeveralProcessesReadOneFolderBesideAWriter) {
  Make(KeyRange(0, 100));
  Child writer("hold", path_);
  ASSERT_EQ(writer.ReadLine(), "open");
  Child reader("hold_read_only", path_);
  ASSERT_EQ(reader.ReadLine(), "open");
  auto store = MustOpen(true);
  auto table = store->OpenTable(kSpec);
  ASSERT_OK(table.status());
  EXPECT_EQ(CountRows(**table, KeyRange(0, 100), 1), 100u);
  EXPECT_FALSE(store->capabilities().writable);
  ExpectError(Put(**table, {1}, 2), StatusCode::kFailedPrecondition, {path_.string(), "read_only"});
}

TEST_F(RocksDbStore, OpeningAndClosingFromManyThreads) {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (int round = 0; round < 15; ++round) {
        auto store = Open(path_);
        ASSERT_OK(store.status());
        auto table = (*store)->OpenTable(kSpec);
        if (!table.ok()) table = (*store)->CreateTable(kSpec);
        if (!table.ok()) table = (*store)->OpenTable(kSpec);  // another thread was first
        ASSERT_OK(table.status());
        const Key key = thread * 100 + round;
        ASSERT_OK(Put(**table, {key}, 1));
        EXPECT_EQ(CountRows(**table, {key}, 1), 1u);
        if (round % 2 == 0) ASSERT_OK((*store)->Close());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  auto store = MustOpen();
  EXPECT_EQ((*store->OpenTable(kSpec))->Stats()->rows, 60u);
}

TEST_F(RocksDbStore, DroppedTableRefusesWritesAndGivesItsFilesBack) {
  auto store = MustOpen();
  auto table = store->CreateTable(kSpec);
  ASSERT_OK(Put(**table, KeyRange(0, 1000), 1, {.bulk = true}));
  ASSERT_OK(store->Flush());
  ASSERT_OK(store->DropTable(kSpec.name));
  EXPECT_EQ(CountRows(**table, KeyRange(0, 1000), 1), 1000u);
  ExpectError(Put(**table, {1}, 2), StatusCode::kFailedPrecondition, {kSpec.name, "dropped"});
  ExpectError(Put(**table, {1}, 2, {.only_absent = true}), StatusCode::kFailedPrecondition, {kSpec.name, "dropped"});
  ExpectError((*table)->Erase(std::vector<Key>{1}), StatusCode::kFailedPrecondition, {kSpec.name, "dropped"});

  auto again = store->CreateTable(kSpec);
  ASSERT_OK(again.status());
  ASSERT_OK(Put(**again, {1}, 5));  // the database still takes writes
  EXPECT_EQ(CountRows(**again, KeyRange(0, 1000), 5), 1u);
  EXPECT_EQ(CountRows(**table, KeyRange(0, 1000), 1), 1000u);
  const fs::path file = TableFile();
  table->reset();
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (fs::exists(file) && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  EXPECT_FALSE(fs::exists(file));
}

// ---- durability -------------------------------------------------------------------------------------------------

TEST_F(RocksDbStore, AcknowledgedRowsSurviveKill) {
  for (int batches : {1, 40, 300}) {
    fs::remove_all(path_);
    Child child("write_until_killed", path_);
    Key acknowledged = -1;
    for (int i = 0; i < batches; ++i) acknowledged = std::stoll(child.ReadLine());
    child.Kill();
    auto store = MustOpen();
    auto table = store->OpenTable(kSpec);
    ASSERT_OK(table.status());
    const size_t rows = static_cast<size_t>(acknowledged + 1) * kBatchRows;
    EXPECT_EQ(CountRows(**table, KeyRange(0, rows), 1), rows);
  }
}

TEST_F(RocksDbStore, FlushedBulkRowsSurviveKill) {
  Child child("bulk_load", path_);
  ASSERT_EQ(child.ReadLine(), "OK");
  child.Kill();
  auto store = MustOpen();
  auto table = store->OpenTable(kSpec);
  ASSERT_OK(table.status());
  EXPECT_EQ(CountRows(**table, KeyRange(0, 20'010), 1), 20'010u);
}

TEST_F(RocksDbStore, BulkRowsSurviveAnOrderlyClose) {
  auto store = MustOpen();
  ASSERT_OK(Put(**store->CreateTable(kSpec), KeyRange(0, 100), 1, {.bulk = true}));
  ASSERT_OK(store->Close());
  store = MustOpen();
  EXPECT_EQ(CountRows(**store->OpenTable(kSpec), KeyRange(0, 100), 1), 100u);
}

// ---- refusals ---------------------------------------------------------------------------------------------------

TEST_F(RocksDbStore, MakesMissingFoldersAndTakesEmptyOnes) {
  EXPECT_TRUE(Open(directory_ / "a" / "b" / "c").ok());
  fs::create_directories(directory_ / "empty" / "lost+found");
  std::ofstream(directory_ / "empty" / "LOCK");  // what a creation that was cut short leaves
  EXPECT_TRUE(Open(directory_ / "empty").ok());
}

TEST_F(RocksDbStore, PathsThatAreNoDatabaseAreRefused) {
  ExpectError(Open("").status(), StatusCode::kInvalidArgument, {"empty"});
  const fs::path file = directory_ / "file";
  std::ofstream(file) << "text";
  ExpectError(Open(file).status(), StatusCode::kInvalidArgument, {file.string(), "not a folder"});
  ExpectError(Open(file / "below").status(), StatusCode::kInvalidArgument, {file.string()});
  const fs::path folder = directory_ / "folder";
  fs::create_directory(folder);
  std::ofstream(folder / "emb_vector") << "text";
  ExpectError(Open(folder).status(), StatusCode::kInvalidArgument, {folder.string(), "emb_vector", "empty or a new"});
  ExpectError(Open(folder, true).status(), StatusCode::kInvalidArgument, {folder.string(), "emb_vector"});
  EXPECT_EQ(std::distance(fs::directory_iterator(folder), fs::directory_iterator()), 1) << "nothing was written there";
}

TEST_F(RocksDbStore, ReadOnlyMakesNothing) {
  ExpectError(Open(path_, true).status(), StatusCode::kNotFound, {path_.string()});
  EXPECT_FALSE(fs::exists(path_));
  fs::create_directory(path_);
  ExpectError(Open(path_, true).status(), StatusCode::kNotFound, {path_.string()});
  EXPECT_TRUE(fs::is_empty(path_));
}

TEST_F(RocksDbStore, ZeroSizesAreRefused) {
  for (const RocksDbOptions& options :
       {RocksDbOptions{.path = path_, .num_threads = 0}, RocksDbOptions{.path = path_, .max_get_batch_size = 0},
        RocksDbOptions{.path = path_, .max_set_batch_size = 0}}) {
    ExpectError(OpenRocksDbStore(options).status(), StatusCode::kInvalidArgument, {path_.string(), "at least 1"});
  }
}

TEST_F(RocksDbStore, FoldersWithoutPermissionAreRefused) {
  if (::geteuid() != 0) fs::permissions(directory_, fs::perms::owner_read);
  const std::string answer = Child("open_as_nobody", path_).ReadLine();
  if (::geteuid() != 0) fs::permissions(directory_, fs::perms::owner_all);
  EXPECT_EQ(answer.substr(0, 19), "FailedPrecondition:") << answer;
  EXPECT_NE(answer.find("Permission denied"), std::string::npos) << answer;
}

TEST_F(RocksDbStore, AFullDiskIsResourceExhaustedUntilThereIsSpace) {
  fs::create_directory(path_);
  Child child("fill_small_disk", path_);
  const std::string answer = child.ReadLine();
  if (answer == "cannot mount") GTEST_SKIP() << "this needs the right to mount a small disk";
  EXPECT_EQ(answer.substr(0, 18), "ResourceExhausted:") << answer;
  EXPECT_NE(answer.find(path_.string()), std::string::npos) << answer;
  EXPECT_EQ(child.ReadLine().substr(0, 18), "ResourceExhausted:") << "it stays so";
  EXPECT_EQ(child.ReadLine().substr(0, 18), "ResourceExhausted:") << "and a flush says so";
  EXPECT_EQ(child.ReadLine(), "OK") << "space was freed";
  EXPECT_EQ(child.ReadLine(), "OK") << "closed";
  EXPECT_EQ(child.ReadLine().substr(0, 18), "ResourceExhausted:") << "full again";
  EXPECT_EQ(child.ReadLine().substr(0, 18), "ResourceExhausted:") << "closed while full";
  EXPECT_EQ(child.ReadLine(), "whole") << "every acknowledged row";
  EXPECT_EQ(child.ReadLine(), "OK");
}

TEST_F(RocksDbStore, ADamagedBlockIsDataLossThatNamesTheFile) {
  Make(KeyRange(0, 10'000));
  const fs::path file = TableFile();
  std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
  for (int offset = 1000; offset < 200'000; offset += 4000) {
    stream.seekp(offset);
    stream << "damaged";
  }
  stream.close();
  auto store = MustOpen();
  auto table = store->OpenTable(kSpec);
  const Status status = table.ok() ? FetchStatus(**table, KeyRange(0, 10'000)) : table.status();
  ExpectError(status, StatusCode::kDataLoss, {file.filename().string(), kSpec.name});
}

TEST_F(RocksDbStore, ADeadlineThatPassesWhileReadingIsAnError) {
  Make(KeyRange(0, 10'000));
  auto store = MustOpen();
  auto table = store->OpenTable(kSpec);
  ASSERT_OK(table.status());
  const std::vector<Key> keys = KeyRange(0, 10'000);
  RowBlock rows(keys.size(), kRowBytes);
  bool exceeded = false;
  bool met = false;
  for (auto allowed = std::chrono::microseconds(1); !met && allowed < std::chrono::minutes(1);
       allowed += allowed / 2 + allowed) {
    std::vector<uint32_t> misses;
    const FetchRequest request = {.keys = keys,
                                  .positions = std::nullopt,
                                  .rows = rows.buffer(),
                                  .deadline = std::chrono::steady_clock::now() + allowed};
    const Status status = (*table)->Fetch(request, &misses);
    status.ok() ? met = true : exceeded = true;
    if (!status.ok()) ExpectError(status, StatusCode::kDeadlineExceeded, {kSpec.name});
  }
  EXPECT_TRUE(exceeded);
  EXPECT_TRUE(met);
}

// Does all pieces itself, one after the other.
class CountingExecutor final : public Executor {
 public:
  int parallelism() const override { return 64; }
  void ParallelFor(size_t count, size_t grain, const std::function<void(size_t, size_t)>& body) override {
    pieces = 0;
    for (size_t first = 0; first < count; first += grain, ++pieces) body(first, std::min(count, first + grain));
  }
  size_t pieces = 0;
};

TEST_F(RocksDbStore, NumThreadsIsTheMostThatOneReadTakes) {
  const std::vector<Key> keys = KeyRange(0, 20'000);
  Make(keys);
  for (const uint32_t num_threads : {1u, 2u, 7u, 1000u}) {
    CountingExecutor executor;
    auto store = OpenRocksDbStore({.path = path_, .num_threads = num_threads, .executor = &executor});
    ASSERT_OK(store.status());
    auto table = (*store)->OpenTable(kSpec);
    ASSERT_OK(table.status());
    EXPECT_EQ(CountRows(**table, keys, 1), keys.size());
    EXPECT_LE(executor.pieces, num_threads);
    EXPECT_GE(executor.pieces, std::min<size_t>(num_threads, 50)) << "and large reads do take them";
    EXPECT_EQ(CountRows(**table, KeyRange(0, 100), 1), 100u);
    EXPECT_EQ(executor.pieces, 1u) << "small ones do not";
  }
}

TEST_F(RocksDbStore, BatchSizesFromOneToAMillion) {
  const std::vector<Key> keys = KeyRange(-60'000, 120'000);
  uint32_t version = 0;
  for (const uint32_t size : {7u, 10'000u, 1'000'000u}) {
    auto store = OpenRocksDbStore({.path = path_, .max_get_batch_size = size, .max_set_batch_size = size});
    ASSERT_OK(store.status());
    auto table = (*store)->OpenTable(kSpec);
    if (!table.ok()) table = (*store)->CreateTable(kSpec);
    ASSERT_OK(table.status());
    ASSERT_OK(Put(**table, keys, ++version));
    EXPECT_EQ(CountRows(**table, keys, version), keys.size());
    ASSERT_OK((*store)->Close());
  }
}

TEST_F(RocksDbStore, ACallerThatGivesUpEndsAFetchBetweenBatches) {
  const std::vector<Key> keys = KeyRange(0, 200'000);
  Make(keys);
  auto store = MustOpen();
  auto table = store->OpenTable(kSpec);
  ASSERT_OK(table.status());
  RowBlock rows(keys.size(), kRowBytes);
  std::atomic<bool> cancelled{true};
  const auto fetch = [&] {
    std::vector<uint32_t> misses;
    return (*table)->Fetch({.keys = keys, .positions = std::nullopt, .rows = rows.buffer(), .cancelled = &cancelled},
                           &misses);
  };
  ExpectError(fetch(), StatusCode::kCancelled, {kSpec.name});
  cancelled = false;
  ASSERT_OK(fetch());
  std::thread caller([&] { cancelled = true; });
  Status status;
  for (int i = 0; i < 1000 && status.ok(); ++i) status = fetch();
  caller.join();
  EXPECT_EQ(status.code(), StatusCode::kCancelled) << status.ToString();
}

TEST_F(RocksDbStore, AnOrderlyCloseLeavesNothingInTheLog) {
  {
    auto store = MustOpen();
    ASSERT_OK(Put(**store->CreateTable(kSpec), KeyRange(0, 1000), 1));
    ASSERT_OK(store->WriteRecord("r", "text"));
    ASSERT_OK(store->Close());
  }
  for (const auto& entry : fs::directory_iterator(path_)) {
    if (entry.path().extension() == ".log") fs::remove(entry.path());
  }
  auto store = MustOpen();
  EXPECT_EQ(CountRows(**store->OpenTable(kSpec), KeyRange(0, 1000), 1), 1000u);
  EXPECT_EQ(*store->ReadRecord("r"), "text");
}

TEST_F(RocksDbStore, ADatabaseWithoutItsCurrentFileIsNoForeignFolder) {
  Make({1});
  fs::remove(path_ / "CURRENT");
  for (const bool read_only : {false, true}) {
    ExpectError(Open(path_, read_only).status(), StatusCode::kDataLoss, {(path_ / "CURRENT").string(), "restore"});
  }
}

TEST_F(RocksDbStore, ATruncatedOrMissingFileIsDataLossThatNamesIt) {
  Make(KeyRange(0, 10'000));
  const fs::path file = TableFile();
  fs::resize_file(file, fs::file_size(file) / 2);
  ExpectError(Open(path_).status(), StatusCode::kDataLoss, {file.filename().string(), path_.string()});
  fs::remove(file);
  ExpectError(Open(path_).status(), StatusCode::kDataLoss, {file.filename().string(), path_.string()});
}

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunRocksDbTests(argc, argv, hps::testing::RunRole); }
