// The life of models in a server: loading, restarting over a database, replacing, unloading, crashes at each step, and
// what the statistics say. Crashes are this program again, killed where a store holds it (see RunRole).

#include "hps/parameter_server.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>

#include "cc/core/model_builder.h"
#include "cc/core/model_record.h"
#include "cc/core/volatile_share.h"
#include "cc/storage/hash_map_store.h"
#include "cc/storage/rocksdb_store.h"
#include "cc/tests/core_fixture.h"
#include "cc/tests/rocksdb_races.h"

namespace hps::testing {
namespace {

using Json = nlohmann::json;

constexpr uint32_t kWidth = 8;
constexpr size_t kRowBytes = kWidth * sizeof(float);
const std::vector<Key> kKeys = KeyRange(0, 1000);

std::unique_ptr<TableStore> OpenDatabase(const fs::path& path) {
  return Value(OpenRocksDbStore({.path = path.string(), .num_threads = 2}));
}
std::vector<std::string> StoredTables(const fs::path& path) {
  std::vector<std::string> names = Value(OpenDatabase(path)->ListTables());
  std::sort(names.begin(), names.end());
  return names;
}
void WriteStoredRow(const fs::path& database, const std::string& table, Key key, uint32_t version) {
  auto store = OpenDatabase(database);
  const auto opened = Value(store->OpenTable({.name = table, .row_bytes = kRowBytes}));
  const std::vector<float> row = Row(key, version, kWidth);
  ASSERT_OK(opened->Upsert(std::span(&key, 1), {reinterpret_cast<const std::byte*>(row.data()), kRowBytes}));
  ASSERT_OK(store->Close());
}

class ParameterServerTest : public ::testing::Test {
 protected:
  void SetUp() override { WriteTable(folder_ / "a", kKeys, kWidth, 1); }

  ModelConfig OneTable(const std::string& folder = "a", uint32_t width = kWidth) {
    return MakeModel("m", {MakeTable("t", folder_ / folder, width)});
  }
  ModelConfig TwoTables(const std::string& first, const std::string& second) {
    return MakeModel("m", {MakeTable("t", folder_ / first, kWidth), MakeTable("u", folder_ / second, kWidth)});
  }
  ServerConfig Config(Tiers tiers, std::vector<ModelConfig> models) {
    return MakeServer(tiers, database(), std::move(models));
  }
  fs::path database() const { return folder_ / "database"; }

  static std::shared_ptr<ParameterServer> Open(const ServerConfig& config) {
    return Value(ParameterServer::Open(config, {.show_progress = false}));
  }
  static Json Stats(const ParameterServer& server) { return Json::parse(server.StatsJson()); }
  static std::string Source(const ParameterServer& server, size_t table = 0) {
    return Stats(server)["models"][0]["tables"][table]["load"]["source"];
  }

