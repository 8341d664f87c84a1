// What the tests of the core share: table folders whose rows prove their key and version, configurations over them, and
// this test program started again as another process.

#ifndef HPS_TESTS_CORE_FIXTURE_H_
#define HPS_TESTS_CORE_FIXTURE_H_

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "cc/base/hash.h"
#include "cc/core/model.h"
#include "cc/tests/temp_folder.h"
#include "hps/log.h"
#include "hps/parameter_server.h"

namespace hps::testing {

namespace fs = std::filesystem;

inline constexpr float kDefault = -1.0f;

#define ASSERT_OK(expression)                                    \
  do {                                                           \
    const Status assert_status = (expression);                   \
    ASSERT_TRUE(assert_status.ok()) << assert_status.ToString(); \
  } while (false)

inline void ExpectError(const Status& status, StatusCode code, const std::vector<std::string>& parts = {}) {
  EXPECT_EQ(status.code(), code) << status.ToString();
  for (const std::string& part : parts) {
    EXPECT_NE(status.message().find(part), std::string::npos) << "no '" << part << "' in " << status.ToString();
  }
}

template <typename T>
T Value(Result<T> result) {
  if (!result.ok()) {
    ADD_FAILURE() << result.status().ToString();
    std::abort();
  }
  return std::move(result).value();
}

// Polls until `done` holds; a failure after a minute.
inline void WaitUntil(const std::function<bool()>& done, const std::string& what) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!done()) {
    ASSERT_LT(std::chrono::steady_clock::now(), end) << "waited in vain for " << what;
    std::this_thread::yield();
  }
}

inline std::vector<Key> KeyRange(Key first, size_t count) {
  std::vector<Key> keys(count);
  std::iota(keys.begin(), keys.end(), first);
  return keys;
}

// Element 0 of a row is its version, the others follow from key and version.
inline float Element(Key key, uint32_t version, size_t column) {
  if (column == 0) return static_cast<float>(version);
  return static_cast<float>(SlotHash(static_cast<uint64_t>(key) * 31 + version * 1000003ull + column) >> 44);
}
inline std::vector<float> Row(Key key, uint32_t version, uint32_t width) {
  std::vector<float> row(width);
  for (size_t j = 0; j < width; ++j) row[j] = Element(key, version, j);
  return row;
}

inline void WriteTable(const fs::path& folder, const std::vector<Key>& keys, uint32_t width, uint32_t version) {
  fs::create_directories(folder);
  std::ofstream key_file(folder / "key", std::ios::binary | std::ios::trunc);
  key_file.write(reinterpret_cast<const char*>(keys.data()), static_cast<std::streamsize>(keys.size() * sizeof(Key)));
  std::ofstream row_file(folder / "emb_vector", std::ios::binary | std::ios::trunc);
  for (Key key : keys) {
    const std::vector<float> row = Row(key, version, width);
    row_file.write(reinterpret_cast<const char*>(row.data()), static_cast<std::streamsize>(width * sizeof(float)));
  }
}

inline TableConfig MakeTable(const std::string& name, const fs::path& path, uint32_t width) {
  return {.name = name, .path = path.string(), .width = width, .max_keys_per_sample = 1, .default_value = kDefault};
}
inline ModelConfig MakeModel(const std::string& name, std::vector<TableConfig> tables) {
  ModelConfig model;
  model.name = name;
  model.tables = std::move(tables);
  model.gpucache = false;
  return model;
}

enum class Tiers { kVolatile, kPersistent, kBoth };

inline ServerConfig MakeServer(Tiers tiers, const fs::path& database, std::vector<ModelConfig> models) {
  ServerConfig config;
  config.models = std::move(models);
  config.origin = "test";
  config.volatile_db.type = tiers == Tiers::kPersistent ? VolatileType::kDisabled : VolatileType::kHashMap;
  config.volatile_db.num_partitions = 4;
  if (tiers != Tiers::kVolatile) {
    config.persistent_db.type = PersistentType::kRocksDb;
    config.persistent_db.path = database.string();
    config.persistent_db.num_threads = 2;
  }
  return config;
}

struct Rows {
  std::vector<float> values;
  std::vector<char> found;
  LookupReport report;
  Status status;
  uint32_t width = 0;

  std::vector<float> row(size_t i) const {
    return {values.begin() + static_cast<ptrdiff_t>(i * width),
            values.begin() + static_cast<ptrdiff_t>((i + 1) * width)};
  }
};

