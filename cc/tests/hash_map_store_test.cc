// What the hash map store promises beyond the conformance suite: refusals, memory, the dense and the hashed index, and
// slots that are reused only when nobody reads them.

#include "cc/storage/hash_map_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cc/storage/hash_map_index.h"
#include "cc/tests/row_pattern.h"
#include "hps/epoch.h"

namespace hps {
namespace {

using testing::FillRow;
using testing::RowBlock;
using testing::RowVersion;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

std::unique_ptr<TableStore> OpenStore(uint32_t num_partitions = 4, Executor* executor = nullptr) {
  auto store = OpenHashMapStore({.num_partitions = num_partitions, .executor = executor});
  EXPECT_TRUE(store.ok()) << store.status().ToString();
  return std::move(store).value();
}

std::shared_ptr<Table> CreateTable(TableStore& store, size_t row_bytes, uint64_t expected_rows = 0) {
  auto table = store.CreateTable({.name = "hps_et.m.t", .row_bytes = row_bytes, .expected_rows = expected_rows});
  EXPECT_TRUE(table.ok()) << table.status().ToString();
  return std::move(table).value();
}

// 0, 1, ... for the dense index; scattered over all 64 bits for the hashed one.
std::vector<Key> Keys(size_t first, size_t count, bool dense) {
  std::vector<Key> keys(count);
  for (size_t i = 0; i < count; ++i) {
    keys[i] = static_cast<Key>(dense ? first + i : ((first + i) * 0x9E3779B97F4A7C15ull) | (1ull << 63));
  }
  return keys;
}

void Put(Table& table, const std::vector<Key>& keys, uint32_t version) {
  const RowBlock rows = RowBlock::Of(keys, version, table.spec().row_bytes);
  const Status status = table.Upsert(keys, rows.source());
  ASSERT_TRUE(status.ok()) << status.ToString();
}

void ExpectVersion(const Table& table, const std::vector<Key>& keys, uint32_t version) {
  RowBlock rows(keys.size(), table.spec().row_bytes);
  std::vector<uint32_t> misses;
  ASSERT_TRUE(table.Fetch({.keys = keys, .rows = rows.buffer()}, &misses).ok());
  ASSERT_TRUE(misses.empty());
  for (size_t i = 0; i < keys.size(); ++i) ASSERT_EQ(RowVersion(keys[i], rows.row(i)), version) << keys[i];
}

// Refusals -----------------------------------------------------------------------------------------------------------

TEST(HashMapStoreTest, OptionsOutOfRangeAreRefused) {
  EXPECT_EQ(OpenHashMapStore({.num_partitions = 0}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(OpenHashMapStore({.num_partitions = 4097}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(OpenHashMapStore({.allocation_rate_bytes = 0}).status().code(), StatusCode::kInvalidArgument);
}

TEST(HashMapStoreTest, TablesOutOfRangeAreRefusedAndNotKept) {
  const auto store = OpenStore();
  const size_t too_wide = (size_t{1} << 30) + 1;
  EXPECT_EQ(store->CreateTable({.name = "t", .row_bytes = too_wide}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(store->CreateTable({.name = "t", .row_bytes = 4, .expected_rows = uint64_t{1} << 32}).status().code(),
            StatusCode::kResourceExhausted);
  EXPECT_TRUE(store->ListTables()->empty());
}

TEST(HashMapStoreTest, RowsBeyondTheAddressSpaceAreRefused) {
  const auto store = OpenStore();
  const size_t row_bytes = size_t{1} << 30;
  const auto table = CreateTable(*store, row_bytes, 1 << 20);  // 2^50 bytes
  const std::vector<Key> keys = {1};
  std::vector<std::byte> row(64);
  const Status status = table->Upsert(keys, {row.data(), row_bytes});  // refused before the row is read
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted) << status.ToString();
  EXPECT_EQ(table->Stats()->rows, 0u);
}

TEST(HashMapStoreTest, SaysWhatItIs) {
  const auto store = OpenStore();
  EXPECT_EQ(store->kind(), "hash_map");
  const StoreCapabilities capabilities = store->capabilities();
  EXPECT_TRUE(capabilities.addressable);
  EXPECT_TRUE(capabilities.writable);
  EXPECT_FALSE(capabilities.persistent);
  EXPECT_FALSE(capabilities.shared);
}

// Dense and hashed keys
// ------------------------------------------------------------------------------------------------

class HashMapKeysTest : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Keys, HashMapKeysTest, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Dense" : "Hashed"; });

TEST_P(HashMapKeysTest, MoreRowsThanExpectedAreHeld) {
  const auto store = OpenStore();
  const auto table = CreateTable(*store, 28, 1'000);
  const std::vector<Key> keys = Keys(0, 20'000, GetParam());
  Put(*table, keys, 1);
  ExpectVersion(*table, keys, 1);
  EXPECT_EQ(table->Stats()->rows, keys.size());
}

TEST_P(HashMapKeysTest, LargeBatchesInParallelKeepTheLastDuplicate) {
  const std::unique_ptr<Executor> executor = NewThreadPool(3);
  const auto store = OpenStore(8, executor.get());
  const auto table = CreateTable(*store, 64, 10'000);
  const std::vector<Key> once = Keys(0, 10'000, GetParam());
  std::vector<Key> keys;
  for (int copy = 0; copy < 3; ++copy) keys.insert(keys.end(), once.begin(), once.end());
  RowBlock rows(keys.size(), 64);
  for (size_t i = 0; i < keys.size(); ++i) FillRow(keys[i], 1 + i / once.size(), rows.row(i));
  ASSERT_TRUE(table->Upsert(keys, rows.source()).ok());
  ExpectVersion(*table, once, 3);
  uint64_t erased = 0;
  ASSERT_TRUE(table->Erase(keys, &erased).ok());
  EXPECT_EQ(erased, once.size());
}

TEST_P(HashMapKeysTest, OutputAroundTheCacheIsTheSame) {
  const auto store = OpenStore();
  const auto table = CreateTable(*store, 256, 1'000);
  const std::vector<Key> once = Keys(0, 1'000, GetParam());
  Put(*table, once, 1);
  std::vector<Key> keys;
  for (size_t i = 0; i < 40'000; ++i) keys.push_back(i % 41 == 0 ? -5 : once[i * 7 % once.size()]);
  for (const size_t stride : {256, 260, 272}) {  // 260: rows that are not aligned
    RowBlock rows(keys.size(), 256, stride);
    std::vector<uint32_t> misses;
    ASSERT_TRUE(table->Fetch({.keys = keys, .rows = rows.buffer()}, &misses).ok());
    EXPECT_EQ(misses.size(), (keys.size() + 40) / 41);
    for (size_t i = 0; i < keys.size(); ++i) {
      if (i % 41 == 0) {
        ASSERT_TRUE(rows.RowUntouched(i));
      } else {
        ASSERT_EQ(RowVersion(keys[i], rows.row(i)), 1u);
      }
      ASSERT_TRUE(rows.GapUntouched(i));
    }
  }
}

TEST_P(HashMapKeysTest, UpdatesReuseTheSlotsOfOldRows) {
  const auto store = OpenStore();
  const auto table = CreateTable(*store, 64, 5'000);
  const std::vector<Key> keys = Keys(0, 5'000, GetParam());
  Put(*table, keys, 1);
  const uint64_t before = table->Stats()->memory_bytes;
  for (uint32_t version = 2; version < 40; ++version) Put(*table, keys, version);
  ExpectVersion(*table, keys, 39);
  EXPECT_LT(table->Stats()->memory_bytes, before + before / 4);
}

TEST_P(HashMapKeysTest, ALongGuardCostsMemoryAndNothingElse) {
  const auto store = OpenStore();
  const auto table = CreateTable(*store, 64, 1'000);
  const std::vector<Key> keys = Keys(0, 1'000, GetParam());
  Put(*table, keys, 1);
  std::vector<const std::byte*> addresses(keys.size());
  uint64_t held;
  {
    const EpochGuard guard;
    ASSERT_TRUE(table->Locate(keys, addresses).ok());
    for (uint32_t version = 2; version < 50; ++version) Put(*table, keys, version);
    held = table->Stats()->memory_bytes;
    EXPECT_GT(held, 40u * 1'000 * 64);
    for (size_t i = 0; i < keys.size(); ++i) ASSERT_EQ(RowVersion(keys[i], {addresses[i], 64}), 1u);
  }
  for (uint32_t version = 50; version < 95; ++version) Put(*table, keys, version);
  EXPECT_LT(table->Stats()->memory_bytes, held + held / 10) << "slots are not reused after the guard has ended";
  ExpectVersion(*table, keys, 94);
}

TEST_P(HashMapKeysTest, ReadersAndWritersOfATableWithAHint) {
  const std::unique_ptr<Executor> executor = NewThreadPool(2);
  const auto store = OpenStore(4, executor.get());
  const auto table = CreateTable(*store, 132, 300);
  const std::vector<Key> keys = Keys(0, 300, GetParam());
  Put(*table, keys, 1);
  std::atomic<bool> stop{false};
  std::atomic<int> reads{0};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 2; ++reader) {
    readers.emplace_back([&, reader] {
      RowBlock rows(keys.size(), 132);
      std::vector<const std::byte*> addresses(keys.size());
      std::vector<uint32_t> misses;
      uint32_t last = 0;
      while (!stop && !HasFailure()) {
        misses.clear();
        const EpochGuard guard;
        if (reader == 0) {
          EXPECT_TRUE(table->Fetch({.keys = keys, .rows = rows.buffer()}, &misses).ok());
        } else {
          EXPECT_TRUE(table->Locate(keys, addresses).ok());
        }
        EXPECT_TRUE(misses.empty());
        for (size_t i = 0; i < keys.size(); ++i) {
          const std::span<const std::byte> row =
              reader == 0 ? std::span<const std::byte>(rows.row(i)) : std::span(addresses[i], 132);
          const std::optional<uint32_t> version = RowVersion(keys[i], row);
          if (!version) {
            ADD_FAILURE() << "torn row of key " << keys[i];
            break;
          }
          if (i == 0) {
            EXPECT_GE(*version, last);
            last = *version;
          }
        }
        ++reads;
      }
    });
  }
  for (uint32_t version = 2; (version < 200 || reads < 20) && !HasFailure(); ++version) Put(*table, keys, version);
  stop = true;
  for (std::thread& reader : readers) reader.join();
}

// A key that is looked up while another claims the unclaimed way that looks like key 0.
TEST(HashMapStoreTest, KeyZeroIsNeverAnotherKeysRow) {
  const auto store = OpenStore(1);
  const std::vector<Key> zero = {0};
  for (int round = 0; round < 30; ++round) {
    auto created = store->CreateTable({.name = "t", .row_bytes = 16});
    ASSERT_TRUE(created.ok());
    const std::shared_ptr<Table> table = *created;
    std::atomic<bool> stop{false};
    std::thread reader([&] {
      RowBlock row(1, 16);
      std::vector<uint32_t> misses;
      while (!stop) {
        misses.clear();
        EXPECT_TRUE(table->Fetch({.keys = zero, .rows = row.buffer()}, &misses).ok());
        EXPECT_EQ(misses.size(), 1u);
        EXPECT_TRUE(row.RowUntouched(0));
      }
    });
    for (Key key = 1; key < 3'000; ++key) Put(*table, {key}, 1);
    stop = true;
    reader.join();
    ASSERT_TRUE(store->DropTable("t").ok());
  }
}

// The index
// -------------------------------------------------------------------------------------------------------------

TEST(HashMapIndexTest, KeysThatCollideWrapAroundAndAreFound) {
  auto created = HashMapIndex::Create(4, 1);
  ASSERT_TRUE(created.ok());
  HashMapIndex& index = *created->front();
  HashMapIndex::Bucket* last = index.Home(UINT64_MAX);
  const uint64_t limit = index.claim_limit();
  for (uint64_t i = 0; i < limit; ++i) {
    const Key key = static_cast<Key>(i) - 3;
    EXPECT_EQ(index.Find(key, last), 0u);
    index.Publish(index.FindOrReserve(key, last), key, static_cast<uint32_t>(i));
  }
  EXPECT_EQ(index.claimed(), limit);
  for (uint64_t i = 0; i < limit; ++i) EXPECT_EQ(index.Find(static_cast<Key>(i) - 3, last), i + 1);
  EXPECT_EQ(index.Find(1'000, last), 0u);
  EXPECT_EQ(index.FindForWrite(1'000, last).row_entry(), 0u);

  index.Erase(index.FindForWrite(-3, last));
  EXPECT_EQ(index.Find(-3, last), 0u);
  EXPECT_EQ(index.Find(5, last), 9u) << "an erased key hides the keys behind it";
  index.Publish(index.FindOrReserve(-3, last), -3, 77);
  EXPECT_EQ(index.Find(-3, last), 78u);
  EXPECT_EQ(index.claimed(), limit) << "a key that comes back takes its old way";
}

// Memory -------------------------------------------------------------------------------------------------------------

uint64_t AnonymousBytes() {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("RssAnon:", 0) == 0) return std::stoull(line.substr(8)) * 1024;
  }
  return 0;
}

TEST(HashMapMemoryTest, AnEmptyTableCostsAFewKilobytes) {
  const auto store = OpenStore(16);
  EXPECT_LT(CreateTable(*store, 512)->Stats()->memory_bytes, 8'000u);
  EXPECT_LT(
      (*store->CreateTable({.name = "hinted", .row_bytes = 512, .expected_rows = 10'000'000}))->Stats()->memory_bytes,
      8'000u);
}

TEST(HashMapMemoryTest, AHundredSmallTablesCostLittle) {
  const auto store = OpenStore(16);
  uint64_t total = 0;
  for (int i = 0; i < 100; ++i) {
    auto table = store->CreateTable({.name = "t" + std::to_string(i), .row_bytes = 64});
    ASSERT_TRUE(table.ok());
    Put(**table, Keys(0, 100, false), 1);
    total += (*table)->Stats()->memory_bytes;
  }
  EXPECT_LT(total, 100u * 100 * 64 * 4);  // 16 small indexes each
}

// The bound of the documentation: rows x (row + (key + 8) / load factor), with 0.8 as the load factor, plus 10 %.
TEST_P(HashMapKeysTest, MemoryStaysWithinItsBound) {
  constexpr uint64_t kRows = 600'000;
  constexpr size_t kRowBytes = 64;
  const double bound = kRows * (kRowBytes + 16 / 0.8) * 1.1;
  for (const bool hinted : {true, false}) {
    const std::vector<Key> keys = Keys(0, kRows, GetParam());
    constexpr size_t kBatch = 20'000;
    const RowBlock rows(kBatch, kRowBytes);
    const auto store = OpenStore(16);
    const uint64_t before = AnonymousBytes();
    const auto table = CreateTable(*store, kRowBytes, hinted ? kRows : 0);
    uint64_t peak = 0;
    for (size_t first = 0; first < kRows; first += kBatch) {
      ASSERT_TRUE(table->Upsert(std::span(keys).subspan(first, kBatch), rows.source()).ok());
      peak = std::max(peak, AnonymousBytes() - before);
    }
    const TableStats stats = *table->Stats();
    EXPECT_EQ(stats.rows, kRows);
    if (hinted) {
      EXPECT_LE(static_cast<double>(stats.memory_bytes), bound);
      if (GetParam()) {
        EXPECT_LE(static_cast<double>(stats.memory_bytes), kRows * (kRowBytes + 4) * 1.02);
      }
    }
    if (kSanitized) continue;  // their shadow memory counts too
    if (hinted) {
      EXPECT_LE(static_cast<double>(peak), bound);
    }
    EXPECT_NEAR(static_cast<double>(stats.memory_bytes), static_cast<double>(peak), 0.08 * static_cast<double>(peak));
  }
}

TEST(HashMapMemoryTest, ADroppedTableIsFreed) {
  const auto store = OpenStore(4);
  const uint64_t before = AnonymousBytes();
  auto table = CreateTable(*store, 1024);
  std::vector<Key> keys = Keys(0, 50'000, true);
  const RowBlock rows(keys.size(), 1024);
  ASSERT_TRUE(table->Upsert(keys, rows.source()).ok());
  const uint64_t full = AnonymousBytes();
  ASSERT_TRUE(store->DropTable("hps_et.m.t").ok());
  {
    const EpochGuard guard;  // somebody still reads
    table.reset();
  }
  if (!kSanitized) {
    EXPECT_LT(AnonymousBytes(), full - 40'000 * 1024);
  }
  EXPECT_GT(full, before);
}

}  // namespace
}  // namespace hps
