// Lookups through sessions: rows and reports, sparse lookups against a plain reference, and each refusal.

#include "hps/lookup_session.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <random>

#include "cc/tests/core_fixture.h"
#include "cc/tests/rocksdb_races.h"

namespace hps::testing {
namespace {

constexpr Key kLowest = std::numeric_limits<Key>::min();
constexpr Key kHighest = std::numeric_limits<Key>::max();
constexpr uint32_t kWidths[] = {3, 16, 33};
constexpr size_t kTableRows = 3000;

class LookupSessionTest : public ::testing::TestWithParam<Tiers> {
 protected:
  void SetUp() override {
    std::vector<TableConfig> tables;
    for (uint32_t width : kWidths) {
      std::vector<Key> keys = KeyRange(0, kTableRows);
      for (Key key : {Key{-1}, kLowest, kHighest}) keys.push_back(key);
      const fs::path folder = folder_ / ("table" + std::to_string(width));
      WriteTable(folder, keys, width, 1);
      tables.push_back(MakeTable("width" + std::to_string(width), folder, width));
    }
    ServerConfig config = MakeServer(GetParam(), folder_ / "database", {MakeModel("m", tables)});
    if (GetParam() == Tiers::kBoth) config.volatile_db.initial_cache_rate = 0.5;  // rows come from both
    server_ = Value(ParameterServer::Open(config, {.show_progress = false}));
  }
  LookupSession session() const { return Value(server_->NewSession("m")); }

