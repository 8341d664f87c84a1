// Shared tables over each kind of store, on the host: names that outlive a server, several nodes, databases that are
// not loaded. What caches have to do with it: shared_tables_suite.cc.

#include "cc/core/shared_tables.h"

#include <sys/mman.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>

#include "cc/tests/core_fixture.h"
#include "cc/tests/redis_service.h"

namespace hps::testing {
namespace {

using Json = nlohmann::json;

constexpr uint32_t kWidth = 4;
const std::vector<Key> kKeys = KeyRange(0, 500);

std::shared_ptr<ParameterServer> Open(const ServerConfig& config) {
  return Value(ParameterServer::Open(config, {.show_progress = false}));
}
Json Shared(const ParameterServer& server) { return Json::parse(server.StatsJson())["shared_tables"]; }

Status Update(ParameterServer& server, const std::string& model, const std::vector<Key>& keys, uint32_t version) {
  std::vector<float> rows;
  for (const Key key : keys) {
    const std::vector<float> row = Row(key, version, kWidth);
    rows.insert(rows.end(), row.begin(), row.end());
  }
  return server.UpdateRows(model, 0, keys, {reinterpret_cast<const std::byte*>(rows.data()), kWidth * sizeof(float)});
}

class SharedTablesTest : public ::testing::Test {
 protected:
  SharedTablesTest() { WriteTable(folder_ / "t", kKeys, kWidth, 1); }
  ModelConfig Model(const std::string& name, const std::string& path = "t") const {
    ModelConfig model = MakeModel(name, {MakeTable("t0", folder_ / path, kWidth)});
    model.share_tables = true;
    return model;
  }
  ServerConfig Config(Tiers tiers, std::vector<ModelConfig> models) const {
    return MakeServer(tiers, folder_ / "database", std::move(models));
  }
  void ExpectVersion(const ParameterServer& server, const std::string& model, uint32_t version,
                     const std::vector<Key>& keys = kKeys) {
    ExpectRows(Lookup(server, model, 0, kWidth, keys), keys, version);
  }

