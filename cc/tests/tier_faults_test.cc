// What lookups do while a tier is down or slow: each policy, time limits, cancellation, the circuit breaker, and whole
// servers over stores that fail and recover.

#include <sched.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "cc/core/circuit_breaker.h"
#include "cc/core/tier_stack.h"
#include "cc/tests/core_fixture.h"
#include "cc/tests/fake_table.h"
#include "cc/tests/faulty_store.h"

namespace hps::testing {
namespace {

using Json = nlohmann::json;
using std::chrono::hours;
using std::chrono::milliseconds;

Deadline In(std::chrono::nanoseconds time) {
  return std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(time);
}

// ---- policies ---------------------------------------------------------------------------------------------------

class TierFaultsTest : public TierStackTest {
 protected:
  // Keys 1 and 2 in the volatile tier, 2 and 3 below; 4 nowhere.
  void SetUp() override {
    for (Key key : {1, 2}) volatile_->Put(key, 1);
    for (Key key : {1, 2, 3}) persistent_->Put(key, 2);
  }
  void Policies(WhenUnavailable upper, WhenUnavailable lower = WhenUnavailable::kFail) {
    stack_.volatile_tier.when_unavailable = upper;
    stack_.persistent_tier.when_unavailable = lower;
  }
  // Version of each row, 0 for the default value.
  static std::vector<uint32_t> Versions(const Rows& rows, const std::vector<Key>& keys) {
    std::vector<uint32_t> versions;
    for (size_t i = 0; i < keys.size(); ++i) {
      const std::vector<float> row = rows.row(i);
      const auto version = row[0] == kDefault ? 0u : static_cast<uint32_t>(row[0]);
      EXPECT_EQ(row, version == 0 ? std::vector<float>(kWidth, kDefault) : Row(keys[i], version, kWidth));
      EXPECT_EQ(rows.found[i], version != 0);
      versions.push_back(version);
    }
    return versions;
  }

