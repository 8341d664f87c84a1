// Invariant: [0, committed_bytes_) is readable and writable, the rest of the mapping is neither. Uncommitted address
// space is not charged to the process, under strict accounting of memory (overcommit_memory = 2) neither.

#include "cc/storage/anonymous_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "cc/base/system_limits.h"

namespace hps {
namespace {

constexpr size_t kPageBytes = 4096;

size_t RoundUp(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

Status NoMemory(size_t bytes) {
  const int error = errno;
  return ResourceExhausted("no memory for " + std::to_string(bytes) + " bytes of table rows or index (" +
                           std::strerror(error) + ")" + LimitAdvice(ENOMEM));
}

}  // namespace

Result<AnonymousMemory> AnonymousMemory::Reserve(size_t bytes, bool huge_pages) {
  AnonymousMemory memory;
  memory.bytes_ = bytes;
  if (bytes < kHeapBytes) {
    const size_t heap_bytes = RoundUp(std::max<size_t>(bytes, 1), 64);
    memory.data_ = static_cast<std::byte*>(std::aligned_alloc(64, heap_bytes));
    if (memory.data_ == nullptr) return NoMemory(bytes);
    std::memset(memory.data_, 0, heap_bytes);
    memory.committed_bytes_ = bytes;
    return memory;
  }
  if (bytes > SIZE_MAX / 2) {
    errno = EOVERFLOW;
    return NoMemory(bytes);
  }
  memory.huge_pages_ = huge_pages;
  memory.mapping_bytes_ = RoundUp(bytes, kPageBytes) + (huge_pages ? kHugePageBytes : 0);
  void* mapping = mmap(nullptr, memory.mapping_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return NoMemory(bytes);
  memory.mapping_ = mapping;
  const auto address = reinterpret_cast<uintptr_t>(mapping);
  memory.data_ = reinterpret_cast<std::byte*>(huge_pages ? RoundUp(address, kHugePageBytes) : address);
  return memory;
}

Result<AnonymousMemory> AnonymousMemory::Allocate(size_t bytes, bool huge_pages) {
  HPS_ASSIGN_OR_RETURN(AnonymousMemory memory, Reserve(bytes, huge_pages));
  HPS_RETURN_IF_ERROR(memory.Commit(bytes));
  return memory;
}

Status AnonymousMemory::Commit(size_t bytes) {
  if (bytes <= committed_bytes_) return OkStatus();
  const size_t first = committed_bytes_ / kPageBytes * kPageBytes;
  const size_t last = RoundUp(bytes, kPageBytes);
  if (mprotect(data_ + first, last - first, PROT_READ | PROT_WRITE) != 0) return NoMemory(bytes);
  // Advice only: without huge pages everything works, with more misses of the address translation.
  if (huge_pages_) (void)madvise(data_ + first, last - first, MADV_HUGEPAGE);
  committed_bytes_ = bytes;
  return OkStatus();
}

AnonymousMemory& AnonymousMemory::operator=(AnonymousMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(committed_bytes_, other.committed_bytes_);
  std::swap(mapping_, other.mapping_);
  std::swap(mapping_bytes_, other.mapping_bytes_);
  std::swap(huge_pages_, other.huge_pages_);
  return *this;
}

AnonymousMemory::~AnonymousMemory() {
  if (mapping_ != nullptr) {
    munmap(mapping_, mapping_bytes_);
  } else {
    std::free(data_);
  }
}

}  // namespace hps
