// Invariant: `missing` of a walk holds, after each stage, exactly the positions that no tier so far has found and that
// a lower tier may still give, ascending; `unavailable` those that have been given up for the default value.

#include "cc/core/tier_stack.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <numeric>

#include "cc/core/first_error.h"

namespace hps {
namespace {

using Clock = std::chrono::steady_clock;

constexpr const char* kLookupTime = "the lookup's time (lookup_timeout_ms, or the caller's deadline)";

class Stopwatch {
 public:
  Clock::time_point start() const { return start_; }
  uint64_t nanoseconds() const {
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start_).count());
  }

 private:
  Clock::time_point start_ = Clock::now();
};

void Count(Counter* counter, uint64_t n) {
  if (counter != nullptr && n > 0) counter->Add(n);
}

// How long a lookup waits for the tier. A tier that something else can stand in for leaves time for that.
Deadline TierDeadline(const Tier& tier, Clock::time_point now, Deadline deadline) {
  if (tier.addressable) return deadline;
  Deadline result = deadline;
  if (deadline != kNoDeadline && tier.when_unavailable != WhenUnavailable::kFail && deadline > now) {
    const auto left = deadline - now;
    result = now + (tier.when_unavailable == WhenUnavailable::kNextTier ? left / 2 : left / 10 * 9);
  }
  if (tier.timeout.count() > 0) result = std::min<Deadline>(result, now + tier.timeout);
  return result;
}

Status AskTable(const Tier& tier, const FetchRequest& request, const LookupLimits& limits,
                std::vector<uint32_t>* misses, bool probe = false) {
  if (tier.breaker == nullptr) return tier.table->Fetch(request, misses);
  HPS_RETURN_IF_ERROR(tier.breaker->Admit());
  Status status = tier.table->Fetch(request, misses);
  if (status.ok()) {
    // A probe may end the time of a store that is left out, and says nothing about the rows that lookups ask for.
    if (probe && tier.breaker->closed()) {
      tier.breaker->Undecided();
    } else {
      tier.breaker->Succeeded();
    }
    return status;
  }
  Count(tier.fetches_failed, 1);
  if (!IsUnavailable(tier, status, limits)) {
    tier.breaker->Undecided();
  } else if (status.code() == StatusCode::kDataLoss) {
    tier.breaker->Succeeded();  // it answers
    tier.breaker->Damaged(status);
  } else {
    tier.breaker->Failed(status);
  }
  return status;
}

// What the lookup, or a probe, is told of a tier that it did not get an answer from. Limits of time are named by their
// keys, and only those that were at work.
Status Explain(const Tier& tier, const Status& error, const LookupLimits& limits) {
  const bool too_late = limits.deadline != kNoDeadline && Clock::now() >= limits.deadline;
  if (!IsUnavailable(tier, error, limits)) {
    if (error.code() != StatusCode::kDeadlineExceeded) return error;
    return Status(error.code(), error.message() + "; " + kLookupTime + " was not enough");
  }
  const std::string name = tier.breaker != nullptr ? tier.breaker->name() : std::string(tier.option);
  const std::string option(tier.option);
  std::string text = "the " + name + " cannot be asked: " + error.message();
  if (too_late) text += std::string("; ") + kLookupTime + " was over";
  if (!too_late && error.code() == StatusCode::kDeadlineExceeded) {
    if (tier.timeout.count() > 0) text += "; raise " + option + ".timeout_ms if it is only slow";
    if (limits.deadline != kNoDeadline) text += std::string("; it had a part of ") + kLookupTime;
  }
  if (tier.when_unavailable == WhenUnavailable::kFail) {
    text += "; lookups can do without it by " + option + ".when_unavailable";
  }
  return Status(error.code(), text);
}

// Of a tier that failed with `error`: what becomes of the positions [first, last) of a walk. With kNextTier they go
// into *missing, with kDefault into *unavailable; else the lookup fails.
template <typename Iterator>
Status SkipTier(const Tier& tier, const Status& error, const LookupLimits& limits, Iterator first, Iterator last,
                std::vector<uint32_t>* missing, std::vector<uint32_t>* unavailable, uint64_t* skipped) {
  if (tier.when_unavailable == WhenUnavailable::kFail || !IsUnavailable(tier, error, limits)) {
    return Explain(tier, error, limits);
  }
  HPS_RETURN_IF_ERROR(CheckLimits(limits));
  std::vector<uint32_t>* to = tier.when_unavailable == WhenUnavailable::kNextTier ? missing : unavailable;
  to->insert(to->end(), first, last);
  *skipped += static_cast<uint64_t>(std::distance(first, last));
  return OkStatus();
}

// ---- tables in this process's memory, in pieces -----------------------------------------------------------------

bool InPieces(const TierWalk& walk) {
  return walk.stack->volatile_tier.table && walk.stack->volatile_tier.addressable && !walk.skip_volatile;
}

