// Invariants
// - global_epoch only grows. A record holds 0 (idle) or an epoch that was global when its thread read it; a stale one
// is
//   only more careful.
// - An object is unreachable before its tag is taken from global_epoch, and the tag is below every later epoch. A
// reader
//   that announces an epoch above the tag has therefore read global_epoch after the object became unreachable.
// - A reader stores its record, then a full fence, then looks; a writer unlinks, then a full fence, then scans the
//   records. So the scan sees the record or the reader sees the unlinking, in every interleaving.
// - All stores to a record release and the scan acquires: what a reader read happened before what the writer does next.
// - Records are never freed, only handed from a finished thread to a new one.
// Lock order: retired_objects' mutex is a leaf and is not held while objects are destroyed.

#include "hps/epoch.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

// Thread sanitizer does not model fences; all the happens-before edges that it needs are in the records themselves.
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wtsan"

namespace hps {

struct alignas(64) EpochRecord {
  std::atomic<uint64_t> epoch{0};  // 0: no guard
  uint32_t depth = 0;              // guards of the owning thread
  std::atomic<bool> owned{true};
  EpochRecord* next = nullptr;  // constant once the record is in the list
};

namespace {

std::atomic<uint64_t> global_epoch{1};
std::atomic<EpochRecord*> first_record{nullptr};

EpochRecord* TakeRecord() {
  for (EpochRecord* record = first_record.load(std::memory_order_acquire); record != nullptr; record = record->next) {
    bool owned = false;
    if (!record->owned.load(std::memory_order_relaxed) &&
        record->owned.compare_exchange_strong(owned, true, std::memory_order_acquire)) {
      return record;
    }
  }
  auto* record = new EpochRecord;
  record->next = first_record.load(std::memory_order_relaxed);
  while (!first_record.compare_exchange_weak(record->next, record, std::memory_order_acq_rel)) {
  }
  return record;
}

// The calling thread's record. The pointer stays usable while other thread-local objects are destroyed: a guard made
// then takes a new record, which stays owned.
thread_local EpochRecord* thread_record = nullptr;

struct RecordOwner {
  ~RecordOwner() {
    if (thread_record != nullptr) std::exchange(thread_record, nullptr)->owned.store(false, std::memory_order_release);
  }
};

EpochRecord* AdoptRecord() {
  static thread_local RecordOwner owner;
  thread_record = TakeRecord();
  return thread_record;
}

constexpr std::chrono::milliseconds kReaderPatience{20};

struct RetiredObjects {
  std::mutex mutex;
  std::vector<std::pair<uint64_t, std::shared_ptr<const void>>> objects;
  std::atomic<size_t> count{0};
};

RetiredObjects& TheRetiredObjects() {
  static RetiredObjects& retired = *new RetiredObjects;  // never destroyed: guards may end during exit
  return retired;
}

void ReleaseSafeObjects(RetiredObjects& retired) {
  std::vector<std::pair<uint64_t, std::shared_ptr<const void>>> safe;
  std::unique_lock lock(retired.mutex, std::try_to_lock);  // somebody else is at it: a reader does not wait for that
  if (!lock.owns_lock()) return;
  const uint64_t safe_epoch = SafeEpoch();
  const auto first = std::partition(retired.objects.begin(), retired.objects.end(),
                                    [&](const auto& object) { return object.first >= safe_epoch; });
  safe.assign(std::make_move_iterator(first), std::make_move_iterator(retired.objects.end()));
  retired.objects.erase(first, retired.objects.end());
  retired.count.store(retired.objects.size(), std::memory_order_relaxed);
  lock.unlock();  // before `safe` is destroyed
}

}  // namespace

EpochGuard::EpochGuard() : record_(thread_record) {
  if (record_ == nullptr) record_ = AdoptRecord();
  if (record_->depth++ > 0) return;
  record_->epoch.store(global_epoch.load(std::memory_order_acquire), std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

EpochGuard::~EpochGuard() {
  if (--record_->depth > 0) return;
  record_->epoch.store(0, std::memory_order_release);
  RetiredObjects& retired = TheRetiredObjects();
  if (retired.count.load(std::memory_order_relaxed) != 0) ReleaseSafeObjects(retired);
}

uint64_t RetireEpoch() { return global_epoch.fetch_add(1, std::memory_order_acq_rel); }

uint64_t SafeEpoch() {
  // Read before the scan: a tag that is handed out during the scan is not safe.
  uint64_t safe = global_epoch.load(std::memory_order_acquire);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (EpochRecord* record = first_record.load(std::memory_order_acquire); record != nullptr; record = record->next) {
    const uint64_t epoch = record->epoch.load(std::memory_order_acquire);
    if (epoch != 0) safe = std::min(safe, epoch);
  }
  return safe;
}

void RetireObject(std::shared_ptr<const void> object) {
  // Readers are nearly always done within microseconds, and letting go of gigabytes is no work for one of them.
  if (thread_record == nullptr || thread_record->depth == 0) {
    const uint64_t epoch = RetireEpoch();
    const auto end = std::chrono::steady_clock::now() + kReaderPatience;
    do {
      if (epoch < SafeEpoch()) return;  // and `object` with it
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    } while (std::chrono::steady_clock::now() < end);
  }
  RetiredObjects& retired = TheRetiredObjects();
  {
    const std::lock_guard lock(retired.mutex);
    retired.objects.emplace_back(RetireEpoch(), std::move(object));
    retired.count.store(retired.objects.size(), std::memory_order_relaxed);
  }
  ReleaseSafeObjects(retired);
}

}  // namespace hps
