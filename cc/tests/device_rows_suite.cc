// Servers whose caches hold whole tables with rows elsewhere than on the device, or otherwise than as float32:
// enable_pagelock, uvm, fp8_quant.

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "cc/cache/cache_plan.h"
#include "cc/tests/device_server_suite.h"

namespace hps::testing {
namespace {}  // namespace

// Rows in pinned memory: everything as with static caches, but for where the rows lie.
TEST_P(DeviceRowsSuite, PinnedRowsServeAndCountAsTheHostsMemory) {
  ModelConfig model = Model("m", 1, {0, 1}, {1000, 300});
  model.cache_type = CacheType::kStatic;
  model.enable_pagelock = true;
  uint64_t pinned = kNumDevices * kWriterBytes, largest = 0;
  const auto plans = Value(PlanCaches(model, std::vector<uint64_t>{1000, 300}, kNumDevices));
  for (const DevicePlan& plan : plans) {
    pinned += plan.pinned_bytes;
    largest = std::max(largest, plan.pinned_bytes);
  }
  ServerOptions options = Options();
  uint64_t available = pinned - 1;
  DeviceSource source = *Source();
  source.host_memory = [&] { return std::optional<uint64_t>(available); };
  options.devices = std::make_shared<DeviceSource>(source);
  ExpectError(ParameterServer::Open(Config({model}), options).status(), StatusCode::kResourceExhausted,
              {"host memory", "model 'm'", std::to_string(pinned) + " bytes", std::to_string(available),
               "enable_pagelock", "deployed_device_list"});
  EXPECT_EQ(faults_->upserts(), 0u) << "nothing was loaded";
  for (const auto& device : devices_) EXPECT_EQ(device->allocations(), 0u);
  available = pinned;
  auto server = Value(ParameterServer::Open(Config({model}), options));
  EXPECT_EQ(devices_[0]->pinned_bytes() + devices_[1]->pinned_bytes(), pinned);
  EXPECT_EQ(Bytes(0), kWriterBytes + plans[0].device_bytes);
  for (int device = 0; device < kNumDevices; ++device) {
    const DeviceAnswer answer = Look(*server, "m", device, kKeys);
    EXPECT_TRUE(answer.AllOf(1));
    EXPECT_EQ(answer.report.rows_unwaited, kKeys.size());
  }
  ASSERT_OK(Update(*server, "m", kSome, 2));
  EXPECT_TRUE(Look(*server, "m", 1, kSome).AllOf(2));
  const Json cache = Json::parse(server->StatsJson())["models"][0]["devices"][0]["caches"][0];
  EXPECT_EQ(cache["pinned_bytes"], plans[0].tables[0].memory.pinned_bytes);
  EXPECT_EQ(cache["memory_bytes"], plans[0].tables[0].memory.device_bytes);
  EXPECT_NE(server->PrometheusText().find("hps_cache_pinned_bytes{model=\"m\",table=\"t0\",device=\"0\"} " +
                                          std::to_string(plans[0].tables[0].memory.pinned_bytes)),
            std::string::npos);
  // A next version needs the room again, beside the one that serves.
  available = 2 * largest - 1;
  ExpectError(server->ReplaceModel(model), StatusCode::kResourceExhausted, {"host memory", "enable_pagelock"});
  EXPECT_TRUE(Look(*server, "m", 0, kSome).AllOf(2));
  ASSERT_OK(server->Close());
  for (const auto& device : devices_) EXPECT_EQ(device->pinned_bytes(), 0u);

  model.cache_type = CacheType::kDynamic;
  ExpectError(ParameterServer::Open(Config({model}), options).status(), StatusCode::kInvalidArgument,
              {"model 'm'", "enable_pagelock", "\"static\""});
}

// Rows of a bucket shared between device and host: every key is there, and often read rows come to the device.
TEST_P(DeviceRowsSuite, UvmServesEveryKeyAndLearnsWhichRowsAreHot) {
  ModelConfig model = Model("m", 1, {0, 1}, {20'000});
  model.cache_type = CacheType::kUvm;
  model.gpucacheper = 0.3;  // three of seven
  auto server = Open({model});
  const std::vector<Key> hot = KeyRange(5000, 1000);
  for (int round = 0; round < 60; ++round) {
    const DeviceAnswer answer = Look(*server, "m", 1, hot);
    ASSERT_TRUE(answer.AllOf(1));
    EXPECT_EQ(answer.report.rows_unwaited, hot.size());
  }
  const auto cache = [&](size_t device) {
    return Json::parse(server->StatsJson())["models"][0]["devices"][device]["caches"][0];
  };
  EXPECT_GT(cache(1)["rows_exchanged"], 100);
  EXPECT_EQ(cache(0)["rows_exchanged"], 0) << "each device learns for itself";
  EXPECT_GT(cache(1)["pinned_bytes"], 20'000u * 16 * 4 / 7);
  EXPECT_NE(server->PrometheusText().find("hps_cache_rows_exchanged_total{model=\"m\",table=\"t0\",device=\"1\"}"),
            std::string::npos);
  ASSERT_OK(Update(*server, "m", KeyRange(5500, 10'000), 2));
  for (int device = 0; device < kNumDevices; ++device) {
    ASSERT_TRUE(Look(*server, "m", device, KeyRange(5500, 10'000)).AllOf(2));
    ASSERT_TRUE(Look(*server, "m", device, KeyRange(0, 5500)).AllOf(1));
    ASSERT_TRUE(Look(*server, "m", device, KeyRange(20'000, 10)).AllOf(0));
  }
  ExpectError(server->RefreshCaches("m"), StatusCode::kFailedPrecondition, {"table 't0'", "uvm", "dynamic"});
  ASSERT_OK(server->ReplaceModel(model));
  ASSERT_TRUE(Look(*server, "m", 1, KeyRange(5000, 1000)).AllOf(1));
  ASSERT_OK(server->Close());
  for (const auto& device : devices_) EXPECT_EQ(device->allocations(), 0u);
}

TEST_P(DeviceRowsSuite, EightBitRowsAreWithinTheirBound) {
  ModelConfig model = Model("m", 1, {0});
  model.cache_type = CacheType::kStatic;
  model.fp8_quant = true;
  auto server = Open({model});
  for (const uint32_t version : {1u, 7u}) {
    if (version > 1) ASSERT_OK(Update(*server, "m", kKeys, version));
    const LookupSession session = Value(server->NewSession("m"));
    cuda::Device& device = *devices_[0];
    const DeviceArray<Key> keys(device, kKeys);
    const DeviceArray<float> rows(device, kKeys.size() * kWidth);
    const DeviceLookupPart part{.width = kWidth, .keys = keys.get(), .count = 1000, .rows = rows.get()};
    ASSERT_OK(session.LookupOnDevice(0, std::span(&part, 1), nullptr));
    const std::vector<float> answer = rows.Get();
    for (size_t i = 0; i < kKeys.size(); ++i) {
      const std::vector<float> row = Row(kKeys[i], version, kWidth);
      float largest = 0;
      for (const float x : row) largest = std::max(largest, std::abs(x));
      for (size_t j = 0; j < kWidth; ++j) ASSERT_NEAR(answer[i * kWidth + j], row[j], largest / 253) << kKeys[i];
    }
  }
  model.cache_type = CacheType::kDynamic;
  ExpectError(ParameterServer::Open(Config({model}), Options()).status(), StatusCode::kInvalidArgument,
              {"model 'm'", "fp8_quant", "\"static\"", "\"uvm\""});
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(DeviceRowsSuite);

}  // namespace hps::testing
