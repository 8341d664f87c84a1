// Several nodes over one volatile store: who loads, who opens, what is switched and what is kept. The nodes are servers
// of this process over one hash map that shows itself as shared.

#include "cc/core/shared_tier.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <nlohmann/json.hpp>
#include <thread>

#include "cc/core/model_builder.h"
#include "cc/storage/hash_map_store.h"
#include "cc/storage/rocksdb_store.h"
#include "cc/tests/core_fixture.h"
#include "cc/tests/faulty_store.h"
#include "hps/model_reader.h"

namespace hps::testing {
namespace {

using Json = nlohmann::json;
using std::chrono::milliseconds;

constexpr uint32_t kWidth = 8;
const std::vector<Key> kKeys = KeyRange(0, 1000);

class SharedTierTest : public ::testing::Test {
 protected:
  void SetUp() override {
    for (uint32_t version = 1; version <= 4; ++version) WriteTable(Folder(version), kKeys, kWidth, version);
  }
  void TearDown() override { ASSERT_OK(shared_->Close()); }

  fs::path Folder(uint32_t version) const { return folder_ / ("v" + std::to_string(version)); }
  ModelConfig Version(uint32_t version) const { return MakeModel("m", {MakeTable("t", Folder(version), kWidth)}); }
  std::shared_ptr<TableStore> View() {
    return std::make_shared<FaultyStore>(shared_, faults_,
                                         FaultyOptions{.shared = true, .addressable = false, .closes_store = false});
  }
  // A node with the shared store, and a database of its own if it has a name.
  Result<std::shared_ptr<ParameterServer>> TryStart(std::vector<ModelConfig> models, const std::string& database = "",
                                                    const std::function<void(ServerConfig*)>& change = {}) {
    ServerConfig config = MakeServer(database.empty() ? Tiers::kVolatile : Tiers::kBoth, folder_ / database, models);
    if (change) change(&config);
    ServerOptions options;
    options.show_progress = false;
    options.adapt_store = [this](std::string_view tier, std::shared_ptr<TableStore> store) {
      return tier == "volatile" ? View() : store;
    };
    return ParameterServer::Open(config, options);
  }
  std::shared_ptr<ParameterServer> Start(std::vector<ModelConfig> models, const std::string& database = "",
                                         const std::function<void(ServerConfig*)>& change = {}) {
    return Value(TryStart(std::move(models), database, change));
  }
  static void ExpectVersion(const ParameterServer& server, uint32_t version, bool from_volatile = true) {
    const Rows rows = Lookup(server, "m", 0, kWidth, kKeys);
    ExpectRows(rows, kKeys, version);
    EXPECT_EQ(rows.report.rows_from_volatile, from_volatile ? kKeys.size() : 0);
  }
  static std::string Source(const ParameterServer& server) {
    return Json::parse(server.StatsJson())["models"][0]["tables"][0]["load"]["source"];
  }
  std::vector<std::string> Stored() {
    std::vector<std::string> names = Value(shared_->ListTables());
    std::sort(names.begin(), names.end());
    return names;
  }
  static void AsItIs(ServerConfig* config) { config->volatile_db.initialize_after_startup = false; }
  std::optional<std::string> Claim() { return Value(shared_->ReadRecord("hps.load.m")); }