  TempFolder folder_;
};

constexpr Tiers kAllTiers[] = {Tiers::kVolatile, Tiers::kPersistent, Tiers::kBoth};
constexpr Tiers kPersistentTiers[] = {Tiers::kPersistent, Tiers::kBoth};

// ---- loading ----------------------------------------------------------------------------------------------------

TEST_F(ParameterServerTest, EveryCombinationOfTiersServesTheRows) {
  for (Tiers tiers : kAllTiers) {
    fs::remove_all(database());
    auto server = Open(Config(tiers, {OneTable()}));
    const Rows rows = Lookup(*server, "m", 0, kWidth, kKeys);
    ExpectRows(rows, kKeys, 1);
    EXPECT_EQ(rows.report.rows_from_volatile, tiers == Tiers::kPersistent ? 0 : kKeys.size());
    EXPECT_EQ(rows.report.rows_from_persistent, tiers == Tiers::kPersistent ? kKeys.size() : 0);
    ExpectRows(Lookup(*server, "m", 0, kWidth, {-1, 5000}), {-1, 5000}, 0);
  }
}

TEST_F(ParameterServerTest, SeveralModelsOfDifferentWidths) {
  std::vector<ModelConfig> models;
  for (uint32_t width : {1, 3, 64, 300}) {
    const std::string name = "w" + std::to_string(width);
    WriteTable(folder_ / name, kKeys, width, width);
    WriteTable(folder_ / (name + "b"), {1, 2}, width + 1, width + 1);
    models.push_back(
        MakeModel(name, {MakeTable("t", folder_ / name, width), MakeTable("u", folder_ / (name + "b"), width + 1)}));
  }
  for (Tiers tiers : kAllTiers) {
    fs::remove_all(database());
    auto server = Open(Config(tiers, models));
    for (const ModelConfig& model : models) {
      for (uint32_t table : {0, 1}) {
        const uint32_t width = model.tables[table].width;
        ExpectRows(Lookup(*server, model.name, table, width, {1, 2}), {1, 2}, width);
      }
    }
    EXPECT_EQ(server->ModelNames(), (std::vector<std::string>{"w1", "w3", "w300", "w64"}));
  }
}

TEST_F(ParameterServerTest, PartOfATableInMemoryAndTheRestBelow) {
  ServerConfig config = Config(Tiers::kBoth, {OneTable()});
  config.volatile_db.initial_cache_rate = 0.3;
  auto server = Open(config);
  for (int round = 0; round < 2; ++round) {  // loaded from the folder, then from the database
    const Rows rows = Lookup(*server, "m", 0, kWidth, kKeys);
    ExpectRows(rows, kKeys, 1);
    EXPECT_EQ(rows.report.rows_from_volatile, 300u);
    EXPECT_EQ(rows.report.rows_from_persistent, 700u);
    ASSERT_OK(server->Close());
    if (round == 0) server = Open(config);
  }
}

TEST_F(ParameterServerTest, MissedRowsMoveUpWhereAskedTo) {
  for (bool promote : {false, true}) {
    fs::remove_all(database());
    ServerConfig config = Config(Tiers::kBoth, {OneTable()});
    config.volatile_db.initial_cache_rate = 0.0;
    config.volatile_db.cache_missed_embeddings = promote;
    auto server = Open(config);
    std::vector<Key> keys = KeyRange(500, 1000);  // half of them are in no tier
    EXPECT_EQ(Lookup(*server, "m", 0, kWidth, keys).report.rows_from_persistent, 500u);
    WaitUntil([&] { return !promote || Stats(*server)["rows_promoted"] == 500; }, "the promotion");
    EXPECT_EQ(Stats(*server)["models"][0]["tables"][0]["volatile"]["rows"], promote ? 500 : 0);
    const Rows again = Lookup(*server, "m", 0, kWidth, keys);
    EXPECT_EQ(again.report.rows_from_volatile, promote ? 500u : 0u);
    EXPECT_EQ(again.report.rows_from_default, 500u);  // defaults do not move up
    ExpectRows(Lookup(*server, "m", 0, kWidth, {500, 999}), {500, 999}, 1);
    ExpectRows(Lookup(*server, "m", 0, kWidth, {1000, 1499}), {1000, 1499}, 0);
  }
}

TEST_F(ParameterServerTest, ALoadFillsABoundedTierUpToItsMarginAndEvictsNothing) {
  const std::vector<Key> keys = KeyRange(0, 20'000);
  WriteTable(folder_ / "large", keys, kWidth, 1);
  ServerConfig config = Config(Tiers::kBoth, {OneTable("large")});
  config.volatile_db.overflow_margin = 1'000;  // times 4 partitions
  config.volatile_db.cache_missed_embeddings = true;
  for (const char* source : {"folder", "persistent"}) {
    auto server = Open(config);
    EXPECT_EQ(Source(*server), source);
    const auto tier = [&] { return Stats(*server)["models"][0]["tables"][0]["volatile"]; };
    EXPECT_EQ(tier()["evicted_rows"], 0);
    EXPECT_GT(tier()["rows"], 3'300);
    ExpectRows(Lookup(*server, "m", 0, kWidth, keys), keys, 1);
    WaitUntil([&] { return tier()["evicted_rows"] > 0; }, "promoted rows that make others leave");
    EXPECT_LE(tier()["rows"], 4'000);
    ExpectRows(Lookup(*server, "m", 0, kWidth, keys), keys, 1);
    ASSERT_OK(server->Close());
  }
}

TEST_F(ParameterServerTest, RowsThatNoTierCouldServeAreRefused) {
  ServerConfig config = Config(Tiers::kVolatile, {OneTable()});
  config.volatile_db.overflow_margin = 200;  // times 4 partitions: fewer than the 1000 rows
  ExpectError(ParameterServer::Open(config).status(), StatusCode::kResourceExhausted,
              {"model 'm'", "table 't'", "1000 rows", "overflow_margin", "persistent_db"});
  config.volatile_db.overflow_margin = 400;
  auto server = Open(config);
  ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 1);

  // A model whose keys chance has put into one partition: seen after the load.
  const auto store = Value(OpenHashMapStore({.num_partitions = 1, .overflow = {.margin = 100}}));
  const auto table = Value(store->CreateTable({.name = "t", .row_bytes = kRowBytes}));
  const std::vector<std::byte> rows(101 * kRowBytes);
  ASSERT_OK(table->Upsert(std::span(kKeys).first(100), {rows.data(), kRowBytes}));
  EXPECT_TRUE(CheckNothingEvicted(*table).ok());
  ASSERT_OK(table->Upsert(std::span(kKeys).first(101), {rows.data(), kRowBytes}));
  ExpectError(CheckNothingEvicted(*table), StatusCode::kResourceExhausted, {"rows were evicted", "overflow_margin"});
}

TEST_F(ParameterServerTest, DamagedFoldersAreNamedAndNothingIsLeftBehind) {
  WriteTable(folder_ / "empty", {}, kWidth, 1);
  WriteTable(folder_ / "cut", kKeys, kWidth, 1);
  fs::resize_file(folder_ / "cut" / "emb_vector", 1001);
  WriteTable(folder_ / "odd", kKeys, kWidth, 1);
  fs::resize_file(folder_ / "odd" / "key", 4001);
  const std::pair<std::string, StatusCode> cases[] = {{"missing", StatusCode::kNotFound},
                                                      {"empty", StatusCode::kDataLoss},
                                                      {"cut", StatusCode::kDataLoss},
                                                      {"odd", StatusCode::kDataLoss}};
  for (Tiers tiers : kAllTiers) {
    for (const auto& [name, code] : cases) {
      ExpectError(ParameterServer::Open(Config(tiers, {TwoTables("a", name)})).status(), code,
                  {"test", "model 'm'", "table 'u'", (folder_ / name).string()});
    }
    ExpectError(ParameterServer::Open(Config(tiers, {OneTable("a", kWidth / 2)})).status(),
                StatusCode::kInvalidArgument, {"model 'm'", "table 't'", "width 8"});
    if (tiers != Tiers::kVolatile) EXPECT_TRUE(StoredTables(database()).empty());
  }
}

TEST_F(ParameterServerTest, ATableThatCannotFitIsRefusedBeforeItIsLoaded) {
  fs::create_directories(folder_ / "huge");
  std::ofstream(folder_ / "huge" / "key").flush();
  std::ofstream(folder_ / "huge" / "emb_vector").flush();
  constexpr uint64_t kRows = 100'000'000'000;  // sparse files: no disk is used
  fs::resize_file(folder_ / "huge" / "key", kRows * sizeof(Key));
  fs::resize_file(folder_ / "huge" / "emb_vector", kRows * kRowBytes);
  for (Tiers tiers : {Tiers::kVolatile, Tiers::kBoth}) {
    auto server = Open(Config(tiers, {OneTable()}));
    ModelConfig huge = OneTable("huge");
    ExpectError(server->ReplaceModel(huge), StatusCode::kResourceExhausted, {"model 'm'", "MiB"});
    huge.name = "huge";
    ExpectError(server->LoadModel(huge), StatusCode::kResourceExhausted, {"model 'huge'", "MiB"});
    ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 1);
  }
}

TEST_F(ParameterServerTest, AServerWithoutAnyTierIsRefused) {
  ServerConfig config = Config(Tiers::kVolatile, {OneTable()});
  config.volatile_db.type = VolatileType::kDisabled;
  ExpectError(ParameterServer::Open(config).status(), StatusCode::kUnimplemented, {"volatile_db"});
}

TEST_F(ParameterServerTest, WarningsOfTheConfigurationAreShown) {
  CapturedLog log;
  ServerConfig config = Config(Tiers::kVolatile, {OneTable()});
  config.warnings = {"a padded list"};
  config.information = {"an idle key"};
  config.models[0].gpucache = true;
  config.models[0].deployed_devices = {0};
  auto server = Open(config);
  EXPECT_NE(log.text().find("warning: a padded list\n"), std::string::npos);
  EXPECT_NE(log.text().find("an idle key\n"), std::string::npos);
  EXPECT_NE(log.text().find("warning: gpucache is true (model 'm')"), std::string::npos);
}

// ---- restart ----------------------------------------------------------------------------------------------------

TEST_F(ParameterServerTest, ARestartTakesTheRowsOfTheDatabaseAndDoesNotLoadAgain) {
  for (Tiers tiers : kPersistentTiers) {
    fs::remove_all(database());
    const ServerConfig config = Config(tiers, {OneTable()});
    auto server = Open(config);
    EXPECT_EQ(Source(*server), "folder");
    ASSERT_OK(server->Close());
    // A row that is newer than the folder's, and one that is not in the folder.
    WriteStoredRow(database(), "hps_et.m.t", 7, 42);
    WriteStoredRow(database(), "hps_et.m.t", 5000, 42);
    server = Open(config);
    EXPECT_EQ(Source(*server), "persistent");
    const Rows rows = Lookup(*server, "m", 0, kWidth, {7, 5000});
    ExpectRows(rows, {7, 5000}, 42);
    EXPECT_EQ(rows.report.rows_from_volatile, tiers == Tiers::kBoth ? 2u : 0u);
    ExpectRows(Lookup(*server, "m", 0, kWidth, {6, 8}), {6, 8}, 1);
    ASSERT_OK(server->Close());
    EXPECT_EQ(StoredTables(database()), (std::vector<std::string>{"hps_et.m.t"}));
  }
}

TEST_F(ParameterServerTest, AChangedFolderIsLoadedIntoANewGeneration) {
  for (Tiers tiers : kPersistentTiers) {
    fs::remove_all(database());
    WriteTable(folder_ / "a", kKeys, kWidth, 1);
    ASSERT_OK(Open(Config(tiers, {OneTable()}))->Close());
    for (uint32_t version : {2, 3}) {
      WriteTable(folder_ / "a", KeyRange(100, 500), kWidth, version);
      auto server = Open(Config(tiers, {OneTable()}));
      EXPECT_EQ(Source(*server), "folder");
      ExpectRows(Lookup(*server, "m", 0, kWidth, {100, 599}), {100, 599}, version);
      ExpectRows(Lookup(*server, "m", 0, kWidth, {0, 99, 600}), {0, 99, 600}, 0);  // nothing of the old version
      ASSERT_OK(server->Close());
      EXPECT_EQ(StoredTables(database()), (std::vector<std::string>{"hps_et.m.t@" + std::to_string(version - 1)}));
    }
    EXPECT_EQ(Source(*Open(Config(tiers, {OneTable()}))), "persistent");
  }
}

TEST_F(ParameterServerTest, ATableWrittenByAnotherProgramKeepsItsRows) {
  {
    auto store = OpenDatabase(database());
    ASSERT_OK(store->CreateTable({.name = "hps_et.m.t", .row_bytes = kRowBytes}).status());
    ASSERT_OK(store->Close());
  }
  WriteStoredRow(database(), "hps_et.m.t", 7, 42);
  WriteStoredRow(database(), "hps_et.m.t", 5000, 42);
  for (int start = 0; start < 2; ++start) {
    auto server = Open(Config(Tiers::kPersistent, {OneTable()}));
    EXPECT_EQ(Source(*server), start == 0 ? "folder" : "persistent");
    ExpectRows(Lookup(*server, "m", 0, kWidth, {5000}), {5000}, 42);
    ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 1);
  }
  EXPECT_EQ(StoredTables(database()), (std::vector<std::string>{"hps_et.m.t"}));
}

TEST_F(ParameterServerTest, ATableThatWasDroppedBehindTheRecordIsLoadedAgain) {
  ASSERT_OK(Open(Config(Tiers::kBoth, {OneTable()}))->Close());
  ASSERT_OK(OpenDatabase(database())->DropTable("hps_et.m.t"));
  auto server = Open(Config(Tiers::kBoth, {OneTable()}));
  EXPECT_EQ(Source(*server), "folder");
  ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 1);
}

TEST_F(ParameterServerTest, TablesThatTheConfigurationLeavesOutStayAsTheyAre) {
  WriteTable(folder_ / "b", kKeys, kWidth, 2);
  ASSERT_OK(Open(Config(Tiers::kBoth, {TwoTables("a", "b")}))->Close());
  WriteStoredRow(database(), "hps_et.m.u", 7, 42);
  ASSERT_OK(Open(Config(Tiers::kBoth, {OneTable()}))->Close());
  auto server = Open(Config(Tiers::kBoth, {TwoTables("a", "b")}));
  EXPECT_EQ(Source(*server, 1), "persistent");
  ExpectRows(Lookup(*server, "m", 1, kWidth, {7}), {7}, 42);
}

TEST_F(ParameterServerTest, AReadOnlyDatabaseNeedsNoFoldersAndIsNotWritten) {
  ASSERT_OK(Open(Config(Tiers::kPersistent, {OneTable()}))->Close());
  WriteStoredRow(database(), "hps_et.m.t", 7, 42);
  fs::remove_all(folder_ / "a");
  for (Tiers tiers : kPersistentTiers) {
    ServerConfig config = Config(tiers, {OneTable()});
    config.persistent_db.read_only = true;
    auto server = Open(config);
    EXPECT_EQ(Source(*server), "persistent");
    ExpectRows(Lookup(*server, "m", 0, kWidth, {7}), {7}, 42);
    ExpectRows(Lookup(*server, "m", 0, kWidth, {8}), {8}, 1);
    ModelConfig other = OneTable();
    other.name = "other";
    ExpectError(server->LoadModel(other), StatusCode::kNotFound, {"model 'other'", "hps_et.other.t"});
    ASSERT_OK(server->UnloadModel("m"));
    ASSERT_OK(server->LoadModel(OneTable()));
    ASSERT_OK(server->Close());
    config.persistent_db.path = (folder_ / "nowhere").string();
    ExpectError(ParameterServer::Open(config).status(), StatusCode::kNotFound, {"nowhere"});
  }
}

TEST_F(ParameterServerTest, DatabasesThatAreNoneAreRefused) {
  std::ofstream(folder_ / "file") << "text";
  ServerConfig config = MakeServer(Tiers::kBoth, folder_ / "file", {OneTable()});
  ExpectError(ParameterServer::Open(config).status(), StatusCode::kInvalidArgument, {"file"});
  config.persistent_db.path = (folder_ / "a").string();
  ExpectError(ParameterServer::Open(config).status(), StatusCode::kInvalidArgument, {(folder_ / "a").string()});
}

TEST_F(ParameterServerTest, ARecordThatCannotBeReadIsAnError) {
  ASSERT_OK(Open(Config(Tiers::kBoth, {OneTable()}))->Close());
  ASSERT_OK(OpenDatabase(database())->WriteRecord("hps.model.m", "what?"));
  ExpectError(ParameterServer::Open(Config(Tiers::kBoth, {OneTable()})).status(), StatusCode::kDataLoss,
              {"hps.model.m"});
}

// ---- replacing --------------------------------------------------------------------------------------------------

// Looks both tables up in one call until told to stop; every row of a call must be of one version.
class VersionChecker {
 public:
  VersionChecker(LookupSession session, bool sparse) : thread_([this, session, sparse] { Run(session, sparse); }) {}
  ~VersionChecker() { Stop(); }
  void Stop() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
  }
  int calls() const { return calls_; }
  std::atomic<uint32_t> newest{0};

