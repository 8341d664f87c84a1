// Checks the device cache on a GPU against a map on the host: query, fill, insert, eviction, update, erase and dump,
// for rows of every alignment. With HPS_TEST_ROUNDS=N also queries, inserts, updates and erasures side by side on
// several streams, with rows that prove themselves. Exit code: 0 all right, 1 something wrong or no GPU. HPS_TEST_SEED
// repeats a run.

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda_kernels/device_cache.h"

namespace hps::cuda {
namespace {

std::atomic<int> checks{0};
std::atomic<int> failures{0};

#define CHECK_CUDA(call)                                              \
  do {                                                                \
    const int check_error = static_cast<int>(call);                   \
    if (check_error != 0) {                                           \
      std::printf("line %d: %s\n", __LINE__, ErrorText(check_error)); \
      std::exit(1);                                                   \
    }                                                                 \
  } while (false)
#define EXPECT(condition, ...)                                                                       \
  do {                                                                                               \
    ++checks;                                                                                        \
    if (!(condition)) {                                                                              \
      if (failures++ < 20) {                                                                         \
        std::printf("line %d: %s: ", __LINE__, #condition), std::printf(__VA_ARGS__), std::puts(""); \
      }                                                                                              \
    }                                                                                                \
  } while (false)

constexpr float kDefault = -3.25f;

// Element 0 is the version, the others follow from key, version and column; all are exact floats.
float Element(int64_t key, uint32_t version, uint32_t column) {
  if (column == 0) return static_cast<float>(version);
  return static_cast<float>(CacheHash(key * 1000003 + version * 8191 + column) >> 44);
}
std::vector<float> RowOf(int64_t key, uint32_t version, uint32_t width) {
  std::vector<float> row(width);
  for (uint32_t j = 0; j < width; ++j) row[j] = Element(key, version, j);
  return row;
}
// The version of a row, or -1 where it is no whole row of the key. Rows of width 1 prove nothing but their version.
int VersionOf(int64_t key, const float* row, uint32_t width) {
  const auto version = static_cast<uint32_t>(row[0]);
  for (uint32_t j = 0; j < width; ++j) {
    if (row[j] != Element(key, version, j)) return -1;
  }
  return static_cast<int>(version);
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    CHECK_CUDA(cudaMalloc(&data_, std::max<size_t>(count, 1) * sizeof(T)));
    CHECK_CUDA(cudaMemset(data_, 0, std::max<size_t>(count, 1) * sizeof(T)));
  }
  DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { Set(values); }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* get() const { return data_; }
  void Set(const std::vector<T>& values) {
    CHECK_CUDA(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> Get(size_t count) const {
    std::vector<T> values(count);
    CHECK_CUDA(cudaMemcpy(values.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
  std::vector<T> Get() const { return Get(count_); }

 private:
  const size_t count_;
  T* data_ = nullptr;
};

class Table {
 public:
  Table(uint64_t num_buckets, uint32_t width)
      : width(width), buckets_(num_buckets), rows_(num_buckets * kCacheWays * width), activity_(1) {
    table = {buckets_.get(), num_buckets, rows_.get(), width * 4, false, activity_.get()};
    CHECK_CUDA(LaunchClear(table, nullptr));
  }
  void Insert(const std::vector<int64_t>& keys, uint32_t version, bool spill = false, uint32_t* evicted = nullptr) {
    const DeviceArray<int64_t> device_keys(keys);
    const DeviceArray<float> rows(Rows(keys, version));
    CHECK_CUDA(LaunchInsert(table, device_keys.get(), rows.get(), keys.size(), spill, evicted, nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  void Update(const std::vector<int64_t>& keys, uint32_t version) {
    const DeviceArray<int64_t> device_keys(keys);
    const DeviceArray<float> rows(Rows(keys, version));
    CHECK_CUDA(LaunchUpdate(table, device_keys.get(), rows.get(), keys.size(), nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  void Erase(const std::vector<int64_t>& keys) {
    const DeviceArray<int64_t> device_keys(keys);
    CHECK_CUDA(LaunchErase(table, device_keys.get(), keys.size(), nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  std::vector<int64_t> Dump(uint64_t first, uint64_t last) const {
    const DeviceArray<int64_t> keys((last - first) * kCacheWays);
    const DeviceArray<uint32_t> count(1);
    CHECK_CUDA(LaunchDump(table, first, last, keys.get(), count.get(), nullptr));
    return keys.Get(count.Get()[0]);
  }
  std::vector<float> Rows(const std::vector<int64_t>& keys, uint32_t version) const {
    std::vector<float> rows;
    for (int64_t key : keys) {
      const std::vector<float> row = RowOf(key, version, width);
      rows.insert(rows.end(), row.begin(), row.end());
    }
    return rows;
  }

  const uint32_t width;
  CacheTable table;

 private:
  DeviceArray<CacheBucket> buckets_;
  DeviceArray<float> rows_;
  DeviceArray<CacheActivity> activity_;
};

uint32_t PowerOfTwo(uint32_t at_least) {
  uint32_t size = 1;
  while (size < at_least) size *= 2;
  return size;
}

class Workspace {
 public:
  explicit Workspace(uint32_t max_positions)
      : first_wins_(PowerOfTwo(2 * max_positions)),
        positions_(max_positions),
        leaders_(max_positions),
        unique_of_(max_positions),
        counters_(4) {
    CHECK_CUDA(cudaHostAlloc(&missing, (max_positions + 1) * sizeof(MissingKey), cudaHostAllocMapped));
    CHECK_CUDA(cudaHostAlloc(&result, sizeof(QueryResult), cudaHostAllocMapped));
    std::memset(result, 0, sizeof(QueryResult));
    workspace = {first_wins_.get(), PowerOfTwo(2 * max_positions),
                 positions_.get(),  leaders_.get(),
                 unique_of_.get(),  counters_.get(),
                 &launched_,        nullptr,
                 nullptr,           max_positions};
    CHECK_CUDA(cudaHostGetDevicePointer(&workspace.missing, missing, 0));
    CHECK_CUDA(cudaHostGetDevicePointer(&workspace.result, result, 0));
    CHECK_CUDA(cudaDeviceSynchronize());  // the memory is zero before a stream that does not wait for this one uses it
  }
  ~Workspace() {
    cudaFreeHost(missing);
    cudaFreeHost(result);
  }
  // Waits for the mapped flag alone, as a lookup does.
  void Wait() const {
    const volatile uint64_t* done = &result->done;
    for (uint64_t spins = 0; *done >> 32 != stamp; ++spins) {
      // A kernel that died never says so there.
      if (spins % 1'000'000 == 999'999 && cudaStreamQuery(nullptr) != cudaErrorNotReady) {
        CHECK_CUDA(cudaDeviceSynchronize());
        if (*done >> 32 == stamp) break;
        std::printf("the query has ended without a result\n");
        std::exit(1);
      }
    }
    std::atomic_thread_fence(std::memory_order_acquire);
  }
  uint32_t missing_positions() const { return static_cast<uint32_t>(result->done); }
  uint32_t missing_keys() const { return missing_positions() == 0 ? 0 : result->missing_keys; }
  std::vector<uint32_t> Positions() const { return positions_.Get(missing_positions()); }

  QueryWorkspace workspace;
  MissingKey* missing = nullptr;
  QueryResult* result = nullptr;
  uint32_t stamp = 0;

 private:
  DeviceArray<uint64_t> first_wins_;
  DeviceArray<uint32_t> positions_, leaders_, unique_of_, counters_;
  uint32_t launched_ = 0;
};

struct Part {
  Part(const Table& table, std::vector<int64_t> asked, uint32_t offset = 0)
      : table(&table),
        keys(std::move(asked)),
        device_keys(keys),
        output(keys.size() * table.width + offset),
        offset(offset) {}
  QueryPart query() const {
    return {table->table, device_keys.get(), static_cast<uint32_t>(keys.size()), kDefault, output.get() + offset};
  }
  std::vector<float> rows() const {
    const std::vector<float> all = output.Get();
    return {all.begin() + offset, all.end()};
  }
  const Table* table;
  const std::vector<int64_t> keys;
  const DeviceArray<int64_t> device_keys;
  const DeviceArray<float> output;
  const uint32_t offset;  // floats; misaligns the output
};

// Asks, then checks rows, the list of missing keys and their positions; `held` says what must be there.
void AskAndCheck(const std::vector<const Part*>& parts, const std::vector<std::map<int64_t, uint32_t>>& held,
                 Workspace& workspace) {
  std::vector<QueryPart> queries;
  for (const Part* part : parts) queries.push_back(part->query());
  CHECK_CUDA(LaunchQuery(queries.data(), queries.size(), workspace.workspace, ++workspace.stamp, nullptr));
  workspace.Wait();
  CHECK_CUDA(cudaDeviceSynchronize());
  std::set<std::pair<size_t, int64_t>> expected_keys;
  std::set<uint32_t> expected_positions;
  uint32_t first = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    const Part& part = *parts[p];
    const std::vector<float> rows = part.rows();
    const uint32_t width = part.table->width;
    for (size_t i = 0; i < part.keys.size(); ++i) {
      const auto found = held[p].find(part.keys[i]);
      const std::vector<float> expected =
          found == held[p].end() ? std::vector<float>(width, kDefault) : RowOf(part.keys[i], found->second, width);
      EXPECT(std::equal(expected.begin(), expected.end(), rows.begin() + i * width),
             "width %u part %zu row %zu key %lld", width, p, i, (long long)part.keys[i]);
      if (found != held[p].end()) continue;
      expected_keys.insert({p, part.keys[i]});
      expected_positions.insert(first + i);
    }
    first += part.keys.size();
  }
  const std::vector<uint32_t> positions = workspace.Positions();
  EXPECT(std::set<uint32_t>(positions.begin(), positions.end()) == expected_positions &&
             positions.size() == expected_positions.size(),
         "%zu missing positions for %zu", positions.size(), expected_positions.size());
  std::set<std::pair<size_t, int64_t>> keys;
  for (uint32_t i = 0; i < workspace.missing_keys(); ++i) {
    const MissingKey& missing = workspace.missing[i];
    size_t p = 0;
    uint32_t begin = 0;
    while (p + 1 < parts.size() && missing.position >= begin + parts[p]->keys.size()) begin += parts[p++]->keys.size();
    EXPECT(parts[p]->keys[missing.position - begin] == missing.key, "position %u", missing.position);
    keys.insert({p, missing.key});
  }
  EXPECT(keys == expected_keys && keys.size() == workspace.missing_keys(), "%u unique keys for %zu",
         workspace.missing_keys(), expected_keys.size());
}

std::vector<int64_t> RandomKeys(std::mt19937_64& random, size_t count) {
  std::vector<int64_t> keys(count);
  for (int64_t& key : keys) key = static_cast<int64_t>(random());
  return keys;
}

const std::vector<int64_t> kExtremes = {0, -1, 1, std::numeric_limits<int64_t>::min(),
                                        std::numeric_limits<int64_t>::max()};

void CheckOneTable(uint32_t width, uint32_t offset, std::mt19937_64& random) {
  Table table(3000, width);  // so many buckets that none is full
  std::vector<int64_t> present = RandomKeys(random, 1000);
  present.insert(present.end(), kExtremes.begin(), kExtremes.end());
  table.Insert(present, 1, /*spill=*/true);
  std::map<int64_t, uint32_t> held;
  for (int64_t key : present) held[key] = 1;
  std::vector<int64_t> absent = RandomKeys(random, 300);
  absent.push_back(2);
  std::vector<int64_t> asked;
  for (int i = 0; i < 5000; ++i)
    asked.push_back(random() % 4 ? present[random() % present.size()] : absent[random() % absent.size()]);
  Workspace workspace(1 << 14);
  const Part part(table, asked, offset);
  AskAndCheck({&part}, {held}, workspace);

  // Fill: the missing rows come from staging, those of every third key from nowhere.
  const uint32_t missing = workspace.missing_keys();
  std::vector<uint64_t> offsets(missing);
  const size_t stride = (width * 4 + 15) / 16 * 4;
  std::vector<float> staging(missing * stride);
  for (uint32_t i = 0; i < missing; ++i) {
    const int64_t key = workspace.missing[i].key;
    if (i % 3 == 0) {
      offsets[i] = kNoRow;
      continue;
    }
    offsets[i] = i * stride * 4;
    const std::vector<float> row = RowOf(key, 2, width);
    std::copy(row.begin(), row.end(), staging.begin() + i * stride);
    held[key] = 2;
  }
  const DeviceArray<uint64_t> device_offsets(offsets);
  const DeviceArray<float> device_staging(staging);
  const QueryPart query = part.query();
  FillRequest fill{device_offsets.get(), device_staging.get(), workspace.missing_positions(), missing, true};
  CHECK_CUDA(LaunchFill(&query, 1, workspace.workspace, fill, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<float> filled = part.rows();
  for (size_t i = 0; i < asked.size(); ++i) {
    const auto found = held.find(asked[i]);
    const std::vector<float> expected =
        found == held.end() ? std::vector<float>(width, kDefault) : RowOf(asked[i], found->second, width);
    EXPECT(std::equal(expected.begin(), expected.end(), filled.begin() + i * width), "fill, width %u row %zu", width,
           i);
  }
  AskAndCheck({&part}, {held}, workspace);

  // Where every missing key has a row, in order, no offsets are needed; rows may be read from the host's memory.
  std::vector<int64_t> fresh = RandomKeys(random, 300);
  for (int i = 0; i < 50; ++i) fresh.push_back(fresh[random() % 300]);
  const Part anew(table, fresh, offset);
  AskAndCheck({&anew}, {held}, workspace);
  float *pinned = nullptr, *pinned_on_device = nullptr;
  CHECK_CUDA(cudaHostAlloc(&pinned, size_t{300} * width * sizeof(float), cudaHostAllocMapped));
  CHECK_CUDA(cudaHostGetDevicePointer(&pinned_on_device, pinned, 0));
  for (uint32_t i = 0; i < workspace.missing_keys(); ++i) {
    const int64_t key = workspace.missing[i].key;
    const std::vector<float> row = RowOf(key, 3, width);
    std::copy(row.begin(), row.end(), pinned + size_t{i} * width);
    held[key] = 3;
  }
  const QueryPart whole = anew.query();
  fill = {nullptr, pinned_on_device, workspace.missing_positions(), workspace.missing_keys(), true};
  CHECK_CUDA(LaunchFill(&whole, 1, workspace.workspace, fill, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<float> rows = anew.rows();
  for (size_t i = 0; i < fresh.size(); ++i) {
    const std::vector<float> expected = RowOf(fresh[i], 3, width);
    EXPECT(std::equal(expected.begin(), expected.end(), rows.begin() + i * width), "no offsets, width %u row %zu",
           width, i);
  }
  CHECK_CUDA(cudaFreeHost(pinned));
  AskAndCheck({&part}, {held}, workspace);
  AskAndCheck({&anew}, {held}, workspace);

  // An insert does not touch what is there; an update does, and adds nothing.
  table.Insert(present, 7);
  AskAndCheck({&part}, {held}, workspace);
  std::vector<int64_t> updated(present.begin(), present.begin() + 400);
  for (int64_t key : updated) held[key] = 9;
  updated.push_back(424242);
  table.Update(updated, 9);
  const std::vector<int64_t> erased(present.begin() + 300, present.begin() + 600);
  for (int64_t key : erased) held.erase(key);
  table.Erase(erased);
  AskAndCheck({&part}, {held}, workspace);
  std::set<int64_t> dumped, expected;
  for (const auto& [key, version] : held) expected.insert(key);
  size_t number = 0;
  for (uint64_t b = 0; b < 3000; b += 500) {
    const std::vector<int64_t> keys = table.Dump(b, b + 500);
    dumped.insert(keys.begin(), keys.end());
    number += keys.size();
  }
  EXPECT(dumped == expected && number == expected.size(), "dump of %zu keys for %zu", number, expected.size());
  table.Insert(erased, 3, true);
  for (int64_t key : erased) held[key] = 3;
  AskAndCheck({&part}, {held}, workspace);
}

void CheckManyParts(std::mt19937_64& random) {
  std::vector<std::unique_ptr<Table>> tables;
  std::vector<std::unique_ptr<Part>> parts;
  std::vector<std::map<int64_t, uint32_t>> held;
  std::vector<const Part*> pointers;
  for (uint32_t width : {16, 128, 1, 7, 64, 130, 2, 33, 16, 300}) {
    tables.push_back(std::make_unique<Table>(300 + random() % 100, width));
    std::vector<int64_t> keys = kExtremes;
    for (int i = 0; i < 100; ++i) keys.push_back(i + static_cast<int>(width));
    tables.back()->Insert(keys, width, true);
    held.emplace_back();
    for (int64_t key : keys) held.back()[key] = width;
    std::vector<int64_t> asked;
    const size_t count = width == 7 ? 0 : random() % 3000;
    for (size_t i = 0; i < count; ++i) asked.push_back(static_cast<int64_t>(random() % 500) - 1);
    parts.push_back(std::make_unique<Part>(*tables.back(), asked));
    pointers.push_back(parts.back().get());
  }
  Workspace workspace(1 << 15);
  for (int i = 0; i < 3; ++i) AskAndCheck(pointers, held, workspace);
  // Equal widths, and nothing at all.
  AskAndCheck({pointers[0], pointers[8]}, {held[0], held[8]}, workspace);
  AskAndCheck({}, {}, workspace);
  AskAndCheck({pointers[3]}, {held[3]}, workspace);
}

void CheckEviction(std::mt19937_64& random) {
  Table table(200, 16);
  Workspace workspace(1 << 14);
  const std::vector<int64_t> hot = RandomKeys(random, 400);
  const DeviceArray<uint32_t> evicted(1);
  table.Insert(hot, 1, false, evicted.get());
  const Part ask_hot(table, hot);
  const QueryPart query = ask_hot.query();
  std::vector<int64_t> inserted = hot;
  for (int round = 0; round < 20; ++round) {
    for (int i = 0; i < 2; ++i) CHECK_CUDA(LaunchQuery(&query, 1, workspace.workspace, ++workspace.stamp, nullptr));
    const std::vector<int64_t> cold = RandomKeys(random, 200);
    table.Insert(cold, 1, false, evicted.get());
    inserted.insert(inserted.end(), cold.begin(), cold.end());
  }
  std::vector<int64_t> left = table.Dump(0, 200);
  EXPECT(left.size() + evicted.Get()[0] == inserted.size(), "%zu left, %u evicted of %zu", left.size(),
         evicted.Get()[0], inserted.size());
  EXPECT(left.size() > 200 * kCacheWays * 95 / 100, "%zu rows in %d slots", left.size(), 200 * kCacheWays);
  std::map<int64_t, uint32_t> held;
  for (int64_t key : left) held[key] = 1;
  size_t hot_left = 0;
  for (int64_t key : hot) hot_left += held.count(key);
  EXPECT(hot_left > hot.size() * 95 / 100, "%zu of %zu hot rows are left", hot_left, hot.size());
  const Part all(table, inserted);
  AskAndCheck({&all}, {held}, workspace);
  // Nearly full, with second buckets.
  Table full(1000, 4);
  const std::vector<int64_t> many = RandomKeys(random, 7000 * 70 / 100);
  const DeviceArray<uint32_t> lost(1), lost_without(1);
  full.Insert(many, 1, true, lost.get());
  EXPECT(lost.Get()[0] < many.size() / 50, "%u of %zu rows lost", lost.Get()[0], many.size());
  Table without(1000, 4);
  without.Insert(many, 1, false, lost_without.get());
  EXPECT(lost.Get()[0] * 3 < lost_without.Get()[0], "%u rows lost with second buckets, %u without", lost.Get()[0],
         lost_without.Get()[0]);
}

void CheckRefusals() {
  Table table(16, 4);
  Workspace workspace(8);
  QueryPart query{table.table, nullptr, 9, 0.0f, nullptr};
  EXPECT(LaunchQuery(&query, 1, workspace.workspace, 1, nullptr) == cudaErrorInvalidValue, "more than max_positions");
  query.count = 1;
  EXPECT(LaunchQuery(&query, 1, workspace.workspace, 0, nullptr) == cudaErrorInvalidValue, "stamp 0");
  QueryWorkspace uncounted = workspace.workspace;
  uncounted.launched = nullptr;
  EXPECT(LaunchQuery(&query, 1, uncounted, 1, nullptr) == cudaErrorInvalidValue, "nowhere to count blocks");
  const QueryPart two[] = {query, query};
  const FillRequest no_offsets{nullptr, nullptr, 1, 1, false};
  EXPECT(LaunchFill(two, 2, workspace.workspace, no_offsets, nullptr) == cudaErrorInvalidValue, "no offsets");
  query.table.row_bytes = 6;
  EXPECT(LaunchQuery(&query, 1, workspace.workspace, 1, nullptr) == cudaErrorInvalidValue, "6 bytes");
  CacheTable small = table.table;
  small.num_buckets = 3;
  EXPECT(LaunchClear(small, nullptr) == cudaErrorInvalidValue, "3 buckets");
}

// What one thread of the test below works with. Made before any thread runs and freed when all have ended: allocating
// and freeing wait for whatever runs on the device, and readers run without a pause.
struct Reader {
  Reader(const Table& table, const std::vector<int64_t>& asked)
      : workspace(1 << 14), part(table, asked), rows(asked.size() * table.width) {
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  ~Reader() { cudaStreamDestroy(stream); }
  Workspace workspace;
  const Part part;
  std::vector<float> rows;
  cudaStream_t stream = nullptr;
};
struct Writer {
  Writer(const Table& table, size_t batch) : keys(batch), rows(batch * table.width) {
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  ~Writer() { cudaStreamDestroy(stream); }
  const DeviceArray<int64_t> keys;
  const DeviceArray<float> rows;
  cudaStream_t stream = nullptr;
};

// Readers check every row while writers change, evict and erase them; few buckets, so that all of it collides.
void CheckConcurrent(uint32_t width, uint64_t num_buckets, std::mt19937_64& random, int rounds) {
  Table table(num_buckets, width);
  const std::vector<int64_t> keys = RandomKeys(random, num_buckets * kCacheWays * 3 / 2);
  table.Insert(keys, 1);
  const size_t batch = std::min<size_t>(keys.size(), 2000);
  std::vector<std::unique_ptr<Reader>> readers;
  std::vector<std::unique_ptr<Writer>> writers;
  for (int i = 0; i < 3; ++i) {
    std::vector<int64_t> asked(8192);
    for (int64_t& key : asked) key = keys[random() % keys.size()];
    readers.push_back(std::make_unique<Reader>(table, asked));
    writers.push_back(std::make_unique<Writer>(table, batch));
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  std::atomic<bool> done{false};
  std::atomic<uint64_t> rows_found{0}, rows_missing{0};
  const auto read = [&](Reader& reader) {
    const QueryPart query = reader.part.query();
    while (!done) {
      Workspace& workspace = reader.workspace;
      for (int i = 0; i < 4; ++i) {
        CHECK_CUDA(LaunchQuery(&query, 1, workspace.workspace, ++workspace.stamp, reader.stream));
      }
      CHECK_CUDA(cudaMemcpyAsync(reader.rows.data(), reader.part.output.get(), reader.rows.size() * 4,
                                 cudaMemcpyDeviceToHost, reader.stream));
      CHECK_CUDA(cudaStreamSynchronize(reader.stream));
      uint64_t missing = 0;
      for (size_t i = 0; i < reader.part.keys.size(); ++i) {
        const float* row = &reader.rows[i * width];
        if (row[0] == kDefault) {
          ++missing;
          EXPECT(std::all_of(row, row + width, [](float x) { return x == kDefault; }), "a torn default row");
        } else {
          EXPECT(VersionOf(reader.part.keys[i], row, width) > 0, "a torn or foreign row of key %lld",
                 (long long)reader.part.keys[i]);
        }
      }
      EXPECT(missing == workspace.missing_positions(), "%llu missing rows, %u told", (unsigned long long)missing,
             workspace.missing_positions());
      rows_found += reader.part.keys.size() - missing;
      rows_missing += missing;
    }
  };
  const uint64_t seed = random();
  const auto write = [&](Writer& writer, int number) {
    std::mt19937_64 mine(seed + number);
    for (int round = 0; round < rounds; ++round) {
      std::vector<int64_t> some(batch);
      for (int64_t& key : some) key = keys[mine() % keys.size()];
      const std::vector<float> rows = table.Rows(some, 2 + (round * 4 + number) % 5000);
      CHECK_CUDA(cudaMemcpyAsync(writer.keys.get(), some.data(), batch * 8, cudaMemcpyHostToDevice, writer.stream));
      CHECK_CUDA(
          cudaMemcpyAsync(writer.rows.get(), rows.data(), rows.size() * 4, cudaMemcpyHostToDevice, writer.stream));
      CHECK_CUDA(cudaStreamSynchronize(writer.stream));
      for (int i = 0; i < 5; ++i) {
        CHECK_CUDA(LaunchUpdate(table.table, writer.keys.get(), writer.rows.get(), batch, writer.stream));
        CHECK_CUDA(LaunchInsert(table.table, writer.keys.get(), writer.rows.get(), batch, number == 1, nullptr,
                                writer.stream));
        if (number == 0) CHECK_CUDA(LaunchErase(table.table, writer.keys.get(), batch / 10, writer.stream));
      }
      CHECK_CUDA(cudaStreamSynchronize(writer.stream));
    }
  };
  std::vector<std::thread> reading, writing;
  for (int i = 0; i < 3; ++i) reading.emplace_back(read, std::ref(*readers[i]));
  for (int i = 0; i < 3; ++i) writing.emplace_back(write, std::ref(*writers[i]), i);
  for (std::thread& thread : writing) thread.join();
  done = true;
  for (std::thread& thread : reading) thread.join();
  // At rest: each key once, all rows whole.
  const std::vector<int64_t> left = table.Dump(0, num_buckets);
  EXPECT(std::set<int64_t>(left.begin(), left.end()).size() == left.size(), "a key twice");
  std::printf("side by side, width %u, %llu buckets: %llu rows found, %llu missing\n", width,
              (unsigned long long)num_buckets, (unsigned long long)rows_found.load(),
              (unsigned long long)rows_missing.load());
}

int Run() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("device_cache_check needs a GPU, and CUDA finds none here");
    return 1;
  }
  const char* text = std::getenv("HPS_TEST_SEED");
  const uint64_t seed = text != nullptr ? std::strtoull(text, nullptr, 10) : std::random_device()();
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  std::printf("HPS_TEST_SEED=%llu\n", (unsigned long long)seed);
  std::mt19937_64 random(seed);
  for (uint32_t width : {1, 2, 3, 4, 7, 8, 12, 16, 17, 18, 32, 64, 66, 100, 128, 130, 300}) {
    for (uint32_t offset : {0, 1}) CheckOneTable(width, offset, random);
  }
  CheckManyParts(random);
  CheckEviction(random);
  CheckRefusals();
  if (const char* rounds = std::getenv("HPS_TEST_ROUNDS")) {
    CheckConcurrent(128, 16, random, std::atoi(rounds));
    CheckConcurrent(130, 100, random, std::atoi(rounds));
    CheckConcurrent(16, 2000, random, std::atoi(rounds));
  }
  std::printf("%d passed, %d failed\n", checks.load() - failures.load(), failures.load());
  return failures != 0;
}

}  // namespace
}  // namespace hps::cuda

int main() { return hps::cuda::Run(); }
