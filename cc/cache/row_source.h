// RowSource: the tiers of a model's tables, as caches see them.
//
// Thread safety: any number of threads at once.

#ifndef HPS_CACHE_ROW_SOURCE_H_
#define HPS_CACHE_ROW_SOURCE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "hps/lookup_session.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

struct FetchLimits {
  Deadline deadline = kNoDeadline;
  const std::atomic<bool>* cancelled = nullptr;
};

// One table's part of a call.
struct RowRequest {
  uint32_t table = 0;         // index in its model
  std::span<const Key> keys;  // (n), each once
  std::byte* rows = nullptr;  // (n, row_bytes), packed; written also where a key was not found
  bool* found = nullptr;      // (n): a tier holds the key
};

// Rows and found marks [first, last) of a request are final while others are still on their way. May be called by
// several threads at once, each row at most once, and not any more when Fetch has returned.
using RowsArrived = std::function<void(size_t request, size_t first, size_t last)>;

class RowSource {
 public:
  virtual ~RowSource() = default;
  // Fetches for all tables side by side and adds to *report where rows came from. On error nothing is said of the rows,
  // but for those that have arrived. With `arrived` (it may be empty) rows come in pieces as small as is worth it; the
  // source need not tell of all of them, or of any.
  virtual Status Fetch(std::span<const RowRequest> requests, const FetchLimits& limits, const RowsArrived& arrived,
                       LookupReport* report) = 0;
};

}  // namespace hps

#endif  // HPS_CACHE_ROW_SOURCE_H_
