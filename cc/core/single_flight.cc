// A slot is its flight's until that takes it back or a write of its key frees it for others.
//
// A fetch claims keys, reads them, takes its claims back, hands rows to its waiters, and only then waits for others: no
// two fetches wait for each other.
//
// Lock order: a shard, then a flight's mutex. Rows are copied into a waiter's buffer under the flight's mutex; a waiter
// that gives up takes its entry out under the same mutex, so its buffer is never written after it has returned.

#include "cc/core/single_flight.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <utility>

#include "cc/base/hash.h"

namespace hps {
namespace {

constexpr std::chrono::milliseconds kCancelPoll{5};

std::span<const uint32_t> PositionsOf(const FetchRequest& request, std::vector<uint32_t>* all) {
  if (request.positions) return *request.positions;
  all->resize(request.keys.size());
  for (size_t i = 0; i < all->size(); ++i) (*all)[i] = static_cast<uint32_t>(i);
  return *all;
}

}  // namespace

// One key that a fetch waits for.
struct SingleFlightTable::Wait {
  enum class Outcome { kPending, kFound, kMissing, kFailed };
  std::shared_ptr<Flight> flight;
  uint32_t flight_position = 0;
  uint32_t position = 0;
  std::byte* row = nullptr;
  Outcome outcome = Outcome::kPending;  // guarded by the flight's mutex
};

// One fetch that others may wait for.
struct SingleFlightTable::Flight {
  std::mutex mutex;
  std::condition_variable landed;
  std::vector<Wait*> waits;  // guarded by mutex

  // `misses` of the request, ascending; without a meaning where it failed.
  void Land(bool ok, const FetchRequest& request, size_t row_bytes, const std::vector<uint32_t>& misses) {
    std::lock_guard lock(mutex);
    for (Wait* wait : waits) {
      if (!ok) {
        wait->outcome = Wait::Outcome::kFailed;
      } else if (std::binary_search(misses.begin(), misses.end(), wait->flight_position)) {
        wait->outcome = Wait::Outcome::kMissing;
      } else {
        std::memcpy(wait->row, request.rows.data + wait->flight_position * request.rows.stride_bytes, row_bytes);
        wait->outcome = Wait::Outcome::kFound;
      }
    }
    waits.clear();
    landed.notify_all();
  }
};

// The keys that one fetch waits for. No flight knows of them any more when this has been destroyed.
class SingleFlightTable::Waits {
 public:
  explicit Waits(size_t most) { waits_.reserve(most); }  // addresses stay
  ~Waits() {
    for (Wait& wait : waits_) {
      std::lock_guard lock(wait.flight->mutex);
      std::erase(wait.flight->waits, &wait);
    }
  }
  // REQUIRES: the shard of the key is locked, so the flight has not landed.
  void Add(Wait wait) {
    Wait& kept = waits_.emplace_back(std::move(wait));
    std::lock_guard lock(kept.flight->mutex);
    kept.flight->waits.push_back(&kept);
  }
  Status WaitForAll(Deadline deadline, const std::atomic<bool>* cancelled) {
    for (Wait& wait : waits_) {
      std::unique_lock lock(wait.flight->mutex);
      while (wait.outcome == Wait::Outcome::kPending) {
        if (cancelled != nullptr && cancelled->load(std::memory_order_relaxed)) {
          return Cancelled("the caller gave up while it waited for a row that another lookup is fetching");
        }
        const Deadline now = std::chrono::steady_clock::now();
        if (now >= deadline) {
          return DeadlineExceeded("a row that another lookup is fetching did not come in time");
        }
        if (cancelled != nullptr) {
          wait.flight->landed.wait_until(lock, std::min<Deadline>(deadline, now + kCancelPoll));
        } else if (deadline != kNoDeadline) {
          wait.flight->landed.wait_until(lock, deadline);
        } else {
          wait.flight->landed.wait(lock);
        }
      }
    }
    return OkStatus();
  }
  const std::vector<Wait>& all() const { return waits_; }

