// A call works on one Model it took at its beginning, so all tables of a call belong to one version.
// Scratch vectors are lent from the thread and given back, so that a steady stream of lookups allocates nothing.

#include "hps/lookup_session.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <mutex>

#include "cc/base/system_limits.h"
#include "cc/core/combine.h"
#include "cc/core/first_error.h"
#include "cc/core/model.h"
#include "hps/epoch.h"

namespace hps {
namespace {

constexpr Key kMinShortKey = std::numeric_limits<int32_t>::min();
constexpr Key kMaxShortKey = std::numeric_limits<int32_t>::max();

// Lends the thread's vector; a nested lease on the same thread gets an empty one. Large ones are not kept.
template <typename T>
class ScratchLease {
 public:
  ScratchLease() : vector_(std::move(Kept())) {}
  ~ScratchLease() {
    if (vector_.capacity() * sizeof(T) <= (size_t{8} << 20)) Kept() = std::move(vector_);
  }
  std::vector<T>& operator*() { return vector_; }
  std::vector<T>* operator->() { return &vector_; }

 private:
  static std::vector<T>& Kept() {
    thread_local std::vector<T> kept;
    return kept;
  }
  std::vector<T> vector_;
};

std::string TableContext(const Model& model, uint32_t table) {
  return "model '" + model.config.name + "', table '" + model.tables[table].name + "'";
}

// Made where it is needed only: a string a call is seen in the time of small lookups.
Status InModel(Status status, const Model& model) {
  return status.ok() ? status : status.WithContext("model '" + model.config.name + "'");
}

Status CheckTable(const Model& model, uint32_t table, uint32_t width) {
  if (table >= model.tables.size()) {
    return InvalidArgument("model '" + model.config.name + "' has no table " + std::to_string(table) + "; it has " +
                           std::to_string(model.tables.size()) + " tables, numbered from 0");
  }
  const size_t actual = model.tables[table].stack.default_row.size();
  if (width != actual) {
    return InvalidArgument(TableContext(model, table) + ": rows have " + std::to_string(actual) +
                           " values (embedding_vecsize_per_table), but emb_vec_size " + std::to_string(width) +
                           " was asked for");
  }
  return OkStatus();
}

Status CheckKeys(const Model& model, uint32_t table, std::span<const Key> keys, bool long_keys) {
  if (keys.size() > std::numeric_limits<uint32_t>::max()) {
    return InvalidArgument(TableContext(model, table) + ": " + std::to_string(keys.size()) +
                           " keys in one call; split it, 4294967295 is the most");
  }
  if (long_keys) return OkStatus();
  Key low = 0, high = 0;
  for (Key key : keys) {
    low = std::min(low, key);
    high = std::max(high, key);
  }
  if (low >= kMinShortKey && high <= kMaxShortKey) return OkStatus();
  for (size_t i = 0; i < keys.size(); ++i) {
    if (keys[i] >= kMinShortKey && keys[i] <= kMaxShortKey) continue;
    return OutOfRange(
        TableContext(model, table) + ": key " + std::to_string(keys[i]) + " at position " + std::to_string(i) +
        " does not fit in 32 bits; set \"supportlonglong\": true in the configuration to use 64-bit keys");
  }
  return OkStatus();
}

Status CheckSparse(const Model& model, const SparseLookup& lookup, bool long_keys) {
  HPS_RETURN_IF_ERROR(CheckTable(model, lookup.table, lookup.width));
  HPS_RETURN_IF_ERROR(CheckKeys(model, lookup.table, lookup.keys, long_keys));
  const auto& splits = lookup.row_splits;
  const auto context = [&] { return TableContext(model, lookup.table); };
  if (splits.empty() || splits.front() != 0 || splits.back() != static_cast<int64_t>(lookup.keys.size())) {
    return InvalidArgument(context() + ": row_splits must begin with 0 and end with the number of keys, " +
                           std::to_string(lookup.keys.size()));
  }
  for (size_t i = 1; i < splits.size(); ++i) {
    if (splits[i] < splits[i - 1]) {
      return InvalidArgument(context() + ": row_splits must not descend, but splits[" + std::to_string(i) + "] is " +
                             std::to_string(splits[i]) + " after " + std::to_string(splits[i - 1]));
    }
  }
  if (!lookup.weights.empty() && lookup.weights.size() != lookup.keys.size()) {
    return InvalidArgument(context() + ": " + std::to_string(lookup.weights.size()) + " weights for " +
                           std::to_string(lookup.keys.size()) + " keys; each key needs one weight");
  }
  return OkStatus();
}

// Part is DeviceLookupPart or DeviceSparsePart.
template <typename Part>
Status CheckDeviceKeys(const Model& model, const Part& part) {
  if (part.key_bytes != sizeof(Key) && part.key_bytes != sizeof(int32_t)) {
    return InvalidArgument(TableContext(model, part.table) + ": keys of " + std::to_string(part.key_bytes) +
                           " bytes; lookups on a device take int64 and int32 keys (key_bytes 8 and 4)");
  }
  if (part.count == 0) return OkStatus();
  if (part.keys == nullptr) {
    return InvalidArgument(TableContext(model, part.table) + ": " + std::to_string(part.count) +
                           " keys, but no memory for them (a null pointer)");
  }
  if (part.key_bytes == sizeof(int32_t) && part.wide_keys == nullptr) {
    return InvalidArgument(TableContext(model, part.table) + ": int32 keys need wide_keys, memory of the device for " +
                           std::to_string(part.count) + " int64 keys");
  }
  return OkStatus();
}

// The call holds the model, which holds the cache: to count one more holder is an exchange between processors for each
// table.
std::shared_ptr<DeviceCache> HeldByModel(const std::shared_ptr<DeviceCache>& cache) {
  return {std::shared_ptr<DeviceCache>(), cache.get()};
}

// The keys as int64; those that must be widened before are added to *narrow, and are packed then.
template <typename Part>
const Key* KeysOnDevice(const Part& part, uint32_t stride, std::vector<cuda::WidenPart>* narrow) {
  if (part.key_bytes == sizeof(Key)) return static_cast<const Key*>(part.keys);
  if (part.count > 0) narrow->push_back({static_cast<const int32_t*>(part.keys), part.wide_keys, part.count, stride});
  return part.wide_keys;
}

// All that needs no look at the device's memory.
Status CheckDeviceSegments(const Model& model, const DeviceSparsePart& part) {
  const auto context = [&] { return TableContext(model, part.table); };
  if (part.rows > 0 && part.output == nullptr) {
    return InvalidArgument(context() + ": " + std::to_string(part.rows) +
                           " output rows, but no memory for them (a null pointer)");
  }
  if (part.row_splits != nullptr) {
    if (part.indices == nullptr) return OkStatus();
    return InvalidArgument(context() + ": both row_splits and indices; one of them tells the output rows");
  }
  if (part.rank == 0 || part.dense_shape == nullptr || (part.count > 0 && part.indices == nullptr)) {
    return InvalidArgument(context() + ": neither row_splits nor indices with rank and dense_shape");
  }
  if (part.rank > cuda::kMostRank) {
    return InvalidArgument(context() + ": indices of rank " + std::to_string(part.rank) + "; " +
                           std::to_string(cuda::kMostRank) + " is the most");
  }
  if (part.dense_shape[0] != int64_t{part.rows}) {
    return InvalidArgument(context() + ": dense_shape[0] is " + std::to_string(part.dense_shape[0]) +
                           ", but there are " + std::to_string(part.rows) + " output rows");
  }
  return OkStatus();
}

void CountCall(const TierMetrics& metrics, size_t keys) {
  metrics.lookups->Add(1);
  metrics.keys->Add(keys);
}

// Counts the call's time in the model's histogram, also where it fails.
class CallTimer {
 public:
  explicit CallTimer(Histogram& histogram) : histogram_(histogram) {}
  std::chrono::steady_clock::time_point start() const { return start_; }
  ~CallTimer() {
    histogram_.Record(static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start_).count()));
  }