  TempFolder folder_;
};

TEST_F(SharedTablesTest, TheNameIsThatOfTheFolderHoweverItIsWritten) {
  const std::string name = SharedTableName(folder_ / "t");
  EXPECT_TRUE(name.starts_with("shared-t-")) << name;
  EXPECT_EQ(name.size(), 9u + 16u);
  fs::create_directory_symlink(folder_ / "t", folder_ / "link");
  for (const char* path : {"t/", "t/.", "t/../t", "link", "link/"}) EXPECT_EQ(SharedTableName(folder_ / path), name);
  EXPECT_NE(SharedTableName(folder_ / "t2"), name);
  EXPECT_TRUE(IsSharedTableName(name)) << name;
  for (const char* other : {"shared-t", "shared-0123456789abcdef", "shared-t-0123456789abcdeg",
                            "Shared-t-0123456789abcdef", "shared-t-0123456789abcde"}) {
    EXPECT_FALSE(IsSharedTableName(other)) << other;
  }
  EXPECT_NE(SharedTableName(folder_ / "t/t"), name);
  // Stores are full of it.
  EXPECT_EQ(SharedTableName("/nowhere/item features"), "shared-item-features-79ae7f27d8de9f5d");
  // Of a folder that is not there, too; and what a store allows.
  EXPECT_EQ(SharedTableName(folder_ / "gone"), SharedTableName(folder_ / "gone/"));
  const std::string odd = SharedTableName("/" + std::string(200, 'x') + "\xc3\xa4 .{}");
  EXPECT_LE(odd.size(), 120u);
  EXPECT_EQ(odd.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-_"), std::string::npos);

  auto server = Open(Config(Tiers::kVolatile, {Model("a"), Model("b", "link"), Model("c", "t/../t")}));
  ASSERT_EQ(Shared(*server).size(), 1u);
  EXPECT_EQ(Shared(*server)[0]["models"], Json({"a", "b", "c"}));
}

TEST_F(SharedTablesTest, ARestartFindsTheRowsWhicheverModelComesFirst) {
  for (const Tiers tiers : {Tiers::kPersistent, Tiers::kBoth}) {
    auto server = Open(Config(tiers, {Model("a"), Model("b")}));
    EXPECT_EQ(Shared(*server)[0]["table"]["load"]["source"], "folder");
    ASSERT_OK(Update(*server, "a", {7}, 2));
    ASSERT_OK(server->Close());
    for (const auto& models : {std::vector{Model("b"), Model("a")}, std::vector{Model("new")}}) {
      server = Open(Config(tiers, models));
      EXPECT_EQ(Shared(*server)[0]["table"]["load"]["source"], "persistent");
      for (const ModelConfig& model : models) {
        ExpectVersion(*server, model.name, 2, {7});
        ExpectVersion(*server, model.name, 1, {6, 8});
      }
      ASSERT_OK(server->Close());
    }
    // Somebody who may not write, and has not even the folder.
    ServerConfig config = Config(tiers, {Model("a"), Model("b")});
    config.persistent_db.read_only = true;
    fs::rename(folder_ / "t", folder_ / "elsewhere");
    server = Open(config);
    EXPECT_EQ(Shared(*server).size(), 1u);
    for (const char* model : {"a", "b"}) ExpectVersion(*server, model, 2, {7});
    EXPECT_EQ(Update(*server, "b", {7}, 3).code(), StatusCode::kFailedPrecondition);
    ASSERT_OK(server->ReplaceModel(Model("a")));
    EXPECT_EQ(Shared(*server).size(), 1u);
    ASSERT_OK(server->Close());
    config.persistent_db.read_only = false;
    config.persistent_db.initialize_after_startup = false;
    server = Open(config);
    ASSERT_OK(Update(*server, "b", {8}, 3));
    ExpectVersion(*server, "a", 3, {8});
    ASSERT_OK(server->Close());
    fs::rename(folder_ / "elsewhere", folder_ / "t");
    fs::remove_all(folder_ / "database");
  }
}

// A generation of a database that only an unreplaced model still uses stays while it does, and no longer.
TEST_F(SharedTablesTest, AnOldGenerationEndsWithItsLastModel) {
  auto server = Open(Config(Tiers::kPersistent, {Model("a"), Model("b")}));
  const std::string name = SharedTableName(folder_ / "t");
  const auto stored = [&] { return Json::parse(server->StatsJson())["shared_tables"].size(); };
  for (uint32_t version = 2; version <= 4; ++version) {
    WriteTable(folder_ / "t", kKeys, kWidth, version);
    ASSERT_OK(server->ReplaceModel(Model("a")));
    ASSERT_OK(Update(*server, "b", {static_cast<Key>(version)}, 10 + version));
    EXPECT_EQ(stored(), 2u);
    ExpectVersion(*server, "a", version);
    ExpectVersion(*server, "b", 10 + version, {static_cast<Key>(version)});
    ExpectVersion(*server, "b", 1, {0, 1, 100});
  }
  ASSERT_OK(server->UnloadModel("b"));
  ExpectVersion(*server, "a", 4);
  ASSERT_OK(server->Close());
  server = Open(Config(Tiers::kPersistent, {Model("b"), Model("a")}));
  EXPECT_EQ(Shared(*server)[0]["table"]["load"]["source"], "persistent");
  ExpectVersion(*server, "b", 4);
}

TEST_F(SharedTablesTest, AFolderThatCannotBeLoadedLeavesTheOthersAlone) {
  auto server = Open(Config(Tiers::kBoth, {Model("a"), Model("b")}));
  std::ofstream(folder_ / "t" / "emb_vector", std::ios::app) << "x";
  ExpectError(server->ReplaceModel(Model("a")), StatusCode::kDataLoss, {"model 'a', table 't0'", "emb_vector"});
  fs::remove_all(folder_ / "t");
  ExpectError(server->ReplaceModel(Model("a")), StatusCode::kNotFound, {"model 'a', table 't0'"});
  ExpectError(server->LoadModel(Model("c")), StatusCode::kNotFound, {"model 'c', table 't0'"});
  for (const char* model : {"a", "b"}) ExpectVersion(*server, model, 1);
  EXPECT_EQ(Shared(*server)[0]["models"], Json({"a", "b"}));
  // A model of two folders, one of which is not there, does not keep the other.
  WriteTable(folder_ / "u", kKeys, kWidth, 5);
  ModelConfig two = Model("two", "u");
  two.tables.push_back(MakeTable("t1", folder_ / "gone", kWidth));
  ExpectError(server->LoadModel(two), StatusCode::kNotFound, {"model 'two', table 't1'"});
  EXPECT_EQ(Shared(*server).size(), 1u);
  std::atomic<bool> cancelled{true};
  ExpectError(server->LoadModel(Model("u", "u"), &cancelled), StatusCode::kCancelled, {"model 'u', table 't0'"});
  EXPECT_EQ(Shared(*server).size(), 1u);
  ASSERT_OK(server->LoadModel(Model("u", "u")));
  ExpectVersion(*server, "u", 5);
}

TEST_F(SharedTablesTest, ClosingAndForkingAreAsWithOtherModels) {
  auto server = Open(Config(Tiers::kBoth, {Model("a"), Model("b")}));
  const LookupSession session = Value(server->NewSession("b"));
  EXPECT_EQ(InChild([&] {
              if (!Refused(Update(*server, "a", {1}, 2))) return 1;
              if (!Refused(Lookup(session, 0, kWidth, {1}).status)) return 2;
              return server->Close().ok() ? 0 : 3;
            }),
            0);
  ASSERT_OK(server->Close());
  EXPECT_EQ(Lookup(session, 0, kWidth, {1}).status.code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(Update(*server, "a", {1}, 2).code(), StatusCode::kFailedPrecondition);
}

// Rows that a fetch of the persistent tier moves up are there for all models.
TEST_F(SharedTablesTest, PromotedRowsAndSharesOfTheTableAreThoseOfOneTable) {
  ServerConfig config = Config(Tiers::kBoth, {Model("a"), Model("b")});
  config.volatile_db.initial_cache_rate = 0.5;
  config.volatile_db.cache_missed_embeddings = true;
  auto server = Open(config);
  const auto rows = [&] { return Shared(*server)[0]["table"]["volatile"]["rows"].get<int>(); };
  EXPECT_EQ(rows(), 250);
  ExpectVersion(*server, "a", 1);
  WaitUntil([&] { return rows() == 500; }, "promoted rows");
  const Rows found = Lookup(*server, "b", 0, kWidth, kKeys);
  EXPECT_EQ(found.report.rows_from_volatile, kKeys.size());
  const Json models = Json::parse(server->StatsJson())["models"];
  EXPECT_EQ(models[0]["tables"][0]["volatile"]["rows_promoted"], 250);
  EXPECT_EQ(models[1]["tables"][0]["volatile"]["rows_promoted"], 0);
  EXPECT_EQ(models[1]["tables"][0]["rows_served"]["volatile"], 500);
  // What the margin leaves is counted once, too.
  config = Config(Tiers::kVolatile, {Model("a"), Model("b")});
  config.volatile_db.overflow_margin = 100;
  ExpectError(ParameterServer::Open(config).status(), StatusCode::kResourceExhausted, {"model 'a'", "500 rows"});
}

// Two nodes over one store that both write to: of each node the models share, and the nodes' rows are the store's.
void RunNodes(SharedTablesTest&, ServerConfig config, const std::function<ModelConfig(const char*)>& model,
              const std::function<void(uint32_t version)>& write) {
  config.models = {model("a"), model("b")};
  auto first = Open(config);
  auto second = Open(config);
  EXPECT_EQ(Shared(*second)[0]["table"]["load"]["rows_read"], 0) << "the first one has loaded it";
  const auto expect = [&](const ParameterServer& server, const char* name, uint32_t version, Key key) {
    ExpectRows(Lookup(server, name, 0, kWidth, {key}), {key}, version);
  };
  ASSERT_OK(Update(*first, "a", {7}, 2));
  for (const char* name : {"a", "b"}) expect(*second, name, 2, 7);
  // One of the four is replaced by a newer version, then the others.
  write(3);
  ASSERT_OK(first->ReplaceModel(model("a")));
  expect(*first, "a", 3, 7);
  expect(*first, "b", 2, 7);
  for (const char* name : {"a", "b"}) expect(*second, name, 2, 7);
  ASSERT_OK(Update(*first, "a", {8}, 4));
  for (const char* name : {"b", "a"}) ASSERT_OK(second->ReplaceModel(model(name)));
  ASSERT_OK(first->ReplaceModel(model("b")));
  for (const auto& server : {first, second}) {
    for (const char* name : {"a", "b"}) {
      expect(*server, name, 4, 8);
      expect(*server, name, 3, 7);
    }
    EXPECT_EQ(Shared(*server).size(), 1u);
  }
  ASSERT_OK(first->UnloadModel("a"));
  ASSERT_OK(first->Close());
  for (const char* name : {"a", "b"}) expect(*second, name, 4, 8);
}

TEST_F(SharedTablesTest, SeveralProcessesOverSharedMemory) {
  ServerConfig config = Config(Tiers::kVolatile, {});
  config.volatile_db.type = VolatileType::kMultiProcessHashMap;
  config.volatile_db.shared_memory_name = folder_.path().filename().string();
  config.volatile_db.shared_memory_bytes = 16 << 20;
  RunNodes(
      *this, config, [&](const char* name) { return Model(name); },
      [&](uint32_t version) { WriteTable(folder_ / "t", kKeys, kWidth, version); });
  ::shm_unlink(("/" + config.volatile_db.shared_memory_name).c_str());
}

TEST_F(SharedTablesTest, SeveralNodesOverRedis) {
  const auto redis = Value(RedisService::Start());
  ServerConfig config = Config(Tiers::kVolatile, {});
  config.volatile_db.type = VolatileType::kRedisCluster;
  config.volatile_db.address = redis->address_list();
  RunNodes(
      *this, config, [&](const char* name) { return Model(name); },
      [&](uint32_t version) { WriteTable(folder_ / "t", kKeys, kWidth, version); });
  // A node that takes what the others have put there, also later.
  config.volatile_db.initialize_after_startup = false;
  config.models = {Model("a"), Model("b")};
  auto server = Open(config);
  for (const char* name : {"a", "b"}) ExpectVersion(*server, name, 4, {8});
  // Redis has lost all: a model that is loaded anew fills it again.
  ASSERT_OK(server->Close());
  config.volatile_db.initialize_after_startup = true;
  server = Open(config);
  Value(redis->Command(0, {"FLUSHALL"}));
  ASSERT_OK(server->ReplaceModel(Model("b")));
  ExpectVersion(*server, "b", 3);
  ASSERT_OK(server->ReplaceModel(Model("a")));
  ExpectVersion(*server, "a", 3);
  EXPECT_EQ(Shared(*server).size(), 1u);
}

}  // namespace
}  // namespace hps::testing
