// What the Redis store adds to the contract of table_store.h: formats, tables of other programs, limits, evictions,
// logins and restarts. redis-cli is the other client; faults are in redis_faults_test.cc.

#include "cc/storage/redis_store.h"

#include <gtest/gtest.h>

#include <fstream>
#include <set>

#include "cc/storage/redis_layout.h"
#include "cc/tests/redis_fixture.h"

namespace hps::testing {
namespace {

// One server for all tests that need no special one; emptied for each.
class RedisStore : public ::testing::Test {
 protected:
  void SetUp() override {
    if (server_ == nullptr) server_ = Value(RedisService::Start()).release();
    Ask(*server_, {"FLUSHALL"});
  }
  // The process ends with its servers.
  static RedisService& server() { return *server_; }

  static std::unique_ptr<TableStore> Open(RedisStoreOptions options = {}) {
    options.address = server_->address_list();
    return Value(OpenRedisStore(options));
  }
  static Status OpenError(RedisStoreOptions options) {
    if (options.address == RedisStoreOptions().address) options.address = server_->address_list();
    return OpenRedisStore(options).status();
  }

 private:
  static inline RedisService* server_ = nullptr;
};

// Formats ------------------------------------------------------------------------------------------------------------

TEST_F(RedisStore, RowsLieWhereOtherProgramsLookForThem) {
  const auto store = Open({.num_partitions = 5});
  const auto table = Value(store->CreateTable({.name = "hps_et.m.t", .row_bytes = 4}));
  const Key key = KeyOf("ABCDEFGH");
  ASSERT_OK(table->Upsert(std::span(&key, 1), {reinterpret_cast<const std::byte*>("row."), 4}));
  const std::string partition = std::to_string(PartitionHash(static_cast<uint64_t>(key)) % 5);
  EXPECT_EQ(Ask(server(), {"HGET", "hps_et{hps_et.m.t/p" + partition + "}v", "ABCDEFGH"}), "row.");
  EXPECT_EQ(Ask(server(), {"HMGET", "hps.table/hps_et.m.t", "num_partitions", "row_bytes", "key_bytes"}), "5\n4\n8");
  ASSERT_OK(store->WriteRecord("hps.model.m", "text"));
  EXPECT_EQ(Ask(server(), {"GET", "hps.record/hps.model.m"}), "text");
  ASSERT_OK(store->DropTable("hps_et.m.t"));
  EXPECT_EQ(Value(store->ListTables()).size(), 0u);
  EXPECT_EQ(Ask(server(), {"EXISTS", "hps.table/hps_et.m.t"}), "0");
}

TEST_F(RedisStore, KeysOfFourBytes) {
  const auto store = Open();
  const TableSpec spec = {.name = "hps_et.m.t", .row_bytes = kRowBytes, .key_bytes = 4};
  const auto table = Value(store->CreateTable(spec));
  const std::vector<Key> keys = {0, -1, 7, 2147483647, -2147483648, KeyOf("ABCD")};
  ASSERT_OK(Put(*table, keys, 3));
  ExpectAll(*table, keys, 3);
  const std::string partition = std::to_string(PartitionHash(static_cast<uint32_t>(KeyOf("ABCD"))) % 8);
  EXPECT_EQ(Ask(server(), {"HSTRLEN", "hps_et{hps_et.m.t/p" + partition + "}v", "ABCD"}), "16");
  for (const Key key : {Key{2147483648}, Key{-2147483649}}) {
    ExpectError(Put(*table, {key}, 1), StatusCode::kOutOfRange, {std::to_string(key), "supportlonglong"});
    ExpectError(Get(*table, {key}).status, StatusCode::kOutOfRange);
    ExpectError(table->Erase(std::vector<Key>{key}), StatusCode::kOutOfRange);
  }
  std::set<Key> scanned;
  ASSERT_OK(table->Scan([&](std::span<const Key> chunk, ConstRowBuffer) {
    scanned.insert(chunk.begin(), chunk.end());
    return OkStatus();
  }));
  EXPECT_EQ(scanned, std::set<Key>(keys.begin(), keys.end()));
}

TEST_F(RedisStore, RowOfAnotherLengthIsDataLoss) {
  const auto store = Open();
  const auto table = Value(store->CreateTable(kTable));
  const Key key = KeyOf("ABCDEFGH");
  ASSERT_OK(Put(*table, {1, key}, 1));
  const std::string partition = std::to_string(PartitionHash(static_cast<uint64_t>(key)) % 8);
  Ask(server(), {"HSET", "hps_et{hps_et.m.t/p" + partition + "}v", "ABCDEFGH", "short"});
  ExpectError(Get(*table, {1, key}).status, StatusCode::kDataLoss,
              {"\"hps_et.m.t\"", std::to_string(key), "5 bytes instead of 16"});
  EXPECT_EQ(table->Scan([](auto, auto) { return OkStatus(); }).code(), StatusCode::kDataLoss);
  ExpectAll(*table, {1}, 1);
  ASSERT_OK(Put(*table, {key}, 2));
  ExpectAll(*table, {key}, 2);
}

TEST_F(RedisStore, ConfigurationsThatDisagreeAreRefused) {
  Value(Open({.num_partitions = 8})->CreateTable(kTable));
  ExpectError(Open({.num_partitions = 16})->OpenTable(kTable).status(), StatusCode::kFailedPrecondition,
              {"num_partitions", "8", "16", "hps_et.m.t"});
  const auto store = Open({.num_partitions = 8});
  ExpectError(store->OpenTable({.name = "hps_et.m.t", .row_bytes = 32}).status(), StatusCode::kFailedPrecondition,
              {"16", "32", "embedding_vecsize_per_table"});
  ExpectError(store->OpenTable({.name = "hps_et.m.t", .row_bytes = 16, .key_bytes = 4}).status(),
              StatusCode::kFailedPrecondition, {"supportlonglong"});
  // Another configuration may drop it all the same.
  ASSERT_OK(Open({.num_partitions = 16})->DropTable("hps_et.m.t"));
  EXPECT_EQ(Ask(server(), {"DBSIZE"}), "0");
}

TEST_F(RedisStore, NamesAndSizesThatCannotBeAreRefused) {
  const auto store = Open();
  for (const TableSpec& spec :
       {TableSpec{.name = "", .row_bytes = 4}, TableSpec{.name = "a{b}", .row_bytes = 4},
        TableSpec{.name = "a", .row_bytes = 0}, TableSpec{.name = "a", .row_bytes = 4, .key_bytes = 5}}) {
    ExpectError(store->CreateTable(spec).status(), StatusCode::kInvalidArgument);
  }
  for (const RedisStoreOptions& options :
       {RedisStoreOptions{.num_partitions = 0}, RedisStoreOptions{.num_partitions = 65537},
        RedisStoreOptions{.num_node_connections = 0}, RedisStoreOptions{.max_get_batch_size = 0},
        RedisStoreOptions{.max_set_batch_size = 0}, RedisStoreOptions{.address = "host:"},
        RedisStoreOptions{.password = "a", .password_env = "b"}}) {
    ExpectError(OpenError(options), StatusCode::kInvalidArgument, {"redis_cluster"});
  }
}

TEST_F(RedisStore, KeyOfAnotherTypeIsNamed) {
  const auto store = Open({.num_partitions = 1});
  const auto table = Value(store->CreateTable(kTable));
  Ask(server(), {"SET", "hps_et{hps_et.m.t/p0}v", "text"});
  ExpectError(Get(*table, {1}).status, StatusCode::kFailedPrecondition, {"HMGET", "WRONGTYPE"});
  ExpectError(Put(*table, {1}, 1), StatusCode::kFailedPrecondition, {"HSET", "WRONGTYPE"});
}

TEST_F(RedisStore, HalfMadeDescriptionIsCompleted) {
  Ask(server(), {"HSET", "hps.table/hps_et.m.t", "num_partitions", "8"});
  const auto store = Open();
  ExpectError(store->CreateTable(kTable).status(), StatusCode::kAlreadyExists);
  const auto table = Value(store->OpenTable(kTable));
  EXPECT_EQ(Ask(server(), {"HMGET", "hps.table/hps_et.m.t", "row_bytes", "key_bytes"}), "16\n8");
  ASSERT_OK(Put(*table, {1}, 1));
  Ask(server(), {"HSET", "hps.table/hps_et.m.u", "num_partitions", "many"});
  ExpectError(store->OpenTable({.name = "hps_et.m.u", .row_bytes = 16}).status(), StatusCode::kDataLoss, {"many"});
}

TEST_F(RedisStore, InterruptedDropIsFinished) {
  const auto store = Open();
  ASSERT_OK(Put(*Value(store->CreateTable(kTable)), KeyRange(0, 100), 1));
  Ask(server(), {"HSET", "hps.table/hps_et.m.t", "dropping", "1000000000"});  // by who died long ago
  ExpectError(store->OpenTable(kTable).status(), StatusCode::kNotFound);
  EXPECT_EQ(Ask(server(), {"DBSIZE"}), "0");
  const auto table = Value(store->CreateTable(kTable));
  ExpectAll(*table, KeyRange(0, 100), 0);
}

// The store, its address and the table are in a message once.
void ExpectNamedOnce(const Status& status) {
  for (const std::string_view part : {"redis_cluster", "table \"hps_et.m.t\""}) {
    const size_t at = status.message().find(part);
    ASSERT_NE(at, std::string::npos) << status.ToString();
    EXPECT_EQ(status.message().find(part, at + 1), std::string::npos) << status.ToString();
  }
}

TEST_F(RedisStore, MessagesNameTheTableOnce) {
  const auto store = Open();
  const auto table = Value(store->CreateTable(kTable));
  ASSERT_OK(Put(*table, {1}, 1));
  const auto other = Open();
  const RedisLayout layout(RedisLayout::Version::kCurrent, "hps_et.m.t", 8, 8);
  Ask(server(), {"HSET", layout.ValuesKey(layout.PartitionOf(KeyOf("ABCDEFGH"))), "ABCDEFGH", "short"});
  ExpectNamedOnce(Get(*table, {KeyOf("ABCDEFGH")}).status);
  ASSERT_OK(other->DropTable("hps_et.m.t"));
  const auto expect_all = [&] {
    ExpectNamedOnce(Get(*table, {1}).status);
    ExpectNamedOnce(Put(*table, {1}, 1));
    ExpectNamedOnce(table->Erase(std::vector<Key>{1}));
    ExpectNamedOnce(table->Scan([](auto, auto) { return OkStatus(); }));
    ExpectNamedOnce(table->Stats().status());
    ExpectNamedOnce(Get(*table, {1}, std::chrono::steady_clock::now()).status);
  };
  expect_all();
  ExpectNamedOnce(store->OpenTable(kTable).status());
  const auto anew = Value(other->CreateTable(kTable));
  ExpectNamedOnce(store->CreateTable(kTable).status());
  expect_all();
}

TEST_F(RedisStore, VanishedTableIsAnErrorAndNoMiss) {
  const auto store = Open();
  const auto table = Value(store->CreateTable(kTable));
  ASSERT_OK(Put(*table, {1}, 1));
  ExpectAll(*table, {2}, 0);
  const auto other = Open();
  ASSERT_OK(other->DropTable("hps_et.m.t"));
  for (int i = 0; i < 2; ++i) {
    ExpectError(Get(*table, {1}).status, StatusCode::kUnavailable, {"vanished", "hps_et.m.t"});
    ExpectError(Put(*table, {1}, 1), StatusCode::kUnavailable, {"vanished"});
    ExpectError(table->Erase(std::vector<Key>{1}), StatusCode::kUnavailable);
    ExpectError(table->Scan([](auto, auto) { return OkStatus(); }), StatusCode::kUnavailable);
    ExpectError(table->Stats().status(), StatusCode::kUnavailable);
    Ask(server(), {"FLUSHALL"});
  }
  EXPECT_EQ(Ask(server(), {"DBSIZE"}), "0") << "a row was written to a table that is not there";
}

// The same name does not make it the same table: after Redis was emptied, names are used again.
TEST_F(RedisStore, AReplacedTableIsNotTakenForTheOneThatWasOpened) {
  const auto store = Open();
  const auto other = Open();
  auto table = Value(store->CreateTable(kTable));
  ASSERT_OK(Put(*table, {1, 2}, 1));
  for (const bool dropped : {false, true}) {
    if (dropped) {
      ASSERT_OK(other->DropTable("hps_et.m.t"));
    } else {
      Ask(server(), {"FLUSHALL"});
    }
    const auto fresh = Value(other->CreateTable(kTable));
    ASSERT_OK(Put(*fresh, {1}, 2));
    const std::vector<std::string> parts = {"hps_et.m.t", "replaced", "load the model again"};
    ExpectError(Get(*table, {1, 2}).status, StatusCode::kUnavailable, parts);
    ExpectError(Put(*table, {2}, 1), StatusCode::kUnavailable, parts);
    ExpectError(Put(*table, {3}, 1, {.only_absent = true}), StatusCode::kUnavailable, parts);
    ExpectError(table->Erase(std::vector<Key>{1}), StatusCode::kUnavailable, parts);
    ExpectError(table->Stats().status(), StatusCode::kUnavailable, parts);
    ExpectError(table->Scan([](auto, auto) { return OkStatus(); }), StatusCode::kUnavailable, parts);
    EXPECT_EQ(RowsOf(*fresh), 1u) << "rows of the old table came into the new one";
    const auto opened = Value(store->OpenTable(kTable));  // the new one, while the old one is still held
    ExpectAll(*opened, {1}, 2);
    ASSERT_OK(Put(*opened, {2}, 2));
    ExpectAll(*fresh, {1, 2}, 2);
    ExpectError(Put(*table, {2}, 1), StatusCode::kUnavailable, parts);
    table = opened;
  }
}

// As versions before wrote it, and hosts that open it at the same moment.
TEST_F(RedisStore, ATableWithoutAnIdGetsOne) {
  Ask(server(), {"HSET", "hps.table/hps_et.m.t", "num_partitions", "8", "row_bytes", "16", "key_bytes", "8"});
  const auto store = Open();
  const auto other = Open();
  const auto table = Value(store->OpenTable(kTable));
  EXPECT_NE(Ask(server(), {"HGET", "hps.table/hps_et.m.t", "id"}), "");
  ASSERT_OK(Put(*table, {1}, 1));
  ExpectAll(*Value(other->OpenTable(kTable)), {1}, 1);
  ExpectAll(*table, {2}, 0);
}

TEST_F(RedisStore, DroppedTableThatIsHeldIsFreedInTheEnd) {
  const auto store = Open();
  auto table = Value(store->CreateTable(kTable));
  ASSERT_OK(Put(*table, KeyRange(0, 100), 1));
  ASSERT_OK(store->DropTable("hps_et.m.t"));
  ExpectAll(*table, KeyRange(0, 100), 1);
  ExpectError(Put(*table, {1}, 2), StatusCode::kFailedPrecondition, {"dropped"});
  EXPECT_EQ(RowsOf(*table), 100u);
  const std::string kept = Ask(server(), {"KEYS", "*"});
  EXPECT_GT(std::stoi(Ask(server(), {"TTL", kept.substr(0, kept.find('\n'))})), 0);
  table.reset();
  WaitUntil([&] { return Ask(server(), {"DBSIZE"}) == "0"; }, "the rows of the dropped table to be freed");

  auto second = Value(store->CreateTable(kTable));
  ASSERT_OK(Put(*second, KeyRange(0, 100), 1));
  ASSERT_OK(store->DropTable("hps_et.m.t"));
  ASSERT_OK(store->Close());
  EXPECT_EQ(Ask(server(), {"DBSIZE"}), "0") << "closing frees what only the closed store could read";
}

// Tables of other programs -------------------------------------------------------------------------------------------

class RedisPredecessor : public RedisStore, public ::testing::WithParamInterface<RedisLayout::Version> {
 protected:
  // Writes 300 rows of 8 bytes, whose keys can be typed, as the predecessor would. Returns the keys.
  std::vector<Key> Write(const std::string& name, uint32_t num_partitions, size_t row_bytes = 8) {
    const RedisLayout layout(GetParam(), name, num_partitions, 8);
    std::map<uint32_t, std::vector<std::string>> commands;
    std::vector<Key> keys;
    for (int i = 0; i < 300; ++i) {
      const std::string text = "key" + std::to_string(10000 + i);
      keys.push_back(KeyOf(text));
      std::vector<std::string>& words = commands[layout.PartitionOf(keys.back())];
      if (words.empty()) words = {"HSET", layout.ValuesKey(layout.PartitionOf(keys.back()))};
      words.push_back(text);
      words.push_back(std::string(row_bytes - 5, 'r') + text.substr(3));
    }
    for (const auto& [partition, words] : commands) Ask(server(), words);
    return keys;
  }
};

TEST_P(RedisPredecessor, IsAdopted) {
  const std::vector<Key> keys = Write("hps_et.m.t", 8);
  const auto store = Open();
  EXPECT_EQ(Value(store->ListTables()), std::vector<std::string>{"hps_et.m.t"});
  const TableSpec spec = {.name = "hps_et.m.t", .row_bytes = 8};
  ExpectError(store->CreateTable(spec).status(), StatusCode::kAlreadyExists);
  const auto table = Value(store->OpenTable(spec));
  std::vector<char> rows(keys.size() * 8);
  std::vector<uint32_t> misses;
  ASSERT_OK(table->Fetch({.keys = keys, .rows = {reinterpret_cast<std::byte*>(rows.data()), 8}}, &misses));
  EXPECT_TRUE(misses.empty());
  for (size_t i = 0; i < keys.size(); ++i) {
    ASSERT_EQ(std::string(&rows[i * 8], 8), "rrr" + std::to_string(10000 + i));
  }
  EXPECT_EQ(RowsOf(*table), 300u);
  EXPECT_EQ(Ask(server(), {"HGET", "hps.table/hps_et.m.t", "num_partitions"}), "8");
  // It is written where it was, and found by who opens it next.
  ASSERT_OK(table->Erase(std::span(keys).first(1)));
  const auto other = Open();
  EXPECT_EQ(RowsOf(*Value(other->OpenTable(spec))), 299u);
  ASSERT_OK(store->DropTable("hps_et.m.t"));
}

TEST_P(RedisPredecessor, IsRefusedWhereItDisagrees) {
  Write("hps_et.m.t", 8);
  Write("hps_et.m.more", 16);
  Write("hps_et.m.fewer", 4);
  Write("hps_et.m.other", 7);
  const auto store = Open();
  for (const std::string table : {"more", "fewer", "other"}) {
    ExpectError(store->OpenTable({.name = "hps_et.m." + table, .row_bytes = 8}).status(),
                StatusCode::kFailedPrecondition, {table, "num_partitions"});
    EXPECT_EQ(Ask(server(), {"EXISTS", "hps.table/hps_et.m." + table}), "0");
  }
  ExpectError(store->OpenTable({.name = "hps_et.m.t", .row_bytes = 12}).status(), StatusCode::kFailedPrecondition,
              {"embedding_vecsize_per_table", "8", "12"});
  ExpectError(store->OpenTable({.name = "hps_et.m.t", .row_bytes = 8, .key_bytes = 4}).status(),
              StatusCode::kFailedPrecondition, {"supportlonglong"});
  ASSERT_OK(store->OpenTable({.name = "hps_et.m.t", .row_bytes = 8}).status());
  for (const std::string table : {"t", "more", "fewer", "other"}) ASSERT_OK(store->DropTable("hps_et.m." + table));
  EXPECT_EQ(Ask(server(), {"DBSIZE"}), "0");
}

INSTANTIATE_TEST_SUITE_P(Versions, RedisPredecessor,
                         ::testing::Values(RedisLayout::Version::kCurrent, RedisLayout::Version::kOld),
                         [](const auto& info) { return info.param == RedisLayout::Version::kOld ? "Old" : "Current"; });

TEST_F(RedisStore, TableOfNearlyThatNameIsNamed) {
  const auto store = Open();
  Value(store->CreateTable({.name = "hps_et.m.sparse_embedding2", .row_bytes = 16}));
  const auto open_error = [&](const std::string& name) {
    return store->OpenTable({.name = name, .row_bytes = 16}).status();
  };
  for (const std::string number : {"1", "3"}) {
    ExpectError(open_error("hps_et.m.sparse_embedding" + number), StatusCode::kNotFound,
                {"\"hps_et.m.sparse_embedding2\"", "embedding_table_names"});
  }
  EXPECT_EQ(open_error("hps_et.m.sparse_embedding0").message().find("there is \""), std::string::npos);
  Ask(server(), {"HSET", "hctr_et.m.films/p2/v", "ABCDEFGH", "0123456789abcdef"});
  ExpectError(open_error("hps_et.m.films"), StatusCode::kNotFound, {"\"hctr_et.m.films\"", "prefix"});
}

// Sizes and evictions ------------------------------------------------------------------------------------------------

TEST_F(RedisStore, BatchesOfAMillion) {
  const auto store = Open({.num_partitions = 1, .max_get_batch_size = 1'000'000, .max_set_batch_size = 1'000'000});
  const auto table = Value(store->CreateTable({.name = "hps_et.m.t", .row_bytes = 4}));
  const std::vector<Key> keys = KeyRange(-300'000, 1'000'000);
  ASSERT_OK(Put(*table, keys, 7));
  ExpectAll(*table, keys, 7);
  uint64_t erased = 0;
  ASSERT_OK(table->Erase(keys, &erased));
  EXPECT_EQ(erased, keys.size());
}

TEST_F(RedisStore, RowsLongerThanWhatIsReadAtOnce) {
  const auto store = Open({.num_partitions = 2});
  const auto table = Value(store->CreateTable({.name = "hps_et.m.t", .row_bytes = 1'000'000}));
  const std::vector<Key> keys = KeyRange(-10, 20);
  ASSERT_OK(Put(*table, keys, 3));
  ExpectAll(*table, keys, 3);
  EXPECT_EQ(Get(*table, KeyRange(0, 20)).found(), 10u);
}

class RedisOverflow : public RedisStore {
 protected:
  std::shared_ptr<Table> Create(OverflowPolicy policy, bool refresh = false) {
    store_ =
        Open({.num_partitions = 2,
              .overflow = {
                  .margin = 1000, .policy = policy, .resolution_target = 0.8, .refresh_time_after_fetch = refresh}});
    EXPECT_TRUE(store_->capabilities().bounded);
    return Value(store_->CreateTable(kTable));
  }
  // The first keys whose partition is 0.
  static std::vector<Key> Keys(Key first, size_t count) {
    std::vector<Key> keys;
    for (Key key = first; keys.size() < count; ++key) {
      if (PartitionHash(static_cast<uint64_t>(key)) % 2 == 0) keys.push_back(key);
    }
    return keys;
  }
  static uint64_t RowsInPartition() { return std::stoull(Ask(server(), {"HLEN", "hps_et{hps_et.m.t/p0}v"})); }
  static uint64_t MetadataInPartition() { return std::stoull(Ask(server(), {"HLEN", "hps_et{hps_et.m.t/p0}t"})); }

  std::unique_ptr<TableStore> store_;
};

TEST_F(RedisOverflow, RandomRowsLeave) {
  const auto table = Create(OverflowPolicy::kEvictRandom);
  const std::vector<Key> keys = Keys(0, 1000);
  ASSERT_OK(Put(*table, keys, 1));
  EXPECT_EQ(RowsInPartition(), 1000u) << "the margin itself is no overflow";
  EXPECT_EQ(MetadataInPartition(), 0u);
  const std::vector<Key> more = Keys(1'000'000, 100);
  ASSERT_OK(Put(*table, more, 2));
  EXPECT_EQ(RowsInPartition(), 800u);
  ExpectAll(*table, more, 2);
  const Fetched old = Get(*table, keys);
  ASSERT_OK(old.status);
  EXPECT_EQ(old.found(), 700u);
  // Of all ages: about as many left from the first half as from the second.
  const auto first_half = std::count(old.versions.begin(), old.versions.begin() + 500, 1u);
  EXPECT_GT(first_half, 250);
  EXPECT_LT(first_half, 450);
  // A single upsert of more than fits.
  ASSERT_OK(Put(*table, Keys(2'000'000, 5000), 3));
  EXPECT_LE(RowsInPartition(), 1000u);
}

TEST_F(RedisOverflow, OldestRowsLeave) {
  const auto table = Create(OverflowPolicy::kEvictOldest);
  const std::vector<Key> keys = Keys(0, 900);
  ASSERT_OK(Put(*table, keys, 1));
  EXPECT_EQ(Ask(server(), {"EVAL", "return #redis.call('HVALS', KEYS[1])[1]", "1", "hps_et{hps_et.m.t/p0}t"}), "8");
  // Makes the times of the first 400 rows old and those of 100 among them younger, in the predecessor's format.
  const std::string age =
      "for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do end "
      "local all = redis.call('HKEYS', KEYS[1]) for _, key in ipairs(all) do "
      "local id = struct.unpack('<i8', key) "
      "if id >= tonumber(ARGV[1]) and id <= tonumber(ARGV[2]) then "
      "redis.call('HSET', KEYS[1], key, struct.pack('<i8', tonumber(ARGV[3]))) end end";
  const auto set_time = [&](Key first, Key last, const std::string& time) {
    Ask(server(), {"EVAL", age, "1", "hps_et{hps_et.m.t/p0}t", std::to_string(first), std::to_string(last), time});
  };
  set_time(keys[0], keys[399], "1000");
  set_time(keys[100], keys[199], "2000");
  ASSERT_OK(Put(*table, Keys(1'000'000, 200), 2));  // 1100 rows: 300 leave
  EXPECT_EQ(RowsInPartition(), 800u);
  EXPECT_EQ(MetadataInPartition(), 800u);
  const Fetched old = Get(*table, keys);
  for (size_t i = 0; i < keys.size(); ++i) ASSERT_EQ(old.versions[i], i < 100 || (i >= 200 && i < 400) ? 0u : 1u) << i;
}

TEST_F(RedisOverflow, RowsWithoutTimesLeaveFirst) {
  {
    const auto table = Create(OverflowPolicy::kEvictRandom);
    ASSERT_OK(Put(*table, Keys(0, 300), 1));
  }
  store_ = Open({.num_partitions = 2, .overflow = {.margin = 1000, .policy = OverflowPolicy::kEvictOldest}});
  const auto table = Value(store_->OpenTable(kTable));
  ASSERT_OK(Put(*table, Keys(1'000'000, 750), 2));  // 1050 rows: 250 leave
  EXPECT_EQ(RowsInPartition(), 800u);
  EXPECT_EQ(Get(*table, Keys(0, 300)).found(), 50u);
  ExpectAll(*table, Keys(1'000'000, 750), 2);
}

TEST_F(RedisOverflow, ReadingMakesRowsYounger) {
  const auto table = Create(OverflowPolicy::kEvictOldest, /*refresh=*/true);
  ASSERT_OK(Put(*table, Keys(0, 900), 1));
  const std::string times =
      "local n = 0 for _, time in ipairs(redis.call('HVALS', KEYS[1])) do "
      "if struct.unpack('<i8', time) > 1000 then n = n + 1 end end return n";
  const std::string make_old =
      "for _, key in ipairs(redis.call('HKEYS', KEYS[1])) do "
      "redis.call('HSET', KEYS[1], key, struct.pack('<i8', 1000)) end";
  Ask(server(), {"EVAL", make_old, "1", "hps_et{hps_et.m.t/p0}t"});
  const std::vector<Key> read = Keys(0, 300);
  ExpectAll(*table, read, 1);
  WaitUntil([&] { return Ask(server(), {"EVAL", times, "1", "hps_et{hps_et.m.t/p0}t"}) == "300"; }, "the new times");
  ASSERT_OK(Put(*table, Keys(1'000'000, 200), 2));
  ExpectAll(*table, read, 1);
}

TEST_F(RedisOverflow, LeastUsedRowsLeaveAndFameFades) {
  const auto table = Create(OverflowPolicy::kEvictLeastUsed);
  ASSERT_OK(Put(*table, Keys(0, 900), 1));
  const std::vector<Key> used = Keys(0, 400);
  for (int i = 0; i < 3; ++i) ExpectAll(*table, used, 1);
  const std::string sum =
      "local n = 0 for _, count in ipairs(redis.call('HVALS', KEYS[1])) do n = n + count end return n";
  const auto total = [&] { return Ask(server(), {"EVAL", sum, "1", "hps_et{hps_et.m.t/p0}t"}); };
  WaitUntil([&] { return total() == std::to_string(900 + 3 * 400); }, "the counts of what was read");
  ASSERT_OK(Put(*table, Keys(1'000'000, 200), 2));
  EXPECT_EQ(RowsInPartition(), 800u);
  // 4 / 2 of the used, 1 / 2 = 0 of the others.
  EXPECT_EQ(total(), "800");
  ExpectAll(*table, Keys(1'000'000, 200), 2);
  ExpectAll(*table, used, 1);
}

// Logins -------------------------------------------------------------------------------------------------------------

TEST(RedisLogin, PasswordsAndPermissions) {
  const std::string secret = "s3cret-of-the-test";
  const auto redis = Value(RedisService::Start(
      {.user = "trainer",
       .password = secret,
       .acl_lines = {"user reader on >reader-password ~hps* +hmget +exists +cluster|slots +auth +hlen"}}));
  RedisStoreOptions options = OptionsFor(*redis);
  const auto expect_login = [&](const RedisStoreOptions& login) { ASSERT_OK(OpenRedisStore(login).status()); };
  expect_login(options);
  ASSERT_OK(Put(*Value(Value(OpenRedisStore(options))->CreateTable(kTable)), {1}, 1));

  options.password.clear();
  ::setenv("HPS_TEST_REDIS_PASSWORD", secret.c_str(), 1);
  options.password_env = "HPS_TEST_REDIS_PASSWORD";
  expect_login(options);
  options.password_env = "HPS_TEST_NO_SUCH_VARIABLE";
  ExpectError(OpenRedisStore(options).status(), StatusCode::kNotFound, {"HPS_TEST_NO_SUCH_VARIABLE", "password_env"});

  TempFolder folder;
  options.password_env.clear();
  options.password_file = folder / "password";
  ExpectError(OpenRedisStore(options).status(), StatusCode::kNotFound, {options.password_file, "password_file"});
  std::ofstream(options.password_file) << secret << "\nsecond line\n";
  expect_login(options);
  std::ofstream(options.password_file, std::ios::trunc) << "\n";
  ExpectError(OpenRedisStore(options).status(), StatusCode::kFailedPrecondition, {"empty"});

  options.password_file.clear();
  options.password = secret + "-wrong";
  Status status = OpenRedisStore(options).status();
  ExpectError(status, StatusCode::kFailedPrecondition, {"WRONGPASS", "trainer", "password"});
  EXPECT_EQ(status.message().find(secret), std::string::npos) << "a password is shown";
  options.password.clear();
  options.user_name = "default";
  ExpectError(OpenRedisStore(options).status(), StatusCode::kFailedPrecondition, {"NOAUTH"});

  options.user_name = "reader";
  options.password = "reader-password";
  const auto store = Value(OpenRedisStore(options));
  const auto table = Value(store->OpenTable(kTable));
  ExpectAll(*table, {1}, 1);
  ExpectError(Put(*table, {1}, 2), StatusCode::kFailedPrecondition, {"HSET", "NOPERM", "ACL"});
  ExpectError(table->Erase(std::vector<Key>{1}), StatusCode::kFailedPrecondition, {"HDEL"});
  ExpectError(table->Scan([](auto, auto) { return OkStatus(); }), StatusCode::kFailedPrecondition, {"HSCAN"});
  ExpectError(store->WriteRecord("r", "v"), StatusCode::kFailedPrecondition, {"SET"});
  ExpectError(store->ListTables().status(), StatusCode::kFailedPrecondition, {"SCAN"});
  ExpectAll(*table, {1}, 1);
}

TEST(RedisLogin, TlsOnlyCluster) {
  const auto redis = Value(RedisService::Start({.masters = 3, .tls = true, .user = "trainer", .password = "s3cret"}));
  const RedisStoreOptions good = OptionsFor(*redis);
  const std::vector<Key> keys = KeyRange(0, 20'000);
  {
    const auto store = Value(OpenRedisStore(good));
    const auto table = Value(store->CreateTable({.name = "hps_et.m.t", .row_bytes = 512}));
    ASSERT_OK(Put(*table, keys, 1));
    ExpectAll(*table, keys, 1);
    ExpectAll(*table, keys, 1);
  }
  const auto error = [&](const std::function<void(RedisStoreOptions*)>& change) {
    RedisStoreOptions options = good;
    change(&options);
    return OpenRedisStore(options).status();
  };
  const TlsFiles& tls = redis->tls();
  constexpr StatusCode kRefused = StatusCode::kFailedPrecondition;
  ExpectError(error([&](auto* o) { o->tls_ca_certificate = tls.other_ca_certificate; }), kRefused,
              {"certificate is not accepted", "tls_ca_certificate"});
  ExpectError(error([](auto* o) { o->tls_server_name_identification = "other.example"; }), kRefused,
              {"not accepted", "other.example", "tls_server_name_identification"});
  ASSERT_OK(error([](auto* o) { o->tls_server_name_identification = "127.0.0.1"; }));
  // The server's refusal comes before the end of the connection that it closes, and is not lost with it.
  for (int i = 0; i < 20; ++i) {
    const Status without = error([](auto* o) { o->tls_client_certificate = o->tls_client_key = ""; });
    ExpectError(without, kRefused, {"TLS failed", "certificate required", "tls_client_certificate"});
  }
  ExpectError(error([&](auto* o) { o->tls_client_key = tls.server_key; }), kRefused, {"tls_client_key"});
  ExpectError(error([&](auto* o) { o->tls_client_certificate = tls.client_key; }), kRefused,
              {"tls_client_certificate", "PEM"});
  ExpectError(error([&](auto* o) { o->tls_ca_certificate = tls.client_key; }), kRefused, {"tls_ca_certificate"});
  ExpectError(error([](auto* o) { o->tls_ca_certificate = "/nowhere/ca.crt"; }), StatusCode::kNotFound,
              {"/nowhere/ca.crt"});
  ExpectError(error([](auto* o) { o->tls_client_key = "/nowhere/key.pem"; }), StatusCode::kNotFound,
              {"/nowhere/key.pem"});
  const Status plain = error([](auto* o) { o->enable_tls = false; });
  ExpectError(plain, StatusCode::kUnavailable, {"enable_tls"});
  ExpectError(error([](auto* o) { o->password = "wrong"; }), kRefused, {"WRONGPASS"});
}

TEST(RedisLogin, TlsToAServerWithoutIt) {
  const auto tls = Value(RedisService::Start({.tls = true}));
  const auto plain = Value(RedisService::Start());
  RedisStoreOptions options = OptionsFor(*tls);
  options.patience = std::chrono::seconds(5);
  options.address = plain->address_list();
  const Status status = OpenRedisStore(options).status();
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.message().find("does the server speak TLS"), std::string::npos) << status.ToString();
  // A folder of certificates, named by their hashes as OpenSSL wants it.
  TempFolder folder;
  options.address = tls->address_list();
  options.tls_ca_certificate = folder.path();
  EXPECT_EQ(OpenRedisStore(options).status().code(), StatusCode::kFailedPrecondition);
  std::filesystem::copy(tls->tls().ca_certificate, folder / "ca.pem");
  ASSERT_EQ(std::system(("openssl rehash " + folder.path().string()).c_str()), 0);
  ASSERT_OK(OpenRedisStore(options).status());
}

// Addresses and restarts ---------------------------------------------------------------------------------------------

TEST(RedisAddress, OneOfSeveralIsEnough) {
  const auto redis = Value(RedisService::Start({.masters = 3}));
  const FreePort nobody = Value(FreePort::Choose());
  RedisStoreOptions options;
  options.address = "127.0.0.1:" + std::to_string(nobody.number()) + ", localhost:" + std::to_string(redis->port(1));
  ASSERT_OK(OpenRedisStore(options).status());
  options.address = "127.0.0.1:" + std::to_string(nobody.number());
  ExpectError(OpenRedisStore(options).status(), StatusCode::kUnavailable, {options.address, "refused"});
  options.address = "no-such-host.invalid:7000";
  ExpectError(OpenRedisStore(options).status(), StatusCode::kUnavailable, {"no-such-host.invalid:7000"});
  const FreePort nobody_else = Value(FreePort::Choose());
  options.address =
      "127.0.0.1:" + std::to_string(nobody.number()) + ",127.0.0.1:" + std::to_string(nobody_else.number());
  ExpectError(OpenRedisStore(options).status(), StatusCode::kUnavailable,
              {"any of the addresses (redis node 127.0.0.1:" + std::to_string(nobody.number()) + ": cannot connect",
               "; redis node 127.0.0.1:" + std::to_string(nobody_else.number()) + ": cannot connect", "start Redis"});
  for (const char* address : {"redis://127.0.0.1:7000", "me:secret@127.0.0.1:7000", "127.0.0.1:7000/0"}) {
    options.address = address;
    const Status refused = OpenRedisStore(options).status();
    ExpectError(refused, StatusCode::kInvalidArgument, {"host:port", "enable_tls"});
    EXPECT_EQ(refused.message().find("secret"), std::string::npos) << refused.ToString();
  }
}

TEST(RedisRestart, RowsComeBackFromFiles) {
  for (const bool appendonly : {false, true}) {
    SCOPED_TRACE(appendonly ? "AOF" : "RDB");
    hps::testing::RedisOptions server_options;
    server_options.appendonly = appendonly;
    if (!appendonly) server_options.save = "3600 1000000";
    const auto redis = Value(RedisService::Start(server_options));
    const auto store = Value(OpenRedisStore(OptionsFor(*redis)));
    const auto table = Value(store->CreateTable(kTable));
    const std::vector<Key> keys = KeyRange(-500, 5000);
    ASSERT_OK(Put(*table, keys, 4));
    ASSERT_OK(store->WriteRecord("r", "value"));
    ASSERT_OK(redis->ShutDown(0));
    ExpectError(Get(*table, keys, std::chrono::steady_clock::now() + std::chrono::milliseconds(100)).status,
                StatusCode::kUnavailable, {redis->address(0)});
    ASSERT_OK(redis->Restart(0));
    ExpectAll(*table, keys, 4);  // without opening anything anew
    EXPECT_EQ(Value(store->ReadRecord("r")), "value");
    const auto other = Value(OpenRedisStore(OptionsFor(*redis)));
    EXPECT_EQ(RowsOf(*Value(other->OpenTable(kTable))), keys.size());
  }
}

TEST(RedisMemory, FullServerIsResourceExhausted) {
  const auto redis = Value(RedisService::Start({.maxmemory_bytes = 8 << 20}));
  const auto store = Value(OpenRedisStore(OptionsFor(*redis)));
  const auto table = Value(store->CreateTable({.name = "hps_et.m.t", .row_bytes = 1024}));
  ASSERT_OK(Put(*table, KeyRange(0, 100), 1));
  ExpectError(Put(*table, KeyRange(0, 20'000), 2), StatusCode::kResourceExhausted, {"maxmemory"});
  const Fetched fetched = Get(*table, KeyRange(0, 100));
  ASSERT_OK(fetched.status);
  EXPECT_EQ(fetched.found(), 100u);
}

}  // namespace
}  // namespace hps::testing
