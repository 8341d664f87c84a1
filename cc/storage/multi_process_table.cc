// Invariants
// - Shared memory is touched under an EpochGuard, after a look at state_->closed: the mapping outlives such calls.
// - An index's place and size are read together: both lie in index[published % 2], which is written again only after
//   `published` has changed. So the addresses of a probe always lie in the shared memory.
// - Whatever a probe found is checked against `published`, before a key is called missing as well.
// Lock order: one partition at a time, never while a visitor runs; the state's mutex, then the heap's lock.

#include "cc/storage/multi_process_table.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <string>
#include <utility>

#include "cc/storage/partition_order.h"
#include "cc/storage/row_copy.h"
#include "hps/epoch.h"

// Thread sanitizer does not model fences; all words that meet here are atomic.
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wtsan"

namespace hps {
namespace {

constexpr size_t kScanChunkBytes = 256 << 10;
// Output of so many bytes leaves the nearer caches before anybody reads it, so it is written around them.
constexpr size_t kStreamBytes = 4 << 20;
// Rows up to this size are put together on the stack.
constexpr size_t kStackRowBytes = 4096;

uint32_t Load(const uint32_t& place, std::memory_order order) {
  return std::atomic_ref(const_cast<uint32_t&>(place)).load(order);
}

// `published` of the dense index, which is never replaced.
const std::atomic<uint64_t> never_replaced{0};

}  // namespace

Status MultiProcessState::CheckOpen() const {
  if (fork_generation != ForkGeneration()) {
    return FailedPrecondition(
        "multi_process_hash_map: the store was opened before fork() and cannot be used in the child process; open it "
        "there, or start workers with the 'spawn' method");
  }
  if (!closed.load(std::memory_order_acquire)) return OkStatus();
  return FailedPrecondition("multi_process_hash_map: the store has been closed; open a new one");
}

MultiProcessTable::MultiProcessTable(TableSpec spec, uint64_t offset, std::shared_ptr<MultiProcessState> state)
    : spec_(std::move(spec)),
      offset_(offset),
      state_(std::move(state)),
      base_(state_->heap->base()),
      table_(state_->heap->At<SharedTable>(offset)),
      num_partitions_(table_->num_partitions),
      dense_block_lines_(table_->dense_block_lines),
      touches_(table_->meta_bytes != 0 && (state_->overflow.refresh_time_after_fetch ||
                                           state_->overflow.policy == OverflowPolicy::kEvictLeastUsed)) {}

MultiProcessTable::~MultiProcessTable() {
  const EpochGuard guard;
  if (!state_->CheckOpen().ok()) return;
  const std::lock_guard state_lock(state_->mutex);
  const auto it = state_->open_tables.find(offset_);
  if (state_->owner == nullptr || --it->second > 0) return;
  state_->open_tables.erase(it);
  const auto lock = state_->heap->Lock();
  state_->heap->Unpin(offset_);
}

Status MultiProcessTable::CheckStride(size_t stride_bytes) const {
  if (stride_bytes >= spec_.row_bytes) return OkStatus();
  return InvalidArgument("multi_process_hash_map: a stride of " + std::to_string(stride_bytes) +
                         " bytes is less than a row of table '" + spec_.name + "' (" + std::to_string(spec_.row_bytes) +
                         " bytes)");
}

uint32_t MultiProcessTable::PartitionOf(Key key) const {
  return Covers(key) ? DenseLine::PartitionOf(static_cast<uint64_t>(key) / DenseLine::kKeys, dense_block_lines_,
                                              num_partitions_)
                     : PlaceOf(key, num_partitions_).partition;
}

// Reading ------------------------------------------------------------------------------------------------------------

// A key on its way through the stages of a read.
struct MultiProcessTable::Probe {
  const SharedPartition* partition;
  const std::atomic<uint64_t>* published;
  uint64_t version;  // what *published was; the rest holds as long as it is
  HashBuckets index;
  HashBuckets::Bucket* home;
  const uint32_t* entry;  // null: the key is in no line
  const uint32_t* marks;
};

// Learns where the key's line is, and asks for it.
void MultiProcessTable::Begin(Key key, Probe* probe) const {
  probe->entry = nullptr;
  if (Covers(key)) {
    const uint64_t line = static_cast<uint64_t>(key) / DenseLine::kKeys;
    probe->partition = table_->partitions() + DenseLine::PartitionOf(line, dense_block_lines_, num_partitions_);
    probe->published = &never_replaced;
    probe->version = 0;
    const uint64_t dense = table_->dense.load(std::memory_order_acquire);
    if (dense == 0) return;
    const auto* place = reinterpret_cast<const DenseLine*>(base_ + dense) + line;
    __builtin_prefetch(place);
    probe->entry = &place->entries[static_cast<uint64_t>(key) - line * DenseLine::kKeys];
    probe->marks = &place->marks;
    return;
  }
  const KeyPlace place = PlaceOf(key, num_partitions_);
  probe->partition = table_->partitions() + place.partition;
  probe->published = &probe->partition->published;
  uint64_t offset = 0;
  uint64_t num_buckets = 0;
  do {
    probe->version = probe->published->load(std::memory_order_acquire);
    const SharedIndex& index = probe->partition->index[probe->version % 2];
    offset = index.offset.load(std::memory_order_acquire);
    num_buckets = index.num_buckets.load(std::memory_order_acquire);
  } while (probe->published->load(std::memory_order_relaxed) != probe->version);
  probe->home = nullptr;
  if (probe->version == 0) return;
  probe->index = HashBuckets(reinterpret_cast<HashBuckets::Bucket*>(base_ + offset), num_buckets);
  probe->home = probe->index.Home(place.fraction);
  __builtin_prefetch(probe->home);
}

// Finds the key's entry. Returns the row it names, to be asked for; null where there is none.
const std::byte* MultiProcessTable::FindEntry(Key key, Probe* probe) const {
  uint32_t entry = 0;
  if (probe->published == &never_replaced) {
    if (probe->entry != nullptr) entry = Load(*probe->entry, std::memory_order_relaxed);
  } else if (probe->home != nullptr) {
    const HashBuckets::Way way = probe->index.Probe(key, probe->home);
    if (way.bucket == nullptr) return nullptr;
    probe->entry = &way.bucket->entries[way.number];
    probe->marks = &way.bucket->marks;
    entry = way.row_entry();
  }
  return entry == 0 ? nullptr : PlaceOfSlot(base_, *table_, *probe->partition, entry - 1).row;
}

// Whether what was read since the entry and the marks were loaded was the key's row all the time.
bool MultiProcessTable::Unchanged(const Probe& probe, uint32_t entry, uint32_t marks) const {
  std::atomic_thread_fence(std::memory_order_acquire);
  return Load(*probe.entry, std::memory_order_relaxed) == entry &&
         Load(*probe.marks, std::memory_order_relaxed) == marks &&
         probe.published->load(std::memory_order_relaxed) == probe.version;
}

// Copies the key's row, in whole words.
template <typename Word, size_t kRowBytes>
MultiProcessTable::Read MultiProcessTable::ReadRow(Key key, Probe* probe, std::byte* to) const {
  const size_t row_bytes = kRowBytes > 0 ? kRowBytes : spec_.row_bytes;
  while (true) {
    if (probe->entry == nullptr) {
      std::atomic_thread_fence(std::memory_order_acquire);
      if (probe->published->load(std::memory_order_relaxed) == probe->version) return Read::kMissing;
    } else {
      const uint32_t marks = Load(*probe->marks, std::memory_order_acquire);
      const uint32_t entry = Load(*probe->entry, std::memory_order_acquire);
      if (entry == 0 || entry == HashBuckets::kErased) {
        if (Unchanged(*probe, entry, marks)) return Read::kMissing;
      } else if (const std::byte* row = PlaceOfSlot(base_, *table_, *probe->partition, entry - 1).row; row == nullptr) {
        if (Unchanged(*probe, entry, marks)) return Read::kDamaged;
      } else {
        LoadSharedRow<Word>(to, row, row_bytes);
        if (Unchanged(*probe, entry, marks)) {
          if (touches_) Touch(*probe->partition, entry - 1);
          return Read::kRow;
        }
      }
      if (probe->published->load(std::memory_order_acquire) == probe->version) continue;  // the entry is still its
    }
    Begin(key, probe);
    (void)FindEntry(key, probe);
  }
}

// Another row may have the slot by now; its time or count is then a little off.
void MultiProcessTable::Touch(const SharedPartition& partition, uint32_t slot) const {
  std::byte* meta = MetaOfSlot(*table_, PlaceOfSlot(base_, *table_, partition, slot));
  const auto old = LoadWord<uint32_t>(meta);
  const uint32_t now = state_->overflow.policy == OverflowPolicy::kEvictLeastUsed
                           ? old + (old != UINT32_MAX)
                           : partition.clock.load(std::memory_order_relaxed);
  if (now != old) StoreWord(meta, now);
}

// Sends the keys through three stages that lie kAhead keys apart: ask for the key's line; find its entry and ask for
// the row; read the row.
template <typename Word, size_t kRowBytes, bool kStream>
Status MultiProcessTable::FetchRows(const FetchRequest& request, size_t count, std::vector<uint32_t>* misses) const {
  constexpr size_t kAhead = 16;
  const size_t row_bytes = kRowBytes > 0 ? kRowBytes : spec_.row_bytes;
  const uint32_t* positions = request.positions ? request.positions->data() : nullptr;
  const auto position = [&](size_t i) { return positions != nullptr ? positions[i] : i; };
  // A row is put together here, so that the output of a key that turns out to be missing is left alone.
  alignas(64) std::byte small[kStackRowBytes];
  std::vector<std::byte> large(row_bytes > kStackRowBytes - sizeof(Word) ? row_bytes + sizeof(Word) : 0);
  std::byte* const row = large.empty() ? small : large.data();
  std::array<Probe, 2 * kAhead> probes;
  for (size_t step = 0; step < count + 2 * kAhead; ++step) {
    if (step >= 2 * kAhead) {
      const size_t at = position(step - 2 * kAhead);
      const Read read = ReadRow<Word, kRowBytes>(request.keys[at], &probes[step % (2 * kAhead)], row);
      if (read == Read::kMissing) {
        misses->push_back(static_cast<uint32_t>(at));
      } else if (read == Read::kDamaged) {
        return DataLoss("multi_process_hash_map: the index of table '" + spec_.name + "' in " + state_->heap->path() +
                        " is damaged; stop the processes that use it and remove the file");
      } else if (kStream) {
        StreamRow(request.rows.data + at * request.rows.stride_bytes, row, row_bytes);
      } else {
        CopyRow(request.rows.data + at * request.rows.stride_bytes, row, row_bytes);
      }
    }
    if (step >= kAhead && step < count + kAhead) {
      const std::byte* found =
          FindEntry(request.keys[position(step - kAhead)], &probes[(step - kAhead) % (2 * kAhead)]);
      if (found != nullptr) PrefetchRow(found, row_bytes);
    }
    if (step < count) Begin(request.keys[position(step)], &probes[step % (2 * kAhead)]);
  }
  if (kStream) StreamingDone();
  return OkStatus();
}

Status MultiProcessTable::Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const {
  const EpochGuard guard;
  HPS_RETURN_IF_ERROR(state_->CheckOpen());
  HPS_RETURN_IF_ERROR(CheckStride(request.rows.stride_bytes));
  if (request.deadline != kNoDeadline && std::chrono::steady_clock::now() > request.deadline) {
    return DeadlineExceeded("multi_process_hash_map: the deadline had passed before table '" + spec_.name +
                            "' was read");
  }
  if (request.cancelled != nullptr && request.cancelled->load(std::memory_order_relaxed)) {
    return Cancelled("multi_process_hash_map: the caller gave up before table '" + spec_.name + "' was read");
  }
  const size_t count = request.positions ? request.positions->size() : request.keys.size();
  const bool stream = std::max(count * spec_.row_bytes, request.output_bytes) >= kStreamBytes &&
                      StreamingPossible(request.rows.data, request.rows.stride_bytes) &&
                      StreamingPossible(request.rows.data, spec_.row_bytes);
  const auto fetch = [&]<typename Word, size_t kRowBytes>() {
    return stream ? FetchRows<Word, kRowBytes, true>(request, count, misses)
                  : FetchRows<Word, kRowBytes, false>(request, count, misses);
  };
  switch (spec_.row_bytes) {  // the sizes whose copy the compiler may unroll
    case 32: return fetch.operator()<uint64_t, 32>();
    case 64: return fetch.operator()<uint64_t, 64>();
    case 128: return fetch.operator()<uint64_t, 128>();
    case 256: return fetch.operator()<uint64_t, 256>();
    case 512: return fetch.operator()<uint64_t, 512>();
    default:
      return table_->slot_bytes % sizeof(uint64_t) == 0 ? fetch.operator()<uint64_t, 0>()
                                                        : fetch.operator()<uint32_t, 0>();
  }
}

Status MultiProcessTable::Locate(std::span<const Key>, std::span<const std::byte*>) const {
  return Unimplemented("multi_process_hash_map: rows have no lasting address, other processes replace them; use Fetch");
}

// The keys of the partition's rows at one moment, each once.
void MultiProcessTable::AppendKeys(const SharedPartition& partition, std::vector<Key>* keys) const {
  const size_t before = keys->size();
  while (true) {
    keys->resize(before);
    const uint64_t version = partition.published.load(std::memory_order_acquire);
    if (version == 0) return;
    const SharedIndex& place = partition.index[version % 2];
    const uint64_t offset = place.offset.load(std::memory_order_acquire);
    const uint64_t num_buckets = place.num_buckets.load(std::memory_order_acquire);
    const auto current = [&] {
      std::atomic_thread_fence(std::memory_order_acquire);
      return partition.published.load(std::memory_order_relaxed) == version;
    };
    if (!current()) continue;
    const HashBuckets index(reinterpret_cast<HashBuckets::Bucket*>(base_ + offset), num_buckets);
    index.ForEach([&](Key key, uint32_t) { keys->push_back(key); });
    if (current()) return;
  }
}

Status MultiProcessTable::Scan(const ScanVisitor& visitor) const {
  const size_t chunk_rows = std::max<size_t>(kScanChunkBytes / spec_.row_bytes, 16);
  std::vector<std::byte> rows;
  std::vector<uint32_t> misses;
  const auto visit = [&](std::span<Key> keys) -> Status {
    rows.resize(keys.size() * spec_.row_bytes);
    misses.clear();
    HPS_RETURN_IF_ERROR(Fetch({.keys = keys, .rows = {rows.data(), spec_.row_bytes}}, &misses));
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
    return kept == 0 ? OkStatus() : visitor({keys.data(), kept}, {rows.data(), spec_.row_bytes});
  };
  // The keys of a partition are taken at one moment and its rows fetched by key, so that nothing is held while the
  // visitor works. A key is in the dense index or in the hashed one, never in both.
  std::vector<Key> keys;
  const auto visit_all = [&]() -> Status {
    for (size_t first = 0; first < keys.size(); first += chunk_rows) {
      HPS_RETURN_IF_ERROR(visit(std::span(keys).subspan(first, std::min(chunk_rows, keys.size() - first))));
    }
    keys.clear();
    return OkStatus();
  };
  for (uint32_t p = 0; p < num_partitions_; ++p) {
    {
      const EpochGuard guard;
      HPS_RETURN_IF_ERROR(state_->CheckOpen());
      AppendKeys(table_->partitions()[p], &keys);
    }
    HPS_RETURN_IF_ERROR(visit_all());
  }
  for (uint64_t line = 0;;) {
    {
      const EpochGuard guard;
      HPS_RETURN_IF_ERROR(state_->CheckOpen());
      const uint64_t dense = table_->dense.load(std::memory_order_acquire);
      const uint64_t lines = dense == 0 ? 0 : DenseLine::LinesFor(table_->expected_rows);
      for (; line < lines && keys.size() < chunk_rows; ++line) {
        const DenseLine& place = reinterpret_cast<const DenseLine*>(base_ + dense)[line];
        for (size_t i = 0; i < DenseLine::kKeys; ++i) {
          if (Load(place.entries[i], std::memory_order_relaxed) != 0) {
            keys.push_back(static_cast<Key>(line * DenseLine::kKeys + i));
          }
        }
      }
    }
    if (keys.empty()) return OkStatus();
    HPS_RETURN_IF_ERROR(visit_all());
  }
}

// Writing ------------------------------------------------------------------------------------------------------------

Status MultiProcessTable::Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) {
  const EpochGuard guard;
  HPS_RETURN_IF_ERROR(state_->CheckOpen());
  HPS_RETURN_IF_ERROR(CheckStride(rows.stride_bytes));
  std::mutex mutex;
  Status status;
  ForEachPartition(
      keys, num_partitions_, *state_->executor, [this](Key key) { return PartitionOf(key); },
      [&](uint32_t partition, std::span<const uint32_t> order) {
        const Status written = Partition(partition).Upsert(order, keys, rows, options.only_absent);
        if (written.ok()) return;
        const std::lock_guard lock(mutex);
        status = written;
      });
  return status.WithContext("multi_process_hash_map: table '" + spec_.name + "'");
}