inline Rows Lookup(const LookupSession& session, uint32_t table, uint32_t width, const std::vector<Key>& keys) {
  Rows rows;
  rows.width = width;
  rows.values.assign(keys.size() * width, 12345.0f);
  rows.found.assign(keys.size(), 2);
  const DenseLookup lookup{table, width, keys, rows.values.data(), reinterpret_cast<bool*>(rows.found.data())};
  rows.status = session.Lookup(std::span(&lookup, 1), {}, &rows.report);
  return rows;
}
inline Rows Lookup(const ParameterServer& server, const std::string& model, uint32_t table, uint32_t width,
                   const std::vector<Key>& keys) {
  return Lookup(Value(server.NewSession(model)), table, width, keys);
}

// Every key has the row of `version`, or the default where version is 0.
inline void ExpectRows(const Rows& rows, const std::vector<Key>& keys, uint32_t version) {
  ASSERT_OK(rows.status);
  for (size_t i = 0; i < keys.size(); ++i) {
    const auto expected = version == 0 ? std::vector<float>(rows.width, kDefault) : Row(keys[i], version, rows.width);
    ASSERT_EQ(rows.row(i), expected) << "key " << keys[i] << ", version " << version;
    ASSERT_EQ(rows.found[i], version != 0) << "key " << keys[i];
  }
}

class CapturedLog {
 public:
  CapturedLog() {
    SetLogSink([this](LogLevel level, std::string_view line) {
      std::lock_guard lock(mutex_);
      text_ += (level == LogLevel::kWarning ? "warning: " : "") + std::string(line) + "\n";
    });
  }
  ~CapturedLog() { SetLogSink(nullptr); }
  std::string text() const {
    std::lock_guard lock(mutex_);
    return text_;
  }

 private:
  mutable std::mutex mutex_;
  std::string text_;
};

inline uint64_t AnonymousMemoryBytes() {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("RssAnon:")) return std::stoull(line.substr(8)) * 1024;
  }
  return 0;
}

// This test program again, with --role=ROLE FOLDER (see RunTests). What it prints can be waited for.
class ChildProcess {
 public:
  ChildProcess(const std::string& role, const fs::path& folder) {
    int ends[2];
    if (::pipe(ends) != 0) std::abort();
    const std::string argument = "--role=" + role;
    pid_ = ::fork();
    if (pid_ == 0) {
      ::dup2(ends[1], STDOUT_FILENO);
      ::close(ends[0]);
      ::close(ends[1]);
      ::execl("/proc/self/exe", "core_test", argument.c_str(), folder.c_str(), nullptr);
      ::_exit(127);
    }
    ::close(ends[1]);
    output_ = ::fdopen(ends[0], "r");
  }
  ~ChildProcess() {
    if (pid_ > 0) ::kill(pid_, SIGKILL);
    if (pid_ > 0) ::waitpid(pid_, nullptr, 0);
    std::fclose(output_);
  }
  void WaitForLine(const std::string& expected) {
    char line[256] = "";
    ASSERT_NE(std::fgets(line, sizeof(line), output_), nullptr) << "the child ended before it wrote " << expected;
    ASSERT_EQ(std::string(line), expected + "\n");
  }
  std::string ReadLine() {
    char line[256] = "";
    EXPECT_NE(std::fgets(line, sizeof(line), output_), nullptr) << "the child ended before it wrote a line";
    return line;
  }
  void Kill() {
    ::kill(pid_, SIGKILL);
    (void)Wait();
  }
  // The exit status as waitpid gives it.
  int Wait() {
    int status = -1;
    WaitUntil([&] { return ::waitpid(pid_, &status, WNOHANG) == pid_; }, "the end of the child process");
    if (status != -1) pid_ = -1;
    return status;
  }

 private:
  pid_t pid_ = -1;
  FILE* output_ = nullptr;
};

// Runs `body` in a forked child, which reports the number of its first failed check, or 0.
inline int InChild(const std::function<int()>& body) {
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(30);
    ::_exit(body());
  }
  int status = -1;
  WaitUntil([&] { return ::waitpid(child, &status, WNOHANG) == child; }, "the child");
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status;
}

// Of a call on what was opened before the fork.
inline bool Refused(const Status& status) {
  return status.code() == StatusCode::kFailedPrecondition && status.message().find("spawn") != std::string::npos;
}

// main() of a test program that has roles.
inline int RunTests(int argc, char** argv,
                    const std::function<int(const std::string& role, const fs::path&)>& run_role) {
  constexpr std::string_view kRole = "--role=";
  if (argc == 3 && std::string_view(argv[1]).starts_with(kRole)) return run_role(argv[1] + kRole.size(), argv[2]);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}

}  // namespace hps::testing

#endif  // HPS_TESTS_CORE_FIXTURE_H_
