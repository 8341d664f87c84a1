// Invariant: `missing` of a walk holds, after each stage, exactly the positions that no tier so far has found,
// ascending.

#include "cc/core/tier_stack.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <numeric>

#include "cc/core/first_error.h"

namespace hps {
namespace {

class Stopwatch {
 public:
  uint64_t nanoseconds() const {
    return static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start_).count());
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Asks the volatile table for keys [first, last) of one walk.
Status FetchVolatilePiece(TierWalk& walk, size_t first, size_t last, Deadline deadline, std::mutex& mutex) {
  thread_local std::vector<uint32_t> misses;
  misses.clear();
  const size_t row_bytes = walk.stack->row_bytes();
  FetchRequest request;
  request.keys = walk.keys.subspan(first, last - first);
  request.rows = {walk.rows + first * row_bytes, row_bytes};
  request.output_bytes = walk.keys.size() * row_bytes;
  request.deadline = deadline;
  HPS_RETURN_IF_ERROR(walk.stack->volatile_table->Fetch(request, &misses));
  if (misses.empty()) return OkStatus();
  std::lock_guard lock(mutex);
  for (uint32_t position : misses) walk.missing.push_back(static_cast<uint32_t>(first) + position);
  return OkStatus();
}

Status FetchVolatile(std::span<TierWalk> walks, Executor& executor, Deadline deadline) {
  size_t total = 0;
  for (TierWalk& walk : walks) {
    walk.missing.clear();
    if (walk.stack->volatile_table && !walk.skip_volatile) {
      total += walk.keys.size();
    } else {
      walk.missing.resize(walk.keys.size());
      std::iota(walk.missing.begin(), walk.missing.end(), 0u);
    }
  }
  if (total == 0) return OkStatus();
  FirstError error;
  std::mutex mutex;
  // The pieces cut the concatenation of all tables' keys, so many small tables fill the threads as well as one big one.
  executor.ParallelFor(total, kKeysPerPiece, [&](size_t first, size_t last) {
    size_t base = 0;
    for (TierWalk& walk : walks) {
      if (!walk.stack->volatile_table || walk.skip_volatile) continue;
      const size_t end = base + walk.keys.size();
      if (first < end && last > base && !error.failed()) {
        error.Set(FetchVolatilePiece(walk, std::max(first, base) - base, std::min(last, end) - base, deadline, mutex));
      }
      base = end;
      if (base >= last) break;
    }
  });
  HPS_RETURN_IF_ERROR(error.status());
  if (total > kKeysPerPiece) {
    for (TierWalk& walk : walks) std::sort(walk.missing.begin(), walk.missing.end());
  }
  return OkStatus();
}

// `before` and `after` are ascending, after is a subset: what the persistent table found goes up.
void Promote(const TierWalk& walk, const std::vector<uint32_t>& before, const std::vector<uint32_t>& after) {
  const size_t row_bytes = walk.stack->row_bytes();
  PromotionBatch batch;
  batch.table = walk.stack->volatile_table;
  auto still_missing = after.begin();
  for (uint32_t position : before) {
    if (still_missing != after.end() && *still_missing == position) {
      ++still_missing;
      continue;
    }
    batch.keys.push_back(walk.keys[position]);
    const std::byte* row = walk.rows + position * row_bytes;
    batch.rows.insert(batch.rows.end(), row, row + row_bytes);
  }
  if (!batch.keys.empty()) walk.stack->promoter->Enqueue(std::move(batch));
}

Status FetchPersistent(TierWalk& walk, Deadline deadline, LookupReport* counts) {
  const TierStack& stack = *walk.stack;
  const size_t row_bytes = stack.row_bytes();
  std::vector<uint32_t> still_missing;
  FetchRequest request;
  request.keys = walk.keys;
  request.positions = walk.missing;
  request.rows = {walk.rows, row_bytes};
  request.deadline = deadline;
  HPS_RETURN_IF_ERROR(stack.persistent_table->Fetch(request, &still_missing));
  counts->rows_from_persistent = walk.missing.size() - still_missing.size();
  if (stack.promoter != nullptr && stack.volatile_table) Promote(walk, walk.missing, still_missing);
  walk.missing.swap(still_missing);
  return OkStatus();
}

void FillDefaults(const TierWalk& walk) {
  const size_t row_bytes = walk.stack->row_bytes();
  for (uint32_t position : walk.missing) {
    std::memcpy(walk.rows + position * row_bytes, walk.stack->default_row.data(), row_bytes);
  }
  if (walk.found == nullptr) return;
  std::fill(walk.found, walk.found + walk.keys.size(), true);
  for (uint32_t position : walk.missing) walk.found[position] = false;
}

}  // namespace

Status FetchRows(std::span<TierWalk> walks, Executor& executor, Executor& io_executor, Deadline deadline,
                 LookupReport* report) {
  Stopwatch volatile_watch;
  HPS_RETURN_IF_ERROR(FetchVolatile(walks, executor, deadline));
  report->volatile_nanoseconds += volatile_watch.nanoseconds();

  std::vector<LookupReport> counts(walks.size());
  std::vector<size_t> lower;  // walks that go on to their persistent table
  for (size_t i = 0; i < walks.size(); ++i) {
    if (!walks[i].skip_volatile) counts[i].rows_from_volatile = walks[i].keys.size() - walks[i].missing.size();
    if (!walks[i].missing.empty() && walks[i].stack->persistent_table) lower.push_back(i);
  }
  if (!lower.empty()) {
    Stopwatch persistent_watch;
    FirstError error;
    io_executor.ParallelFor(lower.size(), 1, [&](size_t first, size_t last) {
      for (size_t i = first; i < last && !error.failed(); ++i) {
        error.Set(FetchPersistent(walks[lower[i]], deadline, &counts[lower[i]]));
      }
    });
    HPS_RETURN_IF_ERROR(error.status());
    report->persistent_nanoseconds += persistent_watch.nanoseconds();
  }

  for (size_t i = 0; i < walks.size(); ++i) {
    FillDefaults(walks[i]);
    const TierMetrics& metrics = walks[i].stack->metrics;
    metrics.rows_from_volatile->Add(counts[i].rows_from_volatile);
    metrics.rows_from_persistent->Add(counts[i].rows_from_persistent);
    metrics.rows_from_default->Add(walks[i].missing.size());
    report->rows_from_volatile += counts[i].rows_from_volatile;
    report->rows_from_persistent += counts[i].rows_from_persistent;
    report->rows_from_default += walks[i].missing.size();
  }
  return OkStatus();
}

}  // namespace hps
