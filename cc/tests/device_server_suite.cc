// Who shares what, memory, replacement, updates, refresh, refusals, graphs. What needs the host device's tricks is in
// device_server_test.cc.

#include "cc/tests/device_server_suite.h"

#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>

#include "cc/cache/cache_plan.h"

namespace hps::testing {
namespace {

uint64_t Planned(const ModelConfig& model, const std::vector<uint64_t>& rows) {
  return Value(PlanCaches(model, rows, kNumDevices))[0].device_bytes;
}

}  // namespace

// ---- the four sharing scenarios ---------------------------------------------------------------------------------

void SharingScenarios::RunInstances(const ParameterServer& server, const std::vector<Placed>& placed, int instances) {
  constexpr int kTurns = 20, kCount = 90;
  const std::vector<uint64_t> caches = CacheBytes(server);
  std::vector<uint64_t> asked_before;
  std::vector<LookupSession> shared;
  for (const Placed& each : placed) {
    asked_before.push_back(CountsOf(server, each)["keys_asked"].get<uint64_t>());
    shared.push_back(Value(server.NewSession(each.model)));
  }
  // Each instance has two threads: one goes through sessions of its own, the other uses one that all instances share.
  std::atomic<int> waiting{0};
  const int num_threads = static_cast<int>(placed.size()) * instances * 2;
  std::vector<std::thread> threads;
  for (size_t p = 0; p < placed.size(); ++p) {
    for (int i = 0; i < 2 * instances; ++i) {
      threads.emplace_back([&, p, i] {
        const Placed& each = placed[p];
        ++waiting;
        while (waiting < num_threads) std::this_thread::yield();
        std::optional<LookupSession> own;
        for (int turn = 0; turn < kTurns; ++turn) {
          if (i % 2 == 0 && turn % 5 == 0) own.emplace(Value(server.NewSession(each.model)));
          const std::vector<Key> keys = KeyRange((turn * 37 + i * 11) % 900, kCount);
          const DeviceAnswer answer = Look(own ? *own : shared[p], each.device, keys);
          ASSERT_OK(answer.status);
          ASSERT_TRUE(answer.AllOf(each.version)) << each.model << " on device " << each.device;
        }
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(CacheBytes(server), caches);
  for (size_t p = 0; p < placed.size(); ++p) {
    const Placed& each = placed[p];
    // One cache has answered all of them, and nothing else has asked it.
    const Json counts = CountsOf(server, each);
    const auto count = [&](const char* name) { return counts[name].get<uint64_t>(); };
    EXPECT_EQ(count("keys_asked"), asked_before[p] + static_cast<uint64_t>(2 * instances * kTurns * kCount));
    EXPECT_EQ(count("keys_asked"), count("rows_served") + count("rows_missed"));
    EXPECT_GT(count("rows_served"), 0u);
    // What one instance has brought in, all others hit.
    ASSERT_TRUE(Look(server, each.model, each.device, kSome).AllOf(each.version));
    const DeviceAnswer again = Look(server, each.model, each.device, kSome);
    EXPECT_TRUE(again.AllOf(each.version));
    // Full buckets push rows out.
    EXPECT_GE(again.report.rows_from_cache + again.report.rows_unwaited, kSome.size() / 2);
  }
}

Json SharingScenarios::CountsOf(const ParameterServer& server, const Placed& placed) {
  const Json stats = Json::parse(server.StatsJson());
  for (const Json& model : stats["models"]) {
    if (model["name"] != placed.model) continue;
    for (const Json& device : model["devices"]) {
      if (device["device"] == placed.device) return device["caches"][0];
    }
  }
  ADD_FAILURE() << placed.model << " has no cache on device " << placed.device;
  return {};
}

std::vector<uint64_t> SharingScenarios::CacheBytes(const ParameterServer& server) {
  std::vector<uint64_t> bytes;
  const Json stats = Json::parse(server.StatsJson());
  for (const Json& model : stats["models"]) {
    for (const Json& device : model["devices"]) {
      for (const Json& cache : device["caches"]) bytes.push_back(cache["memory_bytes"].get<uint64_t>());
    }
  }
  return bytes;
}

TEST_P(SharingScenarios, OneDeviceOneModel) {
  auto server = Open({Model("m", 1, {0})});
  EXPECT_EQ(CacheBytes(*server).size(), 1u);
  EXPECT_EQ(devices_[1]->allocations(), 0u);
  RunInstances(*server, {{"m", 0, 1}}, 4);
}

TEST_P(SharingScenarios, OneDeviceSeveralModels) {
  ModelConfig fixed = Model("c", 3, {0});
  fixed.cache_type = CacheType::kStatic;
  auto server = Open({Model("a", 1, {0}), Model("b", 2, {0}), fixed});
  EXPECT_EQ(CacheBytes(*server).size(), 3u);
  RunInstances(*server, {{"a", 0, 1}, {"b", 0, 2}, {"c", 0, 3}}, 2);
}

TEST_P(SharingScenarios, SeveralDevicesOneModel) {
  auto server = Open({Model("m", 1, {0, 1})});
  ASSERT_TRUE(Look(*server, "m", 0, kSome).AllOf(1));
  const DeviceAnswer there = Look(*server, "m", 1, kSome);
  EXPECT_EQ(there.report.rows_from_volatile, kSome.size()) << "each device has a cache of its own";
  RunInstances(*server, {{"m", 0, 1}, {"m", 1, 1}}, 3);
  // The tiers are shared: one copy of the rows in the host's memory.
  EXPECT_EQ(Json::parse(server->StatsJson())["models"][0]["tables"][0]["volatile"]["rows"], 1000);
}

TEST_P(SharingScenarios, SeveralDevicesSeveralModels) {
  ModelConfig fixed = Model("fixed", 4, {0, 1});
  fixed.cache_type = CacheType::kStatic;
  auto server = Open({Model("left", 1, {0}), Model("right", 2, {1}), Model("both", 3, {1, 0}), fixed}, Tiers::kBoth);
  EXPECT_EQ(CacheBytes(*server).size(), 6u);
  RunInstances(*server,
               {{"left", 0, 1}, {"right", 1, 2}, {"both", 0, 3}, {"both", 1, 3}, {"fixed", 0, 4}, {"fixed", 1, 4}}, 2);
  ExpectError(Look(*server, "left", 1, kSome).status, StatusCode::kInvalidArgument,
              {"model 'left'", "no cache on device 1", "deployed_device_list is 0"});
  ExpectError(Look(*server, "right", 0, kSome).status, StatusCode::kInvalidArgument, {"deployed_device_list is 1"});
  // Without one of the models the others go on, with their caches as they are.
  ASSERT_OK(server->UnloadModel("left"));
  EXPECT_EQ(CacheBytes(*server).size(), 5u);
  RunInstances(*server, {{"right", 1, 2}, {"both", 0, 3}, {"both", 1, 3}}, 2);
}

// ---- starts -----------------------------------------------------------------------------------------------------

TEST_P(DeviceServerSuite, CachesStartAsConfiguredFromEachTier) {
  for (const Tiers tiers : {Tiers::kVolatile, Tiers::kPersistent, Tiers::kBoth}) {
    for (int restart = 0; restart < 2; ++restart) {  // from the folder, then from the database
      ModelConfig part = Model("part", 1, {0});
      part.init_ec = true;
      ModelConfig whole = Model("whole", 2, {0, 1}, {1000, 1, 3});
      whole.init_ec = true;
      whole.gpucacheper = 1.0;
      ModelConfig fixed = Model("fixed", 3, {1});
      fixed.cache_type = CacheType::kStatic;
      auto server = Open({part, whole, fixed}, tiers);
      const uint64_t fetches = faults_->fetches();
      EXPECT_TRUE(Look(*server, "whole", 1, kKeys).AllOf(2));
      EXPECT_EQ(Look(*server, "whole", 0, kKeys).report.rows_from_cache, kKeys.size());
      EXPECT_EQ(Look(*server, "whole", 0, {0, 1, 2}, 2).report.rows_from_cache, 3u);
      const DeviceAnswer unwaited = Look(*server, "fixed", 1, kKeys);
      EXPECT_TRUE(unwaited.AllOf(3));
      EXPECT_EQ(unwaited.report.rows_unwaited, kKeys.size());
      EXPECT_TRUE(Look(*server, "fixed", 1, KeyRange(5000, 10)).AllOf(0));
      EXPECT_EQ(faults_->fetches(), fetches) << "no tier is asked";
      EXPECT_TRUE(Look(*server, "whole", 0, kSome, 1).AllOf(0));
      const DeviceAnswer some = Look(*server, "part", 0, kKeys);
      EXPECT_TRUE(some.AllOf(1));
      EXPECT_GE(some.report.rows_from_cache, 400u);  // half of them, but for full buckets
      EXPECT_LE(some.report.rows_from_cache, 504u);
      ASSERT_OK(server->Close());
      if (tiers == Tiers::kVolatile) break;
    }
    fs::remove_all(folder_ / "database");
  }
}

TEST_P(DeviceServerSuite, RowsThatOtherNodesUpdatedInTheSharedTierCountAsTheNewerOnes) {
  shared_volatile_ = true;
  ModelConfig preloaded = Model("preloaded", 1, {0});
  preloaded.init_ec = true;
  ModelConfig whole = Model("whole", 1, {0});
  whole.cache_type = CacheType::kStatic;
  auto server = Open({preloaded, whole}, Tiers::kBoth);
  for (const ModelConfig& model : {preloaded, whole}) {
    WriteTier("volatile", "hps_et." + model.name + ".t0", {5, 7, 5000}, 9);
    ASSERT_OK(server->ReplaceModel(model));
    const DeviceAnswer answer = Look(*server, model.name, 0, {4, 5, 6, 7, 5000});
    EXPECT_EQ(answer.versions, (std::vector<int>{1, 9, 1, 9, 9})) << model.name;
  }
}

TEST_P(DeviceServerSuite, AHostWithoutDevicesServesFromTheTiersAndSaysSoOnce) {
  CapturedLog log;
  auto server = Value(ParameterServer::Open(Config({Model("a", 1, {0}), Model("b", 2, {0, 7})}), Options(/*count=*/0)));
  ExpectRows(Lookup(*server, "b", 0, kWidth, kKeys), kKeys, 2);
  const std::string text = log.text();
  const size_t first = text.find("no GPU cache is available here (th");  // and why
  ASSERT_NE(first, std::string::npos);
  EXPECT_NE(server->StatsJson().find("\"gpus\":0"), std::string::npos);
  EXPECT_EQ(text.find("no GPU cache", first + 1), std::string::npos);
  ExpectError(Look(*server, "a", 0, kSome).status, StatusCode::kInvalidArgument,
              {"model 'a' has no cache on device 0", "no devices"});
  EXPECT_EQ(devices_[0]->allocations(), 0u);
  ServerOptions on_host = Options();
  on_host.device_caches = false;
  server = Value(ParameterServer::Open(Config({}), Options(/*count=*/0)));
  CapturedLog later;
  for (const char* name : {"a", "b"}) ASSERT_OK(server->LoadModel(Model(name, 1, {0})));
  EXPECT_NE(later.text().find("no GPU cache is available here"), std::string::npos) << "a server that began empty";
  EXPECT_EQ(later.text().find("no GPU cache"), later.text().rfind("no GPU cache"));
  server = Value(ParameterServer::Open(Config({Model("a", 1, {0})}), on_host));
  EXPECT_NE(later.text().find("no GPU cache is available here (they are switched off)"), std::string::npos);
  ExpectRows(Lookup(*server, "a", 0, kWidth, kKeys), kKeys, 1);
  EXPECT_EQ(devices_[0]->allocations(), 0u);
}

TEST_P(DeviceServerSuite, ALookupIsServedWhereTheModelHasCaches) {
  ModelConfig without = Model("without", 1, {0});
  without.gpucache = false;
  auto server = Open({Model("m", 1, {0}), without});
  EXPECT_TRUE(Value(Value(server->NewSession("m")).IsServedOnDevice(0)));
  ExpectError(Value(server->NewSession("m")).IsServedOnDevice(1).status(), StatusCode::kInvalidArgument,
              {"model 'm' has no cache on device 1", "deployed_device_list is 0"});
  EXPECT_FALSE(Value(Value(server->NewSession("without")).IsServedOnDevice(0)));
}

TEST_P(DeviceServerSuite, AnAbsentDeviceIsRefusedBeforeAnythingIsLoaded) {
  const ModelConfig strange = Model("strange", 1, {0, 2});
  ExpectError(ParameterServer::Open(Config({Model("m", 1, {0}), strange}), Options()).status(),
              StatusCode::kInvalidArgument, {"model 'strange'", "GPU 2", "sees 2"});
  EXPECT_EQ(faults_->upserts(), 0u);
  EXPECT_EQ(devices_[0]->allocations(), 0u);
  auto server = Open({Model("m", 1, {0})});
  const uint64_t upserts = faults_->upserts();
  ExpectError(server->LoadModel(strange), StatusCode::kInvalidArgument, {"model 'strange'", "GPU 2"});
  EXPECT_EQ(faults_->upserts(), upserts);
  ModelConfig without = Model("without", 1, {});
  ASSERT_OK(server->LoadModel(without));
  ExpectError(Look(*server, "without", 0, kSome).status, StatusCode::kInvalidArgument,
              {"deployed_device_list is empty"});
}

// ---- memory -----------------------------------------------------------------------------------------------------

TEST_P(DeviceServerSuite, ModelsThatDoNotFitTogetherAreRefusedBeforeAnythingIsAllocated) {
  const ModelConfig small = Model("small", 1, {0, 1});
  const ModelConfig large = Model("large", 1, {1}, {1000, 3000});
  const uint64_t needed = kWriterBytes + Planned(small, {1000}) + Planned(large, {1000, 3000});
  OpenDevices(needed - 1);
  ExpectError(ParameterServer::Open(Config({small, large}), Options()).status(), StatusCode::kResourceExhausted,
              {"device 1", "2 models", "'large'", std::to_string(needed) + " bytes", std::to_string(needed - 1),
               "gpucacheper", "deployed_device_list"});
  EXPECT_EQ(faults_->upserts(), 0u) << "nothing was loaded";
  for (const auto& device : devices_) EXPECT_EQ(device->allocations(), 0u);
  OpenDevices(needed);
  auto server = Open({small, large});
  EXPECT_EQ(Bytes(1), needed);
  EXPECT_LT(Bytes(0), needed);
}

TEST_P(DeviceServerSuite, ALaterModelOrVersionThatDoesNotFitLeavesTheOthersServing) {
  const ModelConfig model = Model("m", 1, {0, 1}, {20'000});
  OpenDevices(kWriterBytes + 2 * Planned(model, {20'000}) - 1);
  auto server = Open({model});
  const uint64_t bytes = Bytes(0);
  const uint64_t upserts = faults_->upserts();
  ExpectError(server->ReplaceModel(Model("m", 2, {0, 1}, {20'000})), StatusCode::kResourceExhausted,
              {"device 0", "model 'm'", "unload"});
  ExpectError(server->LoadModel(Model("n", 2, {1}, {20'000})), StatusCode::kResourceExhausted,
              {"device 1", "model 'n'"});
  EXPECT_EQ(faults_->upserts(), upserts);
  EXPECT_EQ(Bytes(0), bytes);
  EXPECT_TRUE(Look(*server, "m", 1, kSome).AllOf(1));
  ASSERT_OK(server->UnloadModel("m"));
  ASSERT_OK(server->LoadModel(Model("n", 2, {1}, {20'000})));
  EXPECT_TRUE(Look(*server, "n", 1, kSome).AllOf(2));
}

// Every allocation of a load fails once: a clear error, nothing left behind, and the next load succeeds.
TEST_P(DeviceServerSuite, EachAllocationOfALoadMayFail) {
  ModelConfig first = Model("first", 1, {0});
  auto server = Open({first});
  const uint64_t bytes = Bytes(1);
  ModelConfig model = Model("m", 2, {0, 1}, {100, 10});
  model.init_ec = true;
  int failed = 0;
  for (uint64_t n = 1;; ++n) {
    devices_[1]->FailAllocation(n);
    const Status status = server->LoadModel(model);
    if (status.ok()) break;
    ++failed;
    ExpectError(status, StatusCode::kResourceExhausted, {"model 'm'", "device 1", "bytes of"});
    EXPECT_LE(Bytes(1), bytes + kWriterBytes);
    ASSERT_LT(n, 50u);
  }
  devices_[1]->FailAllocation(0);
  EXPECT_GE(failed, 8);
  EXPECT_TRUE(Look(*server, "m", 1, KeyRange(0, 100)).AllOf(2));
}

// ---- lookups ----------------------------------------------------------------------------------------------------

TEST_P(DeviceServerSuite, RefusalsSayWhatToDo) {
  ModelConfig without = Model("without", 1, {0});
  without.gpucache = false;
  auto server = Open({Model("m", 1, {1}), without});
  const LookupSession session = Value(server->NewSession("m"));
  ExpectError(Look(*server, "without", 0, kSome).status, StatusCode::kInvalidArgument,
              {"\"gpucache\" is false", "host memory"});
  ExpectError(Look(session, 0, kSome).status, StatusCode::kInvalidArgument,
              {"device 0", "deployed_device_list is 1", "load the model anew"});
  ExpectError(Look(session, 1, kSome, 3).status, StatusCode::kInvalidArgument, {"no table 3"});
  const DeviceArray<Key> keys(*devices_[1], kSome);
  const DeviceArray<float> rows(*devices_[1], kSome.size() * kWidth);
  const DeviceLookupPart good{.width = kWidth, .keys = keys.get(), .count = 50, .rows = rows.get()};
  const auto refuse = [&](DeviceLookupPart part, const std::vector<std::string>& parts) {
    ExpectError(session.LookupOnDevice(1, std::span(&part, 1), nullptr), StatusCode::kInvalidArgument, parts);
  };
  DeviceLookupPart bad = good;
  bad.key_bytes = 2;
  refuse(bad, {"table 't0'", "keys of 2 bytes", "int64"});
  bad = good;
  bad.width = 5;
  refuse(bad, {"4 values", "5"});
  bad = good;
  bad.keys = nullptr;
  refuse(bad, {"null pointer"});
  bad = good;
  bad.rows = nullptr;
  refuse(bad, {"their rows"});
  bad = {.width = kWidth};
  ASSERT_OK(session.LookupOnDevice(1, std::span(&bad, 1), nullptr));
  ASSERT_OK(session.LookupOnDevice(1, {}, nullptr));
  ExpectError(Look(session, 1, kSome, 0, {.deadline = std::chrono::steady_clock::now()}).status,
              StatusCode::kDeadlineExceeded);
  const std::atomic<bool> cancelled{true};
  ExpectError(Look(session, 1, kSome, 0, {.cancelled = &cancelled}).status, StatusCode::kCancelled);
  ASSERT_OK(server->UnloadModel("m"));
  ExpectError(Look(session, 1, kSome).status, StatusCode::kNotFound, {"unloaded"});
}

TEST_P(DeviceServerSuite, SeveralTablesInOneCall) {
  auto server = Open({Model("m", 1, {0}, {100, 200, 300})});
  const LookupSession session = Value(server->NewSession("m"));
  std::vector<std::unique_ptr<DeviceArray<Key>>> keys;
  std::vector<std::unique_ptr<DeviceArray<float>>> rows;
  std::vector<DeviceLookupPart> parts;
  for (uint32_t table : {2, 0, 1, 2}) {
    keys.push_back(std::make_unique<DeviceArray<Key>>(*devices_[0], KeyRange(table * 50, 150)));
    rows.push_back(std::make_unique<DeviceArray<float>>(*devices_[0], 150 * kWidth));
    parts.push_back(
        {.table = table, .width = kWidth, .keys = keys.back()->get(), .count = 150, .rows = rows.back()->get()});
  }
  for (int turn = 0; turn < 2; ++turn) {
    LookupReport report;
    ASSERT_OK(session.LookupOnDevice(0, parts, nullptr, {}, &report));
    EXPECT_EQ(report.keys, 600u);
    for (size_t p = 0; p < parts.size(); ++p) {
      const std::vector<float> answer = rows[p]->Get();
      for (size_t i = 0; i < 150; ++i) {
        const Key key = parts[p].table * 50 + static_cast<Key>(i);
        const int expected = key < (parts[p].table + 1) * 100 ? 1 : 0;
        ASSERT_EQ(VersionOf(key, answer.data() + i * kWidth), expected) << "table " << parts[p].table << " key " << key;
      }
    }
  }
}

TEST_P(DeviceServerSuite, KeysBeyond32BitsAreRefusedWhereTheConfigurationHasShortOnes) {
  ServerConfig config = Config({Model("m", 1, {0})});
  config.long_keys = false;
  auto server = Value(ParameterServer::Open(config, Options()));
  const Key long_key = Key{1} << 40;
  ExpectError(Look(*server, "m", 0, {1, long_key + 1}).status, StatusCode::kOutOfRange,
              {std::to_string(long_key + 1), "supportlonglong"});
  ExpectError(Update(*server, "m", {long_key}, 2), StatusCode::kOutOfRange, {"supportlonglong"});
  EXPECT_TRUE(Look(*server, "m", 0, {1, -5}).versions == (std::vector<int>{1, 0}));
}

TEST_P(DeviceServerSuite, DeferredRowsComeLaterAndEverythingIsCounted) {
  ModelConfig model = Model("m", 1, {1});
  model.hit_rate_threshold = 0.5;
  model.gpucacheper = 1.0;
  auto server = Open({model});
  const LookupSession session = Value(server->NewSession("m"));
  EXPECT_TRUE(Look(session, 1, KeyRange(0, 100)).AllOf(1)) << "below the threshold: exact";
  const DeviceAnswer deferred = Look(session, 1, KeyRange(0, 110));
  EXPECT_EQ(deferred.report.rows_deferred, 10u);
  EXPECT_EQ(std::count(deferred.versions.begin(), deferred.versions.end(), 0), 10);
  const auto inserted = [&] { return Json::parse(server->StatsJson())["devices"][0]["inserts"]["inserted"] == 10; };
  WaitUntil(inserted, "the inserts");
  WaitUntil([&] { return Look(session, 1, KeyRange(100, 10)).report.rows_from_cache == 10; }, "their rows");
  ASSERT_OK(Update(*server, "m", KeyRange(0, 5), 2));
  ASSERT_OK(server->EraseRows("m", 0, KeyRange(5, 2)));
  ASSERT_OK(server->RefreshCaches("m"));
  const std::string text = server->PrometheusText();
  const auto expect = [&](const std::string& line) {
    EXPECT_NE(text.find(line + "\n"), std::string::npos) << line << " is not in\n" << text;
  };
  const Json counts = Json::parse(server->StatsJson())["models"][0]["devices"][0]["caches"][0];
  EXPECT_EQ(counts["rows_deferred"], 10);
  EXPECT_EQ(counts["rows_missed"], 100);
  EXPECT_EQ(counts["keys_asked"].get<uint64_t>(),
            counts["rows_served"].get<uint64_t>() + 110 + counts["rows_repeated"].get<uint64_t>());
  EXPECT_EQ(counts["hit_rate"].get<double>(), counts["rows_served"].get<double>() / counts["keys_asked"].get<double>());
  for (const char* name : {"keys_asked", "rows_served", "rows_missed", "rows_deferred", "rows_defaulted"}) {
    expect("hps_cache_" + std::string(name) + "_total{model=\"m\",table=\"t0\",device=\"1\"} " + counts[name].dump());
  }
  expect("hps_cache_rows_inserted_total{model=\"m\",table=\"t0\",device=\"1\"} 10");
  expect("hps_cache_rows_updated_total{model=\"m\",table=\"t0\",device=\"1\"} 5");
  expect("hps_cache_rows_erased_total{model=\"m\",table=\"t0\",device=\"1\"} 2");
  expect("hps_cache_rows_refreshed_total{model=\"m\",table=\"t0\",device=\"1\"} 108");
  expect("hps_cache_keys_inserted_total{device=\"1\"} 10");
  expect("hps_cache_keys_queued_count{device=\"1\"} 0");
  expect("hps_device_alive_state{device=\"1\"} 1");
  expect("hps_workspaces_lent_count{model=\"m\",device=\"1\"} 0");
  expect("hps_keys_asked_total{model=\"m\",table=\"t0\"} " +
         std::to_string(Json::parse(server->StatsJson())["models"][0]["tables"][0]["keys"].get<uint64_t>()));
  for (size_t at = text.find("# TYPE "); at != std::string::npos; at = text.find("# TYPE ", at + 1)) {
    const std::string name = text.substr(at + 7, text.find(' ', at + 7) - at - 7);
    EXPECT_NE(text.find("# HELP " + name + " "), std::string::npos) << name << " is not explained";
  }
  // Counters go on when the model is replaced; what it holds is not counted twice.
  ASSERT_OK(server->ReplaceModel(Model("m", 3, {1})));
  const std::string after = server->PrometheusText();
  EXPECT_NE(after.find("hps_cache_rows_updated_total{model=\"m\",table=\"t0\",device=\"1\"} 5\n"), std::string::npos);
  ASSERT_OK(server->UnloadModel("m"));
  EXPECT_NE(server->PrometheusText().find("hps_cache_memory_bytes{model=\"m\",table=\"t0\",device=\"1\"} 0\n"),
            std::string::npos);
}

// ---- graphs -----------------------------------------------------------------------------------------------------

TEST_P(DeviceServerSuite, LookupsOfStaticTablesAreCapturedAndReplayed) {
  ModelConfig fixed = Model("fixed", 1, {0}, {1000, 300});
  fixed.cache_type = CacheType::kStatic;
  auto server = Open({fixed, Model("m", 1, {0})});
  const LookupSession session = Value(server->NewSession("fixed"));
  constexpr uint32_t kCount = 50;
  cuda::Device& device = *devices_[0];
  const TestStream stream(device);
  DeviceArray<Key> keys(device, kCount), other_keys(device, kCount), wide_keys(device, kCount);
  DeviceArray<int32_t> short_keys(device, kCount);
  const DeviceArray<float> rows(device, kCount * kWidth), other_rows(device, kCount * kWidth),
      short_rows(device, kCount * kWidth);
  const DeviceLookupPart one{.width = kWidth, .keys = keys.get(), .count = kCount, .rows = rows.get()};
  DeviceLookupPart other = one, narrow = one;
  other.table = 1;
  other.keys = other_keys.get();
  other.rows = other_rows.get();
  narrow.key_bytes = 4;
  narrow.keys = short_keys.get();
  narrow.wide_keys = wide_keys.get();
  narrow.rows = short_rows.get();
  for (const std::vector<DeviceLookupPart>& parts : {std::vector{one}, std::vector{one, other, narrow}}) {
    ASSERT_EQ(GetParam().begin_capture(devices_[0]->inner(), stream.get()), 0);
    LookupReport report;
    const Status status = session.LookupOnDevice(0, parts, stream.get(), {}, &report);
    // Others look up meanwhile, and get caches filled.
    std::thread beside([&] { EXPECT_TRUE(Look(*server, "m", 0, kSome).AllOf(1)); });
    beside.join();
    const ServerFixture::Graph graph = GetParam().end_capture(devices_[0]->inner(), stream.get());
    ASSERT_OK(status);
    EXPECT_EQ(report.rows_unwaited, parts.size() * kCount);
    ASSERT_NE(graph, nullptr);

    const auto replay = [&](Key first, int version, Key changed, int changed_version) {
      const std::vector<Key> asked = KeyRange(first, kCount);
      keys.Set(asked);
      other_keys.Set(asked);
      short_keys.Set({asked.begin(), asked.end()});
      EXPECT_EQ(graph(stream.get()), 0);
      for (const DeviceLookupPart& part : parts) {
        const Key end = part.table == 0 ? 1000 : 300;
        const DeviceArray<float>& answer = part.rows == rows.get()         ? rows
                                           : part.rows == other_rows.get() ? other_rows
                                                                           : short_rows;
        const std::vector<float> values = answer.Get(stream.get());
        for (size_t i = 0; i < kCount; ++i) {
          const int expected = asked[i] >= end ? 0 : part.table == 0 && asked[i] == changed ? changed_version : version;
          ASSERT_EQ(VersionOf(asked[i], values.data() + i * kWidth), expected) << "key " << asked[i];
        }
      }
    };
    replay(0, 1, -1, 0);
    replay(270, 1, -1, 0);  // table 1 ends at 300
    replay(980, 1, -1, 0);  // and table 0 at 1000
    ASSERT_OK(Update(*server, "fixed", {290}, 2));
    replay(270, 1, 290, 2);
    ASSERT_OK(Update(*server, "fixed", {290}, 1));
    replay(270, 1, 290, 1);
    EXPECT_TRUE(Look(*server, "fixed", 0, kSome).AllOf(1)) << "the same without the graph";
  }
}

TEST_P(DeviceServerSuite, LookupsThatWaitAreRefusedWhileTheStreamIsCaptured) {
  ModelConfig fixed = Model("fixed", 1, {0});
  fixed.cache_type = CacheType::kStatic;
  auto server = Open({fixed, Model("m", 2, {0})});
  const LookupSession still = Value(server->NewSession("fixed"));
  const LookupSession moving = Value(server->NewSession("m"));
  cuda::Device& device = *devices_[0];
  const TestStream stream(device);
  const DeviceArray<Key> keys(device, kSome);
  const DeviceArray<int32_t> short_keys(device, std::vector<int32_t>(kSome.begin(), kSome.end()));
  const DeviceArray<Key> wide_keys(device, kSome.size());
  const DeviceArray<float> rows(device, kSome.size() * kWidth);
  const DeviceArray<int64_t> splits(device, std::vector<int64_t>{0, 20, 50});
  const DeviceLookupPart part{.width = kWidth, .keys = keys.get(), .count = 50, .rows = rows.get()};
  DeviceLookupPart narrow = part;
  narrow.key_bytes = 4;
  narrow.keys = short_keys.get();
  narrow.wide_keys = wide_keys.get();
  const DeviceSparsePart pooled{.width = kWidth,
                                .keys = keys.get(),
                                .count = 50,
                                .rows = 2,
                                .row_splits = splits.get(),
                                .combiner = Combiner::kSum,
                                .output = rows.get()};
  ASSERT_EQ(GetParam().begin_capture(devices_[0]->inner(), stream.get()), 0);
  const Status captured = still.LookupOnDevice(0, std::span(&part, 1), stream.get());
  const Status dynamic = moving.LookupOnDevice(0, std::span(&part, 1), stream.get());
  const Status widened = moving.LookupOnDevice(0, std::span(&narrow, 1), stream.get());
  const Status sums = still.LookupSparseOnDevice(0, std::span(&pooled, 1), stream.get());
  const ServerFixture::Graph graph = GetParam().end_capture(devices_[0]->inner(), stream.get());
  ASSERT_OK(captured);
  for (const Status& refused : {dynamic, widened}) {
    ExpectError(refused, StatusCode::kFailedPrecondition,
                {"model 'm'", "table 't0'", "CUDA graph", "before or behind", "\"embedding_cache_type\": \"static\""});
  }
  ExpectError(sums, StatusCode::kFailedPrecondition, {"model 'fixed'", "pooled", "CUDA graph"});

  // The capture is as good as without them, and so is the device.
  ASSERT_NE(graph, nullptr);
  EXPECT_EQ(graph(stream.get()), 0);
  const std::vector<float> values = rows.Get(stream.get());
  for (size_t i = 0; i < kSome.size(); ++i) EXPECT_EQ(VersionOf(kSome[i], values.data() + i * kWidth), 1);
  EXPECT_TRUE(Look(moving, 0, kSome).AllOf(2));
  ASSERT_OK(still.LookupSparseOnDevice(0, std::span(&pooled, 1), stream.get()));
  EXPECT_EQ(device.SynchronizeStream(stream.get()), 0);
  EXPECT_TRUE(server->CheckReadiness().ready);
}

// ---- versions ---------------------------------------------------------------------------------------------------

TEST_P(DeviceServerSuite, AModelIsReplacedUnderLookups) {
  const auto version_of = [&](uint32_t version) {
    ModelConfig model = Model("m", version, {0, 1});
    model.init_ec = version % 2 == 0;
    if (version % 3 == 0) model.cache_type = CacheType::kStatic;
    return model;
  };
  auto server = Open({version_of(1)}, Tiers::kBoth);
  std::atomic<bool> stop{false};
  std::atomic<int> lookups{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const LookupSession session = Value(server->NewSession("m"));
      int last = 0;
      for (Key first = t; !stop; first = (first + 61) % 900) {
        const DeviceAnswer answer = Look(session, t % kNumDevices, KeyRange(first, 100));
        ASSERT_OK(answer.status);
        const int version = answer.versions[0];
        ASSERT_GE(version, std::max(last, 1)) << "a version came back";
        ASSERT_TRUE(answer.AllOf(version)) << "rows of two versions in one call";
        last = version;
        ++lookups;
      }
    });
  }
  for (uint32_t version = 2; version <= 7; ++version) {
    const int before = lookups;
    ASSERT_OK(server->ReplaceModel(version_of(version)));
    WaitUntil([&] { return lookups > before + 8 || ::testing::Test::HasFailure(); }, "lookups");
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(Look(*server, "m", 0, kKeys).AllOf(7));
  ASSERT_OK(server->UnloadModel("m"));
  for (int device = 0; device < kNumDevices; ++device) EXPECT_EQ(Bytes(device), kWriterBytes) << "caches are left";
}

// What waits in the queue or is being refreshed must not keep an old version's caches.
TEST_P(DeviceServerSuite, AnUnloadedModelLeavesNothingInTheBackground) {
  ModelConfig model = Model("m", 1, {0});
  model.hit_rate_threshold = 0.0;
  model.refresh_interval_seconds = 0.001;
  ServerConfig config = Config({model}, Tiers::kPersistent);
  auto server = Value(ParameterServer::Open(config, Options()));
  faults_->Hang();
  // One batch is being fetched, another one waits.
  ASSERT_EQ(Look(*server, "m", 0, KeyRange(0, 500)).report.rows_deferred, 500u);
  WaitUntil([&] { return faults_->fetches() > 0; }, "the fetch");
  ASSERT_EQ(Look(*server, "m", 0, KeyRange(500, 500)).report.rows_deferred, 500u);
  // Unloading waits for nobody: what fetches is told to give up.
  std::thread unload([&] { EXPECT_EQ(server->UnloadModel("m").code(), StatusCode::kOk); });
  unload.join();
  EXPECT_EQ(Bytes(0), kWriterBytes);
  faults_->Heal();
}

TEST_P(DeviceServerSuite, ClosingEndsLookupsOnDevices) {
  auto server = Open({Model("m", 1, {0})});
  const auto session = std::make_unique<LookupSession>(Value(server->NewSession("m")));
  EXPECT_TRUE(Look(*session, 0, kSome).AllOf(1));
  ASSERT_OK(server->Close());
  ExpectError(Look(*session, 0, kSome).status, StatusCode::kFailedPrecondition, {"closed"});
  ExpectError(Update(*server, "m", {1}, 2), StatusCode::kFailedPrecondition, {"closed"});
  EXPECT_EQ(devices_[0]->allocations(), 0u);
}

// ---- updates ----------------------------------------------------------------------------------------------------

TEST_P(DeviceServerSuite, UpdatesReachTheCachesOfEveryDevice) {
  for (const Tiers tiers : {Tiers::kVolatile, Tiers::kPersistent, Tiers::kBoth}) {
    ModelConfig model = Model("m", 1, {0, 1});
    ModelConfig fixed = Model("fixed", 1, {0});
    fixed.cache_type = CacheType::kStatic;
    auto server = Open({model, fixed}, tiers);
    for (int device : {0, 1}) ASSERT_TRUE(Look(*server, "m", device, kSome).AllOf(1));
    ASSERT_OK(Update(*server, "m", {105, 106, 7, 5000}, 2));
    ASSERT_OK(Update(*server, "fixed", {105}, 2));
    const auto check = [&](const std::vector<Key>& keys, const std::vector<int>& versions) {
      for (int device : {0, 1}) EXPECT_EQ(Look(*server, "m", device, keys).versions, versions) << device;
      const Rows rows = Lookup(*server, "m", 0, kWidth, keys);
      for (size_t i = 0; i < keys.size(); ++i) EXPECT_EQ(VersionOf(keys[i], rows.row(i).data()), versions[i]);
    };
    check({104, 105, 106, 7, 5000}, {1, 2, 2, 2, 2});
    EXPECT_EQ(Look(*server, "fixed", 0, {104, 105}).versions, (std::vector<int>{1, 2}));
    ASSERT_OK(server->EraseRows("m", 0, std::vector<Key>{106, 8, 6000}));
    check({105, 106, 7, 8}, {2, 0, 2, 0});
    ExpectError(server->EraseRows("m", 4, kSome), StatusCode::kInvalidArgument, {"no table 4"});
    const float row = 0;
    ExpectError(server->UpdateRows("m", 0, kSome, {nullptr, kWidth * sizeof(float)}), StatusCode::kInvalidArgument,
                {"model 'm'", "no memory for their rows"});
    ExpectError(server->UpdateRows("m", 0, kSome, {reinterpret_cast<const std::byte*>(&row), 4}),
                StatusCode::kInvalidArgument, {"table 't0'", "4 bytes", "16"});
    ExpectError(server->EraseRows("x", 0, kSome), StatusCode::kNotFound, {"'x'", "'m'"});
    faults_->Fail(Unavailable("the tier is down"));
    ExpectError(Update(*server, "m", {1}, 2), StatusCode::kUnavailable, {"table 't0'", "the tier is down"});
    faults_->Heal();
    ASSERT_OK(server->Close());
    fs::remove_all(folder_ / "database");
  }
}

// Rows of one key never go back, on any device, whatever lookups bring in meanwhile.
TEST_P(DeviceServerSuite, UpdatesUnderLookups) {
  ModelConfig model = Model("m", 1, {0, 1});
  model.gpucacheper = 0.1;  // much is evicted and fetched again
  auto server = Open({model}, Tiers::kBoth);
  std::atomic<bool> stop{false};
  std::atomic<int> written{1};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const LookupSession session = Value(server->NewSession("m"));
      for (Key first = t * 100; !stop; first = (first + 53) % 900) {
        const int before = written;
        const DeviceAnswer answer = Look(session, t % kNumDevices, KeyRange(first, 100));
        ASSERT_OK(answer.status);
        for (const int version : answer.versions) ASSERT_GE(version, before);
      }
    });
  }
  for (int version = 2; version <= 25; ++version) {
    ASSERT_OK(Update(*server, "m", kKeys, static_cast<uint32_t>(version)));
    written = version;
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  for (int device : {0, 1}) EXPECT_TRUE(Look(*server, "m", device, kKeys).AllOf(25));
}

// The tables of the new version have been filled when the update comes, and its caches are being made.
TEST_P(DeviceServerSuite, RefreshBringsInWhatOthersWroteToTheTiers) {
  ModelConfig model = Model("m", 1, {0, 1});
  ModelConfig fixed = Model("fixed", 1, {0});
  fixed.cache_type = CacheType::kStatic;
  auto server = Open({model, fixed});
  for (int device : {0, 1}) ASSERT_TRUE(Look(*server, "m", device, kSome).AllOf(1));
  WriteTier("volatile", "hps_et.m.t0", kSome, 2);
  EXPECT_TRUE(Look(*server, "m", 0, kSome).AllOf(1));
  ASSERT_OK(server->RefreshCaches("m", 0));
  EXPECT_TRUE(Look(*server, "m", 0, kSome).AllOf(2));
  EXPECT_TRUE(Look(*server, "m", 1, kSome).AllOf(1));
  ASSERT_OK(server->RefreshCaches("m"));
  EXPECT_TRUE(Look(*server, "m", 1, kSome).AllOf(2));
  ExpectError(server->RefreshCaches("fixed"), StatusCode::kFailedPrecondition, {"static", "replace"});
  ExpectError(server->RefreshCaches("m", 2), StatusCode::kInvalidArgument,
              {"device 2", "deployed_device_list is 0, 1"});
  ExpectError(server->RefreshCaches("x"), StatusCode::kNotFound, {"'x'"});
  const std::atomic<bool> cancelled{true};
  ExpectError(server->RefreshCaches("m", std::nullopt, &cancelled), StatusCode::kCancelled);
}

TEST_P(DeviceServerSuite, CachesAreRefreshedByThemselves) {
  ModelConfig again = Model("again", 1, {0});
  again.refresh_interval_seconds = 0.001;
  ModelConfig later = Model("later", 1, {1});
  later.refresh_delay_seconds = 3600;
  auto server = Open({again, later});
  ASSERT_TRUE(Look(*server, "again", 0, kSome).AllOf(1));
  ASSERT_TRUE(Look(*server, "later", 1, kSome).AllOf(1));
  for (uint32_t version = 2; version < 5; ++version) {
    WriteTier("volatile", "hps_et.again.t0", kSome, version);
    WaitUntil([&] { return Look(*server, "again", 0, kSome).AllOf(static_cast<int>(version)); }, "the refresh");
  }
  WriteTier("volatile", "hps_et.later.t0", kSome, 2);
  EXPECT_TRUE(Look(*server, "later", 1, kSome).AllOf(1));
  EXPECT_GT(Json::parse(server->StatsJson())["refresher"]["refreshes"], 0);
}

TEST_P(DeviceServerSuite, WorkspacesOfLargeBatchesAreGivenBack) {
  const auto source = Source();
  source->trim_interval = std::chrono::milliseconds(1);
  ServerOptions options = Options();
  options.devices = source;
  auto server = Value(ParameterServer::Open(Config({Model("m", 1, {0})}), options));
  const uint64_t bytes = Bytes(0);
  EXPECT_TRUE(Look(*server, "m", 0, kKeys).AllOf(1));
  WaitUntil([&] { return Bytes(0) == bytes; }, "the memory of the batch");
}

// ---- failures ---------------------------------------------------------------------------------------------------

TEST_P(DeviceServerSuite, AForkedChildIsRefusedAndHarmsNothing) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "threads in a forked child are not for the thread sanitizer";
#endif
  ModelConfig model = Model("m", 1, {0, 1});
  model.refresh_interval_seconds = 0.001;
  model.hit_rate_threshold = 0.0;
  auto server = Open({model});
  auto session = std::make_unique<LookupSession>(Value(server->NewSession("m")));
  ASSERT_OK(Look(*session, 0, kKeys).status);
  EXPECT_EQ(InChild([&] {
              const DeviceLookupPart part{.width = kWidth};
              if (!Refused(session->LookupOnDevice(0, std::span(&part, 1), nullptr))) return 1;
              if (!Refused(server->EraseRows("m", 0, kSome))) return 2;
              if (!Refused(server->RefreshCaches("m"))) return 3;
              if (!server->Close().ok()) return 4;
              // Letting go of what the parent made must not wait for its threads, nor touch its devices.
              server.reset();
              session.reset();
              return 0;
            }),
            0);
  WaitUntil([&] { return Look(*session, 1, kSome).AllOf(1); }, "deferred rows");
  // A session whose server is gone is the last to hold what the server had.
  auto gone = Open({Model("gone", 1, {0})});
  auto left = std::make_unique<LookupSession>(Value(gone->NewSession("gone")));
  gone.reset();
  EXPECT_EQ(InChild([&] {
              left.reset();
              return 0;
            }),
            0);
  ASSERT_OK(server->UnloadModel("m"));
  EXPECT_EQ(Bytes(0), kWriterBytes);
}

}  // namespace hps::testing