 private:
  std::vector<Wait> waits_;
};

SingleFlightTable::SingleFlightTable(std::shared_ptr<Table> table, Counter* waited_keys,
                                     std::chrono::nanoseconds slow_fetch)
    : table_(std::move(table)), waited_keys_(waited_keys), slow_fetch_ns_(slow_fetch.count()) {}

size_t SingleFlightTable::SlotOf(Key key) { return SlotHash(static_cast<uint64_t>(key)) % kSlots; }

Status SingleFlightTable::Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const {
  const size_t count = request.positions ? request.positions->size() : request.keys.size();
  if (count > kMostKeys) return table_->Fetch(request, misses);
  const bool slow = average_ns_.load(std::memory_order_relaxed) >= slow_fetch_ns_;
  if (!slow || count == 0 || request.rows.stride_bytes < spec().row_bytes) return FetchTimed(request, misses);
  return FetchShared(request, misses);
}

void SingleFlightTable::EndSharing(std::span<const Key> keys) {
  for (const Key key : keys) {
    const size_t slot_index = SlotOf(key);
    std::lock_guard lock(ShardOf(slot_index));
    Slot& slot = slots_[slot_index];
    if (slot.key == key) slot.flight = nullptr;
  }
}

Status SingleFlightTable::FetchTimed(const FetchRequest& request, std::vector<uint32_t>* misses) const {
  const auto start = std::chrono::steady_clock::now();
  Status status = table_->Fetch(request, misses);
  const std::chrono::nanoseconds taken = std::chrono::steady_clock::now() - start;
  // A lost update of another thread does no harm.
  const int64_t average = average_ns_.load(std::memory_order_relaxed);
  average_ns_.store(average + (taken.count() - average) / 8, std::memory_order_relaxed);
  return status;
}

Status SingleFlightTable::FetchShared(const FetchRequest& request, std::vector<uint32_t>* misses) const {
  std::vector<uint32_t> all_positions;
  const std::span<const uint32_t> positions = PositionsOf(request, &all_positions);
  std::vector<uint32_t> own;    // positions that this fetch reads
  std::vector<size_t> claimed;  // slots
  Waits waits(positions.size());
  auto flight = std::make_shared<Flight>();
  for (const uint32_t position : positions) {
    const Key key = request.keys[position];
    const size_t slot_index = SlotOf(key);
    std::lock_guard lock(ShardOf(slot_index));
    Slot& slot = slots_[slot_index];
    if (slot.flight != nullptr && slot.flight != flight && slot.key == key) {
      waits.Add({.flight = slot.flight,
                 .flight_position = slot.position,
                 .position = position,
                 .row = request.rows.data + position * request.rows.stride_bytes});
      continue;
    }
    own.push_back(position);
    if (slot.flight != nullptr) continue;
    slot = {key, position, flight};
    claimed.push_back(slot_index);
  }
  if (waited_keys_ != nullptr && !waits.all().empty()) waited_keys_->Add(waits.all().size());

  std::vector<uint32_t> missing;
  Status status;
  FetchRequest own_request = request;
  if (!own.empty()) {
    own_request.positions = own;
    status = FetchTimed(own_request, &missing);
  }
  for (const size_t slot_index : claimed) {
    std::lock_guard lock(ShardOf(slot_index));
    if (slots_[slot_index].flight == flight) slots_[slot_index].flight = nullptr;
  }
  flight->Land(status.ok(), own_request, spec().row_bytes, missing);
  HPS_RETURN_IF_ERROR(status);

  HPS_RETURN_IF_ERROR(waits.WaitForAll(request.deadline, request.cancelled));
  std::vector<uint32_t> failed;
  for (const Wait& wait : waits.all()) {  // landed: nobody writes them any more
    if (wait.outcome == Wait::Outcome::kMissing) missing.push_back(wait.position);
    if (wait.outcome == Wait::Outcome::kFailed) failed.push_back(wait.position);
  }
  if (!failed.empty()) {
    own_request.positions = failed;
    HPS_RETURN_IF_ERROR(FetchTimed(own_request, &missing));
  }
  std::sort(missing.begin(), missing.end());
  misses->insert(misses->end(), missing.begin(), missing.end());
  return OkStatus();
}

}  // namespace hps
