// The gate's stamp is taken before the query: rows that the tiers give later are at least as new. While a call runs it
// holds its caches; what it leaves on the stream is waited for by a cache that goes (DeviceCache's destructor).

#include "cc/cache/device_lookup.h"

#include <algorithm>
#include <array>
#include <vector>

namespace hps {
namespace {

void Count(Counter* counter, uint64_t n) {
  if (counter != nullptr && n > 0) counter->Add(n);
}

constexpr uint64_t kMostPositions = LookupWorkspace::kMostPositions;

}  // namespace

// The missing keys of a call, table by table.
struct DeviceLookup::Misses {
  enum class Way { kNone, kFetch, kDefer, kDefault };
  struct Part {
    uint32_t first = 0;  // keys [first, first + count)
    uint32_t count = 0;
    Way way = Way::kNone;
  };
  std::vector<Part> parts;        // as the lookups of the call
  std::vector<Key> keys;          // by part
  std::vector<uint32_t> index;    // of each in the workspace's list
  std::unique_ptr<bool[]> found;  // of each, once fetched
};

Status DeviceLookup::Lookup(std::span<const CachedLookup> lookups, DeviceStream stream, const FetchLimits& limits,
                            LookupReport* report) const {
  HPS_RETURN_IF_ERROR(resources_.context->CheckAlive());
  LookupReport local;
  for (size_t first = 0; first < lookups.size();) {
    uint64_t positions = 0;
    size_t last = first;
    while (last < lookups.size() && last - first < cuda::kMaxQueryParts &&
           (last == first || positions + lookups[last].count <= kMostPositions)) {
      positions += lookups[last++].count;
    }
    HPS_RETURN_IF_ERROR(LookupTogether(lookups.subspan(first, last - first), stream, limits, &local));
    first = last;
  }
  if (report != nullptr) *report = local;
  return OkStatus();
}

Status DeviceLookup::CheckCache(const DeviceCache& cache) const {
  if (cache.resources().context != resources_.context) {
    return InvalidArgument(cache.spec().name + ": its cache is on device " +
                           std::to_string(cache.resources().context->device().info().ordinal) +
                           ", but the lookup is on device " +
                           std::to_string(resources_.context->device().info().ordinal));
  }
  // A cache that goes waits for what lookups left with the workspaces it knows.
  if (cache.resources().workspaces != resources_.workspaces) {
    return Internal(cache.spec().name + ": its cache was made with other workspaces than the lookup's");
  }
  return OkStatus();
}

Status DeviceLookup::LookupTogether(std::span<const CachedLookup> lookups, DeviceStream stream,
                                    const FetchLimits& limits, LookupReport* report) const {
  std::array<cuda::QueryPart, cuda::kMaxQueryParts> storage;
  uint64_t positions = 0;
  bool all_whole = true;
  for (size_t i = 0; i < lookups.size(); ++i) {
    const DeviceCache& cache = *lookups[i].cache;
    HPS_RETURN_IF_ERROR(CheckCache(cache));
    lookups[i].cache->CountAsked(lookups[i].count);
    storage[i] = {cache.table(), lookups[i].keys, lookups[i].count, cache.spec().default_value, lookups[i].rows};
    positions += lookups[i].count;
    all_whole = all_whole && cache.whole();
  }
  report->keys += positions;
  if (positions == 0) return OkStatus();
  if (positions > kMostPositions) {
    return InvalidArgument(std::to_string(positions) + " keys of one table in one lookup on a device; split it, " +
                           std::to_string(kMostPositions) + " is the most");
  }
  const std::span<const cuda::QueryPart> parts(storage.data(), lookups.size());
  if (all_whole) {  // nobody has to wait or to know
    HPS_RETURN_IF_ERROR(resources_.context->Check(
        resources_.context->device().UntoldQuery(parts.data(), static_cast<int>(parts.size()), stream),
        "a query of the cache"));
    report->rows_unwaited += positions;
    Count(options_.metrics.rows_unwaited, positions);
    return OkStatus();
  }
  HPS_ASSIGN_OR_RETURN(
      WorkspacePool::Lease workspace,
      resources_.workspaces->Acquire(static_cast<uint32_t>(positions), limits.deadline, limits.cancelled));
  const Status status = LookupWith(*workspace, lookups, parts, stream, limits, report);
  const Status ended = workspace->End(stream);
  return status.ok() ? ended : status;
}

Status DeviceLookup::LookupWith(LookupWorkspace& workspace, std::span<const CachedLookup> lookups,
                                std::span<const cuda::QueryPart> parts, DeviceStream stream, const FetchLimits& limits,
                                LookupReport* report) const {
  const uint64_t read_at = resources_.context->gate().Now();
  HPS_RETURN_IF_ERROR(workspace.Query(parts, stream));
  HPS_RETURN_IF_ERROR(workspace.Wait(stream, limits.deadline, limits.cancelled));
  uint64_t positions = 0;
  for (const cuda::QueryPart& part : parts) positions += part.count;
  const uint64_t hits = positions - workspace.missing_positions();
  report->rows_from_cache += hits;
  Count(options_.metrics.rows_from_cache, hits);
  if (workspace.missing().empty()) return OkStatus();
  return HandleMisses(lookups, parts, workspace, read_at, stream, limits, report);
}

Status DeviceLookup::HandleMisses(std::span<const CachedLookup> lookups, std::span<const cuda::QueryPart> parts,
                                  LookupWorkspace& workspace, uint64_t read_at, DeviceStream stream,
                                  const FetchLimits& limits, LookupReport* report) const {
  const std::span<const cuda::MissingKey> missing = workspace.missing();
  const uint32_t repeated = workspace.missing_positions() - static_cast<uint32_t>(missing.size());
  report->rows_repeated += repeated;

  // Sorted by table.
  std::array<uint64_t, cuda::kMaxQueryParts> begins;
  uint64_t positions = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    begins[p] = positions;
    positions += parts[p].count;
  }
  // The last part that begins at or before the position; empty parts before it share its beginning.
  const auto part_of = [&](uint32_t position) {
    if (parts.size() == 1) return size_t{0};
    return static_cast<size_t>(std::upper_bound(begins.begin(), begins.begin() + static_cast<ptrdiff_t>(parts.size()),
                                                uint64_t{position}) -
                               begins.begin()) -
           1;
  };
  Misses misses;
  misses.parts.resize(parts.size());
  for (const cuda::MissingKey& key : missing) {
    if (key.position >= positions) {
      return resources_.context->Check(cuda::kErrorLaunchFailure, "a query of the cache has given an impossible key");
    }
    ++misses.parts[part_of(key.position)].count;
  }
  uint32_t first = 0;
  for (Misses::Part& part : misses.parts) {
    part.first = first;
    first += part.count;
    part.count = 0;
  }
  misses.keys.resize(missing.size());
  misses.index.resize(missing.size());
  for (uint32_t i = 0; i < missing.size(); ++i) {
    Misses::Part& part = misses.parts[part_of(missing[i].position)];
    misses.keys[part.first + part.count] = missing[i].key;
    misses.index[part.first + part.count++] = i;
  }

