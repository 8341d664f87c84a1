// Invariants
// - A way is claimed once: its key is stored (relaxed), then its entry (release), and the key never changes again in
//   this array. Erasing keeps the key; only the same key may come back to the way.
// - Ways of a bucket are claimed in order, and a full bucket stays full. So a key lies in the first bucket, counted
// from
//   its home, that had room when it came, and every bucket it passed is marked as overflowed.

#include "cc/storage/hash_map_index.h"

#include <algorithm>

namespace hps {
namespace {

HashMapIndex::Bucket no_rows{};  // never written

}  // namespace

uint64_t HashMapIndex::BucketsFor(uint64_t rows) { return std::max<uint64_t>((rows + 3) / 4, 2); }

HashMapIndex::HashMapIndex() : buckets_(&no_rows), num_buckets_(1) {}

Result<std::vector<std::shared_ptr<HashMapIndex>>> HashMapIndex::Create(uint64_t num_buckets, size_t count) {
  const size_t bytes = num_buckets * sizeof(Bucket) * count;
  HPS_ASSIGN_OR_RETURN(AnonymousMemory block,
                       AnonymousMemory::Allocate(bytes, bytes >= AnonymousMemory::kHugePageBytes));
  const auto memory = std::make_shared<const AnonymousMemory>(std::move(block));
  auto* buckets = reinterpret_cast<Bucket*>(memory->data());
  std::vector<std::shared_ptr<HashMapIndex>> arrays;
  for (size_t i = 0; i < count; ++i) {
    arrays.push_back(std::make_shared<HashMapIndex>(memory, buckets + i * num_buckets, num_buckets));
  }
  return arrays;
}

HashMapIndex::Way HashMapIndex::FindOrReserve(Key key, Bucket* home) {
  for (Bucket* bucket = home;; bucket = Next(bucket)) {
    for (size_t way = 0; way < kWays; ++way) {
      const uint32_t entry = Load(bucket->entries[way]);
      if (entry == kUnclaimed || Load(bucket->keys[way]) == key) return {bucket, way, entry};
    }
    if (bucket->overflowed == 0) Store(bucket->overflowed, 1u, std::memory_order_relaxed);
  }
}

HashMapIndex::Way HashMapIndex::FindForWrite(Key key, Bucket* home) const {
  Bucket* bucket = home;
  do {
    for (size_t way = 0; way < kWays; ++way) {
      const uint32_t entry = Load(bucket->entries[way]);
      if (entry == kUnclaimed) return {};
      if (Load(bucket->keys[way]) == key) return {bucket, way, entry};
    }
    if (bucket->overflowed == 0) return {};
    bucket = Next(bucket);
  } while (bucket != home);
  return {};
}

void HashMapIndex::Publish(const Way& way, Key key, uint32_t slot) {
  if (way.entry == kUnclaimed) {
    Store(way.bucket->keys[way.number], key, std::memory_order_relaxed);
    ++claimed_;
  }
  Store(way.bucket->entries[way.number], slot + 1, std::memory_order_release);
}

void HashMapIndex::Erase(const Way& way) { Store(way.bucket->entries[way.number], kErased, std::memory_order_release); }

}  // namespace hps
