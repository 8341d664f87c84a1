// The gate's stamp is taken before the query: rows that the tiers give later are at least as new. While a call runs it
// holds its caches; what it leaves on the stream is waited for by a cache that goes (DeviceCache's destructor).

#include "cc/cache/device_lookup.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "cc/cache/call_array.h"

namespace hps {
namespace {

constexpr uint64_t kMostPositions = LookupWorkspace::kMostPositions;

uint32_t CountOf(const CachedLookup& lookup) { return lookup.count; }
uint32_t CountOf(const PooledLookup& lookup) { return lookup.part.count; }

}  // namespace

Status DeviceLookup::Lookup(std::span<const CachedLookup> lookups, DeviceStream stream, const FetchLimits& limits,
                            LookupReport* report, std::span<const cuda::WidenPart> narrow) const {
  return InLaunches(lookups, narrow, stream, limits, report, &DeviceLookup::LookupTogether);
}

Status DeviceLookup::LookupPooled(std::span<const PooledLookup> lookups, DeviceStream stream, const FetchLimits& limits,
                                  LookupReport* report, std::span<const cuda::WidenPart> narrow) const {
  return InLaunches(lookups, narrow, stream, limits, report, &DeviceLookup::PoolTogether);
}

template <typename Asked>
Status DeviceLookup::InLaunches(std::span<const Asked> lookups, std::span<const cuda::WidenPart> narrow,
                                DeviceStream stream, const FetchLimits& limits, LookupReport* report,
                                Together<Asked> together) const {
  HPS_RETURN_IF_ERROR(resources_.context->CheckAlive());
  HPS_RETURN_IF_ERROR(CheckCapture(lookups, stream));
  if (!narrow.empty()) HPS_RETURN_IF_ERROR(Widen(narrow, stream));
  LookupReport local;
  for (size_t first = 0; first < lookups.size();) {
    uint64_t positions = 0;
    size_t last = first;
    while (last < lookups.size() && last - first < cuda::kMaxQueryParts &&
           (last == first || positions + CountOf(lookups[last]) <= kMostPositions)) {
      positions += CountOf(lookups[last++]);
    }
    HPS_RETURN_IF_ERROR((this->*together)(lookups.subspan(first, last - first), stream, limits, &local));
    first = last;
  }
  if (report != nullptr) *report = local;
  return OkStatus();
}

Status DeviceLookup::Widen(std::span<const cuda::WidenPart> parts, DeviceStream stream) const {
  for (size_t first = 0; first < parts.size(); first += cuda::kMaxQueryParts) {
    const size_t n = std::min<size_t>(parts.size() - first, cuda::kMaxQueryParts);
    HPS_RETURN_IF_ERROR(resources_.context->Check(
        resources_.context->device().Widen(parts.data() + first, static_cast<int>(n), stream), "widening int32 keys"));
  }
  return OkStatus();
}

Status DeviceLookup::CheckCapture(std::span<const CachedLookup> lookups, DeviceStream stream) const {
  const auto waits =
      std::find_if(lookups.begin(), lookups.end(), [](const CachedLookup& each) { return !each.cache->whole(); });
  if (waits == lookups.end()) return OkStatus();
  return CheckNotCaptured([&] { return waits->cache->spec().name + ": its cache is not held whole, so the lookup"; },
                          stream);
}

Status DeviceLookup::CheckCapture(std::span<const PooledLookup> lookups, DeviceStream stream) const {
  if (lookups.empty()) return OkStatus();
  return CheckNotCaptured([] { return std::string("a pooled lookup"); }, stream);
}

template <typename Name>
Status DeviceLookup::CheckNotCaptured(const Name& which, DeviceStream stream) const {
  bool capturing = false;
  HPS_RETURN_IF_ERROR(resources_.context->Check(resources_.context->device().IsCapturing(stream, &capturing),
                                                "asking whether a stream is being captured"));
  if (!capturing) return OkStatus();
  return FailedPrecondition(which() +
                            " waits for the device to know what is missing, but its stream is being captured into a "
                            "CUDA graph. Call it before or behind the graph; what can be captured is a lookup without "
                            "pooling, all of whose tables have \"embedding_cache_type\": \"static\"");
}

Status DeviceLookup::CheckCache(const DeviceCache& cache) const {
  if (cache.resources().context != resources_.context) {
    return InvalidArgument(cache.spec().name + ": its cache is on device " +
                           std::to_string(cache.resources().context->device().info().ordinal) +
                           ", but the lookup is on device " +
                           std::to_string(resources_.context->device().info().ordinal));
  }
  return OkStatus();
}

Status DeviceLookup::LookupTogether(std::span<const CachedLookup> lookups, DeviceStream stream,
                                    const FetchLimits& limits, LookupReport* report) const {
  CallArray<cuda::QueryPart> storage;
  uint64_t positions = 0;
  bool all_whole = true;
  for (size_t i = 0; i < lookups.size(); ++i) {
    const DeviceCache& cache = *lookups[i].cache;
    HPS_RETURN_IF_ERROR(CheckCache(cache));
    lookups[i].cache->CountAsked(lookups[i].count);
    storage.Add({cache.table(), lookups[i].keys, lookups[i].count, cache.spec().default_value, lookups[i].rows,
                 lookups[i].key_stride, lookups[i].row_stride});
    positions += lookups[i].count;
    all_whole = all_whole && cache.whole();
  }
  report->keys += positions;
  if (positions == 0) return OkStatus();
  if (positions > kMostPositions) {
    return InvalidArgument(std::to_string(positions) + " keys of one table in one lookup on a device; split it, " +
                           std::to_string(kMostPositions) + " is the most");
  }
  const std::span<const cuda::QueryPart> parts = storage.all();
  if (all_whole) {  // nobody has to wait or to know
    HPS_RETURN_IF_ERROR(resources_.context->Check(
        resources_.context->device().UntoldQuery(parts.data(), static_cast<int>(parts.size()), stream),
        "a query of the cache"));
    report->rows_unwaited += positions;
    for (const CachedLookup& lookup : lookups) lookup.cache->CountAnswered(lookup.count);
    return OkStatus();
  }
  HPS_ASSIGN_OR_RETURN(
      WorkspacePool::Lease workspace,
      resources_.workspaces->Acquire(static_cast<uint32_t>(positions), limits.deadline, limits.cancelled));
  const EndOfUse end_of_use(*workspace, stream);
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
  report->rows_from_cache += positions - workspace.missing_positions();
  Status status;
  if (!workspace.missing().empty()) {
    status = HandleMisses(lookups, parts, workspace, read_at, stream, limits, report);
  }
  for (const CachedLookup& lookup : lookups) lookup.cache->CountAnswered(lookup.count);
  return status;
}

// Gives each table its missing keys; scratch.index tells which ones of the workspace's list they are.
Status DeviceLookup::SortMissing(std::span<const cuda::QueryPart> parts, LookupWorkspace& workspace,
                                 std::span<MissingPart> missing_parts) const {
  const std::span<const cuda::MissingKey> missing = workspace.missing();
  LookupWorkspace::Scratch& scratch = workspace.scratch();
  scratch.keys.resize(missing.size());
  const auto impossible = [&] {
    return resources_.context->Check(cuda::kErrorLaunchFailure, "a query of the cache has given an impossible key");
  };
  if (parts.size() == 1) {
    // The device has written the list past this processor's caches.
    constexpr size_t kAhead = 128;
    bool possible = true;
    for (size_t i = 0; i < missing.size(); ++i) {
      __builtin_prefetch(missing.data() + i + kAhead);
      possible &= missing[i].position < parts[0].count;
      scratch.keys[i] = missing[i].key;
    }
    scratch.index.clear();
    missing_parts[0].count = static_cast<uint32_t>(missing.size());
    return possible ? OkStatus() : impossible();
  }
  std::array<uint64_t, cuda::kMaxQueryParts> ends;
  uint64_t positions = 0;
  for (size_t p = 0; p < parts.size(); ++p) ends[p] = positions += parts[p].count;
  scratch.parts.resize(missing.size());
  scratch.index.resize(missing.size());
  for (uint32_t i = 0; i < missing.size(); ++i) {
    const uint64_t position = missing[i].position;
    if (position >= positions) return impossible();
    // The only part that holds the position: empty ones end before it.
    const auto end = std::upper_bound(ends.begin(), ends.begin() + static_cast<ptrdiff_t>(parts.size()), position);
    scratch.parts[i] = static_cast<uint8_t>(end - ends.begin());
    ++missing_parts[scratch.parts[i]].count;
  }
  std::array<uint32_t, cuda::kMaxQueryParts> next;
  uint32_t first = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    next[p] = missing_parts[p].first = first;
    first += missing_parts[p].count;
  }
  for (uint32_t i = 0; i < missing.size(); ++i) {
    const uint32_t place = next[scratch.parts[i]]++;
    scratch.keys[place] = missing[i].key;
    scratch.index[place] = i;
  }
  return OkStatus();
}