  const std::vector<Key> keys_ = {3, 1, 4, 2};
};

TEST_F(TierFaultsTest, FailNamesTheTierAndTheRemedy) {
  CircuitBreaker breaker("volatile", "redis_cluster", metrics_);
  stack_.volatile_tier.breaker = &breaker;
  for (StatusCode code : {StatusCode::kUnavailable, StatusCode::kDeadlineExceeded}) {
    volatile_->Fail(Status(code, "node 7 is gone"));
    ExpectError(
        Fetch(stack_, keys_).status, code,
        {"the volatile tier (redis_cluster) cannot be asked", "node 7 is gone", "volatile_db.when_unavailable"});
  }
  EXPECT_EQ(persistent_->fetches(), 0);
  EXPECT_EQ(Counted("default"), 0u);
  EXPECT_EQ(Counted("volatile failed"), 2u);
  EXPECT_EQ(Counted("volatile skipped"), 0u);  // nobody got anything
}

TEST_F(TierFaultsTest, NextTierServesEveryRow) {
  Policies(WhenUnavailable::kNextTier);
  for (bool addressable : {false, true}) {
    stack_.volatile_tier.addressable = addressable;
    for (StatusCode code : {StatusCode::kUnavailable, StatusCode::kDeadlineExceeded, StatusCode::kDataLoss}) {
      volatile_->Fail(Status(code, "gone"));
      const Rows rows = Fetch(stack_, keys_);
      ASSERT_OK(rows.status);
      EXPECT_EQ(Versions(rows, keys_), (std::vector<uint32_t>{2, 2, 0, 2}));
      EXPECT_EQ(rows.report.rows_from_volatile, 0u);
      EXPECT_EQ(rows.report.rows_from_persistent, 3u);
      EXPECT_EQ(rows.report.rows_from_default, 1u);
      EXPECT_EQ(rows.report.rows_skipped_volatile, 4u);
      EXPECT_EQ(rows.report.rows_unavailable, 0u)
          << "the persistent tier, which has every row, said that there is none";
    }
  }
  EXPECT_EQ(Counted("volatile skipped"), 24u);
  EXPECT_EQ(Counted("unavailable"), 0u);
}

TEST_F(TierFaultsTest, DefaultDoesNotAskFurther) {
  Policies(WhenUnavailable::kDefault);
  volatile_->Fail(Unavailable("gone"));
  for (bool addressable : {false, true}) {
    stack_.volatile_tier.addressable = addressable;
    const Rows rows = Fetch(stack_, keys_);
    ASSERT_OK(rows.status);
    EXPECT_EQ(Versions(rows, keys_), (std::vector<uint32_t>{0, 0, 0, 0}));
    EXPECT_EQ(rows.report.rows_from_default, 4u);
    EXPECT_EQ(rows.report.rows_unavailable, 4u);
    EXPECT_EQ(rows.report.rows_skipped_volatile, 4u);
    EXPECT_EQ(rows.report.rows_from_volatile, 0u);
  }
  EXPECT_EQ(persistent_->fetches(), 0);
  EXPECT_EQ(Counted("unavailable"), 8u);
  // Damaged rows never turn into default values.
  volatile_->Fail(DataLoss("block 7"));
  ExpectError(Fetch(stack_, keys_).status, StatusCode::kDataLoss, {"block 7"});
}

TEST_F(TierFaultsTest, TheLastTierFailsOrGivesDefaults) {
  persistent_->Fail(Unavailable("disk"));
  ExpectError(Fetch(stack_, keys_).status, StatusCode::kUnavailable, {"disk", "persistent_db.when_unavailable"});
  Policies(WhenUnavailable::kFail, WhenUnavailable::kDefault);
  const Rows rows = Fetch(stack_, keys_);
  ASSERT_OK(rows.status);
  EXPECT_EQ(Versions(rows, keys_), (std::vector<uint32_t>{0, 1, 0, 1}));
  EXPECT_EQ(rows.report.rows_from_default, 2u);
  EXPECT_EQ(rows.report.rows_unavailable, 2u);
  EXPECT_EQ(rows.report.rows_skipped_persistent, 2u);
  EXPECT_EQ(Counted("persistent skipped"), 2u);
  persistent_->Fail(DataLoss("block 7"));
  ExpectError(Fetch(stack_, keys_).status, StatusCode::kDataLoss, {"block 7"});
}

TEST_F(TierFaultsTest, BothTiersDown) {
  volatile_->Fail(Unavailable("redis"));
  persistent_->Fail(Unavailable("disk"));
  Policies(WhenUnavailable::kNextTier, WhenUnavailable::kFail);
  ExpectError(Fetch(stack_, keys_).status, StatusCode::kUnavailable, {"disk"});
  Policies(WhenUnavailable::kNextTier, WhenUnavailable::kDefault);
  const Rows rows = Fetch(stack_, keys_);
  ASSERT_OK(rows.status);
  EXPECT_EQ(rows.report.rows_unavailable, 4u);
  EXPECT_EQ(rows.report.rows_skipped_volatile, 4u);
  EXPECT_EQ(rows.report.rows_skipped_persistent, 4u);
}

TEST_F(TierFaultsTest, MistakesAreNeverPassedOver) {
  CircuitBreaker breaker("volatile", "fake", metrics_);
  stack_.volatile_tier.breaker = &breaker;
  for (WhenUnavailable policy : {WhenUnavailable::kNextTier, WhenUnavailable::kDefault}) {
    Policies(policy, WhenUnavailable::kDefault);
    for (StatusCode code : {StatusCode::kInvalidArgument, StatusCode::kNotFound, StatusCode::kAlreadyExists,
                            StatusCode::kFailedPrecondition, StatusCode::kOutOfRange, StatusCode::kResourceExhausted,
                            StatusCode::kCancelled, StatusCode::kUnimplemented, StatusCode::kInternal}) {
      volatile_->Fail(Status(code, "a mistake"));
      ExpectError(Fetch(stack_, keys_).status, code, {"a mistake"});
    }
  }
  EXPECT_TRUE(breaker.closed());
}

TEST_F(TierFaultsTest, RowsOfASkippedTierAreNotPromoted) {
  Promoter promoter;
  stack_.promoter = &promoter;
  Policies(WhenUnavailable::kNextTier);
  volatile_->Fail(Unavailable("gone"));
  ASSERT_OK(Fetch(stack_, keys_).status);
  promoter.Drain();
  EXPECT_EQ(volatile_->upserts(), 0);
}

TEST_F(TierFaultsTest, OnlyTheTableThatFailsIsSkipped) {
  auto healthy = std::make_shared<FakeTable>();
  for (Key key : {1, 2}) healthy->Put(key, 1);
  Policies(WhenUnavailable::kNextTier);
  TierStack other = MakeStack(healthy, persistent_);
  other.volatile_tier.when_unavailable = WhenUnavailable::kNextTier;
  volatile_->Fail(Unavailable("gone"));
  auto pool = NewThreadPool(3);
  std::vector<float> rows(2 * keys_.size() * kWidth);
  std::vector<TierWalk> walks(2);
  for (size_t i = 0; i < 2; ++i) {
    walks[i].stack = i == 0 ? &stack_ : &other;
    walks[i].keys = keys_;
    walks[i].rows = reinterpret_cast<std::byte*>(rows.data() + i * keys_.size() * kWidth);
  }
  LookupReport report;
  ASSERT_OK(FetchRows(walks, *pool, *pool, {}, &report));
  EXPECT_EQ(report.rows_from_volatile, 2u);
  EXPECT_EQ(report.rows_from_persistent, 4u);
  EXPECT_EQ(report.rows_skipped_volatile, 4u);
}

// ---- time limits and cancellation ---------------------------------------------------------------------------------

TEST_F(TierFaultsTest, ASlowTierTakesItsOwnTimeAndNoMore) {
  Policies(WhenUnavailable::kNextTier);
  stack_.volatile_tier.timeout = milliseconds(20);
  volatile_->Hang(true);
  const Rows rows = Fetch(stack_, keys_, InlineExecutor(), {.deadline = In(hours(1))});
  ASSERT_OK(rows.status);
  EXPECT_EQ(Versions(rows, keys_), (std::vector<uint32_t>{2, 2, 0, 2}));
  EXPECT_GE(rows.report.volatile_nanoseconds, 20'000'000u);
  Policies(WhenUnavailable::kFail);
  ExpectError(Fetch(stack_, keys_).status, StatusCode::kDeadlineExceeded, {"volatile_db.timeout_ms"});
}

TEST_F(TierFaultsTest, OnlyLimitsThatWereAtWorkAreNamed) {
  const auto error = [&](const LookupLimits& limits) { return Fetch(stack_, keys_, InlineExecutor(), limits).status; };
  const auto has = [](const Status& status, const char* part) {
    return status.message().find(part) != std::string::npos;
  };
  // Refused at once, or slow by the store's own measure: no time of ours to raise.
  for (const Status& given : {Unavailable("refused"), DeadlineExceeded("no answer in 15 s")}) {
    volatile_->Fail(given);
    EXPECT_FALSE(has(error({}), "timeout_ms")) << error({}).ToString();
  }
  stack_.volatile_tier.timeout = milliseconds(20);
  EXPECT_TRUE(has(error({}), "raise volatile_db.timeout_ms"));
  EXPECT_FALSE(has(error({}), "lookup_timeout_ms"));
  EXPECT_TRUE(has(error({.deadline = In(hours(1))}), "raise volatile_db.timeout_ms"));
  // The lookup's own time, whatever the store makes of it.
  volatile_->Fail(Unavailable("tried again until the time was up"));
  const Status late = error({.deadline = In(-milliseconds(1))});
  EXPECT_TRUE(has(late, "lookup_timeout_ms")) << late.ToString();
  EXPECT_FALSE(has(late, "volatile_db.timeout_ms")) << late.ToString();
}

TEST_F(TierFaultsTest, ATierWithoutOwnLimitLeavesTimeForTheNext) {
  Policies(WhenUnavailable::kNextTier);
  volatile_->Hang(true);
  const Rows rows = Fetch(stack_, keys_, InlineExecutor(), {.deadline = In(std::chrono::seconds(4))});
  ASSERT_OK(rows.status);
  EXPECT_EQ(rows.report.rows_from_persistent, 3u);
}

TEST_F(TierFaultsTest, TheLookupsDeadlineIsNoFaultOfATier) {
  CircuitBreaker breaker("persistent", "fake", metrics_, {.failures_to_open = 1});
  stack_.persistent_tier.breaker = &breaker;
  Policies(WhenUnavailable::kNextTier);
  persistent_->Hang(true);
  ExpectError(Fetch(stack_, keys_, InlineExecutor(), {.deadline = In(milliseconds(20))}).status,
              StatusCode::kDeadlineExceeded, {"too slow", "lookup_timeout_ms"});
  EXPECT_TRUE(breaker.closed());
}

TEST_F(TierFaultsTest, TiersInMemoryAreNotTimed) {
  stack_.volatile_tier.addressable = true;
  stack_.volatile_tier.timeout = milliseconds(1);
  ASSERT_OK(Fetch(stack_, {1}).status);
  EXPECT_EQ(volatile_->deadline(), kNoDeadline);
}

TEST_F(TierFaultsTest, CancellationReachesATierThatIsWaitedFor) {
  for (auto& [table, tier] : {std::pair(volatile_, "volatile"), std::pair(persistent_, "persistent")}) {
    table->Hang(true);
    std::atomic<bool> cancelled{false};
    const int before = table->fetches();
    std::thread lookup([&] {
      ExpectError(Fetch(stack_, keys_, InlineExecutor(), {.cancelled = &cancelled}).status, StatusCode::kCancelled);
    });
    table->WaitForFetches(before + 1);
    cancelled = true;
    lookup.join();
    table->Hang(false);
  }
  EXPECT_EQ(Counted("default"), 0u);
}

TEST_F(TierFaultsTest, ACancelledLookupAsksNothing) {
  const std::atomic<bool> cancelled{true};
  stack_.volatile_tier.addressable = true;
  ExpectError(Fetch(stack_, keys_, InlineExecutor(), {.cancelled = &cancelled}).status, StatusCode::kCancelled);
  EXPECT_EQ(volatile_->fetches() + persistent_->fetches(), 0);
}

// ---- circuit breaker ----------------------------------------------------------------------------------------------

class CircuitBreakerTest : public ::testing::Test {
 protected:
  void FailTimes(CircuitBreaker& breaker, int times) {
    for (int i = 0; i < times; ++i) {
      ASSERT_OK(breaker.Admit());
      breaker.Failed(Unavailable("node 7"));
    }
  }
  int64_t Reachable() { return metrics_.FindGauge("hps_tier_reachable_state", {{"tier", "volatile"}})->value(); }

