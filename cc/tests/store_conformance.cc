// The clauses. Each test is one sentence of table_store.h; rows carry their own proof (row_pattern.h).

#include "cc/tests/store_conformance.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "cc/tests/row_pattern.h"
#include "hps/epoch.h"

namespace hps::testing {
namespace {

constexpr size_t kRowBytes = 64;
constexpr Key kKeyMin = std::numeric_limits<Key>::min();
constexpr Key kKeyMax = std::numeric_limits<Key>::max();

#define ASSERT_OK(expression)                                    \
  do {                                                           \
    const Status assert_status = (expression);                   \
    ASSERT_TRUE(assert_status.ok()) << assert_status.ToString(); \
  } while (false)
#define EXPECT_CODE(expression, expected)                                  \
  do {                                                                     \
    const Status expect_status = (expression);                             \
    EXPECT_EQ(expect_status.code(), expected) << expect_status.ToString(); \
  } while (false)

template <typename T>
Status StatusOf(const Result<T>& result) {
  return result.status();
}

std::vector<Key> KeyRange(Key first, size_t count, Key step = 1) {
  std::vector<Key> keys(count);
  for (size_t i = 0; i < count; ++i) keys[i] = first + static_cast<Key>(i) * step;
  return keys;
}

Status Put(Table& table, const std::vector<Key>& keys, uint32_t version, const UpsertOptions& options = {}) {
  const RowBlock rows = RowBlock::Of(keys, version, table.spec().row_bytes);
  return table.Upsert(keys, rows.source(), options);
}

// Fetches all keys and checks everything the contract says about the answer; versions[i] is 0 where keys[i] missed.
void FetchVersions(const Table& table, const std::vector<Key>& keys, std::vector<uint32_t>* versions) {
  RowBlock rows(keys.size(), table.spec().row_bytes);
  std::vector<uint32_t> misses;
  ASSERT_OK(table.Fetch({.keys = keys, .rows = rows.buffer()}, &misses));
  versions->assign(keys.size(), 0);
  size_t miss = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (miss < misses.size() && misses[miss] == i) {
      ++miss;
      ASSERT_TRUE(rows.RowUntouched(i)) << "the buffer of missing key " << keys[i] << " was written";
      continue;
    }
    const std::optional<uint32_t> version = RowVersion(keys[i], rows.row(i));
    ASSERT_TRUE(version.has_value()) << "key " << keys[i] << " came with a torn, foreign or unwritten row";
    (*versions)[i] = *version;
  }
  ASSERT_EQ(miss, misses.size()) << "misses are not ascending positions";
}

void ExpectVersions(const Table& table, const std::vector<Key>& keys, uint32_t version) {
  std::vector<uint32_t> versions;
  ASSERT_NO_FATAL_FAILURE(FetchVersions(table, keys, &versions));
  for (size_t i = 0; i < keys.size(); ++i) ASSERT_EQ(versions[i], version) << "key " << keys[i];
}

// Scans into key -> version and checks rows and uniqueness.
void ScanVersions(const Table& table, std::map<Key, uint32_t>* versions) {
  versions->clear();
  ASSERT_OK(table.Scan([&](std::span<const Key> keys, ConstRowBuffer rows) -> Status {
    for (size_t i = 0; i < keys.size(); ++i) {
      const std::span<const std::byte> row(rows.data + i * rows.stride_bytes, table.spec().row_bytes);
      const std::optional<uint32_t> version = RowVersion(keys[i], row);
      if (!version) return Internal("a torn or foreign row for key " + std::to_string(keys[i]));
      if (!versions->emplace(keys[i], *version).second) {
        return Internal("visited twice: key " + std::to_string(keys[i]));
      }
    }
    return OkStatus();
  }));
}

void ExpectRowCount(const Table& table, uint64_t rows) {
  const Result<TableStats> stats = table.Stats();
  ASSERT_OK(stats.status());
  if (stats->rows_estimated) {
    EXPECT_GE(stats->rows, rows - rows / 2);
    EXPECT_LE(stats->rows, rows * 2 + 16);
  } else {
    EXPECT_EQ(stats->rows, rows);
  }
}

// HPS_TEST_SEED repeats a run.
uint64_t Seed() {
  const char* text = std::getenv("HPS_TEST_SEED");
  const uint64_t seed = text != nullptr ? std::strtoull(text, nullptr, 10) : std::random_device{}();
  std::cout << "HPS_TEST_SEED=" << seed << std::endl;
  return seed;
}

}  // namespace

void StoreConformance::SetUp() {
  std::string pattern = (std::filesystem::temp_directory_path() / "hps_store_XXXXXX").string();
  ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
  directory_ = pattern;
  Open();
}

void StoreConformance::TearDown() {
  if (store_ != nullptr) EXPECT_CODE(store_->Close(), StatusCode::kOk);
  store_.reset();
  std::filesystem::remove_all(directory_);
}

void StoreConformance::Open() {
  Result<std::unique_ptr<TableStore>> store = GetParam().open(directory_);
  ASSERT_OK(store.status());
  store_ = std::move(store).value();
}

void StoreConformance::Reopen() {
  ASSERT_OK(store_->Close());
  store_.reset();
  Open();
}

bool StoreConformance::Reopens() const { return store_->capabilities().persistent || GetParam().reopens; }

std::shared_ptr<Table> StoreConformance::Create(const std::string& name, size_t row_bytes) {
  Result<std::shared_ptr<Table>> table = store_->CreateTable({.name = name, .row_bytes = row_bytes});
  EXPECT_CODE(table.status(), StatusCode::kOk);
  return table.ok() ? std::move(table).value() : nullptr;
}

// Batches and rows ---------------------------------------------------------------------------------------------------

TEST_P(StoreConformance, EmptyBatch) {
  const auto table = Create("hps_et.m.t");
  ASSERT_OK(table->Upsert({}, {nullptr, kRowBytes}));
  ASSERT_OK(Put(*table, {7}, 1));
  std::vector<uint32_t> misses = {42};
  ASSERT_OK(table->Fetch({.keys = {}, .rows = {nullptr, kRowBytes}}, &misses));
  EXPECT_EQ(misses, std::vector<uint32_t>{42});
  uint64_t erased = 99;
  ASSERT_OK(table->Erase({}, &erased));
  EXPECT_EQ(erased, 0u);
  ExpectVersions(*table, {7}, 1);
}

TEST_P(StoreConformance, DuplicateKeysOfAFetchEachGetTheirRow) {
  const auto table = Create("hps_et.m.t");
  ASSERT_OK(Put(*table, {1, 2}, 5));
  std::vector<uint32_t> versions;
  ASSERT_NO_FATAL_FAILURE(FetchVersions(*table, {1, 9, 2, 1, 9, 1}, &versions));
  EXPECT_EQ(versions, (std::vector<uint32_t>{5, 0, 5, 5, 0, 5}));
}

TEST_P(StoreConformance, LaterDuplicateOfAnUpsertWins) {
  const auto table = Create("hps_et.m.t");
  for (const size_t copies : {size_t{2}, size_t{700}}) {
    std::vector<Key> keys;
    RowBlock rows(copies * 10, kRowBytes);
    for (uint32_t copy = 0; copy < copies; ++copy) {
      for (Key key = 0; key < 10; ++key) {
        FillRow(key, copy + 1, rows.row(keys.size()));
        keys.push_back(key);
      }
    }
    ASSERT_OK(table->Upsert(keys, rows.source()));
    ExpectVersions(*table, KeyRange(0, 10), static_cast<uint32_t>(copies));
  }
  ExpectRowCount(*table, 10);
}

