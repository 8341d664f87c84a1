// Damaged databases: every file of a database is flipped, cut, emptied and deleted in turn, and another process reads
// what is left. It must end by itself, and each row it gets must be right; where something is lost that RocksDB can
// know of, the error is DataLoss and names the file.

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <random>
#include <set>

#include "cc/tests/rocksdb_fixture.h"
#include "cc/tests/rocksdb_races.h"

namespace hps::testing {
namespace {

constexpr size_t kFiledRows = 6'000;  // in table files
constexpr size_t kLoggedRows = 200;   // in the log

// Prints "whole", "lost" or an error.
void RunRole(const std::string& role, const std::string& path) {
  if (role == "leave_log") {
    auto store = Open(path);
    auto table = (*store)->OpenTable(kSpec);
    for (size_t done = 0; done < kLoggedRows; done += kLoggedRows / 10) {
      const Status status = Put(**table, KeyRange(kFiledRows + done, kLoggedRows / 10), 1);
      if (!status.ok()) Say(status.ToString());
    }
    Say("written");
    return WaitForParent();
  }
  const auto read = [&]() -> Result<bool> {
    HPS_ASSIGN_OR_RETURN(std::unique_ptr<TableStore> store, Open(path, role == "read_only"));
    HPS_ASSIGN_OR_RETURN(std::shared_ptr<Table> table, store->OpenTable(kSpec));
    bool whole = true;
    Status failed;
    const std::vector<Key> keys = KeyRange(0, kFiledRows + kLoggedRows);
    for (size_t first = 0; first < keys.size(); first += 500) {
      const std::vector<Key> some(keys.begin() + first, keys.begin() + std::min(first + 500, keys.size()));
      RowBlock rows(some.size(), kRowBytes);
      std::vector<uint32_t> misses;
      const Status status = table->Fetch({.keys = some, .rows = rows.buffer()}, &misses);
      if (!status.ok()) {
        failed = status;
        continue;
      }
      whole &= misses.empty();
      for (uint32_t i = 0; i < some.size(); ++i) {
        if (std::binary_search(misses.begin(), misses.end(), i)) continue;
        if (RowVersion(some[i], rows.row(i)) != 1u) return Internal("WRONG ROW " + std::to_string(some[i]));
      }
    }
    const Status scanned = table->Scan([&](std::span<const Key> found, ConstRowBuffer rows) {
      for (size_t i = 0; i < found.size(); ++i) {
        if (RowVersion(found[i], {rows.data + i * rows.stride_bytes, kRowBytes}) != 1u) return Internal("WRONG ROW");
      }
      return OkStatus();
    });
    if (role == "write" && failed.ok()) {
      HPS_RETURN_IF_ERROR(
          table->Upsert(std::vector<Key>{-7}, RowBlock::Of(std::vector<Key>{-7}, 1, kRowBytes).source()));
      HPS_RETURN_IF_ERROR(store->Flush());
    }
    HPS_RETURN_IF_ERROR(store->Close());
    HPS_RETURN_IF_ERROR(failed);
    HPS_RETURN_IF_ERROR(scanned);
    return whole;
  };
  const Result<bool> whole = read();
  Say(!whole.ok() ? whole.status().ToString() : *whole ? "whole" : "lost");
}

class RocksDbDamage : public RocksDbStore {
 protected:
  void SetUp() override {
    RocksDbStore::SetUp();
    if (HasFatalFailure()) return;
    Make(KeyRange(0, kFiledRows));
    Child writer("leave_log", path_);
    ASSERT_EQ(writer.ReadLine(), "written");
    writer.Kill();
    for (const auto& entry : fs::directory_iterator(path_)) {
      const std::string name = entry.path().filename().string();
      if (entry.is_regular_file() && name != "LOCK") files_.push_back(name);
    }
    std::sort(files_.begin(), files_.end());
    damaged_ = directory_ / "damaged";
  }