  MetricsRegistry metrics_;
  CapturedLog log_;
};

TEST_F(CircuitBreakerTest, OpensAfterFailuresInARowOnly) {
  CircuitBreaker breaker("volatile", "fake", metrics_,
                         {.failures_to_open = 3, .first_wait = hours(1), .longest_wait = hours(1)});
  for (int i = 0; i < 5; ++i) {
    FailTimes(breaker, 2);
    breaker.Succeeded();
  }
  EXPECT_TRUE(breaker.closed());
  EXPECT_EQ(log_.text(), "");
  EXPECT_EQ(Reachable(), 1);
  FailTimes(breaker, 3);
  EXPECT_EQ(breaker.state(), CircuitBreaker::State::kOpen);
  EXPECT_EQ(Reachable(), 0);
  EXPECT_EQ(breaker.openings(), 1u);
  for (int i = 0; i < 100; ++i) ExpectError(breaker.Admit(), StatusCode::kUnavailable, {"node 7"});
  EXPECT_EQ(log_.text(),
            "warning: the volatile tier (fake) does not answer and is left out until it does: Unavailable: node 7\n");
}

TEST_F(CircuitBreakerTest, OneCallTriesAndItsSuccessCloses) {
  CircuitBreaker breaker("volatile", "fake", metrics_, {.failures_to_open = 1, .first_wait = milliseconds(1)});
  FailTimes(breaker, 1);
  WaitUntil([&] { return breaker.Admit().ok(); }, "the first try");
  EXPECT_EQ(breaker.state(), CircuitBreaker::State::kHalfOpen);
  ExpectError(breaker.Admit(), StatusCode::kUnavailable);  // nobody else while it is on its way
  breaker.Undecided();                                     // it was cancelled: somebody else tries
  ASSERT_OK(breaker.Admit());
  breaker.Failed(Unavailable("still"));
  ExpectError(breaker.Admit(), StatusCode::kUnavailable, {"still"});
  WaitUntil([&] { return breaker.Admit().ok(); }, "the next try");
  breaker.Succeeded();
  EXPECT_EQ(breaker.state(), CircuitBreaker::State::kClosed);
  EXPECT_EQ(Reachable(), 1);
  ASSERT_OK(breaker.Admit());
  ASSERT_OK(breaker.Admit());
  EXPECT_NE(log_.text().find("\nthe volatile tier (fake) answers again after "), std::string::npos) << log_.text();
  EXPECT_EQ(breaker.openings(), 1u);
  const std::string text = log_.text();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2) << text;
}

TEST_F(CircuitBreakerTest, LateFailuresDoNotLengthenTheWait) {
  CircuitBreaker breaker("volatile", "fake", metrics_,
                         {.failures_to_open = 1, .first_wait = milliseconds(1), .longest_wait = milliseconds(1)});
  ASSERT_OK(breaker.Admit());
  FailTimes(breaker, 1);
  breaker.Failed(Unavailable("late"));
  EXPECT_EQ(breaker.openings(), 1u);
  WaitUntil([&] { return breaker.Admit().ok(); }, "the try");
}

TEST_F(CircuitBreakerTest, ManyThreadsAgree) {
  CircuitBreaker breaker("volatile", "fake", metrics_,
                         {.failures_to_open = 3, .first_wait = milliseconds(1), .longest_wait = milliseconds(2)});
  std::atomic<bool> down{true};
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> admitted{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      while (!stop) {
        if (!breaker.Admit().ok()) continue;
        ++admitted;
        down ? breaker.Failed(Unavailable("down")) : breaker.Succeeded();
      }
    });
  }
  for (int round = 0; round < 5; ++round) {
    WaitUntil([&] { return !breaker.closed(); }, "the opening");
    down = false;
    WaitUntil([&] { return breaker.closed(); }, "the recovery");
    const uint64_t before = admitted;
    WaitUntil([&] { return admitted > before + 100; }, "calls");
    down = true;
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

TEST_F(CircuitBreakerTest, AnOpenTierIsSkippedWithoutAsking) {
  auto upper = std::make_shared<FakeTable>();
  auto lower = std::make_shared<FakeTable>();
  lower->Put(1, 2);
  CircuitBreaker breaker("volatile", "fake", metrics_,
                         {.failures_to_open = 2, .first_wait = hours(1), .longest_wait = hours(1)});
  TierStack stack;
  stack.volatile_tier = {.table = upper, .when_unavailable = WhenUnavailable::kNextTier, .breaker = &breaker};
  stack.persistent_tier = {.table = lower};
  stack.default_row.assign(kWidth, kDefault);
  upper->Fail(Unavailable("gone"));
  std::vector<float> row(kWidth);
  const Key key = 1;
  for (int i = 0; i < 10; ++i) {
    TierWalk walk;
    walk.stack = &stack;
    walk.keys = std::span(&key, 1);
    walk.rows = reinterpret_cast<std::byte*>(row.data());
    LookupReport report;
    ASSERT_OK(FetchRows(std::span(&walk, 1), InlineExecutor(), InlineExecutor(), {}, &report));
    EXPECT_EQ(row, Row(1, 2, kWidth));
    EXPECT_EQ(report.rows_skipped_volatile, 1u);
  }
  EXPECT_EQ(upper->fetches(), 2);
}

// ---- whole servers --------------------------------------------------------------------------------------------------

class FaultyServerTest : public ::testing::Test {
 protected:
  void SetUp() override { WriteTable(folder_ / "a", keys_, kServerWidth, 1); }

  // Both tiers can be broken; the volatile one shows itself as one that is waited for, unless told otherwise.
  std::shared_ptr<ParameterServer> Open(const std::function<void(ServerConfig*)>& change = {}) {
    ServerConfig config =
        MakeServer(Tiers::kBoth, folder_ / "database", {MakeModel("m", {MakeTable("t", folder_ / "a", kServerWidth)})});
    config.volatile_db.timeout_ms = 50;
    if (change) change(&config);
    ServerOptions options;
    options.show_progress = false;
    options.adapt_store = [this](std::string_view tier, std::shared_ptr<TableStore> store) {
      const bool upper = tier == "volatile";
      FaultyOptions as;
      if (upper && !addressable_) as.addressable = false;
      return std::make_shared<FaultyStore>(std::move(store), upper ? volatile_ : persistent_, as);
    };
    return Value(ParameterServer::Open(config, options));
  }
  static Json Stats(const ParameterServer& server) { return Json::parse(server.StatsJson()); }

  static constexpr uint32_t kServerWidth = 8;
  const std::vector<Key> keys_ = KeyRange(0, 1000);
  TempFolder folder_;
  bool addressable_ = false;
  std::shared_ptr<Faults> volatile_ = std::make_shared<Faults>();
  std::shared_ptr<Faults> persistent_ = std::make_shared<Faults>();
};

TEST_F(FaultyServerTest, WithTheWholeVolatileStoreGoneEveryRowIsServedAndItComesBackByItself) {
  CapturedLog log;
  auto server = Open();
  EXPECT_EQ(Lookup(*server, "m", 0, kServerWidth, keys_).report.rows_from_volatile, keys_.size());
  for (bool hang : {false, true}) {
    hang ? volatile_->Hang() : volatile_->Fail(Unavailable("connection refused"));
    for (int i = 0; i < 20; ++i) {
      const Rows rows = Lookup(*server, "m", 0, kServerWidth, keys_);
      ExpectRows(rows, keys_, 1);
      EXPECT_EQ(rows.report.rows_from_persistent, keys_.size());
      EXPECT_EQ(rows.report.rows_skipped_volatile, keys_.size());
      EXPECT_EQ(rows.report.rows_unavailable, 0u);
    }
    ExpectRows(Lookup(*server, "m", 0, kServerWidth, {-5}), {-5}, 0);
    EXPECT_EQ(Stats(*server)["tier_states"]["volatile"]["openings"], hang ? 2 : 1);
    EXPECT_NE(Stats(*server)["tier_states"]["volatile"]["breaker"], "closed");
    const Readiness readiness = server->CheckReadiness();
    EXPECT_TRUE(readiness.ready) << readiness.reason;
    EXPECT_NE(readiness.reason.find("lookups do without a tier: the volatile tier (hash_map)"), std::string::npos);
    volatile_->Heal();
    WaitUntil([&] { return Lookup(*server, "m", 0, kServerWidth, keys_).report.rows_from_volatile == keys_.size(); },
              "the recovery");
    EXPECT_EQ(Stats(*server)["tier_states"]["volatile"]["breaker"], "closed");
    EXPECT_EQ(server->CheckReadiness().reason, "ready");
  }
  const std::string text = log.text();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 4) << text;  // twice out, twice back
}

