// Table folders and the loader: what is read, what is refused, what the report says, and how much memory a load takes.
// The memory test is this program again, started with a role, so that it has an address space of its own.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>

#include "cc/loader/table_loader.h"
#include "cc/storage/hash_map_store.h"
#include "cc/storage/rocksdb_store.h"
#include "cc/tests/rocksdb_races.h"
#include "cc/tests/row_pattern.h"
#include "hps/log.h"

namespace hps::testing {
namespace {

namespace fs = std::filesystem;

constexpr uint32_t kWidth = 16;
constexpr size_t kRowBytes = kWidth * sizeof(float);
constexpr size_t kSeveralChunks = 200'000;  // rows of kWidth

#define ASSERT_OK(expression)                                    \
  do {                                                           \
    const Status assert_status = (expression);                   \
    ASSERT_TRUE(assert_status.ok()) << assert_status.ToString(); \
  } while (false)

void ExpectError(const Status& status, StatusCode code, const std::vector<std::string>& parts) {
  EXPECT_EQ(status.code(), code) << status.ToString();
  for (const std::string& part : parts) {
    EXPECT_NE(status.message().find(part), std::string::npos) << "no '" << part << "' in " << status.ToString();
  }
}

std::vector<Key> KeyRange(Key first, size_t count) {
  std::vector<Key> keys(count);
  std::iota(keys.begin(), keys.end(), first);
  return keys;
}

template <typename Value>
void WriteFile(const fs::path& path, std::span<const Value> values) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size_bytes()));
}

void WriteFolder(const fs::path& folder, const std::vector<Key>& keys, const std::vector<float>& values) {
  fs::create_directories(folder);
  WriteFile<Key>(folder / "key", keys);
  WriteFile<float>(folder / "emb_vector", values);
}

// Values that say which row and column they belong to.
std::vector<float> NumberedValues(size_t rows, uint32_t width = kWidth) {
  std::vector<float> values(rows * width);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 16'000'000);
  return values;
}

// The row of a key, or an empty one.
std::vector<float> ReadRow(const Table& table, Key key) {
  std::vector<float> row(table.spec().row_bytes / sizeof(float));
  std::vector<uint32_t> misses;
  const Status status = table.Fetch({.keys = std::span(&key, 1),
                                     .positions = std::nullopt,
                                     .rows = {reinterpret_cast<std::byte*>(row.data()), table.spec().row_bytes}},
                                    &misses);
  EXPECT_TRUE(status.ok()) << status.ToString();
  if (!misses.empty()) row.clear();
  return row;
}

std::vector<float> Slice(const std::vector<float>& values, size_t row, uint32_t width = kWidth) {
  return {values.begin() + static_cast<ptrdiff_t>(row * width),
          values.begin() + static_cast<ptrdiff_t>((row + 1) * width)};
}

class CapturedLog {
 public:
  CapturedLog() {
    SetLogSink([this](LogLevel level, std::string_view line) {
      std::lock_guard lock(mutex_);
      lines_.emplace_back((level == LogLevel::kWarning ? "warning: " : "") + std::string(line));
    });
  }
  ~CapturedLog() { SetLogSink(nullptr); }
  std::vector<std::string> lines() const {
    std::lock_guard lock(mutex_);
    return lines_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> lines_;
};

class Loader : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "hps_loader_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    folder_ = directory_ / "table";
    auto store = OpenHashMapStore({.num_partitions = 4});
    ASSERT_OK(store.status());
    store_ = std::move(store).value();
  }
  void TearDown() override { fs::remove_all(directory_); }

  std::shared_ptr<Table> Create(const std::string& name, size_t row_bytes = kRowBytes, uint64_t expected_rows = 0) {
    auto table = store_->CreateTable({.name = name, .row_bytes = row_bytes, .expected_rows = expected_rows});
    EXPECT_TRUE(table.ok()) << table.status().ToString();
    return *table;
  }
  Status Load(const std::vector<Table*>& targets, const LoadOptions& options, LoadReport* report) {
    HPS_ASSIGN_OR_RETURN(std::unique_ptr<ModelReader> reader, OpenTableFolder(folder_, kWidth));
    return LoadTable(*reader, targets, options, report);
  }
  std::string Fingerprint() {
    auto text = FingerprintTableFolder(folder_, kWidth);
    EXPECT_TRUE(text.ok()) << text.status().ToString();
    return text.ok() ? *text : "";
  }

  fs::path directory_;
  fs::path folder_;
  std::unique_ptr<TableStore> store_;
};

