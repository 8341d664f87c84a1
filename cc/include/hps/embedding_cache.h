// EmbeddingCache: rows of one table of one model in the memory of one device, in front of the table's tiers.
//
// A row is any positive multiple of 4 bytes (float32 values); keys are 64-bit, every value is legal. A query finds the
// whole old or the whole new row of a key, never a mixture, also while others insert, update, evict or erase it. The
// cache never asks the tiers: who misses asks them and inserts (DeviceLookup does so).
//
// Order. Queries run on the caller's stream. Insert, Update, Refresh and Erase take rows from host memory, which they
// have read when they return, and run on the cache's own stream one after the other; Flush waits for them, and
// OrderAfterWrites makes a stream wait. Without either a query may still give what was there before.
//
// Updates and rows on their way. Rows that were read from the tiers can be older than an update by the time they reach
// the cache. The invariant that keeps such a row from staying for ever:
//   who changes rows first writes the tiers, then calls Update or Erase;
//   who inserts or refreshes first takes Now(), then reads the tiers, and passes that stamp on.
// Then an Insert or Refresh leaves out every key that was updated or erased since its stamp (and, seldom, others: it
// remembers keys by a hash). When an Update has returned, and all inserts and lookups that began before have ended and
// the stream has passed them, no query gives an older row.
//
// Thread safety: all methods may be called from any thread. Streams, events and memory belong to one device.
// Errors, of all methods: kInternal or kDataLoss "the device ...", for ever after a device has failed, naming the first
// failure; nothing is tried again. kInvalidArgument: sizes that do not fit.

#ifndef HPS_EMBEDDING_CACHE_H_
#define HPS_EMBEDDING_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "hps/config.h"
#include "hps/status.h"
#include "hps/table_store.h"

struct CUstream_st;  // CUDA's own, so of no namespace

namespace hps {

using DeviceStream = CUstream_st*;  // CUDA's cudaStream_t; nullptr: the default stream

// Where the memory of caches and workspaces comes from. The host supplies it: TensorFlow takes nearly the whole memory
// of a GPU for itself and lends it to its own allocator only.
// Thread safety: all methods are called from any thread.
class DeviceAllocator {
 public:
  virtual ~DeviceAllocator() = default;
  // Memory of the device at a multiple of 256, or nullptr where there is none left. bytes > 0. Work that was launched
  // before may still use it: who takes it waits for the device first.
  virtual void* Allocate(size_t bytes) = 0;
  // Called when nothing on the device uses it any more.
  virtual void Free(void* memory) = 0;
  // What it can still lend, or nullopt where it does not know.
  virtual std::optional<uint64_t> FreeBytes() const { return std::nullopt; }
};

struct CacheSpec {
  std::string name;            // "model 'm', table 't'": for messages
  uint32_t row_bytes = 0;      // > 0, a multiple of 4
  uint64_t capacity_rows = 0;  // rounded up to whole buckets of 7, at least 16 buckets
  float default_value = 0.0f;  // every element of the row of a missing key
  CacheType type = CacheType::kDynamic;
  // For caches that hold a whole table (static, uvm):
  // Of the seven rows of a bucket so many lie in memory of the device, the others in pinned memory of the host, which
  // the device reads through the link. Between 1 and 6, rows change places as they are read.
  uint32_t device_ways = 7;
  bool int8_rows = false;  // rows are kept as 8-bit values with a scale (cuda_kernels/row_format.h)
};

// What a cache takes.
struct CacheMemory {
  uint64_t device_bytes = 0;
  uint64_t pinned_bytes = 0;  // of the host
};

struct CacheMiss {
  Key key;            // each missing key once
  uint32_t position;  // of one of its occurrences
};

struct CacheStats {
  // Of lookups: keys_asked is rows_served and the next four together, so that rows_served / keys_asked is the hit rate.
  // While lookups run, and where one has failed, rows_served may be some less; of a cache that nobody waits for some
  // more, until the device has counted what was missing. Replays of CUDA graphs count in rows_defaulted alone, so of a
  // cache that they read nothing is to be learnt from these.
  uint64_t keys_asked = 0;      // with repetitions
  uint64_t rows_served = 0;     // that were in the cache
  uint64_t rows_missed = 0;     // keys that were fetched while the lookup waited, each once a call
  uint64_t rows_deferred = 0;   // keys that got the default value and are inserted later (hit_rate_threshold), likewise
  uint64_t rows_defaulted = 0;  // keys that are not in a cache of the whole table: they got the default value
  // Further positions of keys that were missing. Where one call missed keys of several tables it is known for all of
  // them together only, and each has its part by its missing keys.
  uint64_t rows_repeated = 0;
  uint64_t rows_inserted = 0;  // given to Insert and not left out; those that were there already included
  uint64_t rows_evicted = 0;   // by Insert; rows that a lookup's fill pushed out are not counted
  uint64_t rows_updated = 0;   // given to Update
  uint64_t rows_refreshed = 0;
  uint64_t rows_erased = 0;     // given to Erase
  uint64_t rows_outdated = 0;   // left out of Insert or Refresh, or erased after a fill: updated meanwhile
  uint64_t fills_outdated = 0;  // of rows_outdated, those that a lookup had fetched
  uint64_t rows_exchanged = 0;  // came from pinned memory to lie in memory of the device
  uint64_t device_bytes = 0;    // buckets and rows
  uint64_t pinned_bytes = 0;    // rows in pinned memory of the host
};

class EmbeddingCache {
 public:
  using Stamp = uint64_t;

