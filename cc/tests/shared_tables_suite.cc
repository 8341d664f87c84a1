// Models that name the same folders and share tables, at the session: one copy of rows and caches, updates that all of
// them see, and each of them loaded, replaced and unloaded by itself.

#include <gtest/gtest.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>

#include "cc/cache/cache_plan.h"
#include "cc/core/shared_tables.h"
#include "cc/tests/device_server_suite.h"

namespace hps::testing {
namespace {

// `rows`, written once, as a model of another name.
ModelConfig Sharing(ModelConfig rows, const std::string& name, std::vector<int32_t> devices) {
  rows.name = name;
  rows.share_tables = true;
  rows.deployed_devices = std::move(devices);
  return rows;
}

uint64_t Planned(const ModelConfig& model, CacheParts parts, std::vector<uint64_t> rows = {1000}) {
  return Value(PlanCaches(model, rows, kNumDevices, parts))[0].device_bytes;
}

Json Stats(const ParameterServer& server) { return Json::parse(server.StatsJson()); }

}  // namespace

TEST_P(SharedTablesSuite, OneCopyOfRowsAndCaches) {
  for (const Tiers tiers : {Tiers::kVolatile, Tiers::kPersistent, Tiers::kBoth}) {
    ModelConfig rows = Model("rows", 1, {0, 1}, {1000, 300});
    rows.init_ec = true;
    const std::vector<uint64_t> counts = {1000, 300};
    const uint64_t needed =
        kWriterBytes + Planned(rows, CacheParts::kTables, counts) + 2 * Planned(rows, CacheParts::kWorkspaces, counts);
    const std::vector<ModelConfig> models = {Sharing(rows, "a", {0, 1}), Sharing(rows, "b", {0, 1})};
    OpenDevices(needed - 1);
    const uint64_t upserts = faults_->upserts();
    ExpectError(ParameterServer::Open(Config(models, tiers), Options()).status(), StatusCode::kResourceExhausted,
                {std::to_string(needed) + " bytes"});
    EXPECT_EQ(faults_->upserts(), upserts) << "nothing was loaded";
    OpenDevices(needed);
    ASSERT_OK(Open(models, tiers)->Close());
    fs::remove_all(folder_ / "database");
    OpenDevices();
    auto server = Open(models, tiers);
    for (int device = 0; device < kNumDevices; ++device) {
      EXPECT_EQ(Bytes(device), needed);
      // What one model brings in the other one hits.
      ASSERT_TRUE(Look(*server, "a", device, kSome).AllOf(1));
      const DeviceAnswer other = Look(*server, "b", device, kSome);
      EXPECT_TRUE(other.AllOf(1));
      EXPECT_GE(other.report.rows_from_cache, kSome.size() - 10);
      EXPECT_TRUE(Look(*server, "b", device, KeyRange(0, 300), 1).AllOf(1));
    }
    for (const char* model : {"a", "b"}) ExpectRows(Lookup(*server, model, 0, kWidth, kKeys), kKeys, 1);

    // The report: sizes once, lookups by model.
    const Json stats = Stats(*server);
    ASSERT_EQ(stats["shared_tables"].size(), 2u);
    const Json shared = stats["shared_tables"][0];
    EXPECT_EQ(shared["models"], Json({"a", "b"}));
    EXPECT_EQ(shared["folder"], fs::canonical(rows.tables[0].path).string());
    EXPECT_EQ(shared["name"], SharedTableName(rows.tables[0].path));
    const char* const tier = tiers == Tiers::kPersistent ? "persistent" : "volatile";
    EXPECT_EQ(shared["table"][tier]["rows"], 1000);
    EXPECT_EQ(shared["table"]["load"]["rows_read"], 1000);
    ASSERT_EQ(shared["devices"].size(), 2u);
    EXPECT_GT(shared["devices"][1]["caches"][0]["memory_bytes"], 0);
    for (const Json& model : stats["models"]) {
      const Json& table = model["tables"][0];
      EXPECT_EQ(table["shared"], shared["name"]);
      EXPECT_EQ(table["load"]["source"], "shared");
      EXPECT_EQ(table["keys"], kKeys.size() + 2 * kSome.size());
      EXPECT_FALSE(table[tier].contains("memory_bytes"));
      EXPECT_EQ(model["devices"][0]["caches"][0], Json({{"table", "t0"}, {"shared", shared["name"]}}));
    }
    const std::string text = server->PrometheusText();
    EXPECT_NE(text.find("hps_cache_memory_bytes{model=\"" + SharedTableName(rows.tables[1].path) +
                        "\",table=\"rows\",device=\"1\"} "),
              std::string::npos);
    EXPECT_EQ(text.find("hps_cache_memory_bytes{model=\"a\""), std::string::npos);
    // Hits are the cache's, whoever asked.
    EXPECT_EQ(shared["devices"][0]["caches"][0]["keys_asked"], 2 * kSome.size());
    EXPECT_NE(text.find("hps_keys_asked_total{model=\"b\",table=\"t0\"} 1100\n"), std::string::npos);
    EXPECT_EQ(text.find("hps_cache_keys_asked_total{model=\"b\""), std::string::npos);

    for (const char* model : {"a", "b"}) ASSERT_OK(server->UnloadModel(model));
    EXPECT_FALSE(Stats(*server).contains("shared_tables"));
    for (int device = 0; device < kNumDevices; ++device) EXPECT_EQ(Bytes(device), kWriterBytes);
    ASSERT_OK(server->Close());
    fs::remove_all(folder_ / "database");
  }
}

TEST_P(SharedTablesSuite, ModelsThatDoNotSayThatTheyShareDoNot) {
  const ModelConfig rows = Model("rows", 1, {0});
  ModelConfig own = Sharing(rows, "own", {0});
  own.share_tables = false;
  own.gpucacheper = 1.0;  // need not fit the others'
  auto server = Open({Sharing(rows, "a", {0}), own, Sharing(rows, "b", {0})});
  EXPECT_EQ(Bytes(0), kWriterBytes + Planned(rows, CacheParts::kTables) + 2 * Planned(rows, CacheParts::kWorkspaces) +
                          Planned(own, CacheParts::kAll));
  ASSERT_OK(Update(*server, "a", kSome, 2));
  ASSERT_OK(Update(*server, "own", kSome, 3));
  for (const auto& [model, version] : {std::pair("a", 2), {"b", 2}, {"own", 3}}) {
    EXPECT_TRUE(Look(*server, model, 0, kSome).AllOf(version)) << model;
    ExpectRows(Lookup(*server, model, 0, kWidth, kSome), kSome, static_cast<uint32_t>(version));
  }
  const Json stats = Stats(*server);
  EXPECT_EQ(stats["shared_tables"].size(), 1u);
  EXPECT_EQ(stats["models"][1]["name"], "b");
  EXPECT_EQ(stats["models"][2]["tables"][0]["volatile"]["rows"], 1000);
}

TEST_P(SharedTablesSuite, UpdatesThroughOneModelReachAllOnEveryDevice) {
  for (const Tiers tiers : {Tiers::kVolatile, Tiers::kPersistent, Tiers::kBoth}) {
    for (const CacheType type : {CacheType::kDynamic, CacheType::kStatic}) {
      ModelConfig rows = Model("rows", 1, {0});
      rows.cache_type = type;
      // Each has a device that the other one has not, and one has none.
      auto server = Open({Sharing(rows, "a", {0}), Sharing(rows, "b", {1}), Sharing(rows, "c", {})}, tiers);
      ASSERT_TRUE(Look(*server, "a", 0, kSome).AllOf(1));
      ASSERT_TRUE(Look(*server, "b", 1, kSome).AllOf(1));
      ExpectError(Look(*server, "a", 1, kSome).status, StatusCode::kInvalidArgument, {"model 'a'", "device 1"});
      ASSERT_OK(Update(*server, "a", {105, 106}, 2));
      ASSERT_OK(Update(*server, "b", {107}, 3));
      ASSERT_OK(Update(*server, "c", {108}, 4));
      ASSERT_OK(server->EraseRows("c", 0, std::vector<Key>{109}));
      const std::vector<Key> keys = {104, 105, 106, 107, 108, 109};
      const std::vector<int> versions = {1, 2, 2, 3, 4, 0};
      EXPECT_EQ(Look(*server, "a", 0, keys).versions, versions);
      EXPECT_EQ(Look(*server, "b", 1, keys).versions, versions);
      for (const char* model : {"a", "b", "c"}) {
        const Rows found = Lookup(*server, model, 0, kWidth, keys);
        for (size_t i = 0; i < keys.size(); ++i) EXPECT_EQ(VersionOf(keys[i], found.row(i).data()), versions[i]);
      }
      ExpectError(Update(*server, "a", {1}, 2, 3), StatusCode::kInvalidArgument, {"model 'a'", "no table 3"});
      faults_->Fail(Unavailable("the tier is down"));
      ExpectError(Update(*server, "b", {1}, 2), StatusCode::kUnavailable, {"model 'b', table 't0'", "tier is down"});
      faults_->Heal();
      ASSERT_OK(server->Close());
      ExpectError(Update(*server, "b", {1}, 2), StatusCode::kFailedPrecondition, {"closed"});
      for (const auto& device : devices_) EXPECT_EQ(device->allocations(), 0u);
      fs::remove_all(folder_ / "database");
    }
  }
}

TEST_P(SharedTablesSuite, CachesComeAndGoWithTheModelsOfADevice) {
  const ModelConfig rows = Model("rows", 1, {0});
  const uint64_t cache = Planned(rows, CacheParts::kTables), buffers = Planned(rows, CacheParts::kWorkspaces);
  auto server = Open({Sharing(rows, "a", {0})}, Tiers::kBoth);
  EXPECT_EQ(Bytes(1), 0u);
  const auto updated = [&](int device) {
    const std::string line = "hps_cache_rows_updated_total{model=\"" + SharedTableName(rows.tables[0].path) +
                             "\",table=\"rows\",device=\"" + std::to_string(device) + "\"} ";
    const std::string text = server->PrometheusText();
    return std::stoull(text.substr(text.find(line) + line.size()));
  };
  ASSERT_TRUE(Look(*server, "a", 0, kSome).AllOf(1));
  ASSERT_OK(Update(*server, "a", kSome, 1));
  const uint64_t before = updated(0);
  EXPECT_GT(before, 0u);
  ASSERT_OK(server->LoadModel(Sharing(rows, "b", {1, 0})));
  EXPECT_EQ(Bytes(0), kWriterBytes + cache + 2 * buffers);
  EXPECT_EQ(Bytes(1), kWriterBytes + cache + buffers);
  EXPECT_GE(Look(*server, "b", 0, kSome).report.rows_from_cache, kSome.size() - 10) << "the cache there stays";
  ASSERT_TRUE(Look(*server, "b", 1, kSome).AllOf(1));
  EXPECT_EQ(updated(0), before) << "counted on";
  ASSERT_OK(server->LoadModel(Sharing(rows, "c", {})));
  ASSERT_OK(server->UnloadModel("b"));
  EXPECT_EQ(Bytes(0), kWriterBytes + cache + buffers);
  EXPECT_EQ(Bytes(1), kWriterBytes);
  EXPECT_EQ(updated(0), before);
  ASSERT_OK(Update(*server, "c", kSome, 2));
  EXPECT_TRUE(Look(*server, "a", 0, kSome).AllOf(2));
  ASSERT_OK(server->UnloadModel("a"));
  EXPECT_EQ(Bytes(0), kWriterBytes);
  ExpectRows(Lookup(*server, "c", 0, kWidth, kSome), kSome, 2);
  // Without caches nobody says any more how they must be.
  ModelConfig whole = Sharing(rows, "whole", {0});
  whole.cache_type = CacheType::kStatic;
  ASSERT_OK(server->LoadModel(whole));
  EXPECT_TRUE(Look(*server, "whole", 0, kSome).AllOf(2));
  EXPECT_EQ(Look(*server, "whole", 0, kKeys).report.rows_unwaited, kKeys.size());
}

TEST_P(SharedTablesSuite, EachAllocationOfALoadMayFail) {
  const ModelConfig rows = Model("rows", 1, {0}, {100, 10});
  ModelConfig model = Sharing(rows, "b", {0, 1});
  auto server = Open({Sharing(rows, "a", {0})});
  const uint64_t bytes = Bytes(0);
  int failed = 0;
  for (uint64_t n = 1;; ++n) {
    devices_[1]->FailAllocation(n);
    const Status status = server->LoadModel(model);
    if (status.ok()) break;
    ++failed;
    ExpectError(status, StatusCode::kResourceExhausted, {"model 'b'", "device 1", "bytes of"});
    EXPECT_EQ(Bytes(0), bytes);
    EXPECT_LE(Bytes(1), kWriterBytes);
    EXPECT_EQ(Stats(*server)["shared_tables"][0]["models"], Json({"a"}));
    ASSERT_OK(Update(*server, "a", {static_cast<Key>(n)}, 2));
    ASSERT_LT(n, 50u);
  }
  devices_[1]->FailAllocation(0);
  EXPECT_GE(failed, 6);
  EXPECT_EQ(Look(*server, "b", 1, {1, 99}).versions, (std::vector<int>{2, 1}));
}

TEST_P(SharedTablesSuite, OneModelIsReplacedAndTheOtherKeepsWhatItHas) {
  for (const Tiers tiers : {Tiers::kVolatile, Tiers::kPersistent, Tiers::kBoth}) {
    const ModelConfig rows = Model("rows", 1, {0});
    const ModelConfig a = Sharing(rows, "a", {0}), b = Sharing(rows, "b", {0});
    auto server = Open({a, b}, tiers);
    const uint64_t bytes = Bytes(0);
    const auto expect = [&](const std::string& model, const std::vector<Key>& keys, const std::vector<int>& versions) {
      EXPECT_EQ(Look(*server, model, 0, keys).versions, versions) << model;
      const Rows found = Lookup(*server, model, 0, kWidth, keys);
      for (size_t i = 0; i < keys.size(); ++i) EXPECT_EQ(VersionOf(keys[i], found.row(i).data()), versions[i]);
    };
    // The folder is what it was: nothing is loaded, and what was updated stays.
    ASSERT_OK(Update(*server, "b", {105}, 2));
    const uint64_t upserts = faults_->upserts();
    ASSERT_OK(server->ReplaceModel(a));
    EXPECT_EQ(faults_->upserts(), upserts);
    EXPECT_EQ(Bytes(0), bytes);
    EXPECT_EQ(Stats(*server)["models"][0]["version"], 2);
    expect("a", {104, 105}, {1, 2});
    // It has changed: the new rows are of the model that is replaced only.
    WriteTable(rows.tables[0].path, KeyRange(0, 1000), kWidth, 3);
    ASSERT_OK(server->ReplaceModel(a));
    expect("a", {104, 105}, {3, 3});
    expect("b", {104, 105}, {1, 2});
    ASSERT_OK(Update(*server, "b", {106}, 4));
    ASSERT_OK(Update(*server, "a", {107}, 5));
    expect("a", {104, 106, 107}, {3, 3, 5});
    expect("b", {104, 106, 107}, {1, 4, 1});
    EXPECT_EQ(Stats(*server)["shared_tables"].size(), 2u);
    EXPECT_EQ(Bytes(0), bytes + Planned(rows, CacheParts::kTables));
    // Until the other one is replaced as well.
    ASSERT_OK(server->ReplaceModel(b));
    expect("b", {104, 106, 107}, {3, 3, 5});
    EXPECT_EQ(Bytes(0), bytes);
    const Json shared = Stats(*server)["shared_tables"];
    ASSERT_EQ(shared.size(), 1u);
    EXPECT_EQ(shared[0]["models"], Json({"a", "b"}));
    if (tiers != Tiers::kVolatile) {
      // The database has the newest alone.
      EXPECT_EQ(Value(stores_.at("persistent")->ListTables()).size(), 1u);
      ASSERT_OK(server->Close());
      server = Open({b, a}, tiers);
      expect("a", {104, 106, 107}, {3, 3, 5});
      EXPECT_EQ(Stats(*server)["shared_tables"][0]["table"]["load"]["source"], "persistent");
    }
    // And to another folder.
    ASSERT_OK(server->ReplaceModel(Sharing(Model("others", 6, {0}), "a", {0})));
    expect("a", {104}, {6});
    expect("b", {104, 107}, {3, 5});
    ASSERT_OK(server->UnloadModel("b"));
    expect("a", {104}, {6});
    EXPECT_EQ(Stats(*server)["shared_tables"].size(), 1u);
    ASSERT_OK(server->Close());
    fs::remove_all(folder_ / "database");
  }
}

TEST_P(SharedTablesSuite, AModelBeginsAndEndsToShare) {
  ModelConfig rows = Model("rows", 1, {0});
  const ModelConfig sharing = Sharing(rows, "a", {0});
  ModelConfig own = sharing;
  own.share_tables = false;
  auto server = Open({own, Sharing(rows, "b", {0})}, Tiers::kBoth);
  ASSERT_OK(Update(*server, "b", kSome, 2));
  EXPECT_TRUE(Look(*server, "a", 0, kSome).AllOf(1));
  ASSERT_OK(server->ReplaceModel(sharing));
  EXPECT_TRUE(Look(*server, "a", 0, kSome).AllOf(2));
  ASSERT_OK(server->ReplaceModel(own));
  EXPECT_TRUE(Look(*server, "a", 0, kSome).AllOf(1)) << "its own rows are in the database still";
  EXPECT_TRUE(Look(*server, "b", 0, kSome).AllOf(2));
}

TEST_P(SharedTablesSuite, TwoTablesOfOneModelAreOneFolder) {
  ModelConfig rows = Model("rows", 1, {0});
  rows.tables.push_back(rows.tables[0]);
  rows.tables[1].name = "again";
  rows.tables[1].path += "/.";  // another way to write it
  auto server = Open({Sharing(rows, "a", {0})}, Tiers::kBoth);
  ASSERT_OK(Update(*server, "a", {105}, 2, 1));
  EXPECT_EQ(Look(*server, "a", 0, {104, 105}, 0).versions, (std::vector<int>{1, 2}));
  EXPECT_EQ(Look(*server, "a", 0, {104, 105}, 1).versions, (std::vector<int>{1, 2}));
  EXPECT_EQ(Stats(*server)["shared_tables"].size(), 1u);
  ASSERT_OK(server->UnloadModel("a"));
  EXPECT_EQ(Bytes(0), kWriterBytes);
}

TEST_P(SharedTablesSuite, WhatMustBeTheSameIsRefusedBeforeAnythingIsLoaded) {
  const ModelConfig rows = Model("rows", 1, {0});
  const ModelConfig a = Sharing(rows, "a", {0}), b = Sharing(rows, "b", {1});
  struct Case {
    std::string key, there, here;
    std::function<void(ModelConfig&)> change;
  };
  const std::vector<Case> cases = {
      {"gpucacheper", "0.5", "0.25", [](ModelConfig& m) { m.gpucacheper = 0.25; }},
      {"embedding_cache_type", "dynamic", "uvm", [](ModelConfig& m) { m.cache_type = CacheType::kUvm; }},
      {"init_ec", "false", "true", [](ModelConfig& m) { m.init_ec = true; }},
      {"enable_pagelock", "false", "true", [](ModelConfig& m) { m.enable_pagelock = true; }},
      {"fp8_quant", "false", "true", [](ModelConfig& m) { m.fp8_quant = true; }},
      {"cache_refresh_percentage_per_iteration", "0.1", "0.5",
       [](ModelConfig& m) { m.cache_refresh_percentage_per_iteration = 0.5; }},
      {"refresh_delay", "0", "2", [](ModelConfig& m) { m.refresh_delay_seconds = 2; }},
      {"refresh_interval", "0", "1.5", [](ModelConfig& m) { m.refresh_interval_seconds = 1.5; }},
      {"default_value_for_each_table", "-1", "7", [](ModelConfig& m) { m.tables[0].default_value = 7; }},
      {"embedding_vecsize_per_table", "4", "8", [](ModelConfig& m) { m.tables[0].width = 8; }},
  };
  auto server = Open({a});
  const uint64_t bytes = Bytes(0), upserts = faults_->upserts();
  for (const Case& each : cases) {
    ModelConfig other = b;
    each.change(other);
    const std::vector<std::string> parts = {"model 'b' shares", rows.tables[0].path, "model 'a'", "share_tables",
                                            each.key + " is " + each.there + " there and " + each.here + " here"};
    ExpectError(ParameterServer::Open(Config({a, other}), Options()).status(), StatusCode::kInvalidArgument, parts);
    if (each.key == "embedding_vecsize_per_table") continue;                      // the folder has one width
    const bool plans = each.key != "enable_pagelock" && each.key != "fp8_quant";  // need another type
    ExpectError(server->LoadModel(other), StatusCode::kInvalidArgument, plans ? parts : std::vector{each.key});
    other.deployed_devices.clear();
    if (each.key == "default_value_for_each_table") {
      ExpectError(server->LoadModel(other), StatusCode::kInvalidArgument, parts);
    } else {  // a model without caches does not care
      ASSERT_OK(server->LoadModel(other));
      ASSERT_OK(server->UnloadModel("b"));
    }
  }
  ModelConfig other = a;
  other.gpucacheper = 0.25;
  ExpectError(server->ReplaceModel(other), StatusCode::kInvalidArgument, {"model 'a'", "itself", "gpucacheper"});
  other.tables.push_back(other.tables[0]);
  other.tables[1].name = "again";
  other.tables[1].default_value = 3;
  other.name = "both";
  ExpectError(server->LoadModel(other), StatusCode::kInvalidArgument, {"model 'both'", "itself", "default_value"});
  EXPECT_EQ(Bytes(0), bytes);
  EXPECT_EQ(Bytes(1), 0u);
  EXPECT_EQ(faults_->upserts(), upserts);
  EXPECT_EQ(server->ModelNames(), std::vector<std::string>{"a"});
  // What may differ.
  other = b;
  other.hit_rate_threshold = 0.5;
  other.max_batch_size = 7;
  other.worker_buffers = 3;
  ASSERT_OK(server->LoadModel(other));
  EXPECT_TRUE(Look(*server, "a", 0, kSome).AllOf(1));
}

// Rows of one key never go back, whichever model is asked on whichever device, while models come and go.
TEST_P(SharedTablesSuite, UpdatesUnderLookupsWhileModelsComeAndGo) {
  ModelConfig rows = Model("rows", 1, {0});
  rows.gpucacheper = 0.1;  // much is evicted and fetched again
  auto server = Open({Sharing(rows, "a", {0}), Sharing(rows, "b", {0})});
  constexpr int kVersions = 25;
  std::atomic<int> written{1};
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> lookups{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      const LookupSession session = Value(server->NewSession(t % 2 == 0 ? "a" : "b"));
      for (Key first = t * 100; !stop; first = (first + 37) % 900) {
        const int least = written;
        const DeviceAnswer answer = Look(session, 0, KeyRange(first, 100));
        ASSERT_OK(answer.status);
        for (const int version : answer.versions) ASSERT_GE(version, least) << "an older row, or none of its key";
        ++lookups;
      }
    });
  }
  threads.emplace_back([&] {
    for (int round = 0; !stop; ++round) {
      ASSERT_OK(server->LoadModel(Sharing(rows, "c", {1})));
      const int least = written;
      const DeviceAnswer answer = Look(*server, "c", 1, kKeys);
      ASSERT_OK(answer.status);
      for (const int version : answer.versions) ASSERT_GE(version, least);
      ASSERT_OK(server->UnloadModel("c"));
    }
  });
  for (int version = 2; version <= kVersions && !::testing::Test::HasFailure(); ++version) {
    ASSERT_OK(Update(*server, version % 2 == 0 ? "a" : "b", kKeys, static_cast<uint32_t>(version)));
    written = version;
    const uint64_t before = lookups;
    WaitUntil([&] { return lookups > before + 3 || ::testing::Test::HasFailure(); }, "lookups");
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  for (const char* model : {"a", "b"}) EXPECT_TRUE(Look(*server, model, 0, kKeys).AllOf(kVersions));
  EXPECT_EQ(Bytes(1), kWriterBytes);
}

