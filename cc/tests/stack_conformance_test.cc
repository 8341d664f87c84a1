// The tier stack through the conformance suite of stores: a store whose tables answer from a hash map over RocksDB, by
// the walk that lookups make. Keys that are even are in both tiers, the others below only. And the adaptors of tables.

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "cc/core/single_flight.h"
#include "cc/core/tier_stack.h"
#include "cc/storage/hash_map_store.h"
#include "cc/storage/rocksdb_store.h"
#include "cc/tests/faulty_store.h"
#include "cc/tests/rocksdb_races.h"
#include "cc/tests/store_conformance.h"

namespace hps::testing {
namespace {

Executor& Threads() {
  static Executor& executor = *NewThreadPool(2).release();
  return executor;
}

class StackTable final : public Table {
 public:
  StackTable(std::shared_ptr<Table> upper, bool addressable, std::shared_ptr<Table> lower)
      : upper_(std::move(upper)), lower_(std::move(lower)) {
    stack_.volatile_tier.table = upper_;
    stack_.volatile_tier.addressable = addressable;
    stack_.persistent_tier.table = lower_;
    stack_.default_row.assign(spec().row_bytes / sizeof(float), -1.0f);
  }

  const TableSpec& spec() const override { return lower_->spec(); }
  Status Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const override {
    const size_t row_bytes = spec().row_bytes;
    if (request.rows.stride_bytes < row_bytes) return InvalidArgument("stack: the stride is less than a row");
    std::vector<uint32_t> positions;
    if (request.positions) {
      positions.assign(request.positions->begin(), request.positions->end());
    } else {
      positions.resize(request.keys.size());
      for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<uint32_t>(i);
    }
    std::vector<Key> keys;
    for (uint32_t position : positions) keys.push_back(request.keys[position]);
    std::vector<std::byte> rows(keys.size() * row_bytes);
    const auto found = std::make_unique<bool[]>(keys.size());
    TierWalk walk;
    walk.stack = &stack_;
    walk.keys = keys;
    walk.rows = rows.data();
    walk.found = found.get();
    LookupReport report;
    HPS_RETURN_IF_ERROR(
        FetchRows(std::span(&walk, 1), Threads(), Threads(), {request.deadline, request.cancelled}, &report));
    for (size_t i = 0; i < keys.size(); ++i) {
      if (!found[i]) {
        misses->push_back(positions[i]);
        continue;
      }
      std::copy_n(rows.data() + i * row_bytes, row_bytes, request.rows.data + positions[i] * request.rows.stride_bytes);
    }
    return OkStatus();
  }
  Status Locate(std::span<const Key>, std::span<const std::byte*>) const override {
    return Unimplemented("stack: rows do not lie in memory; use Fetch");
  }
  // The lower tier first, so that the upper one never has what the lower has not.
  Status Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) override {
    HPS_RETURN_IF_ERROR(lower_->Upsert(keys, rows, options));
    if (options.only_absent) return OkStatus();  // the walk finds the row below
    const size_t row_bytes = spec().row_bytes;
    std::vector<Key> even;
    std::vector<std::byte> even_rows;
    for (size_t i = 0; i < keys.size(); ++i) {
      if (keys[i] % 2 != 0) continue;
      even.push_back(keys[i]);
      const std::byte* row = rows.data + i * rows.stride_bytes;
      even_rows.insert(even_rows.end(), row, row + row_bytes);
    }
    return upper_->Upsert(even, {even_rows.data(), row_bytes}, options);
  }
  Status Erase(std::span<const Key> keys, uint64_t* erased) override {
    HPS_RETURN_IF_ERROR(upper_->Erase(keys));
    return lower_->Erase(keys, erased);
  }
  Status Scan(const ScanVisitor& visitor) const override { return lower_->Scan(visitor); }
  Result<TableStats> Stats() const override { return lower_->Stats(); }

 private:
  const std::shared_ptr<Table> upper_;
  const std::shared_ptr<Table> lower_;
  TierStack stack_;
};

class StackStore final : public TableStore {
 public:
  StackStore(std::unique_ptr<TableStore> upper, bool addressable, std::unique_ptr<TableStore> lower)
      : upper_(std::move(upper)), addressable_(addressable), lower_(std::move(lower)) {}

  std::string_view kind() const override { return "stack"; }
  StoreCapabilities capabilities() const override { return lower_->capabilities(); }
  Result<std::shared_ptr<Table>> OpenTable(const TableSpec& spec) override {
    return Stack(spec, lower_->OpenTable(spec));
  }
  Result<std::shared_ptr<Table>> CreateTable(const TableSpec& spec) override {
    return Stack(spec, lower_->CreateTable(spec));
  }
  Status DropTable(std::string_view name) override {
    HPS_RETURN_IF_ERROR(lower_->DropTable(name));
    return upper_->DropTable(name);
  }
  Result<std::vector<std::string>> ListTables() const override { return lower_->ListTables(); }
  Result<std::optional<std::string>> ReadRecord(std::string_view name) const override {
    return lower_->ReadRecord(name);
  }
  Status WriteRecord(std::string_view name, std::string_view value) override {
    return lower_->WriteRecord(name, value);
  }
  Status EraseRecord(std::string_view name) override { return lower_->EraseRecord(name); }
  Status Flush() override { return lower_->Flush(); }
  Status Close() override {
    HPS_RETURN_IF_ERROR(upper_->Close());
    return lower_->Close();
  }

