// SingleFlightTable: lookups that need the same key from a slow table at the same time ask it once.
//
// An adaptor over a Table. The first fetch of a key claims it; fetches that come while it is on its way wait for it and
// are given the row. A waiter's deadline or cancellation ends its own wait only. When the first fetch fails, its
// waiters ask for themselves. A waiter may be given a row that was read shortly before it asked, but none that was read
// before an Upsert or Erase of this adaptor that had returned by then: those end the sharing of their keys.
//
// Waiting for another thread costs more than a quick read, so keys are claimed only while fetches of the table have
// lately taken `slow_fetch` or longer on average, and only by fetches of at most kMostKeys keys: nobody with one key
// waits for the end of a large batch. The table of keys on their way is bounded; a key that finds its place taken by
// another is fetched without being claimed.
//
// Thread safety: as Table. Ownership: keeps the table alive.

#ifndef HPS_CORE_SINGLE_FLIGHT_H_
#define HPS_CORE_SINGLE_FLIGHT_H_

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <vector>

#include "hps/metrics.h"
#include "hps/table_store.h"

namespace hps {

class SingleFlightTable final : public Table {
 public:
  static constexpr size_t kMostKeys = 256;
  static constexpr std::chrono::nanoseconds kSlowFetch = std::chrono::microseconds(500);

  // Counts in *waited_keys, if given, the keys that were waited for.
  explicit SingleFlightTable(std::shared_ptr<Table> table, Counter* waited_keys = nullptr,
                             std::chrono::nanoseconds slow_fetch = kSlowFetch);

  const TableSpec& spec() const override { return table_->spec(); }
  Status Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const override;
  Status Locate(std::span<const Key> keys, std::span<const std::byte*> rows) const override {
    return table_->Locate(keys, rows);
  }
  Status Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) override {
    Status status = table_->Upsert(keys, rows, options);
    EndSharing(keys);
    return status;
  }
  Status Erase(std::span<const Key> keys, uint64_t* erased) override {
    Status status = table_->Erase(keys, erased);
    EndSharing(keys);
    return status;
  }
  Status Scan(const ScanVisitor& visitor) const override { return table_->Scan(visitor); }
  Result<TableStats> Stats() const override { return table_->Stats(); }

 private:
  static constexpr size_t kSlots = 4096;
  static constexpr size_t kShards = 64;

  struct Flight;
  struct Wait;
  class Waits;
  struct Slot {
    Key key = 0;
    uint32_t position = 0;           // of the key in the flight's request
    std::shared_ptr<Flight> flight;  // nullptr: free
  };

  static size_t SlotOf(Key key);
  std::mutex& ShardOf(size_t slot) const { return shards_[slot % kShards]; }
  void EndSharing(std::span<const Key> keys);
  Status FetchTimed(const FetchRequest& request, std::vector<uint32_t>* misses) const;
  Status FetchShared(const FetchRequest& request, std::vector<uint32_t>* misses) const;

  const std::shared_ptr<Table> table_;
  Counter* const waited_keys_;
  const int64_t slow_fetch_ns_;
  mutable std::atomic<int64_t> average_ns_{0};  // of fetches of at most kMostKeys keys
  mutable std::array<std::mutex, kShards> shards_;
  mutable std::vector<Slot> slots_{kSlots};
};

}  // namespace hps

#endif  // HPS_CORE_SINGLE_FLIGHT_H_
