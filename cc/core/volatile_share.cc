#include "cc/core/volatile_share.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "hps/model_reader.h"

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

Result<uint64_t> CheckNothingLost(const Table& table, const std::string& folder, uint64_t rows,
                                  const TableStore& store) {
  HPS_ASSIGN_OR_RETURN(const TableStats stats, table.Stats());
  if (stats.rows_estimated || stats.rows >= rows) return stats.rows;
  HPS_ASSIGN_OR_RETURN(const uint64_t distinct, CountDistinctKeys(folder, rows));  // duplicates explain it, or do not
  if (stats.rows >= distinct) return stats.rows;
  const bool redis = store.kind() == "redis_cluster";
  return DataLoss("the volatile tier (" + std::string(store.kind()) + ") lost rows of " + table.spec().name +
                  " while they were loaded: " + std::to_string(distinct) + " were written (" + std::to_string(rows) +
                  " less " + std::to_string(rows - distinct) + " duplicates), and it holds " +
                  std::to_string(stats.rows) + "; the others would be answered with the default value" +
                  (redis ? ". Most likely Redis has reached its maxmemory and evicts: set maxmemory-policy to "
                           "noeviction, and give it more memory"
                         : "; see what erases rows in that store, and load again"));
}

}  // namespace hps