 private:
  void Run(const LookupSession& session, bool sparse) {
    const std::vector<Key> keys = KeyRange(0, 1000);
    std::vector<int64_t> splits(keys.size() + 1);  // one key a row: the combined row is the row
    std::iota(splits.begin(), splits.end(), 0);
    std::vector<float> first(keys.size() * kWidth), second(keys.size() * kWidth);
    const DenseLookup dense_lookups[] = {{0, kWidth, keys, first.data()}, {1, kWidth, keys, second.data()}};
    const SparseLookup sparse_lookups[] = {
        {.table = 0, .width = kWidth, .keys = keys, .row_splits = splits, .output = first.data()},
        {.table = 1, .width = kWidth, .keys = keys, .row_splits = splits, .output = second.data()}};
    while (!stop_) {
      const Status status = sparse ? session.LookupSparse(sparse_lookups) : session.Lookup(dense_lookups);
      ASSERT_OK(status);
      const auto version = static_cast<uint32_t>(first[0]);
      for (size_t i = 0; i < keys.size(); ++i) {
        for (uint32_t j = 0; j < kWidth; ++j) {
          ASSERT_EQ(first[i * kWidth + j], Element(keys[i], version, j)) << "key " << keys[i] << ", not of " << version;
          ASSERT_EQ(second[i * kWidth + j], Element(keys[i], version, j))
              << "key " << keys[i] << ", not of " << version;
        }
      }
      ASSERT_GE(version, newest.exchange(version)) << "an older version came back";
      calls_.fetch_add(1);
    }
  }
  std::atomic<bool> stop_{false};
  std::atomic<int> calls_{0};
  std::thread thread_;
};