  bool fetches = false;
  for (size_t p = 0; p < parts.size(); ++p) {
    Misses::Part& part = misses.parts[p];
    if (part.count == 0) continue;
    // Repetitions are known for the whole call only; they are charged to each table, for the exact answer's sake.
    const uint64_t charged = std::min<uint64_t>(parts[p].count, uint64_t{part.count} + repeated);
    const double hit_rate = 1.0 - static_cast<double>(charged) / parts[p].count;
    if (lookups[p].cache->whole()) {
      part.way = Misses::Way::kDefault;
      report->rows_from_default += part.count;
    } else if (inserts_ != nullptr && options_.hit_rate_threshold && hit_rate >= *options_.hit_rate_threshold) {
      part.way = Misses::Way::kDefer;
      report->rows_deferred += part.count;
      Count(options_.metrics.rows_deferred, part.count);
      const auto begin = misses.keys.begin() + part.first;
      inserts_->Enqueue({lookups[p].cache, source_, lookups[p].table, std::vector<Key>(begin, begin + part.count)});
    } else {
      part.way = Misses::Way::kFetch;
      Count(options_.metrics.rows_missed, part.count);
      fetches = true;
    }
  }
  if (!fetches) return OkStatus();
  misses.found = std::make_unique<bool[]>(missing.size());
  return FetchAndFill(lookups, parts, misses, workspace, read_at, stream, limits, report);
}

Status DeviceLookup::FetchAndFill(std::span<const CachedLookup> lookups, std::span<const cuda::QueryPart> parts,
                                  const Misses& misses, LookupWorkspace& workspace, uint64_t read_at,
                                  DeviceStream stream, const FetchLimits& limits, LookupReport* report) const {
  size_t bytes = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    if (misses.parts[p].way == Misses::Way::kFetch) bytes += size_t{misses.parts[p].count} * parts[p].table.row_bytes;
  }
  HPS_RETURN_IF_ERROR(workspace.PrepareFill(misses.keys.size(), bytes));
  uint64_t* const offsets = workspace.row_offsets();
  std::fill_n(offsets, misses.keys.size(), cuda::kNoRow);
  std::vector<RowRequest> requests;
  size_t offset = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    const Misses::Part& part = misses.parts[p];
    if (part.way != Misses::Way::kFetch) continue;
    requests.push_back({lookups[p].table, std::span(misses.keys).subspan(part.first, part.count),
                        workspace.staging_rows() + offset, misses.found.get() + part.first});
    offset += size_t{part.count} * parts[p].table.row_bytes;
  }
  HPS_RETURN_IF_ERROR(source_->Fetch(requests, limits, report));
  offset = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    const Misses::Part& part = misses.parts[p];
    if (part.way != Misses::Way::kFetch) continue;
    for (uint32_t i = part.first; i < part.first + part.count; ++i, offset += parts[p].table.row_bytes) {
      // A row that no tier holds is not kept: the answer has the default value already.
      if (misses.found[i]) offsets[misses.index[i]] = offset;
    }
  }

  std::vector<LookupWorkspace::Outdated> outdated;
  UpdateGate& gate = resources_.context->gate();
  std::lock_guard lock(gate.mutex());
  for (size_t p = 0; p < parts.size(); ++p) {
    const Misses::Part& part = misses.parts[p];
    if (part.way != Misses::Way::kFetch) continue;
    const size_t before = outdated.size();
    for (uint32_t i = part.first; i < part.first + part.count; ++i) {
      if (misses.found[i] && gate.UpdatedSince(lookups[p].cache->number(), misses.keys[i], read_at)) {
        outdated.push_back({parts[p].table, misses.keys[i]});
      }
    }
    lookups[p].cache->CountOutdated(outdated.size() - before);
  }
  Count(options_.metrics.rows_outdated, outdated.size());
  return workspace.Fill(parts, outdated, stream);
}

}  // namespace hps
