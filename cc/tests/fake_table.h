// A table for tests of the tiers, and a fixture with a stack of two of them.

#ifndef HPS_TESTS_FAKE_TABLE_H_
#define HPS_TESTS_FAKE_TABLE_H_

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cc/core/tier_stack.h"
#include "cc/tests/core_fixture.h"

namespace hps::testing {

inline constexpr uint32_t kWidth = 4;
inline constexpr size_t kRowBytes = kWidth * sizeof(float);

// A map with a lock that remembers which keys were asked and may fail, wait or hang.
class FakeTable final : public Table {
 public:
  const TableSpec& spec() const override { return spec_; }

  Status Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const override {
    std::unique_lock lock(mutex_);
    ++fetches_begun_;
    changed_.notify_all();
    while (hang_) {
      if (request.cancelled != nullptr && request.cancelled->load()) return Cancelled("fake: the caller gave up");
      if (std::chrono::steady_clock::now() >= request.deadline) return DeadlineExceeded("fake: too slow");
      changed_.wait_for(lock, std::chrono::milliseconds(1));
    }
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

  void Put(Key key, uint32_t version) {
    std::lock_guard lock(mutex_);
    rows_[key] = Row(key, version, kWidth);
  }
  // Every call fails so until told otherwise (OK).
  void Fail(Status status) {
    std::lock_guard lock(mutex_);
    failure_ = std::move(status);
  }
  // Fetches wait for their deadline or cancellation, or for the end of the hanging.
  void Hang(bool hang) {
    std::lock_guard lock(mutex_);
    hang_ = hang;
    changed_.notify_all();
  }
  // Upserts wait.
  void Hold(bool hold) {
    std::lock_guard lock(mutex_);
    hold_ = hold;
    changed_.notify_all();
  }
  void WaitForUpsert() {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::minutes(1), [&] { return upserts_begun_ > 0; }));
  }
  void WaitForFetches(int count) const {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::minutes(1), [&] { return fetches_begun_ >= count; }));
  }
  int fetches() const {
    std::lock_guard lock(mutex_);
    return fetches_begun_;
  }
  int upserts() const {
    std::lock_guard lock(mutex_);
    return upserts_begun_;
  }
  std::map<Key, std::vector<float>> rows() const {
    std::lock_guard lock(mutex_);
    return rows_;
  }
  std::vector<Key> asked() const {
    std::lock_guard lock(mutex_);
    return asked_;
  }
  Deadline deadline() const {
    std::lock_guard lock(mutex_);
    return deadline_;
  }

 private:
  TableSpec spec_{.name = "fake", .row_bytes = kRowBytes};
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::map<Key, std::vector<float>> rows_;
  mutable std::vector<Key> asked_;
  mutable Deadline deadline_{};
  Status failure_;
  bool hold_ = false;
  bool hang_ = false;
  mutable int fetches_begun_ = 0;
  int upserts_begun_ = 0;
};

class TierStackTest : public ::testing::Test {
 protected:
  TierStackTest() { stack_ = MakeStack(volatile_, persistent_); }

  TierStack MakeStack(std::shared_ptr<Table> upper, std::shared_ptr<Table> lower) {
    TierStack stack;
    stack.volatile_tier = MakeTier("volatile", std::move(upper));
    stack.persistent_tier = MakeTier("persistent", std::move(lower));
    stack.default_row.assign(kWidth, kDefault);
    stack.metrics.rows_from_default = metrics_.FindCounter("default", {});
    stack.metrics.rows_unavailable = metrics_.FindCounter("unavailable", {});
    return stack;
  }
  Tier MakeTier(const std::string& name, std::shared_ptr<Table> table) {
    Tier tier;
    tier.table = std::move(table);
    tier.option = name == "volatile" ? "volatile_db" : "persistent_db";
    tier.rows_served = metrics_.FindCounter(name, {});
    tier.rows_skipped = metrics_.FindCounter(name + " skipped", {});
    tier.fetches_failed = metrics_.FindCounter(name + " failed", {});
    tier.fetch_seconds = metrics_.FindHistogram(name + " seconds", {});
    return tier;
  }
  uint64_t Counted(const std::string& name) { return metrics_.FindCounter(name, {})->value(); }

  Rows Fetch(const TierStack& stack, const std::vector<Key>& keys, Executor& executor = InlineExecutor(),
             const LookupLimits& limits = {}) {
    Rows rows;
    rows.width = kWidth;
    rows.values.assign(keys.size() * kWidth, 12345.0f);
    rows.found.assign(keys.size(), 2);
    TierWalk walk;
    walk.stack = &stack;
    walk.keys = keys;
    walk.rows = reinterpret_cast<std::byte*>(rows.values.data());
    walk.found = reinterpret_cast<bool*>(rows.found.data());
    rows.status = FetchRows(std::span(&walk, 1), executor, executor, limits, &rows.report);
    return rows;
  }

  MetricsRegistry metrics_;
  std::shared_ptr<FakeTable> volatile_ = std::make_shared<FakeTable>();
  std::shared_ptr<FakeTable> persistent_ = std::make_shared<FakeTable>();
  TierStack stack_;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_FAKE_TABLE_H_