TEST_F(FaultyServerTest, SparseLookupsDoWithoutATierToo) {
  for (bool addressable : {false, true}) {
    addressable_ = addressable;
    volatile_->Heal();
    auto server = Open();
    std::vector<int64_t> splits(keys_.size() + 1);
    std::iota(splits.begin(), splits.end(), 0);
    std::vector<float> output(keys_.size() * kServerWidth);
    const SparseLookup lookup{
        .table = 0, .width = kServerWidth, .keys = keys_, .row_splits = splits, .output = output.data()};
    const LookupSession session = Value(server->NewSession("m"));
    volatile_->Fail(Unavailable("gone"));
    for (int i = 0; i < 10; ++i) {
      LookupReport report;
      ASSERT_OK(session.LookupSparse(std::span(&lookup, 1), {}, &report));
      EXPECT_EQ(report.rows_from_persistent, keys_.size());
      EXPECT_EQ(report.rows_skipped_volatile, keys_.size());
      for (size_t k = 0; k < keys_.size(); ++k) ASSERT_EQ(output[k * kServerWidth + 1], Element(keys_[k], 1, 1));
    }
    volatile_->Heal();
    WaitUntil(
        [&] {
          LookupReport report;
          return session.LookupSparse(std::span(&lookup, 1), {}, &report).ok() &&
                 report.rows_from_volatile == keys_.size();
        },
        "the recovery");
    volatile_->Fail(Internal("a bug"));
    ExpectError(session.LookupSparse(std::span(&lookup, 1), {}, nullptr), StatusCode::kInternal, {"a bug"});
  }
}

