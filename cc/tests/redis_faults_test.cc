// The Redis store while the servers die, fall silent, fail over and move slots: no wrong row, no hang beyond the
// deadline, and recovery without opening anything anew.

#include <gtest/gtest.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>

#include "cc/storage/redis_layout.h"
#include "cc/tests/redis_fixture.h"

namespace hps::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

struct Served {
  std::unique_ptr<RedisService> redis;
  std::unique_ptr<TableStore> store;
  std::shared_ptr<Table> table;
};

Served Serve(RedisOptions options, size_t rows) {
  Served served;
  served.redis = Value(RedisService::Start(std::move(options)));
  served.store = Value(OpenRedisStore(OptionsFor(*served.redis)));
  served.table = Value(served.store->CreateTable(kTable));
  EXPECT_TRUE(Put(*served.table, KeyRange(0, rows), 1).ok());
  return served;
}

// The slot of the partition that holds `key`.
int SlotOf(Key key) {
  const RedisLayout layout(RedisLayout::Version::kCurrent, kTable.name, 8, 8);
  return RedisSlot(layout.ValuesKey(layout.PartitionOf(key)));
}

TEST(RedisFaults, SilentServerCostsTheDeadlineAndNoMore) {
  const Served served = Serve({}, 1000);
  const std::vector<Key> left = KeyRange(0, 500);
  const std::vector<Key> right = KeyRange(500, 500);
  ExpectAll(*served.table, left, 1);
  served.redis->Stop(0);
  const auto start = steady_clock::now();
  ExpectError(Get(*served.table, left, start + milliseconds(150)).status, StatusCode::kDeadlineExceeded,
              {served.redis->address(0)});
  EXPECT_GE(steady_clock::now(), start + milliseconds(150));
  std::atomic<bool> cancelled{false};
  std::thread canceller([&] { cancelled = true; });
  ExpectError(Get(*served.table, left, kNoDeadline, &cancelled).status, StatusCode::kCancelled);
  canceller.join();
  EXPECT_LT(steady_clock::now(), start + seconds(10));
  served.redis->Continue(0);
  // The replies to what was given up must reach nobody.
  for (int i = 0; i < 20; ++i) ExpectAll(*served.table, right, 1);
  ExpectAll(*served.table, left, 1);
}

TEST(RedisFaults, WithoutADeadlinePatienceEnds) {
  const auto redis = Value(RedisService::Start());
  RedisStoreOptions options = OptionsFor(*redis);
  options.patience = milliseconds(300);
  const auto store = Value(OpenRedisStore(options));
  const auto table = Value(store->CreateTable(kTable));
  redis->Stop(0);
  EXPECT_EQ(Put(*table, {1}, 1).code(), StatusCode::kDeadlineExceeded);
  redis->Kill(0);
  ExpectError(Put(*table, {1}, 1), StatusCode::kUnavailable, {"refused"});
}

TEST(RedisFaults, DeadServerComesBack) {
  const Served served = Serve({.appendonly = true, .directives = {"appendfsync always"}}, 1000);
  served.redis->Kill(0);
  // Nothing can be said to be slow: a lookup ends at once, with a long deadline or none.
  const auto start = steady_clock::now();
  for (const Deadline deadline : {start + std::chrono::hours(1), kNoDeadline}) {
    const Status status = Get(*served.table, {1}, deadline).status;
    ExpectError(status, StatusCode::kUnavailable, {served.redis->address(0), "refused", "nothing listens"});
    EXPECT_EQ(status.message().find("enable_tls"), std::string::npos) << status.ToString();
  }
  EXPECT_LT(steady_clock::now(), start + seconds(14)) << "waited until patience had ended";
  // What no other tier can do waits for it.
  std::thread starter([&] { EXPECT_TRUE(served.redis->Restart(0).ok()); });
  ASSERT_OK(Put(*served.table, {2000}, 2));
  starter.join();
  ExpectAll(*served.table, KeyRange(0, 1000), 1);
}

