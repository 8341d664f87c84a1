// Fetches of one key at one time: asked once, given to all; failures, deadlines and cancellation stay one's own.

#include "cc/core/single_flight.h"

#include <atomic>
#include <thread>

#include "cc/tests/fake_table.h"

namespace hps::testing {
namespace {

class SingleFlightTest : public ::testing::Test {
 protected:
  struct Fetched {
    Status status;
    std::vector<float> rows;
    std::vector<uint32_t> misses;
    std::vector<float> row(size_t i) const {
      return {rows.begin() + static_cast<ptrdiff_t>(i * kWidth),
              rows.begin() + static_cast<ptrdiff_t>((i + 1) * kWidth)};
    }
  };
  Fetched Fetch(const std::vector<Key>& keys, Deadline deadline = kNoDeadline,
                const std::atomic<bool>* cancelled = nullptr) {
    Fetched fetched;
    fetched.rows.assign(keys.size() * kWidth, 12345.0f);
    FetchRequest request;
    request.keys = keys;
    request.rows = {reinterpret_cast<std::byte*>(fetched.rows.data()), kRowBytes};
    request.deadline = deadline;
    request.cancelled = cancelled;
    fetched.status = table_.Fetch(request, &fetched.misses);
    return fetched;
  }
  uint64_t waited() { return waited_.value(); }

  std::shared_ptr<FakeTable> slow_ = std::make_shared<FakeTable>();
  Counter waited_;
  SingleFlightTable table_{slow_, &waited_, std::chrono::nanoseconds(0)};
};

TEST_F(SingleFlightTest, OneKeyIsAskedOnceWhileItIsOnItsWay) {
  constexpr int kThreads = 16;
  slow_->Put(7, 3);
  slow_->Hang(true);
  std::vector<Fetched> fetched(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] { fetched[i] = Fetch({7, 8}); });
  }
  WaitUntil([&] { return waited() == 2 * (kThreads - 1); }, "the waiters");
  EXPECT_EQ(slow_->fetches(), 1);
  slow_->Hang(false);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(slow_->fetches(), 1);
  for (const Fetched& each : fetched) {
    ASSERT_OK(each.status);
    EXPECT_EQ(each.row(0), Row(7, 3, kWidth));
    EXPECT_EQ(each.misses, (std::vector<uint32_t>{1}));
    EXPECT_EQ(each.row(1), std::vector<float>(kWidth, 12345.0f));
  }
  ASSERT_OK(Fetch({7}).status);  // it has landed: asked anew
  EXPECT_EQ(slow_->fetches(), 2);
}

// What was read before a write is not given to who asks after it.
TEST_F(SingleFlightTest, AWriteEndsTheSharingOfItsKeys) {
  slow_->Put(7, 1);
  slow_->Put(8, 1);
  slow_->Hang(true);
  std::vector<Fetched> fetched(3);
  std::thread before([&] { fetched[0] = Fetch({7, 8}); });
  slow_->WaitForFetches(1);
  const std::vector<float> row = Row(7, 2, kWidth);
  ASSERT_OK(table_.Upsert(std::vector<Key>{7}, {reinterpret_cast<const std::byte*>(row.data()), kRowBytes}, {}));
  std::thread after([&] { fetched[1] = Fetch({7}); });
  slow_->WaitForFetches(2);  // its own
  EXPECT_EQ(waited(), 0u);
  std::thread other([&] { fetched[2] = Fetch({8}); });
  WaitUntil([&] { return waited() == 1; }, "the waiter for the other key");
  slow_->Hang(false);
  for (std::thread* thread : {&before, &after, &other}) thread->join();
  for (const Fetched& each : fetched) ASSERT_OK(each.status);
  EXPECT_EQ(fetched[1].row(0), row);
  EXPECT_EQ(slow_->fetches(), 2);
  ExpectError(table_.Erase(std::vector<Key>{7}, nullptr), StatusCode::kUnimplemented);
}

TEST_F(SingleFlightTest, AFetchReadsWhatNobodyElseReadsAndTakesTheRestFromOthers) {
  for (Key key = 0; key < 10; ++key) slow_->Put(key, 1);
  slow_->Hang(true);
  std::vector<Fetched> fetched(2);
  std::thread first([&] { fetched[0] = Fetch({1, 2, 3, 20}); });
  slow_->WaitForFetches(1);
  std::thread second([&] { fetched[1] = Fetch({4, 3, 21, 20, 2, 4, 3}); });
  slow_->WaitForFetches(2);
  slow_->Hang(false);
  first.join();
  second.join();
  ASSERT_OK(fetched[0].status);
  ASSERT_OK(fetched[1].status);
  EXPECT_EQ(fetched[0].misses, (std::vector<uint32_t>{3}));
  EXPECT_EQ(fetched[1].misses, (std::vector<uint32_t>{2, 3}));
  const std::vector<Key> keys = {4, 3, 21, 20, 2, 4, 3};
  for (size_t i : {0, 1, 4, 5, 6}) EXPECT_EQ(fetched[1].row(i), Row(keys[i], 1, kWidth));
  std::vector<Key> asked = slow_->asked();
  std::sort(asked.begin(), asked.end());
  EXPECT_EQ(asked, (std::vector<Key>{1, 2, 3, 4, 4, 20, 21}));
  EXPECT_EQ(waited(), 4u);  // 3, 20, 2, 3
}