TEST_F(ParameterServerTest, LookupsOfManyTablesSeeOneVersionWhileTheModelIsReplaced) {
  constexpr uint32_t kVersions = 6;
  for (uint32_t version = 1; version <= kVersions; ++version) {
    for (const char* table : {"x", "y"}) {
      WriteTable(folder_ / (table + std::to_string(version)), kKeys, kWidth, version);
    }
  }
  for (Tiers tiers : kAllTiers) {
    fs::remove_all(database());
    auto server = Open(Config(tiers, {TwoTables("x1", "y1")}));
    VersionChecker dense(Value(server->NewSession("m")), false);
    VersionChecker sparse(Value(server->NewSession("m")), true);
    for (uint32_t version = 2; version <= kVersions; ++version) {
      const std::string number = std::to_string(version);
      const int dense_calls = dense.calls(), sparse_calls = sparse.calls();
      ASSERT_OK(server->ReplaceModel(TwoTables("x" + number, "y" + number)));
      // A call that began after the replacement sees the new version.
      WaitUntil([&] { return dense.calls() >= dense_calls + 2 && sparse.calls() >= sparse_calls + 2; }, "lookups");
      ExpectRows(Lookup(*server, "m", 1, kWidth, kKeys), kKeys, version);
      EXPECT_EQ(Stats(*server)["models"][0]["version"], version);
    }
    dense.Stop();
    sparse.Stop();
    EXPECT_EQ(Stats(*server)["models"][0]["tables"].size(), 2u);
    ASSERT_OK(server->Close());
    if (tiers == Tiers::kVolatile) continue;
    EXPECT_EQ(StoredTables(database()), (std::vector<std::string>{"hps_et.m.t@5", "hps_et.m.u@5"}));
  }
}

