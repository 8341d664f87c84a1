// Invariants
// - Contents outlive every EpochGuard that was alive when the table was destroyed.
// - Readers hold a guard from before they load an index until they have copied the rows.
// Lock order: partitions are locked one at a time, and never while a visitor runs.

#include "cc/storage/hash_map_table.h"

#include <algorithm>
#include <array>
#include <ctime>
#include <mutex>
#include <string>
#include <utility>

#include "cc/storage/partition_order.h"
#include "cc/storage/row_copy.h"
#include "cc/storage/table_memory.h"
#include "hps/epoch.h"

namespace hps {
namespace {

constexpr size_t kMaxRowBytes = size_t{1} << 30;
constexpr size_t kScanChunkBytes = 256 << 10;
// Output of so many bytes leaves the nearer caches before anybody reads it, so it is written around them.
constexpr size_t kStreamBytes = 4 << 20;

thread_local uint64_t use_random = 1;  // for UseCount::Moves

uint64_t CoarseSeconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return static_cast<uint64_t>(now.tv_sec);
}

}  // namespace

Result<std::shared_ptr<Table>> HashMapTable::Create(const TableSpec& spec, const HashMapOptions& options,
                                                    std::shared_ptr<const std::atomic<bool>> closed) {
  const std::string table = "hash_map: table '" + spec.name + "'";
  if (spec.row_bytes == 0 || spec.row_bytes > kMaxRowBytes) {
    return InvalidArgument(table + " has rows of " + std::to_string(spec.row_bytes) + " bytes; 1 to " +
                           std::to_string(kMaxRowBytes) + " are possible");
  }
  if (PlannedRows(spec, options) > RowSlab::kMaxSlots) {
    return ResourceExhausted(table + " expects " + std::to_string(spec.expected_rows) + " rows; the most is " +
                             std::to_string(RowSlab::kMaxSlots) + "; split it");
  }
  auto contents = std::make_shared<Contents>(spec, options);
  const uint64_t rows = PlannedRows(spec, options);
  std::vector<std::shared_ptr<HashMapIndex>> indexes;
  if (rows > 0) {
    auto created =
        HashMapIndex::Create(HashMapBuckets(rows, options.num_partitions, options.overflow), options.num_partitions);
    if (!created.ok()) return created.status().WithContext(table);
    indexes = std::move(created).value();
    auto dense_index =
        DenseIndex::Create(rows, options.overflow.bounded() ? DenseIndex::kSmallBlockBits : DenseIndex::kBlockBits);
    if (!dense_index.ok()) return dense_index.status().WithContext(table);
    contents->dense_index = std::move(dense_index).value();
  } else {
    indexes.assign(options.num_partitions, std::make_shared<HashMapIndex>());
  }
  for (uint32_t p = 0; p < options.num_partitions; ++p) {
    contents->partitions.emplace_back(p, options.num_partitions, contents->overflow, &contents->slab,
                                      &contents->dense_index, std::move(indexes[p]), &contents->indexes[p]);
  }
  return std::shared_ptr<Table>(new HashMapTable(spec, options, std::move(closed), std::move(contents)));
}

uint64_t HashMapTable::PlannedRows(const TableSpec& spec, const HashMapOptions& options) {
  const uint64_t margin = options.overflow.margin;
  if (margin >= RowSlab::kMaxSlots / options.num_partitions) return spec.expected_rows;
  return std::min(spec.expected_rows, margin * options.num_partitions);
}

HashMapTable::HashMapTable(const TableSpec& spec, const HashMapOptions& options,
                           std::shared_ptr<const std::atomic<bool>> closed, std::shared_ptr<Contents> contents)
    : spec_(spec), options_(options), closed_(std::move(closed)), contents_(std::move(contents)) {}

HashMapTable::~HashMapTable() { RetireObject(std::move(contents_)); }

Status HashMapTable::CheckOpen() const {
  if (!closed_->load(std::memory_order_acquire)) return OkStatus();
  return FailedPrecondition("hash_map: the store of table '" + spec_.name + "' has been closed; open it again");
}

Status HashMapTable::CheckStride(size_t stride_bytes) const {
  if (stride_bytes >= spec_.row_bytes) return OkStatus();
  return InvalidArgument("hash_map: a stride of " + std::to_string(stride_bytes) +
                         " bytes is less than a row of table '" + spec_.name + "' (" + std::to_string(spec_.row_bytes) +
                         " bytes)");
}

