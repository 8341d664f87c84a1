// DeviceLookup's pooled half. Where the first launch has found everything, nothing is written but the sums; else the
// tables with missing keys go the way of dense lookups. The device clamps whatever segments say, so a mistake costs the
// answer and nothing more.

#include <algorithm>
#include <vector>

#include "cc/cache/call_array.h"
#include "cc/cache/device_lookup.h"

namespace hps {
namespace {

size_t Aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

cuda::Pooling PoolingOf(Combiner combiner) {
  return combiner == Combiner::kSum    ? cuda::Pooling::kSum
         : combiner == Combiner::kMean ? cuda::Pooling::kMean
                                       : cuda::Pooling::kSqrtn;
}

}  // namespace

Status DeviceLookup::PoolTogether(std::span<const PooledLookup> lookups, DeviceStream stream, const FetchLimits& limits,
                                  LookupReport* report) const {
  CallArray<cuda::PooledPart> storage;
  CallArray<cuda::IndexPart> index_storage;
  size_t num_splits = 0;
  for (size_t i = 0; i < lookups.size(); ++i) {
    const DeviceCache& cache = *lookups[i].cache;
    const DeviceSparsePart& asked = lookups[i].part;
    HPS_RETURN_IF_ERROR(CheckCache(cache));
    if (asked.count > LookupWorkspace::kMostPositions) {
      return InvalidArgument(cache.spec().name + ": " + std::to_string(asked.count) +
                             " keys of one table in one lookup on a device; split it, " +
                             std::to_string(LookupWorkspace::kMostPositions) + " is the most");
    }
    report->keys += asked.count;
    lookups[i].cache->CountAsked(asked.count);
    cuda::PooledPart& part = storage.Add({});
    part.query = {cache.table(), lookups[i].keys, asked.count, cache.spec().default_value, nullptr};
    part.rows = asked.rows;
    part.pooling = PoolingOf(asked.combiner);
    part.row_splits = asked.row_splits;
    part.weights = asked.weights;
    part.output = asked.output;
    if (asked.row_splits != nullptr) continue;
    part.from_indices = true;
    index_storage.Add(
        {asked.indices, asked.rank, asked.dense_shape, asked.count, asked.rows, nullptr, static_cast<uint32_t>(i)});
    num_splits += size_t{asked.rows} + 1;
  }
  const std::span<cuda::PooledPart> parts = storage.all();
  const std::span<cuda::IndexPart> indices = index_storage.all();
  // The launch needs no room for keys; what is missing will.
  HPS_ASSIGN_OR_RETURN(WorkspacePool::Lease workspace,
                       resources_.workspaces->Acquire(1, limits.deadline, limits.cancelled));
  if (!indices.empty()) {
    HPS_ASSIGN_OR_RETURN(int64_t * next, workspace->Splits(num_splits));
    for (cuda::IndexPart& index : indices) {
      index.row_splits = next;
      parts[index.part].row_splits = next;
      next += size_t{index.rows} + 1;
    }
  }
  const EndOfUse end_of_use(*workspace, stream);
  Status status = workspace->PooledQuery(parts, indices, stream);
  if (status.ok()) status = workspace->WaitPooled(stream, limits.deadline, limits.cancelled);
  if (status.ok() && workspace->mistake().mistake != cuda::Mistake::kNone) {
    const cuda::FirstMistake mistake = workspace->mistake();
    status = mistake.part < lookups.size() ? TellMistake(lookups[mistake.part], mistake, stream)
                                           : resources_.context->Check(cuda::kErrorLaunchFailure,
                                                                       "a pooled query has given an impossible result");
  }
  if (status.ok()) status = PoolMissing(workspace, lookups, parts, stream, limits, report);
  const Status ended = workspace->End(stream);
  return status.ok() ? ended : status;
}

Status DeviceLookup::PoolMissing(WorkspacePool::Lease& workspace, std::span<const PooledLookup> lookups,
                                 std::span<cuda::PooledPart> parts, DeviceStream stream, const FetchLimits& limits,
                                 LookupReport* report) const {
  const uint64_t missing = workspace->missing_parts();
  std::vector<CachedLookup> dense;
  std::vector<cuda::PooledPart> incomplete;
  size_t bytes = 0;
  uint64_t positions = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const uint64_t count = parts[i].query.count;
    if ((missing >> i & 1) == 0) {
      (lookups[i].cache->whole() ? report->rows_unwaited : report->rows_from_cache) += count;
      lookups[i].cache->CountAnswered(count);
      continue;
    }
    dense.push_back({lookups[i].cache, lookups[i].part.table, lookups[i].keys, parts[i].query.count, nullptr});
    incomplete.push_back(parts[i]);
    bytes += Aligned(count * parts[i].query.table.row_bytes);
    positions += count;
  }
  if (dense.empty()) return OkStatus();
  HPS_ASSIGN_OR_RETURN(std::byte * next, workspace->PooledRows(bytes));
  std::vector<cuda::QueryPart> queries;
  for (size_t i = 0; i < dense.size(); ++i) {
    cuda::QueryPart& query = incomplete[i].query;
    dense[i].rows = query.output = next;
    next += Aligned(uint64_t{query.count} * query.table.row_bytes);
    queries.push_back(query);
  }
  HPS_RETURN_IF_ERROR(workspace.Reserve(static_cast<uint32_t>(positions)));
  HPS_RETURN_IF_ERROR(LookupWith(*workspace, dense, queries, stream, limits, report));
  return workspace->Pool(incomplete, stream);
}