// ---- reading ----------------------------------------------------------------------------------------------------

TEST_F(Loader, ReaderReturnsEveryRowInOrder) {
  for (size_t rows : {size_t{1}, size_t{1000}, kSeveralChunks}) {
    const std::vector<Key> keys = KeyRange(-5, rows);
    const std::vector<float> values = NumberedValues(rows);
    WriteFolder(folder_, keys, values);
    auto reader = OpenTableFolder(folder_, kWidth);
    ASSERT_OK(reader.status());
    EXPECT_EQ((*reader)->rows(), rows);
    EXPECT_EQ((*reader)->row_bytes(), kRowBytes);
    for (int pass = 0; pass < 3; ++pass) {
      size_t row = 0;
      int chunks = 0;
      for (;; ++chunks) {
        auto chunk = (*reader)->Next();
        ASSERT_OK(chunk.status());
        if (chunk->keys.empty()) break;
        if (pass == 1 && chunks == 1) break;  // the third pass begins in the middle of the second
        ASSERT_LE(row + chunk->keys.size(), rows);
        ASSERT_TRUE(std::equal(chunk->keys.begin(), chunk->keys.end(), keys.begin() + static_cast<ptrdiff_t>(row)));
        for (size_t i = 0; i < chunk->keys.size(); ++i) {
          ASSERT_EQ(
              std::memcmp(chunk->rows.data + i * chunk->rows.stride_bytes, &values[(row + i) * kWidth], kRowBytes), 0)
              << "row " << row + i;
        }
        row += chunk->keys.size();
      }
      if (pass != 1) {
        EXPECT_EQ(row, rows);
        EXPECT_TRUE(rows != kSeveralChunks || chunks > 2);
        EXPECT_TRUE((*reader)->Next()->keys.empty()) << "the end stays the end";
      }
      ASSERT_OK((*reader)->Rewind());
    }
  }
}

TEST_F(Loader, FoldersAndFilesThatAreMissingAreNotFound) {
  const auto status = [&] { return OpenTableFolder(folder_, kWidth).status(); };
  ExpectError(status(), StatusCode::kNotFound, {folder_.string(), "key"});
  fs::create_directory(folder_);
  ExpectError(status(), StatusCode::kNotFound, {(folder_ / "key").string()});
  WriteFile<Key>(folder_ / "key", KeyRange(0, 2));
  ExpectError(status(), StatusCode::kNotFound, {(folder_ / "emb_vector").string()});
  fs::create_directory(folder_ / "emb_vector");
  ExpectError(status(), StatusCode::kInvalidArgument, {(folder_ / "emb_vector").string(), "not a file"});
  fs::remove(folder_ / "emb_vector");
  ASSERT_EQ(::mkfifo((folder_ / "emb_vector").c_str(), 0600), 0);  // opening it must not wait for a writer
  ExpectError(status(), StatusCode::kInvalidArgument, {(folder_ / "emb_vector").string(), "not a file"});
}

