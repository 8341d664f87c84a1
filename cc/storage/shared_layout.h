// What lies in the shared memory of multi_process_hash_map: offsets and numbers only, the same for every process.
//
//   SharedHeader | one bit for each unit | units of 1 KiB: tables, records, indexes, regions of rows
//
// A table is one block: SharedTable, its partitions, its name. The blocks that a table owns besides (ForEachBlock) are
// named by fields that change only under the header's mutex and by single stores, so that at any instant it can be told
// which units are in use; that is how the memory of a process that died is found again.
//
// "Atomic" fields are read by processes that hold no lock; the comments say which lock their writers hold.

#ifndef HPS_STORAGE_SHARED_LAYOUT_H_
#define HPS_STORAGE_SHARED_LAYOUT_H_

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "cc/storage/hash_buckets.h"
#include "cc/storage/overflow.h"
#include "cc/storage/robust_mutex.h"
#include "cc/storage/shared_file.h"
#include "cc/storage/shared_row.h"

namespace hps {

inline constexpr uint64_t kUnitBytes = 1024;
inline constexpr uint64_t UnitsFor(uint64_t bytes) { return (bytes + kUnitBytes - 1) / kUnitBytes; }

// What all processes on one shared memory must agree on.
struct SharedLayout {
  static constexpr uint32_t kFormat = 1;

  uint32_t format = kFormat;
  uint32_t mutex_bytes = sizeof(pthread_mutex_t);
  uint64_t bytes = 0;
  uint32_t num_partitions = 0;
  uint32_t key_bytes = 0;
  uint64_t overflow_margin = 0;  // 0: unlimited; the next three are 0, too
  uint64_t overflow_target_rows = 0;
  uint32_t overflow_policy = 0;
  uint32_t refresh_time_after_fetch = 0;

  bool operator==(const SharedLayout&) const = default;
};

struct SharedMember {
  uint32_t joined;  // counts attachments: this one's number; 0: no process is attached, or has died without leaving
  uint32_t process;
};

struct SharedHeader {
  static constexpr uint64_t kMagic = 0x31706d6873706834;  // written last: without it the rest was never finished

  std::atomic<uint64_t> magic;
  SharedLayout layout;
  uint32_t auto_remove;  // as the process that attached last has it
  uint32_t attachments;  // so many have there been; written under `mutex`

  RobustMutex mutex;  // guards all that follows and the bits
  uint64_t num_units;
  uint64_t first_unit;  // behind the bits; the units before are in use for ever
  uint64_t committed_bytes;
  uint64_t used_units;
  uint64_t search_unit;  // every unit before is in use
  uint64_t next_table_id;
  uint64_t first_table;   // offset, 0: none
  uint64_t first_record;  // offset, 0: none
  SharedMember members[SharedFile::kMaxMembers];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// One array of HashBuckets.
struct SharedIndex {
  std::atomic<uint64_t> offset;
  std::atomic<uint64_t> num_buckets;
};

// The rows of a partition lie in slots that are numbered from 0. Region 0 has SharedTable::first_slots of them; the
// numbers from there to 2^first_bits are left out. The others grow by a quarter of the next lower power of two.
struct alignas(64) SharedPartition {
  static constexpr size_t kMaxRegions = 122;
  static constexpr uint64_t kMaxSlots = 0xFFFFFFFD;  // slot + 1 and three other values fit in 32 bits

  // Atomic; written under `mutex`, and the header's mutex where blocks come and go.
  std::atomic<uint64_t> published;  // index[published % 2] is the index; 0: there is none. Counts replacements
  SharedIndex index[2];
  std::atomic<uint32_t> regions[kMaxRegions];  // unit of the region, 0: none
  std::atomic<uint64_t> rows;
  std::atomic<uint64_t> evicted_rows;  // since the table was made
  SharedIndex next;                    // an index in the making; offset 0: none