 private:
  Histogram& histogram_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

LookupLimits LimitsOf(const LookupOptions& options, const ServerResources& resources, const CallTimer& timer) {
  LookupLimits limits{options.deadline, options.cancelled};
  if (limits.deadline == kNoDeadline && resources.lookup_timeout.count() > 0) {
    limits.deadline = timer.start() + resources.lookup_timeout;
  }
  return limits;
}

// A sparse lookup works in blocks of output rows with about so many keys: their rows stay in the nearer caches between
// being found and being added up.
constexpr int64_t kKeysPerBlock = 256;

struct Block {
  size_t first, last;  // output rows [first, last)
};

// Finds the rows of the output rows [first, last) in `table` and combines them where they lie; their addresses are left
// in `rows`, which is what request.rows looks at. Blocks with keys that the table does not hold are appended to
// *incomplete instead of being combined; without a table these are all blocks.
Status CombineInPlace(const Table* table, std::span<const Key> keys, std::span<const std::byte*> rows,
                      const CombineRequest& request, size_t first, size_t last, std::vector<Block>* incomplete) {
  const auto splits = request.row_splits;
  for (Block block{first, first}; block.first < last; block.first = block.last) {
    block.last = block.first + 1;
    while (block.last < last && splits[block.last + 1] - splits[block.first] <= kKeysPerBlock) ++block.last;
    const auto offset = static_cast<size_t>(splits[block.first]);
    const auto block_rows = rows.subspan(offset, static_cast<size_t>(splits[block.last]) - offset);
    if (table != nullptr) {
      HPS_RETURN_IF_ERROR(table->Locate(keys.subspan(offset, block_rows.size()), block_rows));
    } else {
      std::fill(block_rows.begin(), block_rows.end(), nullptr);
    }
    if (std::find(block_rows.begin(), block_rows.end(), nullptr) == block_rows.end()) {
      Combine(request, block.first, block.last);
    } else {
      incomplete->push_back(block);
    }
  }
  return OkStatus();
}

Status LookupOneSparse(const Model& model, const SparseLookup& lookup, ServerResources& resources, Executor& executor,
                       const LookupLimits& limits, LookupReport* report) {
  const TierStack& stack = model.tables[lookup.table].stack;
  const size_t row_count = lookup.row_splits.size() - 1;
  CountCall(stack.metrics, lookup.keys.size());
  ScratchLease<const std::byte*> rows;
  rows->resize(lookup.keys.size());
  const CombineRequest request{*rows, lookup.row_splits, lookup.weights, lookup.combiner, lookup.width, lookup.output};
  const Tier& memory = stack.volatile_tier;
  bool in_place =
      memory.table != nullptr && memory.addressable && (memory.breaker == nullptr || memory.breaker->closed());

  EpochGuard guard;
  std::vector<Block> incomplete;
  FirstError error;
  std::mutex mutex;
  const size_t keys_per_row = lookup.keys.size() / std::max<size_t>(row_count, 1) + 1;
  const auto combine_in = [&](const Table* table) {
    executor.ParallelFor(row_count, std::max<size_t>(kKeysPerPiece / keys_per_row, 1), [&](size_t first, size_t last) {
      if (error.failed()) return;
      std::vector<Block> found_incomplete;
      error.Set(CombineInPlace(table, lookup.keys, *rows, request, first, last, &found_incomplete));
      if (found_incomplete.empty()) return;
      std::lock_guard lock(mutex);
      incomplete.insert(incomplete.end(), found_incomplete.begin(), found_incomplete.end());
    });
  };
  HPS_RETURN_IF_ERROR(CheckLimits(limits));
  if (in_place) {
    combine_in(memory.table.get());
    if (error.failed() && !IsUnavailable(memory, error.status(), limits)) {
      return error.status().WithContext(TableContext(model, lookup.table));
    }
    in_place = !error.failed();
  }
  if (!in_place) {  // or no longer: the walk below asks the tier and does what its policy says
    error.Reset();
    incomplete.clear();
    combine_in(nullptr);
  }

  std::vector<size_t> missing;
  for (const Block& block : incomplete) {
    for (auto i = static_cast<size_t>(lookup.row_splits[block.first]);
         i < static_cast<size_t>(lookup.row_splits[block.last]); ++i) {
      if ((*rows)[i] == nullptr) missing.push_back(i);
    }
  }
  report->rows_from_volatile += lookup.keys.size() - missing.size();
  if (memory.rows_served != nullptr) memory.rows_served->Add(lookup.keys.size() - missing.size());
  if (missing.empty()) return OkStatus();

  const size_t row_bytes = stack.row_bytes();
  std::vector<Key> missing_keys(missing.size());
  for (size_t i = 0; i < missing.size(); ++i) missing_keys[i] = lookup.keys[missing[i]];
  std::vector<std::byte> fetched(missing.size() * row_bytes);
  TierWalk walk;
  walk.stack = &stack;
  walk.keys = missing_keys;
  walk.rows = fetched.data();
  walk.skip_volatile = in_place;
  const Status fetched_rows = FetchRows(std::span(&walk, 1), executor, *resources.executor, limits, report);
  if (!fetched_rows.ok()) return fetched_rows.WithContext(TableContext(model, lookup.table));
  for (size_t i = 0; i < missing.size(); ++i) (*rows)[missing[i]] = fetched.data() + i * row_bytes;
  executor.ParallelFor(incomplete.size(), kKeysPerPiece / kKeysPerBlock, [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) Combine(request, incomplete[i].first, incomplete[i].last);
  });
  return OkStatus();
}

}  // namespace

