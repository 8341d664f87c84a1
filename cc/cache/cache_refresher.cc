// Lock order: stop_mutex_, mutex_. Tiers and devices are asked with neither held.

#include "cc/cache/cache_refresher.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace hps {
namespace {

constexpr size_t kStepBytes = size_t{64} << 20;

// Reads the rows of the keys anew and writes them into the cache.
Status RefreshKeys(DeviceCache& cache, RowSource& source, uint32_t table, const std::vector<Key>& keys,
                   const std::atomic<bool>* cancelled, std::vector<std::byte>& rows, RefreshReport* report) {
  const size_t row_bytes = cache.spec().row_bytes;
  const EmbeddingCache::Stamp read_at = cache.Now();
  rows.resize(keys.size() * row_bytes);
  const auto found = std::make_unique<bool[]>(keys.size());
  const RowRequest request{table, keys, rows.data(), found.get()};
  LookupReport origin;
  HPS_RETURN_IF_ERROR(source.Fetch(std::span(&request, 1), {.cancelled = cancelled}, {}, &origin));
  std::vector<Key> held, gone;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!found[i]) {
      gone.push_back(keys[i]);
      continue;
    }
    if (held.size() != i) std::memcpy(rows.data() + held.size() * row_bytes, rows.data() + i * row_bytes, row_bytes);
    held.push_back(keys[i]);
  }
  HPS_RETURN_IF_ERROR(cache.Refresh(held, {rows.data(), row_bytes}, read_at));
  report->rows_refreshed += held.size();
  if (origin.rows_unavailable + origin.rows_skipped_volatile + origin.rows_skipped_persistent > 0) {
    report->rows_kept += gone.size();
    return OkStatus();
  }
  report->rows_erased += gone.size();
  return cache.Erase(gone);
}

}  // namespace

Status RefreshCache(DeviceCache& cache, RowSource& source, uint32_t table, double fraction,
                    const std::atomic<bool>* cancelled, RefreshReport* report) {
  if (!(fraction > 0.0 && fraction <= 1.0)) {
    return InvalidArgument(cache.spec().name + ": cache_refresh_percentage_per_iteration is " +
                           std::to_string(fraction) + "; refreshing needs more than 0 and at most 1");
  }
  const uint64_t bucket_bytes = uint64_t{cuda::kCacheWays} * cache.spec().row_bytes;
  const auto planned = static_cast<uint64_t>(std::ceil(static_cast<double>(cache.num_buckets()) * fraction));
  const uint64_t step = std::clamp<uint64_t>(planned, 1, std::max<uint64_t>(kStepBytes / bucket_bytes, 1));
  std::vector<Key> keys;
  std::vector<std::byte> rows;
  for (uint64_t first = 0; first < cache.num_buckets(); first += step) {
    if (cancelled != nullptr && cancelled->load(std::memory_order_relaxed)) {
      return Cancelled(cache.spec().name + ": the refresh was stopped");
    }
    keys.clear();
    HPS_RETURN_IF_ERROR(cache.Dump(first, std::min(first + step, cache.num_buckets()), &keys));
    ++report->steps;
    if (keys.empty()) continue;
    HPS_RETURN_IF_ERROR(RefreshKeys(cache, source, table, keys, cancelled, rows, report));
  }
  return cache.Flush();
}

CacheRefresher::CacheRefresher(std::chrono::milliseconds trim_interval)
    : trim_interval_(trim_interval), thread_([this] { Run(); }) {}

CacheRefresher::~CacheRefresher() { Stop(); }

void CacheRefresher::Add(Job job) {
  {
    std::lock_guard lock(mutex_);
    const auto due = Clock::now() + job.delay;
    jobs_.push_back({std::move(job), due});
  }
  changed_.notify_all();
}