TEST_P(StoreConformance, OnlyAbsentLeavesPresentRows) {
  const auto table = Create("hps_et.m.t");
  ASSERT_OK(Put(*table, KeyRange(0, 100), 1));
  ASSERT_OK(Put(*table, KeyRange(50, 100), 2, {.only_absent = true}));
  ExpectVersions(*table, KeyRange(0, 100), 1);
  ExpectVersions(*table, KeyRange(100, 50), 2);
}

TEST_P(StoreConformance, OnlyAbsentKeepsTheEarlierDuplicate) {
  const auto table = Create("hps_et.m.t");
  const std::vector<Key> keys = {3, 3};
  RowBlock rows(2, kRowBytes);
  FillRow(3, 1, rows.row(0));
  FillRow(3, 2, rows.row(1));
  ASSERT_OK(table->Upsert(keys, rows.source(), {.only_absent = true}));
  ExpectVersions(*table, {3}, 1);
}

TEST_P(StoreConformance, OnlyAbsentWritesWhatWasErased) {
  const auto table = Create("hps_et.m.t");
  ASSERT_OK(Put(*table, {3}, 1));
  ASSERT_OK(table->Erase(std::vector<Key>{3}));
  ASSERT_OK(Put(*table, {3}, 2, {.only_absent = true}));
  ExpectVersions(*table, {3}, 2);
}

TEST_P(StoreConformance, BatchAboveTheBackendsLimit) {
  const auto table = Create("hps_et.m.t", 8);
  const size_t count = GetParam().large_batch_rows;
  const std::vector<Key> keys = KeyRange(-static_cast<Key>(count) / 2, count, 3);
  ASSERT_OK(Put(*table, keys, 1, {.bulk = true}));
  ASSERT_OK(store_->Flush());
  ExpectVersions(*table, keys, 1);
  std::vector<uint32_t> versions;
  ASSERT_NO_FATAL_FAILURE(FetchVersions(*table, KeyRange(-static_cast<Key>(count) / 2 + 1, count, 3), &versions));
  EXPECT_EQ(std::count(versions.begin(), versions.end(), 0u), static_cast<ptrdiff_t>(count));
  ExpectRowCount(*table, count);
  uint64_t erased = 0;
  ASSERT_OK(table->Erase(keys, &erased));
  EXPECT_EQ(erased, count);
  ExpectVersions(*table, keys, 0);
}

TEST_P(StoreConformance, EveryKeyValueIsLegal) {
  const auto table = Create("hps_et.m.t");
  const std::vector<Key> keys = {0, -1, 1, kKeyMin, kKeyMin + 1, kKeyMax, kKeyMax - 1, Key{1} << 32, -(Key{1} << 32)};
  for (const Key key : keys) ExpectVersions(*table, {key}, 0);
  ASSERT_OK(Put(*table, keys, 1));
  ExpectVersions(*table, keys, 1);
  ExpectRowCount(*table, keys.size());
  std::map<Key, uint32_t> scanned;
  ASSERT_NO_FATAL_FAILURE(ScanVersions(*table, &scanned));
  for (const Key key : keys) EXPECT_EQ(scanned.count(key), 1u) << key;
  for (const Key key : keys) {
    ASSERT_OK(table->Erase(std::vector<Key>{key}));
    ExpectVersions(*table, {key}, 0);
  }
  ExpectRowCount(*table, 0);
}

TEST_P(StoreConformance, RowSizes) {
  for (const size_t row_bytes : {4, 28, 64, 128, 256, 520, 4096 + 4}) {
    const auto table = Create("hps_et.m.width" + std::to_string(row_bytes), row_bytes);
    ASSERT_EQ(table->spec().row_bytes, row_bytes);
    const std::vector<Key> keys = KeyRange(-500, 1000);
    ASSERT_OK(Put(*table, keys, 1));
    ASSERT_OK(Put(*table, KeyRange(0, 500), 2));
    ExpectVersions(*table, KeyRange(-500, 500), 1);
    ExpectVersions(*table, KeyRange(0, 500), 2);
    std::map<Key, uint32_t> scanned;
    ASSERT_NO_FATAL_FAILURE(ScanVersions(*table, &scanned));
    EXPECT_EQ(scanned.size(), keys.size());
  }
}

TEST_P(StoreConformance, StrideMayExceedTheRow) {
  constexpr size_t kOddRowBytes = 28;
  const auto table = Create("hps_et.m.t", kOddRowBytes);
  const std::vector<Key> keys = KeyRange(0, 300);
  const RowBlock source = RowBlock::Of(keys, 1, kOddRowBytes, 44);
  ASSERT_OK(table->Upsert(keys, source.source()));
  RowBlock rows(keys.size(), kOddRowBytes, 52);
  std::vector<uint32_t> misses;
  ASSERT_OK(table->Fetch({.keys = keys, .rows = rows.buffer()}, &misses));
  EXPECT_TRUE(misses.empty());
  for (size_t i = 0; i < keys.size(); ++i) {
    ASSERT_EQ(RowVersion(keys[i], rows.row(i)), 1u);
    ASSERT_TRUE(rows.GapUntouched(i)) << "bytes behind row " << i << " were written";
  }
}

TEST_P(StoreConformance, StrideBelowTheRowIsRefused) {
  const auto table = Create("hps_et.m.t");
  const std::vector<Key> keys = {1, 2};
  RowBlock rows(2, kRowBytes);
  std::vector<uint32_t> misses;
  EXPECT_CODE(table->Upsert(keys, {rows.buffer().data, kRowBytes - 4}), StatusCode::kInvalidArgument);
  EXPECT_CODE(table->Fetch({.keys = keys, .rows = {rows.buffer().data, kRowBytes - 4}}, &misses),
              StatusCode::kInvalidArgument);
}

TEST_P(StoreConformance, PositionsSelectKeys) {
  const auto table = Create("hps_et.m.t");
  const std::vector<Key> keys = KeyRange(0, 200);
  ASSERT_OK(Put(*table, KeyRange(0, 100, 2), 1));  // the even keys
  const std::vector<uint32_t> positions = {0, 1, 2, 30, 31, 77, 198, 199};
  RowBlock rows(keys.size(), kRowBytes);
  std::vector<uint32_t> misses;
  ASSERT_OK(table->Fetch({.keys = keys, .positions = positions, .rows = rows.buffer()}, &misses));
  EXPECT_EQ(misses, (std::vector<uint32_t>{1, 31, 77, 199}));
  for (uint32_t i = 0; i < keys.size(); ++i) {
    const bool selected = std::binary_search(positions.begin(), positions.end(), i);
    if (selected && i % 2 == 0) {
      EXPECT_EQ(RowVersion(keys[i], rows.row(i)), 1u) << i;
    } else {
      EXPECT_TRUE(rows.RowUntouched(i)) << i;
    }
  }
  misses.clear();
  ASSERT_OK(table->Fetch({.keys = keys, .positions = std::span<const uint32_t>(), .rows = rows.buffer()}, &misses));
  EXPECT_TRUE(misses.empty()) << "an empty selection selects nothing";
}