Status MultiProcessTable::Erase(std::span<const Key> keys, uint64_t* erased) {
  const EpochGuard guard;
  HPS_RETURN_IF_ERROR(state_->CheckOpen());
  std::atomic<uint64_t> total{0};
  ForEachPartition(
      keys, num_partitions_, *state_->executor, [this](Key key) { return PartitionOf(key); },
      [&](uint32_t partition, std::span<const uint32_t> order) {
        total.fetch_add(Partition(partition).Erase(order, keys), std::memory_order_relaxed);
      });
  if (erased != nullptr) *erased = total;
  return OkStatus();
}

Result<TableStats> MultiProcessTable::Stats() const {
  const EpochGuard guard;
  HPS_RETURN_IF_ERROR(state_->CheckOpen());
  TableStats stats;
  for (uint32_t p = 0; p < num_partitions_; ++p) {
    stats.rows += table_->partitions()[p].rows.load(std::memory_order_relaxed);
    stats.evicted_rows += table_->partitions()[p].evicted_rows.load(std::memory_order_relaxed);
  }
  const auto lock = state_->heap->Lock();
  ForEachBlock(offset_, *table_, [&](uint64_t, uint64_t bytes) { stats.memory_bytes += UnitsFor(bytes) * kUnitBytes; });
  return stats;
}

Status MultiProcessTable::Check() {
  const EpochGuard guard;
  HPS_RETURN_IF_ERROR(state_->CheckOpen());
  for (uint32_t p = 0; p < num_partitions_; ++p) HPS_RETURN_IF_ERROR(Partition(p).Check());
  return OkStatus();
}

}  // namespace hps