  static bool Is(const std::string& name, const std::string& kind) {
    return name.ends_with(kind) || name.starts_with(kind);
  }
  // A fresh copy of the database, to be damaged.
  fs::path Copy(const std::string& name) {
    fs::remove_all(damaged_);
    fs::copy(path_, damaged_, fs::copy_options::recursive);
    return damaged_ / name;
  }
  // What a process that reads the damaged copy says; it must not die.
  std::string Read(const std::string& role, const std::string& what) {
    Child child(role, damaged_);
    const std::string answer = child.ReadLine();
    const int status = child.Wait();
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0)
        << role << " of " << what << ": the process died of signal " << WTERMSIG(status) << " after '" << answer << "'";
    EXPECT_EQ(answer.find("WRONG"), std::string::npos) << role << " of " << what << ": " << answer;
    if (std::getenv("HPS_TEST_SHOW") != nullptr) std::cout << what << " (" << role << "): " << answer << std::endl;
    return answer;
  }
  void ExpectDataLoss(const std::string& answer, const std::string& what, const std::string& name) {
    EXPECT_EQ(answer.substr(0, 9), "DataLoss:") << what << ": " << answer;
    EXPECT_NE(answer.find(name), std::string::npos) << what << ": no file in '" << answer << "'";
    EXPECT_NE(answer.find("restore the folder"), std::string::npos) << what << ": no remedy in '" << answer << "'";
  }

