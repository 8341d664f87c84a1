// Hash functions over keys. PartitionHash is an outside format (Redis, Kafka); SlotHash is ours and may change.

#ifndef HPS_BASE_HASH_H_
#define HPS_BASE_HASH_H_

#include <cstdint>

namespace hps {

// rrxmrrxmsx_0 (Pelle Evensen, public domain), as the predecessor 4.2+ uses it: partition = hash % num_partitions.
inline uint64_t PartitionHash(uint64_t x) {
  auto ror = [](uint64_t v, int n) { return (v >> n) | (v << (64 - n)); };
  x ^= ror(x, 25) ^ ror(x, 50);
  x *= 0xA24BAED4963EE407ull;
  x ^= ror(x, 24) ^ ror(x, 49);
  x *= 0x9FB21C651E98DF25ull;
  return x ^ (x >> 28);
}

// One 64 x 64 -> 128 bit multiplication, both halves folded: all bits of the key reach all bits of the hash.
inline uint64_t SlotHash(uint64_t x) {
  __extension__ using uint128 = unsigned __int128;
  uint128 product = static_cast<uint128>(x ^ 0x9E3779B97F4A7C15ull) * 0xA0761D6478BD642Full;
  uint64_t folded = static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  return folded * 0xE7037ED1A0B428DBull;
}

// Maps a hash onto [0, n) by its high bits, without a division.
inline uint64_t MapToRange(uint64_t hash, uint64_t n) {
  __extension__ using uint128 = unsigned __int128;
  return static_cast<uint64_t>((static_cast<uint128>(hash) * n) >> 64);
}

}  // namespace hps

#endif  // HPS_BASE_HASH_H_
