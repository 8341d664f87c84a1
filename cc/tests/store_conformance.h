// The conformance suite of TableStore: one test per clause of table_store.h, run over every registered fixture.
//
// A backend joins by adding a fixture of a few lines to AllFixtures() in store_conformance_test.cc. Clauses that depend
// on a capability (persistent, addressable, read-only opening) read it from the store or the fixture; the opposite is
// checked where the contract names it (Locate of a store that is not addressable is kUnimplemented).

#ifndef HPS_TESTS_STORE_CONFORMANCE_H_
#define HPS_TESTS_STORE_CONFORMANCE_H_

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "cc/storage/overflow.h"
#include "hps/table_store.h"

namespace hps::testing {

struct StoreFixture {
  using Opener = std::function<Result<std::unique_ptr<TableStore>>(const std::filesystem::path& directory)>;

  std::string name;  // letters and digits; becomes part of the test's name
  Opener open;       // opens, or creates, the store that lives in `directory`; called again after Close to reopen
  Opener open_read_only = {};  // the same, read-only; empty where the backend has no such mode
  bool reopens = false;        // rows are there after reopening, though the store does not promise it
  // A reader sees the versions of a row in the order in which one writer wrote them. Not so where a writer writes two
  // tiers one after the other: who missed above may find below what is not above yet.
  bool one_writer_order = true;
  size_t large_batch_rows = 100'000;  // more than the backend (as opened here) moves in one piece
};

class StoreConformance : public ::testing::TestWithParam<StoreFixture> {
 protected:
  void SetUp() override;
  void TearDown() override;

  // Opens (again) and replaces store_; the test fails and stops if that fails.
  void Open();
  void Reopen();
  bool Reopens() const;
  std::shared_ptr<Table> Create(const std::string& name, size_t row_bytes = 64);
  const std::filesystem::path& directory() const { return directory_; }

  std::unique_ptr<TableStore> store_;

 private:
  std::filesystem::path directory_;
};

// A volatile store with a margin (overflow.h), for the clauses that every one must fulfil under each policy. It joins
// by a fixture a policy in BoundedFixtures() in store_conformance_test.cc.
struct BoundedStoreFixture {
  using Opener = std::function<Result<std::unique_ptr<TableStore>>(
      const std::filesystem::path& directory, uint32_t num_partitions, const OverflowOptions& overflow)>;

  std::string name;
  OverflowPolicy policy;
  Opener open;  // moves upserts of up to 1,000 rows in one piece
  // Returns when the store's clock has moved on; empty where every write does so.
  std::function<void()> let_time_pass = {};
  // Rows evict after they were written, so that for a moment there are more than the margin, by those under way.
  bool writes_first = false;
  uint32_t rounds = 60;  // of the clauses with several threads; fewer where each call crosses a network
};

class BoundedStoreConformance : public ::testing::TestWithParam<BoundedStoreFixture> {
 protected:
  void SetUp() override;
  void TearDown() override;

  OverflowPolicy policy() const { return GetParam().policy; }
  // Opens a store (closing the one before) and creates a table in it.
  std::shared_ptr<Table> Create(uint64_t margin, uint32_t num_partitions = 1, bool refresh_time_after_fetch = false,
                                uint64_t expected_rows = 0);
  void LetTimePass() const {
    if (GetParam().let_time_pass) GetParam().let_time_pass();
  }

  std::unique_ptr<TableStore> store_;

 private:
  void CloseStore();

  std::filesystem::path directory_;
  int tables_ = 0;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_STORE_CONFORMANCE_H_
