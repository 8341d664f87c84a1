// Launch interface of pooled lookups over the device cache: the rows of several keys become one output row.
//
// Concurrency, memory and return values: as device_cache.h. Sums are those of SparseLookup (hps/lookup_session.h) to
// the bit: without weights float32 in the order that PooledHead tells, with weights float64 from the first key to the
// last.

#ifndef HPS_CUDA_KERNELS_DEVICE_POOLING_H_
#define HPS_CUDA_KERNELS_DEVICE_POOLING_H_

#include <cstdint>

#include "cuda_kernels/device_cache.h"

namespace hps::cuda {

// The first so many of n rows are added left to right; every further eight are added up by themselves first.
HPS_HOST_DEVICE uint32_t PooledHead(uint32_t n) { return n == 1 ? 1 : n % 8 < 2 ? n % 8 + 8 : n % 8; }

// int32 keys of one array as int64 keys.
struct WidenPart {
  const int32_t* from = nullptr;  // (count)
  int64_t* to = nullptr;          // (count), packed
  uint32_t count = 0;
  uint32_t stride = 1;  // from one key of `from` to the next, in keys
};
// At most kMaxQueryParts parts.
int LaunchWiden(const WidenPart* parts, int num_parts, cudaStream_t stream);

enum class Pooling : uint32_t { kSum, kMean, kSqrtn };

// One table's part of a pooled query.
struct PooledPart {
  QueryPart query;  // LaunchPool reads the rows in its output; LaunchPooledQuery has no use for it
  uint32_t rows = 0;
  Pooling pooling = Pooling::kMean;
  const int64_t* row_splits = nullptr;  // (rows + 1), whatever they hold; nothing outside the arrays is touched
  bool from_indices = false;            // LaunchSplits has written row_splits, and tells what is wrong with them
  const float* weights = nullptr;       // (query.count), or nullptr
  float* output = nullptr;              // (rows, width); rows without keys become zeros
};

// A SparseTensor's indices, of which column 0 is the output row of each key.
struct IndexPart {
  const int64_t* indices = nullptr;      // (count, rank)
  uint32_t rank = 0;                     // 1 to kMostRank
  const int64_t* dense_shape = nullptr;  // (rank), memory of the host, read by the call; dense_shape[0] is `rows`
  uint32_t count = 0;
  uint32_t rows = 0;
  int64_t* row_splits = nullptr;  // (rows + 1), written
  uint32_t part = 0;              // the pooled query's part that they are for
};
inline constexpr uint32_t kMostRank = 254;

// What is wrong with segments. Of several mistakes in a call the first one is told: by part, then by position.
enum class Mistake : uint32_t {
  kNone,
  kEnds,            // row_splits do not begin with 0 or do not end with the number of keys
  kSplitsDescend,   // row_splits[position] is less than the one before
  kOutside,         // a column of indices[position] lies outside the dense shape
  kIndicesDescend,  // indices[position, 0] is less than the one before
};
struct FirstMistake {
  Mistake mistake = Mistake::kNone;
  uint32_t part = 0;
  uint64_t position = 0;
};
// As one number, the smaller the earlier; 0 is none. Where several threads find one, the complement's maximum wins.
HPS_HOST_DEVICE uint64_t PackMistake(Mistake mistake, uint32_t part, uint64_t position) {
  return (uint64_t{part} << 40) | (position << 4) | static_cast<uint32_t>(mistake);
}
inline FirstMistake UnpackMistake(uint64_t word) {
  return {static_cast<Mistake>(word & 15), static_cast<uint32_t>(word >> 40), (word >> 4) & ((uint64_t{1} << 36) - 1)};
}

// What a pooled query tells the host; in host-mapped memory. Read `done` until its upper half is the query's stamp. Of
// the lower half 31 bits are the number of positions whose key was missing, and the highest says that there is a
// mistake; the other members are valid where the lower half is not 0.
struct alignas(16) PooledResult {
  uint64_t done;
  uint64_t missing_parts;  // a bit for each part whose output is not complete
  uint64_t mistake;        // PackMistake, or 0
};
inline constexpr uint32_t kHasMistake = uint32_t{1} << 31;

// Working memory of pooled queries that follow each other in one stream.
struct PooledWorkspace {
  uint32_t* counters = nullptr;  // (2) zeroed once: missing positions, finished blocks
  uint64_t* words = nullptr;     // (2) zeroed once: missing parts, complement of the first mistake
  PooledResult* result = nullptr;
};

// Writes the row_splits of each part and looks for mistakes in its indices; LaunchPooledQuery, later in the stream,
// tells of them. At most kMaxQueryParts parts.
int LaunchSplits(const IndexPart* parts, int num_parts, const PooledWorkspace& workspace, cudaStream_t stream);

// Finds and adds up the rows of all parts in one launch, without writing them anywhere, and publishes the result. Where
// keys of a part are missing, its output is of no use; but keys that a whole table misses have the default value, are
// counted as by LaunchUntoldQuery, and not told. A part may also count as missing where writers did not leave a row
// alone for long. On a mistake no output is of use.
// At most kMaxQueryParts parts of together less than 2^31 keys; stamps as LaunchQuery's.
int LaunchPooledQuery(const PooledPart* parts, int num_parts, const PooledWorkspace& workspace, uint32_t stamp,
                      cudaStream_t stream);

// Adds up rows that lie in query.output, which a LaunchQuery has found. At most kMaxQueryParts parts.
int LaunchPool(const PooledPart* parts, int num_parts, cudaStream_t stream);

}  // namespace hps::cuda

#endif  // HPS_CUDA_KERNELS_DEVICE_POOLING_H_
