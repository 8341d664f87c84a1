// kill -9 at any moment loses nothing that was acknowledged. A child works on a database and notes beside it, in a
// file, each step that it begins and each that was acknowledged. It is killed at random moments, many times; each time
// the database is compared with what the notes allow: an acknowledged upsert or erase is there, bulk rows are there
// after an acknowledged flush; of a step that was under way, and of bulk rows before a flush, each row may be there or
// not.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <map>
#include <random>
#include <set>

#include "cc/tests/rocksdb_fixture.h"
#include "cc/tests/rocksdb_races.h"

namespace hps::testing {
namespace {

constexpr Key kKeys = 50'000;

// What a step does follows from the seed and its number, which is also the version of the rows that it writes.
struct Step {
  enum Kind { kUpsert, kErase, kBulk, kFlush } kind = kFlush;
  std::vector<Key> keys;
};

Step MakeStep(uint64_t seed, uint32_t number) {
  std::mt19937_64 random(seed * 1'000'003 + number);
  Step step;
  const uint64_t choice = random() % 20;
  size_t count = 0;
  if (choice < 8) {
    step.kind = Step::kUpsert;
    count = random() % 300;
  } else if (choice < 11) {
    step.kind = Step::kErase;
    count = random() % 200;
  } else if (choice < 15) {
    step.kind = Step::kBulk;
    count = random() % 2 == 0 ? random() % 100 : 35'000 + random() % 10'000;  // the larger become files
  }
  for (size_t i = 0; i < count; ++i) step.keys.push_back(static_cast<Key>(random() % kKeys));
  return step;
}

// Works until it is killed. Notes: "<step> begun" and "<step> done".
void RunRole(const std::string& role, const std::string& path) {
  const uint64_t seed = std::strtoull(role.substr(role.find('/') + 1).c_str(), nullptr, 10);
  auto number = static_cast<uint32_t>(std::strtoul(role.substr(role.rfind('/') + 1).c_str(), nullptr, 10));
  std::ofstream notes(path + ".notes", std::ios::app);
  auto store = Open(path);
  if (!store.ok()) return Say(store.status().ToString());
  auto table = (*store)->OpenTable(kSpec);
  if (!table.ok()) table = (*store)->CreateTable(kSpec);
  if (!table.ok()) return Say(table.status().ToString());
  for (;; ++number) {
    const Step step = MakeStep(seed, number);
    notes << number << " begun" << std::endl;
    Status status;
    switch (step.kind) {
      case Step::kUpsert: status = Put(**table, step.keys, number); break;
      case Step::kErase: status = (*table)->Erase(step.keys); break;
      case Step::kBulk: status = Put(**table, step.keys, number, {.bulk = true}); break;
      case Step::kFlush: status = (*store)->Flush(); break;
    }
    if (!status.ok()) return Say(status.ToString());
    notes << number << " done" << std::endl;
    Say("done");
  }
}

class RocksDbCrash : public RocksDbStore {};

TEST_F(RocksDbCrash, NothingAcknowledgedIsLost) {
  const uint64_t seed = std::getenv("HPS_TEST_SEED") ? std::strtoull(std::getenv("HPS_TEST_SEED"), nullptr, 10)
                                                     : std::random_device{}() % 1'000'000;
  const int kills = std::getenv("HPS_TEST_KILLS") ? std::atoi(std::getenv("HPS_TEST_KILLS")) : 12;
  std::cout << "HPS_TEST_SEED=" << seed << std::endl;
  std::mt19937_64 random(seed);
  std::vector<uint32_t> stored(kKeys, 0);  // the version of each key's row, 0: none
  uint32_t next = 1;
  uint64_t checked = 0;
  for (int kill = 0; kill < kills; ++kill) {
    fs::remove(path_.string() + ".notes");
    {
      Child child("churn/" + std::to_string(seed) + "/" + std::to_string(next), path_);
      for (uint64_t steps = random() % 40; steps > 0; --steps) ASSERT_EQ(child.ReadLine(), "done") << "kill " << kill;
      const auto moment = std::chrono::steady_clock::now() + std::chrono::microseconds(random() % 20'000);
      while (std::chrono::steady_clock::now() < moment) ::sched_yield();
    }  // killed

    std::vector<std::set<uint32_t>> allowed(kKeys);
    std::vector<uint32_t> latest = stored;  // written last, kept or not
    for (Key key = 0; key < kKeys; ++key) allowed[key] = {stored[key]};
    std::ifstream notes(path_.string() + ".notes");
    uint32_t number = 0;
    std::string word;
    std::map<uint32_t, bool> steps;  // done?
    while (notes >> number >> word) steps[number] = word == "done";
    for (const auto& [step_number, done] : steps) {
      const Step step = MakeStep(seed, step_number);
      const uint32_t version = step.kind == Step::kErase ? 0 : step_number;
      if (step.kind == Step::kFlush && done) {
        for (Key key = 0; key < kKeys; ++key) allowed[key] = {latest[key]};
      }
      for (const Key key : step.keys) {
        if (done && step.kind != Step::kBulk) allowed[key].clear();
        allowed[key].insert(version);
        latest[key] = version;
      }
      next = step_number + 1;
    }

    auto store = MustOpen();
    auto table = store->OpenTable(kSpec);
    if (table.status().code() == StatusCode::kNotFound && steps.empty()) continue;  // killed before it had a table
    ASSERT_OK(table.status());
    std::vector<uint32_t> found(kKeys, 0);
    ASSERT_OK((*table)->Scan([&](std::span<const Key> keys, ConstRowBuffer rows) {
      for (size_t i = 0; i < keys.size(); ++i) {
        const auto version = RowVersion(keys[i], {rows.data + i * rows.stride_bytes, kRowBytes});
        if (!version || keys[i] < 0 || keys[i] >= kKeys) return DataLoss("key " + std::to_string(keys[i]));
        found[keys[i]] = *version;
      }
      return OkStatus();
    }));
    for (Key key = 0; key < kKeys; ++key) {
      ASSERT_TRUE(allowed[key].contains(found[key]))
          << "kill " << kill << ", key " << key << " has version " << found[key] << ", HPS_TEST_SEED=" << seed;
    }
    EXPECT_FALSE(fs::exists(path_ / "hps_bulk")) << "files of a load that was cut short";
    checked += steps.size();
    stored = found;
    ASSERT_OK(store->Close());
  }
  std::cout << checked << " steps, " << kills << " kills" << std::endl;
  EXPECT_GT(checked, 0u);
}

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunRocksDbTests(argc, argv, hps::testing::RunRole); }
