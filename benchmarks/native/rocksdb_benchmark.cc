// How fast the RocksDB store loads and reads, beside RocksDB's plain calls on the same rows in the same run.
//
// Each line of output is one measurement in JSON; rows are checked before they are timed. Keys are scattered over 64
// bits and come in random order. Loading: "bulk" (bulk upserts and a flush) takes turns with "batches" (sorted write
// batches of 10,000 rows past the log and a flush) and "upserts" (logged, and a flush). Reading: batches of 65,536
// random keys from the page cache through Fetch, beside loops of Get and MultiGet over a database opened with RocksDB's
// options for point lookups. Rates are rows a second of wall time; the best of the rounds. Usage:
//   rocksdb_benchmark FOLDER [rows ...]     (default 2000000; FOLDER is made, and removed again)

#include <rocksdb/db.h>
#include <rocksdb/options.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cc/storage/rocksdb_store.h"
#include "cc/storage/stored_order.h"

namespace hps {
namespace {

namespace fs = std::filesystem;

constexpr size_t kChunkRows = 60'000;  // as the loader's chunks
constexpr size_t kFetchKeys = 65'536;
constexpr size_t kBatchRows = 10'000;
constexpr int kRounds = 4;
constexpr int kFetchRounds = 15;
const std::string kTable = "hps_et.m.t";

void Check(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}
void Check(const rocksdb::Status& status) { Check(status.ok() ? OkStatus() : Internal(status.ToString())); }

// What a load left in the folder is removed, and what the system still has to write is written, before the next begins.
void CleanUp(const fs::path& folder) {
  fs::remove_all(folder);
  ::sync();
}

double Seconds(const std::function<void()>& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Rows {
  Rows(size_t count, size_t row_bytes) : row_bytes(row_bytes), keys(count), bytes(count * row_bytes) {
    std::mt19937_64 random(1);
    for (size_t i = 0; i < count; ++i) keys[i] = static_cast<Key>((i + 1) * 0x9E3779B97F4A7C15ull);
    std::shuffle(keys.begin(), keys.end(), random);
    for (size_t i = 0; i < count; ++i) {
      for (size_t at = 0; at + 4 <= row_bytes; at += 4) {
        const float value = static_cast<float>(static_cast<uint64_t>(keys[i]) >> 40) + static_cast<float>(at);
        std::memcpy(bytes.data() + i * row_bytes + at, &value, 4);
      }
    }
  }
  const std::byte* row(size_t i) const { return bytes.data() + i * row_bytes; }

  const size_t row_bytes;
  std::vector<Key> keys;
  std::vector<std::byte> bytes;
};

void LoadThroughStore(const fs::path& folder, const Rows& rows, bool bulk) {
  auto store = OpenRocksDbStore({.path = folder});
  Check(store.status());
  auto table = (*store)->CreateTable({.name = kTable, .row_bytes = rows.row_bytes});
  Check(table.status());
  for (size_t first = 0; first < rows.keys.size(); first += kChunkRows) {
    const size_t count = std::min(kChunkRows, rows.keys.size() - first);
    Check((*table)->Upsert({rows.keys.data() + first, count}, {rows.row(first), rows.row_bytes}, {.bulk = bulk}));
  }
  Check((*store)->Flush());
  Check((*store)->Close());
}

void LoadInBatches(const fs::path& folder, const Rows& rows) {
  rocksdb::Options options;
  options.create_if_missing = true;
  options.compression = rocksdb::kNoCompression;
  options.OptimizeForPointLookup(64);
  options.IncreaseParallelism(16);
  rocksdb::DB* db = nullptr;
  Check(rocksdb::DB::Open(options, folder.string(), &db));
  rocksdb::WriteOptions past_the_log;
  past_the_log.disableWAL = true;
  for (size_t first = 0; first < rows.keys.size(); first += kBatchRows) {
    std::vector<KeyIndex> order;
    for (size_t i = first; i < std::min(first + kBatchRows, rows.keys.size()); ++i) order.push_back({rows.keys[i], i});
    SortStored(&order);
    rocksdb::WriteBatch batch;
    for (const KeyIndex& key : order) {
      Check(batch.Put(rocksdb::Slice(reinterpret_cast<const char*>(&key.key), 8),
                      rocksdb::Slice(reinterpret_cast<const char*>(rows.row(key.index)), rows.row_bytes)));
    }
    Check(db->Write(past_the_log, &batch));
  }
  Check(db->Flush(rocksdb::FlushOptions()));
  Check(db->Close());
  delete db;
}

void MeasureLoad(const fs::path& folder, const Rows& rows) {
  double bulk = 1e9, batches = 1e9, upserts = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    CleanUp(folder);
    batches = std::min(batches, Seconds([&] { LoadInBatches(folder, rows); }));
    CleanUp(folder);
    upserts = std::min(upserts, Seconds([&] { LoadThroughStore(folder, rows, false); }));
    CleanUp(folder);
    bulk = std::min(bulk, Seconds([&] { LoadThroughStore(folder, rows, true); }));
  }
  const double count = static_cast<double>(rows.keys.size());
  std::printf(
      "{\"kind\": \"rocksdb_load\", \"rows\": %zu, \"row_bytes\": %zu, \"bulk_mrows\": %.3f, \"batches_mrows\": %.3f, "
      "\"upserts_mrows\": %.3f, \"bulk_over_batches\": %.2f, \"bulk_over_upserts\": %.2f}\n",
      rows.keys.size(), rows.row_bytes, count / bulk / 1e6, count / batches / 1e6, count / upserts / 1e6,
      batches / bulk, upserts / bulk);
  std::fflush(stdout);
}

// Reads what the last load of MeasureLoad has left.
void MeasureFetch(const fs::path& folder, const Rows& rows) {
  std::mt19937_64 random(2);
  std::vector<size_t> asked(kFetchKeys);
  std::vector<Key> keys(kFetchKeys);
  std::vector<std::byte> out(kFetchKeys * rows.row_bytes);
  const auto draw = [&] {
    for (size_t i = 0; i < kFetchKeys; ++i) keys[i] = rows.keys[asked[i] = random() % rows.keys.size()];
  };
  const auto check = [&] {
    for (size_t i = 0; i < kFetchKeys; ++i) {
      if (std::memcmp(out.data() + i * rows.row_bytes, rows.row(asked[i]), rows.row_bytes) != 0) {
        Check(Internal("a row differs"));
      }
    }
  };
  const std::unique_ptr<Executor> threads = NewThreadPool(static_cast<int>(std::thread::hardware_concurrency()));
  auto one = OpenRocksDbStore({.path = folder, .read_only = true});
  auto all = OpenRocksDbStore({.path = folder, .read_only = true, .executor = threads.get()});
  Check(one.status());
  Check(all.status());
  auto table = (*one)->OpenTable({.name = kTable, .row_bytes = rows.row_bytes});
  auto table_all = (*all)->OpenTable({.name = kTable, .row_bytes = rows.row_bytes});
  Check(table.status());
  Check(table_all.status());
  const auto fetch = [&](Table& from) {
    std::vector<uint32_t> misses;
    Check(from.Fetch({.keys = keys, .rows = {out.data(), rows.row_bytes}}, &misses));
    if (!misses.empty()) Check(Internal("rows are missing"));
  };

  rocksdb::Options options;
  options.OptimizeForPointLookup(64);
  rocksdb::DB* db = nullptr;
  std::vector<rocksdb::ColumnFamilyHandle*> handles;
  Check(
      rocksdb::DB::OpenForReadOnly(options, folder.string(), {{"default", options}, {kTable, options}}, &handles, &db));
  const auto key_slice = [&](size_t i) { return rocksdb::Slice(reinterpret_cast<const char*>(&keys[i]), 8); };
  const auto get = [&] {
    rocksdb::PinnableSlice row;
    for (size_t i = 0; i < kFetchKeys; ++i) {
      Check(db->Get(rocksdb::ReadOptions(), handles[1], key_slice(i), &row));
      std::memcpy(out.data() + i * rows.row_bytes, row.data(), rows.row_bytes);
      row.Reset();
    }
  };
  const auto multi_get = [&] {
    std::vector<rocksdb::Slice> slices(kBatchRows);
    std::vector<rocksdb::Status> statuses(kBatchRows);
    for (size_t first = 0; first < kFetchKeys; first += kBatchRows) {
      const size_t count = std::min(kBatchRows, kFetchKeys - first);
      std::vector<rocksdb::PinnableSlice> found(count);
      for (size_t i = 0; i < count; ++i) slices[i] = key_slice(first + i);
      db->MultiGet(rocksdb::ReadOptions(), handles[1], count, slices.data(), found.data(), statuses.data());
      for (size_t i = 0; i < count; ++i) {
        Check(statuses[i]);
        std::memcpy(out.data() + (first + i) * rows.row_bytes, found[i].data(), rows.row_bytes);
      }
    }
  };

  const std::vector<std::function<void()>> bodies = {[&] { fetch(**table); }, [&] { fetch(**table_all); }, get,
                                                     multi_get};
  std::vector<double> best(bodies.size(), 1e9);
  for (int round = 0; round < kFetchRounds; ++round) {
    draw();
    for (size_t i = 0; i < bodies.size(); ++i) {
      std::fill(out.begin(), out.end(), std::byte{0});
      best[i] = std::min(best[i], Seconds(bodies[i]));
      check();
    }
  }
  const auto rate = [&](size_t i) { return kFetchKeys / best[i] / 1e6; };
  std::printf(
      "{\"kind\": \"rocksdb_fetch\", \"rows\": %zu, \"row_bytes\": %zu, \"keys\": %zu, \"fetch_mrows\": %.3f, "
      "\"threads\": %d, \"fetch_threads_mrows\": %.3f, \"get_loop_mrows\": %.3f, \"multi_get_mrows\": %.3f, "
      "\"fetch_over_get_loop\": %.2f, \"fetch_over_multi_get\": %.2f}\n",
      rows.keys.size(), rows.row_bytes, kFetchKeys, rate(0), threads->parallelism(), rate(1), rate(2), rate(3),
      best[2] / best[0], best[3] / best[0]);
  std::fflush(stdout);
  for (rocksdb::ColumnFamilyHandle* handle : handles) Check(db->DestroyColumnFamilyHandle(handle));
  Check(db->Close());
  delete db;
}

}  // namespace
}  // namespace hps

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: rocksdb_benchmark FOLDER [rows ...]\n");
    return 2;
  }
  const std::filesystem::path folder = std::filesystem::path(argv[1]) / "rocksdb_benchmark";
  std::vector<size_t> row_counts;
  for (int i = 2; i < argc; ++i) row_counts.push_back(std::strtoull(argv[i], nullptr, 10));
  if (row_counts.empty()) row_counts.push_back(2'000'000);
  for (const size_t count : row_counts) {
    for (const size_t row_bytes : {64, 256}) {
      const hps::Rows rows(count, row_bytes);
      hps::MeasureLoad(folder, rows);
      hps::MeasureFetch(folder, rows);
    }
  }
  std::filesystem::remove_all(folder);
}