// Sends count keys through three stages that lie kAhead keys apart: prefetch the key's index line; look it up and
// prefetch the row; use the row. key_at(i) is the i-th key; use(i, row) gets nullptr for a missing one.
template <RowMark kMark, typename KeyAt, typename Prefetch, typename Use>
void HashMapTable::ForEachRow(size_t count, KeyAt key_at, Prefetch prefetch, Use use) const {
  constexpr size_t kAhead = 16;
  struct Probe {
    const HashMapIndex* index;  // null: the key is in the dense index
    const HashMapIndex::Bucket* home;
  };
  std::array<Probe, kAhead> probes;
  std::array<const std::byte*, kAhead> rows;
  [[maybe_unused]] std::array<std::byte*, kMark == RowMark::kNone ? 1 : kAhead> marks;
  [[maybe_unused]] uint32_t now = 0;
  if constexpr (kMark == RowMark::kTime) now = contents_->clock.Now(CoarseSeconds());
  [[maybe_unused]] uint64_t random = 0;
  if constexpr (kMark == RowMark::kUses) random = use_random;
  const Contents& contents = *contents_;
  const uint32_t num_partitions = contents.num_partitions();
  for (size_t step = 0; step < count + 2 * kAhead; ++step) {
    if (step >= 2 * kAhead) {
      const std::byte* row = rows[step % kAhead];
      if constexpr (kMark == RowMark::kTime) {
        if (row != nullptr) RowMarks::SetTime(marks[step % kAhead], now);
      } else if constexpr (kMark == RowMark::kUses) {
        if (row != nullptr) RowMarks::AddUse(marks[step % kAhead], &random);
      }
      use(step - 2 * kAhead, row);
    }
    if (step >= kAhead && step < count + kAhead) {
      const Key key = key_at(step - kAhead);
      const Probe& probe = probes[step % kAhead];
      const uint32_t entry =
          probe.index == nullptr ? contents.dense_index.Find(key) : probe.index->Find(key, probe.home);
      const std::byte* row = entry == 0 ? nullptr : contents.slab.Row(entry - 1);
      if (row != nullptr) prefetch(row);
      if constexpr (kMark != RowMark::kNone) {
        if (row != nullptr) __builtin_prefetch(marks[step % kAhead] = contents.slab.Mark(entry - 1), 1);
      }
      rows[step % kAhead] = row;
    }
    if (step < count) {
      const Key key = key_at(step);
      Probe probe = {nullptr, nullptr};
      if (contents.dense_index.Covers(key)) {
        __builtin_prefetch(contents.dense_index.Home(key));
      } else {
        const KeyPlace place = PlaceOf(key, num_partitions);
        probe.index = contents.indexes[place.partition].load(std::memory_order_acquire);
        probe.home = probe.index->Home(place.fraction);
        __builtin_prefetch(probe.home);
      }
      probes[step % kAhead] = probe;
    }
  }
  if constexpr (kMark == RowMark::kUses) use_random = random;
}

template <RowMark kMark, size_t kRowBytes, bool kStream>
void HashMapTable::FetchRows(const FetchRequest& request, size_t first, size_t last,
                             std::vector<uint32_t>* misses) const {
  const size_t row_bytes = kRowBytes > 0 ? kRowBytes : spec_.row_bytes;
  const uint32_t* positions = request.positions ? request.positions->data() : nullptr;
  const auto position = [&](size_t i) { return positions != nullptr ? positions[first + i] : first + i; };
  ForEachRow<kMark>(
      last - first, [&](size_t i) { return request.keys[position(i)]; },
      [&](const std::byte* row) { PrefetchRow(row, row_bytes); },
      [&](size_t i, const std::byte* row) {
        std::byte* to = request.rows.data + position(i) * request.rows.stride_bytes;
        if (row == nullptr) {
          misses->push_back(static_cast<uint32_t>(position(i)));
        } else if (kStream) {
          StreamRow(to, row, row_bytes);
        } else {
          CopyRow(to, row, row_bytes);
        }
      });
  if (kStream) StreamingDone();
}

