// DenseIndex: from the keys 0 .. n - 1 to row slots, one number of 4 bytes each.
//
// The keys of most embedding tables are 0 .. rows - 1. For those a plain array takes a quarter of the memory of a
// hashed index and a lookup touches far fewer cache lines. A table that expects n rows has one for n keys; all other
// keys are hashed. It is address space only where no such key is written.
//
// Thread safety: Find by any thread under an EpochGuard; the others by one writer at a time for each key.

#ifndef HPS_STORAGE_DENSE_INDEX_H_
#define HPS_STORAGE_DENSE_INDEX_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#include "cc/storage/anonymous_memory.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

class DenseIndex {
 public:
  DenseIndex() = default;  // covers no key

  // Keys are dealt out to partitions in blocks of 2^block_bits neighbours, so that writers share no cache lines.
  static constexpr int kBlockBits = 8;
  // For bounded tables: one cache line, so that all partitions hold nearly the same number of rows.
  static constexpr int kSmallBlockBits = 4;

  static Result<DenseIndex> Create(uint64_t num_keys, int block_bits = kBlockBits) {
    const size_t bytes = num_keys * sizeof(uint32_t);
    DenseIndex index;
    HPS_ASSIGN_OR_RETURN(index.memory_, AnonymousMemory::Allocate(bytes, bytes >= AnonymousMemory::kHugePageBytes));
    index.num_keys_ = num_keys;
    index.block_bits_ = block_bits;
    return index;
  }

  uint64_t num_keys() const { return num_keys_; }
  uint64_t BlockOf(Key key) const { return static_cast<uint64_t>(key) >> block_bits_; }
  uint64_t num_blocks() const { return (num_keys_ + (uint64_t{1} << block_bits_) - 1) >> block_bits_; }
  uint64_t memory_bytes() const { return num_keys_ * sizeof(uint32_t); }
  bool Covers(Key key) const { return static_cast<uint64_t>(key) < num_keys_; }
  const uint32_t* Home(Key key) const { return Place(key); }  // to be prefetched

  // REQUIRES Covers(key) from here on. The slot + 1 of the key's row, 0 if the key is absent.
  uint32_t Find(Key key) const { return std::atomic_ref<uint32_t>(*Place(key)).load(std::memory_order_acquire); }
  // Puts the row of `slot` (already written) in place.
  void Publish(Key key, uint32_t slot) {
    std::atomic_ref<uint32_t>(*Place(key)).store(slot + 1, std::memory_order_release);
  }
  // Calls visit(key, slot) for every row of a block.
  template <typename Visit>
  void VisitBlock(uint64_t block, Visit visit) const {
    const uint64_t last = std::min(num_keys_, (block + 1) << block_bits_);
    for (uint64_t key = block << block_bits_; key < last; ++key) {
      if (const uint32_t entry = Find(static_cast<Key>(key)); entry != 0) visit(static_cast<Key>(key), entry - 1);
    }
  }
  void Erase(Key key) { std::atomic_ref<uint32_t>(*Place(key)).store(0, std::memory_order_release); }

 private:
  uint32_t* Place(Key key) const { return reinterpret_cast<uint32_t*>(memory_.data()) + key; }

  AnonymousMemory memory_;
  uint64_t num_keys_ = 0;
  int block_bits_ = kBlockBits;
};

}  // namespace hps

#endif  // HPS_STORAGE_DENSE_INDEX_H_