TEST_F(FaultyServerTest, TheConfiguredTimeOfALookup) {
  auto server = Open([](ServerConfig* config) {
    config->lookup_timeout_ms = 40;
    config->volatile_db.initial_cache_rate = 0.5;
  });
  persistent_->Hang();
  ExpectError(Lookup(*server, "m", 0, kServerWidth, keys_).status, StatusCode::kDeadlineExceeded,
              {"lookup_timeout_ms"});
  // A caller's own deadline counts instead.
  const LookupSession session = Value(server->NewSession("m"));
  std::vector<float> rows(keys_.size() * kServerWidth);
  const DenseLookup lookup{.table = 0, .width = kServerWidth, .keys = keys_, .rows = rows.data()};
  std::atomic<bool> cancelled{false};
  std::thread waiting([&] {
    const LookupOptions options{.deadline = In(hours(1)), .cancelled = &cancelled};
    ExpectError(session.Lookup(std::span(&lookup, 1), options), StatusCode::kCancelled);
  });
  const uint64_t before = persistent_->fetches();
  WaitUntil([&] { return persistent_->fetches() > before || before > 1; }, "the lookup to wait");
  cancelled = true;
  waiting.join();
  persistent_->Heal();
  ExpectRows(Lookup(*server, "m", 0, kServerWidth, keys_), keys_, 1);
}

