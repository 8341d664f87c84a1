// What the multi-process store promises beyond the conformance suite: who may attach, what is refused, whose memory is
// used again, and rows that several processes share. What happens when they are killed: multi_process_crash_test.cc.

#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "cc/storage/shared_layout.h"
#include "cc/tests/multi_process_fixture.h"

namespace hps::testing {
namespace {

// Refusals -----------------------------------------------------------------------------------------------------------

TEST_F(MultiProcessTest, SaysWhatItIs) {
  const auto store = Open(name);
  EXPECT_EQ(store->kind(), "multi_process_hash_map");
  const StoreCapabilities capabilities = store->capabilities();
  EXPECT_TRUE(capabilities.shared);
  EXPECT_TRUE(capabilities.writable);
  EXPECT_FALSE(capabilities.persistent);
  EXPECT_FALSE(capabilities.addressable);
  EXPECT_FALSE(capabilities.bounded);
}

TEST_F(MultiProcessTest, OptionsOutOfRangeAreRefused) {
  const auto refused = [&](auto change, const std::string& part) {
    MultiProcessOptions options = Options(name);
    change(options);
    ExpectError(OpenMultiProcessStore(options).status(), StatusCode::kInvalidArgument,
                {"multi_process_hash_map: ", part});
  };
  refused([](auto& options) { options.num_partitions = 0; }, "num_partitions is 0");
  refused([](auto& options) { options.num_partitions = 4097; }, "choose 1 to 4096");
  refused([](auto& options) { options.allocation_rate_bytes = 0; }, "allocation_rate is 0");
  refused([](auto& options) { options.overflow.margin = 0; }, "overflow_margin is 0");
  refused([](auto& options) { options.overflow.resolution_target = 1; }, "a target between 0 and 1");
  refused([](auto& options) { options.bytes = 4096; }, "shared_memory_size is 4096 bytes");
  refused([](auto& options) { options.bytes = UINT64_MAX; }, "the most is 4398046511104");
  for (const std::string bad : {"", "a/b", "..", ".hidden"}) {
    refused([&](auto& options) { options.name = bad; }, "shared_memory_name \"" + bad + "\"");
  }
  refused([](auto& options) { options.name = std::string(201, 'a'); }, "choose 1 to 200 characters");
  EXPECT_FALSE(Exists(name));
}

TEST_F(MultiProcessTest, TablesOutOfRangeAreRefusedAndNotKept) {
  const auto store = Open(name);
  const auto create = [&](const TableSpec& spec) { return store->CreateTable(spec).status(); };
  ExpectError(create({.name = "t", .row_bytes = (size_t{1} << 30) + 1}), StatusCode::kInvalidArgument, {"'t'"});
  ExpectError(create({.name = std::string(5000, 'n'), .row_bytes = 4}), StatusCode::kInvalidArgument, {"name"});
  ExpectError(create({.name = "t", .row_bytes = 4, .key_bytes = 4}), StatusCode::kInvalidArgument, {"keys of 4 bytes"});
  ExpectError(create({.name = "t", .row_bytes = 4, .expected_rows = uint64_t{1} << 40}), StatusCode::kResourceExhausted,
              {"the most is"});
  EXPECT_TRUE(store->ListTables()->empty());
  ASSERT_OK(CheckMultiProcessStore(*store));
}

TEST_F(MultiProcessTest, AnotherLayoutIsRefusedAndSaysWhatDiffers) {
  MultiProcessOptions bounded = Options(name);
  bounded.overflow = {.margin = 1000, .policy = OverflowPolicy::kEvictOldest};
  const auto store = Open(bounded);
  const auto refused = [&](auto change, const std::string& part) {
    MultiProcessOptions options = bounded;
    change(options);
    ExpectError(OpenMultiProcessStore(options).status(), StatusCode::kFailedPrecondition,
                {"/dev/shm/" + name + " has another layout", part, "give all processes"});
  };
  refused([](auto& options) { options.num_partitions = 8; }, "num_partitions is 4 there and 8 here");
  refused([](auto& options) { options.bytes *= 2; }, "shared_memory_size is 16777216 there and 33554432 here");
  refused([](auto& options) { options.bytes /= 2; }, "shared_memory_size is 16777216 there and 8388608 here");
  refused([](auto& options) { options.key_bytes = 4; }, "supportlonglong) is 8 there and 4 here");
  refused([](auto& options) { options.overflow.margin = 999; }, "overflow_margin is 1000 there and 999 here");
  refused([](auto& options) { options.overflow = {}; },
          "overflow_margin is 1000 there and unlimited (not given) here;");
  refused([](auto& options) { options.overflow.policy = OverflowPolicy::kEvictRandom; },
          "overflow_policy is evict_oldest there and evict_random here");
  refused([](auto& options) { options.overflow.resolution_target = 0.5; }, "is 800 there and 500 here");
  refused([](auto& options) { options.overflow.refresh_time_after_fetch = true; },
          "refresh_time_after_fetch is false there and true here");
  bounded.auto_remove = false;  // no part of the layout
  EXPECT_TRUE(OpenMultiProcessStore(bounded).ok());
}

TEST_F(MultiProcessTest, AnUnlimitedMarginIsCalledSo) {
  MultiProcessOptions options = Options(name);
  const auto store = Open(options);
  options.overflow = {.margin = 1000, .policy = OverflowPolicy::kEvictOldest};
  ExpectError(OpenMultiProcessStore(options).status(), StatusCode::kFailedPrecondition,
              {"another layout: overflow_margin is unlimited (not given) there and 1000 here;"});
}

TEST_F(MultiProcessTest, AFolderOfThatNameIsRefused) {
  const fs::path path = "/dev/shm/" + name;
  fs::create_directory(path);
  ExpectError(OpenMultiProcessStore(Options(name)).status(), StatusCode::kFailedPrecondition,
              {path.string() + " is a folder", "shared_memory_name"});
  EXPECT_TRUE(fs::is_directory(path));
  fs::remove(path);
}

// What is in the file of a store, as another format or a crash would have left it.
void Write(const std::string& name, size_t offset, uint64_t value) {
  const int file = ::shm_open(("/" + name).c_str(), O_RDWR, 0600);
  ASSERT_GE(file, 0);
  ASSERT_EQ(::pwrite(file, &value, sizeof(value), static_cast<off_t>(offset)), 8);
  ::close(file);
}

TEST_F(MultiProcessTest, KeptMemoryOfAnotherLayoutIsRefusedAndNotTouched) {
  MultiProcessOptions kept = Options(name);
  kept.auto_remove = false;
  ASSERT_OK(Put(*Create(*Open(kept)), Keys(0, 10, false), 1));
  MultiProcessOptions other = kept;
  other.num_partitions = 2;
  ExpectError(OpenMultiProcessStore(other).status(), StatusCode::kFailedPrecondition,
              {"num_partitions is 4 there and 2 here", "no process uses it: remove the file"});
  {
    const auto store = Open(kept);
    ExpectVersion(*OpenTable(*store), Keys(0, 10, false), 1);
  }
  const uint64_t next_format = SharedLayout::kFormat + 1 + (uint64_t{sizeof(pthread_mutex_t)} << 32);
  Write(name, offsetof(SharedHeader, layout), next_format);
  ExpectError(OpenMultiProcessStore(kept).status(), StatusCode::kFailedPrecondition,
              {"the format is 2 there and 1 here"});
}

TEST_F(MultiProcessTest, MemoryOfAnotherProgramIsRefusedAndNotTouched) {
  const int file = ::shm_open(("/" + name).c_str(), O_RDWR | O_CREAT, 0600);
  ASSERT_EQ(::ftruncate(file, 1 << 20), 0);
  ASSERT_EQ(::pwrite(file, "somebody's", 10, 0), 10);
  ExpectError(OpenMultiProcessStore(Options(name)).status(), StatusCode::kFailedPrecondition,
              {"was not made by this library"});
  char text[11] = "";
  ASSERT_EQ(::pread(file, text, 10, 0), 10);
  EXPECT_STREQ(text, "somebody's");
  ::close(file);
}

TEST_F(MultiProcessTest, IsForThisUserOnly) {
  {
    const auto store = Open(name);
    struct stat info;
    ASSERT_EQ(::stat(("/dev/shm/" + name).c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600u);
  }
  const std::string path = "/dev/shm/" + name;
  const int file = ::shm_open(("/" + name).c_str(), O_RDWR | O_CREAT, 0600);
  ::close(file);
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(path.c_str(), 12345, 12345), 0);
    ExpectError(OpenMultiProcessStore(Options(name)).status(), StatusCode::kFailedPrecondition,
                {"user 12345", "choose another shared_memory_name"});
  } else {
    ASSERT_EQ(::chmod(path.c_str(), 0), 0);
    ExpectError(OpenMultiProcessStore(Options(name)).status(), StatusCode::kFailedPrecondition,
                {"this user may not use", "choose another shared_memory_name"});
  }
}

TEST_F(MultiProcessTest, MemberNumbersAreLimited) {
  MultiProcessOptions small = Options(name);
  small.bytes = 1 << 20;
  std::vector<std::unique_ptr<TableStore>> stores;
  for (uint32_t i = 0; i < SharedFile::kMaxMembers; ++i) stores.push_back(Open(small));
  ExpectError(OpenMultiProcessStore(small).status(), StatusCode::kResourceExhausted, {"256 processes"});
  ASSERT_OK(stores[100]->Close());
  EXPECT_TRUE(OpenMultiProcessStore(small).ok());
  stores.clear();
  EXPECT_FALSE(Exists(name));
}

// Memory -------------------------------------------------------------------------------------------------------------

TEST_F(MultiProcessTest, AFullMemoryRefusesRowsAndKeepsThoseItHas) {
  MultiProcessOptions options = Options(name);
  options.bytes = 2 << 20;
  const auto store = Open(options);
  const auto table = Create(*store);
  size_t written = 0;
  Status status;
  while (status.ok()) {
    status = Put(*table, Keys(written, 100, false), 1);
    if (status.ok()) written += 100;
    ASSERT_LT(written, 100'000u);
  }
  ExpectError(status, StatusCode::kResourceExhausted, {kTableName, "2097152", "raise shared_memory_size"});
  EXPECT_GT(written * kRowBytes, options.bytes / 2);
  ExpectVersion(*table, Keys(0, written, false), 1);
  ASSERT_OK(CheckMultiProcessStore(*store));
  ASSERT_OK(Put(*table, Keys(0, written, false), 2));  // updates need no room
  ExpectVersion(*table, Keys(0, written, false), 2);
  ExpectError(store->WriteRecord("r", std::string(1 << 20, 'r')), StatusCode::kResourceExhausted, {"shared_memory"});
  ExpectError(store->CreateTable({.name = "t2", .row_bytes = 4, .expected_rows = 1 << 20}).status(),
              StatusCode::kResourceExhausted, {"'t2'", "raise shared_memory_size"});
  // There is room again where there was a row.
  ASSERT_OK(table->Erase(Keys(0, 500, false)));
  ASSERT_OK(Put(*table, Keys(0, 500, false), 3));
  ExpectVersion(*table, Keys(0, 500, false), 3);
  ASSERT_OK(CheckMultiProcessStore(*store));
}

TEST_F(MultiProcessTest, AFullDevShmIsAnError) {
  struct statvfs info;
  ASSERT_EQ(::statvfs("/dev/shm", &info), 0);
  const uint64_t total = std::max<uint64_t>(uint64_t{info.f_blocks} * info.f_frsize, 64 << 20);
  MultiProcessOptions options = Options(name);
  options.bytes = std::max<uint64_t>(4 * total, uint64_t{4} << 30);
  const auto store = Open(options);
  const uint64_t rows = total / 512;
  ExpectError(store->CreateTable({.name = "t", .row_bytes = 1024, .expected_rows = rows}).status(),
              StatusCode::kResourceExhausted, {"'t'", "/dev/shm has", "bytes free", "--shm-size"});
  // Neither is one large row more than there is.
  const auto table = Create(*store, 0, size_t{1} << 30);
  if (total < (uint64_t{1} << 30)) {
    std::vector<std::byte> row(64);
    ExpectError(table->Upsert(std::vector<Key>{1}, {row.data(), size_t{1} << 30}), StatusCode::kResourceExhausted,
                {"--shm-size"});
  }
  ASSERT_OK(Put(*Create(*store, 0, 64, "small"), Keys(0, 100, false), 1));
  ASSERT_OK(CheckMultiProcessStore(*store));
}

constexpr int kMayNotMount = 77;

// Fills a /dev/shm of its own that is smaller than the shared memory is to be.
int RunInSmallDevShm(const fs::path& folder) {
  if (::unshare(CLONE_NEWNS) != 0 || ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
      ::mount("tmpfs", "/dev/shm", "tmpfs", 0, "size=4m") != 0) {
    return kMayNotMount;
  }
  const auto store = Open(folder.filename().string());
  const auto table = Create(*store);
  size_t written = 0;
  Status status;
  for (; status.ok() && written < 100'000; written += 100) status = Put(*table, Keys(written, 100, false), 1);
  ExpectError(status, StatusCode::kResourceExhausted, {"/dev/shm has", "--shm-size"});
  written -= 100;
  EXPECT_GT(written * kRowBytes, 2u << 20);
  ExpectVersion(*table, Keys(0, written, false), 1);
  EXPECT_TRUE(Put(*table, Keys(0, 500, false), 2).ok());
  EXPECT_TRUE(CheckMultiProcessStore(*store).ok());
  return ::testing::Test::HasFailure() ? 1 : 0;
}

TEST_F(MultiProcessTest, RowsThatFillDevShmAreRefusedAndTheOthersStay) {
  const int status = ChildProcess("small", folder / "").Wait();
  if (WEXITSTATUS(status) == kMayNotMount)
    GTEST_SKIP() << "no permission to mount; AFullDevShmIsAnError tests the rest";
  EXPECT_EQ(status, 0);
}

TEST_F(MultiProcessTest, ALargeMemoryTakesOnlyWhatItNeeds) {
  MultiProcessOptions options = Options(name);
  options.bytes = uint64_t{16} << 30;
  const auto store = Open(options);
  EXPECT_LT(TakenBytes(name), 4u << 20);
  ASSERT_OK(Put(*Create(*store), Keys(0, 1000, false), 1));
  EXPECT_LT(TakenBytes(name), 5u << 20);
}

class MultiProcessKeysTest : public MultiProcessTest, public ::testing::WithParamInterface<bool> {};
INSTANTIATE_TEST_SUITE_P(Keys, MultiProcessKeysTest, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Dense" : "Hashed"; });

TEST_P(MultiProcessKeysTest, MemoryPerRow) {
  for (const size_t row_bytes : {64, 16}) {
    constexpr size_t kRows = 50'000;
    const auto store = Open(name);
    const auto table = Create(*store, kRows, row_bytes);
    const uint64_t before = TakenBytes(name) - table->Stats()->memory_bytes;
    for (size_t first = 0; first < kRows; first += 10'000) {
      ASSERT_OK(Put(*table, Keys(first, 10'000, GetParam()), 1));
    }
    const auto limit = static_cast<uint64_t>(kRows * (static_cast<double>(row_bytes) + (8 + 8) / 0.8) * 1.1);
    EXPECT_LT(table->Stats()->memory_bytes, limit);
    EXPECT_LT(TakenBytes(name) - before, limit + 4096) << "the file has more than the table says";
    // Updates use the slots of old rows.
    const uint64_t full = TakenBytes(name);
    for (uint32_t version = 2; version < 12; ++version) ASSERT_OK(Put(*table, Keys(0, kRows, GetParam()), version));
    EXPECT_EQ(TakenBytes(name), full);
    ExpectVersion(*table, Keys(0, kRows, GetParam()), 11);
    ASSERT_OK(CheckMultiProcessStore(*store));
  }
}

TEST_P(MultiProcessKeysTest, MoreRowsThanExpectedAreHeld) {
  const auto store = Open(name);
  const auto table = Create(*store, 1'000);
  const std::vector<Key> keys = Keys(0, 20'000, GetParam());
  ASSERT_OK(Put(*table, keys, 1));
  ExpectVersion(*table, keys, 1);
  EXPECT_EQ(table->Stats()->rows, keys.size());
  ASSERT_OK(CheckMultiProcessStore(*store));
}

TEST_P(MultiProcessKeysTest, OutputAroundTheCacheIsTheSame) {
  const auto store = Open(name);
  const auto table = Create(*store, 1'000, 256);
  const std::vector<Key> once = Keys(0, 1'000, GetParam());
  ASSERT_OK(Put(*table, once, 1));
  std::vector<Key> keys;
  for (size_t i = 0; i < 40'000; ++i) keys.push_back(i % 41 == 0 ? -5 : once[i * 7 % once.size()]);
  for (const size_t stride : {256, 260, 272}) {  // 260: rows that are not aligned
    RowBlock rows(keys.size(), 256, stride);
    std::vector<uint32_t> misses;
    ASSERT_OK(table->Fetch({.keys = keys, .rows = rows.buffer()}, &misses));
    EXPECT_EQ(misses.size(), (keys.size() + 40) / 41);
    for (size_t i = 0; i < keys.size(); ++i) {
      if (i % 41 == 0) {
        ASSERT_TRUE(rows.RowUntouched(i));
      } else {
        ASSERT_EQ(RowVersion(keys[i], rows.row(i)), 1u);
      }
      ASSERT_TRUE(rows.GapUntouched(i));
    }
  }
}

TEST_P(MultiProcessKeysTest, ReadersSeeWholeRowsWhileSlotsAreUsedAgainAtOnce) {
  // One key and few others: the slot that an update leaves is the next one to be written.
  const auto store = Open(name);
  const auto other = Open(name);
  const auto table = Create(*store, 64, 2'052);
  const auto seen = OpenTable(*other, 2'052);  // the same memory at another address
  const std::vector<Key> keys = Keys(0, 3, GetParam());
  ASSERT_OK(Put(*table, keys, 1));
  std::atomic<bool> stop{false};
  std::atomic<int> reads{0};
  std::vector<std::thread> readers;
  for (const Table* read : {table.get(), seen.get()}) {
    readers.emplace_back([&, read] {
      std::vector<uint32_t> last(keys.size(), 0);
      while (!stop) {
        const std::vector<uint32_t> versions = Versions(*read, keys);
        for (size_t i = 0; i < keys.size(); ++i) {
          if (versions[i] < last[i]) ADD_FAILURE() << "went back from " << last[i] << " to " << versions[i];
        }
        last = versions;
        if (HasFailure()) break;
        ++reads;
      }
    });
  }
  for (uint32_t version = 2; (version < 3'000 || reads < 1'000) && !HasFailure(); ++version) {
    ASSERT_OK(Put(version % 2 == 0 ? *table : *seen, keys, version));
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
  ASSERT_OK(CheckMultiProcessStore(*store));
}

TEST_F(MultiProcessTest, ADamagedIndexIsAnErrorAndNoEndlessLoop) {
  const auto store = Open(name);
  const auto table = Create(*store, 15);
  ASSERT_OK(Put(*table, Keys(0, 15, true), 1));
  // Scribbles over the only dense line: the one cache line that holds 15 ascending slot numbers or all of partition 0.
  const int file = ::shm_open(("/" + name).c_str(), O_RDWR, 0600);
  auto* memory = static_cast<std::byte*>(::mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  ::close(file);
  bool found = false;
  for (size_t place = 0; place < 1 << 20; place += sizeof(DenseLine)) {
    auto& line = *reinterpret_cast<DenseLine*>(memory + place);
    if (line.entries[0] != 1 || line.entries[14] != 15) continue;
    std::atomic_ref(line.entries[3]).store(0x7fffffff);
    found = true;
  }
  ::munmap(memory, 1 << 20);
  ASSERT_TRUE(found);
  RowBlock rows(1, kRowBytes);
  std::vector<uint32_t> misses;
  ExpectError(table->Fetch({.keys = Keys(3, 1, true), .rows = rows.buffer()}, &misses), StatusCode::kDataLoss,
              {kTableName, "is damaged", "remove the file"});
  ExpectVersion(*table, Keys(4, 11, true), 1);
}

TEST_F(MultiProcessTest, RowsOfAnySize) {
  const auto store = Open(name);
  for (const size_t row_bytes : {1, 2, 3, 5, 8, 17, 31, 4'095, 5'001, 70'000}) {
    const auto table = Create(*store, 20, row_bytes, "t" + std::to_string(row_bytes));
    for (const bool dense : {true, false}) {
      const std::vector<Key> keys = Keys(0, 20, dense);
      ASSERT_OK(Put(*table, keys, 7));
      RowBlock rows(keys.size(), row_bytes, row_bytes + 3);
      std::vector<uint32_t> misses;
      ASSERT_OK(table->Fetch({.keys = keys, .rows = rows.buffer()}, &misses));
      EXPECT_TRUE(misses.empty());
      for (size_t i = 0; i < keys.size(); ++i) {
        std::vector<std::byte> expected(row_bytes);
        FillRow(keys[i], 7, expected);
        EXPECT_TRUE(std::equal(expected.begin(), expected.end(), rows.row(i).begin())) << row_bytes;
        EXPECT_TRUE(rows.GapUntouched(i));
      }
    }
  }
  ASSERT_OK(CheckMultiProcessStore(*store));
}

TEST_F(MultiProcessTest, DroppedTablesAndOutgrownIndexesAreUsedAgain) {
  const auto store = Open(name);
  uint64_t taken = 0;
  for (int round = 0; round < 12; ++round) {
    {
      const auto table = Create(*store, round % 2 == 0 ? 0 : 30'000);  // growing step by step, or at once
      for (size_t first = 0; first < 30'000; first += 1'000) {
        ASSERT_OK(Put(*table, Keys(first, 1'000, round % 4 < 2), 1));
      }
      ASSERT_OK(store->WriteRecord("r", std::string(1 + round * 1'000, 'r')));
      ASSERT_OK(CheckMultiProcessStore(*store));
    }
    ASSERT_OK(store->DropTable(kTableName));
    ASSERT_OK(CheckMultiProcessStore(*store));
    if (round == 3) taken = TakenBytes(name);
  }
  EXPECT_LE(TakenBytes(name), taken + taken / 10);
}

// Overflow: the clauses of all bounded stores are in store_conformance.cc -------------------------------------------

constexpr uint64_t kMargin = 100;

std::unique_ptr<TableStore> OpenBounded(const std::string& name, OverflowPolicy policy) {
  MultiProcessOptions options = Options(name);
  options.num_partitions = 1;
  options.overflow = {.margin = kMargin, .policy = policy};
  return Open(options);
}

TEST_P(MultiProcessKeysTest, AnUpsertLargerThanTheMarginIsHeldWithinIt) {
  for (const OverflowPolicy policy :
       {OverflowPolicy::kEvictOldest, OverflowPolicy::kEvictRandom, OverflowPolicy::kEvictLeastUsed}) {
    const auto store = OpenBounded(name, policy);
    const auto table = Create(*store, 5'000);
    ASSERT_OK(Put(*table, Keys(0, 5'000, GetParam()), 1));
    EXPECT_LE(table->Stats()->rows, kMargin);
    EXPECT_GE(table->Stats()->rows, 80u);
    EXPECT_LT(table->Stats()->memory_bytes, 5'000u * 10 + 50'000u) << "rows that may never be had are set aside";
    ASSERT_OK(CheckMultiProcessStore(*store));
  }
}

// Attaching and leaving ----------------------------------------------------------------------------------------------

TEST_F(MultiProcessTest, StoresOfOneProcessShareTablesRowsAndRecords) {
  const auto left = Open(name);
  const auto right = Open(name);
  const auto written = Create(*left);
  ASSERT_OK(Put(*written, Keys(0, 100, false), 1));
  const auto read = OpenTable(*right);
  ExpectVersion(*read, Keys(0, 100, false), 1);
  ASSERT_OK(Put(*read, Keys(50, 100, false), 2));
  ExpectVersion(*written, Keys(50, 100, false), 2);
  EXPECT_EQ(written->Stats()->rows, 150u);
  ASSERT_OK(left->WriteRecord("r", "from the left"));
  EXPECT_EQ(*right->ReadRecord("r"), "from the left");
  ExpectError(right->CreateTable({.name = kTableName, .row_bytes = kRowBytes}).status(), StatusCode::kAlreadyExists);
  ExpectError(right->OpenTable({.name = kTableName, .row_bytes = 4}).status(), StatusCode::kFailedPrecondition);
  ASSERT_OK(left->Close());
  ExpectVersion(*read, Keys(0, 50, false), 1);
}

TEST_F(MultiProcessTest, ATableDroppedElsewhereStaysReadableAndIsFreedByItsLastHolder) {
  const auto left = Open(name);
  const auto right = Open(name);
  const std::vector<Key> keys = Keys(0, 120'000, false);  // more than half of the memory
  ASSERT_OK(Put(*Create(*left, keys.size()), keys, 1));
  auto held = OpenTable(*right);
  auto twice = OpenTable(*right);
  ASSERT_OK(left->DropTable(kTableName));
  EXPECT_TRUE(right->ListTables()->empty());
  ExpectVersion(*held, keys, 1);
  const TableSpec spec = {.name = kTableName, .row_bytes = kRowBytes, .expected_rows = keys.size()};
  ExpectError(left->CreateTable(spec).status(), StatusCode::kResourceExhausted);
  held.reset();
  ExpectError(left->CreateTable(spec).status(), StatusCode::kResourceExhausted);
  ExpectVersion(*twice, keys, 1);
  twice.reset();
  ASSERT_OK(left->CreateTable(spec).status());
}

TEST_F(MultiProcessTest, TheLastToCloseRemovesIt) {
  auto first = Open(name);
  auto second = Open(name);
  first.reset();
  EXPECT_TRUE(Exists(name));
  const auto table = Create(*second);  // held beyond the end of its store
  second.reset();
  EXPECT_FALSE(Exists(name));
  ExpectError(Put(*table, {1}, 1), StatusCode::kFailedPrecondition, {"has been closed"});
}

TEST_F(MultiProcessTest, ItStaysWhereItIsNotToBeRemoved) {
  MultiProcessOptions kept = Options(name);
  kept.auto_remove = false;
  ASSERT_OK(Put(*Create(*Open(kept)), Keys(0, 10, false), 1));
  EXPECT_TRUE(Exists(name));
  const auto store = Open(kept);
  ExpectVersion(*OpenTable(*store), Keys(0, 10, false), 1);
}

TEST_F(MultiProcessTest, MemoryRemovedByHandIsMadeAnew) {
  auto old = Open(name);
  const auto table = Create(*old);
  ASSERT_OK(Put(*table, {1}, 1));
  ASSERT_EQ(::shm_unlink(("/" + name).c_str()), 0);
  auto fresh = Open(name);
  EXPECT_TRUE(fresh->ListTables()->empty());
  ExpectVersion(*table, {1}, 1);
  ASSERT_OK(old->Close());
  EXPECT_TRUE(Exists(name)) << "the name is not that of the old memory any more";
  fresh.reset();
  EXPECT_FALSE(Exists(name));
}

TEST_F(MultiProcessTest, HalfMadeMemoryIsMadeAnew) {
  // As a creator leaves it that dies before, or after, it has given the file its size, or with all but the last word.
  for (const off_t bytes : {0, 1 << 20, 16 << 20}) {
    const int file = ::shm_open(("/" + name).c_str(), O_RDWR | O_CREAT, 0600);
    ASSERT_EQ(::ftruncate(file, bytes), 0);
    ::close(file);
    auto store = Open(name);
    ASSERT_OK(Put(*Create(*store), Keys(0, 100, false), 1));
  }
  MultiProcessOptions kept = Options(name);
  kept.auto_remove = false;
  ASSERT_OK(Put(*Create(*Open(kept)), Keys(0, 100, false), 1));
  Write(name, offsetof(SharedHeader, magic), 0);
  const auto store = Open(name);
  EXPECT_TRUE(store->ListTables()->empty());
  ASSERT_OK(Put(*Create(*store), Keys(0, 100, false), 2));
  ASSERT_OK(CheckMultiProcessStore(*store));
}

TEST_F(MultiProcessTest, AForkedChildIsToldAndHarmsNothing) {
  const auto store = Open(name);
  const auto table = Create(*store);
  ASSERT_OK(Put(*table, {1}, 1));
  const pid_t child = ::fork();
  if (child == 0) {
    const bool told = Put(*table, {1}, 2).code() == StatusCode::kFailedPrecondition &&
                      store->ListTables().status().message().find("fork()") != std::string::npos;
    (void)store->Close();
    ::_exit(told ? 7 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 7);
  ExpectVersion(*table, {1}, 1);
  ASSERT_OK(Put(*table, {1}, 3));
  EXPECT_TRUE(Exists(name));
}

// Processes ----------------------------------------------------------------------------------------------------------

// Writes rows of odd numbers, again and again, until a file named "stop" lies in the folder.
int RunWriter(const fs::path& folder) {
  const auto store = Open(folder.filename().string());
  const auto table = OpenTable(*store);
  const std::vector<Key> own = Keys(1'000, 300, false);
  for (uint32_t version = 2;; ++version) {
    if (!Put(*table, own, version).ok()) return 1;
    if (!Put(*table, Keys(2'000 + version % 50 * 100, 100, false), version).ok()) return 1;
    if (!table->Erase(Keys(2'000 + (version + 25) % 50 * 100, 100, false)).ok()) return 1;
    // The other process's rows never go back.
    static std::vector<uint32_t> last(300, 0);
    const std::vector<uint32_t> versions = Versions(*table, Keys(0, 300, false));
    for (size_t i = 0; i < versions.size(); ++i) {
      if (versions[i] < last[i]) return 2;
    }
    last = versions;
    if (::testing::Test::HasFailure()) return 3;
    if (version == 3) {
      std::puts("writing");
      std::fflush(stdout);
    }
    if (fs::exists(folder / "stop")) return 0;
  }
}

TEST_F(MultiProcessTest, TwoProcessesWriteAndReadAtOnce) {
  auto store = Open(name);
  auto table = Create(*store);
  ASSERT_OK(Put(*table, Keys(0, 300, false), 1));
  ASSERT_OK(Put(*table, Keys(1'000, 300, false), 1));
  ChildProcess child("writer", folder / "");
  child.WaitForLine("writing");
  std::vector<uint32_t> last(300, 0);
  bool moved = false;
  for (uint32_t version = 2; version < (kSanitized ? 60 : 1'000) || !moved; ++version) {
    ASSERT_OK(Put(*table, Keys(0, 300, false), version));
    const std::vector<uint32_t> versions = Versions(*table, Keys(1'000, 300, false));
    for (size_t i = 0; i < versions.size(); ++i) {
      ASSERT_GE(versions[i], last[i]);
      moved = moved || (last[i] > 0 && versions[i] > last[i]);
    }
    last = versions;
    (void)Versions(*table, Keys(2'000, 5'000, false));
    ASSERT_FALSE(HasFailure());
  }
  std::ofstream(folder / "stop").put('\n');
  const int status = child.Wait();
  EXPECT_EQ(WEXITSTATUS(status), 0);
  ASSERT_OK(CheckMultiProcessStore(*store));
  store.reset();
  EXPECT_FALSE(Exists(name));
}

// Attaches, reads a table and waits to be killed or, if it `stops`, for its end to be asked for.
int RunHolder(const fs::path& folder, bool stops) {
  auto store = Open(folder.filename().string());
  std::shared_ptr<Table> table;
  if (!store->ListTables()->empty()) {
    table = OpenTable(*store);
    (void)Versions(*table, Keys(0, 10, false));
  }
  std::puts("attached");
  std::fflush(stdout);
  while (!stops || !fs::exists(folder / "stop")) {
    if (table != nullptr) {
      for (const uint32_t version : Versions(*table, Keys(0, 1'000, false))) {
        if (version != 1) return 1;
      }
    }
    std::this_thread::yield();
  }
  return ::testing::Test::HasFailure() ? 2 : 0;
}

TEST_F(MultiProcessTest, TheLastProcessRemovesItAlsoWhenAnotherCrashed) {
  auto store = Open(name);
  ChildProcess crashing("holder", folder / "");
  ChildProcess closing("holder", folder / "");
  crashing.WaitForLine("attached");
  closing.WaitForLine("attached");
  crashing.Kill();
  store.reset();
  EXPECT_TRUE(Exists(name)) << "a process is still attached";
  std::ofstream(folder / "stop").put('\n');
  EXPECT_EQ(WEXITSTATUS(closing.Wait()), 0);
  EXPECT_FALSE(Exists(name));
}

TEST_F(MultiProcessTest, ATableDroppedInOneProcessIsReadInTheOther) {
  const std::vector<Key> keys = Keys(0, 120'000, false);  // more than half of the memory
  const auto store = Open(name);
  ASSERT_OK(Put(*Create(*store, keys.size()), keys, 1));
  ChildProcess crashing("stayer", folder / "");
  ChildProcess closing("holder", folder / "");
  crashing.WaitForLine("attached");
  closing.WaitForLine("attached");
  ASSERT_OK(store->DropTable(kTableName));
  const TableSpec spec = {.name = kTableName, .row_bytes = kRowBytes, .expected_rows = keys.size()};
  ExpectError(store->CreateTable(spec).status(), StatusCode::kResourceExhausted);
  ASSERT_OK(Put(*Create(*store), Keys(0, 20'000, false), 2));  // what the old rows' place would show
  ASSERT_OK(store->DropTable(kTableName));
  std::ofstream(folder / "stop").put('\n');
  EXPECT_EQ(WEXITSTATUS(closing.Wait()), 0) << "rows of the dropped table changed";
  ExpectError(store->CreateTable(spec).status(), StatusCode::kResourceExhausted);
  crashing.Kill();  // what it had open is let go of
  ASSERT_OK(store->CreateTable(spec).status());
  ASSERT_OK(CheckMultiProcessStore(*store));
}

// Forks a child that outlives it, and waits to be killed.
int RunForker(const fs::path& folder) {
  const auto store = Open(folder.filename().string());
  if (::fork() == 0) {
    ::close(STDOUT_FILENO);
    std::ofstream(folder / "child").put('\n');
    while (fs::exists(folder / "child")) std::this_thread::yield();
    ::_exit(0);
  }
  while (!fs::exists(folder / "child")) std::this_thread::yield();
  std::puts("attached");
  std::fflush(stdout);
  while (true) ::pause();
}

TEST_F(MultiProcessTest, AForkedChildDoesNotKeepItsParentAlive) {
  auto store = Open(name);
  ChildProcess forker("forker", folder / "");
  forker.WaitForLine("attached");
  forker.Kill();
  store.reset();
  EXPECT_FALSE(Exists(name));
  fs::remove(folder / "child");
}

TEST_F(MultiProcessTest, WhatTheLastProcessLeftInACrashIsUsedAgain) {
  auto store = Open(name);
  ASSERT_OK(Put(*Create(*store), Keys(0, 1'000, false), 1));
  ChildProcess last("holder", folder / "");
  last.WaitForLine("attached");
  store.reset();
  last.Kill();
  EXPECT_TRUE(Exists(name));
  store = Open(name);
  ExpectVersion(*OpenTable(*store), Keys(0, 1'000, false), 1);
  store.reset();
  EXPECT_FALSE(Exists(name));
}

TEST_F(MultiProcessTest, WhatACrashLeftOfAnotherLayoutIsMadeAnew) {
  auto store = Open(name);
  ChildProcess last("holder", folder / "");
  last.WaitForLine("attached");
  store.reset();
  MultiProcessOptions other = Options(name);
  other.num_partitions = 8;
  other.bytes *= 2;
  ExpectError(OpenMultiProcessStore(other).status(), StatusCode::kFailedPrecondition, {"num_partitions"});
  last.Kill();
  store = Open(other);
  ASSERT_OK(Put(*Create(*store), Keys(0, 1'000, false), 1));
  ASSERT_OK(CheckMultiProcessStore(*store));
}

int RunRole(const std::string& role, const fs::path& given) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  const fs::path folder = given.parent_path();
  if (role == "small") return RunInSmallDevShm(folder);
  if (role == "writer") return RunWriter(folder);
  if (role == "holder") return RunHolder(folder, /*stops=*/true);
  if (role == "stayer") return RunHolder(folder, /*stops=*/false);
  if (role == "forker") return RunForker(folder);
  return 1;
}

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunTests(argc, argv, hps::testing::RunRole); }
