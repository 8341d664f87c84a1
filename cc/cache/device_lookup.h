// DeviceLookup: the lookup over the caches of one device. Keys of several tables on the device in, rows on the device
// out, on the caller's stream.
//
// One launch asks all caches of a call. Then:
//   all tables whole (static): nothing is waited for; a missing key has the default value.
//   else the host waits for one word in mapped memory, and where nothing is missing for nothing more.
//   of each table with missing keys, by its hit rate (1 - missing / asked; keys that are missing twice count once where
//   that is all the device tells):
//     below hit_rate_threshold, or without one: its missing rows are fetched from the tiers, each once, and one more
//       launch puts them into the answer and the cache: the answer is exact;
//     at or above it: its missing keys keep the DEFAULT VALUE in this answer, although a tier may hold them, and are
//       inserted in the background, so that a later lookup finds them.
//   So exact answers for all are one setting: no hit_rate_threshold (or one above 1).
//
// The rows are complete when the stream has passed the call. On error the answer holds nothing of value, and the stream
// may still write to it.
//
// Each cache counts what it was asked and what was missing (CacheStats): one addition a table where all was there.
//
// Captured into a graph: a lookup of whole caches is a launch (one for each 48 tables) and nothing else, so it can be.
//
// Thread safety: Lookup may be called from any number of threads, on any streams.
// Errors: kFailedPrecondition (CheckCapture), kDeadlineExceeded, kCancelled, kResourceExhausted (a workspace cannot
// grow so far), what the tiers report, and for ever after a device has failed its failure.

#ifndef HPS_CACHE_DEVICE_LOOKUP_H_
#define HPS_CACHE_DEVICE_LOOKUP_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "cc/cache/device_cache.h"
#include "cc/cache/insert_queue.h"
#include "cc/cache/row_source.h"

namespace hps {

// One table's part of a call.
struct CachedLookup {
  // Made with the resources of the lookup, or shared with its workspaces; need not own it, if the caller does.
  std::shared_ptr<DeviceCache> cache;
  uint32_t table = 0;         // for the row source
  const Key* keys = nullptr;  // (count), device memory
  uint32_t count = 0;
  void* rows = nullptr;     // (count, row_bytes), device memory, written
  uint32_t key_stride = 1;  // as QueryPart's, as is the next
  uint32_t row_stride = 0;
};

// One table's part of a pooled call.
struct PooledLookup {
  std::shared_ptr<DeviceCache> cache;  // as CachedLookup's
  DeviceSparsePart part;               // checked, but for what the device must look at
  const Key* keys = nullptr;           // (part.count), device memory; instead of part.keys
};

struct DeviceLookupOptions {
  std::optional<double> hit_rate_threshold;
};

class DeviceLookup {
 public:
  // Without `inserts` there is no hit_rate_threshold: all misses are waited for.
  DeviceLookup(DeviceResources resources, std::shared_ptr<RowSource> source, std::shared_ptr<InsertQueue> inserts,
               const DeviceLookupOptions& options)
      : resources_(std::move(resources)), source_(std::move(source)), inserts_(std::move(inserts)), options_(options) {}

  // narrow: int32 keys that are widened on the stream before, into keys of the lookups.
  // kFailedPrecondition where the stream is being captured into a graph and the lookup would wait for the device, which
  // cannot be captured; nothing was put on the stream then. A lookup of whole caches alone can be captured.
  Status Lookup(std::span<const CachedLookup> lookups, DeviceStream stream, const FetchLimits& limits,
                LookupReport* report, std::span<const cuda::WidenPart> narrow = {}) const;

  // Pooled: one launch finds and adds up the rows of all tables of a call, and the host waits for its word. Tables that
  // miss keys are then looked up as above, into memory of the workspace, and their rows are added up from there: the
  // sums are the same bits. Row_splits and indices that are no good: kInvalidArgument.
  Status LookupPooled(std::span<const PooledLookup> lookups, DeviceStream stream, const FetchLimits& limits,
                      LookupReport* report, std::span<const cuda::WidenPart> narrow = {}) const;

 private:
  enum class Way { kNone, kFetch, kDefer, kDefault };
  // The missing keys of one table of a call: [first, first + count) of the scratch space's keys.
  struct MissingPart {
    uint32_t first = 0;
    uint32_t count = 0;
    uint32_t repeated = 0;  // further positions of them; where several tables miss keys, this one's part
    Way way = Way::kNone;
  };

  // Of a call as many lookups at a time as one launch takes.
  template <typename Asked>
  using Together = Status (DeviceLookup::*)(std::span<const Asked> lookups, DeviceStream stream,
                                            const FetchLimits& limits, LookupReport* report) const;
  template <typename Asked>
  Status InLaunches(std::span<const Asked> lookups, std::span<const cuda::WidenPart> narrow, DeviceStream stream,
                    const FetchLimits& limits, LookupReport* report, Together<Asked> together) const;
  Status CheckCapture(std::span<const CachedLookup> lookups, DeviceStream stream) const;
  Status CheckCapture(std::span<const PooledLookup> lookups, DeviceStream stream) const;
  Status Widen(std::span<const cuda::WidenPart> parts, DeviceStream stream) const;

  Status LookupTogether(std::span<const CachedLookup> lookups, DeviceStream stream, const FetchLimits& limits,
                        LookupReport* report) const;
  // On a workspace with room, up to but without its End. `parts` are those of the lookups.
  Status LookupWith(LookupWorkspace& workspace, std::span<const CachedLookup> lookups,
                    std::span<const cuda::QueryPart> parts, DeviceStream stream, const FetchLimits& limits,
                    LookupReport* report) const;
  Status PoolTogether(std::span<const PooledLookup> lookups, DeviceStream stream, const FetchLimits& limits,
                      LookupReport* report) const;
  Status PoolMissing(WorkspacePool::Lease& workspace, std::span<const PooledLookup> lookups,
                     std::span<cuda::PooledPart> parts, DeviceStream stream, const FetchLimits& limits,
                     LookupReport* report) const;
  Status TellMistake(const PooledLookup& lookup, const cuda::FirstMistake& mistake, DeviceStream stream) const;
  Status CheckCache(const DeviceCache& cache) const;
  template <typename Name>  // gives a string
  Status CheckNotCaptured(const Name& which, DeviceStream stream) const;
  Status HandleMisses(std::span<const CachedLookup> lookups, std::span<const cuda::QueryPart> parts,
                      LookupWorkspace& workspace, uint64_t read_at, DeviceStream stream, const FetchLimits& limits,
                      LookupReport* report) const;
  Status SortMissing(std::span<const cuda::QueryPart> parts, LookupWorkspace& workspace,
                     std::span<MissingPart> missing) const;
  static void ShareRepeated(std::span<const cuda::QueryPart> parts, uint32_t repeated, std::span<MissingPart> missing);
  Status FetchAndFill(std::span<const CachedLookup> lookups, std::span<const cuda::QueryPart> parts,
                      std::span<const MissingPart> missing, LookupWorkspace& workspace, uint64_t read_at,
                      DeviceStream stream, const FetchLimits& limits, LookupReport* report) const;

  const DeviceResources resources_;
  const std::shared_ptr<RowSource> source_;
  const std::shared_ptr<InsertQueue> inserts_;
  const DeviceLookupOptions options_;
};

}  // namespace hps

#endif  // HPS_CACHE_DEVICE_LOOKUP_H_
