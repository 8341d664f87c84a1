// OverflowOptions: how many rows a partition of a volatile table may hold, and which leave when it holds more.
//
// The same for every volatile store (hash map, multi-process hash map, Redis). A partition that grows beyond `margin`
// rows is shrunk to margin * resolution_target, by the policy:
// - kEvictOldest: the rows whose time is furthest back. Writing a row sets its time; with refresh_time_after_fetch
//   reading does too.
// - kEvictLeastUsed: the rows that were read and written the fewest times; counts are halved at each eviction, so that
//   old fame fades.
// - kEvictRandom: any rows.
// The rows of the upsert that caused the overflow are the last to leave.

#ifndef HPS_STORAGE_OVERFLOW_H_
#define HPS_STORAGE_OVERFLOW_H_

#include <cstdint>
#include <limits>

#include "hps/config.h"

namespace hps {

struct OverflowOptions {
  uint64_t margin = std::numeric_limits<uint64_t>::max();  // rows per partition
  OverflowPolicy policy = OverflowPolicy::kEvictOldest;
  double resolution_target = 0.8;  // in (0, 1)
  bool refresh_time_after_fetch = false;

  bool bounded() const { return margin != std::numeric_limits<uint64_t>::max(); }
  // Rows that stay after an eviction; at least 1.
  uint64_t target_rows() const {
    const auto rows = static_cast<uint64_t>(static_cast<double>(margin) * resolution_target);
    return rows > 0 ? rows : 1;
  }
};

}  // namespace hps

#endif  // HPS_STORAGE_OVERFLOW_H_
