// What a model's configuration means on its devices: sizes, starts, memory to the byte, and refusals.

#include "cc/cache/cache_plan.h"

#include <gtest/gtest.h>

#include "cc/tests/cache_fixture.h"

namespace hps::testing {
namespace {

ModelConfig Model(const std::string& keys, int tables = 2) {
  std::string files, widths, counts, defaults, names;
  for (int i = 0; i < tables; ++i) {
    const std::string comma = i > 0 ? ", " : "";
    files += comma + "\"/tables/" + std::to_string(i) + "\"";
    widths += comma + std::to_string(16 + i);
    counts += comma + std::to_string(2 + i);
    defaults += comma + "0.5";
    names += comma + "\"t" + std::to_string(i) + "\"";
  }
  return Value(ParseModelConfig("{\"model\": \"m\", \"sparse_files\": [" + files + "], \"embedding_table_names\": [" +
                                names + "], \"embedding_vecsize_per_table\": [" + widths +
                                "], \"maxnum_catfeature_query_per_table_per_sample\": [" + counts +
                                "], \"default_value_for_each_table\": [" + defaults + "], \"max_batch_size\": 128" +
                                (keys.empty() ? "" : ", " + keys) + "}"));
}
const std::vector<uint64_t> kRows = {10'000, 100};

TEST(CachePlan, ReadsTheConfiguration) {
  const auto plans = Value(PlanCaches(
      Model("\"deployed_device_list\": [1, 0], \"gpucacheper\": 0.25, \"num_of_worker_buffer_in_pool\": 3, "
            "\"hit_rate_threshold\": 0.8, \"cache_refresh_percentage_per_iteration\": 0.2, \"refresh_delay\": 1.5, "
            "\"refresh_interval\": 10"),
      kRows, 2));
  ASSERT_EQ(plans.size(), 2u);
  EXPECT_EQ(plans[0].device, 1);
  EXPECT_EQ(plans[1].device, 0);
  const DevicePlan& plan = plans[0];
  ASSERT_EQ(plan.tables.size(), 2u);
  EXPECT_EQ(plan.tables[0].spec.name, "model 'm', table 't0'");
  EXPECT_EQ(plan.tables[0].spec.capacity_rows, 2500u);
  EXPECT_EQ(plan.tables[1].spec.row_bytes, 68u);
  EXPECT_EQ(plan.tables[1].spec.default_value, 0.5f);
  EXPECT_EQ(plan.tables[0].start, CacheStart::kPreload);
  EXPECT_EQ(plan.workspaces.reserved, 3u);
  EXPECT_EQ(plan.workspaces.size.positions, 128u * 5);
  EXPECT_EQ(plan.hit_rate_threshold, 0.8);
  EXPECT_EQ(plan.refresh_fraction, 0.2);
  EXPECT_EQ(plan.refresh_delay, std::chrono::milliseconds(1500));
  EXPECT_EQ(plan.refresh_interval, std::chrono::seconds(10));
}

TEST(CachePlan, HowACacheStarts) {
  const std::string device = "\"deployed_device_list\": [0], ";
  const auto start = [&](const std::string& keys) {
    return Value(PlanCaches(Model(device + keys), kRows, 1))[0].tables[0];
  };
  EXPECT_EQ(start("\"init_ec\": false").start, CacheStart::kEmpty);
  EXPECT_EQ(start("\"gpucacheper\": 1.0").start, CacheStart::kWhole);
  EXPECT_EQ(start("\"gpucacheper\": 1.0, \"init_ec\": false").start, CacheStart::kEmpty);
  EXPECT_EQ(start("\"embedding_cache_type\": \"static\", \"gpucacheper\": 0.1").start, CacheStart::kWhole);
  EXPECT_GE(start("\"gpucacheper\": 1.0").spec.capacity_rows, 10'000u);
  EXPECT_TRUE(Value(PlanCaches(Model("\"gpucache\": false"), kRows, 0)).empty());
  const auto plans = Value(PlanCaches(Model(device + "\"embedding_cache_type\": \"static\""), kRows, 1));
  EXPECT_EQ(plans[0].refresh_fraction, 0.0);
  EXPECT_EQ(plans[0].workspaces.size.staging_bytes, 0u);
}

TEST(CachePlan, Refusals) {
  ExpectError(PlanCaches(Model("\"deployed_device_list\": [2]"), kRows, 2).status(), StatusCode::kInvalidArgument,
              {"model 'm'", "GPU 2", "sees 2", "gpucache"});
  ModelConfig twice = Model("\"deployed_device_list\": [0]");
  twice.deployed_devices = {0, 1, 0};
  ExpectError(PlanCaches(twice, kRows, 2).status(), StatusCode::kInvalidArgument, {"GPU 0 twice"});
  twice.deployed_devices = {};
  ExpectError(PlanCaches(twice, kRows, 2).status(), StatusCode::kInvalidArgument, {"deployed_device_list is empty"});
  twice.deployed_devices = {0};
  twice.gpucacheper = 0;
  ExpectError(PlanCaches(twice, kRows, 2).status(), StatusCode::kInvalidArgument, {"gpucacheper"});
  // Files that say so are refused before (config_test.cc); models can be made without one.
  ModelConfig unfit = Model("\"deployed_device_list\": [0]");
  ExpectError(PlanCaches(unfit, std::vector<uint64_t>{1}, 1).status(), StatusCode::kInternal,
              {"1 row counts for 2 tables"});
  unfit.max_batch_size = 1 << 30;
  ExpectError(PlanCaches(unfit, kRows, 2).status(), StatusCode::kInvalidArgument,
              {"model 'm'", "max_batch_size", "5368709120 keys", "1073741824 is the most"});
  unfit.max_batch_size = unfit.tables[0].max_keys_per_sample = unfit.tables[1].max_keys_per_sample = 0xFFFFFFFF;
  ExpectError(PlanCaches(unfit, kRows, 2).status(), StatusCode::kInvalidArgument,
              {"18446744073709551615 keys", "1073741824 is the most"});
  unfit = Model("\"deployed_device_list\": [0]");
  unfit.worker_buffers = 4097;
  ExpectError(PlanCaches(unfit, kRows, 2).status(), StatusCode::kInvalidArgument,
              {"num_of_worker_buffer_in_pool is 4097", "4096 is the most"});
  unfit.worker_buffers = 1;
  unfit.fp8_quant = true;
  ExpectError(PlanCaches(unfit, kRows, 2).status(), StatusCode::kInvalidArgument,
              {"model 'm'", "fp8_quant", "static", "uvm"});
  unfit.fp8_quant = false;
  unfit.enable_pagelock = true;
  for (const CacheType type : {CacheType::kDynamic, CacheType::kUvm}) {
    unfit.cache_type = type;
    ExpectError(PlanCaches(unfit, kRows, 2).status(), StatusCode::kInvalidArgument,
                {"model 'm'", "enable_pagelock", "static"});
  }
}

TEST(CachePlan, PinnedRowsCountAsTheHostsMemory) {
  const std::string keys = "\"deployed_device_list\": [0, 1], \"embedding_cache_type\": \"static\"";
  const DevicePlan there = Value(PlanCaches(Model(keys), kRows, 2))[1];
  const DevicePlan pinned = Value(PlanCaches(Model(keys + ", \"enable_pagelock\": true"), kRows, 2))[1];
  uint64_t rows = 0;
  for (const TableCachePlan& table : pinned.tables) {
    EXPECT_EQ(table.spec.device_ways, 0u);
    EXPECT_EQ(table.start, CacheStart::kWhole);
    EXPECT_EQ(table.memory.pinned_bytes, table.spec.capacity_rows * table.spec.row_bytes);
    rows += table.memory.pinned_bytes;
  }
  EXPECT_GE(rows, 10'000u * 64);
  EXPECT_EQ(pinned.device_bytes + rows, there.device_bytes);
  EXPECT_EQ(pinned.pinned_bytes, there.pinned_bytes + rows);
}

TEST(CachePlan, UvmSharesEachBucketBetweenDeviceAndHost) {
  const auto plan_of = [](const std::string& part) {
    return Value(PlanCaches(Model("\"deployed_device_list\": [0], \"embedding_cache_type\": \"uvm\", "
                                  "\"gpucacheper\": " +
                                  part),
                            kRows, 1))[0];
  };
  const std::vector<std::pair<std::string, uint32_t>> ways = {{"0.01", 1},     {"0.142857", 1}, {"0.15", 2}, {"0.5", 4},
                                                              {"0.857142", 6}, {"0.9", 7},      {"1.0", 7}};
  for (const auto& [part, expected] : ways) {
    const DevicePlan plan = plan_of(part);
    const TableCachePlan& table = plan.tables[0];
    EXPECT_EQ(table.spec.device_ways, expected) << part;
    EXPECT_EQ(table.start, CacheStart::kWhole);
    EXPECT_EQ(table.memory.pinned_bytes, table.spec.capacity_rows / 7 * (7 - expected) * table.spec.row_bytes);
    EXPECT_EQ(plan.workspaces.size.staging_bytes, 0u);
    EXPECT_EQ(plan.refresh_fraction, 0.0);
  }
}

TEST(CachePlan, EightBitRowsTakeAByteForEachValue) {
  for (const std::string type : {"static", "uvm"}) {
    const auto plan =
        Value(PlanCaches(Model("\"deployed_device_list\": [0], \"fp8_quant\": true, \"gpucacheper\": 1.0, "
                               "\"embedding_cache_type\": \"" +
                               type + "\""),
                         kRows, 1))[0];
    EXPECT_TRUE(plan.tables[0].spec.int8_rows);
    const uint64_t buckets = plan.tables[0].spec.capacity_rows / 7;
    EXPECT_EQ(plan.tables[0].memory.device_bytes, buckets * (64 + 7 * (4 + 16)) + 32);
    const uint64_t others = plan.tables[1].spec.capacity_rows / 7;  // 17 values: three bytes are left over
    EXPECT_EQ(plan.tables[1].memory.device_bytes, others * (64 + 7 * (4 + 20)) + 32);
  }
}

// Many models on one device take the memory that was planned, to the byte.
TEST(CachePlan, MemoryIsWhatWasPlanned) {
  auto device = std::make_shared<HostDevice>();
  const auto context = DeviceContext::Make(device);
  const std::shared_ptr<CacheWriter> writer = Value(CacheWriter::Open(context));
  const uint64_t before = device->allocated_bytes(), pinned_before = device->pinned_bytes();
  uint64_t planned = 0, planned_pinned = 0;
  std::vector<std::shared_ptr<DeviceCache>> caches;
  std::vector<std::shared_ptr<WorkspacePool>> pools;
  for (int model = 0; model < 24; ++model) {
    const std::vector<uint64_t> rows = {1000, 2000u + static_cast<uint64_t>(model), 0, 7};
    const std::string pagelock = model % 2 == 0 ? ", \"enable_pagelock\": true" : "";
    const std::string quant = model % 4 == 0 ? ", \"fp8_quant\": true" : "";
    const std::string type = model % 3 == 0   ? "\"embedding_cache_type\": \"static\"" + pagelock + quant
                             : model % 3 == 1 ? "\"embedding_cache_type\": \"uvm\", \"gpucacheper\": 0.4" + quant
                                              : "\"gpucacheper\": 0.5";
    const auto plan = Value(PlanCaches(
        Model("\"deployed_device_list\": [0], \"num_of_worker_buffer_in_pool\": 2, " + type, 4), rows, 1))[0];
    planned += plan.device_bytes;
    planned_pinned += plan.pinned_bytes;
    pools.emplace_back(Value(WorkspacePool::Open(context, plan.workspaces)));
    const DeviceResources resources{context, writer, pools.back()};
    for (size_t table = 0; table < plan.tables.size(); ++table) {
      if (plan.tables[table].start != CacheStart::kWhole) {
        caches.push_back(Value(DeviceCache::Make(resources, plan.tables[table].spec)));
        continue;
      }
      caches.push_back(
          Value(DeviceCache::MakeWhole(resources, plan.tables[table].spec, [&](const ScanVisitor& visitor) -> Status {
            const std::vector<std::byte> block(rows[table] * plan.tables[table].spec.row_bytes);
            return visitor(KeyRange(0, rows[table]), {block.data(), plan.tables[table].spec.row_bytes});
          })));
    }
  }
  EXPECT_EQ(device->allocated_bytes() - before, planned);
  EXPECT_EQ(device->pinned_bytes() - pinned_before, planned_pinned);
}

}  // namespace
}  // namespace hps::testing
