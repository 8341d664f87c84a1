// What the bounded hash map promises beyond the conformance suite: refusals, partitions of many steps, endless churn in
// constant memory, what use costs, and pieces of work.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cc/storage/hash_map_store.h"
#include "cc/storage/row_marks.h"
#include "cc/tests/row_pattern.h"
#include "hps/epoch.h"

namespace hps {
namespace {

using testing::RowBlock;
using testing::RowVersion;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

std::unique_ptr<TableStore> Open(const HashMapOptions& options) {
  auto store = OpenHashMapStore(options);
  EXPECT_TRUE(store.ok()) << store.status().ToString();
  return std::move(store).value();
}

std::shared_ptr<Table> Create(TableStore& store, size_t row_bytes, uint64_t expected_rows = 0) {
  auto table = store.CreateTable({.name = "hps_et.m.t", .row_bytes = row_bytes, .expected_rows = expected_rows});
  EXPECT_TRUE(table.ok()) << table.status().ToString();
  return std::move(table).value();
}

std::vector<Key> Keys(size_t first, size_t count, bool dense) {
  std::vector<Key> keys(count);
  for (size_t i = 0; i < count; ++i) {
    keys[i] = static_cast<Key>(dense ? first + i : ((first + i) * 0x9E3779B97F4A7C15ull) | (1ull << 63));
  }
  return keys;
}

void Put(Table& table, std::span<const Key> keys, uint32_t version) {
  const RowBlock rows = RowBlock::Of(keys, version, table.spec().row_bytes);
  const Status status = table.Upsert(keys, rows.source());
  ASSERT_TRUE(status.ok()) << status.ToString();
}

size_t CountPresent(const Table& table, std::span<const Key> keys) {
  RowBlock rows(keys.size(), table.spec().row_bytes);
  std::vector<uint32_t> misses;
  EXPECT_TRUE(table.Fetch({.keys = keys, .rows = rows.buffer()}, &misses).ok());
  return keys.size() - misses.size();
}

uint64_t StatusLineBytes(const std::string& name) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(name, 0) == 0) return std::stoull(line.substr(name.size())) * 1024;
  }
  return 0;
}

TEST(HashMapOverflowTest, OptionsOutOfRangeAreRefused) {
  const auto code = [](const HashMapOptions& options) { return OpenHashMapStore(options).status().code(); };
  EXPECT_EQ(code({.overflow = {.margin = 0}}), StatusCode::kInvalidArgument);
  for (const double target : {0.0, 1.0, -0.5, 2.0, std::nan("")}) {
    EXPECT_EQ(code({.overflow = {.margin = 10, .resolution_target = target}}), StatusCode::kInvalidArgument) << target;
  }
  EXPECT_EQ(code({.max_get_batch_size = 0}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.max_set_batch_size = 0}), StatusCode::kInvalidArgument);
}

TEST(HashMapOverflowTest, WithoutAMarginNothingIsBounded) {
  const auto store = Open({});
  EXPECT_FALSE(store->capabilities().bounded);
  EXPECT_EQ(store->capabilities().capacity_rows, UINT64_MAX);
}