TEST_F(SingleFlightTest, AFailureIsNotHandedOn) {
  slow_->Put(7, 3);
  slow_->Hang(true);
  std::atomic<bool> cancelled{false};
  std::thread leader([&] { ExpectError(Fetch({7}, kNoDeadline, &cancelled).status, StatusCode::kCancelled); });
  slow_->WaitForFetches(1);
  Fetched follower;
  std::thread waiting([&] { follower = Fetch({7}); });
  WaitUntil([&] { return waited() == 1; }, "the waiter");
  cancelled = true;
  leader.join();
  slow_->WaitForFetches(2);  // the waiter asks for itself
  slow_->Hang(false);
  waiting.join();
  ASSERT_OK(follower.status);
  EXPECT_EQ(follower.row(0), Row(7, 3, kWidth));
}

TEST_F(SingleFlightTest, AWaitersEndHurtsNobody) {
  slow_->Put(7, 3);
  slow_->Hang(true);
  Fetched leader;
  std::thread flight([&] { leader = Fetch({7}); });
  slow_->WaitForFetches(1);
  const Deadline soon = std::chrono::steady_clock::now() + std::chrono::milliseconds(10);
  ExpectError(Fetch({7}, soon).status, StatusCode::kDeadlineExceeded);
  const std::atomic<bool> cancelled{true};
  ExpectError(Fetch({7}, kNoDeadline, &cancelled).status, StatusCode::kCancelled);
  Fetched patient;
  std::thread waiting([&] { patient = Fetch({7}); });
  WaitUntil([&] { return waited() == 3; }, "the waiter");
  slow_->Hang(false);
  flight.join();
  waiting.join();
  for (const Fetched* each : {&leader, &patient}) {
    ASSERT_OK(each->status);
    EXPECT_EQ(each->row(0), Row(7, 3, kWidth));
  }
  EXPECT_EQ(slow_->fetches(), 1);
}

TEST_F(SingleFlightTest, LargeFetchesStandAlone) {
  const std::vector<Key> keys = KeyRange(0, SingleFlightTable::kMostKeys + 1);
  for (Key key : keys) slow_->Put(key, 1);
  slow_->Hang(true);
  std::thread large([&] { ASSERT_OK(Fetch(keys).status); });
  slow_->WaitForFetches(1);
  std::thread small([&] { ASSERT_OK(Fetch({5}).status); });
  slow_->WaitForFetches(2);
  slow_->Hang(false);
  large.join();
  small.join();
  EXPECT_EQ(waited(), 0u);
}

TEST_F(SingleFlightTest, QuickTablesAreNotShared) {
  SingleFlightTable quick(slow_, &waited_, std::chrono::hours(1));
  slow_->Hang(true);
  const Key key = 7;
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      std::vector<std::byte> row(kRowBytes);
      std::vector<uint32_t> misses;
      ASSERT_OK(quick.Fetch({.keys = std::span(&key, 1), .rows = {row.data(), kRowBytes}}, &misses));
    });
  }
  slow_->WaitForFetches(2);
  slow_->Hang(false);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(waited(), 0u);
}

TEST_F(SingleFlightTest, ManyThreadsWithOverlappingKeysGetTheirRows) {
  constexpr Key kKeys = 400;
  for (Key key = 0; key < kKeys; key += 2) slow_->Put(key, 1);
  std::atomic<bool> give_up{false};
  std::vector<std::thread> threads;
  for (uint64_t thread = 0; thread < 6; ++thread) {
    threads.emplace_back([&, thread] {
      for (uint64_t round = 0; round < 300; ++round) {
        std::vector<Key> keys(1 + (round * 7 + thread) % 100);
        for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<Key>((round * 13 + i * i) % kKeys);
        const bool hasty = round % 5 == thread % 5;
        const Fetched fetched =
            Fetch(keys, hasty ? std::chrono::steady_clock::now() : kNoDeadline, round % 3 == 0 ? &give_up : nullptr);
        if (!fetched.status.ok()) {
          ASSERT_TRUE(hasty) << fetched.status.ToString();
          continue;
        }
        size_t miss = 0;
        for (size_t i = 0; i < keys.size(); ++i) {
          if (keys[i] % 2 == 0) {
            ASSERT_EQ(fetched.row(i), Row(keys[i], 1, kWidth));
          } else {
            ASSERT_LT(miss, fetched.misses.size());
            ASSERT_EQ(fetched.misses[miss++], i);
          }
        }
        ASSERT_EQ(miss, fetched.misses.size());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace hps::testing