  TempFolder folder_;
  std::shared_ptr<Faults> faults_ = std::make_shared<Faults>();
  std::shared_ptr<TableStore> shared_ = Value(OpenHashMapStore({.num_partitions = 4}));
};

using Names = std::vector<std::string>;

TEST_F(SharedTierTest, WhatIsThereAlreadyIsOpenedAndNotLoaded) {
  auto first = Start({Version(1)});
  EXPECT_EQ(Source(*first), "folder");
  const uint64_t written = faults_->upserts();
  auto second = Start({Version(1)});
  EXPECT_EQ(Source(*second), "volatile");
  EXPECT_EQ(faults_->upserts(), written);
  for (auto& node : {first, second}) ExpectVersion(*node, 1);
  EXPECT_EQ(Stored(), (Names{"hps_et.m.t"}));
  EXPECT_FALSE(Claim().has_value());
}

TEST_F(SharedTierTest, UnloadingAndClosingDropNothing) {
  auto first = Start({Version(1)});
  auto second = Start({Version(1)});
  ASSERT_OK(first->UnloadModel("m"));
  ASSERT_OK(first->Close());
  ExpectVersion(*second, 1);
  ASSERT_OK(second->Close());
  auto third = Start({Version(1)});
  EXPECT_EQ(Source(*third), "volatile");
  ExpectVersion(*third, 1);
}

TEST_F(SharedTierTest, AReplacementKeepsTheGenerationBefore) {
  auto first = Start({Version(1)});
  auto second = Start({Version(1)});
  ASSERT_OK(first->ReplaceModel(Version(2)));
  ExpectVersion(*first, 2);
  ExpectVersion(*second, 1);  // still served there
  EXPECT_EQ(Stored(), (Names{"hps_et.m.t", "hps_et.m.t@1"}));
  ASSERT_OK(second->ReplaceModel(Version(2)));
  EXPECT_EQ(Source(*second), "volatile");
  ExpectVersion(*second, 2);
  ASSERT_OK(second->ReplaceModel(Version(3)));
  ExpectVersion(*second, 3);
  ExpectVersion(*first, 2);
  EXPECT_EQ(Stored(), (Names{"hps_et.m.t@1", "hps_et.m.t@2"}));
  ExpectVersion(*Start({Version(3)}), 3);
}

TEST_F(SharedTierTest, NodesThatStartAtOnceLoadOnce) {
  constexpr int kNodes = 4;
  for (const bool with_database : {false, true}) {
    std::vector<std::shared_ptr<ParameterServer>> nodes(kNodes);
    std::vector<std::thread> threads;
    const ModelConfig model = Version(with_database ? 2 : 1);
    for (int i = 0; i < kNodes; ++i) {
      threads.emplace_back([&, i] { nodes[i] = Start({model}, with_database ? "database" + std::to_string(i) : ""); });
    }
    for (std::thread& thread : threads) thread.join();
    for (auto& node : nodes) ExpectVersion(*node, with_database ? 2 : 1);
    // One generation, beside the one before.
    EXPECT_EQ(Stored().size(), with_database ? 2u : 1u);
    EXPECT_FALSE(Claim().has_value());
  }
}

TEST_F(SharedTierTest, NodesWithDifferentFoldersNeverMixThem) {
  for (int round = 0; round < 3; ++round) {
    std::vector<std::thread> threads;
    std::vector<std::shared_ptr<ParameterServer>> nodes(2);
    for (uint32_t i = 0; i < 2; ++i) {
      threads.emplace_back([&, i] { nodes[i] = Start({Version(1 + i)}); });
    }
    for (std::thread& thread : threads) thread.join();
    for (uint32_t i = 0; i < 2; ++i) ExpectVersion(*nodes[i], 1 + i);
  }
}

// Without any waiting for claims: right all the same.
TEST_F(SharedTierTest, ClaimsSaveWorkOnly) {
  constexpr uint32_t kNodes = 4;
  struct Node {
    ServerResources resources;
    std::shared_ptr<Model> model;
  };
  std::vector<Node> nodes(kNodes);
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < kNodes; ++i) {
    nodes[i].resources.executor = NewThreadPool(2);
    nodes[i].resources.volatile_store = View();
    threads.emplace_back([&, i] {
      BuildOptions options{.show_progress = false};
      options.claim = {.poll = milliseconds(0), .renew = milliseconds(0), .stale_after = milliseconds(0)};
      nodes[i].model = Value(BuildModel(Version(1 + i), nodes[i].resources, options));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (uint32_t i = 0; i < kNodes; ++i) {
    std::vector<float> rows(kKeys.size() * kWidth);
    std::vector<uint32_t> misses;
    ASSERT_OK(nodes[i].model->tables[0].stack.volatile_tier.table->Fetch(
        {.keys = kKeys, .rows = {reinterpret_cast<std::byte*>(rows.data()), kWidth * sizeof(float)}}, &misses));
    EXPECT_TRUE(misses.empty());
    for (size_t k = 0; k < kKeys.size(); ++k) {
      ASSERT_EQ(std::vector<float>(rows.begin() + static_cast<ptrdiff_t>(k * kWidth),
                                   rows.begin() + static_cast<ptrdiff_t>((k + 1) * kWidth)),
                Row(kKeys[k], 1 + i, kWidth));
    }
  }
  // A later node finds one of them, whole.
  auto node = Start({Version(4)});
  ExpectVersion(*node, 4);
}

TEST_F(SharedTierTest, AClaimThatIsNotRenewedIsTakenOver) {
  CapturedLog log;
  ASSERT_OK(shared_->WriteRecord("hps.load.m", "dead:1:2 7"));
  ServerResources resources;
  resources.executor = NewThreadPool(2);
  resources.volatile_store = View();
  BuildOptions options{.show_progress = false};
  options.claim = {.poll = milliseconds(1), .renew = milliseconds(10), .stale_after = milliseconds(50)};
  ASSERT_OK(BuildModel(Version(1), resources, options).status());
  EXPECT_NE(log.text().find("model 'm' is being loaded by another node (dead:1:2 7)"), std::string::npos);
  EXPECT_FALSE(Claim().has_value());
  EXPECT_EQ(Stored(), (Names{"hps_et.m.t"}));
}

TEST_F(SharedTierTest, ClosingEndsTheWaitForAnotherNode) {
  ASSERT_OK(shared_->WriteRecord("hps.load.m", "busy:1:2 7"));
  auto server = Start({});
  std::thread loader([&] { ExpectError(server->LoadModel(Version(1)), StatusCode::kFailedPrecondition, {"closed"}); });
  ASSERT_OK(server->Close());
  loader.join();
  EXPECT_EQ(Claim(), "busy:1:2 7");
}

TEST_F(SharedTierTest, AFailedLoadLeavesNothingBehind) {
  auto serving = Start({Version(1)});
  WriteTable(folder_ / "wide", {1, Key{1} << 40}, kWidth, 2);
  const ModelConfig wide = MakeModel("m", {MakeTable("t", folder_ / "wide", kWidth)});
  const auto short_keys = [](ServerConfig* config) { config->long_keys = false; };
  ExpectError(TryStart({wide}, "", short_keys).status(), StatusCode::kOutOfRange, {"table 't'"});
  EXPECT_EQ(Stored(), (Names{"hps_et.m.t"}));
  EXPECT_FALSE(Claim().has_value());
  ExpectVersion(*serving, 1);
  ExpectVersion(*Start({Version(1)}), 1);
}

TEST_F(SharedTierTest, AStoreThatWasEmptiedIsFilledAgain) {
  ASSERT_OK(Start({Version(1)}, "database")->Close());
  ASSERT_OK(shared_->DropTable("hps_et.m.t"));
  auto server = Start({Version(1)}, "database");
  EXPECT_EQ(Source(*server), "persistent");
  ExpectVersion(*server, 1);
}

// Keys that somebody else takes out of the store.
void Lose(TableStore& store, const std::string& name, size_t rows) {
  const auto table = Value(store.OpenTable({.name = name, .row_bytes = kWidth * sizeof(float)}));
  uint64_t erased = 0;
  ASSERT_OK(table->Erase(std::span(kKeys).first(rows), &erased));
  ASSERT_EQ(erased, rows);
}

TEST_F(SharedTierTest, ATableThatHasLostRowsIsLoadedAnew) {
  auto serving = Start({Version(1)});
  Lose(*shared_, "hps_et.m.t", 7);
  {
    CapturedLog log;
    auto server = Start({Version(1)});
    EXPECT_EQ(Source(*server), "folder");
    ExpectVersion(*server, 1);
    for (const char* part : {"model 'm'", "table 't'", "hps_et.m.t", "holds 993 of the 1000", "7 are missing"}) {
      EXPECT_NE(log.text().find(part), std::string::npos) << part << " is not in " << log.text();
    }
  }
  // What others still serve stays, and the next node finds the new one whole.
  EXPECT_EQ(Stored(), (Names{"hps_et.m.t", "hps_et.m.t@1"}));
  EXPECT_FALSE(Claim().has_value());
  auto next = Start({Version(1)});
  EXPECT_EQ(Source(*next), "volatile");
  ExpectVersion(*next, 1);
}

TEST_F(SharedTierTest, ATableThatHasLostRowsAndIsNotToBeLoadedIsRefused) {
  ASSERT_OK(Start({Version(1)})->Close());
  ExpectVersion(*Start({Version(1)}, "", AsItIs), 1);
  Lose(*shared_, "hps_et.m.t", 7);
  ExpectError(TryStart({Version(1)}, "", AsItIs).status(), StatusCode::kDataLoss,
              {"model 'm'", "table 't'", "holds 993 of the 1000", "7 are missing", "initialize_after_startup"});
  EXPECT_EQ(Stored(), (Names{"hps_et.m.t"}));
}

TEST_F(SharedTierTest, RowsThatUpdatesAddedAndDuplicatesAreNoLoss) {
  std::vector<Key> keys = kKeys;
  keys.insert(keys.end(), kKeys.begin(), kKeys.begin() + 100);
  WriteTable(Folder(1), keys, kWidth, 1);
  ASSERT_OK(Start({Version(1)})->Close());
  auto again = Start({Version(1)});
  EXPECT_EQ(Source(*again), "volatile");
  const auto table = Value(shared_->OpenTable({.name = "hps_et.m.t", .row_bytes = kWidth * sizeof(float)}));
  const std::vector<float> row = Row(5000, 1, kWidth);
  ASSERT_OK(
      table->Upsert(std::vector<Key>{5000}, {reinterpret_cast<const std::byte*>(row.data()), kWidth * sizeof(float)}));
  EXPECT_EQ(Source(*Start({Version(1)})), "volatile");
  // Duplicates do not hide a loss.
  Lose(*shared_, "hps_et.m.t", 2);
  EXPECT_EQ(Source(*Start({Version(1)})), "folder");
}

TEST_F(SharedTierTest, ADatabaseServesWhatTheTierHasLost) {
  ASSERT_OK(Start({Version(1)}, "database")->Close());
  Lose(*shared_, "hps_et.m.t", 7);
  const uint64_t written = faults_->upserts();
  auto server = Start({Version(1)}, "database");
  EXPECT_EQ(faults_->upserts(), written);
  ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 1);
  // A node without one cannot do with the rest.
  auto other = Start({Version(1)});
  EXPECT_EQ(Source(*other), "folder");
  ExpectVersion(*other, 1);
}

// As it was written before records told whether rows were left out.
TEST_F(SharedTierTest, WithoutACountTheFolderTellsWhetherRowsAreMissing) {
  ASSERT_OK(Start({Version(1)})->Close());
  ModelRecord record = Value(ReadModelRecord(*shared_, "m"));
  EXPECT_EQ(record.tables["t"].rows, kKeys.size());
  record.tables["t"].rows = 0;
  ASSERT_OK(WriteModelRecord(*shared_, "m", record));
  EXPECT_EQ(Source(*Start({Version(1)})), "volatile");
  Lose(*shared_, "hps_et.m.t", 7);
  ASSERT_OK(Start({Version(1)}, "", AsItIs)->Close());  // loads nothing, and has no folder to look at
  CapturedLog log;
  auto server = Start({Version(1)});
  EXPECT_EQ(Source(*server), "folder");
  ExpectVersion(*server, 1);
  EXPECT_NE(log.text().find("holds 993 rows, its folder has 1000"), std::string::npos) << log.text();
  EXPECT_EQ(Value(ReadModelRecord(*shared_, "m")).tables["t"].rows, kKeys.size());
}

// What a node with a database leaves out of the tier, another one without must not take for all there is.
TEST_F(SharedTierTest, ATierThatWasGivenOnlySomeRowsIsNotServedAlone) {
  const auto half = [](ServerConfig* config) { config->volatile_db.initial_cache_rate = 0.5; };
  for (const bool from_database : {false, true}) {
    const uint32_t version = from_database ? 2 : 1;
    if (from_database) {  // a copy of it, not of the folder
      ASSERT_OK(Start({Version(2)}, "database")->Close());
      const uint64_t generation = Value(ReadModelRecord(*shared_, "m")).tables["t"].generation;
      ASSERT_OK(shared_->DropTable(StoredTableName("m", "t", generation)));
      ASSERT_OK(shared_->EraseRecord("hps.model.m"));
    }
    auto below = Start({Version(version)}, "database", half);
    EXPECT_EQ(Source(*below), from_database ? "persistent" : "folder");
    const TableRecord record = Value(ReadModelRecord(*shared_, "m")).tables["t"];
    EXPECT_EQ(record.rows, kKeys.size() / 2);
    EXPECT_EQ(record.all_rows, kKeys.size());
    ExpectError(TryStart({Version(version)}, "", AsItIs).status(), StatusCode::kFailedPrecondition,
                {"model 'm'", "table 't'", "given 500 of 1000 rows", "initialize_after_startup", "persistent_db"});
    CapturedLog log;
    auto alone = Start({Version(version)});
    EXPECT_EQ(Source(*alone), "folder");
    ExpectVersion(*alone, version);
    EXPECT_NE(log.text().find("given 500 of 1000 rows; it is loaded anew"), std::string::npos) << log.text();
    ExpectRows(Lookup(*below, "m", 0, kWidth, kKeys), kKeys, version);
    // From now on it is whole, for both kinds of nodes.
    EXPECT_EQ(Value(ReadModelRecord(*shared_, "m")).tables["t"].all_rows, 0u);
    ASSERT_OK(below->Close());
    auto again = Start({Version(version)}, "database", half);
    EXPECT_EQ(Source(*again), "persistent");
    ExpectVersion(*again, version);
    ExpectVersion(*Start({Version(version)}, "", AsItIs), version);
  }
}

// The database serves what the tier loses during the load, and does not hide it from others.
TEST_F(SharedTierTest, RowsThatALoadHasLostAreNotTakenForHeld) {
  faults_->LoseOf(3);
  auto below = Start({Version(1)}, "database");
  faults_->LoseOf(0);
  ExpectRows(Lookup(*below, "m", 0, kWidth, kKeys), kKeys, 1);
  const TableRecord record = Value(ReadModelRecord(*shared_, "m")).tables["t"];
  EXPECT_EQ(record.rows, kKeys.size() - 3);
  EXPECT_EQ(record.all_rows, kKeys.size());
  auto alone = Start({Version(1)});
  EXPECT_EQ(Source(*alone), "folder");
  ExpectVersion(*alone, 1);
}

TEST_F(SharedTierTest, AMarginThatLeavesRowsOutIsRecorded) {
  shared_ = Value(OpenHashMapStore({.num_partitions = 1, .overflow = {.margin = 300}}));
  for (const bool from_database : {false, true}) {
    if (from_database) ASSERT_OK(shared_->DropTable("hps_et.m.t"));
    auto below = Start({Version(1)}, "database");
    EXPECT_EQ(Source(*below), from_database ? "persistent" : "folder");
    const TableRecord record = Value(ReadModelRecord(*shared_, "m")).tables["t"];
    EXPECT_EQ(record.rows, 300u);
    EXPECT_EQ(record.all_rows, kKeys.size());
  }
  // Alone it cannot be whole, and says so.
  ExpectError(TryStart({Version(1)}).status(), StatusCode::kResourceExhausted, {"1000 rows", "300", "overflow_margin"});
  // A margin that all rows fit in leaves out nothing.
  shared_ = Value(OpenHashMapStore({.num_partitions = 1, .overflow = {.margin = 2000}}));
  ASSERT_OK(Start({Version(1)}, "database")->Close());
  EXPECT_EQ(Value(ReadModelRecord(*shared_, "m")).tables["t"].all_rows, 0u);
  auto alone = Start({Version(1)});
  EXPECT_EQ(Source(*alone), "volatile");
  ExpectVersion(*alone, 1);
}

// A folder that changes during a start: the next one sees that of all tiers, or of none.
TEST_F(SharedTierTest, AllTiersRecordTheSameVersionOfAFolder) {
  for (const bool again : {false, true}) {
    faults_->WhenAsked([&] { fs::last_write_time(Folder(1) / "key", fs::file_time_type::clock::now()); });
    ASSERT_OK(Start({Version(1)}, "database")->Close());
    const std::string shared = Value(ReadModelRecord(*shared_, "m")).tables["t"].fingerprint;
    auto database = Value(OpenRocksDbStore({.path = (folder_ / "database").string(), .num_threads = 2}));
    EXPECT_EQ(Value(ReadModelRecord(*database, "m")).tables["t"].fingerprint, shared) << again;
    ASSERT_OK(database->Close());
  }
}

TEST_F(SharedTierTest, ALoadOfWhichRowsGetLostIsRefused) {
  std::vector<Key> keys = kKeys;
  keys.insert(keys.end(), kKeys.begin(), kKeys.begin() + 100);
  WriteTable(Folder(1), keys, kWidth, 1);
  faults_->LoseOf(3);
  ExpectError(TryStart({Version(1)}).status(), StatusCode::kDataLoss,
              {"model 'm'", "table 't'", "1000 were written", "100 duplicates", "holds 997"});
  EXPECT_EQ(Stored(), Names());
  EXPECT_FALSE(Claim().has_value());
  faults_->LoseOf(0);
  ExpectVersion(*Start({Version(1)}), 1);
}

TEST_F(SharedTierTest, DistinctKeysAreCountedInShares) {
  std::vector<Key> keys = kKeys;
  keys.insert(keys.end(), {-1, 5, std::numeric_limits<Key>::min(), std::numeric_limits<Key>::max(), -1});
  WriteTable(Folder(1), keys, kWidth, 1);
  for (const uint64_t at_once : {uint64_t{1}, uint64_t{100}, uint64_t{1} << 20}) {
    EXPECT_EQ(Value(CountDistinctKeys(Folder(1).string(), keys.size(), at_once)), kKeys.size() + 3);
  }
  EXPECT_EQ(Value(CountDistinctKeys(Folder(1).string(), 10)), 10u);
}

TEST_F(SharedTierTest, ItNeverShadowsNewerRowsOfTheDatabase) {
  ASSERT_OK(Start({Version(1)}, "database")->Close());
  // The shared tier still holds version 1 and says so.
  auto server = Start({Version(2)}, "database");
  ExpectVersion(*server, 2);
  ASSERT_OK(server->Close());
  // A node that has version 1 in its own database does not get version 2 from the shared tier.
  auto other = Start({Version(1)}, "other");
  ExpectVersion(*other, 1);
  ASSERT_OK(other->Close());
  // A database that another program wrote: nothing says that the shared rows are its rows.
  {
    auto store = Value(OpenRocksDbStore({.path = (folder_ / "foreign").string(), .num_threads = 2}));
    const auto table = Value(store->CreateTable({.name = "hps_et.m.t", .row_bytes = kWidth * sizeof(float)}));
    for (Key key : kKeys) {
      const std::vector<float> row = Row(key, 9, kWidth);
      ASSERT_OK(
          table->Upsert(std::span(&key, 1), {reinterpret_cast<const std::byte*>(row.data()), kWidth * sizeof(float)}));
    }
    ASSERT_OK(store->Close());
  }
  auto reader = Start({Version(1)}, "foreign", [](ServerConfig* config) { config->persistent_db.read_only = true; });
  EXPECT_EQ(Source(*reader), "persistent");
  ExpectVersion(*reader, 9);
}

TEST_F(SharedTierTest, ATierThatIsNotInitialisedServesWhatItHolds) {
  ExpectError(TryStart({Version(1)}, "", AsItIs).status(), StatusCode::kFailedPrecondition,
              {"model 'm'", "table 't'", "no row of this table", "no persistent_db", "another node first"});
  EXPECT_EQ(Stored(), Names{}) << "nothing is left behind";
  // Another node loads a version; a node that loads nothing serves it, whatever its folder says.
  ExpectVersion(*Start({Version(2)}), 2);
  auto server = Start({Version(1)}, "", AsItIs);
  EXPECT_EQ(Source(*server), "volatile");
  ExpectVersion(*server, 2);
}

TEST_F(SharedTierTest, WhatAnotherProgramWroteIsServedAsItIsWhenNothingIsToBeLoaded) {
  const auto table = Value(shared_->CreateTable({.name = "hps_et.m.t", .row_bytes = kWidth * sizeof(float)}));
  for (Key key : kKeys) {
    const std::vector<float> row = Row(key, 7, kWidth);
    ASSERT_OK(
        table->Upsert(std::span(&key, 1), {reinterpret_cast<const std::byte*>(row.data()), kWidth * sizeof(float)}));
  }
  auto server = Start({Version(1)}, "", [](ServerConfig* config) {
    config->volatile_db.initialize_after_startup = false;
    config->models[0].tables[0].path = "/nowhere";  // no folder is needed
  });
  ExpectVersion(*server, 7);
  ExpectVersion(*Start({Version(1)}), 1);  // whoever loads does so beside it
  EXPECT_EQ(Stored(), (Names{"hps_et.m.t", "hps_et.m.t@1"}));
}

// ---- what private tiers have in common with it ----------------------------------------------------------------------

class TierStartTest : public SharedTierTest {
 protected:
  std::shared_ptr<ParameterServer> Open(Tiers tiers, const std::function<void(ServerConfig*)>& change) {
    ServerConfig config = MakeServer(tiers, folder_ / "database", {Version(1)});
    change(&config);
    return Value(ParameterServer::Open(config, {.show_progress = false}));
  }
};

TEST_F(TierStartTest, AHashMapThatNobodyFillsIsRefused) {
  ServerConfig config = MakeServer(Tiers::kVolatile, folder_ / "database", {Version(1)});
  AsItIs(&config);
  ExpectError(ParameterServer::Open(config, {.show_progress = false}).status(), StatusCode::kFailedPrecondition,
              {"model 'm'", "table 't'", "initialize_after_startup to true"});
}

TEST_F(TierStartTest, AVolatileTierThatIsNotInitialisedFillsWithWhatIsAsked) {
  auto server = Open(Tiers::kBoth, [](ServerConfig* config) {
    config->volatile_db.initialize_after_startup = false;
    config->volatile_db.cache_missed_embeddings = true;
  });
  ExpectVersion(*server, 1, /*from_volatile=*/false);
  WaitUntil([&] { return Json::parse(server->StatsJson())["rows_promoted"] == kKeys.size(); }, "the promotion");
  ExpectVersion(*server, 1);
}

TEST_F(TierStartTest, APersistentTierThatIsNotInitialisedIsLeftAsItIs) {
  const auto as_it_is = [](ServerConfig* config) { config->persistent_db.initialize_after_startup = false; };
  // Nothing there: made, and left empty; the volatile tier is loaded from the folder.
  auto server = Open(Tiers::kBoth, as_it_is);
  EXPECT_EQ(Source(*server), "folder");
  ExpectVersion(*server, 1);
  EXPECT_EQ(Json::parse(server->StatsJson())["models"][0]["tables"][0]["persistent"]["rows"], 0);
  ASSERT_OK(server->Close());
  // Loaded once, then served though the folder has changed.
  ASSERT_OK(Open(Tiers::kPersistent, [](ServerConfig*) {})->Close());
  WriteTable(Folder(1), kKeys, kWidth, 3);
  for (Tiers tiers : {Tiers::kBoth, Tiers::kPersistent}) {
    server = Open(tiers, as_it_is);
    EXPECT_EQ(Source(*server), "persistent");
    ExpectVersion(*server, 1, tiers == Tiers::kBoth);
    ASSERT_OK(server->Close());
  }
}

TEST_F(TierStartTest, AReadOnlyDatabaseIsNotLoadedAndAMissingTableIsAnError) {
  ASSERT_OK(Open(Tiers::kPersistent, [](ServerConfig*) {})->Close());
  ServerConfig config =
      MakeServer(Tiers::kBoth, folder_ / "database",
                 {MakeModel("m", {MakeTable("t", Folder(1), kWidth), MakeTable("u", Folder(1), kWidth)})});
  config.persistent_db.read_only = true;
  ExpectError(ParameterServer::Open(config).status(), StatusCode::kNotFound, {"table 'u'", "hps_et.m.u"});
}

// Made, and left empty, by a server that was told not to load: nobody is to take that for a table whose rows are all
// absent.
TEST_F(TierStartTest, AnEmptyTableOfADatabaseIsNotServedInSilence) {
  const auto as_it_is = [](ServerConfig* config) { config->persistent_db.initialize_after_startup = false; };
  const auto read_only = [](ServerConfig* config) { config->persistent_db.read_only = true; };
  for (int start = 0; start < 2; ++start) {  // the second one finds the empty table
    CapturedLog log;
    auto server = Open(Tiers::kBoth, as_it_is);
    EXPECT_EQ(Source(*server), "folder");
    ExpectVersion(*server, 1);
    EXPECT_NE(log.text().find("warning: model 'm', table 't': the database holds no row"), std::string::npos)
        << log.text();
    ASSERT_OK(server->Close());
  }
  for (const Tiers tiers : {Tiers::kBoth, Tiers::kPersistent}) {
    ServerConfig config = MakeServer(tiers, folder_ / "database", {Version(1)});
    read_only(&config);
    ExpectError(ParameterServer::Open(config).status(), StatusCode::kFailedPrecondition,
                {"model 'm'", "table 't'", "no row", "no record", "initialize_after_startup"});
  }
  // Loaded, it is served; and refused once somebody has taken all rows out.
  ASSERT_OK(Open(Tiers::kPersistent, [](ServerConfig*) {})->Close());
  ExpectVersion(*Open(Tiers::kPersistent, read_only), 1, /*from_volatile=*/false);
  const auto database = [&] {
    return Value(OpenRocksDbStore({.path = (folder_ / "database").string(), .num_threads = 2}));
  };
  {
    auto store = database();
    ASSERT_OK(Value(store->OpenTable({.name = "hps_et.m.t", .row_bytes = kWidth * sizeof(float)}))->Erase(kKeys));
    ASSERT_OK(store->Close());
  }
  ServerConfig config = MakeServer(Tiers::kPersistent, folder_ / "database", {Version(1)});
  read_only(&config);
  ExpectError(ParameterServer::Open(config).status(), StatusCode::kFailedPrecondition, {"none of the 1000 rows"});
  // A version without rows is no mistake.
  {
    auto store = database();
    ModelRecord record = Value(ReadModelRecord(*store, "m"));
    record.tables["t"].rows = 0;
    ASSERT_OK(WriteModelRecord(*store, "m", record));
    ASSERT_OK(store->Close());
  }
  ExpectRows(Lookup(*Open(Tiers::kBoth, read_only), "m", 0, kWidth, kKeys), kKeys, 0);
}

TEST_F(TierStartTest, AReplacementWhoseDatabaseWasDeletedFailsAndTheOldVersionServes) {
  for (const Tiers tiers : {Tiers::kBoth, Tiers::kPersistent}) {
    auto server = Open(tiers, [](ServerConfig*) {});
    fs::remove_all(folder_ / "database");
    for (const uint32_t version : {2, 1}) {  // another one, and that which is there
      ExpectError(server->ReplaceModel(Version(version)), StatusCode::kDataLoss,
                  {"model 'm'", "table 't'", (folder_ / "database").string(), "deleted or replaced"});
    }
    ExpectVersion(*server, 1, /*from_volatile=*/tiers == Tiers::kBoth);
    ExpectError(server->Close(), StatusCode::kDataLoss, {"deleted or replaced"});
    // The next start makes the database anew.
    server = Open(tiers, [](ServerConfig*) {});
    ExpectVersion(*server, 1, /*from_volatile=*/tiers == Tiers::kBoth);
    ASSERT_OK(server->ReplaceModel(Version(2)));
    ASSERT_OK(server->Close());
    fs::remove_all(folder_ / "database");
  }
}

TEST_F(TierStartTest, TheVolatileTierTakesNoMoreThanItsMargin) {
  const HashMapOptions bounded{.num_partitions = 1, .overflow = {.margin = 300}};
  const BuildOptions options{.show_progress = false};
  for (const bool from_database : {false, true}) {
    ServerResources resources;
    resources.executor = NewThreadPool(2);
    resources.volatile_store = Value(OpenHashMapStore(bounded));
    resources.persistent_store = Value(OpenRocksDbStore({.path = (folder_ / "database").string(), .num_threads = 2}));
    const auto model = Value(BuildModel(Version(1), resources, options));
    EXPECT_EQ(model->tables[0].source, from_database ? "persistent" : "folder");
    EXPECT_EQ(Value(model->tables[0].stack.volatile_tier.table->Stats()).rows, 300u);
    EXPECT_EQ(Value(model->tables[0].stack.persistent_tier.table->Stats()).rows, kKeys.size());
    ASSERT_OK(resources.persistent_store->Close());
  }
  // Nobody could serve the rows that are left out.
  ServerResources resources;
  resources.executor = NewThreadPool(2);
  resources.volatile_store = Value(OpenHashMapStore(bounded));
  ExpectError(BuildModel(Version(1), resources, options).status(), StatusCode::kResourceExhausted,
              {"1000 rows", "300", "overflow_margin"});
}

}  // namespace
}  // namespace hps::testing
