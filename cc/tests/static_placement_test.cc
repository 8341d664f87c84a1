// Placing whole tables: high loads, adversarial keys, and refusals.

#include "cc/cache/static_placement.h"

#include <gtest/gtest.h>

#include <iostream>
#include <limits>
#include <random>
#include <set>

#include "cc/tests/core_fixture.h"

namespace hps::testing {
namespace {

using cuda::CacheBucket;
using cuda::kCacheWays;

// Finds a key as a query does: in its first bucket and, only if that has overflowed, in the second.
bool QueryFinds(const std::vector<CacheBucket>& buckets, Key key) {
  const uint64_t hash = cuda::CacheHash(key);
  const auto holds = [&](const CacheBucket& bucket) {
    for (int way = 0; way < kCacheWays; ++way) {
      if (bucket.keys[way] == key) return (bucket.state & cuda::StateHolds(way)) != 0;
    }
    return false;
  };
  const CacheBucket& first = buckets[cuda::FirstBucket(hash, buckets.size())];
  if (holds(first)) return true;
  return (first.state & cuda::kStateOverflowed) != 0 && holds(buckets[cuda::SecondBucket(hash, buckets.size())]);
}

void ExpectPlaced(const std::vector<Key>& keys, uint64_t num_buckets) {
  StaticPlacement placement("table 't'", num_buckets);
  ASSERT_OK(placement.Add(keys));
  EXPECT_EQ(placement.rows(), keys.size());
  const std::vector<CacheBucket>& buckets = placement.Finish();
  ASSERT_EQ(buckets.size(), num_buckets);
  for (const Key key : keys) {
    ASSERT_TRUE(QueryFinds(buckets, key)) << key;
    ASSERT_TRUE(placement.Contains(key));
  }
  uint64_t held = 0;
  for (uint64_t b = 0; b < buckets.size(); ++b) {
    std::set<Key> seen;
    for (int way = 0; way < kCacheWays; ++way) {
      const Key key = buckets[b].keys[way];
      if (buckets[b].state & cuda::StateHolds(way)) {
        ++held;
        ASSERT_TRUE(seen.insert(key).second) << "key " << key << " twice";
      } else {
        ASSERT_EQ(key, cuda::FillerOf(b, buckets.size()));
      }
    }
  }
  EXPECT_EQ(held, keys.size());
}

std::vector<Key> Random(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Key> keys(count);
  for (Key& key : keys) key = static_cast<Key>(random());
  return keys;
}

class Load : public ::testing::TestWithParam<double> {};

TEST_P(Load, EveryKeyIsPlaced) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr size_t kKeys = 50'000;
#else
  constexpr size_t kKeys = 1'000'000;
#endif
  const auto buckets = static_cast<uint64_t>(static_cast<double>(kKeys) / (kCacheWays * GetParam())) + 1;
  ASSERT_NO_FATAL_FAILURE(ExpectPlaced(Random(kKeys, 1), buckets));
  ASSERT_NO_FATAL_FAILURE(ExpectPlaced(KeyRange(-static_cast<Key>(kKeys) / 2, kKeys), buckets));
}
INSTANTIATE_TEST_SUITE_P(All, Load, ::testing::Values(0.5, 0.9, 0.95, 0.97));

TEST(StaticPlacement, PlannedBucketsHoldAnyNumberOfRows) {
  for (const size_t count : {0, 1, 7, 100, 106, 107, 1000, 10'000}) {
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      ASSERT_NO_FATAL_FAILURE(ExpectPlaced(Random(count, seed), StaticPlacement::BucketsFor(count))) << count;
    }
  }
}

TEST(StaticPlacement, ExtremeAndRepeatedKeys) {
  std::vector<Key> keys = {0, -1, 1, std::numeric_limits<Key>::min(), std::numeric_limits<Key>::max()};
  ASSERT_NO_FATAL_FAILURE(ExpectPlaced(keys, 16));
  StaticPlacement placement("table 't'", 16);
  ASSERT_OK(placement.Add(keys));
  ASSERT_OK(placement.Add(keys));
  EXPECT_EQ(placement.rows(), keys.size());
}

// Keys chosen so that a tenth of all have one of a few first buckets.
TEST(StaticPlacement, ManyKeysOfOneFirstBucket) {
  constexpr uint64_t kBuckets = 2000;
  std::vector<Key> keys = Random(9000, 3);
  std::mt19937_64 random(4);
  while (keys.size() < 10'000) {
    const Key key = static_cast<Key>(random());
    if (cuda::FirstBucket(cuda::CacheHash(key), kBuckets) < 10) keys.push_back(key);
  }
  ASSERT_NO_FATAL_FAILURE(ExpectPlaced(keys, kBuckets));
}

// More keys with the same two buckets than those hold: nobody could place them.
TEST(StaticPlacement, SaysClearlyWhatDoesNotFit) {
  constexpr uint64_t kBuckets = 16;
  std::vector<Key> keys;
  for (Key key = 0; keys.size() < 15; ++key) {
    const uint64_t hash = cuda::CacheHash(key);
    if (cuda::FirstBucket(hash, kBuckets) == 3 && cuda::SecondBucket(hash, kBuckets) == 5) keys.push_back(key);
  }
  StaticPlacement placement("model 'm', table 't'", kBuckets);
  ExpectError(placement.Add(keys), StatusCode::kResourceExhausted,
              {"model 'm'", std::to_string(keys.back()), "after 14 of at most 112 rows", "dynamic"});
  EXPECT_EQ(placement.rows(), 14u);
  StaticPlacement full("t", 100);
  ExpectError(full.Add(Random(701, 5)), StatusCode::kResourceExhausted, {"of at most 700 rows"});
  EXPECT_GT(full.load(), 0.97);
}

}  // namespace
}  // namespace hps::testing