// A server in front of RocksDB: while nothing listens, rows come from there without waiting for timeout_ms.
TEST(RedisFaults, LookupsPassToTheNextTierAtOnce) {
  TempFolder folder;
  for (const int masters : {0, 3}) {
    SCOPED_TRACE(masters);
    const auto redis =
        Value(RedisService::Start({.masters = masters, .appendonly = true, .directives = {"appendfsync always"}}));
    const std::string name = "tables" + std::to_string(masters);
    const std::vector<Key> keys = KeyRange(0, 500);
    WriteTable(folder / name, keys, 4, 1);
    ServerConfig config = MakeServer(Tiers::kBoth, folder / ("database" + std::to_string(masters)),
                                     {MakeModel("m", {MakeTable("t", folder / name, 4)})});
    config.volatile_db.type = VolatileType::kRedisCluster;
    config.volatile_db.address = redis->address_list();
    config.volatile_db.timeout_ms = 60'000;
    const auto server = Value(ParameterServer::Open(config));
    Rows rows = Lookup(*server, "m", 0, 4, keys);
    ExpectRows(rows, keys, 1);
    EXPECT_EQ(rows.report.rows_from_volatile, keys.size());
    for (int node = 0; node < redis->size(); ++node) redis->Kill(node);
    const auto start = steady_clock::now();
    for (int i = 0; i < 3; ++i) {  // fewer than open the circuit breaker
      rows = Lookup(*server, "m", 0, 4, keys);
      ExpectRows(rows, keys, 1);
      EXPECT_EQ(rows.report.rows_from_persistent, keys.size());
      EXPECT_EQ(rows.report.rows_skipped_volatile, keys.size());
    }
    EXPECT_LT(steady_clock::now(), start + seconds(20));
    for (int node = 0; node < redis->size(); ++node) ASSERT_OK(redis->Restart(node));
    WaitUntil([&] { return Lookup(*server, "m", 0, 4, keys).report.rows_skipped_volatile == 0; }, "Redis to be asked");
  }
}

TEST(RedisFaults, SlotsMoveUnderReadersAndWriters) {
  const Served served = Serve({.masters = 3}, 4000);
  const std::vector<Key> still = KeyRange(0, 2000);
  const std::vector<Key> written = KeyRange(2000, 2000);
  std::atomic<bool> stop{false};
  std::atomic<int> reads{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      while (!stop && !::testing::Test::HasFailure()) {
        ExpectAll(*served.table, still, 1);
        ++reads;
      }
    });
  }
  threads.emplace_back([&] {
    for (uint32_t version = 2; !stop && !::testing::Test::HasFailure(); ++version) {
      const Status status = Put(*served.table, written, version);
      EXPECT_TRUE(status.ok()) << status.ToString();
      ExpectAll(*served.table, written, version);
      EXPECT_EQ(RowsOf(*served.table), 4000u);
    }
  });
  for (int round = 0; round < 2; ++round) {
    for (const Key key : {Key{0}, Key{1}, Key{2}}) {
      const int slot = SlotOf(key);
      const int from = served.redis->MasterOf(slot);
      const Status moved = served.redis->MigrateSlots(slot, slot, from, (from + 1 + round) % 3);
      EXPECT_TRUE(moved.ok()) << moved.ToString();
    }
  }
  const int seen = reads;
  WaitUntil([&] { return reads > seen + 2 || ::testing::Test::HasFailure(); }, "reads after the slots had moved");
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

