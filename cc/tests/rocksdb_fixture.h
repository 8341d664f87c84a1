// What the tests of the RocksDB store share: helpers, a fixture with a folder, and other processes. A test program
// whose main is RunRocksDbTests starts itself again as Child(role, folder), which then runs its RunRole.

#ifndef HPS_TESTS_ROCKSDB_FIXTURE_H_
#define HPS_TESTS_ROCKSDB_FIXTURE_H_

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cc/storage/rocksdb_store.h"
#include "cc/tests/row_pattern.h"

namespace hps::testing {

namespace fs = std::filesystem;

constexpr size_t kRowBytes = 64;
inline const TableSpec kSpec = {.name = "hps_et.dlrm.sparse_embedding0", .row_bytes = kRowBytes};

#define ASSERT_OK(expression)                                    \
  do {                                                           \
    const Status assert_status = (expression);                   \
    ASSERT_TRUE(assert_status.ok()) << assert_status.ToString(); \
  } while (false)

inline void ExpectError(const Status& status, StatusCode code, const std::vector<std::string>& parts) {
  EXPECT_EQ(status.code(), code) << status.ToString();
  for (const std::string& part : parts) {
    EXPECT_NE(status.message().find(part), std::string::npos) << "no '" << part << "' in " << status.ToString();
  }
}

inline std::vector<Key> KeyRange(Key first, size_t count) {
  std::vector<Key> keys(count);
  std::iota(keys.begin(), keys.end(), first);
  return keys;
}

inline Status Put(Table& table, const std::vector<Key>& keys, uint32_t version, const UpsertOptions& options = {}) {
  const RowBlock rows = RowBlock::Of(keys, version, table.spec().row_bytes);
  return table.Upsert(keys, rows.source(), options);
}

// How many of the keys are there in `version`; a row of another version or torn fails the test.
inline size_t CountRows(const Table& table, const std::vector<Key>& keys, uint32_t version) {
  RowBlock rows(keys.size(), table.spec().row_bytes);
  std::vector<uint32_t> misses;
  const Status status = table.Fetch({.keys = keys, .rows = rows.buffer()}, &misses);
  EXPECT_TRUE(status.ok()) << status.ToString();
  std::vector<bool> missing(keys.size());
  for (uint32_t position : misses) missing[position] = true;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (missing[i]) continue;
    EXPECT_EQ(RowVersion(keys[i], rows.row(i)), version) << "key " << keys[i];
  }
  return keys.size() - misses.size();
}

inline Status FetchStatus(const Table& table, const std::vector<Key>& keys) {
  RowBlock rows(keys.size(), table.spec().row_bytes);
  std::vector<uint32_t> misses;
  return table.Fetch({.keys = keys, .rows = rows.buffer()}, &misses);
}

inline Result<std::unique_ptr<TableStore>> Open(const fs::path& path, bool read_only = false) {
  return OpenRocksDbStore({.path = path, .num_threads = 2, .read_only = read_only});
}

inline void Say(const std::string& line) { std::cout << line << std::endl; }
// Lasts until standard input ends.
inline void WaitForParent() {
  char byte;
  while (::read(STDIN_FILENO, &byte, 1) > 0) {
  }
}

class Child {
 public:
  Child(const std::string& role, const fs::path& path) {
    int input[2], output[2];
    EXPECT_EQ(::pipe2(input, O_CLOEXEC), 0);
    EXPECT_EQ(::pipe2(output, O_CLOEXEC), 0);
    process_ = ::fork();
    if (process_ == 0) {
      ::dup2(input[0], STDIN_FILENO);
      ::dup2(output[1], STDOUT_FILENO);
      ::execl("/proc/self/exe", "test", ("--role=" + role).c_str(), path.c_str(), nullptr);
      ::_exit(127);
    }
    ::close(input[0]);
    ::close(output[1]);
    input_ = input[1];
    output_ = output[0];
  }
  ~Child() { Kill(); }

  // The next line; empty at the end of the output, or after a minute without one.
  std::string ReadLine() {
    std::string line;
    for (;;) {
      pollfd poll_for{.fd = output_, .events = POLLIN, .revents = 0};
      char byte;
      if (::poll(&poll_for, 1, 60'000) <= 0 || ::read(output_, &byte, 1) <= 0 || byte == '\n') return line;
      line += byte;
    }
  }
  void Kill() {
    if (process_ >= 0) ::kill(process_, SIGKILL);
    Wait();
  }
  // Waits for its end; returns the status of waitpid.
  int Wait() {
    int status = 0;
    if (process_ < 0) return status;
    ::waitpid(process_, &status, 0);
    ::close(input_);
    ::close(output_);
    process_ = -1;
    return status;
  }

 private:
  pid_t process_ = -1;
  int input_ = -1;
  int output_ = -1;
};

class RocksDbStore : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "hps_rocksdb_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    path_ = directory_ / "database";
  }
  void TearDown() override { fs::remove_all(directory_); }

  std::unique_ptr<TableStore> MustOpen(bool read_only = false) {
    auto store = Open(path_, read_only);
    EXPECT_TRUE(store.ok()) << store.status().ToString();
    return store.ok() ? std::move(store).value() : nullptr;
  }
  // Makes the database with the rows of `keys` in version 1, flushed into a table file.
  void Make(const std::vector<Key>& keys) {
    auto store = MustOpen();
    auto table = store->CreateTable(kSpec);
    ASSERT_OK(table.status());
    ASSERT_OK(Put(**table, keys, 1, {.bulk = true}));
    ASSERT_OK(store->Flush());
    ASSERT_OK(store->Close());
  }
  fs::path TableFile() const {
    for (const auto& entry : fs::directory_iterator(path_)) {
      if (entry.path().extension() == ".sst") return entry.path();
    }
    ADD_FAILURE() << "no table file";
    return {};
  }

  fs::path directory_;
  fs::path path_;
};

// Runs `role` with the folder in the process of a Child, or all tests.
inline int RunRocksDbTests(int argc, char** argv, void (*run_role)(const std::string& role, const std::string& path)) {
  constexpr std::string_view kRole = "--role=";
  if (argc == 3 && std::string_view(argv[1]).starts_with(kRole)) {
    run_role(argv[1] + kRole.size(), argv[2]);
    std::_Exit(0);
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}

}  // namespace hps::testing

#endif  // HPS_TESTS_ROCKSDB_FIXTURE_H_