Status LookupSession::Lookup(std::span<const DenseLookup> lookups, const LookupOptions& options,
                             LookupReport* report) const try {
  CallTimer timer(slot_->lookup_seconds());
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, slot_->Current());
  ServerResources& resources = slot_->resources();
  for (const DenseLookup& lookup : lookups) {
    HPS_RETURN_IF_ERROR(CheckTable(*model, lookup.table, lookup.width));
    HPS_RETURN_IF_ERROR(CheckKeys(*model, lookup.table, lookup.keys, resources.long_keys));
  }
  LookupReport local;
  ScratchLease<TierWalk> walks;
  walks->resize(lookups.size());
  for (size_t i = 0; i < lookups.size(); ++i) {
    const DenseLookup& lookup = lookups[i];
    TierWalk& walk = (*walks)[i];
    walk.stack = &model->tables[lookup.table].stack;
    walk.keys = lookup.keys;
    walk.rows = reinterpret_cast<std::byte*>(lookup.rows);
    walk.found = lookup.found;
    CountCall(walk.stack->metrics, lookup.keys.size());
    local.keys += lookup.keys.size();
  }
  Executor& executor = options.executor ? *options.executor : *resources.executor;
  HPS_RETURN_IF_ERROR(
      InModel(FetchRows(*walks, executor, *resources.executor, LimitsOf(options, resources, timer), &local), *model));
  if (report != nullptr) *report = local;
  return OkStatus();
} catch (const std::exception&) {
  return CaughtStatus("the lookup");
}