TEST_P(StoreConformance, MissesAreTheComplementInAscendingOrder) {
  const auto table = Create("hps_et.m.t");
  const uint64_t seed = Seed();
  std::mt19937_64 random(seed);
  std::vector<Key> keys = KeyRange(0, 5000);
  std::vector<Key> present;
  for (const Key key : keys) {
    if (random() % 3 != 0) present.push_back(key);
  }
  ASSERT_OK(Put(*table, present, 1));
  std::shuffle(keys.begin(), keys.end(), random);
  RowBlock rows(keys.size(), kRowBytes);
  std::vector<uint32_t> misses = {7};  // misses are appended
  ASSERT_OK(table->Fetch({.keys = keys, .rows = rows.buffer()}, &misses));
  std::vector<uint32_t> expected = {7};
  for (uint32_t i = 0; i < keys.size(); ++i) {
    if (!std::binary_search(present.begin(), present.end(), keys[i])) expected.push_back(i);
  }
  EXPECT_EQ(misses, expected) << "seed " << seed;
}

TEST_P(StoreConformance, MissesLeaveTheirBuffersUntouched) {
  const auto table = Create("hps_et.m.t");
  ASSERT_OK(Put(*table, KeyRange(0, 1000, 2), 1));
  ASSERT_OK(table->Erase(KeyRange(0, 300, 2)));
  std::vector<uint32_t> versions;  // FetchVersions checks the buffers
  ASSERT_NO_FATAL_FAILURE(FetchVersions(*table, KeyRange(0, 2000), &versions));
  for (size_t i = 0; i < versions.size(); ++i) ASSERT_EQ(versions[i] == 1, i % 2 == 0 && i >= 600) << i;
}

TEST_P(StoreConformance, UpsertOverwrites) {
  const auto table = Create("hps_et.m.t");
  const std::vector<Key> keys = KeyRange(-100, 200);
  for (uint32_t version = 1; version <= 20; ++version) {
    ASSERT_OK(Put(*table, keys, version));
    ExpectVersions(*table, keys, version);
  }
  ExpectRowCount(*table, keys.size());
}

TEST_P(StoreConformance, EraseRemovesAndCounts) {
  const auto table = Create("hps_et.m.t");
  ASSERT_OK(Put(*table, KeyRange(0, 100), 1));
  uint64_t erased = 0;
  ASSERT_OK(table->Erase(KeyRange(90, 20), &erased));
  EXPECT_EQ(erased, 10u);
  ExpectVersions(*table, KeyRange(0, 90), 1);
  ExpectVersions(*table, KeyRange(90, 20), 0);
  ASSERT_OK(table->Erase(KeyRange(90, 20), &erased));
  EXPECT_EQ(erased, 0u);
  ASSERT_OK(table->Erase(std::vector<Key>{5, 5, 5}, &erased));
  EXPECT_EQ(erased, 1u) << "a key that occurs three times was there once";
  ASSERT_OK(table->Erase(KeyRange(0, 3)));
  ExpectRowCount(*table, 86);
  ASSERT_OK(Put(*table, {95}, 3));
  ExpectVersions(*table, {95}, 3);
}

TEST_P(StoreConformance, RowsComeAndGoForEver) {
  const auto table = Create("hps_et.m.t", 28);
  for (uint32_t round = 0; round < 60; ++round) {
    const std::vector<Key> keys = KeyRange(round * 1000, 1000);
    ASSERT_OK(Put(*table, keys, round + 1));
    ExpectVersions(*table, keys, round + 1);
    ASSERT_OK(table->Erase(keys));
  }
  ExpectRowCount(*table, 0);
  std::map<Key, uint32_t> scanned;
  ASSERT_NO_FATAL_FAILURE(ScanVersions(*table, &scanned));
  EXPECT_TRUE(scanned.empty());
}

TEST_P(StoreConformance, RowCountAfterUpserts) {
  const auto table = Create("hps_et.m.t");
  ExpectRowCount(*table, 0);
  ASSERT_OK(Put(*table, KeyRange(0, 12345), 1));
  ExpectRowCount(*table, 12345);
  ASSERT_OK(Put(*table, KeyRange(12000, 1000), 2));
  ExpectRowCount(*table, 13000);
}

TEST_P(StoreConformance, PassedDeadlineIsAnError) {
  const auto table = Create("hps_et.m.t");
  ASSERT_OK(Put(*table, {1}, 1));
  const std::vector<Key> keys = {1};
  RowBlock rows(1, kRowBytes);
  std::vector<uint32_t> misses;
  const auto now = std::chrono::steady_clock::now();
  EXPECT_CODE(table->Fetch({.keys = keys, .rows = rows.buffer(), .deadline = now - std::chrono::seconds(1)}, &misses),
              StatusCode::kDeadlineExceeded);
  EXPECT_CODE(table->Fetch({.keys = keys, .rows = rows.buffer(), .deadline = now + std::chrono::hours(1)}, &misses),
              StatusCode::kOk);
}

// Tables -------------------------------------------------------------------------------------------------------------

TEST_P(StoreConformance, TablesAreIsolated) {
  const auto left = Create("hps_et.m.left");
  const auto right = Create("hps_et.m.right");
  const auto narrow = Create("hps_et.m2.left", 4);
  const std::vector<Key> keys = KeyRange(0, 100);
  ASSERT_OK(Put(*left, keys, 1));
  ExpectVersions(*right, keys, 0);
  ASSERT_OK(Put(*right, keys, 2));
  ASSERT_OK(Put(*narrow, keys, 3));
  ExpectVersions(*left, keys, 1);
  ASSERT_OK(right->Erase(keys));
  ExpectVersions(*left, keys, 1);
  ExpectVersions(*narrow, keys, 3);
  ExpectRowCount(*right, 0);
}

TEST_P(StoreConformance, TablesAreFoundByName) {
  const std::string name = "hps_et.some-model_1.some_table";
  EXPECT_CODE(store_->OpenTable({.name = name, .row_bytes = kRowBytes}).status(), StatusCode::kNotFound);
  EXPECT_CODE(store_->DropTable(name), StatusCode::kNotFound);
  const auto table = Create(name);
  const auto next = Create(name + "@2");
  ASSERT_OK(Put(*table, {1}, 1));
  EXPECT_EQ(table->spec().name, name);
  EXPECT_CODE(store_->CreateTable({.name = name, .row_bytes = kRowBytes}).status(), StatusCode::kAlreadyExists);
  const Result<std::shared_ptr<Table>> again = store_->OpenTable({.name = name, .row_bytes = kRowBytes});
  ASSERT_OK(again.status());
  ExpectVersions(**again, {1}, 1);
  ExpectVersions(*next, {1}, 0);
  Result<std::vector<std::string>> names = store_->ListTables();
  ASSERT_OK(names.status());
  std::sort(names->begin(), names->end());
  EXPECT_EQ(*names, (std::vector<std::string>{name, name + "@2"}));
}

TEST_P(StoreConformance, RowsOfNoBytesAreRefused) {
  EXPECT_CODE(store_->CreateTable({.name = "hps_et.m.t", .row_bytes = 0}).status(), StatusCode::kInvalidArgument);
}

