// The walk down the tiers over tables that record what they are asked, and the promotion upwards.

#include "cc/core/tier_stack.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <map>

#include "cc/tests/core_fixture.h"

namespace hps::testing {
namespace {

constexpr uint32_t kWidth = 4;
constexpr size_t kRowBytes = kWidth * sizeof(float);

// A map with a lock that remembers which keys were asked and may fail or wait.
class FakeTable final : public Table {
 public:
  const TableSpec& spec() const override { return spec_; }

  Status Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const override {
    std::lock_guard lock(mutex_);
    if (!failure_.ok()) return failure_;
    deadline_ = request.deadline;
    const auto visit = [&](uint32_t position) {
      asked_.push_back(request.keys[position]);
      const auto found = rows_.find(request.keys[position]);
      if (found == rows_.end()) return misses->push_back(position);
      std::memcpy(request.rows.data + position * request.rows.stride_bytes, found->second.data(), kRowBytes);
    };
    if (request.positions) {
      EXPECT_TRUE(std::is_sorted(request.positions->begin(), request.positions->end()));
      for (uint32_t position : *request.positions) visit(position);
    } else {
      for (uint32_t i = 0; i < request.keys.size(); ++i) visit(i);
    }
    return OkStatus();
  }
  Status Locate(std::span<const Key>, std::span<const std::byte*>) const override { return Unimplemented("fake"); }
  Status Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) override {
    std::unique_lock lock(mutex_);
    ++upserts_begun_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return !hold_; });
    if (!failure_.ok()) return failure_;
    for (size_t i = 0; i < keys.size(); ++i) {
      const auto* row = reinterpret_cast<const float*>(rows.data + i * rows.stride_bytes);
      if (options.only_absent && rows_.contains(keys[i])) continue;
      rows_[keys[i]] = std::vector<float>(row, row + kWidth);
    }
    return OkStatus();
  }
  Status Erase(std::span<const Key>, uint64_t*) override { return Unimplemented("fake"); }
  Status Scan(const ScanVisitor&) const override { return Unimplemented("fake"); }
  Result<TableStats> Stats() const override { return TableStats(); }

  void Put(Key key, uint32_t version) { rows_[key] = Row(key, version, kWidth); }
  void Fail(Status status) { failure_ = std::move(status); }
  void Hold(bool hold) {
    std::lock_guard lock(mutex_);
    hold_ = hold;
    changed_.notify_all();
  }
  void WaitForUpsert() {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::minutes(1), [&] { return upserts_begun_ > 0; }));
  }
  std::map<Key, std::vector<float>> rows() const {
    std::lock_guard lock(mutex_);
    return rows_;
  }
  std::vector<Key> asked() const { return asked_; }
  Deadline deadline() const { return deadline_; }

 private:
  TableSpec spec_{.name = "fake", .row_bytes = kRowBytes};
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<Key, std::vector<float>> rows_;
  mutable std::vector<Key> asked_;
  mutable Deadline deadline_{};
  Status failure_;
  bool hold_ = false;
  int upserts_begun_ = 0;
};

class TierStackTest : public ::testing::Test {
 protected:
  TierStackTest() { stack_ = MakeStack(volatile_, persistent_); }

  TierStack MakeStack(std::shared_ptr<FakeTable> upper, std::shared_ptr<FakeTable> lower) {
    TierStack stack;
    stack.volatile_table = std::move(upper);
    stack.persistent_table = std::move(lower);
    stack.default_row.assign(kWidth, kDefault);
    stack.metrics = {metrics_.FindCounter("lookups", {}), metrics_.FindCounter("keys", {}),
                     metrics_.FindCounter("volatile", {}), metrics_.FindCounter("persistent", {}),
                     metrics_.FindCounter("default", {})};
    return stack;
  }

  Rows Fetch(const TierStack& stack, const std::vector<Key>& keys, Executor& executor = InlineExecutor(),
             Deadline deadline = kNoDeadline) {
    Rows rows;
    rows.width = kWidth;
    rows.values.assign(keys.size() * kWidth, 12345.0f);
    rows.found.assign(keys.size(), 2);
    TierWalk walk;
    walk.stack = &stack;
    walk.keys = keys;
    walk.rows = reinterpret_cast<std::byte*>(rows.values.data());
    walk.found = reinterpret_cast<bool*>(rows.found.data());
    rows.status = FetchRows(std::span(&walk, 1), executor, executor, deadline, &rows.report);
    return rows;
  }

  MetricsRegistry metrics_;
  std::shared_ptr<FakeTable> volatile_ = std::make_shared<FakeTable>();
  std::shared_ptr<FakeTable> persistent_ = std::make_shared<FakeTable>();
  TierStack stack_;
};

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
  EXPECT_EQ(metrics_.FindCounter("volatile", {})->value(), 3u);
  EXPECT_EQ(metrics_.FindCounter("persistent", {})->value(), 2u);
  EXPECT_EQ(metrics_.FindCounter("default", {})->value(), 2u);
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
  EXPECT_EQ(metrics_.FindCounter("default", {})->value(), 0u);
}

TEST_F(TierStackTest, TheDeadlineReachesEachTier) {
  const Deadline deadline = std::chrono::steady_clock::now() + std::chrono::hours(1);
  ASSERT_OK(Fetch(stack_, {1}, InlineExecutor(), deadline).status);
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
  ASSERT_OK(FetchRows(walks, *pool, *pool, kNoDeadline, &report));
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

// ---- promotion --------------------------------------------------------------------------------------------------

class PromotionTest : public TierStackTest {
 protected:
  PromotionTest() { stack_.promoter = &promoter_; }
  uint64_t promoted() { return metrics_.FindCounter("promoted", {})->value(); }
  uint64_t dropped() { return metrics_.FindCounter("dropped", {})->value(); }
  PromotionBatch Batch(size_t rows) {
    return {volatile_, std::vector<Key>(rows, 1), std::vector<std::byte>(rows * kRowBytes)};
  }

  Promoter promoter_{metrics_.FindCounter("promoted", {}), metrics_.FindCounter("dropped", {})};
};

TEST_F(PromotionTest, OnlyRowsThatTheLowerTierFoundGoUp) {
  persistent_->Put(1, 2);
  persistent_->Put(5, 2);
  const std::vector<Key> keys = {0, 1, 2, 5, 6, 1};
  ASSERT_OK(Fetch(stack_, keys).status);
  promoter_.Drain();
  EXPECT_EQ(volatile_->rows(), (std::map<Key, std::vector<float>>{{1, Row(1, 2, kWidth)}, {5, Row(5, 2, kWidth)}}));
  EXPECT_EQ(promoted(), 3u);  // key 1 was asked twice
  EXPECT_EQ(dropped(), 0u);
  const Rows again = Fetch(stack_, keys);
  EXPECT_EQ(again.report.rows_from_volatile, 3u);
  EXPECT_EQ(again.report.rows_from_default, 3u);
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
