// Loads that cannot fit into the memory there is are refused before they begin: what is counted, and what is not.

#include <sys/mman.h>

#include "cc/core/model_builder.h"
#include "cc/storage/hash_map_store.h"
#include "cc/storage/multi_process_store.h"
#include "cc/storage/rocksdb_store.h"
#include "cc/storage/table_memory.h"
#include "cc/tests/core_fixture.h"

namespace hps::testing {
namespace {

constexpr uint32_t kWidth = 8;
constexpr uint64_t kRowBytes = kWidth * sizeof(float);
constexpr uint64_t kRows = 20'000;
constexpr uint32_t kPartitions = 4;

class LoadMemoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    resources_.executor = NewThreadPool(2);
    WriteTable(folder_ / "dense", KeyRange(0, kRows), kWidth, 1);
    WriteTable(folder_ / "scattered", KeyRange(1'000'000, kRows), kWidth, 1);
  }
  void UseHashMap(const OverflowOptions& overflow = {}) {
    resources_.volatile_store = Value(OpenHashMapStore({.num_partitions = kPartitions, .overflow = overflow}));
  }
  void UseRocksDb() {
    resources_.persistent_store = Value(OpenRocksDbStore({.path = (folder_ / "database").string(), .num_threads = 2}));
  }
  Status Load(const std::string& folder, uint64_t available, BuildOptions options = {}) {
    options.show_progress = false;
    options.available_memory_bytes = available;
    const auto built = BuildModel(MakeModel("m", {MakeTable("t", folder_ / folder, kWidth)}), resources_, options);
    if (built.ok()) DropVolatileTables(**built, resources_);
    return built.status();
  }
  // The load needs so much and not a byte less.
  void ExpectNeed(const std::string& folder, uint64_t bytes, const BuildOptions& options = {}) {
    ExpectError(Load(folder, bytes - 1, options), StatusCode::kResourceExhausted,
                {"model 'm'", std::to_string(bytes >> 20) + " MiB of memory", "initial_cache_rate"});
    if (resources_.volatile_store) EXPECT_TRUE(Value(resources_.volatile_store->ListTables()).empty());
    if (resources_.persistent_store) EXPECT_TRUE(Value(resources_.persistent_store->ListTables()).empty());
    EXPECT_TRUE(Load(folder, bytes, options).ok());
  }

  TempFolder folder_;
  ServerResources resources_;
};

TEST_F(LoadMemoryTest, KeysFromZeroOnNeedLess) {
  UseHashMap();
  const uint64_t dense = HashMapTableBytes({kRows, kRows, kRowBytes, kPartitions});
  const uint64_t scattered = HashMapTableBytes({kRows, 0, kRowBytes, kPartitions});
  EXPECT_GT(scattered, dense + 8 * kRows);
  ExpectNeed("dense", dense);
  ExpectNeed("scattered", scattered);
}

TEST_F(LoadMemoryTest, MarksOfThePolicyCount) {
  std::vector<uint64_t> needs;
  for (OverflowPolicy policy :
       {OverflowPolicy::kEvictRandom, OverflowPolicy::kEvictLeastUsed, OverflowPolicy::kEvictOldest}) {
    const OverflowOptions overflow{.margin = kRows / 3, .policy = policy};
    UseHashMap(overflow);
    needs.push_back(HashMapTableBytes({kRows, 0, kRowBytes, kPartitions, overflow}));
    ExpectNeed("scattered", needs.back());
  }
  EXPECT_NEAR(static_cast<double>(needs[1] - needs[0]), 1.0 * kRows, 4096);
  EXPECT_NEAR(static_cast<double>(needs[2] - needs[0]), 4.0 * kRows, 4096);
}

TEST_F(LoadMemoryTest, WhatTheMarginAndTheCacheRateLeaveOutDoesNotCount) {
  const OverflowOptions overflow{.margin = 1'000};
  UseHashMap(overflow);
  UseRocksDb();
  const uint64_t cached = HashMapCapacityRows(overflow, kPartitions);
  ASSERT_LT(cached, 4'000u);
  const uint64_t passing = RocksDbLoadBytes(kRows, kRowBytes);
  ExpectNeed("scattered", HashMapTableBytes({cached, 0, kRowBytes, kPartitions, overflow}) + passing);
}

TEST_F(LoadMemoryTest, RowsOnTheirWayIntoADatabaseCountOnce) {
  UseRocksDb();
  const uint64_t passing = RocksDbLoadBytes(kRows, kRowBytes);
  EXPECT_EQ(passing, kRows * (kRowBytes + 32));
  ExpectNeed("scattered", passing);
  EXPECT_TRUE(Load("scattered", 0).ok()) << "the database has these rows";
  UseHashMap();
  const uint64_t tenth = HashMapTableBytes({kRows / 10, 0, kRowBytes, kPartitions});
  EXPECT_TRUE(Load("scattered", tenth, {.initial_cache_rate = 0.1}).ok());
  ExpectError(Load("scattered", tenth - 1, {.initial_cache_rate = 0.1}), StatusCode::kResourceExhausted, {"MiB"});
  // Never more than the buffer, however many tables.
  const std::vector<TableLoad> many(3, {.spec = {.row_bytes = kRowBytes, .expected_rows = uint64_t{1} << 40}});
  EXPECT_EQ(resources_.persistent_store->MemoryFor(many), kRocksDbBulkBytes);
}

TEST_F(LoadMemoryTest, SharedMemoryCountsUntilItHoldsTheRows) {
  const std::string name = (folder_ / "").parent_path().filename().string();
  resources_.volatile_store =
      Value(OpenMultiProcessStore({.name = name, .bytes = 16 << 20, .num_partitions = kPartitions}));
  ::shm_unlink(("/" + name).c_str());  // the store goes on
  const uint64_t bytes = SharedTableBytes({kRows, 0, kRowBytes, kPartitions});
  ExpectNeed("scattered", bytes);
  EXPECT_TRUE(Load("scattered", 0).ok()) << "another server has loaded them";
}

TEST_F(LoadMemoryTest, ALoadThatPutsNothingInNeedsNothing) {
  UseHashMap();
  UseRocksDb();
  EXPECT_TRUE(Load("scattered", 0, {.load_volatile = false, .load_persistent = false}).ok());
}

}  // namespace
}  // namespace hps::testing