  TempFolder folder_;
  std::shared_ptr<ParameterServer> server_;
};

std::string TiersName(const ::testing::TestParamInfo<Tiers>& info) {
  return info.param == Tiers::kVolatile ? "Volatile" : info.param == Tiers::kPersistent ? "Persistent" : "Both";
}
INSTANTIATE_TEST_SUITE_P(Tiers, LookupSessionTest,
                         ::testing::Values(Tiers::kVolatile, Tiers::kPersistent, Tiers::kBoth), TiersName);

TEST_P(LookupSessionTest, RowsOfEveryTableAndTheDefault) {
  for (uint32_t table = 0; table < 3; ++table) {
    const std::vector<Key> present = {7, -1, 0, kLowest, kHighest, 7, kTableRows - 1};
    ExpectRows(Lookup(session(), table, kWidths[table], present), present, 1);
    const std::vector<Key> absent = {-2, kTableRows, kLowest + 1, kHighest - 1};
    const Rows rows = Lookup(session(), table, kWidths[table], absent);
    ExpectRows(rows, absent, 0);
    EXPECT_EQ(rows.report.rows_from_default, absent.size());
  }
}

TEST_P(LookupSessionTest, TheReportAddsUp) {
  std::vector<Key> keys = KeyRange(-100, kTableRows + 200);
  const Rows rows = Lookup(session(), 1, kWidths[1], keys);
  ASSERT_OK(rows.status);
  EXPECT_EQ(rows.report.keys, keys.size());
  EXPECT_EQ(rows.report.rows_from_default, 199u);  // -1 is there
  EXPECT_EQ(rows.report.rows_from_volatile + rows.report.rows_from_persistent, keys.size() - 199);
  EXPECT_EQ(rows.report.rows_from_volatile > 0, GetParam() != Tiers::kPersistent);
  EXPECT_EQ(rows.report.rows_from_persistent > 0, GetParam() != Tiers::kVolatile);
}

TEST_P(LookupSessionTest, NothingAskedIsNothingDone) {
  LookupReport report;
  EXPECT_TRUE(session().Lookup({}, {}, &report).ok());
  EXPECT_TRUE(session().LookupSparse({}, {}, &report).ok());
  EXPECT_EQ(report.keys, 0u);
  EXPECT_TRUE(Lookup(session(), 0, kWidths[0], {}).status.ok());
  const int64_t splits[] = {0};
  const SparseLookup sparse{.table = 0, .width = kWidths[0], .row_splits = splits};
  EXPECT_TRUE(session().LookupSparse(std::span(&sparse, 1)).ok());
}

TEST_P(LookupSessionTest, TheFoundMaskMayBeLeftOut) {
  const Key keys[] = {1, -5};
  float rows[2 * 3];
  const DenseLookup lookup{.table = 0, .width = 3, .keys = keys, .rows = rows};
  ASSERT_OK(session().Lookup(std::span(&lookup, 1)));
  EXPECT_EQ(std::vector<float>(rows, rows + 3), Row(1, 1, 3));
  EXPECT_EQ(std::vector<float>(rows + 3, rows + 6), std::vector<float>(3, kDefault));
}

// Random ragged batches over all tables in one call, on executors that share work or not.
TEST_P(LookupSessionTest, SparseLookupsAgreeWithAPlainReference) {
  constexpr uint64_t kSeed = 4711;
  std::mt19937_64 random(kSeed);
  auto pool = NewThreadPool(4);
  Executor* const executors[] = {nullptr, &InlineExecutor(), pool.get()};
  for (int round = 0; round < 12; ++round) {
    struct Input {
      std::vector<Key> keys;
      std::vector<int64_t> splits = {0};
      std::vector<float> weights;
      std::vector<float> output;
    };
    std::vector<Input> inputs(1 + random() % 6);
    std::vector<SparseLookup> lookups;
    uint64_t total = 0, absent = 0;
    for (Input& input : inputs) {
      const uint32_t table = static_cast<uint32_t>(random() % 3);
      const size_t rows = random() % (round % 4 == 0 ? 1000 : 60);
      for (size_t r = 0; r < rows; ++r) {
        const size_t n = random() % 4 == 0 ? 0 : random() % 20;
        for (size_t i = 0; i < n; ++i) {
          input.keys.push_back(static_cast<Key>(random() % (kTableRows + 500)));
          absent += input.keys.back() >= static_cast<Key>(kTableRows);
        }
        input.splits.push_back(static_cast<int64_t>(input.keys.size()));
      }
      total += input.keys.size();
      const bool weighted = random() % 2 == 0 && !input.keys.empty();
      for (size_t i = 0; weighted && i < input.keys.size(); ++i) {
        input.weights.push_back(0.25f + static_cast<float>(random() % 100) / 50);
      }
      input.output.assign(rows * kWidths[table], 777.0f);
      lookups.push_back({.table = table,
                         .width = kWidths[table],
                         .keys = input.keys,
                         .row_splits = input.splits,
                         .weights = input.weights,
                         .combiner = static_cast<Combiner>(random() % 3),
                         .output = input.output.data()});
    }
    LookupReport report;
    ASSERT_OK(session().LookupSparse(lookups, {.executor = executors[round % 3]}, &report));
    EXPECT_EQ(report.keys, total);
    EXPECT_EQ(report.rows_from_default, absent);
    EXPECT_EQ(report.rows_from_volatile + report.rows_from_persistent, total - absent);
    for (size_t k = 0; k < inputs.size(); ++k) {
      const Input& input = inputs[k];
      const SparseLookup& lookup = lookups[k];
      for (size_t r = 0; r + 1 < input.splits.size(); ++r) {
        for (uint32_t j = 0; j < lookup.width; ++j) {
          double sum = 0, weights = 0, squares = 0;
          for (auto i = static_cast<size_t>(input.splits[r]); i < static_cast<size_t>(input.splits[r + 1]); ++i) {
            const double w = input.weights.empty() ? 1.0 : input.weights[i];
            const Key key = input.keys[i];
            sum += w * (key < static_cast<Key>(kTableRows) ? Element(key, 1, j) : kDefault);
            weights += w;
            squares += w * w;
          }
          const double denominator = lookup.combiner == Combiner::kSum    ? 1.0
                                     : lookup.combiner == Combiner::kMean ? weights
                                                                          : std::sqrt(squares);
          const double expected = weights == 0 ? 0.0 : sum / denominator;
          ASSERT_NEAR(input.output[r * lookup.width + j], expected, std::abs(expected) * 2e-6)
              << "round " << round << ", lookup " << k << ", row " << r << ", seed " << kSeed;
        }
      }
    }
  }
}

TEST_P(LookupSessionTest, ManyThreadsShareASession) {
  const LookupSession shared = session();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; ++i) {
        const uint32_t table = static_cast<uint32_t>(t + i) % 3;
        const std::vector<Key> keys = KeyRange(t * 100, 2500);
        ExpectRows(Lookup(shared, table, kWidths[table], keys), keys, 1);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_P(LookupSessionTest, TablesByName) {
  EXPECT_EQ(Value(session().FindTable("width33")), 2u);
  ExpectError(session().FindTable("width34").status(), StatusCode::kNotFound,
              {"'m'", "width34", "'width3', 'width16'"});
  const auto tables = Value(session().Tables());
  ASSERT_EQ(tables.size(), 3u);
  EXPECT_EQ(tables[1].name, "width16");
  EXPECT_EQ(tables[1].width, 16u);
}

// ---- refusals ---------------------------------------------------------------------------------------------------

TEST_P(LookupSessionTest, AWrongTableOrWidthIsRefusedAndNothingIsCounted) {
  const Rows good = Lookup(session(), 0, 3, {1});
  ASSERT_OK(good.status);
  ExpectError(Lookup(session(), 3, 3, {1}).status, StatusCode::kInvalidArgument, {"'m'", "no table 3", "3 tables"});
  ExpectError(Lookup(session(), 0, 4, {1}).status, StatusCode::kInvalidArgument, {"'width3'", "3", "4"});
  // The second of two lookups is wrong: the first one is not counted either.
  const Key key = 1;
  float rows[64];
  const DenseLookup lookups[] = {{0, 3, std::span(&key, 1), rows}, {9, 3, std::span(&key, 1), rows}};
  ExpectError(session().Lookup(lookups), StatusCode::kInvalidArgument, {"no table 9"});
  const std::string text = server_->PrometheusText();
  EXPECT_NE(text.find("hps_keys_asked_total{model=\"m\",table=\"width3\"} 1\n"), std::string::npos) << text;
}

TEST_P(LookupSessionTest, BadRowSplitsAndWeightsAreRefused) {
  const std::vector<Key> keys = {1, 2, 3};
  std::vector<float> output(100);
  const auto look_up = [&](std::vector<int64_t> splits, std::vector<float> weights) {
    const SparseLookup lookup{
        .table = 0, .width = 3, .keys = keys, .row_splits = splits, .weights = weights, .output = output.data()};
    return session().LookupSparse(std::span(&lookup, 1));
  };
  EXPECT_TRUE(look_up({0, 1, 3}, {}).ok());
  for (const std::vector<int64_t>& splits :
       std::vector<std::vector<int64_t>>{{}, {0}, {0, 2}, {1, 3}, {0, 4}, {0, 2, 1, 3}, {0, -1, 3}, {0, 5, 3}}) {
    ExpectError(look_up(splits, {}), StatusCode::kInvalidArgument, {"'width3'", "row_splits"});
  }
  ExpectError(look_up({0, 3}, {1.0f}), StatusCode::kInvalidArgument, {"1 weights for 3 keys"});
  ExpectError(look_up({0, 3}, {1, 1, 1, 1}), StatusCode::kInvalidArgument, {"4 weights for 3 keys"});
}

TEST_P(LookupSessionTest, UnknownModelUnloadedModelClosedServer) {
  ExpectError(server_->NewSession("n").status(), StatusCode::kNotFound, {"'n'", "'m'"});
  const LookupSession held = session();
  ASSERT_OK(server_->UnloadModel("m"));
  ExpectError(Lookup(held, 0, 3, {1}).status, StatusCode::kNotFound, {"'m' was unloaded"});
  ExpectError(held.Tables().status(), StatusCode::kNotFound);
  ExpectError(server_->NewSession("m").status(), StatusCode::kNotFound, {"none"});
  ASSERT_OK(server_->Close());
  ExpectError(server_->NewSession("m").status(), StatusCode::kFailedPrecondition, {"closed"});
}

TEST_P(LookupSessionTest, AClosedServerFailsSessionsThatAreHeld) {
  const LookupSession held = session();
  ASSERT_OK(server_->Close());
  ASSERT_OK(server_->Close());
  ExpectError(Lookup(held, 0, 3, {1}).status, StatusCode::kFailedPrecondition, {"closed"});
  server_.reset();
  ExpectError(Lookup(held, 0, 3, {1}).status, StatusCode::kFailedPrecondition, {"closed"});
}

TEST_P(LookupSessionTest, APassedDeadlineIsAnError) {
  const Key key = 1;
  float row[3];
  const DenseLookup lookup{0, 3, std::span(&key, 1), row};
  const Status status =
      session().Lookup(std::span(&lookup, 1), {.deadline = std::chrono::steady_clock::now() - std::chrono::seconds(1)});
  ExpectError(status, StatusCode::kDeadlineExceeded, {"'m'"});
}

TEST_P(LookupSessionTest, ClosingWhileLookupsRun) {
  std::vector<std::thread> threads;
  std::atomic<int> served{0};
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, held = session(), t] {
      const std::vector<Key> keys = KeyRange(t, 2500);
      for (;;) {
        const Rows rows = Lookup(held, 1, 16, keys);
        if (!rows.status.ok()) {
          ExpectError(rows.status, StatusCode::kFailedPrecondition, {"closed"});
          return;
        }
        ExpectRows(rows, keys, 1);
        served.fetch_add(1);
      }
    });
  }
  WaitUntil([&] { return served > 5; }, "lookups");
  ASSERT_OK(server_->Close());
  for (std::thread& thread : threads) thread.join();
}