 private:
  Result<std::shared_ptr<Table>> Stack(const TableSpec& spec, Result<std::shared_ptr<Table>> lower) {
    if (!lower.ok()) return lower;
    auto upper = upper_->CreateTable(spec);
    if (upper.status().code() == StatusCode::kAlreadyExists) upper = upper_->OpenTable(spec);
    if (!upper.ok()) return upper;
    return std::shared_ptr<Table>(
        std::make_shared<StackTable>(std::move(upper).value(), addressable_, std::move(lower).value()));
  }
  const std::unique_ptr<TableStore> upper_;
  const bool addressable_;
  const std::unique_ptr<TableStore> lower_;
};

// Tables are shared by all fetches, however quick they are.
class SingleFlightStore final : public TableStore {
 public:
  explicit SingleFlightStore(std::unique_ptr<TableStore> store) : store_(std::move(store)) {}

  std::string_view kind() const override { return store_->kind(); }
  StoreCapabilities capabilities() const override { return store_->capabilities(); }
  Result<std::shared_ptr<Table>> OpenTable(const TableSpec& spec) override { return Wrap(store_->OpenTable(spec)); }
  Result<std::shared_ptr<Table>> CreateTable(const TableSpec& spec) override { return Wrap(store_->CreateTable(spec)); }
  Status DropTable(std::string_view name) override { return store_->DropTable(name); }
  Result<std::vector<std::string>> ListTables() const override { return store_->ListTables(); }
  Result<std::optional<std::string>> ReadRecord(std::string_view name) const override {
    return store_->ReadRecord(name);
  }
  Status WriteRecord(std::string_view name, std::string_view value) override {
    return store_->WriteRecord(name, value);
  }
  Status EraseRecord(std::string_view name) override { return store_->EraseRecord(name); }
  Status Flush() override { return store_->Flush(); }
  Status Close() override { return store_->Close(); }

 private:
  static Result<std::shared_ptr<Table>> Wrap(Result<std::shared_ptr<Table>> table) {
    if (!table.ok()) return table;
    return std::shared_ptr<Table>(
        std::make_shared<SingleFlightTable>(std::move(table).value(), nullptr, std::chrono::nanoseconds(0)));
  }
  const std::unique_ptr<TableStore> store_;
};

using Opened = Result<std::unique_ptr<TableStore>>;
using Path = std::filesystem::path;

Opened Database(const Path& directory, bool read_only) {
  return OpenRocksDbStore({.path = directory,
                           .num_threads = 2,
                           .read_only = read_only,
                           .max_get_batch_size = 700,
                           .max_set_batch_size = 900,
                           .executor = &Threads()});
}

StoreFixture Fixture(const std::string& name, std::function<Opened(const Path&, bool)> open) {
  return {.name = name,
          .open = [open](const Path& directory) { return open(directory, false); },
          .open_read_only = [open](const Path& directory) { return open(directory, true); }};
}

std::vector<StoreFixture> AllFixtures() {
  std::vector<StoreFixture> fixtures;
  for (const bool addressable : {true, false}) {
    fixtures.push_back(Fixture(addressable ? "StackInMemory" : "StackThatIsWaitedFor",
                               [addressable](const Path& directory, bool read_only) -> Opened {
                                 HPS_ASSIGN_OR_RETURN(auto upper, OpenHashMapStore({.num_partitions = 4}));
                                 HPS_ASSIGN_OR_RETURN(auto lower, Database(directory, read_only));
                                 return std::unique_ptr<TableStore>(
                                     new StackStore(std::move(upper), addressable, std::move(lower)));
                               }));
    fixtures.back().one_writer_order = false;
  }
  fixtures.push_back(Fixture("SingleFlight", [](const Path& directory, bool read_only) -> Opened {
    HPS_ASSIGN_OR_RETURN(auto store, Database(directory, read_only));
    return std::unique_ptr<TableStore>(new SingleFlightStore(std::move(store)));
  }));
  // What the other tests rely on.
  fixtures.push_back({.name = "FaultyWhileHealthy", .open = [](const Path&) -> Opened {
                        HPS_ASSIGN_OR_RETURN(std::shared_ptr<TableStore> store,
                                             OpenHashMapStore({.num_partitions = 2}));
                        return std::unique_ptr<TableStore>(new FaultyStore(store, std::make_shared<Faults>()));
                      }});
  return fixtures;
}

INSTANTIATE_TEST_SUITE_P(Stacks, StoreConformance, ::testing::ValuesIn(AllFixtures()),
                         [](const auto& info) { return info.param.name; });

}  // namespace

// Nothing here is bounded; those stores are in store_conformance_test.cc.
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(BoundedStoreConformance);

}  // namespace hps::testing
