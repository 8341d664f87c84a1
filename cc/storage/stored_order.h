// The order in which a stored table keeps its keys: little-endian bytes compared from the first. It is the same for
// keys stored in 4 bytes, which fit in an int32.

#ifndef HPS_STORAGE_STORED_ORDER_H_
#define HPS_STORAGE_STORED_ORDER_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "hps/table_store.h"

namespace hps {

// Keys in stored order are in ascending order of this, and the other way round.
inline uint64_t StoredOrder(Key key) { return __builtin_bswap64(static_cast<uint64_t>(key)); }
inline Key KeyAtStoredOrder(uint64_t order) { return static_cast<Key>(__builtin_bswap64(order)); }

// A key, and where its row is or shall go.
struct KeyIndex {
  Key key;
  uint64_t index;
};

// Sorts into stored order; equal keys stay in the order in which they are. Radix sort by bytes, which skips bytes that
// are the same in all keys. Uses `other`, of the same size, and returns the one of the two in which the result lies.
inline std::span<KeyIndex> SortStored(std::span<KeyIndex> keys, std::span<KeyIndex> other) {
  constexpr size_t kFewKeys = 512;
  if (keys.size() < kFewKeys) {
    std::stable_sort(keys.begin(), keys.end(),
                     [](const KeyIndex& a, const KeyIndex& b) { return StoredOrder(a.key) < StoredOrder(b.key); });
    return keys;
  }
  // The last byte of the stored key first.
  const auto digit = [](const KeyIndex& key, size_t pass) {
    return static_cast<uint64_t>(key.key) >> (8 * (7 - pass)) & 255;
  };
  std::array<std::array<size_t, 256>, 8> histograms{};
  for (const KeyIndex& key : keys) {
    for (size_t pass = 0; pass < 8; ++pass) ++histograms[pass][digit(key, pass)];
  }
  for (size_t pass = 0; pass < 8; ++pass) {
    std::array<size_t, 256>& starts = histograms[pass];
    if (starts[digit(keys[0], pass)] == keys.size()) continue;
    size_t start = 0;
    for (size_t& value : starts) start += std::exchange(value, start);
    for (const KeyIndex& key : keys) other[starts[digit(key, pass)]++] = key;
    std::swap(keys, other);
  }
  return keys;
}

inline void SortStored(std::vector<KeyIndex>* keys) {
  std::vector<KeyIndex> other(keys->size());
  if (SortStored(*keys, other).data() != keys->data()) keys->swap(other);
}

}  // namespace hps

#endif  // HPS_STORAGE_STORED_ORDER_H_
