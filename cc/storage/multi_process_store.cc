// Invariant: state_->open_tables counts the Tables of this store for each table that is pinned, under state_->mutex.
// Lock order: state_->mutex, then the heap's lock. A partition is locked under neither.

#include "cc/storage/multi_process_store.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cc/storage/multi_process_table.h"
#include "cc/storage/shared_heap.h"
#include "cc/storage/table_memory.h"
#include "hps/epoch.h"

namespace hps {
namespace {

constexpr size_t kMaxRowBytes = size_t{1} << 30;
constexpr size_t kMaxNameBytes = 4096;

Status In(const Status& status) { return status.WithContext("multi_process_hash_map"); }

uint64_t RoundUp(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

class MultiProcessStore final : public TableStore {
 public:
  explicit MultiProcessStore(std::shared_ptr<MultiProcessState> state)
      : state_(std::move(state)), heap_(*state_->heap), num_partitions_(heap_.layout().num_partitions) {}

  ~MultiProcessStore() override { (void)Close(); }

  std::string_view kind() const override { return "multi_process_hash_map"; }
  StoreCapabilities capabilities() const override {
    return {.shared = true,
            .bounded = state_->overflow.bounded(),
            .capacity_rows = SharedCapacityRows(state_->overflow, num_partitions_)};
  }
  uint64_t MemoryFor(std::span<const TableLoad> loads) const override {
    return LoadedBytes(loads, num_partitions_, state_->overflow, SharedTableBytes);
  }

  Result<std::shared_ptr<Table>> OpenTable(const TableSpec& spec) override {
    const EpochGuard guard;
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    const std::lock_guard state_lock(state_->mutex);
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    const auto lock = heap_.Lock();
    const uint64_t offset = heap_.FindTable(spec.name);
    if (offset == 0) return NoSuchTable(spec.name);
    const SharedTable& table = *heap_.At<SharedTable>(offset);
    if (table.row_bytes != spec.row_bytes) {
      return FailedPrecondition("multi_process_hash_map: table '" + spec.name + "' has rows of " +
                                std::to_string(table.row_bytes) + " bytes, not " + std::to_string(spec.row_bytes) +
                                "; configure the width it was loaded with, or load it again");
    }
    heap_.Pin(offset);
    return NewTable(spec, offset);
  }

  Result<std::shared_ptr<Table>> CreateTable(const TableSpec& spec) override {
    const EpochGuard guard;
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    HPS_RETURN_IF_ERROR(CheckSpec(spec));
    const std::lock_guard state_lock(state_->mutex);
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    const auto lock = heap_.Lock();
    if (heap_.FindTable(spec.name) != 0) {
      return AlreadyExists("multi_process_hash_map: there is already a table '" + spec.name + "'; open or drop it");
    }
    const auto offset = MakeTable(spec);
    if (!offset.ok()) return offset.status().WithContext("multi_process_hash_map: table '" + spec.name + "'");
    return NewTable(spec, *offset);
  }

  Status DropTable(std::string_view name) override {
    const EpochGuard guard;
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    const auto lock = heap_.Lock();
    const uint64_t offset = heap_.FindTable(name);
    if (offset == 0) return NoSuchTable(name);
    heap_.DropTable(offset);
    return OkStatus();
  }

  Result<std::vector<std::string>> ListTables() const override {
    const EpochGuard guard;
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    const auto lock = heap_.Lock();
    std::vector<std::string> names;
    heap_.ForEachTable([&](uint64_t, const SharedTable& table) {
      if (table.dropped == 0) names.emplace_back(table.name());
    });
    return names;
  }

  Result<std::optional<std::string>> ReadRecord(std::string_view name) const override {
    const EpochGuard guard;
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    const auto lock = heap_.Lock();
    const uint64_t offset = heap_.FindRecord(name);
    if (offset == 0) return std::optional<std::string>();
    return std::optional<std::string>(heap_.At<SharedRecord>(offset)->value());
  }

  Status WriteRecord(std::string_view name, std::string_view value) override {
    const EpochGuard guard;
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    const auto lock = heap_.Lock();
    return In(heap_.WriteRecord(name, value));
  }

  Status EraseRecord(std::string_view name) override {
    const EpochGuard guard;
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    const auto lock = heap_.Lock();
    heap_.EraseRecord(name);
    return OkStatus();
  }

  std::string MemberName() const override {
    const EpochGuard guard;
    if (!state_->CheckOpen().ok()) return "";
    const auto lock = heap_.Lock();
    return heap_.MemberName();
  }
  bool MemberIsGone(std::string_view name) const override {
    const EpochGuard guard;
    if (!state_->CheckOpen().ok()) return false;
    const auto lock = heap_.Lock();
    return heap_.MemberIsGone(name);
  }

  Status CheckPlace() const override {
    const EpochGuard guard;
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    return In(heap_.CheckNamed());
  }

  Status Flush() override { return state_->CheckOpen(); }

  Status Close() override {
    if (state_->fork_generation != ForkGeneration()) return OkStatus();  // the parent's
    std::shared_ptr<SharedHeap> heap;
    {
      const std::lock_guard state_lock(state_->mutex);
      state_->closed.store(true, std::memory_order_release);
      heap = std::move(state_->owner);
      state_->open_tables.clear();
    }
    if (heap == nullptr) return OkStatus();
    // Calls that run keep the memory mapped, and this process attached, until they end.
    const std::weak_ptr<SharedHeap> watched = heap;
    RetireObject(std::move(heap));
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(1);
    while (!watched.expired() && std::chrono::steady_clock::now() < end) {
      { const EpochGuard guard; }  // its end lets go of what can be let go of
      std::this_thread::yield();
    }
    return OkStatus();
  }

  Status Check() {
    const EpochGuard guard;
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    HPS_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListTables());
    for (const std::string& name : names) {
      uint64_t row_bytes = 0;
      {
        const auto lock = heap_.Lock();
        const uint64_t offset = heap_.FindTable(name);
        if (offset != 0) row_bytes = heap_.At<SharedTable>(offset)->row_bytes;
      }
      HPS_ASSIGN_OR_RETURN(const auto table, OpenTable({.name = name, .row_bytes = row_bytes}));
      HPS_RETURN_IF_ERROR(static_cast<MultiProcessTable&>(*table).Check());
    }
    const auto lock = heap_.Lock();
    return heap_.CheckUnits();
  }

 private:
  static Status NoSuchTable(std::string_view name) {
    return NotFound("multi_process_hash_map: there is no table '" + std::string(name) + "'");
  }

  Status CheckSpec(const TableSpec& spec) const {
    const std::string table = "multi_process_hash_map: table '" + spec.name + "'";
    if (spec.row_bytes == 0 || spec.row_bytes > kMaxRowBytes) {
      return InvalidArgument(table + " has rows of " + std::to_string(spec.row_bytes) + " bytes; 1 to " +
                             std::to_string(kMaxRowBytes) + " are possible");
    }
    if (spec.name.size() > kMaxNameBytes) {
      return InvalidArgument(table + " has a name of more than " + std::to_string(kMaxNameBytes) + " bytes");
    }
    if (spec.key_bytes != static_cast<int>(heap_.layout().key_bytes)) {
      return InvalidArgument(table + " has keys of " + std::to_string(spec.key_bytes) + " bytes, the store's have " +
                             std::to_string(heap_.layout().key_bytes));
    }
    const uint64_t most = SharedPartition::kMaxSlots / 2 * heap_.layout().num_partitions;
    if (spec.expected_rows > most) {
      return ResourceExhausted(table + " expects " + std::to_string(spec.expected_rows) + " rows; the most is " +
                               std::to_string(most) + " (raise num_partitions, or split it)");
    }
    return OkStatus();
  }

  // REQUIRES both locks.
  std::shared_ptr<Table> NewTable(const TableSpec& spec, uint64_t offset) {
    ++state_->open_tables[offset];
    return std::make_shared<MultiProcessTable>(spec, offset, state_);
  }

  // REQUIRES the heap's lock. A table that cannot be finished is not linked, and given back.
  Result<uint64_t> MakeTable(const TableSpec& spec) {
    const uint32_t num_partitions = heap_.layout().num_partitions;
    const auto fill_in = [&](SharedTable* table) {
      ShapeTable(spec.expected_rows, spec.row_bytes, spec.name.size(), num_partitions, state_->overflow, table);
    };
    SharedTable shape = {};
    fill_in(&shape);
    // Better now than in the middle of a load: the rows and the smaller one of the indexes.
    if (spec.expected_rows > 0) {
      HPS_RETURN_IF_ERROR(heap_.CheckFree(
          shape.bytes + num_partitions * shape.RegionBytes(0) +
          std::min(DenseLine::LinesFor(spec.expected_rows) * sizeof(DenseLine),
                   num_partitions * HashBuckets::BucketsFor(shape.planned_rows) * sizeof(HashBuckets::Bucket))));
    }
    HPS_ASSIGN_OR_RETURN(const uint64_t offset, heap_.Allocate(shape.bytes));
    ZeroWords(heap_.At<std::byte>(offset), RoundUp(shape.bytes, 8));
    SharedTable& table = *new (heap_.At<std::byte>(offset)) SharedTable{};
    fill_in(&table);
    std::copy(spec.name.begin(), spec.name.end(), table.name());
    Status status;
    for (uint32_t p = 0; p < num_partitions; ++p) {
      auto& partition = *new (&table.partitions()[p]) SharedPartition{};
      partition.mutex.Init();
      if (status.ok() && spec.expected_rows > 0) {
        status = MultiProcessPartition::AllocateFirstRegion(heap_, table, p);
      }
    }
    if (!status.ok()) {
      ForEachBlock(offset, table, [&](uint64_t block, uint64_t bytes) { heap_.Free(block, bytes); });
      return status;
    }
    heap_.AddTable(offset);
    return offset;
  }

  const std::shared_ptr<MultiProcessState> state_;
  SharedHeap& heap_;  // usable where *state_ is open
  const uint32_t num_partitions_;
};

}  // namespace

Result<std::unique_ptr<TableStore>> OpenMultiProcessStore(const MultiProcessOptions& options) {
  const std::string kind = "multi_process_hash_map: ";
  if (options.num_partitions < 1 || options.num_partitions > 4096) {
    return InvalidArgument(kind + "num_partitions is " + std::to_string(options.num_partitions) +
                           "; choose 1 to 4096, about one per core");
  }
  if (options.allocation_rate_bytes == 0) {
    return InvalidArgument(kind + "allocation_rate is 0; choose the bytes to ask for at a time, such as 268435456");
  }
  if (options.overflow.margin == 0 || !(options.overflow.resolution_target > 0) ||
      !(options.overflow.resolution_target < 1)) {
    return InvalidArgument(kind + "overflow_margin is " + std::to_string(options.overflow.margin) +
                           " and overflow_resolution_target " + std::to_string(options.overflow.resolution_target) +
                           "; choose at least 1 row, and a target between 0 and 1");
  }
  if (options.bytes > (uint64_t{1} << 42)) {
    return InvalidArgument(kind + "shared_memory_size is " + std::to_string(options.bytes) +
                           " bytes; the most is 4398046511104 (4 TiB)");
  }
  SharedHeapOptions heap_options;
  heap_options.name = options.name;
  heap_options.auto_remove = options.auto_remove;
  heap_options.step_bytes = options.allocation_rate_bytes;
  heap_options.layout.bytes = options.bytes;
  heap_options.layout.num_partitions = options.num_partitions;
  heap_options.layout.key_bytes = static_cast<uint32_t>(options.key_bytes);
  if (options.overflow.bounded()) {
    heap_options.layout.overflow_margin = options.overflow.margin;
    heap_options.layout.overflow_target_rows = options.overflow.target_rows();
    heap_options.layout.overflow_policy = static_cast<uint32_t>(options.overflow.policy);
    heap_options.layout.refresh_time_after_fetch = options.overflow.refresh_time_after_fetch ? 1 : 0;
  }
  auto heap = SharedHeap::Attach(heap_options);
  if (!heap.ok()) return In(heap.status());
  auto state = std::make_shared<MultiProcessState>(std::move(heap).value(), options.overflow,
                                                   options.executor != nullptr ? options.executor : &InlineExecutor());
  return std::unique_ptr<TableStore>(std::make_unique<MultiProcessStore>(std::move(state)));
}

Status CheckMultiProcessStore(TableStore& store) {
  auto* checked = dynamic_cast<MultiProcessStore*>(&store);
  return checked == nullptr ? InvalidArgument("no multi_process_hash_map store") : checked->Check();
}

}  // namespace hps