void FillDefault(const TierWalk& walk, uint32_t position) {
  const size_t row_bytes = walk.stack->row_bytes();
  std::memcpy(walk.rows + position * row_bytes, walk.stack->default_row.data(), row_bytes);
  if (walk.found != nullptr) walk.found[position] = false;
}

// Asks the volatile table for keys [first, last) of one walk. *final: their rows and found marks will not change.
Status FetchPiece(TierWalk& walk, size_t first, size_t last, const LookupLimits& limits, bool streams,
                  std::mutex& mutex, bool* final) {
  thread_local std::vector<uint32_t> misses;
  misses.clear();
  *final = false;
  if (walk.found != nullptr) std::fill(walk.found + first, walk.found + last, true);
  if (limits.cancelled != nullptr) HPS_RETURN_IF_ERROR(CheckLimits({.cancelled = limits.cancelled}));
  const size_t row_bytes = walk.stack->row_bytes();
  FetchRequest request;
  request.keys = walk.keys.subspan(first, last - first);
  request.rows = {walk.rows + first * row_bytes, row_bytes};
  request.output_bytes = streams ? SIZE_MAX : walk.keys.size() * row_bytes;
  request.deadline = limits.deadline;
  request.cancelled = limits.cancelled;
  Status status = AskTable(walk.stack->volatile_tier, request, limits, &misses);
  if (status.ok() && (misses.empty() || walk.stack->persistent_tier.table == nullptr)) {
    *final = true;
    if (misses.empty()) return status;
    for (uint32_t position : misses) FillDefault(walk, static_cast<uint32_t>(first) + position);
    std::lock_guard lock(mutex);
    walk.rows_defaulted += misses.size();
    return status;
  }
  std::lock_guard lock(mutex);
  if (status.ok()) {
    for (uint32_t position : misses) walk.missing.push_back(static_cast<uint32_t>(first) + position);
    return status;
  }
  std::vector<uint32_t> positions(last - first);
  std::iota(positions.begin(), positions.end(), static_cast<uint32_t>(first));
  return SkipTier(walk.stack->volatile_tier, status, limits, positions.begin(), positions.end(), &walk.missing,
                  &walk.unavailable, &walk.rows_skipped_volatile);
}

Status FetchPieces(std::span<TierWalk> walks, Executor& executor, const LookupLimits& limits,
                   const PieceOptions& pieces) {
  size_t total = 0;
  for (const TierWalk& walk : walks) total += InPieces(walk) ? walk.keys.size() : 0;
  if (total == 0) return OkStatus();
  FirstError error;
  std::mutex mutex;
  // The pieces cut the concatenation of all tables' keys, so many small tables fill the threads as well as one big one.
  executor.ParallelFor(total, pieces.keys, [&](size_t first, size_t last) {
    size_t base = 0;
    for (size_t w = 0; w < walks.size(); ++w) {
      TierWalk& walk = walks[w];
      if (!InPieces(walk)) continue;
      const size_t end = base + walk.keys.size();
      if (first < end && last > base && !error.failed()) {
        const size_t begin_of_piece = std::max(first, base) - base;
        const size_t end_of_piece = std::min(last, end) - base;
        bool final = false;
        error.Set(FetchPiece(walk, begin_of_piece, end_of_piece, limits, pieces.streams, mutex, &final));
        if (final && pieces.done != nullptr) (*pieces.done)(w, begin_of_piece, end_of_piece);
      }
      base = end;
      if (base >= last) break;
    }
  });
  HPS_RETURN_IF_ERROR(error.status());
  if (total > pieces.keys) {
    for (TierWalk& walk : walks) std::sort(walk.missing.begin(), walk.missing.end());
  }
  return OkStatus();
}

// ---- tables that are waited for -----------------------------------------------------------------------------------

