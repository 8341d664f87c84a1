// The walk down the tiers over tables that record what they are asked, and the promotion upwards.

#include "cc/core/tier_stack.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>

#include "cc/tests/core_fixture.h"
#include "cc/tests/fake_table.h"

namespace hps::testing {
namespace {

TEST_F(TierStackTest, EachTierIsAskedOnlyForWhatTheOnesAboveDoNotHold) {
  volatile_->Put(1, 1);
  volatile_->Put(2, 1);
  persistent_->Put(2, 2);
  persistent_->Put(3, 2);
  const std::vector<Key> keys = {3, 1, 4, 2, 3, 4, 1};
  const Rows rows = Fetch(stack_, keys);
  ASSERT_OK(rows.status);
  const uint32_t expected[] = {2, 1, 0, 1, 2, 0, 1};
  for (size_t i = 0; i < keys.size(); ++i) {
    EXPECT_EQ(rows.row(i), expected[i] == 0 ? std::vector<float>(kWidth, kDefault) : Row(keys[i], expected[i], kWidth));
    EXPECT_EQ(rows.found[i], expected[i] != 0);
  }
  EXPECT_EQ(persistent_->asked(), (std::vector<Key>{3, 4, 3, 4}));
  EXPECT_EQ(rows.report.rows_from_volatile, 3u);
  EXPECT_EQ(rows.report.rows_from_persistent, 2u);
  EXPECT_EQ(rows.report.rows_from_default, 2u);
  EXPECT_EQ(Counted("volatile"), 3u);
  EXPECT_EQ(Counted("persistent"), 2u);
  EXPECT_EQ(Counted("default"), 2u);
  EXPECT_EQ(metrics_.FindHistogram("volatile seconds", {})->count(), 1u);
  EXPECT_EQ(metrics_.FindHistogram("persistent seconds", {})->count(), 1u);
}

TEST_F(TierStackTest, AFullAnswerLeavesTheTierBelowAlone) {
  volatile_->Put(1, 1);
  ExpectRows(Fetch(stack_, {1, 1}), {1, 1}, 1);
  EXPECT_TRUE(persistent_->asked().empty());
}

TEST_F(TierStackTest, AnyTierMayBeAbsent) {
  volatile_->Put(1, 1);
  persistent_->Put(1, 2);
  ExpectRows(Fetch(MakeStack(volatile_, nullptr), {1}), {1}, 1);
  ExpectRows(Fetch(MakeStack(nullptr, persistent_), {1}), {1}, 2);
  ExpectRows(Fetch(MakeStack(nullptr, nullptr), {1}), {1}, 0);
}

TEST_F(TierStackTest, AnErrorOfATierFailsTheCall) {
  volatile_->Put(1, 1);
  persistent_->Fail(DataLoss("block 7"));
  ExpectRows(Fetch(stack_, {1}), {1}, 1);  // not asked
  ExpectError(Fetch(stack_, {1, 2}).status, StatusCode::kDataLoss, {"block 7"});
  volatile_->Fail(ResourceExhausted("no memory"));
  ExpectError(Fetch(stack_, {1}).status, StatusCode::kResourceExhausted, {"no memory"});
  EXPECT_EQ(Counted("default"), 0u);
}

TEST_F(TierStackTest, TheDeadlineReachesEachTier) {
  const Deadline deadline = std::chrono::steady_clock::now() + std::chrono::hours(1);
  ASSERT_OK(Fetch(stack_, {1}, InlineExecutor(), {.deadline = deadline}).status);
  EXPECT_EQ(volatile_->deadline(), deadline);
  EXPECT_EQ(persistent_->deadline(), deadline);
}

TEST_F(TierStackTest, ManyTablesInParallelPieces) {
  constexpr size_t kTables = 5;
  auto pool = NewThreadPool(4);
  std::vector<std::shared_ptr<FakeTable>> tables;
  std::vector<TierStack> stacks;
  std::vector<std::vector<Key>> keys;
  std::vector<std::vector<float>> values;
  std::vector<TierWalk> walks(kTables);
  for (size_t t = 0; t < kTables; ++t) {
    auto upper = std::make_shared<FakeTable>();
    auto lower = std::make_shared<FakeTable>();
    // Sizes below, at and above the piece; the third table has no volatile tier.
    keys.push_back(KeyRange(0, t == 0 ? 1 : t * kKeysPerPiece - t % 2));
    for (Key key : keys.back()) {
      if (key % 3 == 0) upper->Put(key, 1);
      if (key % 3 == 1 || t == 2) lower->Put(key, 2);
    }
    stacks.push_back(MakeStack(t == 2 ? nullptr : upper, lower));
    values.emplace_back(keys[t].size() * kWidth);
  }
  for (size_t t = 0; t < kTables; ++t) {
    walks[t].stack = &stacks[t];
    walks[t].keys = keys[t];
    walks[t].rows = reinterpret_cast<std::byte*>(values[t].data());
  }
  LookupReport report;
  ASSERT_OK(FetchRows(walks, *pool, *pool, {}, &report));
  uint64_t counted[3] = {};
  for (size_t t = 0; t < kTables; ++t) {
    for (size_t i = 0; i < keys[t].size(); ++i) {
      const Key key = keys[t][i];
      const uint32_t version = t == 2 ? 2 : key % 3 == 0 ? 1 : key % 3 == 1 ? 2 : 0;
      ++counted[version];
      const auto expected = version == 0 ? std::vector<float>(kWidth, kDefault) : Row(key, version, kWidth);
      ASSERT_EQ(std::memcmp(values[t].data() + i * kWidth, expected.data(), kRowBytes), 0) << t << ", key " << key;
    }
  }
  EXPECT_EQ(report.rows_from_default, counted[0]);
  EXPECT_EQ(report.rows_from_volatile, counted[1]);
  EXPECT_EQ(report.rows_from_persistent, counted[2]);
}

// What is told to be final has its rows and marks, and does not change any more; what a lower tier may hold is not
// told.
TEST_F(TierStackTest, PiecesThatAreFinalAreTold) {
  auto pool = NewThreadPool(4);
  const std::vector<Key> keys = KeyRange(0, 1000);
  for (const bool has_lower : {false, true}) {
    auto whole = std::make_shared<FakeTable>();
    auto part = std::make_shared<FakeTable>();
    for (const Key key : keys) {
      whole->Put(key, 1);
      if (key < 500 || key % 2 == 0) part->Put(key, 2);
    }
    TierStack stacks[] = {MakeStack(part, has_lower ? persistent_ : nullptr),
                          MakeStack(whole, has_lower ? persistent_ : nullptr)};
    std::vector<TierWalk> walks(2);
    std::vector<float> values(2 * keys.size() * kWidth, 12345.0f);
    const auto found = std::make_unique<bool[]>(2 * keys.size());
    for (size_t w = 0; w < 2; ++w) {
      stacks[w].volatile_tier.addressable = true;
      walks[w].stack = &stacks[w];
      walks[w].keys = keys;
      walks[w].rows = reinterpret_cast<std::byte*>(values.data() + w * keys.size() * kWidth);
      walks[w].found = found.get() + w * keys.size();
    }
    std::mutex mutex;
    std::vector<char> told(2 * keys.size());
    std::vector<float> rows_told(values.size());
    std::vector<char> found_told(2 * keys.size());
    const std::function<void(size_t, size_t, size_t)> done = [&](size_t w, size_t first, size_t last) {
      std::lock_guard lock(mutex);
      for (size_t i = w * keys.size() + first; i < w * keys.size() + last; ++i) {
        EXPECT_FALSE(told[i]) << "twice";
        told[i] = true;
        found_told[i] = found[i];
        std::copy_n(values.begin() + static_cast<ptrdiff_t>(i * kWidth), kWidth,
                    rows_told.begin() + static_cast<ptrdiff_t>(i * kWidth));
      }
    };
    LookupReport report;
    ASSERT_OK(FetchRows(walks, *pool, *pool, {}, &report, {.keys = 64, .done = &done}));
    EXPECT_EQ(report.rows_from_volatile, 1750u);
    EXPECT_EQ(report.rows_from_default, 250u);
    for (size_t i = 0; i < 2 * keys.size(); ++i) {
      const Key key = keys[i % keys.size()];
      const bool held = i >= keys.size() || key < 500 || key % 2 == 0;
      const auto expected = held ? Row(key, i < keys.size() ? 2 : 1, kWidth) : std::vector<float>(kWidth, kDefault);
      ASSERT_EQ(std::memcmp(values.data() + i * kWidth, expected.data(), kRowBytes), 0) << i;
      ASSERT_EQ(found[i], held) << i;
      // The pieces of 64 keys from 512 on of the first table have keys that the lower tier was asked for.
      if (!has_lower || i < 448 || i >= keys.size()) EXPECT_TRUE(told[i]) << i;
      if (has_lower && i >= 512 && i < keys.size()) EXPECT_FALSE(told[i]) << i;
      if (!told[i]) continue;
      ASSERT_EQ(std::memcmp(rows_told.data() + i * kWidth, expected.data(), kRowBytes), 0) << i;
      ASSERT_EQ(found_told[i] != 0, held) << i;
    }
    // A tier that fails tells nothing, and its rows still come.
    if (!has_lower) continue;
    part->Fail(Unavailable("gone"));
    stacks[0].volatile_tier.when_unavailable = WhenUnavailable::kDefault;
    std::fill(told.begin(), told.end(), 0);
    ASSERT_OK(FetchRows(walks, *pool, *pool, {}, &report, {.keys = 64, .done = &done}));
    EXPECT_EQ(report.rows_unavailable, keys.size());
    EXPECT_EQ(std::count(told.begin(), told.end(), 1), 1000);
    EXPECT_EQ(std::count(found.get(), found.get() + 2 * keys.size(), true), 1000);
  }
}

// ---- promotion --------------------------------------------------------------------------------------------------

class PromotionTest : public TierStackTest {
 protected:
  PromotionTest() {
    stack_.promoter = &promoter_;
    stack_.promotions = counters_;
  }
  uint64_t promoted() { return Counted("promoted"); }
  uint64_t dropped() { return Counted("dropped"); }
  uint64_t repeated() { return Counted("repeated"); }
  // Rows of new keys.
  PromotionBatch Batch(size_t rows) {
    const std::vector<Key> keys = KeyRange(next_key_, rows);
    next_key_ += static_cast<Key>(rows);
    return {volatile_, keys, std::vector<std::byte>(rows * kRowBytes), nullptr, counters_};
  }