Status HashMapTable::CheckWanted(const FetchRequest& request) const {
  if (request.cancelled != nullptr && request.cancelled->load(std::memory_order_relaxed)) {
    return Cancelled("hash_map: the caller gave up while table '" + spec_.name + "' was read");
  }
  if (request.deadline != kNoDeadline && std::chrono::steady_clock::now() > request.deadline) {
    return DeadlineExceeded("hash_map: the deadline passed before table '" + spec_.name + "' was read");
  }
  return OkStatus();
}

template <RowMark kMark>
Status HashMapTable::FetchPieces(const FetchRequest& request, std::vector<uint32_t>* misses) const {
  const size_t count = request.positions ? request.positions->size() : request.keys.size();
  const bool stream = std::max(count * spec_.row_bytes, request.output_bytes) >= kStreamBytes &&
                      StreamingPossible(request.rows.data, request.rows.stride_bytes) &&
                      StreamingPossible(request.rows.data, spec_.row_bytes);
  size_t first = 0;
  do {
    HPS_RETURN_IF_ERROR(CheckWanted(request));
    const size_t last = std::min(count, first + options_.max_get_batch_size);
    const EpochGuard guard;
    const auto fetch = [&]<size_t kRowBytes>() {
      stream ? FetchRows<kMark, kRowBytes, true>(request, first, last, misses)
             : FetchRows<kMark, kRowBytes, false>(request, first, last, misses);
    };
    switch (spec_.row_bytes) {  // the sizes whose copy the compiler may unroll
      case 32: fetch.template operator()<32>(); break;
      case 64: fetch.template operator()<64>(); break;
      case 128: fetch.template operator()<128>(); break;
      case 256: fetch.template operator()<256>(); break;
      case 512: fetch.template operator()<512>(); break;
      default: fetch.template operator()<0>(); break;
    }
    first = last;
  } while (first < count);
  return OkStatus();
}

Status HashMapTable::Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const {
  HPS_RETURN_IF_ERROR(CheckOpen());
  HPS_RETURN_IF_ERROR(CheckStride(request.rows.stride_bytes));
  switch (ReadMark(options_.overflow)) {
    case RowMark::kTime: return FetchPieces<RowMark::kTime>(request, misses);
    case RowMark::kUses: return FetchPieces<RowMark::kUses>(request, misses);
    case RowMark::kNone: break;
  }
  return FetchPieces<RowMark::kNone>(request, misses);
}

Status HashMapTable::Locate(std::span<const Key> keys, std::span<const std::byte*> rows) const {
  HPS_RETURN_IF_ERROR(CheckOpen());
  if (rows.size() < keys.size()) {
    return InvalidArgument("hash_map: " + std::to_string(rows.size()) + " addresses for " +
                           std::to_string(keys.size()) + " keys of table '" + spec_.name + "'");
  }
  const auto locate = [&]<RowMark kMark>() {
    ForEachRow<kMark>(
        keys.size(), [&](size_t i) { return keys[i]; },
        [&](const std::byte* row) { PrefetchRow(row, spec_.row_bytes); },
        [&](size_t i, const std::byte* row) { rows[i] = row; });
  };
  switch (ReadMark(options_.overflow)) {
    case RowMark::kTime: locate.operator()<RowMark::kTime>(); break;
    case RowMark::kUses: locate.operator()<RowMark::kUses>(); break;
    case RowMark::kNone: locate.operator()<RowMark::kNone>(); break;
  }
  return OkStatus();
}

Status HashMapTable::Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) {
  HPS_RETURN_IF_ERROR(CheckOpen());
  HPS_RETURN_IF_ERROR(CheckStride(rows.stride_bytes));
  std::mutex mutex;
  Status status;
  const size_t piece_rows = options_.max_set_batch_size;
  // Later pieces are younger.
  const uint32_t now = contents_->clock.Advance(static_cast<uint32_t>(keys.size() / piece_rows + 1));
  const auto partition_of = [this](Key key) { return contents_->PartitionOf(key); };
  ForEachPartition(keys, contents_->num_partitions(), *options_.executor, partition_of,
                   [&](uint32_t partition, std::span<const uint32_t> order) {
                     Status written;
                     for (size_t first = 0; first < order.size() && written.ok(); first += piece_rows) {
                       const auto piece = order.subspan(first, std::min(piece_rows, order.size() - first));
                       written = contents_->partitions[partition].Upsert(
                           piece, keys, rows, options.only_absent, now + static_cast<uint32_t>(first / piece_rows));
                     }
                     if (written.ok()) return;
                     const std::lock_guard lock(mutex);
                     status = written;
                   });
  return status.WithContext("hash_map: table '" + spec_.name + "'");
}