Status LookupSession::LookupSparse(std::span<const SparseLookup> lookups, const LookupOptions& options,
                                   LookupReport* report) const try {
  CallTimer timer(slot_->lookup_seconds());
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, slot_->Current());
  ServerResources& resources = slot_->resources();
  Executor& executor = options.executor ? *options.executor : *resources.executor;
  for (const SparseLookup& lookup : lookups) HPS_RETURN_IF_ERROR(CheckSparse(*model, lookup, resources.long_keys));
  const LookupLimits limits = LimitsOf(options, resources, timer);
  std::vector<LookupReport> reports(lookups.size());
  // Executors need not bear nested calls: big lookups run one after another, each in parallel pieces; small ones run
  // side by side, each inline.
  std::vector<size_t> small;
  size_t small_keys = 0;
  for (size_t i = 0; i < lookups.size(); ++i) {
    if (lookups[i].keys.size() <= kKeysPerPiece) {
      small.push_back(i);
      small_keys += lookups[i].keys.size();
      continue;
    }
    HPS_RETURN_IF_ERROR(LookupOneSparse(*model, lookups[i], resources, executor, limits, &reports[i]));
  }
  FirstError error;
  const size_t keys_per_lookup = small_keys / std::max<size_t>(small.size(), 1) + 1;
  executor.ParallelFor(small.size(), kKeysPerPiece / keys_per_lookup + 1, [&](size_t first, size_t last) {
    for (size_t i = first; i < last && !error.failed(); ++i) {
      error.Set(LookupOneSparse(*model, lookups[small[i]], resources, InlineExecutor(), limits, &reports[small[i]]));
    }
  });
  HPS_RETURN_IF_ERROR(error.status());
  if (report == nullptr) return OkStatus();
  *report = {};
  for (size_t i = 0; i < lookups.size(); ++i) {
    report->keys += lookups[i].keys.size();
    report->rows_from_volatile += reports[i].rows_from_volatile;
    report->rows_from_persistent += reports[i].rows_from_persistent;
    report->rows_from_default += reports[i].rows_from_default;
    report->rows_unavailable += reports[i].rows_unavailable;
    report->rows_skipped_volatile += reports[i].rows_skipped_volatile;
    report->rows_skipped_persistent += reports[i].rows_skipped_persistent;
    report->volatile_nanoseconds += reports[i].volatile_nanoseconds;
    report->persistent_nanoseconds += reports[i].persistent_nanoseconds;
  }
  return OkStatus();
} catch (const std::exception&) {
  return CaughtStatus("the lookup");
}

Result<bool> LookupSession::IsServedOnDevice(int device) const {
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, slot_->Current());
  if (model->caches == nullptr) return false;
  HPS_RETURN_IF_ERROR(FindCaches(model->config, model->caches.get(), device).status());
  return true;
}