TEST(CapacityRowsTest, LiesBelowTheMarginByWhatChanceMayAdd) {
  EXPECT_EQ(CapacityRows({}, 16), UINT64_MAX);
  EXPECT_EQ(CapacityRows({.margin = 1'000'000}, 1), 1'000'000u);
  for (const uint64_t margin : {uint64_t{100}, uint64_t{10'000}, uint64_t{1'000'000}}) {
    const double rows = static_cast<double>(CapacityRows({.margin = margin}, 16)) / 16;
    EXPECT_NEAR(rows + 5 * std::sqrt(rows), static_cast<double>(margin), 1);
  }
  EXPECT_EQ(CapacityRows({.margin = 1}, 4), 1u);
  EXPECT_EQ(CapacityRows({.margin = UINT64_MAX - 1}, 4096), uint64_t{1} << 63);
  EXPECT_EQ(CapacityRows({.margin = 10}, 4, 16), 1u) << "blocks that are larger than a partition";
}

class HashMapOverflowKeysTest : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Keys, HashMapOverflowKeysTest, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Dense" : "Hashed"; });

TEST_P(HashMapOverflowKeysTest, LargePartitionsAreShrunkInStepsByAgeAllTheSame) {
  constexpr size_t kMargin = 200'000;  // 13 steps
  for (const OverflowPolicy policy : {OverflowPolicy::kEvictOldest, OverflowPolicy::kEvictLeastUsed}) {
    const auto store = Open({.num_partitions = 1, .overflow = {.margin = kMargin, .policy = policy}});
    const auto table = Create(*store, 8, GetParam() ? kMargin : 0);
    const std::vector<Key> keys = Keys(0, kMargin, GetParam());
    for (size_t first = 0; first < kMargin; first += 1'000) Put(*table, {keys.data() + first, 1'000}, 1);
    const std::span<const Key> old(keys.data(), kMargin / 5);
    const std::span<const Key> young(keys.data() + kMargin / 5, kMargin / 5 * 4);
    CountPresent(*table, young);  // a use
    Put(*table, Keys(kMargin + 7, 1, GetParam()), 1);
    EXPECT_EQ(table->Stats()->rows, kMargin / 5 * 4);
    EXPECT_LE(CountPresent(*table, old), old.size() * 3 / 100);
    EXPECT_GE(CountPresent(*table, young), young.size() * 99 / 100);
  }
}

TEST_P(HashMapOverflowKeysTest, EndlessChurnStaysInItsMemory) {
  constexpr size_t kMargin = 10'000;
  constexpr size_t kRowBytes = 16;
  for (const OverflowPolicy policy :
       {OverflowPolicy::kEvictOldest, OverflowPolicy::kEvictLeastUsed, OverflowPolicy::kEvictRandom}) {
    const auto store = Open({.num_partitions = 2, .overflow = {.margin = kMargin, .policy = policy}});
    const auto table = Create(*store, kRowBytes, GetParam() ? 10 * kMargin : 0);
    size_t next = 0;
    uint64_t peak = 0;
    const auto churn = [&](size_t margins) {
      for (const size_t end = next + margins * kMargin; next < end; next += 500) {
        Put(*table, Keys(next, 500, false), 1);
        if (GetParam()) Put(*table, Keys(next % (4 * kMargin), 100, true), 1);
        peak = std::max(peak, table->Stats()->memory_bytes);
      }
    };
    churn(6);
    const uint64_t early = std::exchange(peak, 0);
    churn(20);
    EXPECT_LE(peak, early + early / 20);
    EXPECT_LE(static_cast<double>(peak), 2 * kMargin * (kRowBytes + 4 + (GetParam() ? 4 : 0) + 16 / 0.8) * 1.15);
    const TableStats stats = *table->Stats();
    EXPECT_LE(stats.rows, 2 * kMargin);
    EXPECT_GE(stats.rows, 2 * kMargin * 8 / 10);
  }
}

TEST(HashMapOverflowTest, AnEmptyBoundedTableCostsAFewKilobytes) {
  const auto store = Open({.num_partitions = 16, .overflow = {.margin = 10'000'000}});
  EXPECT_LT(Create(*store, 512, 100'000'000)->Stats()->memory_bytes, 12'000u);
}

// The bound of the documentation plus the mark, at its peak, as the kernel counts it.
TEST_P(HashMapOverflowKeysTest, MemoryStaysWithinItsBound) {
  if (kSanitized) GTEST_SKIP() << "shadow memory counts too";
  constexpr size_t kRows = 320'000;
  constexpr size_t kRowBytes = 64;
  constexpr size_t kBatch = 10'000;
  const std::pair<OverflowPolicy, size_t> cases[] = {
      {OverflowPolicy::kEvictOldest, 4}, {OverflowPolicy::kEvictLeastUsed, 1}, {OverflowPolicy::kEvictRandom, 0}};
  for (const auto& [policy, mark_bytes] : cases) {
    const RowBlock rows(kBatch, kRowBytes);
    std::vector<Key> keys = Keys(0, kBatch, GetParam());
    const auto store = Open({.num_partitions = 16, .overflow = {.margin = kRows / 16, .policy = policy}});
    const uint64_t before = StatusLineBytes("RssAnon:");
    const auto table = Create(*store, kRowBytes, kRows);
    uint64_t peak = 0;
    for (size_t first = 0; first < 5 * kRows; first += kBatch) {
      for (size_t i = 0; i < kBatch; ++i)
        keys[i] = Keys(GetParam() ? (first + i) * 7 % kRows : first + i, 1, GetParam())[0];
      ASSERT_TRUE(table->Upsert(keys, rows.source()).ok());
      peak = std::max(peak, StatusLineBytes("RssAnon:") - before);
    }
    EXPECT_LE(static_cast<double>(peak), kRows * (kRowBytes + static_cast<double>(mark_bytes) + 16 / 0.8) * 1.1);
    EXPECT_GE(static_cast<double>(table->Stats()->memory_bytes), 0.9 * static_cast<double>(peak));
  }
}

TEST_P(HashMapOverflowKeysTest, RowsUnderAGuardOutliveTheirEviction) {
  const auto store = Open({.num_partitions = 1, .overflow = {.margin = 1'000}});
  const auto table = Create(*store, 64, GetParam() ? 1'000 : 0);
  const std::vector<Key> keys = Keys(0, 1'000, GetParam());
  Put(*table, keys, 1);
  std::vector<const std::byte*> addresses(keys.size());
  uint64_t held;
  {
    const EpochGuard guard;
    ASSERT_TRUE(table->Locate(keys, addresses).ok());
    for (size_t first = 1'000; first < 60'000; first += 500) Put(*table, Keys(first, 500, false), 1);
    EXPECT_EQ(CountPresent(*table, keys), 0u);
    for (size_t i = 0; i < keys.size(); ++i) ASSERT_EQ(RowVersion(keys[i], {addresses[i], 64}), 1u);
    EXPECT_LE(table->Stats()->rows, 1'000u);
    held = table->Stats()->memory_bytes;
  }
  for (size_t first = 60'000; first < 150'000; first += 500) Put(*table, Keys(first, 500, false), 1);
  EXPECT_LE(table->Stats()->memory_bytes, held + held / 10) << "nothing is used again after the guard has ended";
}

// Readers look at keys whose slots change hands all the time, in arrays that are replaced all the time.
TEST(HashMapOverflowTest, ReadersOfASmallBusyTableGetTheirOwnRowsOrNone) {
  const auto store = Open({.num_partitions = 1, .overflow = {.margin = 60, .resolution_target = 0.5}});
  const auto table = Create(*store, 16);
  const std::vector<Key> keys = Keys(0, 400, false);
  std::atomic<bool> stop{false};
  std::atomic<int> reads{0};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 2; ++reader) {
    readers.emplace_back([&] {
      RowBlock rows(keys.size(), 16);
      while (!stop && !HasFailure()) {
        std::vector<uint32_t> misses;
        EXPECT_TRUE(table->Fetch({.keys = keys, .rows = rows.buffer()}, &misses).ok());
        size_t miss = 0;
        for (size_t i = 0; i < keys.size(); ++i) {
          if (miss < misses.size() && misses[miss] == i) {
            ++miss;
          } else if (!RowVersion(keys[i], rows.row(i))) {
            ADD_FAILURE() << "foreign row for key " << keys[i];
          }
        }
        ++reads;
      }
    });
  }
  std::mt19937 random(1);
  for (uint32_t round = 1; (round < 20'000 || reads < 50) && !HasFailure(); ++round) {
    const std::vector<Key> key = {keys[random() % keys.size()]};
    Put(*table, key, round);
    if (round % 5 == 0) ASSERT_TRUE(table->Erase(key).ok());
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
}

// What use costs -----------------------------------------------------------------------------------------------------

TEST(UseCountTest, IsExactForSmallNumbersAndRightOnAverageForLargeOnes) {
  uint64_t random = 1;
  const auto count_of = [&](int uses) {
    uint8_t count = 0;
    for (int i = 0; i < uses; ++i) count += UseCount::Moves(count, &random);
    return count;
  };
  for (int uses = 0; uses <= 16; ++uses) EXPECT_EQ(count_of(uses), uses);
  for (const int uses : {100, 3'000, 50'000}) {
    double sum = 0;
    for (int i = 0; i < 50; ++i) sum += UseCount::Uses(count_of(uses));
    EXPECT_NEAR(sum / 50 / uses, 1.0, 0.15) << uses;
  }
  for (int count = 0; count < 256; ++count) {
    const double uses = UseCount::Uses(static_cast<uint8_t>(count));
    const double halved = UseCount::Uses(UseCount::Halved(static_cast<uint8_t>(count)));
    EXPECT_NEAR(halved, uses / 2, 0.5) << count;
  }
  EXPECT_FALSE(UseCount::Moves(255, &random));
}

TEST(MarkClockTest, MovesWithWritesAndOnceASecondWithReads) {
  MarkClock clock;
  const uint32_t first = clock.Advance(3);
  const uint32_t later = clock.Advance(1);
  EXPECT_EQ(later, first + 3);
  const uint32_t read = clock.Now(100);
  EXPECT_GT(read, later);
  EXPECT_EQ(clock.Now(100), read);
  EXPECT_GT(clock.Now(101), read);
}

// Pieces of work -----------------------------------------------------------------------------------------------------

TEST(HashMapBatchSizeTest, LaterPiecesOfAnUpsertStay) {
  const auto store = Open({.num_partitions = 1, .overflow = {.margin = 1'000}, .max_set_batch_size = 100});
  const auto table = Create(*store, 16);
  const std::vector<Key> keys = Keys(0, 5'000, false);
  Put(*table, keys, 1);
  const uint64_t rows = table->Stats()->rows;
  EXPECT_EQ(CountPresent(*table, std::span(keys).last(rows / 100 * 100 - 100)), rows / 100 * 100 - 100)
      << "what was written first leaves first";
}

TEST(HashMapBatchSizeTest, DeadlineAndCancellationEndAFetchBetweenPieces) {
  const auto store = Open({.max_get_batch_size = 100});
  const auto table = Create(*store, 4);
  const std::vector<Key> keys = Keys(0, 4'000'000, false);  // far more than a millisecond's work
  RowBlock rows(keys.size(), 4);
  std::vector<uint32_t> misses;
  misses.reserve(keys.size());
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(1);
  const Status late = table->Fetch({.keys = keys, .rows = rows.buffer(), .deadline = deadline}, &misses);
  EXPECT_EQ(late.code(), StatusCode::kDeadlineExceeded) << late.ToString();
  EXPECT_LT(misses.size(), keys.size());

  std::atomic<bool> cancelled{true};
  const Status gone = table->Fetch({.keys = keys, .rows = rows.buffer(), .cancelled = &cancelled}, &misses);
  EXPECT_EQ(gone.code(), StatusCode::kCancelled) << gone.ToString();
}

TEST(HashMapBatchSizeTest, PiecesOfAFetchAnswerLikeOne) {
  const auto store = Open({.max_get_batch_size = 7});
  const auto table = Create(*store, 16);
  const std::vector<Key> keys = Keys(0, 1'000, false);
  Put(*table, std::span(keys).first(500), 1);
  RowBlock rows(keys.size(), 16);
  std::vector<uint32_t> misses;
  std::vector<uint32_t> positions;
  for (uint32_t i = 0; i < keys.size(); i += 3) positions.push_back(i);
  ASSERT_TRUE(table->Fetch({.keys = keys, .positions = positions, .rows = rows.buffer()}, &misses).ok());
  std::vector<uint32_t> expected;
  for (const uint32_t i : positions) {
    if (i >= 500) {
      expected.push_back(i);
    } else {
      ASSERT_EQ(RowVersion(keys[i], rows.row(i)), 1u);
    }
  }
  EXPECT_EQ(misses, expected);
}

TEST(HashMapAllocationRateTest, MemoryIsCommittedInStepsOfThatSize) {
  if (kSanitized) GTEST_SKIP() << "shadow memory counts too";
  for (const uint64_t rate : {uint64_t{4} << 20, uint64_t{64} << 20}) {
    const auto store = Open({.num_partitions = 1, .allocation_rate_bytes = rate});
    const auto table = Create(*store, 1024, 1 << 20);    // a GiB of address space
    const uint64_t before = StatusLineBytes("VmData:");  // what may be written, touched or not
    Put(*table, Keys(0, 1, true), 1);
    const uint64_t grown = StatusLineBytes("VmData:") - before;
    EXPECT_GE(grown, rate);
    EXPECT_LE(grown, rate + (2 << 20));
  }
}

}  // namespace
}  // namespace hps
