#include "cc/core/volatile_share.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace hps {
namespace {

constexpr const char* kRemedy =
    "raise volatile_db.overflow_margin (rows per partition) or num_partitions, leave the margin out, or add a "
    "persistent_db to serve the other rows";

}  // namespace

Result<uint64_t> VolatileShare(uint64_t rows, double initial_cache_rate, const TableStore& store, bool persistent) {
  const auto wanted = static_cast<uint64_t>(std::ceil(static_cast<double>(rows) * initial_cache_rate));
  const uint64_t capacity = store.capabilities().capacity_rows;
  if (wanted <= capacity) return wanted;
  if (persistent) return capacity;
  return ResourceExhausted("it has " + std::to_string(rows) + " rows, and the volatile tier (" +
                           std::string(store.kind()) + ") takes " + std::to_string(capacity) +
                           " of a table for sure; the others would be answered with the default value: " + kRemedy);
}

Status CheckNothingEvicted(const Table& table) {
  HPS_ASSIGN_OR_RETURN(const TableStats stats, table.Stats());
  if (stats.evicted_rows == 0) return OkStatus();
  return ResourceExhausted("its keys filled one partition of the volatile tier beyond its margin, and " +
                           std::to_string(stats.evicted_rows) +
                           " rows were evicted, which no tier could serve: " + kRemedy);
}

}  // namespace hps
