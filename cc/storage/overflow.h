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

#include <algorithm>
#include <cmath>
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

// How many rows of a table can be loaded without an eviction, whatever their keys are. Keys fall into partitions by
// their hash, so rows are counted up to five standard deviations below the margin (one load in a million meets a fuller
// partition, and loses the rows beyond). `block_rows`: keys that a store deals out to partitions in blocks.
inline uint64_t CapacityRows(const OverflowOptions& options, uint32_t num_partitions, uint64_t block_rows = 1) {
  if (!options.bounded()) return std::numeric_limits<uint64_t>::max();
  if (num_partitions == 1) return options.margin;
  const double margin = static_cast<double>(options.margin);
  const double root = (std::sqrt(25 + 4 * margin) - 5) / 2;  // x + 5 sqrt(x) = margin
  const double rows = std::min(root * root, margin - static_cast<double>(block_rows - 1)) * num_partitions;
  if (rows >= 0x1p63) return uint64_t{1} << 63;
  return rows < 1 ? 1 : static_cast<uint64_t>(rows);
}

}  // namespace hps

#endif  // HPS_STORAGE_OVERFLOW_H_
