// kill -9 at any moment of a load into a database that holds an older version of the model: afterwards one version is
// there, whole, in all tables; what is missing is loaded at the next start. parameter_server_test.cc stops such a load
// at each step that matters; here the moments are random, and what the killed ones leave behind piles up.

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <random>

#include "cc/tests/core_fixture.h"

namespace hps::testing {
namespace {

using std::chrono::steady_clock;

constexpr uint32_t kWidth = 16;
constexpr size_t kRows = 40'000;  // enough for sorted files
constexpr Key kStep = 100;        // each version lacks so many keys of the one before, and has as many new ones

std::vector<Key> KeysOf(uint32_t version) { return KeyRange(static_cast<Key>(version) * kStep, kRows); }

ServerConfig Config(const fs::path& folder, bool read_only) {
  ServerConfig config =
      MakeServer(Tiers::kPersistent, folder / "database",
                 {MakeModel("m", {MakeTable("a", folder / "a", kWidth), MakeTable("b", folder / "b", kWidth)})});
  config.persistent_db.read_only = read_only;
  return config;
}

void WriteVersion(const fs::path& folder, uint32_t version) {
  for (const char* table : {"a", "b"}) WriteTable(folder / table, KeysOf(version), kWidth, version);
}

// Starts a server, which loads what is new, and waits to be killed.
int RunRole(const std::string&, const fs::path& folder) {
  std::printf("begun\n");
  std::fflush(stdout);
  const auto server = ParameterServer::Open(Config(folder, false), {.show_progress = false});
  std::printf("%s\n", server.status().ToString().c_str());
  std::fflush(stdout);
  for (;;) ::pause();
}

// What is wrong with rows of which each is to be of `version`; nothing: "".
std::string Wrong(const Rows& rows, const std::vector<Key>& keys, uint32_t version) {
  const Key first = static_cast<Key>(version) * kStep;
  for (size_t i = 0; i < keys.size(); ++i) {
    const bool expected = keys[i] >= first && keys[i] < first + static_cast<Key>(kRows);
    const std::string key = "key " + std::to_string(keys[i]);
    if (rows.found[i] != expected) return key + (expected ? " is missing" : " is too much");
    for (size_t j = 0; expected && j < kWidth; ++j) {
      if (rows.values[i * kWidth + j] != Element(keys[i], version, j)) return key + " has another row";
    }
  }
  return "";
}

// The version that every table holds, with all its rows and no other; 0: there is no such version.
uint32_t VersionServed(const ParameterServer& server, uint32_t newest) {
  const std::vector<Key> keys = KeyRange(0, static_cast<size_t>(newest) * kStep + kRows + 1);
  uint32_t version = 0;
  for (uint32_t table : {0, 1}) {
    const Rows rows = Lookup(server, "m", table, kWidth, keys);
    EXPECT_TRUE(rows.status.ok()) << rows.status.ToString();
    const size_t any = kRows;  // a key that all versions of this test hold
    if (version == 0) version = static_cast<uint32_t>(rows.values[any * kWidth]);
    const std::string wrong = Wrong(rows, keys, version);
    EXPECT_EQ(wrong, "") << "table " << table << " of version " << version;
    if (!wrong.empty()) return 0;
  }
  return version;
}

TEST(ReloadCrash, OneVersionIsThereWhole) {
  const uint64_t seed = std::getenv("HPS_TEST_SEED") ? std::strtoull(std::getenv("HPS_TEST_SEED"), nullptr, 10)
                                                     : std::random_device{}() % 1'000'000;
  const int kills = std::getenv("HPS_TEST_KILLS") ? std::atoi(std::getenv("HPS_TEST_KILLS")) : 12;
  std::cout << "HPS_TEST_SEED=" << seed << std::endl;
  std::mt19937_64 random(seed);
  TempFolder folder;
  uint32_t newest = 1;
  WriteVersion(folder.path(), newest);
  const auto begin = steady_clock::now();
  ASSERT_OK(Value(ParameterServer::Open(Config(folder.path(), false), {.show_progress = false}))->Close());
  const auto load_time = std::chrono::duration_cast<std::chrono::microseconds>(steady_clock::now() - begin);
  uint32_t stored = newest;
  int old_ones = 0;
  for (int kill = 0; kill < kills; ++kill) {
    SCOPED_TRACE("kill " + std::to_string(kill) + ", HPS_TEST_SEED=" + std::to_string(seed));
    WriteVersion(folder.path(), ++newest);
    {
      ChildProcess child("load", folder / "");
      child.WaitForLine("begun");
      const auto wait = random() % static_cast<uint64_t>(load_time.count() * 2);
      const auto moment = steady_clock::now() + std::chrono::microseconds(wait);
      while (steady_clock::now() < moment) ::sched_yield();
      child.Kill();
    }
    // As the killed one has left it.
    auto reader = Value(ParameterServer::Open(Config(folder.path(), true), {.show_progress = false}));
    const uint32_t left = VersionServed(*reader, newest);
    ASSERT_TRUE(left == stored || left == newest) << left << ", was " << stored << ", loaded was " << newest;
    ASSERT_OK(reader->Close());
    stored = left;
    old_ones += left != newest;
    if (random() % 2 == 0) continue;  // the next load finds what this one has left
    auto server = Value(ParameterServer::Open(Config(folder.path(), false), {.show_progress = false}));
    ASSERT_EQ(VersionServed(*server, newest), newest);
    ASSERT_OK(server->Close());
    stored = newest;
  }
  std::cout << kills << " kills, " << old_ones << " before the new version counted" << std::endl;
  auto server = Value(ParameterServer::Open(Config(folder.path(), false), {.show_progress = false}));
  EXPECT_EQ(VersionServed(*server, newest), newest);
}

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunTests(argc, argv, hps::testing::RunRole); }
