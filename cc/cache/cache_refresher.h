// Refresh of caches from the tiers: the rows that are in a cache are read anew, so that what the tiers have got by
// other ways than Update reaches it. Keys are not added. Keys that no tier holds any more are taken out, unless a tier
// could not be asked.
//
// Thread safety: all calls may be made from any thread.

#ifndef HPS_CACHE_CACHE_REFRESHER_H_
#define HPS_CACHE_CACHE_REFRESHER_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cc/cache/device_cache.h"
#include "cc/cache/row_source.h"

namespace hps {

struct RefreshReport {
  uint64_t rows_refreshed = 0;
  uint64_t rows_erased = 0;  // that no tier holds any more
  uint64_t rows_kept = 0;    // that a tier which could not be asked may hold
  uint64_t steps = 0;
};

// Refreshes the whole cache in steps of `fraction` of its buckets (0 < fraction <= 1; fewer where a step would be more
// than 64 MiB of rows). kInvalidArgument, kCancelled, and what the tiers and the device report; rows refreshed so far
// stay so.
Status RefreshCache(DeviceCache& cache, RowSource& source, uint32_t table, double fraction,
                    const std::atomic<bool>* cancelled, RefreshReport* report);

// Refreshes caches again and again by one thread, which also trims pools of workspaces.
class CacheRefresher {
 public:
  struct Job {
    std::shared_ptr<DeviceCache> cache;
    std::shared_ptr<RowSource> source;
    uint32_t table = 0;
    double fraction = 0.1;                  // cache_refresh_percentage_per_iteration
    std::chrono::milliseconds delay{0};     // refresh_delay: before the first time
    std::chrono::milliseconds interval{0};  // refresh_interval: between end and beginning; 0: only once
  };

  static constexpr std::chrono::milliseconds kTrimInterval{10'000};

  explicit CacheRefresher(std::chrono::milliseconds trim_interval = kTrimInterval);
  ~CacheRefresher();

  void Add(Job job);
  // The cache is not refreshed any more once this returns.
  void Remove(const DeviceCache* cache);
  // Calls Trim of the pool again and again for as long as somebody else holds it.
  void AddPool(std::weak_ptr<WorkspacePool> pool);
  // Ends the thread and lets go of all caches. Idempotent.
  void Stop();

  struct Stats {
    uint64_t refreshes = 0;  // of a whole cache
    uint64_t failures = 0;
    RefreshReport total;
    uint64_t trims = 0;  // of all pools
  };
  Stats stats() const;
  Status last_error() const;

 private:
  using Clock = std::chrono::steady_clock;
  struct Planned {
    Job job;
    Clock::time_point due;
  };

  void Run();
  void RunJob(std::unique_lock<std::mutex>& lock, Planned& planned);
  void TrimPools(std::unique_lock<std::mutex>& lock);

  const std::chrono::milliseconds trim_interval_;
  std::mutex stop_mutex_;     // before mutex_
  mutable std::mutex mutex_;  // guards the following members
  std::condition_variable changed_;
  std::vector<Planned> jobs_;
  std::vector<std::weak_ptr<WorkspacePool>> pools_;
  Clock::time_point trim_due_;  // where there are pools
  const DeviceCache* busy_ = nullptr;
  std::atomic<bool> cancelled_{false};  // ends the refresh under way
  bool stopping_ = false;
  Stats stats_;
  Status last_error_;
  std::thread thread_;
};

}  // namespace hps

#endif  // HPS_CACHE_CACHE_REFRESHER_H_