TEST_P(StoreConformance, OpeningWithAnotherRowSizeIsRefused) {
  const auto table = Create("hps_et.m.t", 64);
  ASSERT_OK(Put(*table, {1}, 1));
  EXPECT_CODE(store_->OpenTable({.name = "hps_et.m.t", .row_bytes = 128}).status(), StatusCode::kFailedPrecondition);
  EXPECT_CODE(store_->OpenTable({.name = "hps_et.m.t", .row_bytes = 32}).status(), StatusCode::kFailedPrecondition);
  ASSERT_OK(store_->OpenTable({.name = "hps_et.m.t", .row_bytes = 64}).status());
}

TEST_P(StoreConformance, DroppedTableStaysReadableWhileHeld) {
  const std::vector<Key> keys = KeyRange(0, 1000);
  auto old = Create("hps_et.m.t");
  ASSERT_OK(Put(*old, keys, 1));
  ASSERT_OK(store_->DropTable("hps_et.m.t"));
  EXPECT_CODE(store_->OpenTable({.name = "hps_et.m.t", .row_bytes = kRowBytes}).status(), StatusCode::kNotFound);
  EXPECT_TRUE(store_->ListTables()->empty());
  ExpectVersions(*old, keys, 1);
  const auto fresh = Create("hps_et.m.t");
  ExpectVersions(*fresh, keys, 0);
  ASSERT_OK(Put(*fresh, keys, 2));
  ExpectVersions(*old, keys, 1);
  old.reset();
  ExpectVersions(*fresh, keys, 2);
}

TEST_P(StoreConformance, RecordsAreKept) {
  const std::string binary("a\0b\xff", 4);
  EXPECT_EQ(*store_->ReadRecord("fingerprint"), std::nullopt);
  ASSERT_OK(store_->WriteRecord("fingerprint", "one"));
  ASSERT_OK(store_->WriteRecord("fingerprint", binary));
  ASSERT_OK(store_->WriteRecord("other", ""));
  EXPECT_EQ(*store_->ReadRecord("fingerprint"), binary);
  EXPECT_EQ(*store_->ReadRecord("other"), "");
  EXPECT_TRUE(store_->ListTables()->empty()) << "records are no tables";
  if (Reopens()) {
    ASSERT_NO_FATAL_FAILURE(Reopen());
    EXPECT_EQ(*store_->ReadRecord("fingerprint"), binary);
  }
  ASSERT_OK(store_->EraseRecord("fingerprint"));
  ASSERT_OK(store_->EraseRecord("never written"));
  EXPECT_EQ(*store_->ReadRecord("fingerprint"), std::nullopt);
  EXPECT_EQ(*store_->ReadRecord("other"), "");
}

// Life of the store --------------------------------------------------------------------------------------------------

TEST_P(StoreConformance, ReopenedStoreHoldsItsRows) {
  if (!Reopens()) GTEST_SKIP() << "the store is volatile by contract";
  const std::vector<Key> keys = KeyRange(-500, 1000);
  ASSERT_OK(Put(*Create("hps_et.m.t"), keys, 1));
  ASSERT_OK(Put(*Create("hps_et.m.bulk", 28), keys, 2, {.bulk = true}));
  Create("hps_et.m.empty");
  Create("hps_et.m.dropped");
  ASSERT_OK(store_->DropTable("hps_et.m.dropped"));
  ASSERT_OK(store_->Flush());
  ASSERT_NO_FATAL_FAILURE(Reopen());
  EXPECT_EQ(store_->ListTables()->size(), 3u);
  const auto table = store_->OpenTable({.name = "hps_et.m.t", .row_bytes = kRowBytes});
  ASSERT_OK(table.status());
  ExpectVersions(**table, keys, 1);
  ExpectRowCount(**table, keys.size());
  const auto bulk = store_->OpenTable({.name = "hps_et.m.bulk", .row_bytes = 28});
  ASSERT_OK(bulk.status());
  ExpectVersions(**bulk, keys, 2);
  EXPECT_CODE(store_->OpenTable({.name = "hps_et.m.t", .row_bytes = 128}).status(), StatusCode::kFailedPrecondition);
  ASSERT_OK((*table)->Erase(keys));
  ASSERT_NO_FATAL_FAILURE(Reopen());
  const auto erased = store_->OpenTable({.name = "hps_et.m.t", .row_bytes = kRowBytes});
  ASSERT_OK(erased.status());
  ExpectVersions(**erased, keys, 0);
}

TEST_P(StoreConformance, ReadOnlyStoreRefusesWrites) {
  if (GetParam().open_read_only == nullptr) GTEST_SKIP() << "the backend has no read-only mode";
  const std::vector<Key> keys = KeyRange(0, 100);
  ASSERT_OK(Put(*Create("hps_et.m.t"), keys, 1));
  ASSERT_OK(store_->WriteRecord("fingerprint", "one"));
  ASSERT_OK(store_->Close());
  Result<std::unique_ptr<TableStore>> opened = GetParam().open_read_only(directory());
  ASSERT_OK(opened.status());
  store_ = std::move(opened).value();
  EXPECT_FALSE(store_->capabilities().writable);
  const auto table = store_->OpenTable({.name = "hps_et.m.t", .row_bytes = kRowBytes});
  ASSERT_OK(table.status());
  EXPECT_CODE(Put(**table, keys, 2), StatusCode::kFailedPrecondition);
  EXPECT_CODE((*table)->Erase(keys), StatusCode::kFailedPrecondition);
  EXPECT_CODE(store_->CreateTable({.name = "hps_et.m.new", .row_bytes = 4}).status(), StatusCode::kFailedPrecondition);
  EXPECT_CODE(store_->DropTable("hps_et.m.t"), StatusCode::kFailedPrecondition);
  EXPECT_CODE(store_->WriteRecord("fingerprint", "two"), StatusCode::kFailedPrecondition);
  EXPECT_CODE(store_->EraseRecord("fingerprint"), StatusCode::kFailedPrecondition);
  ExpectVersions(**table, keys, 1);
  EXPECT_EQ(*store_->ReadRecord("fingerprint"), "one");
}

TEST_P(StoreConformance, CloseTwiceAndCallsAfterClose) {
  const auto table = Create("hps_et.m.t");
  const std::vector<Key> keys = {1};
  ASSERT_OK(Put(*table, keys, 1));
  ASSERT_OK(store_->Close());
  ASSERT_OK(store_->Close());

  constexpr StatusCode kClosed = StatusCode::kFailedPrecondition;
  RowBlock rows(1, kRowBytes);
  std::vector<uint32_t> misses;
  std::vector<const std::byte*> addresses(1);
  EXPECT_CODE(table->Fetch({.keys = keys, .rows = rows.buffer()}, &misses), kClosed);
  EXPECT_CODE(table->Upsert(keys, rows.source()), kClosed);
  EXPECT_CODE(table->Erase(keys), kClosed);
  EXPECT_CODE(table->Scan([](auto, auto) { return OkStatus(); }), kClosed);
  EXPECT_CODE(StatusOf(table->Stats()), kClosed);
  if (store_->capabilities().addressable) EXPECT_CODE(table->Locate(keys, addresses), kClosed);
  EXPECT_EQ(table->spec().row_bytes, kRowBytes);
  const TableSpec spec = {.name = "hps_et.m.t", .row_bytes = kRowBytes};
  EXPECT_CODE(StatusOf(store_->OpenTable(spec)), kClosed);
  EXPECT_CODE(StatusOf(store_->CreateTable(spec)), kClosed);
  EXPECT_CODE(store_->DropTable("hps_et.m.t"), kClosed);
  EXPECT_CODE(StatusOf(store_->ListTables()), kClosed);
  EXPECT_CODE(StatusOf(store_->ReadRecord("r")), kClosed);
  EXPECT_CODE(store_->WriteRecord("r", "v"), kClosed);
  EXPECT_CODE(store_->EraseRecord("r"), kClosed);
  EXPECT_CODE(store_->Flush(), kClosed);
}

