// Bulk loads of the RocksDB store: that their rows keep their place in the order of all writes, what they leave behind,
// and what happens when the disk is full or the process dies. (What every store promises is in store_conformance.cc,
// BulkRows alone in bulk_rows_test.cc.)

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <random>
#include <thread>

#include "cc/tests/rocksdb_fixture.h"
#include "cc/tests/rocksdb_races.h"

namespace hps::testing {
namespace {

constexpr size_t kManyRows = 60'000;  // more than go through a memtable
const fs::path kBulkFolder = "hps_bulk";

std::vector<Key> Shuffled(std::vector<Key> keys) {
  std::mt19937_64 random(keys.size());
  std::shuffle(keys.begin(), keys.end(), random);
  return keys;
}

void RunRole(const std::string& role, const std::string& path) {
  if (role == "fill_small_disk") {
    if (::unshare(CLONE_NEWNS | (::geteuid() == 0 ? 0 : CLONE_NEWUSER)) != 0 ||
        ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        ::mount("tmpfs", path.c_str(), "tmpfs", 0, "size=200m") != 0) {
      return Say("cannot mount");
    }
  }
  auto store = Open(path);
  if (!store.ok()) return Say(store.status().ToString());
  auto table = (*store)->OpenTable(kSpec);
  if (!table.ok()) table = (*store)->CreateTable(kSpec);
  if (!table.ok()) return Say(table.status().ToString());
  if (role == "fill_small_disk") {
    const fs::path ballast = fs::path(path) / "ballast";
    const auto fill = [&] { std::ofstream(ballast) << std::string(195 << 20, 'x'); };
    const std::vector<Key> keys = Shuffled(KeyRange(0, 600'000));  // 38 MB
    Say(Put(**table, {-1}, 1).ToString());
    Say(Put(**table, keys, 2, {.bulk = true}).ToString());
    fill();
    Say((*store)->Flush().ToString());
    Say(FetchStatus(**table, {1}).ToString());  // the rows are promised, and cannot be shown
    Say(fs::is_empty(fs::path(path) / kBulkFolder) ? "clean" : "files are left");
    fs::remove(ballast);
    Status status;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    do {
      status = (*store)->Flush();
      std::this_thread::yield();
    } while (!status.ok() && std::chrono::steady_clock::now() < deadline);
    Say(status.ToString());
    Say(CountRows(**table, keys, 2) == keys.size() ? "whole" : "lost");
    Say((*store)->Close().ToString());
  } else if (role == "die_while_loading") {
    Say(Put(**table, KeyRange(0, 2 * kManyRows), 1, {.bulk = true}).ToString());
    WaitForParent();
  } else if (role == "write_until_refused") {
    Status status;
    for (Key round = 0; status.ok(); ++round) {
      status = Put(**table, Shuffled(KeyRange(1'000'000, kManyRows)), 1, {.bulk = true});
      if (status.ok()) status = Put(**table, KeyRange(round * 100, 100), 1);
      if (status.ok()) status = (*store)->Flush();
      if (status.ok()) Say(std::to_string(round));
    }
    Say(status.ToString());
    (void)(*store)->DropTable(kSpec.name);
    table->reset();
    Say((*store)->Close().ToString());
  } else if (role == "write_and_flush") {  // until killed
    for (Key round = 0;; ++round) {
      const std::vector<Key> first = KeyRange(round * 100, 100);
      Status status = Put(**table, Shuffled(KeyRange(1'000'000, kManyRows)), 1, {.bulk = true});
      if (status.ok()) status = Put(**table, first, 1);
      if (status.ok()) status = (*store)->Flush();
      Say(status.ok() ? std::to_string(round) : status.ToString());
    }
  }
}

class RocksDbBulk : public RocksDbStore {
 protected:
  void SetUp() override {
    RocksDbStore::SetUp();
    store_ = MustOpen();
    auto table = store_->CreateTable(kSpec);
    ASSERT_OK(table.status());
    table_ = *table;
  }
  void TearDown() override {
    table_.reset();
    store_.reset();
    RocksDbStore::TearDown();
  }
  size_t TableFiles() const {
    return static_cast<size_t>(std::count_if(fs::directory_iterator(path_), fs::directory_iterator(),
                                             [](const auto& entry) { return entry.path().extension() == ".sst"; }));
  }

  std::unique_ptr<TableStore> store_;
  std::shared_ptr<Table> table_;
};

TEST_F(RocksDbBulk, ManyRowsBecomeSortedFilesAndFewDoNot) {
  ASSERT_OK(Put(*table_, Shuffled(KeyRange(0, kManyRows)), 1, {.bulk = true}));
  EXPECT_EQ(TableFiles(), 0u) << "they wait";
  ASSERT_OK(store_->Flush());
  EXPECT_GE(TableFiles(), 1u);
  EXPECT_TRUE(fs::is_empty(path_ / kBulkFolder));
  const size_t files = TableFiles();
  ASSERT_OK(Put(*table_, KeyRange(0, 10), 2, {.bulk = true}));
  EXPECT_EQ(CountRows(*table_, KeyRange(0, 10), 2), 10u);
  EXPECT_EQ(TableFiles(), files) << "a memtable has them";
  EXPECT_EQ(CountRows(*table_, KeyRange(10, kManyRows - 10), 1), kManyRows - 10);
  EXPECT_EQ(table_->Stats()->rows, kManyRows);
}

TEST_F(RocksDbBulk, EachOperationSeesTheRowsBeforeAFlush) {
  ASSERT_OK(Put(*table_, KeyRange(0, kManyRows), 1, {.bulk = true}));
  EXPECT_EQ(table_->Stats()->rows, kManyRows);
  ASSERT_OK(Put(*table_, KeyRange(0, kManyRows), 2, {.bulk = true}));
  EXPECT_EQ(CountRows(*table_, KeyRange(0, 100), 2), 100u);
  ASSERT_OK(Put(*table_, KeyRange(0, kManyRows), 3, {.bulk = true}));
  ASSERT_OK(Put(*table_, KeyRange(0, kManyRows + 1), 4, {.only_absent = true}));
  EXPECT_EQ(CountRows(*table_, KeyRange(0, kManyRows), 3), kManyRows);
  ASSERT_OK(Put(*table_, KeyRange(100'000, kManyRows), 5, {.bulk = true}));
  uint64_t erased = 0;
  ASSERT_OK(table_->Erase(KeyRange(100'000, 10), &erased));
  EXPECT_EQ(erased, 10u);
  ASSERT_OK(Put(*table_, KeyRange(300'000, kManyRows), 6, {.bulk = true}));
  size_t scanned = 0;
  ASSERT_OK(table_->Scan([&](std::span<const Key> keys, ConstRowBuffer) {
    scanned += keys.size();
    return OkStatus();
  }));
  EXPECT_EQ(scanned, 3 * kManyRows + 1 - 10);
}

TEST_F(RocksDbBulk, LaterRowsWinWhicheverWayTheyAreWritten) {
  const std::vector<Key> keys = Shuffled(KeyRange(0, kManyRows));
  for (uint32_t version = 1; version < 9; version += 4) {
    ASSERT_OK(Put(*table_, keys, version, {.bulk = true}));
    ASSERT_OK(Put(*table_, KeyRange(0, 100), version + 1));
    ASSERT_OK(Put(*table_, KeyRange(50, kManyRows - 50), version + 2, {.bulk = true}));
    ASSERT_OK(table_->Erase(KeyRange(200, 50)));
    ASSERT_OK(Put(*table_, KeyRange(210, 10), version + 3, {.bulk = true}));
    ASSERT_OK(store_->Flush());
    EXPECT_EQ(CountRows(*table_, KeyRange(0, 50), version + 1), 50u);
    EXPECT_EQ(CountRows(*table_, KeyRange(50, 150), version + 2), 150u);
    EXPECT_EQ(CountRows(*table_, KeyRange(200, 50), version + 3), 10u);
    EXPECT_EQ(CountRows(*table_, KeyRange(250, kManyRows - 250), version + 2), kManyRows - 250);
  }
}

TEST_F(RocksDbBulk, BesideOrdinaryWritesAndReads) {
  auto other = store_->CreateTable({.name = "hps_et.m.other", .row_bytes = kRowBytes});
  ASSERT_OK(other.status());
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (Table* table : {table_.get(), other->get()}) {
    threads.emplace_back([&, table] {
      for (uint32_t version = 1; !stop; ++version) {
        ASSERT_OK(Put(*table, KeyRange(-100, 100), version));
        EXPECT_EQ(CountRows(*table, KeyRange(-100, 100), version), 100u);
      }
    });
  }
  constexpr size_t kChunk = 10'000;
  for (size_t first = 0; first < 20 * kChunk; first += kChunk) {
    ASSERT_OK(Put(*table_, Shuffled(KeyRange(static_cast<Key>(first), kChunk)), 7, {.bulk = true}));
  }
  ASSERT_OK(store_->Flush());
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(CountRows(*table_, KeyRange(0, 20 * kChunk), 7), 20 * kChunk);
}

TEST_F(RocksDbBulk, SeveralLoadsAtOnce) {
  std::vector<std::thread> threads;
  for (int number = 0; number < 4; ++number) {
    threads.emplace_back([&, number] {
      auto table = store_->CreateTable({.name = "hps_et.m.t" + std::to_string(number % 3), .row_bytes = 28});
      if (!table.ok()) table = store_->OpenTable({.name = "hps_et.m.t" + std::to_string(number % 3), .row_bytes = 28});
      ASSERT_OK(table.status());
      ASSERT_OK(Put(**table, Shuffled(KeyRange(number * 1'000'000, kManyRows)), 1, {.bulk = true}));
      ASSERT_OK(store_->Flush());
      EXPECT_EQ(CountRows(**table, KeyRange(number * 1'000'000, kManyRows), 1), kManyRows);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(RocksDbBulk, FourByteKeys) {
  const TableSpec spec = {.name = "hps_et.m.short", .row_bytes = 28, .key_bytes = 4};
  auto table = store_->CreateTable(spec);
  ASSERT_OK(table.status());
  std::vector<Key> keys = KeyRange(-static_cast<Key>(kManyRows), 2 * kManyRows);
  keys.insert(keys.end(), {INT32_MIN, INT32_MAX});
  ASSERT_OK(Put(**table, Shuffled(keys), 1, {.bulk = true}));
  ExpectError(Put(**table, {0, Key{1} << 31}, 2, {.bulk = true}), StatusCode::kOutOfRange, {"supportlonglong"});
  ASSERT_OK(store_->Close());
  store_ = MustOpen();
  table = store_->OpenTable(spec);
  ASSERT_OK(table.status());
  EXPECT_EQ(CountRows(**table, keys, 1), keys.size());
}

TEST_F(RocksDbBulk, RowsThatWaitStayWithADroppedTableThatIsHeld) {
  ASSERT_OK(Put(*table_, KeyRange(0, kManyRows), 1, {.bulk = true}));
  ASSERT_OK(store_->DropTable(kSpec.name));
  ExpectError(Put(*table_, {1}, 2, {.bulk = true}), StatusCode::kFailedPrecondition, {kSpec.name, "dropped"});
  EXPECT_EQ(CountRows(*table_, KeyRange(0, kManyRows), 1), kManyRows);
  auto again = store_->CreateTable(kSpec);
  ASSERT_OK(again.status());
  ASSERT_OK(store_->Flush());
  EXPECT_EQ(CountRows(**again, KeyRange(0, kManyRows), 1), 0u);
}

TEST_F(RocksDbBulk, ADroppedTableThatNobodyHoldsForgetsRowsThatWait) {
  ASSERT_OK(Put(*table_, KeyRange(0, kManyRows), 1, {.bulk = true}));
  table_.reset();
  ASSERT_OK(store_->DropTable(kSpec.name));
  EXPECT_EQ(TableFiles(), 0u) << "nothing is written for nothing";
  EXPECT_EQ(store_->OpenTable(kSpec).status().code(), StatusCode::kNotFound);
  ASSERT_OK(store_->Flush());
}

TEST_F(RocksDbBulk, ARejectedStrideAddsNothing) {
  const RowBlock rows = RowBlock::Of(KeyRange(0, 10), 1, kRowBytes);
  ExpectError(table_->Upsert(KeyRange(0, 10), {rows.source().data, kRowBytes - 1}, {.bulk = true}),
              StatusCode::kInvalidArgument, {"stride"});
  EXPECT_EQ(table_->Stats()->rows, 0u);
}

TEST_F(RocksDbBulk, FilesOfALoadThatWasCutShortAreRemoved) {
  table_.reset();
  ASSERT_OK(store_->Close());
  Child child("die_while_loading", path_);
  ASSERT_EQ(child.ReadLine(), "OK");
  child.Kill();
  fs::create_directories(path_ / kBulkFolder);
  std::ofstream(path_ / kBulkFolder / "7.sst") << "half a file";
  store_ = MustOpen(true);
  EXPECT_TRUE(fs::exists(path_ / kBulkFolder / "7.sst")) << "read_only changes nothing";
  ASSERT_OK(store_->Close());
  store_ = MustOpen();
  EXPECT_FALSE(fs::exists(path_ / kBulkFolder));
  auto table = store_->OpenTable(kSpec);
  ASSERT_OK(table.status());
  EXPECT_EQ(CountRows(**table, KeyRange(0, 10), 1), 0u) << "they were never flushed";
}

TEST_F(RocksDbBulk, AFullDiskKeepsTheRowsForTheNextFlush) {
  table_.reset();
  store_.reset();
  const fs::path disk = directory_ / "disk";
  fs::create_directory(disk);
  Child child("fill_small_disk", disk);
  const std::string answer = child.ReadLine();
  if (answer == "cannot mount") GTEST_SKIP() << "this needs the right to mount a small disk";
  EXPECT_EQ(answer, "OK");
  EXPECT_EQ(child.ReadLine(), "OK") << "they are in memory";
  EXPECT_EQ(child.ReadLine().substr(0, 18), "ResourceExhausted:");
  EXPECT_EQ(child.ReadLine().substr(0, 18), "ResourceExhausted:");
  EXPECT_EQ(child.ReadLine(), "clean");
  EXPECT_EQ(child.ReadLine(), "OK") << "space was freed";
  EXPECT_EQ(child.ReadLine(), "whole");
  EXPECT_EQ(child.ReadLine(), "OK");
  EXPECT_EQ(child.Wait(), 0);
}

// RocksDB, built with assertions, could end the process wherever it does not find its files.
TEST_F(RocksDbBulk, AFolderThatIsDeletedAtAnyMomentNeverEndsTheProcess) {
  table_.reset();
  ASSERT_OK(store_->Close());
  for (int time = 0; time < 12; ++time) {
    Child writer("write_until_refused", path_);
    std::string line = writer.ReadLine();
    ASSERT_EQ(line, "0");
    const auto moment = std::chrono::steady_clock::now() + std::chrono::microseconds(3100 * time);
    while (std::chrono::steady_clock::now() < moment) std::this_thread::yield();
    std::error_code error;  // a file that is made meanwhile
    while (fs::exists(path_)) fs::remove_all(path_, error);
    while (!line.empty() && std::isdigit(line[0])) line = writer.ReadLine();
    EXPECT_EQ(line.substr(0, 9), "DataLoss:") << line;
    const std::string closed = writer.ReadLine();
    EXPECT_NE(closed.find("deleted or replaced"), std::string::npos) << closed;
    EXPECT_EQ(writer.Wait(), 0) << line;
  }
}

TEST_F(RocksDbBulk, ReadersOpenTheFolderWhileAWriterWritesIt) {
  table_.reset();
  ASSERT_OK(store_->Close());
  Child writer("write_and_flush", path_);
  Key rounds = 0;
  for (int opening = 0; opening < 8; ++opening) {
    const std::string line = writer.ReadLine();
    ASSERT_TRUE(!line.empty() && std::isdigit(line[0])) << line;
    rounds = std::stoll(line) + 1;
    store_ = MustOpen(true);
    ASSERT_NE(store_, nullptr);
    auto table = store_->OpenTable(kSpec);
    ASSERT_OK(table.status());
    const auto rows = static_cast<size_t>(rounds) * 100;
    EXPECT_EQ(CountRows(**table, KeyRange(0, rows), 1), rows) << "what was acknowledged before the opening";
    EXPECT_EQ(CountRows(**table, KeyRange(1'000'000, 5'000), 1), 5'000u);
    ExpectError(Put(**table, {1}, 2, {.bulk = true}), StatusCode::kFailedPrecondition, {path_.string(), "read_only"});
    ExpectError((*table)->Erase(std::vector<Key>{1}), StatusCode::kFailedPrecondition, {path_.string(), "read_only"});
    ExpectError(store_->OpenTable({.name = "hps_et.m.none", .row_bytes = 4}).status(), StatusCode::kNotFound,
                {path_.string(), "hps_et.m.none"});
    ASSERT_OK(store_->Close());
  }
}

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunRocksDbTests(argc, argv, hps::testing::RunRole); }