TEST(RedisFaults, HalfMovedSlotIsAskedFor) {
  const Served served = Serve({.masters = 3}, 100);
  const int slot = SlotOf(5);
  const int from = served.redis->MasterOf(slot);
  const int to = (from + 1) % 3;
  const std::string from_id = Ask(*served.redis, {"CLUSTER", "MYID"}, from);
  const std::string to_id = Ask(*served.redis, {"CLUSTER", "MYID"}, to);
  Ask(*served.redis, {"CLUSTER", "SETSLOT", std::to_string(slot), "IMPORTING", from_id}, to);
  Ask(*served.redis, {"CLUSTER", "SETSLOT", std::to_string(slot), "MIGRATING", to_id}, from);
  ExpectAll(*served.table, KeyRange(0, 100), 1);  // the partition has not moved yet
  ASSERT_OK(Put(*served.table, {5}, 2));
  const RedisLayout layout(RedisLayout::Version::kCurrent, kTable.name, 8, 8);
  Ask(*served.redis,
      {"MIGRATE", "127.0.0.1", std::to_string(served.redis->real_port(to)), layout.ValuesKey(layout.PartitionOf(5)),
       "0", "5000"},
      from);
  // It has moved, and the slot still belongs to the old node: ASK, for commands of one and of many parts.
  ExpectAll(*served.table, {5}, 2);
  ASSERT_OK(Put(*served.table, {5}, 3));
  const std::vector<Key> absent = KeyRange(1000, 200);
  ASSERT_OK(Put(*served.table, absent, 4, {.only_absent = true}));
  ExpectAll(*served.table, absent, 4);
  ExpectAll(*served.table, {5}, 3);
  uint64_t erased = 0;
  ASSERT_OK(served.table->Erase(absent, &erased));
  EXPECT_EQ(erased, absent.size());
  EXPECT_EQ(RowsOf(*served.table), 100u);
}

TEST(RedisFaults, ReplicaTakesOver) {
  const Served served = Serve({.masters = 3, .replicas_per_master = 1, .cluster_node_timeout_ms = 800}, 2000);
  const std::vector<Key> keys = KeyRange(0, 2000);
  ASSERT_OK(served.redis->WaitUntilReplicated());  // what was acknowledged reaches the replicas before one is killed
  // One dies; then another falls silent while its connections live.
  served.redis->Kill(0);
  ExpectAll(*served.table, keys, 1);  // waits for the fail-over, with no deadline of its own
  ASSERT_OK(served.redis->Restart(0));
  ASSERT_OK(served.redis->WaitUntilHealthy());
  ASSERT_OK(Put(*served.table, keys, 2));
  ASSERT_OK(served.redis->WaitUntilReplicated());
  ExpectAll(*served.table, keys, 2);
  served.redis->Stop(1);
  ExpectAll(*served.table, keys, 2);
  ASSERT_OK(Put(*served.table, keys, 3));
  served.redis->Continue(1);
  ExpectAll(*served.table, keys, 3);
}

TEST(RedisFaults, WholeClusterDiesAndComesBack) {
  const Served served = Serve({.masters = 3, .appendonly = true, .directives = {"appendfsync always"}}, 2000);
  for (int node = 0; node < 3; ++node) served.redis->Kill(node);
  const auto start = steady_clock::now();
  for (int i = 0; i < 3; ++i) {
    ExpectError(Get(*served.table, {1, 2, 3}, steady_clock::now() + milliseconds(100)).status,
                StatusCode::kUnavailable);
  }
  EXPECT_LT(steady_clock::now(), start + seconds(10));
  ExpectError(OpenRedisStore(OptionsFor(*served.redis)).status(), StatusCode::kUnavailable);
  for (int node = 0; node < 3; ++node) ASSERT_OK(served.redis->Restart(node));
  ExpectAll(*served.table, KeyRange(0, 2000), 1);
  ASSERT_OK(Put(*served.table, KeyRange(0, 2000), 2));
  ExpectAll(*served.table, KeyRange(0, 2000), 2);
}