  RobustMutex mutex;            // guards what follows and the partition's contents
  uint64_t claimed;             // ways of the index
  uint64_t next_slot;           // slots from here on were never used
  uint64_t free_slots;          // their number
  uint32_t first_free;          // slot + 1, 0: none; each free slot begins with the next one
  std::atomic<uint32_t> clock;  // counts upserts: the time of OverflowPolicy::kEvictOldest
};

struct alignas(64) SharedTable {
  uint64_t next;  // offset of the next table, 0: none
  uint64_t bytes;
  uint64_t id;
  uint64_t row_bytes;
  uint64_t slot_bytes;     // row_bytes rounded up to words
  uint64_t meta_bytes;     // of a slot, behind the rows of its region: its time or count; 0: none
  uint64_t expected_rows;  // keys below this number are in the dense index
  uint64_t first_slots;
  uint64_t planned_rows;  // a partition's first index has room for so many
  uint32_t first_bits;    // >= 2
  uint32_t num_partitions;
  uint64_t dense_block_lines;  // neighbours in one partition, so that writers do not share cache lines
  uint64_t name_bytes;
  std::atomic<uint64_t> dense;                  // atomic: offset of the dense index, 0: none yet
  std::atomic<uint32_t> dropped;                // atomic
  uint64_t pins[SharedFile::kMaxMembers / 64];  // members that have it open

  SharedPartition* partitions() { return reinterpret_cast<SharedPartition*>(this + 1); }
  const SharedPartition* partitions() const { return reinterpret_cast<const SharedPartition*>(this + 1); }
  char* name() { return reinterpret_cast<char*>(partitions() + num_partitions); }
  std::string_view name() const {
    return {reinterpret_cast<const char*>(partitions() + num_partitions), static_cast<size_t>(name_bytes)};
  }

  // Slots of a region, and the number of the first of them.
  uint64_t RegionSlots(size_t region) const {
    return region == 0 ? first_slots : uint64_t{1} << (first_bits - 2 + (region - 1) / 4);
  }
  uint64_t RegionFirst(size_t region) const {
    if (region == 0) return 0;
    const uint64_t octave = uint64_t{1} << (first_bits + (region - 1) / 4);
    return octave + (region - 1) % 4 * (octave / 4);
  }
  uint64_t RegionBytes(size_t region) const { return RegionSlots(region) * (slot_bytes + meta_bytes); }
};

struct SharedRecord {
  uint64_t next;
  uint64_t bytes;
  uint64_t name_bytes;
  uint64_t value_bytes;

  char* text() { return reinterpret_cast<char*>(this + 1); }
  std::string_view name() const { return {reinterpret_cast<const char*>(this + 1), static_cast<size_t>(name_bytes)}; }
  std::string_view value() const { return {name().data() + name_bytes, static_cast<size_t>(value_bytes)}; }
};

// The dense index: a cache line for 15 keys, so that each line has a version of its own.
struct alignas(64) DenseLine {
  static constexpr uint64_t kKeys = 15;
  static constexpr uint64_t kBlockLines = 16;  // SharedTable::dense_block_lines of tables without a margin

  uint32_t entries[kKeys];  // slot + 1, 0: absent
  uint32_t marks;

