// Processes that are killed while they write to a multi-process store: at every single instruction of one operation
// (the child is stepped by ptrace), and at random moments of a storm. Afterwards every row proves itself, nothing is
// locked, and every slot and every unit of memory is accounted for.

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iostream>
#include <random>

#include "cc/tests/multi_process_fixture.h"

namespace hps::testing {
namespace {

// One operation that is killed everywhere ----------------------------------------------------------------------------

using Work = std::function<Status()>;

struct Operation {
  std::string name;
  // Brings the store into the state from which the operation starts; the same each time.
  std::function<void(TableStore&)> prepare;
  // Gets all ready and returns what is done, and killed in the middle.
  std::function<Work(TableStore&, Table&)> begin;
  // What must hold when it was killed somewhere, and when it has ended.
  std::function<void(TableStore&)> check;
  std::function<void(TableStore&)> check_done;
  OverflowOptions overflow = {};
};

constexpr bool kDense = true;
constexpr bool kHashed = false;

void Recreate(TableStore& store, uint64_t expected_rows, const std::vector<Key>& keys) {
  (void)store.DropTable(kTableName);
  ASSERT_OK(Put(*Create(store, expected_rows), keys, 1));
}

void ExpectVersions(TableStore& store, const std::vector<Key>& keys, const std::vector<uint32_t>& allowed) {
  const auto table = OpenTable(store);
  for (const uint32_t version : Versions(*table, keys)) {
    EXPECT_NE(std::find(allowed.begin(), allowed.end(), version), allowed.end()) << version;
  }
}

// Puts the rows of `before` in version 1, and then those of `written` in version 2.
Operation Upserts(const std::string& name, uint64_t expected_rows, const std::vector<Key>& before,
                  const std::vector<Key>& written) {
  std::vector<Key> others;
  for (const Key key : before) {
    if (std::find(written.begin(), written.end(), key) == written.end()) others.push_back(key);
  }
  const bool update = others.size() < before.size();
  return {.name = name,
          .prepare = [=](TableStore& store) { Recreate(store, expected_rows, before); },
          .begin = [=](TableStore&, Table& table) -> Work {
            const auto rows = std::make_shared<RowBlock>(RowBlock::Of(written, 2, kRowBytes));
            return [=, &table] { return table.Upsert(written, rows->source()); };
          },
          .check =
              [=](TableStore& store) {
                ExpectVersions(store, others, {1});
                ExpectVersions(store, written, {update ? 1u : 0u, 2u});
              },
          .check_done = [=](TableStore& store) { ExpectVersions(store, written, {2}); }};
}

std::string With(const std::string& name, bool dense) { return name + (dense ? "Dense" : "Hashed"); }

Operation Update(bool dense) { return Upserts(With("Update", dense), 40, Keys(0, 20, dense), Keys(3, 2, dense)); }
Operation Insert(bool dense) { return Upserts(With("Insert", dense), 40, Keys(0, 20, dense), Keys(30, 2, dense)); }
// A region, and the dense index or the first hashed one, are made.
Operation FirstRow(bool dense) { return Upserts(With("FirstRow", dense), dense ? 20 : 0, {}, Keys(0, 1, dense)); }
// The index is full: it is replaced by a larger one, and so is the last region.
Operation Growth() { return Upserts("Growth", 0, Keys(0, 20, kHashed), Keys(20, 3, kHashed)); }

Operation Eviction() {
  Operation operation = Upserts("Eviction", 0, Keys(0, 16, kHashed), Keys(16, 1, kHashed));
  operation.overflow = {.margin = 16, .policy = OverflowPolicy::kEvictLeastUsed, .resolution_target = 0.5};
  operation.check = [](TableStore& store) { ExpectVersions(store, Keys(0, 17, kHashed), {0, 1, 2}); };
  operation.check_done = [](TableStore& store) {
    ExpectVersions(store, Keys(16, 1, kHashed), {2});
    EXPECT_EQ(OpenTable(store)->Stats()->rows, 8u);  // half of the margin
  };
  return operation;
}

Operation EraseRows(bool dense) {
  const std::vector<Key> erased = Keys(3, 2, dense);
  Operation operation = Upserts(With("Erase", dense), 40, Keys(0, 20, dense), erased);
  operation.begin = [=](TableStore&, Table& table) -> Work { return [=, &table] { return table.Erase(erased); }; };
  operation.check = [=](TableStore& store) {
    ExpectVersions(store, Keys(0, 3, dense), {1});
    ExpectVersions(store, Keys(5, 15, dense), {1});
    ExpectVersions(store, erased, {0, 1});
  };
  operation.check_done = [=](TableStore& store) { ExpectVersions(store, erased, {0}); };
  return operation;
}

Operation CreateAndDrop() {
  const std::vector<Key> keys = Keys(0, 20, kHashed);
  Operation operation = Upserts("CreateAndDrop", 0, keys, {});
  operation.prepare = [=](TableStore& store) {
    Recreate(store, 0, keys);
    (void)store.DropTable("new");
  };
  operation.begin = [](TableStore& store, Table&) -> Work {
    return [&store] {
      HPS_RETURN_IF_ERROR(store.CreateTable({.name = "new", .row_bytes = 16, .expected_rows = 100}).status());
      return store.DropTable("new");
    };
  };
  operation.check_done = [](TableStore& store) {
    EXPECT_EQ(*store.ListTables(), std::vector<std::string>{kTableName});
  };
  return operation;
}

Operation Record() {
  const std::string fresh(2'000, 'n');
  return {.name = "Record",
          .prepare =
              [](TableStore& store) {
                Recreate(store, 0, {});
                ASSERT_OK(store.WriteRecord("other", "kept"));
                ASSERT_OK(store.WriteRecord("r", "old"));
              },
          .begin = [=](TableStore& store, Table&) -> Work {
            return [=, &store] {
              HPS_RETURN_IF_ERROR(store.WriteRecord("r", fresh));
              return store.EraseRecord("other");
            };
          },
          .check =
              [=](TableStore& store) {
                const std::optional<std::string> record = *store.ReadRecord("r");
                EXPECT_TRUE(record == "old" || record == fresh);
                const std::optional<std::string> other = *store.ReadRecord("other");
                EXPECT_TRUE(!other || *other == "kept");
              },
          .check_done = [](TableStore& store) { EXPECT_EQ(*store.ReadRecord("other"), std::nullopt); }};
}

// Does everything once, so that the dynamic linker's and the heap's first steps are not stepped through.
bool WarmUp(TableStore& store, const std::string& name) {
  const auto table = Create(store, 100, kRowBytes, name);
  bool ok = true;
  for (const bool dense : {true, false}) {
    ok = ok && Put(*table, Keys(0, 60, dense), 1).ok() && Put(*table, Keys(0, 60, dense), 1).ok();
    ok = ok && table->Erase(Keys(0, 60, dense)).ok();
  }
  return ok && store.WriteRecord(name, "r").ok() && store.EraseRecord(name).ok() && store.DropTable(name).ok();
}

class EveryInstructionTest : public MultiProcessTest, public ::testing::WithParamInterface<Operation> {
 protected:
  // Starts the operation in a process of its own and kills it after so many instructions, or when it has ended if that
  // is earlier. Returns how many it made; readers look at the store when it stands still.
  void RunAndKill(const MultiProcessOptions& options, const Table& seen, int64_t instructions, int64_t* made) {
    const pid_t child = ::fork();
    if (child == 0) {  // no other thread runs in this test program, so the child may do what it likes
      const auto store = Open(options);
      const auto table = OpenTable(*store);
      if (!WarmUp(*store, "warm")) ::_exit(1);
      const Work work = GetParam().begin(*store, *table);
      ::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
      ::raise(SIGSTOP);
      ::raise(work().ok() ? SIGSTOP : SIGABRT);
      ::_exit(0);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP) << status;
    for (*made = 0; *made < instructions; ++*made) {
      ASSERT_EQ(::ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr), 0) << "ptrace is not permitted here";
      ASSERT_EQ(::waitpid(child, &status, 0), child);
      ASSERT_TRUE(WIFSTOPPED(status));
      ASSERT_NE(WSTOPSIG(status), SIGABRT) << "the operation failed";
      if (WSTOPSIG(status) == SIGSTOP) break;
    }
    (void)Versions(seen, Keys(0, 40, kDense));  // whole rows, though their writer holds locks
    (void)Versions(seen, Keys(0, 40, kHashed));
    ::kill(child, SIGKILL);
    ASSERT_EQ(::waitpid(child, &status, 0), child);
  }
};

INSTANTIATE_TEST_SUITE_P(Operations, EveryInstructionTest,
                         ::testing::Values(Update(kDense), Update(kHashed), Insert(kDense), Insert(kHashed),
                                           FirstRow(kDense), FirstRow(kHashed), Growth(), EraseRows(kDense),
                                           EraseRows(kHashed), CreateAndDrop(), Record(), Eviction()),
                         [](const auto& info) { return info.param.name; });

// HPS_TEST_DEATHS=0 dies at every instruction; else so many times, somewhere else in each run.
TEST_P(EveryInstructionTest, LeavesEverythingWholeAndUnlocked) {
  const Operation& operation = GetParam();
  MultiProcessOptions options = Options(name);
  options.bytes = 2 << 20;
  options.num_partitions = 1;
  options.overflow = operation.overflow;
  const auto store = Open(options);
  const char* text = std::getenv("HPS_TEST_DEATHS");
  const int64_t deaths = text != nullptr ? std::atoll(text) : kSanitized ? 2 : 10;
  int64_t all = INT64_MAX;
  int64_t step = 1;
  std::mt19937_64 random(std::random_device{}());
  for (int64_t death = INT64_MAX; death >= 0; death -= step) {  // the first ends by itself
    SCOPED_TRACE("killed after " + std::to_string(death) + " instructions");
    operation.prepare(*store);
    int64_t made = 0;
    ASSERT_NO_FATAL_FAILURE(RunAndKill(options, *OpenTable(*store), death, &made));
    operation.check(*store);
    if (death == INT64_MAX) operation.check_done(*store);
    ASSERT_OK(CheckMultiProcessStore(*store));
    ASSERT_OK(Put(*OpenTable(*store), Keys(0, 20, kHashed), 1));  // everything can be written again
    ASSERT_FALSE(HasFailure());
    if (death != INT64_MAX) continue;
    all = made;
    step = deaths == 0 ? 1 : std::max<int64_t>(all / deaths, 1);
    death = all - 1 - static_cast<int64_t>(random() % static_cast<uint64_t>(step)) + step;
  }
  std::cout << operation.name << ": " << all << " instructions, died at each " << step << "th" << std::endl;
}

// A storm ------------------------------------------------------------------------------------------------------------

constexpr size_t kGroups = 16;
constexpr size_t kGroupKeys = 24;

// Acknowledged versions of the groups of keys of two writers, in a file that outlives them.
struct Acknowledged {
  std::atomic<uint32_t> versions[2][kGroups];
};

Acknowledged* MapAcknowledged(const fs::path& folder) {
  const int file = ::open((folder / "acknowledged").c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ::ftruncate(file, sizeof(Acknowledged)) != 0) std::abort();
  void* mapping = ::mmap(nullptr, sizeof(Acknowledged), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  ::close(file);
  return static_cast<Acknowledged*>(mapping);
}

std::vector<Key> GroupKeys(size_t writer, size_t group) {
  return Keys((writer * kGroups + group) * kGroupKeys, kGroupKeys, group % 2 == 0);
}

// Goes on where the last one was killed: groups of rows in ascending versions, rows that come and go, tables and
// records.
int RunStorm(size_t writer, const fs::path& folder) {
  Acknowledged& acknowledged = *MapAcknowledged(folder);
  const auto store = Open(folder.filename().string());
  const auto table = OpenTable(*store);
  const std::string own = "own" + std::to_string(writer);
  std::mt19937_64 random(std::random_device{}());
  std::puts("storming");
  std::fflush(stdout);
  for (uint32_t round = 0;; ++round) {
    const size_t group = random() % kGroups;
    const uint32_t version = acknowledged.versions[writer][group] + 1;
    if (!Put(*table, GroupKeys(writer, group), version).ok()) return 1;
    acknowledged.versions[writer][group] = version;
    const std::vector<Key> passing = Keys(100'000 + writer * 5'000 + random() % 40 * 100, 100, random() % 2 == 0);
    if (!(round % 2 == 0 ? Put(*table, passing, 1) : table->Erase(passing)).ok()) return 2;
    if (round % 4 == 0) {
      (void)store->DropTable(own);
      if (!Put(*Create(*store, random() % 2 * 100, 20, own), Keys(0, 60, round % 8 == 0), 1).ok()) return 3;
      if (!store->WriteRecord(own, std::string(random() % 3'000, 'r')).ok()) return 4;
    }
    if (::testing::Test::HasFailure()) return 5;
  }
}

TEST_F(MultiProcessTest, AStormOfWritersAndReadersThatAreKilled) {
  const auto store = Open(name);
  Acknowledged& acknowledged = *MapAcknowledged(folder / "");
  std::vector<Key> all;
  {
    const auto table = Create(*store, 500);
    for (size_t writer = 0; writer < 2; ++writer) {
      for (size_t group = 0; group < kGroups; ++group) {
        ASSERT_OK(Put(*table, GroupKeys(writer, group), 1));
        acknowledged.versions[writer][group] = 1;
      }
    }
  }
  const auto table = OpenTable(*store);
  std::mt19937_64 random(std::random_device{}());
  const int rounds = kSanitized ? 15 : 120;
  for (int round = 0; round < rounds; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    ChildProcess left("storm0", folder / "");
    ChildProcess right("storm1", folder / "");
    left.WaitForLine("storming");
    right.WaitForLine("storming");
    // Some reads of ours, then one dies, then, among the other's writes, the other.
    for (ChildProcess* child : {&left, &right}) {
      const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(random() % 6'000);
      do {
        (void)Versions(*table, GroupKeys(random() % 2, random() % kGroups));
      } while (std::chrono::steady_clock::now() < end);
      child->Kill();
    }
    for (size_t writer = 0; writer < 2; ++writer) {
      for (size_t group = 0; group < kGroups; ++group) {
        const uint32_t last = acknowledged.versions[writer][group];
        for (const uint32_t version : Versions(*table, GroupKeys(writer, group))) {
          ASSERT_GE(version, last) << "an acknowledged row is lost";
          ASSERT_LE(version, last + 1);
        }
        ASSERT_OK(Put(*table, GroupKeys(writer, group), last + 1));  // one version for all again
        acknowledged.versions[writer][group] = last + 1;
      }
    }
    ASSERT_OK(CheckMultiProcessStore(*store));
    ASSERT_FALSE(HasFailure());
  }
}

int RunRole(const std::string& role, const fs::path& folder) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  return RunStorm(role == "storm1" ? 1 : 0, folder.parent_path());
}

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunTests(argc, argv, hps::testing::RunRole); }