// By their missing keys, but to none more than it has positions. The sum is right.
void DeviceLookup::ShareRepeated(std::span<const cuda::QueryPart> parts, uint32_t repeated,
                                 std::span<MissingPart> missing) {
  if (repeated == 0) return;
  uint64_t keys = 0;
  for (const MissingPart& part : missing) keys += part.count;
  uint32_t left = repeated;
  for (const bool rest : {false, true}) {
    for (size_t p = 0; p < parts.size() && left > 0; ++p) {
      MissingPart& part = missing[p];
      if (part.count == 0) continue;
      const uint64_t share = rest ? left : uint64_t{repeated} * part.count / keys;
      const uint64_t room = parts[p].count - part.count - part.repeated;
      const auto given = static_cast<uint32_t>(std::min({share, room, uint64_t{left}}));
      part.repeated += given;
      left -= given;
    }
  }
}

Status DeviceLookup::HandleMisses(std::span<const CachedLookup> lookups, std::span<const cuda::QueryPart> parts,
                                  LookupWorkspace& workspace, uint64_t read_at, DeviceStream stream,
                                  const FetchLimits& limits, LookupReport* report) const {
  const uint32_t repeated = workspace.missing_positions() - static_cast<uint32_t>(workspace.missing().size());
  report->rows_repeated += repeated;
  std::array<MissingPart, cuda::kMaxQueryParts> storage;
  const std::span<MissingPart> missing(storage.data(), parts.size());
  HPS_RETURN_IF_ERROR(SortMissing(parts, workspace, missing));
  ShareRepeated(parts, repeated, missing);

  bool fetches = false;
  for (size_t p = 0; p < parts.size(); ++p) {
    MissingPart& part = missing[p];
    if (part.count == 0) continue;
    // Repetitions are known for the whole call only; they are charged to each table, for the exact answer's sake.
    const uint64_t charged = std::min<uint64_t>(parts[p].count, uint64_t{part.count} + repeated);
    const double hit_rate = 1.0 - static_cast<double>(charged) / parts[p].count;
    if (lookups[p].cache->whole()) {
      part.way = Way::kDefault;
      lookups[p].cache->CountMissing(DeviceCache::Missing::kDefaulted, part.count, part.repeated);
      report->rows_from_default += part.count;
    } else if (inserts_ != nullptr && options_.hit_rate_threshold && hit_rate >= *options_.hit_rate_threshold) {
      part.way = Way::kDefer;
      report->rows_deferred += part.count;
      lookups[p].cache->CountMissing(DeviceCache::Missing::kDeferred, part.count, part.repeated);
      const auto begin = workspace.scratch().keys.begin() + part.first;
      inserts_->Enqueue({lookups[p].cache->shared_from_this(), source_, lookups[p].table,
                         std::vector<Key>(begin, begin + part.count)});
    } else {
      part.way = Way::kFetch;
      lookups[p].cache->CountMissing(DeviceCache::Missing::kFetched, part.count, part.repeated);
      fetches = true;
    }
  }
  if (!fetches) return OkStatus();
  return FetchAndFill(lookups, parts, missing, workspace, read_at, stream, limits, report);
}