Status LookupSession::LookupOnDevice(int device, std::span<const DeviceLookupPart> lookups, DeviceStream stream,
                                     const LookupOptions& options, LookupReport* report) const try {
  CallTimer timer(slot_->lookup_seconds());
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, slot_->Current());
  HPS_ASSIGN_OR_RETURN(const ModelDevice* const on, FindCaches(model->config, model->caches.get(), device));
  ScratchLease<CachedLookup> cached;
  ScratchLease<cuda::WidenPart> narrow;
  cached->clear();
  narrow->clear();
  cached->reserve(lookups.size());
  for (const DeviceLookupPart& lookup : lookups) {
    HPS_RETURN_IF_ERROR(CheckTable(*model, lookup.table, lookup.width));
    HPS_RETURN_IF_ERROR(CheckDeviceKeys(*model, lookup));
    if (lookup.count > 0 && lookup.rows == nullptr) {
      return InvalidArgument(TableContext(*model, lookup.table) + ": " + std::to_string(lookup.count) +
                             " keys, but no memory for their rows (a null pointer)");
    }
    constexpr uint32_t kMostStride = std::numeric_limits<uint32_t>::max() / sizeof(float);
    if (lookup.key_stride == 0 || lookup.row_stride > kMostStride ||
        (lookup.row_stride != 0 && lookup.row_stride < lookup.width)) {
      return InvalidArgument(TableContext(*model, lookup.table) + ": keys " + std::to_string(lookup.key_stride) +
                             " apart and rows of " + std::to_string(lookup.width) + " values " +
                             std::to_string(lookup.row_stride) + " apart (key_stride, row_stride)");
    }
    const bool is_wide = lookup.key_bytes == sizeof(Key);
    cached->push_back({HeldByModel(on->caches[lookup.table]), lookup.table,
                       KeysOnDevice(lookup, lookup.key_stride, &*narrow), lookup.count, lookup.rows,
                       is_wide ? lookup.key_stride : 1, lookup.row_stride * static_cast<uint32_t>(sizeof(float))});
  }
  const LookupLimits limits = LimitsOf(options, slot_->resources(), timer);
  HPS_RETURN_IF_ERROR(CheckLimits(limits));
  for (const DeviceLookupPart& lookup : lookups) CountCall(model->tables[lookup.table].stack.metrics, lookup.count);
  return InModel(on->lookup->Lookup(*cached, stream, {limits.deadline, limits.cancelled}, report, *narrow), *model);
} catch (const std::exception&) {
  return CaughtStatus("the lookup");
}

Status LookupSession::LookupSparseOnDevice(int device, std::span<const DeviceSparsePart> lookups, DeviceStream stream,
                                           const LookupOptions& options, LookupReport* report) const try {
  CallTimer timer(slot_->lookup_seconds());
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, slot_->Current());
  HPS_ASSIGN_OR_RETURN(const ModelDevice* const on, FindCaches(model->config, model->caches.get(), device));
  ScratchLease<PooledLookup> pooled;
  ScratchLease<cuda::WidenPart> narrow;
  pooled->clear();
  narrow->clear();
  pooled->reserve(lookups.size());
  for (const DeviceSparsePart& lookup : lookups) {
    HPS_RETURN_IF_ERROR(CheckTable(*model, lookup.table, lookup.width));
    HPS_RETURN_IF_ERROR(CheckDeviceKeys(*model, lookup));
    HPS_RETURN_IF_ERROR(CheckDeviceSegments(*model, lookup));
    pooled->push_back({HeldByModel(on->caches[lookup.table]), lookup, KeysOnDevice(lookup, /*stride=*/1, &*narrow)});
  }
  const LookupLimits limits = LimitsOf(options, slot_->resources(), timer);
  HPS_RETURN_IF_ERROR(CheckLimits(limits));
  for (const DeviceSparsePart& lookup : lookups) CountCall(model->tables[lookup.table].stack.metrics, lookup.count);
  const Status status = on->lookup->LookupPooled(*pooled, stream, {limits.deadline, limits.cancelled}, report, *narrow);
  // What is wrong with a table's segments names model and table.
  if (status.code() == StatusCode::kInvalidArgument) return status;
  return InModel(status, *model);
} catch (const std::exception&) {
  return CaughtStatus("the lookup");
}

Result<uint32_t> LookupSession::FindTable(std::string_view name) const {
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, slot_->Current());
  for (size_t i = 0; i < model->tables.size(); ++i) {
    if (model->tables[i].name == name) return static_cast<uint32_t>(i);
  }
  std::string known;
  for (const ModelTable& table : model->tables) known += (known.empty() ? "'" : ", '") + table.name + "'";
  return NotFound("model '" + model->config.name + "' has no table '" + std::string(name) + "'; it has " + known);
}

Result<std::vector<LookupSession::TableInfo>> LookupSession::Tables() const {
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, slot_->Current());
  std::vector<TableInfo> tables;
  for (const ModelTable& table : model->tables) {
    tables.push_back({table.name, static_cast<uint32_t>(table.stack.default_row.size())});
  }
  return tables;
}

}  // namespace hps