TEST_F(Loader, SizesThatDoNotMatchAreRefused) {
  const auto status = [&](uint32_t width) {
    EXPECT_EQ(FingerprintTableFolder(folder_, width).status().ToString(),
              OpenTableFolder(folder_, width).status().ToString());
    return OpenTableFolder(folder_, width).status();
  };
  WriteFolder(folder_, {}, NumberedValues(3));
  ExpectError(status(kWidth), StatusCode::kDataLoss, {(folder_ / "key").string(), "empty"});
  WriteFolder(folder_, KeyRange(0, 3), {});
  ExpectError(status(kWidth), StatusCode::kDataLoss, {(folder_ / "emb_vector").string(), "empty"});

  WriteFolder(folder_, KeyRange(0, 3), NumberedValues(3));
  ASSERT_OK(status(kWidth));
  ExpectError(status(0), StatusCode::kInvalidArgument, {"width 0"});
  ExpectError(status(8), StatusCode::kInvalidArgument, {"192 bytes", "3 keys", "need 96", "fit width 16"});

  fs::resize_file(folder_ / "emb_vector", 3 * kRowBytes - 5);
  ExpectError(status(kWidth), StatusCode::kDataLoss, {"187 bytes", "need 192", "truncated"});
  fs::resize_file(folder_ / "emb_vector", 3 * kRowBytes);
  fs::resize_file(folder_ / "key", 2 * sizeof(Key) + 3);
  ExpectError(status(kWidth), StatusCode::kDataLoss, {(folder_ / "key").string(), "19 bytes", "multiple of 8"});
}

TEST_F(Loader, AFileThatChangesUnderTheReaderIsDataLoss) {
  WriteFolder(folder_, KeyRange(0, kSeveralChunks), NumberedValues(kSeveralChunks));
  const auto read_all = [](ModelReader& reader) {
    for (;;) {
      auto chunk = reader.Next();
      if (!chunk.ok()) return chunk.status();
      if (chunk->keys.empty()) return OkStatus();
    }
  };
  auto reader = OpenTableFolder(folder_, kWidth);
  ASSERT_OK((*reader)->Next().status());
  fs::resize_file(folder_ / "emb_vector", 1000);
  ExpectError(read_all(**reader), StatusCode::kDataLoss, {(folder_ / "emb_vector").string()});

  WriteFolder(folder_, KeyRange(0, kSeveralChunks), NumberedValues(kSeveralChunks));
  reader = OpenTableFolder(folder_, kWidth);
  ASSERT_OK((*reader)->Next().status());
  fs::last_write_time(folder_ / "key", fs::last_write_time(folder_ / "key") + std::chrono::seconds(1));
  ExpectError(read_all(**reader), StatusCode::kDataLoss, {(folder_ / "key").string(), "changed"});

  reader = OpenTableFolder(folder_, kWidth);
  ASSERT_OK(read_all(**reader));
  fs::rename(folder_, directory_ / "elsewhere");  // the reader keeps its files
  ASSERT_OK((*reader)->Rewind());
  ASSERT_OK(read_all(**reader));
}