TEST_F(FaultyServerTest, ReadinessNamesWhatLookupsNeed) {
  auto server = Open();
  Readiness readiness = server->CheckReadiness();
  EXPECT_TRUE(readiness.ready);
  EXPECT_EQ(readiness.models, (std::vector<std::string>{"m"}));
  ASSERT_EQ(readiness.tiers.size(), 2u);
  EXPECT_FALSE(readiness.tiers[0].needed);
  EXPECT_TRUE(readiness.tiers[1].needed);
  persistent_->Fail(Unavailable("disk"));
  readiness = server->CheckReadiness();
  EXPECT_FALSE(readiness.ready);
  EXPECT_NE(readiness.reason.find("the persistent tier (rocks_db) cannot be asked"), std::string::npos);
  EXPECT_FALSE(readiness.tiers[1].reachable);
  // What lookups do without already need not be said how they could do without it.
  EXPECT_NE(readiness.reason.find("persistent_db.when_unavailable"), std::string::npos) << readiness.reason;
  volatile_->Fail(Unavailable("gone"));
  readiness = server->CheckReadiness();
  EXPECT_NE(readiness.reason.find("lookups do without a tier: the volatile tier"), std::string::npos);
  EXPECT_EQ(readiness.reason.find("volatile_db.when_unavailable"), std::string::npos) << readiness.reason;
  volatile_->Heal();
  // No lookup comes, because the server is not ready, and yet its recovery is noticed.
  for (int i = 0; i < 10; ++i) (void)server->CheckReadiness();
  EXPECT_NE(Stats(*server)["tier_states"]["persistent"]["breaker"], "closed");
  persistent_->Heal();
  WaitUntil([&] { return server->CheckReadiness().ready; }, "readiness");
  persistent_->Hang();  // bounded, though the tier has no limit of its own
  EXPECT_FALSE(server->CheckReadiness().ready);
  persistent_->Heal();
  ASSERT_OK(server->Close());
  readiness = server->CheckReadiness();
  EXPECT_FALSE(readiness.ready);
  EXPECT_NE(readiness.reason.find("closed"), std::string::npos);
}

