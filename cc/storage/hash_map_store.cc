// Invariant: once closed_ is set no table is added. Tables and store share closed_, so that a table that outlives its
// store refuses calls.
// Lock order: mutex_ is held over no call of a table.

#include "cc/storage/hash_map_store.h"

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "cc/storage/hash_map_table.h"
#include "cc/storage/table_memory.h"

namespace hps {
namespace {

class HashMapStore final : public TableStore {
 public:
  explicit HashMapStore(const HashMapOptions& options)
      : options_(options), closed_(std::make_shared<std::atomic<bool>>(false)) {}

  ~HashMapStore() override { (void)Close(); }

  std::string_view kind() const override { return "hash_map"; }
  StoreCapabilities capabilities() const override {
    return {.bounded = options_.overflow.bounded(),
            .capacity_rows = HashMapCapacityRows(options_.overflow, options_.num_partitions),
            .addressable = true};
  }
  uint64_t MemoryFor(std::span<const TableLoad> loads) const override {
    return LoadedBytes(loads, options_.num_partitions, options_.overflow, HashMapTableBytes);
  }

  Result<std::shared_ptr<Table>> OpenTable(const TableSpec& spec) override {
    const std::lock_guard lock(mutex_);
    HPS_RETURN_IF_ERROR(CheckOpen());
    const auto it = tables_.find(spec.name);
    if (it == tables_.end()) return NoSuchTable(spec.name);
    const size_t row_bytes = it->second->spec().row_bytes;
    if (row_bytes != spec.row_bytes) {
      return FailedPrecondition("hash_map: table '" + spec.name + "' has rows of " + std::to_string(row_bytes) +
                                " bytes, not " + std::to_string(spec.row_bytes) +
                                "; configure the width it was loaded with, or load it again");
    }
    return it->second;
  }

  Result<std::shared_ptr<Table>> CreateTable(const TableSpec& spec) override {
    const std::lock_guard lock(mutex_);
    HPS_RETURN_IF_ERROR(CheckOpen());
    if (tables_.contains(spec.name)) {
      return AlreadyExists("hash_map: there is already a table '" + spec.name + "'; open or drop it");
    }
    HPS_ASSIGN_OR_RETURN(std::shared_ptr<Table> table, HashMapTable::Create(spec, options_, closed_));
    tables_.emplace(spec.name, table);
    return table;
  }

  Status DropTable(std::string_view name) override {
    std::shared_ptr<Table> dropped;  // freed, if nobody else holds it, after the lock is released
    const std::lock_guard lock(mutex_);
    HPS_RETURN_IF_ERROR(CheckOpen());
    const auto it = tables_.find(name);
    if (it == tables_.end()) return NoSuchTable(name);
    dropped = std::move(it->second);
    tables_.erase(it);
    return OkStatus();
  }

  Result<std::vector<std::string>> ListTables() const override {
    const std::lock_guard lock(mutex_);
    HPS_RETURN_IF_ERROR(CheckOpen());
    std::vector<std::string> names;
    for (const auto& [name, table] : tables_) names.push_back(name);
    return names;
  }

  Result<std::optional<std::string>> ReadRecord(std::string_view name) const override {
    const std::lock_guard lock(mutex_);
    HPS_RETURN_IF_ERROR(CheckOpen());
    const auto it = records_.find(name);
    return it == records_.end() ? std::optional<std::string>() : it->second;
  }

  Status WriteRecord(std::string_view name, std::string_view value) override {
    const std::lock_guard lock(mutex_);
    HPS_RETURN_IF_ERROR(CheckOpen());
    records_.insert_or_assign(std::string(name), std::string(value));
    return OkStatus();
  }

  Status EraseRecord(std::string_view name) override {
    const std::lock_guard lock(mutex_);
    HPS_RETURN_IF_ERROR(CheckOpen());
    if (const auto it = records_.find(name); it != records_.end()) records_.erase(it);
    return OkStatus();
  }

  Status Flush() override { return CheckOpen(); }

  Status Close() override {
    std::map<std::string, std::shared_ptr<Table>, std::less<>> tables;
    const std::lock_guard lock(mutex_);
    closed_->store(true, std::memory_order_release);
    tables.swap(tables_);
    return OkStatus();
  }

 private:
  Status CheckOpen() const {
    if (!closed_->load(std::memory_order_acquire)) return OkStatus();
    return FailedPrecondition("hash_map: the store has been closed; open a new one");
  }
  static Status NoSuchTable(std::string_view name) {
    return NotFound("hash_map: there is no table '" + std::string(name) + "'; create it first");
  }

  const HashMapOptions options_;
  const std::shared_ptr<std::atomic<bool>> closed_;
  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Table>, std::less<>> tables_;  // guarded by mutex_
  std::map<std::string, std::string, std::less<>> records_;            // guarded by mutex_
};

}  // namespace

Result<std::unique_ptr<TableStore>> OpenHashMapStore(const HashMapOptions& options) {
  if (options.num_partitions < 1 || options.num_partitions > 4096) {
    return InvalidArgument("hash_map: num_partitions is " + std::to_string(options.num_partitions) +
                           "; choose 1 to 4096, about one per core");
  }
  if (options.allocation_rate_bytes == 0) {
    return InvalidArgument("hash_map: allocation_rate is 0; choose the bytes to commit at a time, such as 268435456");
  }
  if (options.max_get_batch_size == 0 || options.max_set_batch_size == 0) {
    return InvalidArgument("hash_map: max_get_batch_size and max_set_batch_size must be at least 1, such as 10000");
  }
  if (options.overflow.margin == 0) {
    return InvalidArgument("hash_map: overflow_margin is 0 rows; choose the rows that one partition may hold");
  }
  if (!(options.overflow.resolution_target > 0 && options.overflow.resolution_target < 1)) {
    return InvalidArgument("hash_map: overflow_resolution_target is " +
                           std::to_string(options.overflow.resolution_target) +
                           "; choose the part of overflow_margin that stays, between 0 and 1, such as 0.8");
  }
  HashMapOptions complete = options;
  if (complete.executor == nullptr) complete.executor = &InlineExecutor();
  return std::unique_ptr<TableStore>(std::make_unique<HashMapStore>(complete));
}

}  // namespace hps