// The device says where; what lies there is read now.
Status DeviceLookup::TellMistake(const PooledLookup& lookup, const cuda::FirstMistake& mistake,
                                 DeviceStream stream) const {
  const DeviceSparsePart& part = lookup.part;
  const std::string name = lookup.cache->spec().name;
  const std::string at = std::to_string(mistake.position);
  const auto read = [&](const int64_t* from, size_t count, std::vector<int64_t>* values) {
    values->resize(count);
    cuda::Device& device = resources_.context->device();
    int error = device.Copy(values->data(), from, count * sizeof(int64_t), stream);
    if (error == 0) error = device.SynchronizeStream(stream);
    return resources_.context->Check(error, "reading a mistake in the segments of a lookup");
  };
  std::vector<int64_t> values;
  switch (mistake.mistake) {
    case cuda::Mistake::kSplitsDescend:
      HPS_RETURN_IF_ERROR(read(part.row_splits + mistake.position - 1, 2, &values));
      return InvalidArgument(name + ": row_splits must not descend, but splits[" + at + "] is " +
                             std::to_string(values[1]) + " after " + std::to_string(values[0]));
    case cuda::Mistake::kOutside: {
      HPS_RETURN_IF_ERROR(read(part.indices + mistake.position * part.rank, part.rank, &values));
      uint32_t column = 0;
      while (column + 1 < part.rank && values[column] >= 0 && values[column] < part.dense_shape[column]) ++column;
      return InvalidArgument(name + ": indices[" + at + ", " + std::to_string(column) + "] = " +
                             std::to_string(values[column]) + " lies outside the dense shape, whose dimension " +
                             std::to_string(column) + " is " + std::to_string(part.dense_shape[column]));
    }
    case cuda::Mistake::kIndicesDescend:
      HPS_RETURN_IF_ERROR(read(part.indices + (mistake.position - 1) * part.rank, part.rank + size_t{1}, &values));
      return InvalidArgument(name + ": rows must not descend, but indices[" + at +
                             ", 0] = " + std::to_string(values.back()) + " follows " + std::to_string(values.front()) +
                             "; use tf.sparse.reorder");
    default:
      HPS_RETURN_IF_ERROR(read(part.row_splits, 1, &values));
      const int64_t first = values[0];
      HPS_RETURN_IF_ERROR(read(part.row_splits + part.rows, 1, &values));
      return InvalidArgument(name + ": row_splits must begin with 0 and end with the number of keys, " +
                             std::to_string(part.count) + ", but begin with " + std::to_string(first) +
                             " and end with " + std::to_string(values[0]));
  }
}

}  // namespace hps