  static uint64_t LinesFor(uint64_t keys) { return (keys + kKeys - 1) / kKeys; }
  static uint32_t PartitionOf(uint64_t line, uint64_t block_lines, uint32_t num_partitions) {
    // Divisions are slow, and there are two sizes of blocks.
    const uint64_t block = block_lines == kBlockLines ? line / kBlockLines : line / block_lines;
    return static_cast<uint32_t>(block % num_partitions);
  }
};
static_assert(sizeof(DenseLine) == 64);

// Fills in what does not change in the life of a table that is to hold `expected_rows`.
inline void ShapeTable(uint64_t expected_rows, uint64_t row_bytes, uint64_t name_bytes, uint32_t num_partitions,
                       const OverflowOptions& overflow, SharedTable* table) {
  // Rows to plan a partition for, so that the rows that chance sends it fit.
  const double share = static_cast<double>(expected_rows) / num_partitions;
  uint64_t held_rows = std::min(static_cast<uint64_t>(share + 5 * std::sqrt(share)) + 1, expected_rows);
  if (overflow.bounded()) held_rows = std::min(held_rows, overflow.margin);
  held_rows += 1;  // for updates
  table->bytes = sizeof(SharedTable) + num_partitions * sizeof(SharedPartition) + name_bytes;
  table->row_bytes = row_bytes;
  table->slot_bytes = row_bytes % sizeof(uint64_t) == 0 ? row_bytes : (row_bytes + 3) / 4 * 4;
  table->meta_bytes = overflow.bounded() && overflow.policy != OverflowPolicy::kEvictRandom ? sizeof(uint32_t) : 0;
  table->expected_rows = expected_rows;
  table->first_slots = std::max<uint64_t>({held_rows, kUnitBytes / (table->slot_bytes + table->meta_bytes), 1});
  table->first_bits = static_cast<uint32_t>(std::max<uint64_t>(std::bit_width(table->first_slots - 1), 2));
  // An index that is planned at a load of 0.8 takes 0.875.
  const auto mean = static_cast<uint64_t>(std::min(share, static_cast<double>(held_rows)));
  table->planned_rows = std::max(mean, held_rows * 32 / 35) + 1;
  table->num_partitions = num_partitions;
  table->dense_block_lines = overflow.bounded() ? 1 : DenseLine::kBlockLines;
  table->name_bytes = name_bytes;
}

// Buckets and dense lines count the changes of their entries in the bits of `marks` above HashBuckets::kOverflowed.
inline constexpr uint32_t kVersionStep = 2;

// Where the row of a slot lies, as an address and as the number of its region; null where there is no such slot, which
// can only be asked for by a reader that looks at memory which is used for something else by now.
struct SlotPlace {
  std::byte* row = nullptr;
  size_t region = 0;
  uint64_t number = 0;  // within the region
};
inline SlotPlace PlaceOfSlot(std::byte* base, const SharedTable& table, const SharedPartition& partition,
                             uint32_t slot) {
  SlotPlace place;
  place.number = slot;
  if (slot >> table.first_bits != 0) {
    const int top = std::bit_width(slot) - 1;
    place.region = 1 + static_cast<size_t>(top - static_cast<int>(table.first_bits)) * 4 + ((slot >> (top - 2)) & 3);
    place.number = slot & ((uint32_t{1} << (top - 2)) - 1);
  } else if (slot >= table.first_slots) {
    return {};
  }
  const uint64_t unit = partition.regions[place.region].load(std::memory_order_relaxed);
  if (unit != 0) place.row = base + unit * kUnitBytes + place.number * table.slot_bytes;
  return place;
}

// The time or count of a slot that is there. REQUIRES meta_bytes != 0.
inline std::byte* MetaOfSlot(const SharedTable& table, const SlotPlace& place) {
  return place.row - place.number * table.slot_bytes + table.RegionSlots(place.region) * table.slot_bytes +
         place.number * table.meta_bytes;
}

// Calls visit(offset, bytes) for each block of the table, its own included. REQUIRES the header's mutex.
template <typename Visit>
void ForEachBlock(uint64_t table_offset, const SharedTable& table, Visit visit) {
  visit(table_offset, table.bytes);
  if (const uint64_t dense = table.dense; dense != 0) {
    visit(dense, DenseLine::LinesFor(table.expected_rows) * sizeof(DenseLine));
  }
  for (uint32_t p = 0; p < table.num_partitions; ++p) {
    const SharedPartition& partition = table.partitions()[p];
    const uint64_t published = partition.published;
    const uint64_t current = published == 0 ? 0 : partition.index[published % 2].offset.load();
    if (current != 0) visit(current, partition.index[published % 2].num_buckets * sizeof(HashBuckets::Bucket));
    if (const uint64_t next = partition.next.offset; next != 0 && next != current) {
      visit(next, partition.next.num_buckets * sizeof(HashBuckets::Bucket));
    }
    for (size_t region = 0; region < SharedPartition::kMaxRegions; ++region) {
      const uint64_t unit = partition.regions[region];
      if (unit != 0) visit(unit * kUnitBytes, table.RegionBytes(region));
    }
  }
}

}  // namespace hps

#endif  // HPS_STORAGE_SHARED_LAYOUT_H_