TEST_F(Loader, KeysFromZeroOnAreCounted) {
  fs::create_directories(folder_);
  const auto count = [&](const std::vector<Key>& keys, uint64_t rows, uint64_t whole_rows = 8 << 20) {
    std::ofstream file(folder_ / "key", std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(keys.data()), static_cast<std::streamsize>(keys.size() * sizeof(Key)));
    file.close();
    const auto counted = CountDenseKeys(folder_, rows, whole_rows);
    EXPECT_TRUE(counted.ok()) << counted.status().ToString();
    return counted.ok() ? *counted : DenseKeys();
  };
  std::vector<Key> keys(3'000);
  std::iota(keys.rbegin(), keys.rend(), 0);  // 2999 .. 0
  EXPECT_EQ(count(keys, 3'000).rows, 3'000u);
  EXPECT_FALSE(count(keys, 3'000).others_early);
  EXPECT_EQ(count(keys, 0).rows, 0u);
  const DenseKeys none = count(keys, 1'000);
  EXPECT_EQ(none.rows, 0u);
  EXPECT_TRUE(none.others_early);
  keys[200] = -1;
  EXPECT_EQ(count(keys, 3'000).rows, 2'999u);
  EXPECT_FALSE(count(keys, 3'000).others_early);  // 200 > 3000 / 16
  keys[150] = std::numeric_limits<Key>::max();
  EXPECT_TRUE(count(keys, 3'000).others_early);

  // Two million keys, every fourth another: read in blocks, and estimated.
  std::vector<Key> many(2'000'000);
  for (size_t i = 0; i < many.size(); ++i) many[i] = i % 4 == 0 ? -1 : static_cast<Key>(i);
  EXPECT_FALSE(count(many, many.size()).sampled);
  const DenseKeys sampled = count(many, many.size(), 1'000'000);
  EXPECT_TRUE(sampled.sampled && sampled.others_early);
  EXPECT_NEAR(static_cast<double>(sampled.rows), 1'500'000, 15'000);
  EXPECT_EQ(CountDenseKeys(folder_, 3'000'000).status().code(), StatusCode::kDataLoss);
  EXPECT_EQ(CountDenseKeys(folder_ / "none", 1).status().code(), StatusCode::kNotFound);
}

TEST_F(Loader, FingerprintTellsVersionsApart) {
  WriteFolder(folder_, KeyRange(0, kSeveralChunks), NumberedValues(kSeveralChunks));
  const fs::path rows = folder_ / "emb_vector";
  const std::string first = Fingerprint();
  EXPECT_EQ(Fingerprint(), first);
  const auto time = fs::last_write_time(rows);
  fs::last_write_time(rows, time + std::chrono::nanoseconds(1));
  EXPECT_NE(Fingerprint(), first) << "touched";
  fs::last_write_time(rows, time);
  EXPECT_EQ(Fingerprint(), first);

  for (const uint64_t offset : {uint64_t{0}, fs::file_size(rows) - 1}) {  // the first and the last byte always count
    std::fstream file(rows, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(offset));
    file.put('\x55');
    file.close();
    fs::last_write_time(rows, time);
    EXPECT_NE(Fingerprint(), first) << "offset " << offset;
  }
  WriteFolder(folder_, KeyRange(1, kSeveralChunks), NumberedValues(kSeveralChunks));
  const std::string second = Fingerprint();
  EXPECT_NE(second, first);
  fs::last_write_time(rows, time);
  EXPECT_NE(Fingerprint(), first) << "other keys";
  WriteFolder(folder_, KeyRange(1, 10), NumberedValues(10));
  EXPECT_NE(Fingerprint(), second);
}

TEST_F(Loader, EveryByteOfASmallFolderCounts) {
  const std::vector<float> values = NumberedValues(40);
  WriteFolder(folder_, KeyRange(0, 40), values);
  const fs::path rows = folder_ / "emb_vector";
  const auto time = fs::last_write_time(rows);
  const std::string first = Fingerprint();
  for (size_t i = 0; i < values.size(); ++i) {
    std::vector<float> changed = values;
    changed[i] += 1.0f;
    WriteFile<float>(rows, changed);
    fs::last_write_time(rows, time);
    EXPECT_NE(Fingerprint(), first) << "value " << i;
  }
}

// ---- loading ----------------------------------------------------------------------------------------------------

TEST_F(Loader, LoadsEveryTargetAndReportsTheTruth) {
  const std::vector<Key> keys = KeyRange(-100, kSeveralChunks);
  const std::vector<float> values = NumberedValues(kSeveralChunks);
  WriteFolder(folder_, keys, values);
  auto rocksdb = OpenRocksDbStore({.path = directory_ / "database"});
  ASSERT_OK(rocksdb.status());
  auto persistent = (*rocksdb)->CreateTable({.name = "hps_et.m.t", .row_bytes = kRowBytes});
  ASSERT_OK(persistent.status());
  const auto whole = Create("whole");
  const auto limited = Create("limited");
  const auto none = Create("none");
  LoadReport report;
  ASSERT_OK(Load({persistent->get(), whole.get(), limited.get(), none.get()},
                 {.row_limits = {kSeveralChunks, std::numeric_limits<uint64_t>::max(), 70'001, 0}}, &report));
  EXPECT_EQ(report.rows_read, kSeveralChunks);
  EXPECT_EQ(report.rows_written, (std::vector<uint64_t>{kSeveralChunks, kSeveralChunks, 70'001, 0}));
  EXPECT_EQ(report.bytes_read, kSeveralChunks * (sizeof(Key) + kRowBytes));
  EXPECT_EQ(report.duplicate_keys, 0u);
  EXPECT_EQ(report.non_finite_rows, 0u);
  EXPECT_GT(report.seconds, 0.0);
  EXPECT_DOUBLE_EQ(report.rows_per_second(), static_cast<double>(kSeveralChunks) / report.seconds);

  EXPECT_EQ(whole->Stats()->rows, kSeveralChunks);
  EXPECT_EQ(limited->Stats()->rows, 70'001u);
  EXPECT_EQ(none->Stats()->rows, 0u);
  for (size_t row = 0; row < kSeveralChunks; row += 997) {
    ASSERT_EQ(ReadRow(**persistent, keys[row]), Slice(values, row));
    ASSERT_EQ(ReadRow(*whole, keys[row]), Slice(values, row));
    ASSERT_EQ(ReadRow(*limited, keys[row]), row < 70'001 ? Slice(values, row) : std::vector<float>());
  }
}

TEST_F(Loader, ReadsNoFurtherThanTheLimits) {
  WriteFolder(folder_, KeyRange(0, kSeveralChunks), NumberedValues(kSeveralChunks));
  const auto table = Create("t");
  LoadReport report;
  ASSERT_OK(Load({table.get()}, {.row_limits = {10}}, &report));
  EXPECT_EQ(report.rows_written[0], 10u);
  EXPECT_LT(report.rows_read, kSeveralChunks / 2);
  EXPECT_EQ(report.duplicate_keys, std::nullopt);
}

TEST_F(Loader, LaterDuplicatesWinAndAreCounted) {
  std::vector<Key> keys = KeyRange(0, kSeveralChunks);
  keys[5] = 4;                   // within a chunk
  keys[kSeveralChunks - 1] = 3;  // across chunks
  const std::vector<float> values = NumberedValues(kSeveralChunks);
  WriteFolder(folder_, keys, values);
  const auto table = Create("t");
  LoadReport report;
  ASSERT_OK(Load({table.get()}, {}, &report));
  EXPECT_EQ(report.duplicate_keys, 2u);
  EXPECT_EQ(report.rows_written[0], kSeveralChunks);
  EXPECT_EQ(ReadRow(*table, 4), Slice(values, 5));
  EXPECT_EQ(ReadRow(*table, 3), Slice(values, kSeveralChunks - 1));
  ASSERT_OK(Load({table.get()}, {}, &report));
  EXPECT_EQ(report.duplicate_keys, std::nullopt) << "not known: the table was not empty";
}

TEST_F(Loader, KeysOutsideInt32AreRefusedIn32BitMode) {
  for (const Key key : {Key{INT32_MAX} + 1, Key{INT32_MIN} - 1}) {
    std::vector<Key> keys = KeyRange(0, kSeveralChunks);
    keys[0] = INT32_MIN;
    keys[1] = INT32_MAX;
    keys[150'000] = key;
    WriteFolder(folder_, keys, NumberedValues(kSeveralChunks));
    const auto table = Create("t" + std::to_string(key));
    LoadReport report;
    ExpectError(Load({table.get()}, {.table = "m/t", .long_keys = false}, &report), StatusCode::kOutOfRange,
                {"m/t", "row 150000", std::to_string(key), "supportlonglong"});
    EXPECT_EQ(report.rows_written[0], report.rows_read);
    EXPECT_LT(report.rows_read, 150'000u);
    EXPECT_EQ(table->Stats()->rows, report.rows_read) << "the report tells how far it came";
    ASSERT_OK(Load({table.get()}, {.long_keys = true}, &report));
    EXPECT_FALSE(ReadRow(*table, key).empty());
  }
}

TEST_F(Loader, NonFiniteRowsAreLoadedCountedAndWarnedAboutOnce) {
  std::vector<float> values = NumberedValues(kSeveralChunks);
  uint32_t payload = 0x7fc12345;  // a NaN whose bits must come through
  std::memcpy(&values[3 * kWidth + 2], &payload, sizeof(payload));
  values[3 * kWidth + 3] = std::numeric_limits<float>::infinity();
  values[63 * kWidth + kWidth - 1] = -std::numeric_limits<float>::infinity();
  values[(kSeveralChunks - 1) * kWidth + kWidth - 1] = std::nanf("");
  values[7 * kWidth] = std::numeric_limits<float>::max();
  values[8 * kWidth] = std::numeric_limits<float>::denorm_min();
  WriteFolder(folder_, KeyRange(0, kSeveralChunks), values);
  const auto table = Create("t");
  CapturedLog log;
  LoadReport report;
  ASSERT_OK(Load({table.get()}, {.table = "m/t"}, &report));
  EXPECT_EQ(report.non_finite_rows, 3u);
  ASSERT_EQ(log.lines().size(), 1u);
  EXPECT_NE(log.lines()[0].find("warning: table \"m/t\": 3 of 200000 rows hold NaN"), std::string::npos)
      << log.lines()[0];
  EXPECT_EQ(std::memcmp(ReadRow(*table, 3).data(), &values[3 * kWidth], kRowBytes), 0);
}

TEST_F(Loader, TargetsThatDoNotFitAreRefused) {
  WriteFolder(folder_, KeyRange(0, 10), NumberedValues(10));
  const auto table = Create("t");
  const auto wide = Create("wide", 2 * kRowBytes);
  LoadReport report;
  ExpectError(Load({table.get(), wide.get()}, {.table = "m/t"}, &report), StatusCode::kInvalidArgument,
              {"m/t", "64 bytes", "wide", "128"});
  ExpectError(Load({table.get()}, {.table = "m/t", .row_limits = {1, 2}}, &report), StatusCode::kInvalidArgument,
              {"m/t", "2 row limits for 1 targets"});
  EXPECT_EQ(table->Stats()->rows, 0u);
  ExpectError(CopyTable(*table, *wide, {.table = "m/t"}, &report), StatusCode::kInvalidArgument, {"m/t", "128"});
}

TEST_F(Loader, ATargetThatFailsEndsTheLoad) {
  WriteFolder(folder_, KeyRange(0, kSeveralChunks), NumberedValues(kSeveralChunks));
  const auto good = Create("good");
  const auto bad = Create("bad");
  auto other = OpenRocksDbStore({.path = directory_ / "database"});
  auto closed = (*other)->CreateTable({.name = "closed", .row_bytes = kRowBytes});
  ASSERT_OK(closed.status());
  ASSERT_OK((*other)->Close());
  LoadReport report;
  ExpectError(Load({good.get(), closed->get()}, {}, &report), StatusCode::kFailedPrecondition, {"closed"});
  EXPECT_GT(report.rows_written[0], 0u);
  EXPECT_EQ(report.rows_written[1], 0u);
  ExpectError(CopyTable(*good, **closed, {}, &report), StatusCode::kFailedPrecondition, {"closed"});
  ExpectError(CopyTable(**closed, *bad, {}, &report), StatusCode::kFailedPrecondition, {"closed"});
}

// ---- copying ----------------------------------------------------------------------------------------------------

TEST_F(Loader, CopyKeepsWhatTheTargetAlreadyHolds) {
  WriteFolder(folder_, KeyRange(0, kSeveralChunks), NumberedValues(kSeveralChunks));
  const auto from = Create("from");
  LoadReport report;
  ASSERT_OK(Load({from.get()}, {}, &report));
  const auto to = Create("to", kRowBytes, kSeveralChunks);
  const std::vector<float> newer(kWidth, -1.0f);
  const Key key = 77;
  ASSERT_OK(to->Upsert(std::span(&key, 1), {reinterpret_cast<const std::byte*>(newer.data()), kRowBytes}));
  ASSERT_OK(CopyTable(*from, *to, {}, &report));
  EXPECT_EQ(report.rows_read, kSeveralChunks);
  EXPECT_EQ(report.rows_written, std::vector<uint64_t>{kSeveralChunks});
  EXPECT_EQ(to->Stats()->rows, kSeveralChunks);
  EXPECT_EQ(ReadRow(*to, key), newer);
  EXPECT_EQ(ReadRow(*to, 78), ReadRow(*from, 78));
}

TEST_F(Loader, CopyEndsAtTheLimit) {
  WriteFolder(folder_, KeyRange(0, 5000), NumberedValues(5000));
  const auto from = Create("from");
  LoadReport report;
  ASSERT_OK(Load({from.get()}, {}, &report));
  for (const uint64_t limit : {0, 1, 4999, 5000, 5001}) {
    const auto to = Create("to" + std::to_string(limit));
    ASSERT_OK(CopyTable(*from, *to, {.row_limits = {limit}}, &report));
    EXPECT_EQ(to->Stats()->rows, std::min<uint64_t>(limit, 5000));
    EXPECT_EQ(report.rows_written[0], std::min<uint64_t>(limit, 5000));
  }
}

// ---- progress ---------------------------------------------------------------------------------------------------

TEST_F(Loader, ProgressIsReportedAtMostTwiceASecondAndAtTheEnd) {
  WriteFolder(folder_, KeyRange(0, kSeveralChunks), NumberedValues(kSeveralChunks));
  const auto table = Create("t");
  std::vector<LoadProgress> calls;
  const LoadOptions options = {.progress = [&](const LoadProgress& progress) { calls.push_back(progress); }};
  LoadReport report;
  ASSERT_OK(Load({table.get()}, options, &report));
  ASSERT_FALSE(calls.empty());
  EXPECT_LE(static_cast<double>(calls.size()), report.seconds * 2 + 1);
  for (size_t i = 0; i < calls.size(); ++i) EXPECT_EQ(calls[i].finished, i + 1 == calls.size());
  EXPECT_EQ(calls.back().rows_done, kSeveralChunks);
  EXPECT_EQ(calls.back().rows_total, kSeveralChunks);
  EXPECT_EQ(calls.back().seconds_left, 0.0);

  calls.clear();
  ASSERT_OK(CopyTable(*table, *Create("copy", kRowBytes, kSeveralChunks), options, &report));
  ASSERT_FALSE(calls.empty());
  EXPECT_TRUE(calls.back().finished);
  EXPECT_EQ(calls.back().rows_done, kSeveralChunks);
}

TEST_F(Loader, LogSpeaksOnlyOfLongLoads) {
  CapturedLog log;
  const LoadProgressCallback quick = LogLoadProgress("m/quick");
  quick({.rows_done = 10, .rows_total = 20, .seconds = 1.0, .rows_per_second = 10, .seconds_left = 1.0});
  quick({.rows_done = 20, .rows_total = 20, .seconds = 1.9, .rows_per_second = 10, .finished = true});
  EXPECT_TRUE(log.lines().empty());

  const LoadProgressCallback slow = LogLoadProgress("m/slow");
  const auto at = [&](double seconds, uint64_t rows, bool finished = false) {
    slow({.rows_done = rows,
          .rows_total = 40'000'000,
          .seconds = seconds,
          .rows_per_second = 2e6,
          .seconds_left = 17,
          .finished = finished});
  };
  at(1.5, 3'000'000);
  at(2.0, 4'000'000);
  at(2.5, 5'000'000);
  at(12.5, 25'000'000);
  at(20, 40'000'000, true);
  EXPECT_EQ(log.lines(),
            (std::vector<std::string>{"loading m/slow: 4.00 of 40.00 M rows (10 %), 2.00 M rows/s, 17 s left",
                                      "loading m/slow: 25.00 of 40.00 M rows (62 %), 2.00 M rows/s, 17 s left",
                                      "loaded m/slow: 40.00 M rows in 20.0 s (2.00 M rows/s)"}));
}

// ---- memory -----------------------------------------------------------------------------------------------------

uint64_t AnonymousBytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("RssAnon:")) return std::strtoull(line.c_str() + 8, nullptr, 10) * 1024;
  }
  return 0;
}

// Loads `folder` into a hash map and prints the rows and the largest growth of anonymous memory seen meanwhile.
int MeasureLoad(const std::string& folder) {
  std::unique_ptr<Executor> executor = NewThreadPool(2);
  auto store = OpenHashMapStore({.num_partitions = 8, .executor = executor.get()});
  auto reader = OpenTableFolder(folder, kWidth);
  if (!store.ok() || !reader.ok()) return 1;
  const uint64_t before = AnonymousBytes();
  std::atomic<bool> done{false};
  uint64_t peak = 0;
  std::thread sampler([&] {
    while (!done) peak = std::max(peak, AnonymousBytes());
  });
  auto table =
      (*store)->CreateTable({.name = "t", .row_bytes = (*reader)->row_bytes(), .expected_rows = (*reader)->rows()});
  Table* const targets[] = {table->get()};
  LoadReport report;
  const Status status = LoadTable(**reader, targets, {}, &report);
  done = true;
  sampler.join();
  peak = std::max(peak, AnonymousBytes());
  std::cout << (*table)->Stats()->rows << " " << peak - before << std::endl;
  std::cerr << status.ToString() << ", " << report.rows_per_second() * 1e-6 << " M rows/s" << std::endl;
  return status.ok() ? 0 : 1;
}

TEST_F(Loader, MemoryOfALoadStaysWithinItsBound) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers take memory of their own";
#endif
  constexpr uint64_t kRows = 2'000'000;
  const uint64_t seed = std::random_device{}();
  std::cout << "seed " << seed << std::endl;
  std::mt19937_64 random(seed);
  std::vector<Key> keys(kRows);
  for (Key& key : keys) key = static_cast<Key>(random());
  WriteFolder(folder_, keys, NumberedValues(kRows));

  const fs::path program = fs::read_symlink("/proc/self/exe");
  std::FILE* child = ::popen((program.string() + " --measure-load=" + folder_.string()).c_str(), "r");
  ASSERT_NE(child, nullptr);
  uint64_t rows = 0;
  uint64_t peak_bytes = 0;
  EXPECT_EQ(std::fscanf(child, "%lu %lu", &rows, &peak_bytes), 2);
  EXPECT_EQ(::pclose(child), 0);
  EXPECT_EQ(rows, kRows);
  // A row, and its key and slot at the load factor of the index.
  const double row_bytes = kRowBytes + (sizeof(Key) + 8) / 0.8;
  EXPECT_LE(static_cast<double>(peak_bytes), 1.1 * kRows * row_bytes);
  EXPECT_GE(peak_bytes, kRows * kRowBytes) << "the measurement itself is broken";
  std::cout << "peak " << static_cast<double>(peak_bytes) / kRows << " bytes a row" << std::endl;
}

}  // namespace

int RunLoaderTests(int argc, char** argv) {
  constexpr std::string_view kMeasure = "--measure-load=";
  if (argc == 2 && std::string_view(argv[1]).starts_with(kMeasure)) return MeasureLoad(argv[1] + kMeasure.size());
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}

}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunLoaderTests(argc, argv); }
