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
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

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

  explicit InsertQueue(size_t most_keys = kMostKeys);
  ~InsertQueue();

  void Enqueue(InsertBatch batch);
  // Waits until everything enqueued before is done or dropped.
  void Drain();
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
  static constexpr size_t kFilterSlots = size_t{1} << 16;
  static constexpr size_t kPieceBytes = size_t{16} << 20;  // of rows fetched at a time

  void Run();
  Status Insert(const InsertBatch& batch, std::span<const Key> keys, uint64_t* absent);
  static uint64_t Mark(const InsertBatch& batch, Key key);
  void Forget(const InsertBatch& batch);  // REQUIRES: mutex_

  const size_t most_keys_;
  std::atomic<bool> cancelled_{false};
  std::mutex stop_mutex_;     // makes a second Stop wait for the first; before mutex_
  mutable std::mutex mutex_;  // guards the following members
  std::condition_variable changed_;
  std::deque<InsertBatch> queue_;
  std::vector<uint64_t> filter_ = std::vector<uint64_t>(kFilterSlots);  // keys in the queue, by their marks
  Stats stats_;
  Status last_error_;
  const DeviceCache* busy_ = nullptr;  // whose batch is being worked on
  bool stopping_ = false;
  std::vector<std::byte> rows_;  // Insert's
  std::thread thread_;
};

}  // namespace hps

#endif  // HPS_CACHE_INSERT_QUEUE_H_