  virtual ~EmbeddingCache() = default;

  virtual const CacheSpec& spec() const = 0;
  // Buckets of 7 rows; what Dump counts by. At least spec().capacity_rows / 7.
  virtual uint64_t num_buckets() const = 0;
  virtual CacheStats stats() const = 0;

  // A stamp for rows that are read from the tiers after this call.
  virtual Stamp Now() const = 0;

  // Copies the row of each key to rows[i], the default where it is missing, and waits until it is known what is
  // missing: *misses is set to that, in no order. keys (count) and rows (count, row_bytes) are memory of the device;
  // the rows are complete when the stream has passed the call. kDeadlineExceeded: rows may still be written on the
  // stream.
  virtual Status Query(const Key* keys, uint32_t count, void* rows, DeviceStream stream, std::vector<CacheMiss>* misses,
                       Deadline deadline = kNoDeadline) = 0;

  // Puts rows in place that are not there yet; those that are stay as they are. Where a bucket is full the row that was
  // read least goes. Where a key occurs twice in one call, either row is taken. kFailedPrecondition for a static cache:
  // its rows are placed once (Place).
  virtual Status Insert(std::span<const Key> keys, ConstRowBuffer rows, Stamp read_at) = 0;
  // Overwrites rows that are there; other keys are ignored. Where a key occurs twice in one call the later row wins.
  virtual Status Update(std::span<const Key> keys, ConstRowBuffer rows) = 0;
  // The same with rows that were read from the tiers: see the invariant above.
  virtual Status Refresh(std::span<const Key> keys, ConstRowBuffer rows, Stamp read_at) = 0;
  virtual Status Erase(std::span<const Key> keys) = 0;

  // Appends the keys in the buckets [first, last), in no order. Waits for earlier writes. A key that is inserted or
  // evicted meanwhile may be there or not. kInvalidArgument where that is no range of buckets.
  virtual Status Dump(uint64_t first, uint64_t last, std::vector<Key>* keys) = 0;

  // Waits until all earlier writes are done.
  virtual Status Flush() = 0;
  // Later work of the stream sees all earlier writes.
  virtual Status OrderAfterWrites(DeviceStream stream) = 0;
};

}  // namespace hps

#endif  // HPS_EMBEDDING_CACHE_H_