// Otherwise a node, or a partition, that is gone would not be noticed.
TEST_F(FaultyServerTest, AProbeAsksEveryPartitionOfATier) {
  auto server = Open();
  EXPECT_TRUE(server->CheckReadiness().ready);
  for (const auto& faults : {volatile_, persistent_}) {
    const std::vector<Key> asked = faults->keys_of_last_fetch();
    EXPECT_EQ(std::set<Key>(asked.begin(), asked.end()).size(), 256u);
    for (const uint64_t num_partitions : {1, 3, 8, 16, 32}) {
      std::set<uint64_t> partitions;
      for (const Key key : asked) partitions.insert(PartitionHash(static_cast<uint64_t>(key)) % num_partitions);
      EXPECT_EQ(partitions.size(), num_partitions);
    }
  }
}

TEST_F(FaultyServerTest, ProbesThatSucceedDoNotKeepTheBreakerClosed) {
  auto server = Open();
  for (int i = 0; i < 5; ++i) {  // lookups fail, probes do not
    volatile_->Fail(Unavailable("gone"));
    ASSERT_OK(Lookup(*server, "m", 0, kServerWidth, keys_).status);
    volatile_->Heal();
    EXPECT_TRUE(server->CheckReadiness().ready);
    EXPECT_EQ(Stats(*server)["tier_states"]["volatile"]["openings"], i < 4 ? 0 : 1);
  }
}

