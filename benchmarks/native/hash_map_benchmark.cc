// How fast the hash map store reads and writes, beside the same table in shared memory (multi_process_hash_map) and a
// plain array gather of the same rows in the same run.
//
// Each line of output is one measurement in JSON; rows are checked before they are timed. "dense" keys are 0 .. rows -
// 1, "hashed" ones are scattered over 64 bits. All rates are per thread and second of processor time, so that other
// work on the machine disturbs them little. Usage:
//   hash_map_benchmark [rows ...]     (default 1000000)

#include "benchmarks/native/hash_map_benchmark.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cc/storage/hash_map_store.h"
#include "cc/storage/multi_process_store.h"
#include "hps/epoch.h"

namespace hps {
namespace {

void Measure(size_t rows, size_t width, bool dense) {
  const size_t row_bytes = width * 4;
  const char* kind = dense ? "dense" : "hashed";
  const auto key_of = [dense](uint64_t id) { return KeyOf(id, dense); };
  auto store = OpenHashMapStore({});
  Check(store.status());
  auto created = (*store)->CreateTable({.name = "t", .row_bytes = row_bytes, .expected_rows = rows});
  Check(created.status());
  Table& table = **created;
  auto shared_store = OpenMultiProcessStore({.name = "hps_benchmark_" + std::to_string(getpid())});
  Check(shared_store.status());
  auto shared_created = (*shared_store)->CreateTable({.name = "t", .row_bytes = row_bytes, .expected_rows = rows});
  Check(shared_created.status());
  Table& shared = **shared_created;

  // The rival: an array indexed by the id itself.
  const size_t array_bytes = rows * row_bytes;
  auto* array = static_cast<std::byte*>(
      mmap(nullptr, array_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  madvise(array, array_bytes, MADV_HUGEPAGE);
  for (size_t id = 0; id < rows; ++id) {
    for (size_t word = 0; word < width; ++word) {
      const float value = static_cast<float>(id * 7 + word);
      std::memcpy(array + id * row_bytes + word * 4, &value, 4);
    }
  }

  std::vector<Key> keys(rows);
  for (size_t i = 0; i < rows; ++i) keys[i] = key_of(i);
  const auto upsert_all = [&](Table& table) {
    for (size_t first = 0; first < rows; first += kBatch) {
      const size_t count = std::min(kBatch, rows - first);
      Check(table.Upsert({keys.data() + first, count}, {array + first * row_bytes, row_bytes}));
    }
  };
  for (Table* written : {&table, &shared}) {
    const double start = ThreadSeconds();
    upsert_all(*written);
    const double inserted = ThreadSeconds();
    upsert_all(*written);
    const double updated = ThreadSeconds();
    const double overhead_bytes = static_cast<double>(written->Stats()->memory_bytes) / static_cast<double>(rows) -
                                  static_cast<double>(row_bytes);
    std::printf(
        "{\"store\": \"%s\", \"rows\": %zu, \"width\": %zu, \"keys\": \"%s\", \"insert_mrows\": %.2f, "
        "\"update_mrows\": %.2f, \"overhead_bytes_per_row\": %.2f}\n",
        written == &table ? "hash_map" : "multi_process_hash_map", rows, width, kind, rows / (inserted - start) / 1e6,
        rows / (updated - inserted) / 1e6, overhead_bytes);
  }

  for (const bool zipf : {false, true}) {
    const std::vector<Key> ids = DrawIds(rows, zipf, 1);
    std::vector<Key> asked(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) asked[i] = key_of(ids[i]);
    for (const int threads : {1, 2}) {
      std::vector<std::vector<std::byte>> out(threads, std::vector<std::byte>(kBatch * row_bytes));
      std::vector<std::vector<uint32_t>> misses(threads);
      std::vector<std::vector<const std::byte*>> addresses(threads, std::vector<const std::byte*>(kBatch));
      const auto fetch_from = [&](const Table& read, int thread, int batch) {
        misses[thread].clear();
        Check(read.Fetch({.keys = {asked.data() + batch * kBatch, kBatch}, .rows = {out[thread].data(), row_bytes}},
                         &misses[thread]));
      };
      const auto fetch = [&](int thread, int batch) { fetch_from(table, thread, batch); };
      const auto shared_fetch = [&](int thread, int batch) { fetch_from(shared, thread, batch); };
      const auto locate = [&](int thread, int batch) {
        const EpochGuard guard;
        for (size_t first = 0; first < kBatch; first += 256) {
          Check(table.Locate({asked.data() + batch * kBatch + first, 256}, {addresses[thread].data(), 256}));
          for (size_t i = 0; i < 256; ++i) {
            std::memcpy(out[thread].data() + (first + i) * row_bytes, addresses[thread][i], row_bytes);
          }
        }
      };
      const auto gather = [&](int thread, int batch) {  // as TensorFlow's gather: one row ahead is asked for
        const Key* id = ids.data() + batch * kBatch;
        for (size_t i = 0; i < kBatch; ++i) {
          if (i + 1 < kBatch) __builtin_prefetch(array + id[i + 1] * row_bytes);
          std::memcpy(out[thread].data() + i * row_bytes, array + id[i] * row_bytes, row_bytes);
        }
      };
      for (const Table* read : {&table, &shared}) {
        for (int batch = 0; batch < kBatches; ++batch) {
          fetch_from(*read, 0, batch);
          if (!misses[0].empty()) Check(Internal("rows are missing"));
          for (size_t i = 0; i < kBatch; ++i) {
            const Key id = ids[batch * kBatch + i];
            if (std::memcmp(out[0].data() + i * row_bytes, array + id * row_bytes, row_bytes) != 0) {
              Check(Internal("a row differs"));
            }
          }
        }
      }
      const std::vector<double> rates = MillionIdsPerSecond(threads, {gather, fetch, locate, shared_fetch});
      std::printf(
          "{\"rows\": %zu, \"width\": %zu, \"keys\": \"%s\", \"ids\": \"%s\", \"threads\": %d, \"gather_mids\": %.1f, "
          "\"fetch_mids\": %.1f, \"locate_copy_mids\": %.1f, \"shared_fetch_mids\": %.1f, \"fetch_over_gather\": %.2f, "
          "\"shared_fetch_over_fetch\": %.2f}\n",
          rows, width, kind, zipf ? "zipf" : "uniform", threads, rates[0], rates[1], rates[2], rates[3],
          rates[1] / rates[0], rates[3] / rates[1]);
      std::fflush(stdout);
    }
  }
  munmap(array, array_bytes);
}

}  // namespace
}  // namespace hps

int main(int argc, char** argv) {
  std::vector<size_t> row_counts;
  for (int i = 1; i < argc; ++i) row_counts.push_back(std::strtoull(argv[i], nullptr, 10));
  if (row_counts.empty()) row_counts.push_back(1'000'000);
  for (const size_t rows : row_counts) {
    for (const size_t width : {16, 64, 128}) {
      for (const bool dense : {true, false}) hps::Measure(rows, width, dense);
    }
  }
}
