// AnonymousMemory: zeroed memory whose address space is reserved at once and which becomes usable step by step.
//
// Physical memory is taken by the kernel page by page when it is first written. Small blocks come from the heap.
// Thread safety: none; data() never changes once the block exists.

#ifndef HPS_STORAGE_ANONYMOUS_MEMORY_H_
#define HPS_STORAGE_ANONYMOUS_MEMORY_H_

#include <cstddef>
#include <utility>

#include "hps/status.h"

namespace hps {

class AnonymousMemory {
 public:
  // Below this many bytes a block comes from the heap and is usable at once.
  static constexpr size_t kHeapBytes = 32 << 10;
  static constexpr size_t kHugePageBytes = 2 << 20;

  // A block of address space; aligned to 64 bytes, and to a huge page where `huge_pages` asks for them.
  // kResourceExhausted if there is none.
  static Result<AnonymousMemory> Reserve(size_t bytes, bool huge_pages);
  // Reserve and Commit of all of it.
  static Result<AnonymousMemory> Allocate(size_t bytes, bool huge_pages);

  AnonymousMemory() = default;
  AnonymousMemory(AnonymousMemory&& other) noexcept { *this = std::move(other); }
  AnonymousMemory& operator=(AnonymousMemory&& other) noexcept;
  ~AnonymousMemory();

  // Makes the first `bytes` bytes usable; less than before changes nothing. kResourceExhausted if the kernel refuses.
  Status Commit(size_t bytes);

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  size_t committed_bytes() const { return committed_bytes_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  size_t committed_bytes_ = 0;
  void* mapping_ = nullptr;  // null: data_ is from the heap
  size_t mapping_bytes_ = 0;
  bool huge_pages_ = false;
};

}  // namespace hps

#endif  // HPS_STORAGE_ANONYMOUS_MEMORY_H_
