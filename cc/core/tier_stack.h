// TierStack: the tiers of one table, from fast to slow, and the walk of a lookup down through them.
//
// volatile table (if any), then persistent table (if any), then the table's default value. Only rows that a lower tier
// really found are promoted into the volatile table.
//
// A tier that cannot be asked (IsUnavailable) does what its when_unavailable says: fail the lookup, leave its rows to
// the next tier, or give them the default value. docs/design/0006-when-tiers-fail.md has the table of cases.
//
// Thread safety: immutable once built; FetchRows may run on any number of threads.

#ifndef HPS_CORE_TIER_STACK_H_
#define HPS_CORE_TIER_STACK_H_

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cc/core/circuit_breaker.h"
#include "cc/core/promoter.h"
#include "hps/config.h"
#include "hps/lookup_session.h"
#include "hps/metrics.h"
#include "hps/table_store.h"

namespace hps {

struct Tier {
  std::shared_ptr<Table> table;  // nullptr: the stack has no such tier
  // Rows lie in this process's memory: Table::Locate works, and reading never waits, so that `timeout` has no meaning.
  bool addressable = false;
  std::chrono::milliseconds timeout{0};  // one lookup's wait for this tier; 0: none but the lookup's own
  WhenUnavailable when_unavailable = WhenUnavailable::kFail;
  CircuitBreaker* breaker = nullptr;   // the store's; outlives the stack
  std::string_view option;             // "volatile_db" or "persistent_db", for messages
  Counter* rows_served = nullptr;      // counters and histogram may be absent
  Counter* rows_skipped = nullptr;     // not obtained because the tier could not be asked
  Counter* fetches_failed = nullptr;   // refusals of an open circuit breaker not included
  Histogram* fetch_seconds = nullptr;  // the stage's time, once a table and call
};

struct TierMetrics {
  Counter* lookups = nullptr;
  Counter* keys = nullptr;
  Counter* rows_from_default = nullptr;
  Counter* rows_unavailable = nullptr;  // of those: a tier that may hold the row could not be asked
};

struct TierStack {
  Tier volatile_tier;
  Tier persistent_tier;
  std::vector<float> default_row;  // (width)
  Promoter* promoter = nullptr;    // set where cache_missed_embeddings is on; outlives the stack
  PromotionCounters promotions;
  TierMetrics metrics;

  size_t row_bytes() const { return default_row.size() * sizeof(float); }
};

struct LookupLimits {
  Deadline deadline = kNoDeadline;
  const std::atomic<bool>* cancelled = nullptr;
};

// One table's part of a call.
struct TierWalk {
  const TierStack* stack = nullptr;
  std::span<const Key> keys;   // (n)
  std::byte* rows = nullptr;   // (n, row_bytes), packed
  bool* found = nullptr;       // (n) or nullptr
  bool skip_volatile = false;  // the caller has asked that tier already
  // Working space, positions of keys: not found so far; and given up for the default value, because the tier that
  // might hold them cannot be asked.
  std::vector<uint32_t> missing;
  std::vector<uint32_t> unavailable;
  uint64_t rows_defaulted = 0;  // of no tier, and their default is written
  uint64_t rows_from_volatile = 0;
  uint64_t rows_from_persistent = 0;
  uint64_t rows_skipped_volatile = 0;
  uint64_t rows_skipped_persistent = 0;
};

// Keys in one piece of parallel work: below this everything is done inline on the caller's thread.
inline constexpr size_t kKeysPerPiece = 2048;

// How tables in this process's memory are read.
struct PieceOptions {
  size_t keys = kKeysPerPiece;
  // Rows are written around this processor's caches: nobody here reads them.
  bool streams = false;
  // If given: told, by whichever thread has read them, of positions [first, last) of a walk whose rows and found marks
  // are final. Not of all: what a lower tier may hold, or a tier that failed, comes at the end.
  const std::function<void(size_t walk, size_t first, size_t last)>* done = nullptr;
};

// Fills the rows of all walks: volatile tiers in memory in parallel pieces over all tables, others table beside table,
// defaults last. CPU work runs on `executor`, waiting for stores on `io_executor`. Adds to *report what happened.
Status FetchRows(std::span<TierWalk> walks, Executor& executor, Executor& io_executor, const LookupLimits& limits,
                 LookupReport* report, const PieceOptions& pieces = {});

// kCancelled or kDeadlineExceeded where the lookup should end.
Status CheckLimits(const LookupLimits& limits);

// Whether `error` of a tier means that it cannot be asked now, as opposed to a mistake or a limit of the lookup itself:
// kUnavailable; kDeadlineExceeded before the lookup's own deadline; and kDataLoss where the next tier, which has every
// row, answers instead.
bool IsUnavailable(const Tier& tier, const Status& error, const LookupLimits& limits);

// Asks the tier for some keys, as a lookup would; 256, so that every node of a store is asked.
Status ProbeTier(const Tier& tier, std::chrono::milliseconds longest);

// For a model that has just been loaded. Where a circuit breaker keeps lookups from a tier all its tables are asked at
// once, without waiting until the breaker tries again; if each answers, lookups use the tier from now on.
void TakeBackTiers(std::span<const TierStack* const> stacks, std::chrono::milliseconds longest);

}  // namespace hps

#endif  // HPS_CORE_TIER_STACK_H_