TEST_F(ParameterServerTest, AFailedReplacementLeavesTheOldVersionServing) {
  WriteTable(folder_ / "good", kKeys, kWidth, 2);
  WriteTable(folder_ / "wide", {1, Key{1} << 40}, kWidth, 2);  // its second key is found out while it is being loaded
  for (Tiers tiers : kAllTiers) {
    fs::remove_all(database());
    ServerConfig config = Config(tiers, {TwoTables("a", "a")});
    config.long_keys = false;
    auto server = Open(config);
    ExpectError(server->ReplaceModel(TwoTables("good", "wide")), StatusCode::kOutOfRange,
                {"model 'm'", "table 'u'", "1099511627776"});
    for (uint32_t table : {0, 1}) ExpectRows(Lookup(*server, "m", table, kWidth, kKeys), kKeys, 1);
    EXPECT_EQ(Stats(*server)["models"][0]["version"], 1);
    ASSERT_OK(server->Close());
    server.reset();
    if (tiers == Tiers::kVolatile) continue;
    EXPECT_EQ(StoredTables(database()), (std::vector<std::string>{"hps_et.m.t", "hps_et.m.u"}));
    server = Open(config);
    EXPECT_EQ(Source(*server, 0), "persistent");
    EXPECT_EQ(Source(*server, 1), "persistent");
    ASSERT_OK(server->ReplaceModel(TwoTables("good", "good")));
    for (uint32_t table : {0, 1}) ExpectRows(Lookup(*server, "m", table, kWidth, kKeys), kKeys, 2);
  }
}

TEST_F(ParameterServerTest, AFailedFirstLoadLeavesNoRecord) {
  WriteTable(folder_ / "wide", {1, Key{1} << 40}, kWidth, 2);
  ServerConfig config = Config(Tiers::kBoth, {TwoTables("a", "wide")});
  config.long_keys = false;
  ExpectError(ParameterServer::Open(config).status(), StatusCode::kOutOfRange, {"table 'u'"});
  EXPECT_TRUE(StoredTables(database()).empty());
  EXPECT_FALSE(Value(OpenDatabase(database())->ReadRecord("hps.model.m")).has_value());
}

TEST_F(ParameterServerTest, ANewVersionMayAddTablesButNotMoveOrReshapeThem) {
  WriteTable(folder_ / "wider", kKeys, kWidth + 1, 2);
  auto server = Open(Config(Tiers::kVolatile, {TwoTables("a", "a")}));
  ExpectError(server->ReplaceModel(OneTable()), StatusCode::kInvalidArgument, {"'m'", "'u'", "number 1"});
  ModelConfig swapped = TwoTables("a", "a");
  std::swap(swapped.tables[0], swapped.tables[1]);
  ExpectError(server->ReplaceModel(swapped), StatusCode::kInvalidArgument, {"'t'", "number 0"});
  ModelConfig reshaped = TwoTables("a", "a");
  reshaped.tables[1] = MakeTable("u", folder_ / "wider", kWidth + 1);
  ExpectError(server->ReplaceModel(reshaped), StatusCode::kInvalidArgument, {"'u'", "width 8"});
  ModelConfig longer = TwoTables("a", "a");
  longer.tables.push_back(MakeTable("v", folder_ / "wider", kWidth + 1));
  ASSERT_OK(server->ReplaceModel(longer));
  ExpectRows(Lookup(*server, "m", 2, kWidth + 1, kKeys), kKeys, 2);
}