TEST_P(StoreConformance, TableOutlivesItsStore) {
  const auto table = Create("hps_et.m.t");
  ASSERT_OK(Put(*table, {1}, 1));
  ASSERT_OK(store_->Close());
  store_.reset();
  EXPECT_CODE(Put(*table, {1}, 2), StatusCode::kFailedPrecondition);
}

// Scan and Locate ----------------------------------------------------------------------------------------------------

TEST_P(StoreConformance, ScanVisitsEachRowOnce) {
  const auto table = Create("hps_et.m.t", 28);
  std::map<Key, uint32_t> scanned;
  ASSERT_NO_FATAL_FAILURE(ScanVersions(*table, &scanned));
  EXPECT_TRUE(scanned.empty());
  ASSERT_OK(Put(*table, KeyRange(-10'000, 20'000), 1));
  ASSERT_OK(Put(*table, KeyRange(0, 5'000), 2));
  ASSERT_OK(table->Erase(KeyRange(5'000, 1'000)));
  ASSERT_NO_FATAL_FAILURE(ScanVersions(*table, &scanned));
  EXPECT_EQ(scanned.size(), 19'000u);
  for (const auto& [key, version] : scanned) {
    ASSERT_EQ(version, key >= 0 && key < 5'000 ? 2u : 1u) << key;
    ASSERT_FALSE(key >= 5'000 && key < 6'000) << key;
  }
}

TEST_P(StoreConformance, ScanEndsWithTheVisitorsError) {
  const auto table = Create("hps_et.m.t", 4);
  ASSERT_OK(Put(*table, KeyRange(0, 50'000), 1));
  int calls = 0;
  const Status status = table->Scan([&](auto, auto) {
    ++calls;
    return Status(StatusCode::kCancelled, "enough");
  });
  EXPECT_CODE(status, StatusCode::kCancelled);
  EXPECT_EQ(calls, 1);
}

TEST_P(StoreConformance, ScanWhileWritingSeesEverythingThatStayed) {
  const auto table = Create("hps_et.m.t", 28);
  const std::vector<Key> staying = KeyRange(0, 8'000, 2);
  ASSERT_OK(Put(*table, staying, 1));
  std::atomic<bool> stop{false};
  std::atomic<uint32_t> rounds{0};
  std::atomic<bool> failed{false};
  std::thread writer([&] {  // overwrites rows that stay, inserts and erases others, and makes the table grow
    for (uint32_t round = 0; !stop && !failed; ++round) {
      const std::vector<Key> others = KeyRange(1 + 2 * static_cast<Key>(round % 7) * 2'000, 2'000, 2);
      for (const Status& status :
           {Put(*table, KeyRange(0, 2'000, 2), round + 2), Put(*table, others, 1), table->Erase(others)}) {
        if (!status.ok()) failed = true;
      }
      ++rounds;
    }
  });
  for (int scan = 0; scan < 5; ++scan) {
    const uint32_t before = rounds;
    std::map<Key, uint32_t> scanned;
    ScanVersions(*table, &scanned);
    for (const Key key : staying) {
      if (scanned.count(key) == 0) ADD_FAILURE() << "key " << key << " was not visited";
    }
    while (rounds == before && !failed) std::this_thread::yield();
  }
  stop = true;
  writer.join();
  EXPECT_FALSE(failed) << "a write failed";
}

TEST_P(StoreConformance, VisitorMayWriteToTheTable) {
  const auto table = Create("hps_et.m.t");
  const std::vector<Key> keys = KeyRange(0, 3'000);
  ASSERT_OK(Put(*table, keys, 1));
  ASSERT_OK(table->Scan([&](std::span<const Key> chunk, ConstRowBuffer) {
    return Put(*table, std::vector<Key>(chunk.begin(), chunk.end()), 2);
  }));
  ExpectVersions(*table, keys, 2);
}

TEST_P(StoreConformance, LocateAgreesWithFetch) {
  const auto table = Create("hps_et.m.t", 28);
  ASSERT_OK(Put(*table, KeyRange(0, 2'000, 2), 1));
  const std::vector<Key> keys = KeyRange(-100, 4'200);
  std::vector<const std::byte*> addresses(keys.size());
  const EpochGuard guard;
  const Status status = table->Locate(keys, addresses);
  if (!store_->capabilities().addressable) {
    EXPECT_CODE(status, StatusCode::kUnimplemented);
    return;
  }
  ASSERT_OK(status);
  std::vector<uint32_t> versions;
  ASSERT_NO_FATAL_FAILURE(FetchVersions(*table, keys, &versions));
  for (size_t i = 0; i < keys.size(); ++i) {
    ASSERT_EQ(addresses[i] != nullptr, versions[i] != 0) << keys[i];
    if (addresses[i] != nullptr) {
      ASSERT_EQ(RowVersion(keys[i], {addresses[i], 28}), 1u) << keys[i];
    }
  }
}

TEST_P(StoreConformance, LocatedRowsStayUnchangedUnderTheirGuard) {
  if (!store_->capabilities().addressable) GTEST_SKIP() << "the store is not addressable";
  auto table = Create("hps_et.m.t", 28);
  const std::vector<Key> keys = KeyRange(0, 500);
  ASSERT_OK(Put(*table, keys, 1));
  std::vector<const std::byte*> addresses(keys.size());
  {
    const EpochGuard guard;
    ASSERT_OK(table->Locate(keys, addresses));
    for (uint32_t version = 2; version < 30; ++version) ASSERT_OK(Put(*table, keys, version));
    ASSERT_OK(table->Erase(keys));
    ASSERT_OK(Put(*table, KeyRange(10'000, 5'000), 1));
    ASSERT_OK(store_->DropTable("hps_et.m.t"));
    table.reset();
    for (size_t i = 0; i < keys.size(); ++i) ASSERT_EQ(RowVersion(keys[i], {addresses[i], 28}), 1u) << keys[i];
  }
}

TEST_P(StoreConformance, LocateOfTooFewAddressesIsRefused) {
  if (!store_->capabilities().addressable) GTEST_SKIP() << "the store is not addressable";
  const auto table = Create("hps_et.m.t");
  std::vector<const std::byte*> addresses(1);
  const EpochGuard guard;
  EXPECT_CODE(table->Locate(KeyRange(0, 2), addresses), StatusCode::kInvalidArgument);
}

// Concurrency --------------------------------------------------------------------------------------------------------

TEST_P(StoreConformance, ReadersSeeWholeRowsUnderAWriterStorm) {
  const auto table = Create("hps_et.m.t", 260);
  const std::vector<Key> keys = KeyRange(0, 600);
  ASSERT_OK(Put(*table, keys, 1));
  std::atomic<bool> stop{false};
  std::atomic<uint32_t> fetches{0};
  std::vector<std::thread> threads;
  for (int reader = 0; reader < 2; ++reader) {
    threads.emplace_back([&] {
      std::vector<uint32_t> last(keys.size(), 1);
      std::vector<uint32_t> versions;
      while (!stop) {
        FetchVersions(*table, keys, &versions);
        for (size_t i = 0; i < keys.size(); ++i) {
          if (i % 3 == 0 && versions[i] == 0) continue;  // erased and written again
          if (versions[i] < last[i] && GetParam().one_writer_order) {
            ADD_FAILURE() << "key " << keys[i] << " went back from " << last[i] << " to " << versions[i];
            stop = true;
          }
          last[i] = versions[i];
        }
        if (::testing::Test::HasFailure()) stop = true;
        ++fetches;
      }
    });
  }
  std::thread grower([&] {  // other keys make the table grow under the readers
    for (Key first = 1'000; !stop && first < 200'000; first += 500) {
      EXPECT_CODE(Put(*table, KeyRange(first, 500), 1), StatusCode::kOk);
      if (first % 2'000 == 0) EXPECT_CODE(table->Erase(KeyRange(first, 500)), StatusCode::kOk);
    }
  });
  std::vector<Key> third;
  for (size_t i = 0; i < keys.size(); i += 3) third.push_back(keys[i]);
  for (uint32_t version = 2; !stop && (version < 100 || fetches < 20); ++version) {
    EXPECT_CODE(Put(*table, keys, version), StatusCode::kOk);
    EXPECT_CODE(table->Erase(third), StatusCode::kOk);
    EXPECT_CODE(Put(*table, third, version), StatusCode::kOk);
  }
  stop = true;
  grower.join();
  for (std::thread& thread : threads) thread.join();
}

TEST_P(StoreConformance, NewRowsAppearWholeAndStay) {
  const auto table = Create("hps_et.m.t", 28);
  constexpr size_t kRows = 20'000;
  std::atomic<size_t> written{0};
  std::thread writer([&] {
    for (size_t first = 0; first < kRows; first += 100) {
      EXPECT_CODE(Put(*table, KeyRange(first, 100), 1), StatusCode::kOk);
      written = first + 100;
    }
  });
  const std::vector<Key> keys = KeyRange(0, kRows);
  std::vector<uint32_t> versions;
  while (true) {
    const size_t before = written;
    FetchVersions(*table, keys, &versions);
    for (size_t i = 0; i < before; ++i) {
      if (versions[i] != 1) {
        ADD_FAILURE() << "key " << i << " had been written and is missing";
        break;
      }
    }
    if (before == kRows || HasFailure()) break;
  }
  writer.join();
}

TEST_P(StoreConformance, WritersOfOneKeyAgreeOnAWholeRow) {
  const auto table = Create("hps_et.m.t", 260);
  const std::vector<Key> keys = KeyRange(0, 50);
  std::vector<std::thread> writers;
  for (uint32_t writer = 0; writer < 3; ++writer) {
    writers.emplace_back([&, writer] {
      for (uint32_t round = 0; round < 100; ++round) {
        EXPECT_CODE(Put(*table, keys, 1 + writer * 1'000 + round), StatusCode::kOk);
        EXPECT_CODE(Put(*table, KeyRange(1'000 + writer * 100'000 + round * 50, 50), 1), StatusCode::kOk);
      }
    });
  }
  for (std::thread& writer : writers) writer.join();
  std::vector<uint32_t> versions;
  ASSERT_NO_FATAL_FAILURE(FetchVersions(*table, keys, &versions));
  for (const uint32_t version : versions) EXPECT_EQ((version - 1) % 1'000, 99u) << "not the last row of any writer";
  ExpectRowCount(*table, 50 + 3 * 100 * 50);
}

// Everything at once against an obviously correct model --------------------------------------------------------------

TEST_P(StoreConformance, RandomOperationsAgreeWithAMap) {
  const uint64_t seed = Seed();
  SCOPED_TRACE("HPS_TEST_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  const size_t row_bytes = std::vector<size_t>{4, 28, 64, 132}[random() % 4];
  const TableSpec spec = {.name = "hps_et.m.t", .row_bytes = row_bytes, .expected_rows = random() % 2 * 500};
  const auto created = store_->CreateTable(spec);
  ASSERT_OK(created.status());
  std::shared_ptr<Table> table = *created;
  std::map<Key, uint32_t> model;
  const auto random_key = [&]() -> Key {
    switch (random() % 8) {
      case 0: return static_cast<Key>(random());
      case 1: return kKeyMin + static_cast<Key>(random() % 3);
      default: return static_cast<Key>(random() % 3'000) - 1'000;
    }
  };
  for (uint32_t step = 1; step <= 400; ++step) {
    std::vector<Key> keys(random() % 10 == 0 ? random() % 3'000 : random() % 40);
    for (Key& key : keys) key = random_key();
    switch (random() % 6) {
      case 0:
      case 1: {
        ASSERT_OK(Put(*table, keys, step, {.bulk = random() % 2 == 0}));
        for (const Key key : keys) model[key] = step;
        break;
      }
      case 2: {
        ASSERT_OK(Put(*table, keys, step, {.only_absent = true, .bulk = random() % 2 == 0}));
        for (const Key key : keys) model.emplace(key, step);
        break;
      }
      case 3: {
        uint64_t expected = 0;
        for (const Key key : keys) expected += model.erase(key);
        uint64_t erased = 0;
        ASSERT_OK(table->Erase(keys, &erased));
        ASSERT_EQ(erased, expected) << "step " << step;
        break;
      }
      case 4: {
        if (random() % 8 == 0 && Reopens()) {
          ASSERT_OK(store_->Flush());
          table.reset();
          ASSERT_NO_FATAL_FAILURE(Reopen());
          const auto reopened = store_->OpenTable(spec);
          ASSERT_OK(reopened.status());
          table = *reopened;
        }
        if (random() % 16 == 0) {
          const std::shared_ptr<Table> dropped = std::move(table);
          ASSERT_OK(store_->DropTable(spec.name));
          const auto renewed = store_->CreateTable(spec);
          ASSERT_OK(renewed.status());
          table = *renewed;
          std::map<Key, uint32_t> scanned;
          ASSERT_NO_FATAL_FAILURE(ScanVersions(*dropped, &scanned));
          ASSERT_EQ(scanned, model) << "of the table dropped in step " << step << ", while it is held";
          model.clear();
        }
        if (random() % 4 == 0) {
          std::map<Key, uint32_t> scanned;
          ASSERT_NO_FATAL_FAILURE(ScanVersions(*table, &scanned));
          ASSERT_EQ(scanned, model) << "step " << step;
        }
        break;
      }
      default: {
        std::vector<uint32_t> versions;
        ASSERT_NO_FATAL_FAILURE(FetchVersions(*table, keys, &versions));
        for (size_t i = 0; i < keys.size(); ++i) {
          const auto it = model.find(keys[i]);
          ASSERT_EQ(versions[i], it == model.end() ? 0 : it->second) << "step " << step << " key " << keys[i];
        }
      }
    }
  }
  std::map<Key, uint32_t> scanned;
  ASSERT_NO_FATAL_FAILURE(ScanVersions(*table, &scanned));
  EXPECT_EQ(scanned, model);
  ExpectRowCount(*table, model.size());
}

// Bounded stores -----------------------------------------------------------------------------------------------------

namespace {

uint64_t RowCount(const Table& table) {
  const Result<TableStats> stats = table.Stats();
  EXPECT_CODE(stats.status(), StatusCode::kOk);
  return stats.ok() ? stats->rows : 0;
}

std::vector<Key> PresentOf(const Table& table, const std::vector<Key>& keys) {
  std::vector<uint32_t> versions;
  FetchVersions(table, keys, &versions);
  std::vector<Key> present;
  for (size_t i = 0; i < versions.size(); ++i) {
    if (versions[i] != 0) present.push_back(keys[i]);
  }
  return present;
}

// Keys from all over int64; no two calls with different `first` share one.
std::vector<Key> ScatteredKeys(size_t first, size_t count) {
  std::vector<Key> keys(count);
  for (size_t i = 0; i < count; ++i) keys[i] = static_cast<Key>((first + i + 1) * 0x9E3779B97F4A7C15ull);
  return keys;
}

}  // namespace

void BoundedStoreConformance::SetUp() {
  std::string pattern = (std::filesystem::temp_directory_path() / "hps_store_XXXXXX").string();
  ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
  directory_ = pattern;
}

void BoundedStoreConformance::CloseStore() {
  if (store_ != nullptr) EXPECT_CODE(store_->Close(), StatusCode::kOk);
  store_.reset();
}

void BoundedStoreConformance::TearDown() {
  CloseStore();
  std::filesystem::remove_all(directory_);
}

std::shared_ptr<Table> BoundedStoreConformance::Create(uint64_t margin, uint32_t num_partitions, bool refresh,
                                                       uint64_t expected_rows) {
  CloseStore();
  Result<std::unique_ptr<TableStore>> store = GetParam().open(
      directory_, num_partitions, {.margin = margin, .policy = policy(), .refresh_time_after_fetch = refresh});
  EXPECT_CODE(store.status(), StatusCode::kOk);
  store_ = std::move(store).value();
  Result<std::shared_ptr<Table>> table = store_->CreateTable(
      {.name = "hps_et.m.t" + std::to_string(++tables_), .row_bytes = kRowBytes, .expected_rows = expected_rows});
  EXPECT_CODE(table.status(), StatusCode::kOk);
  return table.ok() ? std::move(table).value() : nullptr;
}

TEST_P(BoundedStoreConformance, SaysThatItIsBoundedAndHowManyRowsALoadMayBring) {
  for (const uint32_t partitions : {1, 4}) {
    for (const uint64_t margin : {uint64_t{1}, uint64_t{40}, uint64_t{3'000}}) {
      auto table = Create(margin, partitions);
      EXPECT_TRUE(store_->capabilities().bounded);
      const uint64_t capacity = store_->capabilities().capacity_rows;
      EXPECT_GE(capacity, 1u);
      EXPECT_LE(capacity, margin * partitions);
      if (partitions == 1) EXPECT_EQ(capacity, margin);
      if (margin == 3'000) EXPECT_GE(capacity, margin * partitions * 8 / 10);
      for (const bool scattered : {false, true}) {
        table = Create(margin, partitions, false, capacity);
        const std::vector<Key> keys = scattered ? ScatteredKeys(0, capacity) : KeyRange(0, capacity);
        for (size_t first = 0; first < keys.size(); first += 700) {
          const size_t count = std::min<size_t>(700, keys.size() - first);
          ASSERT_OK(Put(*table, {keys.begin() + first, keys.begin() + first + count}, 1, {.bulk = true}));
        }
        ExpectVersions(*table, keys, 1);
        EXPECT_EQ(table->Stats()->evicted_rows, 0u);
      }
    }
  }
}

TEST_P(BoundedStoreConformance, OverflowShrinksThePartitionToItsTarget) {
  constexpr uint64_t kMargin = 500;
  for (const uint64_t hint : {uint64_t{0}, kMargin}) {
    const auto table = Create(kMargin, 1, false, hint);
    const std::vector<Key> old = KeyRange(0, kMargin);
    ASSERT_OK(Put(*table, old, 1));
    EXPECT_EQ(RowCount(*table), kMargin) << "a margin is no overflow";
    EXPECT_EQ(table->Stats()->evicted_rows, 0u);
    ASSERT_OK(Put(*table, {100'000}, 2));
    const uint64_t rows = RowCount(*table);
    EXPECT_GE(rows, 400u);
    EXPECT_LE(rows, 401u);
    EXPECT_EQ(table->Stats()->evicted_rows, kMargin + 1 - rows);
    ExpectVersions(*table, {100'000}, 2);
    EXPECT_EQ(PresentOf(*table, old).size(), rows - 1);
  }
}

TEST_P(BoundedStoreConformance, MarginHoldsAfterEveryUpsertAndSurvivorsAreWhole) {
  constexpr uint64_t kMargin = 300;
  for (const bool scattered : {false, true}) {
    const auto table = Create(kMargin, 1, false, scattered ? 0 : 200);
    size_t written = 0;
    for (const size_t count : {1, 299, 1, 7, 240, 1, 100, 61, 299, 300, 301, 750, 2, 1'000}) {
      const std::vector<Key> keys = scattered ? ScatteredKeys(written, count) : KeyRange(written, count);
      ASSERT_OK(Put(*table, keys, static_cast<uint32_t>(written) + 1));
      written += count;
      const uint64_t rows = RowCount(*table);
      ASSERT_LE(rows, kMargin) << "after " << written << " keys";
      if (written > kMargin) ASSERT_GE(rows, 240u) << "emptied beyond the target, after " << written << " keys";
      ASSERT_EQ(table->Stats()->evicted_rows, written - rows);
      if (count <= 240) {
        ExpectVersions(*table, keys, static_cast<uint32_t>(written - count) + 1);
      } else {
        EXPECT_GE(PresentOf(*table, keys).size(), 240u) << "rows of the upsert leave last";
      }
      std::map<Key, uint32_t> scanned;
      ASSERT_NO_FATAL_FAILURE(ScanVersions(*table, &scanned));
      ASSERT_EQ(scanned.size(), rows);
    }
  }
}

TEST_P(BoundedStoreConformance, PresentKeysNeedNoRoom) {
  const auto table = Create(100);
  const std::vector<Key> keys = KeyRange(0, 100);
  ASSERT_OK(Put(*table, keys, 1));
  for (uint32_t version = 2; version < 10; ++version) {
    ASSERT_OK(Put(*table, keys, version));
    ASSERT_OK(Put(*table, keys, 77, {.only_absent = true}));
    ExpectVersions(*table, keys, version);
  }
  ASSERT_OK(table->Erase(KeyRange(0, 30)));
  ASSERT_OK(Put(*table, KeyRange(1'000, 30), 1));
  EXPECT_EQ(table->Stats()->evicted_rows, 0u) << "erasing makes room";
  ExpectVersions(*table, KeyRange(30, 70), 9);
}

TEST_P(BoundedStoreConformance, PromotionEvictsAndLeavesPresentRows) {
  const auto table = Create(100);
  ASSERT_OK(Put(*table, KeyRange(0, 100), 1));
  LetTimePass();
  std::vector<Key> promoted = KeyRange(1'000, 20);
  for (Key key = 0; key < 100; key += 10) promoted.push_back(key);  // of the rows that would go first, too
  ASSERT_OK(Put(*table, promoted, 2, {.only_absent = true}));
  EXPECT_LE(RowCount(*table), 100u);
  EXPECT_GE(RowCount(*table), 80u);
  ExpectVersions(*table, KeyRange(1'000, 20), 2);
  ExpectVersions(*table, KeyRange(0, 10, 10), 1);
}

TEST_P(BoundedStoreConformance, TheTableGrowsToItsMarginAgain) {
  const auto table = Create(100);
  for (Key first = 0; first < 3'000; first += 10) ASSERT_OK(Put(*table, KeyRange(first, 10), 1));
  const uint64_t evicted = table->Stats()->evicted_rows;
  const uint64_t room = 100 - RowCount(*table);
  ASSERT_OK(Put(*table, KeyRange(10'000, room), 1));
  EXPECT_EQ(RowCount(*table), 100u);
  EXPECT_EQ(table->Stats()->evicted_rows, evicted);
}

TEST_P(BoundedStoreConformance, ThePolicyDecidesWhoLeaves) {
  constexpr uint64_t kMargin = 1'000;  // 200 rows leave, and one more for the row that comes
  for (const bool scattered : {false, true}) {
    for (const bool refresh : {false, true}) {
      const auto table = Create(kMargin, 1, refresh, scattered ? 0 : kMargin);
      const std::vector<Key> keys = scattered ? ScatteredKeys(0, kMargin) : KeyRange(0, kMargin);
      const auto part = [&](size_t i) {
        return std::vector<Key>(keys.begin() + i * 250, keys.begin() + (i + 1) * 250);
      };
      for (size_t i = 0; i < 4; ++i) {
        ASSERT_OK(Put(*table, part(i), 1));
        LetTimePass();
      }
      ASSERT_OK(Put(*table, part(0), 2));  // writes make younger, and are uses
      LetTimePass();
      for (int read = 0; read < 3; ++read) ExpectVersions(*table, part(1), 1);
      LetTimePass();
      ASSERT_OK(Put(*table, {-7}, 1));
      std::array<size_t, 4> left;
      for (size_t i = 0; i < 4; ++i) left[i] = PresentOf(*table, part(i)).size();
      SCOPED_TRACE(::testing::PrintToString(left) + (refresh ? " refreshed" : "") + (scattered ? " scattered" : ""));
      EXPECT_EQ(left[0] + left[1] + left[2] + left[3], 799u);
      switch (policy()) {
        case OverflowPolicy::kEvictOldest: {
          const std::array<size_t, 4> expected = {250, refresh ? size_t{250} : 49, refresh ? size_t{49} : 250, 250};
          EXPECT_EQ(left, expected);
          break;
        }
        case OverflowPolicy::kEvictLeastUsed:
          EXPECT_EQ(left[0], 250u);
          EXPECT_EQ(left[1], 250u);
          break;
        case OverflowPolicy::kEvictRandom:
          for (const size_t rows : left) {
            EXPECT_GT(rows, 150u);
            EXPECT_LT(rows, 249u);
          }
          break;
      }
    }
  }
}

TEST_P(BoundedStoreConformance, OldFameFades) {
  if (policy() != OverflowPolicy::kEvictLeastUsed) GTEST_SKIP() << "counts of uses are kept by evict_least_used alone";
  const auto table = Create(100);
  const std::vector<Key> famous = KeyRange(0, 20);
  ASSERT_OK(Put(*table, famous, 1));
  for (int read = 0; read < 100; ++read) ExpectVersions(*table, famous, 1);
  Key next = 1'000;
  const auto fill = [&] {  // until there has been an eviction more
    for (const uint64_t before = table->Stats()->evicted_rows; table->Stats()->evicted_rows == before; ++next) {
      EXPECT_CODE(Put(*table, {next}, 1), StatusCode::kOk);
    }
  };
  for (int round = 0; round < 3; ++round) fill();
  ExpectVersions(*table, famous, 1);
  // 100 uses are halved away by ten evictions; rows that are used now outlive them.
  for (int round = 0; round < 40; ++round) {
    for (int read = 0; read < 3; ++read) PresentOf(*table, KeyRange(next - 60, 60));
    fill();
  }
  EXPECT_LT(PresentOf(*table, famous).size(), famous.size());
}

TEST_P(BoundedStoreConformance, EveryPartitionHasItsMargin) {
  const auto table = Create(200, 4);
  for (size_t first = 0; first < 20'000; first += 500) ASSERT_OK(Put(*table, ScatteredKeys(first, 500), 1));
  EXPECT_LE(RowCount(*table), 4 * 200u);
  EXPECT_GE(RowCount(*table), 4 * 160u);
  EXPECT_EQ(table->Stats()->evicted_rows, 20'000 - RowCount(*table));
  std::map<Key, uint32_t> scanned;
  ASSERT_NO_FATAL_FAILURE(ScanVersions(*table, &scanned));
  EXPECT_EQ(scanned.size(), RowCount(*table));
}

TEST_P(BoundedStoreConformance, ReadersSeeWholeRowsWhileRowsLeave) {
  const auto table = Create(400, 2, true);
  const std::vector<Key> keys = KeyRange(0, 4'000);  // ten times what fits
  std::atomic<bool> stop{false};
  std::atomic<uint32_t> fetches{0};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 2; ++reader) {
    readers.emplace_back([&] {
      std::vector<uint32_t> last(keys.size(), 0);
      std::vector<uint32_t> versions;
      while (!stop && !HasFailure()) {
        FetchVersions(*table, keys, &versions);  // whole, or missing and untouched
        for (size_t i = 0; i < keys.size(); ++i) {
          if (versions[i] == 0) continue;  // evicted
          if (versions[i] < last[i]) ADD_FAILURE() << "key " << keys[i] << " went back to " << versions[i];
          last[i] = versions[i];
        }
        ++fetches;
      }
    });
  }
  for (uint32_t round = 1; (round < GetParam().rounds || fetches < 20) && !HasFailure(); ++round) {
    for (size_t first = 0; first < keys.size(); first += 200) {
      const std::vector<Key> written(keys.begin() + first, keys.begin() + first + 200);
      EXPECT_CODE(Put(*table, written, round), StatusCode::kOk);
      ExpectVersions(*table, written, round);  // nobody else writes: just written rows are there
      EXPECT_LE(RowCount(*table), 800u);
    }
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
}

TEST_P(BoundedStoreConformance, WritersSideBySideKeepTheMargin) {
  const auto table = Create(500, 1);
  const uint64_t most = GetParam().writes_first ? 500 + 3 * 50 : 500;
  std::atomic<bool> done{false};
  std::vector<std::thread> writers;
  for (uint32_t writer = 0; writer < 3; ++writer) {
    writers.emplace_back([&, writer] {
      for (size_t round = 0; round < GetParam().rounds * 2; ++round) {
        const std::vector<Key> keys = ScatteredKeys(writer * 1'000'000 + round * 40, 50);  // ten from the last round
        EXPECT_CODE(Put(*table, keys, 1, {.only_absent = writer == 1}), StatusCode::kOk);
        if (writer == 2) EXPECT_CODE(table->Erase(ScatteredKeys(round * 40, 5)), StatusCode::kOk);
      }
    });
  }
  std::thread watcher([&] {
    while (!done) EXPECT_LE(RowCount(*table), most);
  });
  for (std::thread& writer : writers) writer.join();
  done = true;
  watcher.join();
  EXPECT_LE(RowCount(*table), 500u);
  std::map<Key, uint32_t> scanned;
  ASSERT_NO_FATAL_FAILURE(ScanVersions(*table, &scanned));
  EXPECT_EQ(scanned.size(), RowCount(*table));
}

}  // namespace hps::testing
