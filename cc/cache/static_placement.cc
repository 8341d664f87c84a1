// Invariant: the bits StateHolds say which ways hold a key; ways without one hold the bucket's filler.

#include "cc/cache/static_placement.h"

#include <algorithm>
#include <bit>

namespace hps {
namespace {

using cuda::kCacheWays;

// Buckets that one search looks at. A key finds room within a few dozen at a load of 0.95; so many only where its
// neighbourhood is full.
constexpr size_t kMostSteps = 20'000;

uint64_t HoldsOf(uint64_t state) { return (state >> 14) & 0x7F; }

}  // namespace

uint64_t StaticPlacement::BucketsFor(uint64_t rows) {
  const auto buckets = static_cast<uint64_t>(static_cast<double>(rows) / (kCacheWays * kLoad)) + 1;
  return std::max(buckets, cuda::kMinBuckets);
}

StaticPlacement::StaticPlacement(std::string name, uint64_t num_buckets)
    : name_(std::move(name)), buckets_(std::max(num_buckets, cuda::kMinBuckets)) {
  for (uint64_t b = 0; b < buckets_.size(); ++b) {
    std::fill_n(buckets_[b].keys, kCacheWays, cuda::FillerOf(b, buckets_.size()));
    buckets_[b].state = 0;
  }
}

int StaticPlacement::FreeWay(uint64_t bucket) const {
  const int way = std::countr_one(static_cast<uint8_t>(HoldsOf(buckets_[bucket].state)));
  return way < kCacheWays ? way : -1;
}

bool StaticPlacement::Holds(uint64_t bucket, Key key) const {
  const auto& keys = buckets_[bucket].keys;
  return std::find(keys, keys + kCacheWays, key) != keys + kCacheWays;
}

void StaticPlacement::Put(uint64_t bucket, int way, Key key) {
  buckets_[bucket].keys[way] = key;
  buckets_[bucket].state |= cuda::StateHolds(way);
}

uint64_t StaticPlacement::OtherBucket(Key key, uint64_t bucket) const {
  const uint64_t hash = cuda::CacheHash(key);
  const uint64_t first = cuda::FirstBucket(hash, buckets_.size());
  return first == bucket ? cuda::SecondBucket(hash, buckets_.size()) : first;
}

// Looks, nearest first, for a chain of keys each of which can move to its other bucket, the last one into a free way,
// and moves them. Breadth-first: chains stay short, and a full neighbourhood is known as such.
bool StaticPlacement::MakeRoom(uint64_t first, uint64_t second, Key key) {
  steps_.clear();
  steps_.push_back({first, -1, 0});
  if (second != first) steps_.push_back({second, -1, 0});
  for (size_t i = 0; i < steps_.size(); ++i) {
    const uint64_t bucket = steps_[i].bucket;
    if (const int free = FreeWay(bucket); free >= 0) {
      // Backwards along the chain: each key moves into the way that its successor has left.
      uint64_t to = bucket;
      int way = free;
      for (int64_t step = static_cast<int64_t>(i); steps_[step].from >= 0; step = steps_[step].from) {
        const uint64_t from = steps_[steps_[step].from].bucket;
        Put(to, way, buckets_[from].keys[steps_[step].way]);
        to = from;
        way = steps_[step].way;
      }
      Put(to, way, key);
      return true;
    }
    for (int way = 0; way < kCacheWays && steps_.size() < kMostSteps; ++way) {
      const uint64_t other = OtherBucket(buckets_[bucket].keys[way], bucket);
      if (other == first || other == second) continue;
      // No bucket twice in one chain: its keys would be moved twice.
      bool in_chain = false;
      for (int64_t step = static_cast<int64_t>(i); step >= 0 && !in_chain; step = steps_[step].from) {
        in_chain = steps_[step].bucket == other;
      }
      if (in_chain) continue;
      steps_.push_back({other, static_cast<int64_t>(i), way});
    }
  }
  return false;
}

std::optional<uint64_t> StaticPlacement::SlotOf(Key key) const {
  const uint64_t hash = cuda::CacheHash(key);
  for (const uint64_t bucket : {cuda::FirstBucket(hash, buckets_.size()), cuda::SecondBucket(hash, buckets_.size())}) {
    const auto& keys = buckets_[bucket].keys;
    const auto* const found = std::find(keys, keys + kCacheWays, key);
    // The filler of free ways belongs elsewhere, so it is never the key.
    if (found != keys + kCacheWays) return bucket * kCacheWays + static_cast<uint64_t>(found - keys);
  }
  return std::nullopt;
}

std::optional<Key> StaticPlacement::KeyAt(uint64_t slot) const {
  const cuda::CacheBucket& bucket = buckets_[slot / kCacheWays];
  if (((HoldsOf(bucket.state) >> (slot % kCacheWays)) & 1) == 0) return std::nullopt;
  return bucket.keys[slot % kCacheWays];
}

Status StaticPlacement::NoPlace(Key key) const {
  return ResourceExhausted(
      name_ + ": key " + std::to_string(key) + " finds no place after " + std::to_string(rows_) + " of at most " +
      std::to_string(buckets_.size() * kCacheWays) +
      " rows: its two buckets and all that their keys could move to are "
      "full. Give the cache more room (its load should be at most 0.95), or use \"embedding_cache_type\": \"dynamic\"");
}

Status StaticPlacement::Add(std::span<const Key> keys) {
  for (const Key key : keys) {
    const uint64_t hash = cuda::CacheHash(key);
    const uint64_t first = cuda::FirstBucket(hash, buckets_.size());
    const uint64_t second = cuda::SecondBucket(hash, buckets_.size());
    if (Holds(first, key) || Holds(second, key)) continue;
    if (const int way = FreeWay(first); way >= 0) {
      Put(first, way, key);
    } else if (const int other = FreeWay(second); other >= 0) {
      Put(second, other, key);
    } else if (!MakeRoom(first, second, key)) {
      return NoPlace(key);
    }
    ++rows_;
  }
  return OkStatus();
}

const std::vector<cuda::CacheBucket>& StaticPlacement::Finish() {
  rows_in_second_ = 0;
  for (uint64_t b = 0; b < buckets_.size(); ++b) {
    for (int way = 0; way < kCacheWays; ++way) {
      if (!(buckets_[b].state & cuda::StateHolds(way))) continue;
      const uint64_t first = cuda::FirstBucket(cuda::CacheHash(buckets_[b].keys[way]), buckets_.size());
      if (first == b) continue;
      buckets_[first].state |= cuda::kStateOverflowed;
      ++rows_in_second_;
    }
  }
  return buckets_;
}

}  // namespace hps
