// CacheWriter: brings rows from host memory into the caches of one device, and keys out of them. One a device.
//
// All writes of all caches but the fills of lookups go through one stream, one after the other; so updates of a key are
// ordered. Rows pass through two pinned buffers in turn: the next piece is packed while the last one is copied.
//
// Thread safety: all methods may be called from any thread; they wait for each other. Errors: as embedding_cache.h.

#ifndef HPS_CACHE_CACHE_WRITER_H_
#define HPS_CACHE_CACHE_WRITER_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "cc/cache/device_context.h"

namespace hps {

// What a write works on.
struct WrittenCache {
  cuda::CacheTable table;
  uint32_t number = 0;  // DeviceContext::NextCache
  bool spill = false;   // cuda::LaunchInsert
};

// Rows of one call by what became of them. `evicted` is added to when the device has done the write.
struct WriteCounters {
  std::atomic<uint64_t> inserted{0};
  std::atomic<uint64_t> evicted{0};
  std::atomic<uint64_t> updated{0};
  std::atomic<uint64_t> refreshed{0};
  std::atomic<uint64_t> erased{0};
  std::atomic<uint64_t> outdated{0};
};

class CacheWriter {
 public:
  // A piece is at most so many bytes of keys and rows, but at least one row.
  static constexpr size_t kPieceBytes = size_t{4} << 20;
  // What a writer takes: so much of the device, and of pinned host memory.
  static constexpr size_t kBufferBytes = 2 * kPieceBytes;

  static Result<std::shared_ptr<CacheWriter>> Open(std::shared_ptr<DeviceContext> context,
                                                   size_t piece_bytes = kPieceBytes);
  ~CacheWriter();

  // The counters must live until a Flush after the call has returned.
  Status Insert(const WrittenCache& cache, std::span<const Key> keys, ConstRowBuffer rows, uint64_t read_at,
                WriteCounters* counters);
  Status Update(const WrittenCache& cache, std::span<const Key> keys, ConstRowBuffer rows, WriteCounters* counters);
  Status Refresh(const WrittenCache& cache, std::span<const Key> keys, ConstRowBuffer rows, uint64_t read_at,
                 WriteCounters* counters);
  Status Erase(const WrittenCache& cache, std::span<const Key> keys, WriteCounters* counters);
  // Exchanges rows (cuda::LaunchExchange) in so many buckets of the cache from *next on, which goes round, unless the
  // writer is busy. A failure of the device is noted.
  void TryExchange(const WrittenCache& cache, uint64_t num_buckets, uint64_t* next);
  Status Dump(const cuda::CacheTable& table, uint64_t first, uint64_t last, std::vector<Key>* keys);
  Status Clear(const cuda::CacheTable& table);
  // Copies at most a piece from the device, behind the writes so far, and waits for it.
  Status Download(void* to, const void* from, size_t bytes);
  // Copies host memory into device memory.
  Status Upload(std::byte* to, std::span<const std::byte> from);
  Status Flush();
  Status OrderAfterWrites(DeviceStream stream);

 private:
  enum class Kind { kInsert, kUpdate, kRefresh, kErase };
  struct Write {
    Kind kind;
    const WrittenCache* cache;
    std::span<const Key> keys;
    ConstRowBuffer rows;
    uint64_t read_at = 0;
    WriteCounters* counters;
  };
  struct Buffer {
    PinnedMemory pinned;
    DeviceMemory device;
    OwnedEvent done;                      // the last use
    WriteCounters* evicted_of = nullptr;  // whose evictions of that use have not been counted yet
  };

  explicit CacheWriter(std::shared_ptr<DeviceContext> context) : context_(std::move(context)) {}
  Status Run(const Write& write);
  Status RunPiece(const Write& write, size_t first, size_t count);
  // Each returns how many keys are left; they are closed up.
  size_t Pack(const Write& write, size_t first, size_t count, std::byte* to);
  size_t LeaveOutUpdated(const Write& write, size_t count, std::byte* packed, std::byte* rows) const;
  void FindRepeated(std::span<const Key> keys);
  Result<Buffer*> NextBuffer(size_t bytes);
  void CountEvictions(Buffer& buffer);

  const std::shared_ptr<DeviceContext> context_;
  size_t piece_bytes_ = 0;
  std::mutex mutex_;  // guards the following members; before the gate's
  OwnedStream stream_;
  OwnedEvent written_;
  std::array<Buffer, 2> buffers_;
  size_t next_ = 0;
  std::vector<bool> repeated_;       // by position in a piece
  std::vector<uint32_t> last_seen_;  // FindRepeated's table: position + 1, 0: free
};

}  // namespace hps

#endif  // HPS_CACHE_CACHE_WRITER_H_