  std::vector<std::string> files_;
  fs::path damaged_;
};

TEST_F(RocksDbDamage, TheCopyIsWhole) {
  Copy("");
  for (const char* role : {"read_only", "write"}) EXPECT_EQ(Read(role, "the copy"), "whole");
}

TEST_F(RocksDbDamage, ADeletedFile) {
  for (const std::string& name : files_) {
    for (const char* role : {"read_only", "write"}) {
      fs::remove(Copy(name));
      const std::string answer = Read(role, name + " deleted");
      if (Is(name, ".sst") || Is(name, "MANIFEST") || Is(name, "CURRENT")) {
        ExpectDataLoss(answer, name + " deleted", name);
      } else if (!Is(name, ".log")) {  // a log of which nothing is left looks like one to which nothing was written
        EXPECT_EQ(answer, "whole") << name;
      }
    }
  }
}

TEST_F(RocksDbDamage, AFileThatWasCut) {
  for (const std::string& name : files_) {
    for (const int share : {0, 1, 50, 99}) {
      for (const char* role : {"read_only", "write"}) {
        if ((Is(name, "OPTIONS") || Is(name, "IDENTITY")) && share != 50) continue;
        const fs::path file = Copy(name);
        fs::resize_file(file, share == 1 ? 1 : fs::file_size(file) * static_cast<size_t>(share) / 100);
        const std::string what = name + " cut to " + std::to_string(share) + " %";
        const std::string answer = Read(role, what);
        if (Is(name, ".sst") || Is(name, "CURRENT")) ExpectDataLoss(answer, what, name);
        if (Is(name, "OPTIONS") || Is(name, "IDENTITY")) EXPECT_EQ(answer, "whole") << what;
        if (Is(name, "MANIFEST")) ExpectDataLoss(answer, what, name);
      }
    }
  }
}

// A MANIFEST that ends at one of its records looks like an older one; rows must not be missing silently.
TEST_F(RocksDbDamage, AManifestCutAnywhere) {
  for (const std::string& name : files_) {
    if (!Is(name, "MANIFEST")) continue;
    const size_t size = fs::file_size(Copy(name));
    for (size_t bytes = 1; bytes < size; bytes += std::max<size_t>(size / 20, 1)) {
      fs::resize_file(Copy(name), bytes);
      const std::string what = name + " cut to " + std::to_string(bytes) + " bytes";
      ExpectDataLoss(Read("read_only", what), what, name);
    }
  }
}

TEST_F(RocksDbDamage, FlippedBytes) {
  const uint64_t seed =
      std::getenv("HPS_TEST_SEED") ? std::strtoull(std::getenv("HPS_TEST_SEED"), nullptr, 10) : std::random_device{}();
  std::cout << "HPS_TEST_SEED=" << seed << std::endl;
  std::mt19937_64 random(seed);
  for (const std::string& name : files_) {
    const int rounds = Is(name, "OPTIONS") || Is(name, "IDENTITY") ? 2 : 9;
    for (int round = 0; round < rounds; ++round) {
      const fs::path file = Copy(name);
      const size_t size = fs::file_size(file);
      if (size == 0) break;
      const size_t offset = round == 0 ? size - 1 : random() % size;
      const size_t count = std::min<size_t>(size - offset, round % 2 == 0 ? 1 : 16);
      {
        std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
        std::string bytes(count, '\0');
        stream.seekg(static_cast<std::streamoff>(offset));
        stream.read(bytes.data(), static_cast<std::streamsize>(count));
        for (char& byte : bytes) byte = static_cast<char>(byte ^ (1 + random() % 255));
        stream.seekp(static_cast<std::streamoff>(offset));
        stream.write(bytes.data(), static_cast<std::streamsize>(count));
      }
      const std::string what = name + " with " + std::to_string(count) + " bytes flipped at " + std::to_string(offset) +
                               " of " + std::to_string(size) + ", HPS_TEST_SEED=" + std::to_string(seed);
      const std::string answer = Read(round % 3 == 0 ? "write" : "read_only", what);
      if (answer != "whole" && (Is(name, ".sst") || Is(name, ".log"))) ExpectDataLoss(answer, what, name);
    }
  }
}

// The database goes on writing into files that nobody will find. It must not say that they are stored.
TEST_F(RocksDbStore, AFolderThatWasDeletedOrReplacedTakesNothingMore) {
  for (const std::string what : {"deleted", "emptied", "replaced", "contents replaced"}) {
    for (const size_t rows : {100, 60'000}) {  // through a memtable, and as sorted files
      SCOPED_TRACE(what + ", " + std::to_string(rows) + " rows");
      const std::vector<Key> keys = KeyRange(0, rows);
      Make(keys);
      const fs::path copy = directory_ / "copy";
      fs::copy(path_, copy, fs::copy_options::recursive);
      auto store = MustOpen();
      ASSERT_OK(store->CheckPlace());
      const auto table = *store->OpenTable(kSpec);
      const auto fresh = *store->CreateTable({.name = "fresh", .row_bytes = kRowBytes});
      ASSERT_OK(store->Flush());
      ASSERT_OK(store->WriteRecord("r", "before"));
      ASSERT_OK(Put(*fresh, keys, 2, {.bulk = true}));
      if (what == "contents replaced" || what == "emptied") {
        for (const auto& entry : fs::directory_iterator(path_)) fs::remove_all(entry.path());
      } else {
        fs::remove_all(path_);
      }
      if (what == "replaced" || what == "contents replaced") fs::copy(copy, path_, fs::copy_options::recursive);
      const std::vector<std::string> parts = {path_.string(), "deleted or replaced", "start again"};
      ExpectError(store->CheckPlace(), StatusCode::kDataLoss, parts);
      ExpectError(store->Flush(), StatusCode::kDataLoss, parts);
      ExpectError(store->WriteRecord("r", "after"), StatusCode::kDataLoss, parts);
      ExpectError(store->CreateTable({.name = "other", .row_bytes = kRowBytes}).status(), StatusCode::kDataLoss, parts);
      EXPECT_EQ(CountRows(*table, keys, 1), rows);
      ExpectError(store->Close(), StatusCode::kDataLoss, parts);
      fs::remove_all(path_);
      fs::remove_all(copy);
    }
  }
  // Whoever only reads goes on, and can be asked; and a lock that somebody took away harms nothing.
  Make(KeyRange(0, 100));
  {
    auto reading = MustOpen(/*read_only=*/true);
    const auto table = *reading->OpenTable(kSpec);
    ASSERT_OK(reading->CheckPlace());
    fs::rename(path_, directory_ / "moved");
    ExpectError(reading->CheckPlace(), StatusCode::kDataLoss, {path_.string(), "deleted or replaced"});
    EXPECT_EQ(CountRows(*table, KeyRange(0, 100), 1), 100u);
    ASSERT_OK(reading->Flush());
    ASSERT_OK(reading->Close());
    fs::rename(directory_ / "moved", path_);
  }
  auto store = MustOpen();
  fs::remove(path_ / "LOCK");
  ASSERT_OK(store->Flush());
  ASSERT_OK(store->Close());
}
}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunRocksDbTests(argc, argv, hps::testing::RunRole); }
