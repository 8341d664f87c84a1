// DeviceCache: the EmbeddingCache of one table on one device (a GPU, or the host device).
//
// Memory: 64 bytes a bucket of seven rows, and the rows, packed; taken at Make and fixed. The buckets are always memory
// of the device. Thread safety and errors: embedding_cache.h.

#ifndef HPS_CACHE_DEVICE_CACHE_H_
#define HPS_CACHE_DEVICE_CACHE_H_

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "cc/cache/cache_writer.h"
#include "cc/cache/device_context.h"
#include "cc/cache/workspace_pool.h"
#include "hps/embedding_cache.h"

namespace hps {

// What the caches and lookups of one device share.
struct DeviceResources {
  std::shared_ptr<DeviceContext> context;
  std::shared_ptr<CacheWriter> writer;
  std::shared_ptr<WorkspacePool> workspaces;

  static Result<DeviceResources> Open(std::shared_ptr<cuda::Device> device, const WorkspacePoolOptions& workspaces,
                                      std::shared_ptr<DeviceAllocator> allocator = nullptr);
};

// Gives all rows of a table, in chunks, and returns its visitor's error or its own.
using RowScan = std::function<Status(const ScanVisitor& visitor)>;

class DeviceCache final : public EmbeddingCache, public std::enable_shared_from_this<DeviceCache> {
 public:
  // An empty cache. kInvalidArgument: row_bytes; kResourceExhausted names the bytes and what holds them.
  static Result<std::shared_ptr<DeviceCache>> Make(const DeviceResources& resources, const CacheSpec& spec);

  // Inserts rows of the scan, so many as the cache has room for; the scan is ended then. Where a bucket is full a row
  // goes, so that at most capacity_rows are there in the end, and about 0.9 of that many.
  Status Preload(const RowScan& scan);

  // A cache that holds all rows of the scan, which is made twice: first the keys are placed, then the rows copied.
  // spec.capacity_rows may be 0: as many as there are. Rows that the tiers change meanwhile may be missed: who updates
  // the table applies those updates to the cache again when it is there. Keys that only one of the scans gives are not
  // in it. kResourceExhausted where they do not fit.
  static Result<std::shared_ptr<DeviceCache>> MakeWhole(const DeviceResources& resources, const CacheSpec& spec,
                                                        const RowScan& scan);
  ~DeviceCache() override;

  // What a cache of this spec takes, to the byte.
  static CacheMemory MemoryOf(const CacheSpec& spec);

  const CacheSpec& spec() const override { return spec_; }
  uint64_t num_buckets() const override { return cache_.table.num_buckets; }
  CacheStats stats() const override;
  Stamp Now() const override { return resources_.context->gate().Now(); }
  Status Query(const Key* keys, uint32_t count, void* rows, DeviceStream stream, std::vector<CacheMiss>* misses,
               Deadline deadline) override;
  Status Insert(std::span<const Key> keys, ConstRowBuffer rows, Stamp read_at) override;
  Status Update(std::span<const Key> keys, ConstRowBuffer rows) override;
  Status Refresh(std::span<const Key> keys, ConstRowBuffer rows, Stamp read_at) override;
  Status Erase(std::span<const Key> keys) override;
  Status Dump(uint64_t first, uint64_t last, std::vector<Key>* keys) override;
  Status Flush() override { return resources_.writer->Flush(); }
  Status OrderAfterWrites(DeviceStream stream) override { return resources_.writer->OrderAfterWrites(stream); }

  // For lookups over several caches.
  const DeviceResources& resources() const { return resources_; }
  const cuda::CacheTable& table() const { return cache_.table; }
  // The number by which the gate knows this cache.
  uint32_t number() const { return cache_.number; }
  // Static, and every row of the table was placed: a missing key is one that no tier had then.
  bool whole() const { return cache_.table.whole; }
  // Lookups tell how many keys they ask for. From time to time one of them starts an exchange of rows, behind the
  // writes of the device; it never waits.
  void CountAsked(uint64_t keys);
  // For stats(): how many a lookup has asked for, once it knows what was missing and has told that.
  void CountAnswered(uint64_t keys);
  // What a lookup did with missing keys, and how many further positions they had.
  enum class Missing { kFetched, kDeferred, kDefaulted };
  void CountMissing(Missing what, uint64_t keys, uint64_t repeated);
  // Rows that a fill has put in place and that were taken out again, because they had been updated meanwhile.
  void CountOutdated(uint64_t rows);

 private:
  DeviceCache(const DeviceResources& resources, const CacheSpec& spec) : resources_(resources), spec_(spec) {}
  static Result<std::shared_ptr<DeviceCache>> Allocate(const DeviceResources& resources, const CacheSpec& spec,
                                                       uint64_t num_buckets);

  DeviceResources resources_;
  CacheSpec spec_;
  // The host's own way to a slot's row, or nullptr where it lies in memory of the device.
  std::byte* PinnedRow(uint64_t slot) const;
  Status FillWhole(const class StaticPlacement& placement, const RowScan& scan);

  DeviceMemory buckets_;
  DeviceMemory rows_;
  PinnedMemory pinned_rows_;
  WrittenCache cache_;
  WriteCounters counters_;
  uint64_t next_exchanged_ = 0;  // bucket; guarded by the writer
  // What lookups count lies apart from what they only read.
  alignas(64) std::atomic<uint64_t> answered_{0};
  std::atomic<uint64_t> asked_{0};      // the clock of exchanges
  std::atomic<uint64_t> missing_[3]{};  // by Missing
  std::atomic<uint64_t> repeated_{0};
  std::atomic<uint64_t> fills_outdated_{0};
};

}  // namespace hps

#endif  // HPS_CACHE_DEVICE_CACHE_H_