// `before` and `after` are ascending, after is a subset: what the persistent table found goes up.
void Promote(const TierWalk& walk, const std::vector<uint32_t>& before, const std::vector<uint32_t>& after) {
  const size_t row_bytes = walk.stack->row_bytes();
  PromotionBatch batch;
  batch.table = walk.stack->volatile_tier.table;
  batch.breaker = walk.stack->volatile_tier.breaker;
  batch.counters = walk.stack->promotions;
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

// Asks the tier for the missing positions of one walk.
Status AskTier(const Tier& tier, TierWalk& walk, Deadline deadline, const LookupLimits& limits, uint64_t* found,
               uint64_t* skipped) {
  const size_t row_bytes = walk.stack->row_bytes();
  const bool all = walk.missing.size() == walk.keys.size();
  std::vector<uint32_t> still_missing;
  FetchRequest request;
  request.keys = walk.keys;
  if (!all) request.positions = walk.missing;
  request.rows = {walk.rows, row_bytes};
  request.deadline = deadline;
  request.cancelled = limits.cancelled;
  Status status = AskTable(tier, request, limits, &still_missing);
  if (status.ok()) {
    *found = walk.missing.size() - still_missing.size();
    const bool from_below = &tier == &walk.stack->persistent_tier;
    // A row that the volatile tier was not asked for is not known to be missing there.
    if (from_below && walk.stack->promoter != nullptr && walk.stack->volatile_tier.table &&
        walk.rows_skipped_volatile == 0) {
      Promote(walk, walk.missing, still_missing);
    }
    walk.missing.swap(still_missing);
    return status;
  }
  still_missing.clear();
  HPS_RETURN_IF_ERROR(SkipTier(tier, status, limits, walk.missing.begin(), walk.missing.end(), &still_missing,
                               &walk.unavailable, skipped));
  walk.missing.swap(still_missing);
  return OkStatus();
}

// Runs ask(walk) for the chosen walks side by side.
template <typename Choose, typename Ask>
Status AskSideBySide(std::span<TierWalk> walks, Executor& io_executor, Choose&& choose, Ask&& ask) {
  std::vector<size_t> chosen;
  for (size_t i = 0; i < walks.size(); ++i) {
    if (choose(walks[i])) chosen.push_back(i);
  }
  FirstError error;
  io_executor.ParallelFor(chosen.size(), 1, [&](size_t first, size_t last) {
    for (size_t i = first; i < last && !error.failed(); ++i) error.Set(ask(walks[chosen[i]]));
  });
  return error.status();
}

bool WaitsForVolatile(const TierWalk& walk) {
  const Tier& tier = walk.stack->volatile_tier;
  return tier.table && !tier.addressable && !walk.skip_volatile && !walk.keys.empty();
}
bool GoesOn(const TierWalk& walk) { return !walk.missing.empty() && walk.stack->persistent_tier.table; }

Status FetchVolatile(std::span<TierWalk> walks, Executor& executor, Executor& io_executor, Clock::time_point now,
                     const LookupLimits& limits, const PieceOptions& pieces) {
  bool waits = false;
  for (TierWalk& walk : walks) {
    walk.missing.clear();
    walk.unavailable.clear();
    walk.rows_from_volatile = walk.rows_from_persistent = walk.rows_defaulted = 0;
    walk.rows_skipped_volatile = walk.rows_skipped_persistent = 0;
    if (!InPieces(walk)) {
      walk.missing.resize(walk.keys.size());
      std::iota(walk.missing.begin(), walk.missing.end(), 0u);
      waits |= WaitsForVolatile(walk);
    }
  }
  HPS_RETURN_IF_ERROR(FetchPieces(walks, executor, limits, pieces));
  if (waits) {
    HPS_RETURN_IF_ERROR(AskSideBySide(walks, io_executor, WaitsForVolatile, [&](TierWalk& walk) {
      const Tier& tier = walk.stack->volatile_tier;
      return AskTier(tier, walk, TierDeadline(tier, now, limits.deadline), limits, &walk.rows_from_volatile,
                     &walk.rows_skipped_volatile);
    }));
  }
  for (TierWalk& walk : walks) {
    if (!InPieces(walk)) continue;
    walk.rows_from_volatile = walk.keys.size() - walk.missing.size() - walk.unavailable.size() - walk.rows_defaulted;
  }
  return OkStatus();
}

// What the pieces have not done.
void FillDefaults(const TierWalk& walk) {
  if (walk.found != nullptr && !InPieces(walk)) std::fill(walk.found, walk.found + walk.keys.size(), true);
  for (const auto* positions : {&walk.missing, &walk.unavailable}) {
    for (uint32_t position : *positions) FillDefault(walk, position);
  }
}

void CountRows(const TierWalk& walk, LookupReport* report) {
  const TierStack& stack = *walk.stack;
  const uint64_t from_default = walk.rows_defaulted + walk.missing.size() + walk.unavailable.size();
  Count(stack.volatile_tier.rows_served, walk.rows_from_volatile);
  Count(stack.volatile_tier.rows_skipped, walk.rows_skipped_volatile);
  Count(stack.persistent_tier.rows_served, walk.rows_from_persistent);
  Count(stack.persistent_tier.rows_skipped, walk.rows_skipped_persistent);
  Count(stack.metrics.rows_from_default, from_default);
  Count(stack.metrics.rows_unavailable, walk.unavailable.size());
  report->rows_from_volatile += walk.rows_from_volatile;
  report->rows_from_persistent += walk.rows_from_persistent;
  report->rows_from_default += from_default;
  report->rows_unavailable += walk.unavailable.size();
  report->rows_skipped_volatile += walk.rows_skipped_volatile;
  report->rows_skipped_persistent += walk.rows_skipped_persistent;
}

void RecordTime(const Tier& tier, uint64_t nanoseconds) {
  if (tier.fetch_seconds != nullptr) tier.fetch_seconds->Record(nanoseconds);
}

}  // namespace