void CacheRefresher::Remove(const DeviceCache* cache) {
  std::unique_lock lock(mutex_);
  const auto of_cache = [&](const Planned& planned) { return planned.job.cache.get() == cache; };
  std::vector<Planned> removed;  // freed after the lock
  for (const Planned& planned : jobs_) {
    if (of_cache(planned)) removed.push_back(planned);
  }
  std::erase_if(jobs_, of_cache);
  if (busy_ == cache) {
    cancelled_.store(true);
    changed_.wait(lock, [&] { return busy_ != cache; });
  }
  lock.unlock();
}

void CacheRefresher::Stop() {
  std::lock_guard stop_lock(stop_mutex_);
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    cancelled_.store(true);
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  std::vector<Planned> jobs;  // freed after the lock
  std::lock_guard lock(mutex_);
  jobs.swap(jobs_);
  pools_.clear();
}

CacheRefresher::Stats CacheRefresher::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

Status CacheRefresher::last_error() const {
  std::lock_guard lock(mutex_);
  return last_error_;
}

void CacheRefresher::AddPool(std::weak_ptr<WorkspacePool> pool) {
  {
    std::lock_guard lock(mutex_);
    if (pools_.empty()) trim_due_ = Clock::now() + trim_interval_;
    pools_.push_back(std::move(pool));
  }
  changed_.notify_all();
}

void CacheRefresher::TrimPools(std::unique_lock<std::mutex>& lock) {
  const std::vector<std::weak_ptr<WorkspacePool>> pools = pools_;
  lock.unlock();
  Status status;
  for (const auto& pool : pools) {
    const std::shared_ptr<WorkspacePool> held = pool.lock();
    if (held == nullptr) continue;
    const Status trimmed = held->Trim();
    if (status.ok()) status = trimmed;
  }
  lock.lock();
  if (!status.ok()) last_error_ = status;
  ++stats_.trims;
  std::erase_if(pools_, [](const auto& pool) { return pool.expired(); });
  trim_due_ = Clock::now() + trim_interval_;
}

void CacheRefresher::RunJob(std::unique_lock<std::mutex>& lock, Planned& planned) {
  Job job = planned.job;
  // Again an interval after its end; until then it is never due.
  planned.due = Clock::time_point::max();
  busy_ = job.cache.get();
  cancelled_.store(false);
  lock.unlock();
  RefreshReport report;
  const Status status = RefreshCache(*job.cache, *job.source, job.table, job.fraction, &cancelled_, &report);
  const DeviceCache* const cache = job.cache.get();
  job.source.reset();
  job.cache.reset();  // may free it, when it was removed meanwhile
  lock.lock();
  stats_.total.rows_refreshed += report.rows_refreshed;
  stats_.total.rows_erased += report.rows_erased;
  stats_.total.rows_kept += report.rows_kept;
  stats_.total.steps += report.steps;
  if (status.ok()) {
    ++stats_.refreshes;
  } else if (status.code() != StatusCode::kCancelled) {
    ++stats_.failures;
    last_error_ = status;
  }
  for (size_t i = jobs_.size(); i-- > 0;) {
    if (jobs_[i].job.cache.get() != cache || jobs_[i].due != Clock::time_point::max()) continue;
    if (job.interval.count() > 0) {
      jobs_[i].due = Clock::now() + job.interval;
    } else {
      jobs_.erase(jobs_.begin() + static_cast<ptrdiff_t>(i));
    }
  }
  busy_ = nullptr;
  changed_.notify_all();
}

void CacheRefresher::Run() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    const auto next =
        std::min_element(jobs_.begin(), jobs_.end(), [](const auto& a, const auto& b) { return a.due < b.due; });
    const bool trims = !pools_.empty();
    if (next == jobs_.end() && !trims) {
      changed_.wait(lock);
      continue;
    }
    const auto now = Clock::now();
    if (trims && trim_due_ <= now) {
      TrimPools(lock);
    } else if (next != jobs_.end() && next->due <= now) {
      RunJob(lock, *next);
    } else {
      Clock::time_point due = trims ? trim_due_ : Clock::time_point::max();
      if (next != jobs_.end()) due = std::min(due, next->due);
      changed_.wait_until(lock, due);
    }
  }
}

}  // namespace hps
