// TierStack: the tiers of one table, from fast to slow, and the walk of a lookup down through them.
//
// volatile table (if any), then persistent table (if any), then the table's default value. Only rows that a lower tier
// really found are promoted into the volatile table.
//
// Thread safety: immutable once built; FetchRows may run on any number of threads.

#ifndef HPS_CORE_TIER_STACK_H_
#define HPS_CORE_TIER_STACK_H_

#include <memory>
#include <span>
#include <vector>

#include "cc/core/promoter.h"
#include "hps/lookup_session.h"
#include "hps/metrics.h"
#include "hps/table_store.h"

namespace hps {

struct TierMetrics {
  Counter* lookups = nullptr;
  Counter* keys = nullptr;
  Counter* rows_from_volatile = nullptr;
  Counter* rows_from_persistent = nullptr;
  Counter* rows_from_default = nullptr;
};

struct TierStack {
  std::shared_ptr<Table> volatile_table;    // or nullptr
  bool volatile_addressable = false;        // Table::Locate works there
  std::shared_ptr<Table> persistent_table;  // or nullptr
  std::vector<float> default_row;           // (width)
  Promoter* promoter = nullptr;             // set where cache_missed_embeddings is on; outlives the stack
  TierMetrics metrics;

  size_t row_bytes() const { return default_row.size() * sizeof(float); }
};

// One table's part of a call.
struct TierWalk {
  const TierStack* stack = nullptr;
  std::span<const Key> keys;      // (n)
  std::byte* rows = nullptr;      // (n, row_bytes), packed
  bool* found = nullptr;          // (n) or nullptr
  bool skip_volatile = false;     // the caller has asked that tier already
  std::vector<uint32_t> missing;  // working space: positions not found so far
};

// Fills the rows of all walks: volatile tiers in parallel pieces over all tables, persistent tiers table beside table,
// defaults last. CPU work runs on `executor`, waiting for databases on `io_executor`. Adds to *report what happened.
Status FetchRows(std::span<TierWalk> walks, Executor& executor, Executor& io_executor, Deadline deadline,
                 LookupReport* report);

// Keys in one piece of parallel work: below this everything is done inline on the caller's thread.
inline constexpr size_t kKeysPerPiece = 2048;

}  // namespace hps

#endif  // HPS_CORE_TIER_STACK_H_