TEST(RedisFaults, ScanGoesOnAfterARestart) {
  const Served served = Serve({.appendonly = true, .directives = {"appendfsync always"}}, 20'000);
  std::vector<Key> seen;
  bool restarted = false;
  ASSERT_OK(served.table->Scan([&](std::span<const Key> keys, ConstRowBuffer) {
    seen.insert(seen.end(), keys.begin(), keys.end());
    if (!std::exchange(restarted, true)) {
      served.redis->Kill(0);
      return served.redis->Restart(0);
    }
    return OkStatus();
  }));
  std::sort(seen.begin(), seen.end());
  EXPECT_EQ(seen, KeyRange(0, 20'000)) << "each row once, though cursors of the old process mean nothing";
}

// The circuit breaker, whose wait has grown, must not keep out what has just been loaded again: neither on the node
// that loads it nor on one that opens it.
TEST(RedisFaults, AReplacementServesFromAServerThatCameBackEmptyAtOnce) {
  constexpr uint32_t kWidth = 4;
  const std::vector<Key> keys = KeyRange(0, 1000);
  for (const Tiers tiers : {Tiers::kBoth, Tiers::kVolatile}) {
    TempFolder folder;
    WriteTable(folder / "t", keys, kWidth, 1);
    const auto redis = Value(RedisService::Start());
    const ModelConfig model = MakeModel("m", {MakeTable("t", folder / "t", kWidth)});
    const auto open = [&](const char* database) {
      ServerConfig config = MakeServer(tiers, folder / database, {model});
      config.volatile_db.type = VolatileType::kRedisCluster;
      config.volatile_db.address = redis->address_list();
      return Value(ParameterServer::Open(config, {.show_progress = false}));
    };
    const std::shared_ptr<ParameterServer> servers[] = {open("database"), open("other")};
    const auto stats = [](const auto& server) { return nlohmann::json::parse(server->StatsJson()); };
    const auto tier = [&](const auto& server) { return stats(server)["tier_states"]["volatile"]; };
    std::atomic<bool> stop{false};
    std::vector<std::thread> traffic;
    for (const auto& server : servers) {
      traffic.emplace_back([&] {
        const LookupSession session = Value(server->NewSession("m"));
        while (!stop) {
          const Rows rows = Lookup(session, 0, kWidth, keys);
          if (tiers == Tiers::kBoth) ExpectRows(rows, keys, 1);
        }
      });
    }
    Ask(*redis, {"FLUSHALL"});
    for (const auto& server : servers) {
      const auto failed = [&] { return stats(server)["models"][0]["tables"][0]["volatile"]["fetches_failed"]; };
      WaitUntil([&] { return failed() >= 9; }, "four tries of the open breaker");  // the next comes after 0.8 to 1.6 s
    }
    for (const auto& server : servers) {
      EXPECT_NE(tier(server)["breaker"], "closed");
      EXPECT_NE(server->CheckReadiness().reason, "ready");
      ASSERT_OK(server->ReplaceModel(model));
      EXPECT_EQ(tier(server)["breaker"], "closed");
      EXPECT_EQ(server->CheckReadiness().reason, "ready");
      const Rows rows = Lookup(*server, "m", 0, kWidth, keys);
      ExpectRows(rows, keys, 1);
      EXPECT_EQ(rows.report.rows_from_volatile, keys.size());
    }
    EXPECT_EQ(stats(servers[1])["models"][0]["tables"][0]["load"]["rows_read"], 0) << "it was to open what is there";
    stop = true;
    for (std::thread& thread : traffic) thread.join();
    for (const auto& server : servers) {
      EXPECT_EQ(tier(server)["breaker"], "closed");
      EXPECT_EQ(tier(server)["openings"], 1);
    }
  }
}

// Two ways of counting tables without names.
TEST(RedisFaults, AServerThatLoadsNothingSaysWhichTableNearlyFits) {
  constexpr uint32_t kWidth = 4;
  TempFolder folder;
  WriteTable(folder / "t", KeyRange(0, 10), kWidth, 1);
  const auto redis = Value(RedisService::Start());
  const auto config_for = [&](const std::string& table) {
    ServerConfig config = MakeServer(Tiers::kVolatile, "", {MakeModel("m", {MakeTable(table, folder / "t", kWidth)})});
    config.volatile_db.type = VolatileType::kRedisCluster;
    config.volatile_db.address = redis->address_list();
    return config;
  };
  ASSERT_OK(Value(ParameterServer::Open(config_for("sparse_embedding1"), {.show_progress = false}))->Close());
  ServerConfig config = config_for("sparse_embedding0");
  config.volatile_db.initialize_after_startup = false;
  ExpectError(ParameterServer::Open(config).status(), StatusCode::kFailedPrecondition,
              {"there is \"hps_et.m.sparse_embedding1\"", "embedding_table_names", "initialize_after_startup"});
}

// A partition that is gone, with nothing below that could serve its rows.
TEST(RedisFaults, AServerLoadsATableAnewThatHasLostAPartition) {
  constexpr uint32_t kWidth = 4;
  const std::vector<Key> keys = KeyRange(0, 1000);
  TempFolder folder;
  WriteTable(folder / "t", keys, kWidth, 1);
  const auto redis = Value(RedisService::Start());
  ServerConfig config = MakeServer(Tiers::kVolatile, "", {MakeModel("m", {MakeTable("t", folder / "t", kWidth)})});
  config.volatile_db.type = VolatileType::kRedisCluster;
  config.volatile_db.address = redis->address_list();
  ASSERT_OK(Value(ParameterServer::Open(config, {.show_progress = false}))->Close());
  const RedisLayout layout(RedisLayout::Version::kCurrent, "hps_et.m.t", config.volatile_db.num_partitions, 8);
  ASSERT_EQ(Ask(*redis, {"DEL", layout.ValuesKey(1)}), "1");
  config.volatile_db.initialize_after_startup = false;
  ExpectError(ParameterServer::Open(config).status(), StatusCode::kDataLoss,
              {"table 't'", "redis_cluster", "of the 1000", "initialize_after_startup"});
  config.volatile_db.initialize_after_startup = true;
  for (int start = 0; start < 2; ++start) {
    CapturedLog log;
    const auto server = Value(ParameterServer::Open(config, {.show_progress = false}));
    ExpectRows(Lookup(*server, "m", 0, kWidth, keys), keys, 1);
    EXPECT_EQ(log.text().find("has lost rows") != std::string::npos, start == 0) << log.text();
    ASSERT_OK(server->Close());
  }
}

// Redis that evicts while a model is loaded.
TEST(RedisFaults, ALoadIntoAServerThatEvictsIsRefused) {
  constexpr uint32_t kWidth = 64;
  TempFolder folder;
  WriteTable(folder / "t", KeyRange(0, 40'000), kWidth, 1);  // 10 MB of rows
  const auto redis =
      Value(RedisService::Start({.maxmemory_bytes = 8 << 20, .directives = {"maxmemory-policy allkeys-random"}}));
  ServerConfig config = MakeServer(Tiers::kVolatile, "", {MakeModel("m", {MakeTable("t", folder / "t", kWidth)})});
  config.volatile_db.type = VolatileType::kRedisCluster;
  config.volatile_db.address = redis->address_list();
  config.volatile_db.num_partitions = 64;
  // Chance decides what goes: rows, or what Redis knows of the table itself. Both are refused; wait for the former.
  Status status;
  for (int i = 0; i < 50 && status.code() != StatusCode::kDataLoss; ++i) {
    Ask(*redis, {"FLUSHALL"});
    status = ParameterServer::Open(config, {.show_progress = false}).status();
    if (status.code() != StatusCode::kDataLoss) {
      ExpectError(status, StatusCode::kUnavailable, {"table 't'", "has vanished", "maxmemory-policy"});
    }
  }
  ExpectError(status, StatusCode::kDataLoss, {"table 't'", "40000 were written", "noeviction"});
}

}  // namespace
}  // namespace hps::testing
