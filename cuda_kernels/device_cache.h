// Launch interface of the device cache: a set-associative cache of table rows in device memory.
//
// The layout of a bucket and the rules of placing and replacing are in cache_bucket.h; docs/gpu_cache.md tells the
// whole story. Keys are 64-bit, every value is legal; rows are any positive multiple of 4 bytes of float32, and lie
// packed, all in one place and as they are unless the table says otherwise (device_ways, format). A table
// of num_buckets buckets holds at most 7 * num_buckets rows.
//
// Concurrency: launches on different streams may overlap in any combination on one table. A query gets the whole old
// or the whole new row of a key, never a mixture, and takes no lock; writers lock single buckets.
// All calls are asynchronous in `stream` and safe from any thread; memory belongs to the caller and must stay valid
// until the stream has passed the call. Return value: 0 or a cudaError_t; see gather.h.

#ifndef HPS_CUDA_KERNELS_DEVICE_CACHE_H_
#define HPS_CUDA_KERNELS_DEVICE_CACHE_H_

#include <cstddef>
#include <cstdint>

#include "cuda_kernels/cache_bucket.h"
#include "cuda_kernels/gather.h"
#include "cuda_kernels/row_format.h"

namespace hps::cuda {

// What the kernels tell each other about a table. Each change of keys or rows counts up `begun` before it and `ended`
// behind it, so that a reader that finds both equal, and `begun` the same afterwards, has met no writer.
struct alignas(16) CacheActivity {
  uint32_t begun = 0;
  uint32_t ended = 0;
  uint64_t untold_missing = 0;  // positions that LaunchUntoldQuery answered with the default
  uint64_t exchanged = 0;       // by LaunchExchange: rows that came to lie in device memory
  uint64_t unused = 0;          // hosts copy it whole: no byte may be left as it was
};

struct CacheTable {
  CacheBucket* buckets = nullptr;     // (num_buckets) device memory
  uint64_t num_buckets = 0;           // at least kMinBuckets
  void* rows = nullptr;               // (num_buckets, device_ways) rows in memory that the device can write
  uint32_t row_bytes = 0;             // of a row as queries give it
  bool whole = false;                 // rows are never given up
  CacheActivity* activity = nullptr;  // device memory
  RowFormat format = RowFormat::kFloat32;
  uint32_t device_ways = kCacheWays;  // at least 1; below 7 for tables that are held whole
  // (num_buckets, 7 - device_ways) rows of the other ways, in pinned memory of the host: the device's address of it.
  void* pinned_rows = nullptr;
};

// Whether rows of a bucket change places (LaunchExchange).
HPS_HOST_DEVICE bool RowsChangePlaces(const CacheTable& table) { return table.device_ways < uint32_t{kCacheWays}; }
// Of tables that never give a row up only those leave marks of use that exchange rows.
HPS_HOST_DEVICE bool LeavesMarks(const CacheTable& table) { return !table.whole || RowsChangePlaces(table); }

// Where the row of a way lies. Rows of 4-byte values, at multiples of 4.
HPS_HOST_DEVICE char* StoredRow(const CacheTable& table, uint64_t bucket, uint32_t way) {
  const uint64_t bytes = StoredRowBytes(table.format, table.row_bytes);
  if (way < table.device_ways) return static_cast<char*>(table.rows) + (bucket * table.device_ways + way) * bytes;
  return static_cast<char*>(table.pinned_rows) +
         (bucket * (kCacheWays - table.device_ways) + (way - table.device_ways)) * bytes;
}

// Empties a table. The rows need no initialisation.
int LaunchClear(const CacheTable& table, cudaStream_t stream);

// One table's part of a query.
struct QueryPart {
  CacheTable table;
  const int64_t* keys = nullptr;  // (count), device memory
  uint32_t count = 0;
  float default_value = 0.0f;  // every element of the row of a missing key
  void* output = nullptr;      // (count, row_bytes), device memory
  // Keys and rows of several tables may lie side by side, as [samples, tables] and [samples, tables, width].
  uint32_t key_stride = 1;     // from one key to the next, in keys
  uint32_t output_stride = 0;  // from one row to the next, in bytes: a multiple of 4, at least row_bytes; 0: row_bytes
};
HPS_HOST_DEVICE uint32_t OutputStride(const QueryPart& part) {
  return part.output_stride != 0 ? part.output_stride : part.table.row_bytes;
}

// A key that the query did not find, once for all its positions. Written to memory that the host sees.
struct MissingKey {
  int64_t key;
  uint32_t position;  // of its first occurrence: index over the keys of all parts, in order
  uint32_t padding;
};

// What a query tells the host; in host-mapped memory. Read `done` until its upper half is the query's stamp; the lower
// half is the number of positions whose key was missing. `missing_keys`, how many keys those are, is valid where that
// is not 0. Where it is 0 the query touches its working memory no more, though it may still be writing rows.
struct alignas(16) QueryResult {
  uint64_t done;
  uint32_t missing_keys;
  uint32_t padding;
};

// Working memory of queries that follow each other in one stream. Sizes are for max_positions keys over all parts.
struct QueryWorkspace {
  uint64_t* first_wins = nullptr;  // (first_wins_size) a power of two, at least 2 * max_positions; zeroed once
  uint32_t first_wins_size = 0;
  uint32_t* positions = nullptr;  // (max_positions) of missing keys, in no order
  uint32_t* leaders = nullptr;    // (max_positions) for each of them the position of the key's first occurrence
  uint32_t* unique_of = nullptr;  // (max_positions) by such a position: the key's index among the missing keys
  uint32_t* counters = nullptr;   // (4) at a multiple of 8, zeroed once
  uint32_t* launched = nullptr;   // on the host: blocks that were launched since then, which LaunchQuery counts
  MissingKey* missing = nullptr;  // (max_positions) mapped: the device's address of host memory
  QueryResult* result = nullptr;  // mapped likewise
  uint32_t max_positions = 0;
};

inline constexpr int kMaxQueryParts = 48;

// Copies the row of each key into the output, the default value where it is missing; lists what is missing and, last
// of all, publishes the counts with `stamp` (not 0, and another one for each query of a workspace, in ascending order).
// At most kMaxQueryParts parts of together at most workspace.max_positions keys.
int LaunchQuery(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, uint32_t stamp,
                cudaStream_t stream);

// Likewise where nobody asks what is missing, as in tables that are held whole: nothing is listed or published, missing
// positions are counted by table. Needs no working memory, and may be recorded into a graph.
int LaunchUntoldQuery(const QueryPart* parts, int num_parts, cudaStream_t stream);

// The rows that the host has found for the missing keys of the query that went before in the stream and workspace:
// copies them to all their positions in the output and inserts them into their tables.
struct FillRequest {
  const uint64_t* row_offsets = nullptr;  // (missing_keys) device-readable: where in `staging` the row of each missing
                                          // key begins; kNoRow: no tier holds it, the default value stays. nullptr, if
                                          // one part alone has keys: all rows are there, packed, as the keys are listed
  const void* staging = nullptr;          // device-readable, each row is read once; rows at multiples of 4
  uint32_t missing_positions = 0;
  uint32_t missing_keys = 0;
  bool spill = false;  // a key whose bucket is full may go to a second one; see LaunchInsert
};
inline constexpr uint64_t kNoRow = ~uint64_t{0};
int LaunchFill(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, const FillRequest& request,
               cudaStream_t stream);

// Puts rows in place that are not there yet; those that are stay as they are (they may be newer). A full bucket gives
// up the row that was read least. With `spill`, a key whose first bucket is full goes to its second one while that has
// room, which lets a table be filled nearly whole.
//   keys [count], rows [count, row_bytes]: device-readable. evicted, if given: a device counter that is added to.
int LaunchInsert(const CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, bool spill,
                 uint32_t* evicted, cudaStream_t stream);
// Overwrites rows that are there; others are left out.
int LaunchUpdate(const CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, cudaStream_t stream);
int LaunchErase(const CacheTable& table, const int64_t* keys, uint32_t count, cudaStream_t stream);
// In the buckets [first, last): rows in pinned memory that are often read change places with rows in device memory that
// are not (ChooseExchange); then all count as read one time less.
int LaunchExchange(const CacheTable& table, uint64_t first, uint64_t last, cudaStream_t stream);
// Writes the keys in the buckets [first, last) to keys[0 ..] in no order and adds their number to *count (device
// memory). keys has room for 7 * (last - first).
int LaunchDump(const CacheTable& table, uint64_t first, uint64_t last, int64_t* keys, uint32_t* count,
               cudaStream_t stream);

}  // namespace hps::cuda

#endif  // HPS_CUDA_KERNELS_DEVICE_CACHE_H_