Status HashMapTable::Erase(std::span<const Key> keys, uint64_t* erased) {
  HPS_RETURN_IF_ERROR(CheckOpen());
  std::atomic<uint64_t> total{0};
  ForEachPartition(
      keys, contents_->num_partitions(), *options_.executor, [this](Key key) { return contents_->PartitionOf(key); },
      [&](uint32_t partition, std::span<const uint32_t> order) {
        total.fetch_add(contents_->partitions[partition].Erase(order, keys), std::memory_order_relaxed);
      });
  if (erased != nullptr) *erased = total;
  return OkStatus();
}

Status HashMapTable::Scan(const ScanVisitor& visitor) const {
  HPS_RETURN_IF_ERROR(CheckOpen());
  const size_t chunk_rows = std::max<size_t>(kScanChunkBytes / spec_.row_bytes, 16);
  std::vector<Key> keys;
  std::vector<std::byte> rows;
  std::vector<uint32_t> misses;
  const auto visit = [&]() -> Status {
    rows.resize(keys.size() * spec_.row_bytes);
    misses.clear();
    HPS_RETURN_IF_ERROR(CheckOpen());
    // Scanning is no use of a row: no marks.
    HPS_RETURN_IF_ERROR(FetchPieces<RowMark::kNone>({.keys = keys, .rows = {rows.data(), spec_.row_bytes}}, &misses));
    // Rows that were erased meanwhile leave gaps; close them.
    size_t kept = 0;
    for (size_t i = 0, miss = 0; i < keys.size(); ++i) {
      if (miss < misses.size() && misses[miss] == i) {
        ++miss;
        continue;
      }
      if (kept != i) {
        keys[kept] = keys[i];
        CopyRow(rows.data() + kept * spec_.row_bytes, rows.data() + i * spec_.row_bytes, spec_.row_bytes);
      }
      ++kept;
    }
    const Status status = kept == 0 ? OkStatus() : visitor({keys.data(), kept}, {rows.data(), spec_.row_bytes});
    keys.clear();
    return status;
  };
  // The keys come from the dense index and the hashed indexes of one moment, which name each of them once whatever is
  // written meanwhile; the rows are fetched by key, so that no guard is held while the visitor works.
  const DenseIndex& dense_index = contents_->dense_index;
  for (uint64_t key = 0; key < dense_index.num_keys(); ++key) {
    if (dense_index.Find(static_cast<Key>(key)) != 0) keys.push_back(static_cast<Key>(key));
    if (keys.size() == chunk_rows) HPS_RETURN_IF_ERROR(visit());
  }
  for (const HashMapPartition& partition : contents_->partitions) {
    const std::shared_ptr<const HashMapIndex> index = partition.SharedIndex();
    for (uint64_t bucket = 0; bucket < index->num_buckets(); ++bucket) {
      index->VisitBucket(bucket, [&](Key key, uint32_t) { keys.push_back(key); });
      if (keys.size() >= chunk_rows) HPS_RETURN_IF_ERROR(visit());
    }
  }
  return keys.empty() ? OkStatus() : visit();
}

Result<TableStats> HashMapTable::Stats() const {
  HPS_RETURN_IF_ERROR(CheckOpen());
  TableStats stats;
  stats.memory_bytes = sizeof(*this) + sizeof(Contents) + contents_->partitions.size() * sizeof(HashMapPartition) +
                       contents_->slab.touched_bytes();
  bool dense = false;
  for (const HashMapPartition& partition : contents_->partitions) {
    stats.rows += partition.rows();
    stats.evicted_rows += partition.evicted_rows();
    stats.memory_bytes += partition.memory_bytes();
    dense = dense || partition.wrote_dense();
  }
  if (dense) stats.memory_bytes += contents_->dense_index.memory_bytes();
  return stats;
}

}  // namespace hps