TEST_F(ParameterServerTest, AnUnchangedTableOfANewVersionIsNotLoadedAgain) {
  WriteTable(folder_ / "b", kKeys, kWidth, 2);
  auto server = Open(Config(Tiers::kBoth, {TwoTables("a", "a")}));
  ASSERT_OK(server->ReplaceModel(TwoTables("a", "b")));
  EXPECT_EQ(Source(*server, 0), "persistent");
  EXPECT_EQ(Source(*server, 1), "folder");
  ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 1);
  ExpectRows(Lookup(*server, "m", 1, kWidth, kKeys), kKeys, 2);
  ASSERT_OK(server->Close());
  EXPECT_EQ(StoredTables(database()), (std::vector<std::string>{"hps_et.m.t", "hps_et.m.u@1"}));
}

TEST_F(ParameterServerTest, ModelsComeAndGo) {
  for (Tiers tiers : kAllTiers) {
    fs::remove_all(database());
    auto server = Open(Config(tiers, {OneTable()}));
    ExpectError(server->LoadModel(OneTable()), StatusCode::kAlreadyExists, {"'m'", "replace it"});
    ModelConfig other = OneTable();
    other.name = "other";
    ExpectError(server->ReplaceModel(other), StatusCode::kNotFound, {"'other'", "'m'"});
    ExpectError(server->UnloadModel("other"), StatusCode::kNotFound, {"'other'", "'m'"});
    ASSERT_OK(server->LoadModel(other));
    ExpectRows(Lookup(*server, "other", 0, kWidth, kKeys), kKeys, 1);
    ASSERT_OK(server->UnloadModel("m"));
    EXPECT_EQ(server->ModelNames(), (std::vector<std::string>{"other"}));
    ASSERT_OK(server->LoadModel(OneTable()));
    EXPECT_EQ(Source(*server), tiers == Tiers::kVolatile ? "folder" : "persistent");
    ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 1);
    ASSERT_OK(server->Close());
    ExpectError(server->LoadModel(OneTable()), StatusCode::kFailedPrecondition, {"closed"});
    ExpectError(server->ReplaceModel(OneTable()), StatusCode::kFailedPrecondition, {"closed"});
    ExpectError(server->UnloadModel("m"), StatusCode::kFailedPrecondition, {"closed"});
  }
}

TEST_F(ParameterServerTest, AModelOfARemoteFileSystemIsRefusedLaterToo) {
  auto server = Open(Config(Tiers::kVolatile, {}));
  ModelConfig remote = OneTable();
  remote.tables[0].path = "hdfs://host/a";
  ExpectError(server->LoadModel(remote), StatusCode::kUnimplemented, {"hdfs://host/a"});
}

TEST_F(ParameterServerTest, UnloadingAndReplacingFreeTheMemory) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers keep freed memory";
#endif
  constexpr uint32_t kWideWidth = 256;
  constexpr size_t kRows = 65'536;  // 64 MiB
  constexpr uint64_t kTableBytes = kRows * kWideWidth * sizeof(float);
  for (const char* name : {"big1", "big2"}) WriteTable(folder_ / name, KeyRange(0, kRows), kWideWidth, 1);
  auto server = Open(Config(Tiers::kVolatile, {}));
  const uint64_t before = AnonymousMemoryBytes();
  for (int round = 0; round < 3; ++round) {
    ASSERT_OK(server->LoadModel(OneTable("big1", kWideWidth)));
    ExpectRows(Lookup(*server, "m", 0, kWideWidth, {1, 2}), {1, 2}, 1);
    const uint64_t loaded = AnonymousMemoryBytes();
    // Not the whole table: memory that the process had freed before, and still counted in `before`, may be part of it.
    EXPECT_GE(loaded, before + kTableBytes * 3 / 4);
    ASSERT_OK(server->ReplaceModel(OneTable("big2", kWideWidth)));
    EXPECT_LE(AnonymousMemoryBytes(), loaded + kTableBytes / 10);
    ASSERT_OK(server->UnloadModel("m"));
    // What the loading thread had for its buffers may be kept for the next one.
    EXPECT_LE(AnonymousMemoryBytes(), before + kTableBytes / 3);
  }
}

