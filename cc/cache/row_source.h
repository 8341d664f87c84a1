// RowSource: the tiers of a model's tables, as caches see them.
//
// Thread safety: any number of threads at once.

#ifndef HPS_CACHE_ROW_SOURCE_H_
#define HPS_CACHE_ROW_SOURCE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
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

class RowSource {
 public:
  virtual ~RowSource() = default;
  // Fetches for all tables side by side and adds to *report where rows came from. On error nothing is said of the rows.
  virtual Status Fetch(std::span<const RowRequest> requests, const FetchLimits& limits, LookupReport* report) = 0;
};

}  // namespace hps

#endif  // HPS_CACHE_ROW_SOURCE_H_
