// Invariants, at every instant, whoever died
// - The published index and the dense lines name exactly the rows there are; each slot they name holds its whole row.
// - A slot that they name is below next_slot and lies in a linked region.
// With the mutex free besides
// - Each slot below next_slot is named by one entry or is in the list of free slots; rows, claimed and free_slots count
//   what they say; no index is in the making.
// - The marks of a line were changed after the last change of one of its entries and before the slot that left it was
//   written to. Whoever has read a word of the slot's new contents, and then reads the marks, finds them changed (the
//   fence before the first store to a slot, and the reader's before its second look at the marks).
// Lock order: the partition's mutex, then the heap's.

#include "cc/storage/multi_process_partition.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cc/storage/row_copy.h"

// Thread sanitizer does not model fences; all words that meet here are atomic.
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wtsan"

namespace hps {
namespace {

uint32_t Load(const uint32_t& place) {
  return std::atomic_ref(const_cast<uint32_t&>(place)).load(std::memory_order_relaxed);
}

}  // namespace

HashBuckets MultiProcessPartition::Index() const {
  const uint64_t published = shared_.published.load(std::memory_order_relaxed);
  if (published == 0) return {};
  const SharedIndex& index = shared_.index[published % 2];
  return {heap_.At<HashBuckets::Bucket>(index.offset.load(std::memory_order_relaxed)),
          index.num_buckets.load(std::memory_order_relaxed)};
}

const void* MultiProcessPartition::Line(Key key) const {
  if (!Covers(key)) {
    const HashBuckets index = Index();
    return index.num_buckets() == 0 ? nullptr : index.Home(PlaceOf(key, table_.num_partitions).fraction);
  }
  const uint64_t dense = table_.dense.load(std::memory_order_relaxed);
  return dense == 0 ? nullptr : heap_.At<DenseLine>(dense) + static_cast<uint64_t>(key) / DenseLine::kKeys;
}

// Calls body(i) for each i in order until it returns false, with the key's line and prefetch(i) asked for before.
template <typename Prefetch, typename Body>
void MultiProcessPartition::ForEachPrefetched(std::span<const uint32_t> order, std::span<const Key> keys,
                                              Prefetch prefetch, Body body) {
  constexpr size_t kAhead = 16;
  for (size_t step = 0; step < order.size() + kAhead; ++step) {
    if (step < order.size()) {
      __builtin_prefetch(Line(keys[order[step]]), 1);
      prefetch(order[step]);
    }
    if (step >= kAhead && !body(step - kAhead)) return;
  }
}

template <typename Visit>
void MultiProcessPartition::ForEachPlace(Visit visit) const {
  const HashBuckets index = Index();
  for (uint64_t i = 0; i < index.num_buckets(); ++i) {
    HashBuckets::Bucket* bucket = index.bucket(i);
    for (size_t way = 0; way < HashBuckets::kWays; ++way) {
      const uint32_t entry = Load(bucket->entries[way]);
      if (entry == HashBuckets::kUnclaimed) continue;
      Place place;
      place.way = {bucket, way, entry};
      place.entry = place.way.row_entry();
      visit(place, std::atomic_ref(bucket->keys[way]).load(std::memory_order_relaxed));
    }
  }
  const uint64_t dense = table_.dense.load(std::memory_order_relaxed);
  if (dense == 0) return;
  const uint64_t lines = DenseLine::LinesFor(table_.expected_rows);
  const uint64_t block_lines = table_.dense_block_lines;
  const uint64_t stride = block_lines * table_.num_partitions;
  for (uint64_t block = block_lines * number_; block < lines; block += stride) {
    for (uint64_t i = block; i < std::min(block + block_lines, lines); ++i) {
      DenseLine* line = heap_.At<DenseLine>(dense) + i;
      for (size_t number = 0; number < DenseLine::kKeys; ++number) {
        const uint32_t entry = Load(line->entries[number]);
        if (entry == 0) continue;
        Place place;
        place.line = line;
        place.number = number;
        place.entry = entry;
        visit(place, static_cast<Key>(i * DenseLine::kKeys + number));
      }
    }
  }
}

// Writing ------------------------------------------------------------------------------------------------------------

Status MultiProcessPartition::Upsert(std::span<const uint32_t> order, std::span<const Key> keys, ConstRowBuffer rows,
                                     bool only_absent) {
  const auto lock = Lock();
  const auto row = [&](uint32_t i) { return rows.data + i * rows.stride_bytes; };
  shared_.clock.store(shared_.clock.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  Status status;
  ForEachPrefetched(
      order, keys, [&](uint32_t i) { PrefetchRow(row(i), table_.row_bytes); },
      [&](size_t at) {
        const Key key = keys[order[at]];
        if (shared_.rows.load(std::memory_order_relaxed) >= overflow_.margin) {
          Place place;
          (void)Find(key, /*reserve=*/false, &place);  // without a reservation nothing can fail
          if (place.entry == 0) MakeRoom(order, keys);
        }
        status = UpsertOne(key, row(order[at]), only_absent);
        return status.ok();
      });
  return status;
}

Status MultiProcessPartition::Find(Key key, bool reserve, Place* place) {
  if (Covers(key)) {
    if (reserve && table_.dense.load(std::memory_order_relaxed) == 0) HPS_RETURN_IF_ERROR(MakeDenseIndex());
    const uint64_t dense = table_.dense.load(std::memory_order_relaxed);
    if (dense == 0) return OkStatus();
    place->line = heap_.At<DenseLine>(dense) + static_cast<uint64_t>(key) / DenseLine::kKeys;
    place->number = static_cast<uint64_t>(key) % DenseLine::kKeys;
    place->entry = Load(place->line->entries[place->number]);
    return OkStatus();
  }
  const uint64_t fraction = PlaceOf(key, table_.num_partitions).fraction;
  const HashBuckets index = Index();
  const bool full = shared_.claimed >= HashBuckets::ClaimLimit(index.num_buckets());
  if (reserve && !full) {
    place->way = index.FindOrReserve(key, index.Home(fraction));
  } else if (index.num_buckets() != 0) {
    place->way = index.FindForWrite(key, index.Home(fraction));
  }
  if (reserve && place->way.bucket == nullptr) {  // keys that have a way need no room, and may get none
    HPS_RETURN_IF_ERROR(ReplaceIndex());
    const HashBuckets larger = Index();
    place->way = larger.FindOrReserve(key, larger.Home(fraction));
  }
  place->entry = place->way.row_entry();
  return OkStatus();
}

Status MultiProcessPartition::UpsertOne(Key key, const std::byte* row, bool only_absent) {
  Place place;
  HPS_RETURN_IF_ERROR(Find(key, /*reserve=*/true, &place));
  if (place.entry != 0 && only_absent) return OkStatus();
  uint32_t slot;
  HPS_RETURN_IF_ERROR(TakeSlot(&slot));
  WriteRow(Row(slot), row);
  if (table_.meta_bytes != 0) {
    uint32_t meta = shared_.clock.load(std::memory_order_relaxed);
    if (overflow_.policy == OverflowPolicy::kEvictLeastUsed) {
      meta = place.entry == 0 ? 1 : LoadWord<uint32_t>(Meta(place.entry - 1)) + 1;
    }
    StoreWord(Meta(slot), meta);
  }
  if (place.line != nullptr) {
    std::atomic_ref(place.line->entries[place.number]).store(slot + 1, std::memory_order_release);
  } else {
    if (place.way.entry == HashBuckets::kUnclaimed) ++shared_.claimed;
    HashBuckets::SetRow(place.way, key, slot);
  }
  if (place.entry != 0) {
    std::atomic_ref(*place.marks()).store(Load(*place.marks()) + kVersionStep, std::memory_order_release);
    FreeSlot(place.entry - 1);
  } else {
    shared_.rows.store(shared_.rows.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }
  return OkStatus();
}

uint64_t MultiProcessPartition::Erase(std::span<const uint32_t> order, std::span<const Key> keys) {
  const auto lock = Lock();
  uint64_t erased = 0;
  ForEachPrefetched(
      order, keys, [](uint32_t) {},
      [&](size_t at) {
        erased += EraseOne(keys[order[at]]);
        return true;
      });
  return erased;
}

bool MultiProcessPartition::EraseOne(Key key) {
  Place place;
  (void)Find(key, /*reserve=*/false, &place);  // without a reservation nothing can fail
  if (place.entry == 0) return false;
  Remove(place);
  return true;
}

void MultiProcessPartition::Remove(const Place& place) {
  if (place.line != nullptr) {
    std::atomic_ref(place.line->entries[place.number]).store(0, std::memory_order_release);
  } else {
    HashBuckets::Erase(place.way);
  }
  std::atomic_ref(*place.marks()).store(Load(*place.marks()) + kVersionStep, std::memory_order_release);
  FreeSlot(place.entry - 1);
  shared_.rows.store(shared_.rows.load(std::memory_order_relaxed) - 1, std::memory_order_relaxed);
}

// Indexes ------------------------------------------------------------------------------------------------------------

Status MultiProcessPartition::MakeDenseIndex() {
  const auto lock = heap_.Lock();
  if (table_.dense.load(std::memory_order_relaxed) != 0) return OkStatus();  // another partition was first
  const uint64_t bytes = DenseLine::LinesFor(table_.expected_rows) * sizeof(DenseLine);
  HPS_ASSIGN_OR_RETURN(const uint64_t offset, heap_.Allocate(bytes));
  ZeroWords(heap_.At<std::byte>(offset), bytes);
  table_.dense.store(offset, std::memory_order_release);
  return OkStatus();
}

Status MultiProcessPartition::ReplaceIndex() {
  const HashBuckets old = Index();
  uint64_t wanted;
  if (old.num_buckets() == 0) {
    // All rows so far are dense. Where most are, the others are few.
    wanted = shared_.rows.load(std::memory_order_relaxed) > table_.planned_rows / 16
                 ? std::min<uint64_t>(table_.planned_rows, 64)
                 : table_.planned_rows;
  } else {
    // Room for half as many rows again; erased keys are left behind, so a table that shrank gets a smaller array.
    uint64_t rows = 0;
    old.ForEach([&](Key, uint32_t) { ++rows; });
    wanted = rows + rows / 2 + 8;
  }
  const uint64_t num_buckets = HashBuckets::BucketsFor(wanted);
  const uint64_t bytes = num_buckets * sizeof(HashBuckets::Bucket);
  {
    const auto lock = heap_.Lock();
    HPS_ASSIGN_OR_RETURN(const uint64_t offset, heap_.Allocate(bytes));
    shared_.next.num_buckets.store(num_buckets, std::memory_order_relaxed);
    shared_.next.offset.store(offset, std::memory_order_release);
  }
  const uint64_t offset = shared_.next.offset.load(std::memory_order_relaxed);
  ZeroWords(heap_.At<std::byte>(offset), bytes);
  const HashBuckets next(heap_.At<HashBuckets::Bucket>(offset), num_buckets);
  uint64_t claimed = 0;
  // Keys keep their order from array to array (both map the same fraction), so both are walked from front to back.
  old.ForEach([&](Key key, uint32_t slot) {
    HashBuckets::SetRow(next.FindOrReserve(key, next.Home(PlaceOf(key, table_.num_partitions).fraction)), key, slot);
    ++claimed;
  });
  const auto lock = heap_.Lock();
  const uint64_t published = shared_.published.load(std::memory_order_relaxed);
  SharedIndex& place = shared_.index[(published + 1) % 2];
  place.offset.store(offset, std::memory_order_relaxed);
  place.num_buckets.store(num_buckets, std::memory_order_relaxed);
  shared_.published.store(published + 1, std::memory_order_release);
  shared_.claimed = claimed;
  shared_.next.offset.store(0, std::memory_order_release);
  if (published != 0) {
    const SharedIndex& freed = shared_.index[published % 2];
    heap_.Free(freed.offset, freed.num_buckets * sizeof(HashBuckets::Bucket));
  }
  return OkStatus();
}

// Slots --------------------------------------------------------------------------------------------------------------

Status MultiProcessPartition::AllocateFirstRegion(SharedHeap& heap, SharedTable& table, uint32_t number) {
  HPS_ASSIGN_OR_RETURN(const uint64_t offset, heap.Allocate(table.RegionBytes(0)));
  table.partitions()[number].regions[0].store(static_cast<uint32_t>(offset / kUnitBytes), std::memory_order_release);
  return OkStatus();
}

Status MultiProcessPartition::TakeSlot(uint32_t* slot) {
  if (shared_.first_free != 0) {
    *slot = shared_.first_free - 1;
    shared_.first_free = LoadWord<uint32_t>(Row(*slot));
    --shared_.free_slots;
    return OkStatus();
  }
  if (shared_.next_slot == table_.first_slots) {
    shared_.next_slot = std::max(table_.first_slots, uint64_t{1} << table_.first_bits);
  }
  if (shared_.next_slot >= SharedPartition::kMaxSlots) {
    return ResourceExhausted("a partition of the table holds all the rows that one can have; raise num_partitions");
  }
  const auto next = static_cast<uint32_t>(shared_.next_slot);
  const SlotPlace place = PlaceOfSlot(base_, table_, shared_, next);
  if (place.row == nullptr) {
    const auto lock = heap_.Lock();
    HPS_ASSIGN_OR_RETURN(const uint64_t offset, heap_.Allocate(table_.RegionBytes(place.region)));
    shared_.regions[place.region].store(static_cast<uint32_t>(offset / kUnitBytes), std::memory_order_release);
  }
  shared_.next_slot = next + 1;
  *slot = next;
  return OkStatus();
}

// The first store to a slot comes after everything that made it unreachable.
void MultiProcessPartition::FreeSlot(uint32_t slot) {
  std::atomic_thread_fence(std::memory_order_release);
  StoreWord(Row(slot), shared_.first_free);
  shared_.first_free = slot + 1;
  ++shared_.free_slots;
}

void MultiProcessPartition::WriteRow(std::byte* to, const std::byte* row) {
  std::atomic_thread_fence(std::memory_order_release);
  if (table_.slot_bytes % sizeof(uint64_t) == 0) {
    StoreSharedRow<uint64_t>(to, row, table_.row_bytes);
  } else {
    StoreSharedRow<uint32_t>(to, row, table_.row_bytes);
  }
}

template <typename Visit>
void MultiProcessPartition::ForEachUsedSlotNumber(Visit visit) const {
  for (size_t region = 0; region < SharedPartition::kMaxRegions; ++region) {
    if (shared_.regions[region].load(std::memory_order_relaxed) == 0) continue;
    const uint64_t first = table_.RegionFirst(region);
    const uint64_t last = std::min(first + table_.RegionSlots(region), shared_.next_slot);
    for (uint64_t slot = first; slot < last; ++slot) visit(static_cast<uint32_t>(slot));
  }
}

void MultiProcessPartition::Repair() {
  if (shared_.next.offset != 0) {
    const auto lock = heap_.Lock();
    const uint64_t published = shared_.published;
    const bool in_use = published != 0 && shared_.index[published % 2].offset == shared_.next.offset;
    if (!in_use) heap_.Free(shared_.next.offset, shared_.next.num_buckets * sizeof(HashBuckets::Bucket));
    shared_.next.offset.store(0, std::memory_order_release);
  }
  uint64_t rows = 0;
  uint64_t claimed = 0;
  std::vector<bool> in_use(shared_.next_slot, false);
  ForEachPlace([&](const Place& place, Key) {
    claimed += place.line == nullptr;
    if (place.entry == 0) return;
    ++rows;
    in_use[place.entry - 1] = true;
  });
  shared_.rows.store(rows, std::memory_order_relaxed);
  shared_.claimed = claimed;
  shared_.first_free = 0;
  shared_.free_slots = 0;
  ForEachUsedSlotNumber([&](uint32_t slot) {
    if (!in_use[slot]) FreeSlot(slot);
  });
}

Status MultiProcessPartition::Check() {
  const auto lock = Lock();
  const auto wrong = [&](const std::string& what) {
    return Internal("partition " + std::to_string(number_) + " of table '" + std::string(table_.name()) + "': " + what);
  };
  Status status;
  uint64_t rows = 0;
  uint64_t claimed = 0;
  std::vector<bool> seen(shared_.next_slot, false);
  const auto see = [&](uint64_t slot, const char* what) {
    if (slot >= seen.size() || seen[slot] || Row(static_cast<uint32_t>(slot)) == nullptr) {
      status = wrong(std::string(what) + " slot " + std::to_string(slot) + " has two owners or does not exist");
      return false;
    }
    seen[slot] = true;
    return true;
  };
  ForEachPlace([&](const Place& place, Key key) {
    claimed += place.line == nullptr;
    if (place.entry == 0) return;
    ++rows;
    (void)see(place.entry - 1, "row in");
    Place found;
    (void)Find(key, /*reserve=*/false, &found);
    if (found.entry != place.entry) status = wrong("key " + std::to_string(key) + " is not found where it is");
  });
  uint64_t free_slots = 0;
  for (uint32_t entry = shared_.first_free; entry != 0 && see(entry - 1, "free");) {
    ++free_slots;
    entry = LoadWord<uint32_t>(Row(entry - 1));
  }
  ForEachUsedSlotNumber([&](uint32_t slot) {
    if (!seen[slot]) status = wrong("slot " + std::to_string(slot) + " is lost");
  });
  if (rows != shared_.rows || claimed != shared_.claimed || free_slots != shared_.free_slots) {
    status = wrong(std::to_string(rows) + " rows, " + std::to_string(claimed) + " ways and " +
                   std::to_string(free_slots) + " free slots are there and counted otherwise");
  }
  if (shared_.next.offset != 0) status = wrong("an index in the making was left behind");
  return status;
}

// Eviction -----------------------------------------------------------------------------------------------------------

// Leaves room for the row that comes: with it the partition has the target's rows.
void MultiProcessPartition::MakeRoom(std::span<const uint32_t> order, std::span<const Key> keys) {
  std::vector<Key> spared;
  spared.reserve(order.size());
  for (const uint32_t i : order) spared.push_back(keys[i]);
  std::sort(spared.begin(), spared.end());

  struct Candidate {
    bool spared;     // of the upsert that is running: the last to leave
    uint64_t worth;  // the smallest leave first
    Place place;
  };
  std::vector<Candidate> candidates;
  candidates.reserve(shared_.rows);
  const uint32_t clock = shared_.clock.load(std::memory_order_relaxed);
  std::minstd_rand random(clock * 2654435761u + number_);
  ForEachPlace([&](const Place& place, Key key) {
    if (place.entry == 0) return;
    uint64_t worth = random();
    if (table_.meta_bytes != 0) {
      worth = LoadWord<uint32_t>(Meta(place.entry - 1));
      // Times are told by how long ago they were, so that the clock may wrap.
      if (overflow_.policy == OverflowPolicy::kEvictOldest)
        worth = static_cast<uint32_t>(static_cast<uint32_t>(worth) - clock - 1);
    }
    candidates.push_back({std::binary_search(spared.begin(), spared.end(), key), worth, place});
  });
  const uint64_t stay = std::min(overflow_.target_rows(), overflow_.margin) - 1;
  const uint64_t leave = candidates.size() - std::min<uint64_t>(candidates.size(), stay);
  std::nth_element(candidates.begin(), candidates.begin() + static_cast<ptrdiff_t>(leave), candidates.end(),
                   [](const Candidate& left, const Candidate& right) {
                     return left.spared != right.spared ? right.spared : left.worth < right.worth;
                   });
  for (uint64_t i = 0; i < leave; ++i) Remove(candidates[i].place);
  shared_.evicted_rows.store(shared_.evicted_rows.load(std::memory_order_relaxed) + leave, std::memory_order_relaxed);
  if (overflow_.policy != OverflowPolicy::kEvictLeastUsed) return;
  for (uint64_t i = leave; i < candidates.size(); ++i) {
    std::byte* meta = Meta(candidates[i].place.entry - 1);
    StoreWord(meta, LoadWord<uint32_t>(meta) / 2);
  }
}

}  // namespace hps