TEST_F(ParameterServerTest, ClosingEndsALoadThatRuns) {
  WriteTable(folder_ / "large", KeyRange(0, 300'000), kWidth, 1);
  for (Tiers tiers : kAllTiers) {
    auto server = Open(Config(tiers, {}));
    std::atomic<bool> begun{false};
    std::thread loader([&] {
      begun = true;
      const Status status = server->LoadModel(OneTable("large"));
      if (!status.ok()) ExpectError(status, StatusCode::kFailedPrecondition, {"closed"});
    });
    WaitUntil([&] { return begun.load(); }, "the loader");
    ASSERT_OK(server->Close());
    loader.join();
    EXPECT_TRUE(server->ModelNames().empty());
  }
}

TEST_F(ParameterServerTest, ReadinessRemarksThatTheDatabasesFolderIsGone) {
  auto server = Open(Config(Tiers::kBoth, {OneTable()}));
  EXPECT_EQ(server->CheckReadiness().reason, "ready");
  fs::remove_all(database());
  const Readiness readiness = server->CheckReadiness();
  EXPECT_TRUE(readiness.ready) << readiness.reason;  // lookups are answered
  for (const std::string& part : {std::string("the persistent tier"), database().string(), std::string("deleted")}) {
    EXPECT_NE(readiness.reason.find(part), std::string::npos) << readiness.reason;
  }
  EXPECT_EQ(server->Close().code(), StatusCode::kDataLoss);
}

// ---- crashes ----------------------------------------------------------------------------------------------------

// Passes everything on until the call named `hold_at`: there it says so on standard output and waits to be killed.
class HoldingStore final : public TableStore {
 public:
  HoldingStore(std::unique_ptr<TableStore> store, std::string hold_at)
      : store_(std::move(store)), hold_at_(std::move(hold_at)) {}
  std::string_view kind() const override { return store_->kind(); }
  StoreCapabilities capabilities() const override { return store_->capabilities(); }
  Result<std::shared_ptr<Table>> OpenTable(const TableSpec& spec) override { return store_->OpenTable(spec); }
  Result<std::shared_ptr<Table>> CreateTable(const TableSpec& spec) override { return store_->CreateTable(spec); }
  Status DropTable(std::string_view name) override {
    // Dropping what a load left behind is no step of its own.
    if (++drops_ > 1) HoldAt("drop");
    return store_->DropTable(name);
  }
  Result<std::vector<std::string>> ListTables() const override { return store_->ListTables(); }
  Result<std::optional<std::string>> ReadRecord(std::string_view name) const override {
    return store_->ReadRecord(name);
  }
  Status WriteRecord(std::string_view name, std::string_view value) override {
    return store_->WriteRecord(name, value);
  }
  Status EraseRecord(std::string_view name) override { return store_->EraseRecord(name); }
  Status Flush() override {
    HoldAt("flush");
    HPS_RETURN_IF_ERROR(store_->Flush());
    HoldAt("flushed");
    return OkStatus();
  }
  Status Close() override { return store_->Close(); }

 private:
  void HoldAt(const std::string& place) {
    if (place != hold_at_) return;
    std::printf("held\n");
    std::fflush(stdout);
    for (;;) ::pause();
  }
  std::unique_ptr<TableStore> store_;
  const std::string hold_at_;
  int drops_ = 0;
};

// Loads the model over FOLDER/table into FOLDER/database and stops where the role says.
int RunRole(const std::string& role, const fs::path& folder) {
  ServerResources resources;
  resources.executor = NewThreadPool(2);
  resources.persistent_store = std::make_shared<HoldingStore>(OpenDatabase(folder / "database"), role);
  const ModelConfig model = MakeModel("m", {MakeTable("t", folder / "table", kWidth)});
  const auto built = BuildModel(model, resources, {.show_progress = false});
  std::printf("%s\n", built.status().ToString().c_str());
  return 1;
}

class CrashTest : public ParameterServerTest {
 protected:
  ServerConfig Config() {
    return MakeServer(Tiers::kBoth, database(), {MakeModel("m", {MakeTable("t", folder_ / "table", kWidth)})});
  }
  // Another process loads what FOLDER/table holds and dies at `place`.
  void CrashAt(const std::string& place) {
    ChildProcess child(place, folder_ / "");
    child.WaitForLine("held");
    child.Kill();
  }
};

TEST_F(CrashTest, AFirstLoadThatWasCutShortIsDoneAgain) {
  for (const char* place : {"flush", "flushed"}) {
    fs::remove_all(database());
    WriteTable(folder_ / "table", kKeys, kWidth, 1);
    CrashAt(place);
    // Another version by now: not one row of the half-loaded one may be left.
    WriteTable(folder_ / "table", KeyRange(500, 1000), kWidth, 2);
    auto server = Open(Config());
    EXPECT_EQ(Source(*server), "folder");
    ExpectRows(Lookup(*server, "m", 0, kWidth, {500, 1499}), {500, 1499}, 2);
    ExpectRows(Lookup(*server, "m", 0, kWidth, {0, 499}), {0, 499}, 0);
    ASSERT_OK(server->Close());
    EXPECT_EQ(StoredTables(database()), (std::vector<std::string>{"hps_et.m.t"}));
    EXPECT_EQ(Source(*Open(Config())), "persistent");
  }
}

TEST_F(CrashTest, AReadOnlyServerRefusesAFirstLoadThatWasCutShort) {
  WriteTable(folder_ / "table", kKeys, kWidth, 1);
  CrashAt("flushed");
  ServerConfig config = Config();
  config.persistent_db.read_only = true;
  ExpectError(ParameterServer::Open(config).status(), StatusCode::kFailedPrecondition, {"cut short", "read_only"});
}

TEST_F(CrashTest, ANewVersionThatWasCutShortLeavesTheOldOne) {
  for (const char* place : {"flush", "flushed"}) {
    fs::remove_all(database());
    WriteTable(folder_ / "table", kKeys, kWidth, 1);
    ASSERT_OK(Open(Config())->Close());
    WriteStoredRow(database(), "hps_et.m.t", 7, 42);
    fs::rename(folder_ / "table", folder_ / "old");
    WriteTable(folder_ / "table", kKeys, kWidth, 2);
    CrashAt(place);
    EXPECT_EQ(StoredTables(database()), (std::vector<std::string>{"hps_et.m.t", "hps_et.m.t@1"}));
    // Whoever starts with the old folder has the old version, and the half-loaded one is cleared away.
    fs::rename(folder_ / "table", folder_ / "new");
    fs::rename(folder_ / "old", folder_ / "table");
    auto server = Open(Config());
    EXPECT_EQ(Source(*server), "persistent");
    ExpectRows(Lookup(*server, "m", 0, kWidth, {7}), {7}, 42);
    ASSERT_OK(server->Close());
    EXPECT_EQ(StoredTables(database()), (std::vector<std::string>{"hps_et.m.t"}));
    // With the new folder it is loaded again.
    fs::remove_all(folder_ / "table");
    fs::rename(folder_ / "new", folder_ / "table");
    server = Open(Config());
    EXPECT_EQ(Source(*server), "folder");
    ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 2);
  }
}

TEST_F(CrashTest, TheNewVersionCountsFromTheRecordOn) {
  WriteTable(folder_ / "table", kKeys, kWidth, 1);
  ASSERT_OK(Open(Config())->Close());
  WriteTable(folder_ / "table", kKeys, kWidth, 2);
  CrashAt("drop");  // the record is written, the old generation is still there
  EXPECT_EQ(StoredTables(database()), (std::vector<std::string>{"hps_et.m.t", "hps_et.m.t@1"}));
  auto server = Open(Config());
  EXPECT_EQ(Source(*server), "persistent");
  ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 2);
  ASSERT_OK(server->Close());
  EXPECT_EQ(StoredTables(database()), (std::vector<std::string>{"hps_et.m.t@1"}));
}