TEST_P(SharedTablesSuite, RefreshAndDeferredRowsAreThoseOfTheSharedCache) {
  ModelConfig rows = Model("rows", 1, {0});
  ModelConfig later = Sharing(rows, "later", {0});
  later.hit_rate_threshold = 0.0;
  auto server = Open({Sharing(rows, "a", {0}), later}, Tiers::kPersistent);
  EXPECT_EQ(Look(*server, "later", 0, kSome).report.rows_deferred, kSome.size());
  WaitUntil([&] { return Look(*server, "later", 0, kSome).AllOf(1); }, "the deferred rows");
  EXPECT_GE(Look(*server, "a", 0, kSome).report.rows_from_cache, kSome.size() - 10);
  WriteTier("persistent", StoredTableName(SharedTableName(rows.tables[0].path), "rows", 0), kSome, 2);
  ASSERT_OK(server->RefreshCaches("a"));
  EXPECT_TRUE(Look(*server, "later", 0, kSome).AllOf(2));
  // What it waits for ends with the last model of the cache.
  faults_->Hang();
  ASSERT_EQ(Look(*server, "later", 0, KeyRange(500, 100)).report.rows_deferred, 100u);
  ASSERT_OK(server->UnloadModel("later"));
  ASSERT_OK(server->UnloadModel("a"));
  EXPECT_EQ(Bytes(0), kWriterBytes);
  faults_->Heal();
}

}  // namespace hps::testing
