// What the tests of the multi-process store share: shared memory of their own, rows that prove themselves, and the
// roles that this test program plays as another process.

#ifndef HPS_TESTS_MULTI_PROCESS_FIXTURE_H_
#define HPS_TESTS_MULTI_PROCESS_FIXTURE_H_

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <vector>

#include "cc/storage/multi_process_store.h"
#include "cc/tests/core_fixture.h"
#include "cc/tests/row_pattern.h"

namespace hps::testing {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

inline constexpr size_t kRowBytes = 68;  // no whole number of words of 8 bytes, more than a cache line
inline const std::string kTableName = "hps_et.m.t";

// 0, 1, ... for the dense index; scattered over all 64 bits for the hashed one.
inline std::vector<Key> Keys(size_t first, size_t count, bool dense) {
  std::vector<Key> keys(count);
  for (size_t i = 0; i < count; ++i) {
    keys[i] = static_cast<Key>(dense ? first + i : ((first + i) * 0x9E3779B97F4A7C15ull) | (1ull << 63));
  }
  return keys;
}

inline Status Put(Table& table, const std::vector<Key>& keys, uint32_t version, const UpsertOptions& options = {}) {
  return table.Upsert(keys, RowBlock::Of(keys, version, table.spec().row_bytes).source(), options);
}

// versions[i] is that of the row of keys[i], 0 where there is none. A torn or foreign row is a failure.
inline std::vector<uint32_t> Versions(const Table& table, const std::vector<Key>& keys) {
  RowBlock rows(keys.size(), table.spec().row_bytes);
  std::vector<uint32_t> misses;
  const Status status = table.Fetch({.keys = keys, .rows = rows.buffer()}, &misses);
  EXPECT_TRUE(status.ok()) << status.ToString();
  std::vector<uint32_t> versions(keys.size(), 0);
  size_t miss = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (miss < misses.size() && misses[miss] == i) {
      ++miss;
      EXPECT_TRUE(rows.RowUntouched(i)) << "the buffer of missing key " << keys[i] << " was written";
      continue;
    }
    const std::optional<uint32_t> version = RowVersion(keys[i], rows.row(i));
    EXPECT_TRUE(version.has_value()) << "key " << keys[i] << " came with a torn or foreign row";
    versions[i] = version.value_or(0);
  }
  return versions;
}

inline void ExpectVersion(const Table& table, const std::vector<Key>& keys, uint32_t version) {
  EXPECT_EQ(Versions(table, keys), std::vector<uint32_t>(keys.size(), version));
}

inline bool Exists(const std::string& name) {
  struct stat info;
  return ::stat(("/dev/shm/" + name).c_str(), &info) == 0;
}

// Bytes of memory that the file takes.
inline uint64_t TakenBytes(const std::string& name) {
  struct stat info = {};
  return ::stat(("/dev/shm/" + name).c_str(), &info) == 0 ? static_cast<uint64_t>(info.st_blocks) * 512 : 0;
}

// A few MiB, so that the tests work where /dev/shm is small.
inline MultiProcessOptions Options(const std::string& name) {
  return {.name = name, .bytes = 16 << 20, .num_partitions = 4, .allocation_rate_bytes = 1 << 20};
}
inline std::unique_ptr<TableStore> Open(const MultiProcessOptions& options) {
  return Value(OpenMultiProcessStore(options));
}
inline std::unique_ptr<TableStore> Open(const std::string& name) { return Open(Options(name)); }
inline std::shared_ptr<Table> Create(TableStore& store, uint64_t expected_rows = 0, size_t row_bytes = kRowBytes,
                                     const std::string& name = kTableName) {
  return Value(store.CreateTable({.name = name, .row_bytes = row_bytes, .expected_rows = expected_rows}));
}
inline std::shared_ptr<Table> OpenTable(TableStore& store, size_t row_bytes = kRowBytes) {
  return Value(store.OpenTable({.name = kTableName, .row_bytes = row_bytes}));
}

// Shared memory that is gone at the end of the test, whatever happens. Its name is `folder`'s, so that children can be
// told by it.
class MultiProcessTest : public ::testing::Test {
 protected:
  MultiProcessTest() : name((folder / "").parent_path().filename().string()) {}
  ~MultiProcessTest() override { ::shm_unlink(("/" + name).c_str()); }

  TempFolder folder;
  const std::string name;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_MULTI_PROCESS_FIXTURE_H_