// ---- keys of 32 bits --------------------------------------------------------------------------------------------

TEST(ShortKeysTest, KeysBeyondTheRangeAreRefusedNotTruncated) {
  constexpr Key kLow = std::numeric_limits<int32_t>::min();
  constexpr Key kHigh = std::numeric_limits<int32_t>::max();
  for (Tiers tiers : {Tiers::kVolatile, Tiers::kPersistent, Tiers::kBoth}) {
    TempFolder folder;
    WriteTable(folder / "t", {kLow, -1, 0, 5, kHigh}, 4, 1);
    WriteTable(folder / "wide", {1, kHigh + 1}, 4, 1);
    ServerConfig config = MakeServer(tiers, folder / "database", {MakeModel("m", {MakeTable("t", folder / "t", 4)})});
    config.long_keys = false;
    auto server = Value(ParameterServer::Open(config));
    ExpectRows(Lookup(*server, "m", 0, 4, {kLow, -1, 0, 5, kHigh}), {kLow, -1, 0, 5, kHigh}, 1);
    for (Key key : {kHigh + 1, kLow - 1, Key{5} + (Key{1} << 32)}) {
      ExpectError(Lookup(*server, "m", 0, 4, {1, key}).status, StatusCode::kOutOfRange,
                  {"'t'", std::to_string(key), "position 1", "supportlonglong"});
      const int64_t splits[] = {0, 1};
      float row[4];
      const SparseLookup sparse{.width = 4, .keys = std::span(&key, 1), .row_splits = splits, .output = row};
      ExpectError(Value(server->NewSession("m")).LookupSparse(std::span(&sparse, 1)), StatusCode::kOutOfRange);
    }
    ExpectError(server->LoadModel(MakeModel("w", {MakeTable("t", folder / "wide", 4)})), StatusCode::kOutOfRange,
                {"2147483648"});
  }
}

}  // namespace
}  // namespace hps::testing
