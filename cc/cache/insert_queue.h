// InsertQueue: fetches the rows of keys that lookups did not wait for, and inserts them into their caches. One a
// device.
//
// One thread and a bounded queue: what does not fit is dropped and counted, because a lookup must not wait for this.
// A key that waits in the queue already is not queued again.
//
// Thread safety: all methods may be called from any thread.

#ifndef HPS_CACHE_INSERT_QUEUE_H_
#define HPS_CACHE_INSERT_QUEUE_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "cc/base/background_worker.h"
#include "cc/base/queued_keys.h"
#include "cc/cache/device_cache.h"
#include "cc/cache/row_source.h"

namespace hps {

struct InsertBatch {
  std::shared_ptr<DeviceCache> cache;
  std::shared_ptr<RowSource> source;
  uint32_t table = 0;
  std::vector<Key> keys;
};

class InsertQueue {
 public:
  static constexpr size_t kMostKeys = size_t{1} << 20;

  explicit InsertQueue(size_t most_keys = kMostKeys) : worker_(most_keys) {}
  ~InsertQueue() { Stop(); }

  void Enqueue(InsertBatch batch);
  // Waits until everything enqueued before is done or dropped.
  void Drain() { worker_.Drain(); }
  // Drops, and counts, what is queued for the cache. Once this returns the queue does not hold the cache any more.
  void Remove(const DeviceCache* cache);
  // Ends the thread; what is queued or comes later is dropped and counted. A fetch that is under way is cancelled.
  void Stop();

  struct Stats {  // all count keys
    uint64_t inserted = 0;
    uint64_t absent = 0;    // that no tier holds
    uint64_t dropped = 0;   // because the queue was full or has ended
    uint64_t repeated = 0;  // that were in the queue
    uint64_t failed = 0;    // because a tier or the device failed
    uint64_t queued = 0;    // now
  };
  Stats stats() const;
  Status last_error() const;

 private:
  static constexpr size_t kPieceBytes = size_t{16} << 20;  // of rows fetched at a time

  void Take(const InsertBatch* waiting, bool drop);
  Status Run(const InsertBatch& batch, Stats* done);
  void Drop(const InsertBatch& batch);  // REQUIRES: mutex_
  Status Insert(const InsertBatch& batch, std::span<const Key> keys, uint64_t* absent);

  std::atomic<bool> cancelled_{false};
  QueuedKeys queued_;
  mutable std::mutex mutex_;  // guards the next five
  std::unordered_map<const InsertBatch*, std::shared_ptr<InsertBatch>> waiting_;
  const DeviceCache* busy_ = nullptr;  // whose batch is being worked on
  bool ended_ = false;
  Stats stats_;
  Status last_error_;
  std::condition_variable let_go_;  // busy_ is nullptr again
  std::vector<std::byte> rows_;     // Insert's
  BackgroundWorker worker_;
};

}  // namespace hps

#endif  // HPS_CACHE_INSERT_QUEUE_H_