Status DeviceLookup::FetchAndFill(std::span<const CachedLookup> lookups, std::span<const cuda::QueryPart> parts,
                                  std::span<const MissingPart> missing, LookupWorkspace& workspace, uint64_t read_at,
                                  DeviceStream stream, const FetchLimits& limits, LookupReport* report) const {
  LookupWorkspace::Scratch& scratch = workspace.scratch();
  std::array<size_t, cuda::kMaxQueryParts> fetched;  // the parts that are
  std::array<size_t, cuda::kMaxQueryParts> begins;   // of their rows in staging
  size_t count = 0;
  size_t bytes = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    if (missing[p].way != Way::kFetch) continue;
    fetched[count] = p;
    begins[count++] = bytes;
    bytes += size_t{missing[p].count} * parts[p].table.row_bytes;
  }
  HPS_RETURN_IF_ERROR(workspace.PrepareFill(scratch.keys.size(), bytes, stream));
  if (scratch.found_size < scratch.keys.size()) {
    scratch.found_size = 0;
    scratch.found = std::make_unique<bool[]>(2 * scratch.keys.size());
    scratch.found_size = 2 * scratch.keys.size();
  }
  bool* const found = scratch.found.get();
  scratch.requests.clear();
  for (size_t i = 0; i < count; ++i) {
    const MissingPart& part = missing[fetched[i]];
    scratch.requests.push_back({lookups[fetched[i]].table, std::span(scratch.keys).subspan(part.first, part.count),
                                workspace.staging_rows() + begins[i], found + part.first});
  }
  uint64_t* const offsets = workspace.row_offsets();
  if (count < parts.size()) std::fill_n(offsets, scratch.keys.size(), cuda::kNoRow);
  std::atomic<bool> all_there{true};
  const auto write_offsets = [&](size_t request, size_t first, size_t last) {
    const size_t row_bytes = parts[fetched[request]].table.row_bytes;
    const size_t first_key = missing[fetched[request]].first;
    uint64_t offset = begins[request] + first * row_bytes;
    size_t absent = 0;
    for (size_t k = first_key + first; k < first_key + last; ++k, offset += row_bytes) {
      // A row that no tier holds is not kept: the answer has the default value already.
      offsets[scratch.index.empty() ? k : scratch.index[k]] = found[k] ? offset : cuda::kNoRow;
      absent += !found[k];
    }
    if (absent > 0) all_there.store(false, std::memory_order_relaxed);
  };
  std::atomic<size_t> told{0};
  const auto rows_arrived = [&](size_t request, size_t first, size_t last) {
    const size_t row_bytes = parts[fetched[request]].table.row_bytes;
    write_offsets(request, first, last);
    told.fetch_add(last - first, std::memory_order_relaxed);
    workspace.RowsArrived(begins[request] + first * row_bytes, begins[request] + last * row_bytes);
  };
  // By reference: a std::function that holds more than that allocates.
  const RowsArrived arrived = [&rows_arrived](size_t request, size_t first, size_t last) {
    rows_arrived(request, first, last);
  };
  HPS_RETURN_IF_ERROR(source_->Fetch(scratch.requests, limits, arrived, report));

  size_t wanted = 0;
  for (size_t i = 0; i < count; ++i) wanted += missing[fetched[i]].count;
  for (size_t i = 0; i < count && told != wanted; ++i) write_offsets(i, 0, missing[fetched[i]].count);

  scratch.outdated.clear();
  UpdateGate& gate = resources_.context->gate();
  std::lock_guard lock(gate.mutex());
  for (size_t i = 0; i < count && gate.Now() != read_at; ++i) {
    const size_t p = fetched[i];
    const size_t before = scratch.outdated.size();
    for (uint32_t k = missing[p].first; k < missing[p].first + missing[p].count; ++k) {
      if (found[k] && gate.UpdatedSince(lookups[p].cache->number(), scratch.keys[k], read_at)) {
        scratch.outdated.push_back({parts[p].table, scratch.keys[k]});
      }
    }
    lookups[p].cache->CountOutdated(scratch.outdated.size() - before);
  }
  return workspace.Fill(parts, parts.size() == 1 && all_there, scratch.outdated, stream);
}

}  // namespace hps