Status CheckLimits(const LookupLimits& limits) {
  if (limits.cancelled != nullptr && limits.cancelled->load(std::memory_order_relaxed)) {
    return Cancelled("the caller gave the lookup up");
  }
  if (limits.deadline != kNoDeadline && Clock::now() >= limits.deadline) {
    return DeadlineExceeded(std::string(kLookupTime) + " is over");
  }
  return OkStatus();
}

bool IsUnavailable(const Tier& tier, const Status& error, const LookupLimits& limits) {
  switch (error.code()) {
    case StatusCode::kUnavailable: return true;
    case StatusCode::kDeadlineExceeded: return limits.deadline == kNoDeadline || Clock::now() < limits.deadline;
    case StatusCode::kDataLoss: return tier.when_unavailable == WhenUnavailable::kNextTier;
    default: return false;
  }
}

namespace {

// Runs ask(request) for so many keys that every node and partition of a store is asked, and files here and there.
template <typename Ask>
Status AskForSomeKeys(const Tier& tier, std::chrono::milliseconds longest, Ask&& ask) {
  const auto timeout = tier.timeout.count() > 0 ? std::min(tier.timeout, longest) : longest;
  std::array<Key, 256> keys;
  std::iota(keys.begin(), keys.end(), Key{0});
  const size_t row_bytes = tier.table->spec().row_bytes;
  std::vector<std::byte> rows(keys.size() * row_bytes);
  std::vector<uint32_t> misses;
  FetchRequest request;
  request.keys = keys;
  request.rows = {rows.data(), row_bytes};
  request.output_bytes = rows.size();
  request.deadline = Clock::now() + timeout;
  return ask(request, &misses);
}

}  // namespace

Status ProbeTier(const Tier& tier, std::chrono::milliseconds longest) {
  return AskForSomeKeys(tier, longest, [&](const FetchRequest& request, std::vector<uint32_t>* misses) {
    return Explain(tier, AskTable(tier, request, {}, misses, /*probe=*/true), {});
  });
}

void TakeBackTiers(std::span<const TierStack* const> stacks, std::chrono::milliseconds longest) {
  if (stacks.empty()) return;
  for (Tier TierStack::*const of : {&TierStack::volatile_tier, &TierStack::persistent_tier}) {
    CircuitBreaker* const breaker = (stacks.front()->*of).breaker;
    if (breaker == nullptr || breaker->closed()) continue;
    const bool answers = std::all_of(stacks.begin(), stacks.end(), [&](const TierStack* stack) {
      const Tier& tier = stack->*of;
      if (!tier.table) return true;
      return AskForSomeKeys(tier, longest,
                            [&](const FetchRequest& request, std::vector<uint32_t>* misses) {
                              return tier.table->Fetch(request, misses);
                            })
          .ok();
    });
    if (answers) breaker->Succeeded();
  }
}

Status FetchRows(std::span<TierWalk> walks, Executor& executor, Executor& io_executor, const LookupLimits& limits,
                 LookupReport* report, const PieceOptions& pieces) {
  Stopwatch volatile_watch;
  HPS_RETURN_IF_ERROR(FetchVolatile(walks, executor, io_executor, volatile_watch.start(), limits, pieces));
  const uint64_t volatile_nanoseconds = volatile_watch.nanoseconds();
  report->volatile_nanoseconds += volatile_nanoseconds;

  bool go_on = false;
  for (const TierWalk& walk : walks) {
    if (walk.stack->volatile_tier.table && !walk.skip_volatile) {
      RecordTime(walk.stack->volatile_tier, volatile_nanoseconds);
    }
    go_on |= GoesOn(walk);
  }
  if (go_on) {
    HPS_RETURN_IF_ERROR(CheckLimits(limits));
    Stopwatch persistent_watch;
    HPS_RETURN_IF_ERROR(AskSideBySide(walks, io_executor, GoesOn, [&](TierWalk& walk) {
      const Tier& tier = walk.stack->persistent_tier;
      Stopwatch watch;
      Status status = AskTier(tier, walk, TierDeadline(tier, persistent_watch.start(), limits.deadline), limits,
                              &walk.rows_from_persistent, &walk.rows_skipped_persistent);
      RecordTime(tier, watch.nanoseconds());
      return status;
    }));
    report->persistent_nanoseconds += persistent_watch.nanoseconds();
  }
  if (limits.cancelled != nullptr) HPS_RETURN_IF_ERROR(CheckLimits({.cancelled = limits.cancelled}));

  for (const TierWalk& walk : walks) {
    FillDefaults(walk);
    CountRows(walk, report);
  }
  return OkStatus();
}

}  // namespace hps
