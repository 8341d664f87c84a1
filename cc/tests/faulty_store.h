// FaultyStore: a store of which a test decides whether and when it answers, and as what it shows itself (shared with
// other nodes, not in memory). Several of them over one store are several nodes with one shared store.

#ifndef HPS_TESTS_FAULTY_STORE_H_
#define HPS_TESTS_FAULTY_STORE_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "hps/table_store.h"

namespace hps::testing {

// Thread-safe. Shared by a store and its tables.
class Faults {
 public:
  // Every call fails so until Heal.
  void Fail(Status status) {
    Set([&] { failure_ = std::move(status); });
  }
  // Fetches do not return before their deadline or cancellation; other calls wait for Heal.
  void Hang() {
    Set([&] { hanging_ = true; });
  }
  void Heal() {
    Set([&] {
      failure_ = Status();
      hanging_ = false;
    });
  }
  // After each upsert the first `rows` of its rows are gone, as from a store that evicts.
  void LoseOf(size_t rows) { lost_ = rows; }
  size_t lost() const { return lost_; }
  // Called once, before the next call of the store is answered.
  void WhenAsked(std::function<void()> hook) {
    Set([&] { hook_ = std::move(hook); });
  }
  uint64_t fetches() const { return fetches_; }
  std::vector<Key> keys_of_last_fetch() {
    std::lock_guard lock(mutex_);
    return last_keys_;
  }
  uint64_t upserts() const { return upserts_; }

  Status Pass(Deadline deadline = kNoDeadline, const std::atomic<bool>* cancelled = nullptr) {
    std::unique_lock lock(mutex_);
    if (const auto hook = std::exchange(hook_, nullptr)) hook();
    while (hanging_) {
      if (cancelled != nullptr && cancelled->load()) return Cancelled("faulty: the caller gave up");
      if (std::chrono::steady_clock::now() >= deadline) return DeadlineExceeded("faulty: no answer in time");
      changed_.wait_for(lock, std::chrono::milliseconds(1));
    }
    return failure_;
  }
  Status PassFetch(const FetchRequest& request) {
    ++fetches_;
    Set([&] { last_keys_.assign(request.keys.begin(), request.keys.end()); });
    return Pass(request.deadline, request.cancelled);
  }
  Status PassUpsert() {
    ++upserts_;
    return Pass();
  }

 private:
  template <typename Change>
  void Set(Change&& change) {
    std::lock_guard lock(mutex_);
    change();
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  Status failure_;
  bool hanging_ = false;
  std::vector<Key> last_keys_;
  std::function<void()> hook_;
  std::atomic<size_t> lost_{0};
  std::atomic<uint64_t> fetches_{0};
  std::atomic<uint64_t> upserts_{0};
};

// What a store and its tables have in common.
struct FaultyState {
  std::shared_ptr<Faults> faults;
  bool addressable = true;
  std::atomic<bool> closed{false};

  Status CheckOpen() const { return closed ? FailedPrecondition("faulty: the store was closed") : OkStatus(); }
};

class FaultyTable final : public Table {
 public:
  FaultyTable(std::shared_ptr<Table> table, std::shared_ptr<FaultyState> state)
      : table_(std::move(table)), state_(std::move(state)) {}

  const TableSpec& spec() const override { return table_->spec(); }
  Status Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const override {
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    HPS_RETURN_IF_ERROR(state_->faults->PassFetch(request));
    return table_->Fetch(request, misses);
  }
  Status Locate(std::span<const Key> keys, std::span<const std::byte*> rows) const override {
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    if (!state_->addressable) return Unimplemented("faulty: rows do not lie in memory; use Fetch");
    HPS_RETURN_IF_ERROR(state_->faults->Pass());
    return table_->Locate(keys, rows);
  }
  Status Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) override {
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    HPS_RETURN_IF_ERROR(state_->faults->PassUpsert());
    HPS_RETURN_IF_ERROR(table_->Upsert(keys, rows, options));
    const size_t lost = std::min(state_->faults->lost(), keys.size());
    return lost == 0 ? OkStatus() : table_->Erase(keys.first(lost), nullptr);
  }
  Status Erase(std::span<const Key> keys, uint64_t* erased) override {
    HPS_RETURN_IF_ERROR(Ask());
    return table_->Erase(keys, erased);
  }
  Status Scan(const ScanVisitor& visitor) const override {
    HPS_RETURN_IF_ERROR(Ask());
    return table_->Scan(visitor);
  }
  Result<TableStats> Stats() const override {
    HPS_RETURN_IF_ERROR(Ask());
    return table_->Stats();
  }

