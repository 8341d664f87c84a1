// Promoter: writes rows that only the persistent tier held into the volatile tier, behind the lookup's back.
//
// One thread, a bounded queue; when it is full, or while the volatile store does not answer, rows are dropped and
// counted: promotion is an optimisation and must never slow a lookup down. A row that waits in the queue already is not
// queued again. Rows already in the volatile table are left alone, so a promotion cannot undo an update.
//
// Thread safety: all methods may be called from any thread.

#ifndef HPS_CORE_PROMOTER_H_
#define HPS_CORE_PROMOTER_H_

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cc/core/circuit_breaker.h"
#include "hps/metrics.h"
#include "hps/table_store.h"

namespace hps {

// All count rows; each may be absent.
struct PromotionCounters {
  Counter* promoted = nullptr;
  Counter* dropped = nullptr;
  Counter* repeated = nullptr;  // not queued, because they were queued already
};

struct PromotionBatch {
  std::shared_ptr<Table> table;
  std::vector<Key> keys;              // (n)
  std::vector<std::byte> rows;        // (n, row_bytes)
  CircuitBreaker* breaker = nullptr;  // of the table's store, or nullptr; outlives the promoter
  PromotionCounters counters;         // outlive the promoter
};

class Promoter {
 public:
  Promoter();
  ~Promoter();

  void Enqueue(PromotionBatch batch);
  // Ends the thread; what is queued or comes later is dropped and counted. Idempotent.
  void Stop();
  // Waits until everything enqueued before the call is done, or dropped by Stop.
  void Drain();

 private:
  static constexpr size_t kQueueBytes = size_t{64} << 20;
  static constexpr size_t kFilterSlots = size_t{1} << 16;

  void Run();
  Status Write(const PromotionBatch& batch);
  // What stands for a row in the filter; never 0.
  static uint64_t Mark(const Table& table, Key key);
  void DropRepeated(PromotionBatch* batch);  // REQUIRES: mutex_
  void Forget(const PromotionBatch& batch);  // REQUIRES: mutex_

  std::mutex stop_mutex_;  // makes a second Stop wait for the first
  std::mutex mutex_;       // guards the following members
  std::condition_variable changed_;
  std::deque<PromotionBatch> queue_;
  size_t queued_bytes_ = 0;
  // Rows in the queue, each at the place its mark says; a place that is taken is taken over.
  std::vector<uint64_t> filter_ = std::vector<uint64_t>(kFilterSlots);
  bool busy_ = false;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace hps

#endif  // HPS_CORE_PROMOTER_H_