  Key next_key_ = 1'000;
  PromotionCounters counters_{metrics_.FindCounter("promoted", {}), metrics_.FindCounter("dropped", {}),
                              metrics_.FindCounter("repeated", {})};
  Promoter promoter_;
};

TEST_F(PromotionTest, OnlyRowsThatTheLowerTierFoundGoUp) {
  persistent_->Put(1, 2);
  persistent_->Put(5, 2);
  const std::vector<Key> keys = {0, 1, 2, 5, 6, 1};
  ASSERT_OK(Fetch(stack_, keys).status);
  promoter_.Drain();
  EXPECT_EQ(volatile_->rows(), (std::map<Key, std::vector<float>>{{1, Row(1, 2, kWidth)}, {5, Row(5, 2, kWidth)}}));
  EXPECT_EQ(promoted(), 2u);
  EXPECT_EQ(repeated(), 1u);  // key 1 was asked twice
  EXPECT_EQ(dropped(), 0u);
  const Rows again = Fetch(stack_, keys);
  EXPECT_EQ(again.report.rows_from_volatile, 3u);
  EXPECT_EQ(again.report.rows_from_default, 3u);
}

TEST_F(PromotionTest, ARowThatWaitsInTheQueueIsNotQueuedAgain) {
  for (Key key = 0; key < 50; ++key) persistent_->Put(key, 2);
  volatile_->Hold(true);  // a slow store
  ASSERT_OK(Fetch(stack_, KeyRange(0, 10)).status);
  volatile_->WaitForUpsert();
  for (int i = 0; i < 20; ++i) ASSERT_OK(Fetch(stack_, KeyRange(0, 50)).status);
  EXPECT_EQ(repeated(), 20u * 50 - 40);
  volatile_->Hold(false);
  promoter_.Drain();
  EXPECT_EQ(promoted(), 50u);
  EXPECT_EQ(volatile_->rows().size(), 50u);
  promoter_.Enqueue({volatile_, {3}, std::vector<std::byte>(kRowBytes), nullptr, counters_});  // forgotten by now
  promoter_.Drain();
  EXPECT_EQ(promoted(), 51u);
}

TEST_F(PromotionTest, AStoreThatDoesNotAnswerIsNotWaitedFor) {
  CircuitBreaker breaker(
      "volatile", "fake", metrics_,
      {.failures_to_open = 2, .first_wait = std::chrono::hours(1), .longest_wait = std::chrono::hours(1)});
  volatile_->Fail(Unavailable("gone"));
  const auto send = [&] {
    PromotionBatch batch = Batch(3);
    batch.breaker = &breaker;
    promoter_.Enqueue(std::move(batch));
    promoter_.Drain();
  };
  send();
  send();
  EXPECT_FALSE(breaker.closed());
  const int tried = volatile_->upserts();
  send();
  EXPECT_EQ(volatile_->upserts(), tried);
  EXPECT_EQ(dropped(), 9u);
}

TEST_F(PromotionTest, ARowThatArrivedMeanwhileIsNotOverwritten) {
  persistent_->Put(1, 2);
  volatile_->Hold(true);
  ASSERT_OK(Fetch(stack_, {1}).status);
  volatile_->WaitForUpsert();  // the promotion is on its way with the old row
  volatile_->Put(1, 3);
  volatile_->Hold(false);
  promoter_.Drain();
  EXPECT_EQ(volatile_->rows().at(1), Row(1, 3, kWidth));
}

TEST_F(PromotionTest, AFullQueueDropsAndCounts) {
  constexpr size_t kBatchRows = 100'000;
  volatile_->Hold(true);
  promoter_.Enqueue(Batch(1));
  volatile_->WaitForUpsert();  // from here on nothing leaves the queue
  const size_t batch_bytes = kBatchRows * (kRowBytes + sizeof(Key));
  const size_t fits = (size_t{64} << 20) / batch_bytes;
  for (size_t i = 0; i < fits + 3; ++i) promoter_.Enqueue(Batch(kBatchRows));
  EXPECT_EQ(dropped(), 3 * kBatchRows);
  volatile_->Hold(false);
  promoter_.Drain();
  EXPECT_EQ(promoted(), fits * kBatchRows + 1);
  promoter_.Enqueue(Batch(5));  // there is room again
  promoter_.Drain();
  EXPECT_EQ(promoted(), fits * kBatchRows + 6);
}

TEST_F(PromotionTest, AFailedWriteIsCountedAsDropped) {
  volatile_->Fail(FailedPrecondition("closed"));
  promoter_.Enqueue(Batch(4));
  promoter_.Drain();
  EXPECT_EQ(promoted(), 0u);
  EXPECT_EQ(dropped(), 4u);
}

TEST_F(PromotionTest, StopDropsWhatIsQueuedAndWhatComesLater) {
  volatile_->Hold(true);
  promoter_.Enqueue(Batch(1));
  volatile_->WaitForUpsert();
  promoter_.Enqueue(Batch(2));
  std::thread stopper([&] { promoter_.Stop(); });
  WaitUntil([&] { return dropped() == 2; }, "the queue to be dropped");
  promoter_.Enqueue(Batch(4));
  EXPECT_EQ(dropped(), 6u);
  volatile_->Hold(false);
  stopper.join();
  promoter_.Stop();
  promoter_.Drain();
  EXPECT_EQ(promoted(), 1u);
}

}  // namespace
}  // namespace hps::testing