 private:
  Status Ask() const {
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    return state_->faults->Pass();
  }
  const std::shared_ptr<Table> table_;
  const std::shared_ptr<FaultyState> state_;
};

struct FaultyOptions {
  std::optional<bool> shared = std::nullopt;       // absent: as the store below
  std::optional<bool> addressable = std::nullopt;  // false: rows do not lie in memory
  bool closes_store = true;                        // Close closes the store below too
};

class FaultyStore final : public TableStore {
 public:
  FaultyStore(std::shared_ptr<TableStore> store, std::shared_ptr<Faults> faults, const FaultyOptions& options = {})
      : store_(std::move(store)), options_(options), state_(std::make_shared<FaultyState>()) {
    state_->faults = std::move(faults);
    state_->addressable = capabilities().addressable;
  }
  std::string_view kind() const override { return store_->kind(); }
  StoreCapabilities capabilities() const override {
    StoreCapabilities capabilities = store_->capabilities();
    capabilities.shared = options_.shared.value_or(capabilities.shared);
    capabilities.addressable = options_.addressable.value_or(capabilities.addressable);
    return capabilities;
  }
  uint64_t MemoryFor(std::span<const TableLoad> loads) const override { return store_->MemoryFor(loads); }
  Result<std::shared_ptr<Table>> OpenTable(const TableSpec& spec) override {
    HPS_RETURN_IF_ERROR(Ask());
    return Wrap(store_->OpenTable(spec));
  }
  Result<std::shared_ptr<Table>> CreateTable(const TableSpec& spec) override {
    HPS_RETURN_IF_ERROR(Ask());
    return Wrap(store_->CreateTable(spec));
  }
  Status DropTable(std::string_view name) override {
    HPS_RETURN_IF_ERROR(Ask());
    return store_->DropTable(name);
  }
  Result<std::vector<std::string>> ListTables() const override {
    HPS_RETURN_IF_ERROR(Ask());
    return store_->ListTables();
  }
  Result<std::optional<std::string>> ReadRecord(std::string_view name) const override {
    HPS_RETURN_IF_ERROR(Ask());
    return store_->ReadRecord(name);
  }
  Status WriteRecord(std::string_view name, std::string_view value) override {
    HPS_RETURN_IF_ERROR(Ask());
    return store_->WriteRecord(name, value);
  }
  Status EraseRecord(std::string_view name) override {
    HPS_RETURN_IF_ERROR(Ask());
    return store_->EraseRecord(name);
  }
  std::string MemberName() const override { return store_->MemberName(); }
  bool MemberIsGone(std::string_view name) const override { return store_->MemberIsGone(name); }
  Status Flush() override {
    HPS_RETURN_IF_ERROR(Ask());
    return store_->Flush();
  }
  Status Close() override {
    state_->closed = true;
    return options_.closes_store ? store_->Close() : OkStatus();
  }

 private:
  Status Ask() const {
    HPS_RETURN_IF_ERROR(state_->CheckOpen());
    return state_->faults->Pass();
  }
  Result<std::shared_ptr<Table>> Wrap(Result<std::shared_ptr<Table>> table) {
    if (!table.ok()) return table;
    return std::shared_ptr<Table>(std::make_shared<FaultyTable>(std::move(table).value(), state_));
  }
  const std::shared_ptr<TableStore> store_;
  const FaultyOptions options_;
  const std::shared_ptr<FaultyState> state_;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_FAULTY_STORE_H_
