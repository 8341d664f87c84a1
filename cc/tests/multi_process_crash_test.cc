// Processes that are killed while they write to a multi-process store: at every single instruction of one operation
// (the child is stepped by ptrace), and at random moments of a storm. Afterwards every row proves itself, nothing is
// locked, and every slot and every unit of memory is accounted for.

#include <sys/prctl.h>
#include <sys/ptrace.h>

#include <atomic>
#include <cstdlib>
#include <iostream>
#include <random>

#include "cc/tests/multi_process_fixture.h"

namespace hps::testing {
namespace {

// One operation that is killed everywhere --------------------------------------------------------------------------

struct Operation {
  std::string name;
  // Brings the store into the state from which the operation starts; the same each time.
  std::function<void(TableStore&)> prepare;
  std::function<Status(TableStore&, Table*)> run;
  // What must hold when it was killed somewhere (readers may run meanwhile), and when it has ended.
  std::function<void(TableStore&)> check;
  std::function<void(TableStore&)> check_done;
  int stride = 1;  // instructions between two deaths
};

constexpr bool kDense = true;
constexpr bool kHashed = false;

void Recreate(TableStore& store, uint64_t expected_rows, const std::vector<Key>& keys) {
  (void)store.DropTable(kTableName);
  ASSERT_OK(Put(*Create(store, expected_rows), keys, 1));
}

void ExpectVersionsIn(TableStore& store, const std::vector<Key>& keys, uint32_t first, uint32_t last) {
  const auto table = OpenTable(store);
  for (const uint32_t version : Versions(*table, keys)) {
    EXPECT_GE(version, first);
    EXPECT_LE(version, last);
  }
}

Operation Update(bool dense) {
  const std::vector<Key> keys = Keys(0, 40, dense);
  const std::vector<Key> written = Keys(3, 2, dense);
  return {.name = dense ? "UpdateDense" : "UpdateHashed",
          .prepare = [=](TableStore& store) { Recreate(store, 40, keys); },
          .run = [=](TableStore&, Table* table) { return Put(*table, written, 2); },
          .check =
              [=](TableStore& store) {
                ExpectVersionsIn(store, keys, 1, 2);
                EXPECT_EQ(OpenTable(store)->Stats()->rows, keys.size());
              },
          .check_done = [=](TableStore& store) { ExpectVersionsIn(store, written, 2, 2); }};
}

Operation Insert(bool dense) {
  const std::vector<Key> before = Keys(0, 20, dense);
  const std::vector<Key> written = Keys(30, 2, dense);
  return {.name = dense ? "InsertDense" : "InsertHashed",
          .prepare = [=](TableStore& store) { Recreate(store, 40, before); },
          .run = [=](TableStore&, Table* table) { return Put(*table, written, 2); },
          .check =
              [=](TableStore& store) {
                ExpectVersionsIn(store, before, 1, 1);
                for (const uint32_t version : Versions(*OpenTable(store), written)) {
                  EXPECT_TRUE(version == 0 || version == 2);
                }
              },
          .check_done = [=](TableStore& store) { ExpectVersionsIn(store, written, 2, 2); }};
}

// The first rows of a table: a region and an index are made.
Operation FirstRow(bool dense) {
  Operation operation = Insert(dense);
  const std::vector<Key> written = Keys(0, 1, dense);
  operation.name = dense ? "FirstRowDense" : "FirstRowHashed";
  operation.prepare = [=](TableStore& store) { Recreate(store, dense ? 40 : 0, {}); };
  operation.run = [=](TableStore&, Table* table) { return Put(*table, written, 2); };
  operation.check = [=](TableStore& store) { ExpectVersionsIn(store, written, 0, 2); };
  operation.check_done = [=](TableStore& store) { ExpectVersionsIn(store, written, 2, 2); };
  return operation;
}

// Many rows, so that indexes are replaced and regions added.
Operation Growth() {
  const std::vector<Key> before = Keys(0, 40, kHashed);
  const std::vector<Key> written = Keys(40, 60, kHashed);
  return {.name = "Growth",
          .prepare = [=](TableStore& store) { Recreate(store, 0, before); },
          .run = [=](TableStore&, Table* table) { return Put(*table, written, 2); },
          .check =
              [=](TableStore& store) {
                ExpectVersionsIn(store, before, 1, 1);
                ExpectVersionsIn(store, written, 0, 2);
              },
          .check_done = [=](TableStore& store) { ExpectVersionsIn(store, written, 2, 2); },
          .stride = 37};
}

Operation EraseRows(bool dense) {
  const std::vector<Key> keys = Keys(0, 40, dense);
  const std::vector<Key> erased = Keys(3, 2, dense);
  return {.name = dense ? "EraseDense" : "EraseHashed",
          .prepare = [=](TableStore& store) { Recreate(store, 40, keys); },
          .run = [=](TableStore&, Table* table) { return table->Erase(erased); },
          .check =
              [=](TableStore& store) {
                ExpectVersionsIn(store, keys, 0, 1);
                ExpectVersionsIn(store, Keys(5, 35, dense), 1, 1);
              },
          .check_done = [=](TableStore& store) { ExpectVersionsIn(store, erased, 0, 0); }};
}

Operation CreateAndDrop() {
  return {.name = "CreateAndDrop",
          .prepare =
              [](TableStore& store) {
                Recreate(store, 0, Keys(0, 40, kHashed));
                (void)store.DropTable("new");
              },
          .run =
              [](TableStore& store, Table*) {
                HPS_RETURN_IF_ERROR(
                    store.CreateTable({.name = "new", .row_bytes = 16, .expected_rows = 100}).status());
                return store.DropTable("new");
              },
          .check = [](TableStore& store) { ExpectVersionsIn(store, Keys(0, 40, kHashed), 1, 1); },
          .check_done =
              [](TableStore& store) { EXPECT_EQ(*store.ListTables(), std::vector<std::string>{kTableName}); },
          .stride = 23};
}

Operation Record() {
  return {.name = "Record",
          .prepare =
              [](TableStore& store) {
                Recreate(store, 0, {});
                ASSERT_OK(store.WriteRecord("other", "kept"));
                ASSERT_OK(store.WriteRecord("r", "old"));
              },
          .run =
              [](TableStore& store, Table*) {
                HPS_RETURN_IF_ERROR(store.WriteRecord("r", std::string(2'000, 'n')));
                return store.EraseRecord("other");
              },
          .check =
              [](TableStore& store) {
                const std::optional<std::string> record = *store.ReadRecord("r");
                EXPECT_TRUE(record == "old" || record == std::string(2'000, 'n'));
                const std::optional<std::string> other = *store.ReadRecord("other");
                EXPECT_TRUE(!other || *other == "kept");
              },
          .check_done = [](TableStore& store) { EXPECT_EQ(*store.ReadRecord("other"), std::nullopt); }};
}

Operation Eviction() {
  Operation operation = Update(kHashed);
  operation.name = "Eviction";
  operation.prepare = [](TableStore& store) { Recreate(store, 0, Keys(0, 250, kHashed)); };
  operation.run = [](TableStore&, Table* table) { return Put(*table, Keys(250, 60, kHashed), 2); };
  operation.check = [](TableStore& store) { ExpectVersionsIn(store, Keys(0, 310, kHashed), 0, 2); };
  operation.check_done = [](TableStore& store) { EXPECT_LE(OpenTable(store)->Stats()->rows, 4 * 64u); };
  operation.stride = 211;
  return operation;
}

MultiProcessOptions OptionsOf(const std::string& name, const Operation& operation) {
  MultiProcessOptions options = Options(name);
  options.bytes = 4 << 20;
  if (operation.name == "Eviction") options.overflow = {.margin = 64, .policy = OverflowPolicy::kEvictLeastUsed};
  return options;
}

class EveryInstructionTest : public MultiProcessTest, public ::testing::WithParamInterface<Operation> {};
INSTANTIATE_TEST_SUITE_P(Operations, EveryInstructionTest,
                         ::testing::Values(Update(kDense), Update(kHashed), Insert(kDense), Insert(kHashed),
                                           FirstRow(kDense), FirstRow(kHashed), Growth(), EraseRows(kDense),
                                           EraseRows(kHashed), CreateAndDrop(), Record(), Eviction()),
                         [](const auto& info) { return info.param.name; });

TEST_P(EveryInstructionTest, LeavesEverythingWholeAndUnlocked) {
  const Operation& operation = GetParam();
  const MultiProcessOptions options = OptionsOf(name, operation);
  const auto store = Open(options);
  const int stride = operation.stride * (kSanitized ? 53 : 5);  // with a new start each time, all come up in turn
  std::mt19937_64 random(std::random_device{}());
  bool done = false;
  int deaths = 0;
  for (int64_t death = static_cast<int64_t>(random() % static_cast<uint64_t>(stride)); !done; death += stride) {
    SCOPED_TRACE("killed after " + std::to_string(death) + " instructions");
    operation.prepare(*store);
    const pid_t child = ::fork();
    if (child == 0) {  // no other thread runs in this test program, so the child may do what it likes
      const auto own = Open(options);
      const auto table = OpenTable(*own);
      ::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
      ::raise(SIGSTOP);
      const Status status = operation.run(*own, table.get());
      ::raise(status.ok() ? SIGSTOP : SIGABRT);
      ::_exit(0);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP) << status;
    for (int64_t step = 0; step < death && !done; ++step) {
      ASSERT_EQ(::ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr), 0) << "ptrace is not permitted here";
      ASSERT_EQ(::waitpid(child, &status, 0), child);
      ASSERT_TRUE(WIFSTOPPED(status));
      ASSERT_NE(WSTOPSIG(status), SIGABRT) << "the operation failed";
      done = WSTOPSIG(status) == SIGSTOP;
    }
    // The child stands still in the middle: readers do not wait for it.
    if (const auto table = store->OpenTable({.name = "none", .row_bytes = 4}); operation.name == "Update") {
      (void)Versions(*OpenTable(*store), Keys(0, 40, kHashed));
    }
    ::kill(child, SIGKILL);
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    operation.check(*store);
    if (done) operation.check_done(*store);
    ASSERT_OK(CheckMultiProcessStore(*store));
    ASSERT_OK(Put(*OpenTable(*store), Keys(0, 40, kHashed), 1));  // everything can be written again
    ASSERT_FALSE(HasFailure());
    ++deaths;
  }
  RecordProperty("deaths", deaths);
  EXPECT_GT(deaths, 10);
}

int RunRole(const std::string&, const fs::path&) { return 1; }

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunTests(argc, argv, hps::testing::RunRole); }