TEST_F(FaultyServerTest, CountersAreWhatWasDone) {
  auto server = Open([](ServerConfig* config) {
    config->volatile_db.initial_cache_rate = 0.5;
    config->volatile_db.cache_missed_embeddings = true;
    config->persistent_db.when_unavailable = WhenUnavailable::kDefault;
  });
  ASSERT_OK(Lookup(*server, "m", 0, kServerWidth, KeyRange(400, 200)).status);  // 100 rows from each tier
  WaitUntil([&] { return Stats(*server)["rows_promoted"] == 100; }, "the promotion");
  persistent_->Fail(Unavailable("disk"));
  ASSERT_OK(Lookup(*server, "m", 0, kServerWidth, KeyRange(590, 20)).status);  // 10 rows that were promoted, 10 nowhere
  persistent_->Heal();
  volatile_->Fail(Unavailable("gone"));
  ASSERT_OK(Lookup(*server, "m", 0, kServerWidth, KeyRange(995, 10)).status);  // 5 rows below, 5 nowhere
  volatile_->Heal();
  const Json table = Stats(*server)["models"][0]["tables"][0];
  EXPECT_EQ(table["rows_served"]["volatile"], 110);
  EXPECT_EQ(table["rows_served"]["persistent"], 105);
  EXPECT_EQ(table["rows_served"]["default"], 15);
  EXPECT_EQ(table["rows_unavailable"], 10);
  EXPECT_EQ(table["volatile"]["rows_skipped"], 10);
  EXPECT_EQ(table["volatile"]["fetches_failed"], 1);
  EXPECT_EQ(table["volatile"]["rows_promoted"], 100);
  EXPECT_EQ(table["volatile"]["rows_promotion_dropped"], 0);
  EXPECT_EQ(table["volatile"]["fetch_latency"]["count"], 3);
  EXPECT_EQ(table["persistent"]["rows_skipped"], 10);
  EXPECT_EQ(table["persistent"]["fetches_failed"], 1);
  EXPECT_EQ(table["persistent"]["fetch_latency"]["count"], 3);
  const std::string text = server->PrometheusText();
  for (const char* line : {"hps_rows_unavailable_total{model=\"m\",table=\"t\"} 10\n",
                           "hps_rows_skipped_total{model=\"m\",table=\"t\",tier=\"volatile\"} 10\n",
                           "hps_rows_skipped_total{model=\"m\",table=\"t\",tier=\"persistent\"} 10\n",
                           "hps_fetches_failed_total{model=\"m\",table=\"t\",tier=\"volatile\"} 1\n",
                           "hps_rows_promoted_total{model=\"m\",table=\"t\",tier=\"volatile\"} 100\n",
                           "hps_rows_promotion_dropped_total{model=\"m\",table=\"t\",tier=\"volatile\"} 0\n",
                           "hps_keys_waited_total{model=\"m\",table=\"t\",tier=\"persistent\"} 0\n",
                           "hps_fetch_duration_seconds_count{model=\"m\",table=\"t\",tier=\"persistent\"} 3\n",
                           "# TYPE hps_tier_reachable_state gauge\n", "hps_tier_reachable_state{tier=\"volatile\"} 1\n",
                           "hps_tier_openings_total{tier=\"volatile\"} 0\n"}) {
    EXPECT_NE(text.find(line), std::string::npos) << line << " in\n" << text;
  }
}

TEST_F(FaultyServerTest, LoadsAndWhatTheyLetGoOfStandBackOnceTheServerServes) {
  auto server = Open();
  const auto policy_of = [&](Faults& store, const std::function<Status()>& work) {
    std::atomic<int> policy{-1};
    store.WhenAsked([&] { policy = ::sched_getscheduler(0); });
    EXPECT_TRUE(work().ok());
    return policy.load();
  };
  const ModelConfig model = MakeModel("m", {MakeTable("t", folder_ / "a", kServerWidth)});
  EXPECT_EQ(::sched_getscheduler(0), SCHED_OTHER);
  EXPECT_EQ(policy_of(*persistent_, [&] { return server->ReplaceModel(model); }), SCHED_BATCH);
  EXPECT_EQ(policy_of(*volatile_, [&] { return server->UnloadModel("m"); }), SCHED_BATCH);  // asked to drop its table
}

}  // namespace
}  // namespace hps::testing
