// Promoter: writes rows that only the persistent tier held into the volatile tier, behind the lookup's back.
//
// One thread, a bounded queue; when it is full, batches are dropped and counted: promotion is an optimisation and must
// never slow a lookup down. Rows already in the volatile table are left alone, so a promotion cannot undo an update.
//
// Thread safety: all methods may be called from any thread.

#ifndef HPS_CORE_PROMOTER_H_
#define HPS_CORE_PROMOTER_H_

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "hps/metrics.h"
#include "hps/table_store.h"

namespace hps {

struct PromotionBatch {
  std::shared_ptr<Table> table;
  std::vector<Key> keys;        // (n)
  std::vector<std::byte> rows;  // (n, row_bytes)
};

class Promoter {
 public:
  // Counts rows: promoted ones, dropped ones.
  Promoter(Counter* promoted_rows, Counter* dropped_rows);
  ~Promoter();

  void Enqueue(PromotionBatch batch);
  // Ends the thread; what is queued or comes later is dropped and counted. Idempotent.
  void Stop();
  // Waits until everything enqueued before the call is done, or dropped by Stop.
  void Drain();

 private:
  static constexpr size_t kQueueBytes = size_t{64} << 20;

  void Run();

  Counter* promoted_rows_;
  Counter* dropped_rows_;
  std::mutex stop_mutex_;  // makes a second Stop wait for the first
  std::mutex mutex_;       // guards the following members
  std::condition_variable changed_;
  std::deque<PromotionBatch> queue_;
  size_t queued_bytes_ = 0;
  bool busy_ = false;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace hps

#endif  // HPS_CORE_PROMOTER_H_
