// The record of a model in a store, and the memory that is there for one.

#include "cc/core/model_record.h"

#include "cc/core/host_memory.h"
#include "cc/storage/hash_map_store.h"
#include "cc/tests/core_fixture.h"

namespace hps::testing {
namespace {

TEST(ModelRecordTest, NamesOfGenerations) {
  EXPECT_EQ(StoredTableName("m", "t", 0), "hps_et.m.t");
  EXPECT_EQ(StoredTableName("m", "t", 12), "hps_et.m.t@12");
  EXPECT_EQ(GenerationOf("hps_et.m.t", "m", "t"), 0u);
  EXPECT_EQ(GenerationOf("hps_et.m.t@12", "m", "t"), 12u);
  for (const char* other : {"hps_et.m.t2", "hps_et.m.t@", "hps_et.m.t@1x", "hps_et.m.t@-1", "hps_et.m2.t", "t", ""}) {
    EXPECT_EQ(GenerationOf(other, "m", "t"), std::nullopt) << other;
  }
}

TEST(ModelRecordTest, ReadsWhatWasWritten) {
  auto store = Value(OpenHashMapStore({}));
  EXPECT_TRUE(Value(ReadModelRecord(*store, "m")).tables.empty());
  ModelRecord record;
  record.tables["a"] = {0, "width 4, 8 bytes of 9 ns 10", 77};
  record.tables["b"] = {UINT64_MAX, "", UINT64_MAX};
  ASSERT_OK(WriteModelRecord(*store, "m", record));
  const ModelRecord read = Value(ReadModelRecord(*store, "m"));
  ASSERT_EQ(read.tables.size(), 2u);
  for (const auto& [name, table] : record.tables) {
    EXPECT_EQ(read.tables.at(name).generation, table.generation);
    EXPECT_EQ(read.tables.at(name).fingerprint, table.fingerprint);
    EXPECT_EQ(read.tables.at(name).rows, table.rows);
  }
  EXPECT_TRUE(Value(ReadModelRecord(*store, "other")).tables.empty());
  ASSERT_OK(WriteModelRecord(*store, "m", {}));
  EXPECT_FALSE(Value(store->ReadRecord("hps.model.m")).has_value());
}

TEST(ModelRecordTest, WhatWasGivenOnlySomeRowsIsRefusedByOlderPrograms) {
  auto store = Value(OpenHashMapStore({}));
  ModelRecord record;
  record.tables["a"] = {1, "width 4, 8 bytes of 9 ns 10", 77, 100};
  record.tables["b"] = {2, "f", 5};
  ASSERT_OK(WriteModelRecord(*store, "m", record));
  EXPECT_EQ(Value(store->ReadRecord("hps.model.m")),
            "hps model record 2\n1\t77\t100\ta\twidth 4, 8 bytes of 9 ns 10\n2\t5\t0\tb\tf\n");
  ModelRecord read = Value(ReadModelRecord(*store, "m"));
  EXPECT_EQ(read.tables.at("a").all_rows, 100u);
  EXPECT_EQ(read.tables.at("a").rows, 77u);
  EXPECT_EQ(read.tables.at("a").fingerprint, "width 4, 8 bytes of 9 ns 10");
  EXPECT_EQ(read.tables.at("b").all_rows, 0u);
  read.tables["a"].all_rows = 0;
  ASSERT_OK(WriteModelRecord(*store, "m", read));
  EXPECT_EQ(Value(store->ReadRecord("hps.model.m")),
            "hps model record 1\n1\t77\ta\twidth 4, 8 bytes of 9 ns 10\n2\t5\tb\tf\n");
}

TEST(ModelRecordTest, ADamagedRecordIsAnError) {
  auto store = Value(OpenHashMapStore({}));
  for (const char* text : {"", "{}", "hps model record 1", "hps model record 3\n", "hps model record 1\nx\t1\ta\tf\n",
                           "hps model record 2\n1\t1\ta\tf\n", "hps model record 2\n1\t1\tx\ta\tf\n",
                           "hps model record 1\n1\t1\ta\n", "hps model record 1\n1\t1\ta\tf"}) {
    ASSERT_OK(store->WriteRecord("hps.model.m", text));
    ExpectError(ReadModelRecord(*store, "m").status(), StatusCode::kDataLoss, {"hps.model.m"});
  }
}

// ---- memory -----------------------------------------------------------------------------------------------------

class HostMemoryTest : public ::testing::Test {
 protected:
  void Write(const std::string& name, const std::string& text) {
    const fs::path path = folder_ / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }
  std::optional<uint64_t> Available() { return AvailableMemoryBytes((folder_ / "").string()); }
  TempFolder folder_;
};

TEST_F(HostMemoryTest, AbsentWhereNothingCanBeRead) { EXPECT_EQ(Available(), std::nullopt); }

TEST_F(HostMemoryTest, TheHostsNumberWithoutALimit) {
  Write("proc/meminfo", "MemTotal:       1000 kB\nMemFree:  10 kB\nMemAvailable:   700 kB\n");
  EXPECT_EQ(Available(), 700u * 1024);
  Write("sys/fs/cgroup/memory.max", "max\n");
  Write("sys/fs/cgroup/memory.current", "5000\n");
  EXPECT_EQ(Available(), 700u * 1024);
}

TEST_F(HostMemoryTest, WhatTheGroupLeavesWithFilePagesAsFree) {
  Write("proc/meminfo", "MemAvailable:   700 kB\n");
  Write("sys/fs/cgroup/memory.max", "100000\n");
  Write("sys/fs/cgroup/memory.current", "90000\n");
  EXPECT_EQ(Available(), 10000u);
  Write("sys/fs/cgroup/memory.stat", "anon 60000\nfile 30000\ninactive_file 20000\nactive_file 5000\n");
  EXPECT_EQ(Available(), 35000u);
  Write("sys/fs/cgroup/memory.current", "200000\n");  // above its limit
  EXPECT_EQ(Available(), 0u);
}

TEST_F(HostMemoryTest, TheOlderKindOfGroup) {
  Write("sys/fs/cgroup/memory/memory.limit_in_bytes", "100000\n");
  Write("sys/fs/cgroup/memory/memory.usage_in_bytes", "90000\n");
  Write("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 20000\ntotal_active_file 1000\n");
  EXPECT_EQ(Available(), 31000u);
}

TEST(HostMemory, ThisMachineKnows) {
  ASSERT_TRUE(AvailableMemoryBytes().has_value());
  EXPECT_GT(*AvailableMemoryBytes(), 0u);
}

}  // namespace
}  // namespace hps::testing