// ---- statistics -------------------------------------------------------------------------------------------------

TEST_F(ParameterServerTest, StatisticsAreWhatWasDone) {
  WriteTable(folder_ / "u", {1, 2, 2}, kWidth, 2);  // a key twice
  ServerConfig config = Config(Tiers::kBoth, {TwoTables("a", "u")});
  config.volatile_db.initial_cache_rate = 0.5;
  auto server = Open(config);
  for (int i = 0; i < 3; ++i) ASSERT_OK(Lookup(*server, "m", 0, kWidth, KeyRange(0, 1100)).status);
  ASSERT_OK(Lookup(*server, "m", 1, kWidth, {1, 2, 3}).status);
  EXPECT_FALSE(Lookup(*server, "m", 7, kWidth, {1}).status.ok());

  const Json stats = Stats(*server);
  EXPECT_EQ(stats["config"], "test");
  EXPECT_EQ(stats["config_hash"], ConfigHash(config));
  EXPECT_EQ(stats["tiers"]["volatile"], "hash_map");
  EXPECT_EQ(stats["tiers"]["persistent"], "rocks_db");
  ASSERT_EQ(stats["models"].size(), 1u);
  const Json& model = stats["models"][0];
  EXPECT_EQ(model["name"], "m");
  EXPECT_EQ(model["lookup_latency"]["count"], 5);  // the refused call took time too
  EXPECT_GT(model["lookup_latency"]["p99_us"].get<double>(), 0.0);
  const Json& table = model["tables"][0];
  EXPECT_EQ(table["width"], kWidth);
  EXPECT_EQ(table["lookups"], 3);
  EXPECT_EQ(table["keys"], 3300);
  EXPECT_EQ(table["rows_served"]["volatile"], 1500);
  EXPECT_EQ(table["rows_served"]["persistent"], 1500);
  EXPECT_EQ(table["rows_served"]["default"], 300);
  EXPECT_EQ(table["load"]["rows_read"], 1000);
  EXPECT_EQ(table["load"]["non_finite_rows"], 0);
  EXPECT_EQ(table["volatile"]["rows"], 500);
  EXPECT_EQ(table["persistent"]["rows"], 1000);
  EXPECT_EQ(model["tables"][1]["load"]["rows_read"], 3);
  EXPECT_EQ(model["tables"][1]["persistent"]["rows"], 2);

  const std::string text = server->PrometheusText();
  for (const char* line :
       {"hps_lookups_done_total{model=\"m\",table=\"t\"} 3\n", "hps_keys_asked_total{model=\"m\",table=\"t\"} 3300\n",
        "hps_rows_served_total{model=\"m\",table=\"t\",tier=\"volatile\"} 1500\n",
        "hps_rows_served_total{model=\"m\",table=\"t\",tier=\"persistent\"} 1500\n",
        "hps_rows_served_total{model=\"m\",table=\"t\",tier=\"default\"} 300\n",
        "hps_lookup_duration_seconds_count{model=\"m\"} 5\n"}) {
    EXPECT_NE(text.find(line), std::string::npos) << line << " in\n" << text;
  }
}

TEST_F(ParameterServerTest, RowsThatAreNotNumbersAreServedAndCounted) {
  CapturedLog log;
  std::fstream file(folder_ / "a" / "emb_vector", std::ios::binary | std::ios::in | std::ios::out);
  const float bad = std::numeric_limits<float>::quiet_NaN();
  file.write(reinterpret_cast<const char*>(&bad), sizeof(bad));
  file.close();
  auto server = Open(Config(Tiers::kVolatile, {OneTable()}));
  EXPECT_EQ(Stats(*server)["models"][0]["tables"][0]["load"]["non_finite_rows"], 1);
  EXPECT_NE(log.text().find("NaN"), std::string::npos);
  EXPECT_TRUE(std::isnan(Lookup(*server, "m", 0, kWidth, {0}).values[0]));
}

TEST_F(ParameterServerTest, StatisticsBearPathsThatAreNotText) {
  ServerConfig config = Config(Tiers::kVolatile, {OneTable()});
  config.origin = "ps\xff.json";
  EXPECT_NE(Open(config)->StatsJson().find(".json"), std::string::npos);
}

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunTests(argc, argv, hps::testing::RunRole); }
