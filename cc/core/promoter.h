// Promoter: writes rows that only the persistent tier held into the volatile tier, behind the lookup's back.
//
// One thread, a bounded queue; when it is full, or while the volatile store does not answer, rows are dropped and
// counted: promotion is an optimisation and must never slow a lookup down. A row that waits in the queue already is not
// queued again. Rows already in the volatile table are left alone, so a promotion cannot undo an update.
//
// Thread safety: all methods may be called from any thread.

#ifndef HPS_CORE_PROMOTER_H_
#define HPS_CORE_PROMOTER_H_

#include <cstddef>
#include <memory>
#include <vector>

#include "cc/base/background_worker.h"
#include "cc/base/queued_keys.h"
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
  void Enqueue(PromotionBatch batch);
  // Ends the thread; what is queued or comes later is dropped and counted. Idempotent.
  void Stop() { worker_.Stop(); }
  // Waits until everything enqueued before the call is done, or dropped by Stop.
  void Drain() { worker_.Drain(); }

 private:
  static constexpr size_t kQueueBytes = size_t{64} << 20;

  void Promote(const PromotionBatch& batch, bool dropped);
  Status Write(const PromotionBatch& batch);
  void DropRepeated(PromotionBatch* batch);

  QueuedKeys queued_;
  BackgroundWorker worker_{kQueueBytes};
};

}  // namespace hps

#endif  // HPS_CORE_PROMOTER_H_
