// What changes the device cache: fill, insert, update, erase; and dump.
//
// Lock protocol: a writer of a key locks the key's first bucket and, where that has overflowed or is to overflow, its
// second one as well; of two buckets the one with the lower address first, so that writers never wait in a circle.
// Locks are bits of the state; while one is held only readers' marks change the state.

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_kernels/device_cache_access.cuh"

namespace hps::cuda {
namespace {

constexpr int kThreads = 256;
// One warp a key: two writers in one warp could keep each other from a lock, when the hardware makes the one wait where
// the other has to go on.
constexpr int kLanes = 32;
constexpr int64_t kMaxBlocks = 4096;

using WriteTile = Tile<kLanes>;

// By one thread.
__device__ void Lock(CacheBucket* bucket) {
  for (unsigned wait = 32;; wait = min(wait * 2, 1024u)) {
    const uint64_t state = LoadState(bucket);
    if (!(state & kStateLocked) && atomicCAS(StateAddress(bucket), state, state | kStateLocked) == state) return;
    __nanosleep(wait);
  }
}

// By one thread. changed: readers that were here meanwhile begin anew.
__device__ void Unlock(CacheBucket* bucket, bool changed) {
  __threadfence();
  if (changed) {
    atomicAdd(StateAddress(bucket), kStateVersionOne - kStateLocked);
  } else {
    atomicAnd(StateAddress(bucket), ~static_cast<unsigned long long>(kStateLocked));
  }
}

// By one thread that holds the locks, around all that readers could notice.
__device__ void BeginChange(const CacheTable& table) {
  atomicAdd(&table.activity->begun, 1u);
  __threadfence();
}
__device__ void EndChange(const CacheTable& table) {
  __threadfence();
  atomicAdd(&table.activity->ended, 1u);
}

// The buckets of a key, locked. second is nullptr unless the key may be there.
struct LockedKey {
  CacheBucket* first = nullptr;
  CacheBucket* second = nullptr;
  CacheBucket* found = nullptr;  // the one of the two that holds the key
  int way = -1;
};

// All lanes together. with_second: also where the first bucket has not overflowed but is full.
__device__ LockedKey LockKey(const WriteTile& tile, const CacheTable& table, int64_t key, bool with_second) {
  constexpr uint64_t kFull = uint64_t{0x7F} << 14;
  const uint64_t hash = CacheHash(key);
  CacheBucket* const first = table.buckets + FirstBucket(hash, table.num_buckets);
  CacheBucket* const second = table.buckets + SecondBucket(hash, table.num_buckets);
  LockedKey locked;
  locked.first = first;
  for (bool both = false;; both = true) {
    if (tile.lane == 0) {
      Lock(both && second < first ? second : first);
      if (both) Lock(second < first ? first : second);
      __threadfence();
    }
    tile.Sync();
    if (both) locked.second = second;
    const BucketQuarter bucket = LoadQuarter(first, tile.quarter());
    locked.way = tile.WayOf(bucket, key);
    if (locked.way >= 0) {
      locked.found = first;
      return locked;
    }
    if (both) {
      locked.way = tile.WayOf(LoadQuarter(second, tile.quarter()), key);
      if (locked.way >= 0) locked.found = second;
      return locked;
    }
    const uint64_t state = tile.StateOf(bucket);
    const bool needs_second = (state & kStateOverflowed) || (with_second && (state & kFull) == kFull);
    if (!needs_second || second == first) return locked;
    tile.Sync();
    if (tile.lane == 0) Unlock(first, /*changed=*/false);
  }
}

// changed: the bucket in which the caller has changed something since BeginChange, or nullptr.
__device__ void UnlockKey(const WriteTile& tile, const CacheTable& table, const LockedKey& locked,
                          const CacheBucket* changed) {
  tile.Sync();
  if (tile.lane != 0) return;
  if (changed != nullptr) EndChange(table);
  if (locked.second != nullptr) Unlock(locked.second, changed == locked.second);
  Unlock(locked.first, changed == locked.first);
}

__device__ void WriteInt8Row(const WriteTile& tile, const float* from, uint32_t width, uint32_t* to) {
  uint32_t largest = 0;
  for (uint32_t i = tile.lane; i < width; i += kLanes) largest = max(largest, MagnitudeBits(from[i]));
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    largest = max(largest, __shfl_xor_sync(tile.mask, largest, lanes));
  }
  const float scale = Int8Scale(largest);
  if (tile.lane == 0) __stcg(to, FloatBits(scale));
  for (uint32_t word = tile.lane; word < (width + 3) / 4; word += kLanes) {
    uint32_t bytes = 0;
    for (uint32_t e = 0; e < 4 && word * 4 + e < width; ++e) {
      bytes |= uint32_t{static_cast<uint8_t>(Int8Of(from[word * 4 + e], scale))} << (8 * e);
    }
    __stcg(to + 1 + word, bytes);
  }
}

// Rows are copied in 4-byte words: writing is bound by the link or by locks, not by this.
__device__ void WriteRow(const WriteTile& tile, const CacheTable& table, const CacheBucket* bucket, int way,
                         const void* row) {
  const uint32_t words = table.row_bytes / 4;
  auto* const to = reinterpret_cast<uint32_t*>(StoredRow(table, bucket - table.buckets, way));
  if (table.format == RowFormat::kInt8) return WriteInt8Row(tile, static_cast<const float*>(row), words, to);
  const auto* from = static_cast<const uint32_t*>(row);
  for (uint32_t word = tile.lane; word < words; word += kLanes) __stcg(to + word, from[word]);
}

// Returns whether another row had to go.
__device__ bool InsertKey(const WriteTile& tile, const CacheTable& table, int64_t key, const void* row, bool spill) {
  const LockedKey locked = LockKey(tile, table, key, spill);
  if (locked.found != nullptr) {
    UnlockKey(tile, table, locked, nullptr);
    return false;
  }
  CacheBucket* target = locked.first;
  int way = 0;
  int evicts = 0;
  if (tile.lane == 0) {
    BeginChange(table);
    uint64_t state = LoadState(locked.first);
    way = ChooseWay(&state);
    evicts = (state & StateHolds(way)) != 0;
    if (evicts && spill && locked.second != nullptr) {
      uint64_t other = LoadState(locked.second);
      const int other_way = ChooseWay(&other);
      if (!(other & StateHolds(other_way))) {
        evicts = 0;
        way = kCacheWays + other_way;
        atomicOr(StateAddress(locked.first), kStateOverflowed);
        state = other;
      }
    }
    CacheBucket* chosen = way < kCacheWays ? locked.first : locked.second;
    const int local = way % kCacheWays;
    // What ageing cleared, and the marks of the row that goes.
    const uint64_t refs = (state & kStateRefs) & ~(uint64_t{3} << (2 * local));
    atomicAnd(StateAddress(chosen), ~kStateRefs | refs);
    atomicOr(StateAddress(chosen), StateHolds(local));
    *reinterpret_cast<volatile int64_t*>(&chosen->keys[local]) = key;
  }
  way = tile.Broadcast(way, 0);
  evicts = tile.Broadcast(evicts, 0);
  if (way >= kCacheWays) {
    target = locked.second;
    way -= kCacheWays;
  }
  WriteRow(tile, table, target, way, row);
  __threadfence();
  tile.Sync();
  if (tile.lane == 0) {
    EndChange(table);
    // A reader of the key looks at the first bucket again where the second one matters.
    if (locked.second != nullptr) Unlock(locked.second, target == locked.second);
    Unlock(locked.first, true);
  }
  return evicts != 0;
}

template <typename Body>
__device__ __forceinline__ void ForEachTile(uint32_t count, Body body) {
  const WriteTile tile;
  const uint32_t step = gridDim.x * (kThreads / kLanes);
  for (uint32_t i = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes; i < count; i += step) body(tile, i);
}

__global__ void __launch_bounds__(kThreads) InsertKernel(CacheTable table, const int64_t* keys, const char* rows,
                                                         uint32_t count, bool spill, uint32_t* evicted) {
  ForEachTile(count, [&](const WriteTile& tile, uint32_t i) {
    const bool evicts = InsertKey(tile, table, keys[i], rows + uint64_t{i} * table.row_bytes, spill);
    if (evicts && evicted != nullptr && tile.lane == 0) atomicAdd(evicted, 1u);
  });
}

__global__ void __launch_bounds__(kThreads)
    UpdateKernel(CacheTable table, const int64_t* keys, const char* rows, uint32_t count) {
  ForEachTile(count, [&](const WriteTile& tile, uint32_t i) {
    const LockedKey locked = LockKey(tile, table, keys[i], false);
    if (locked.found != nullptr) {
      if (tile.lane == 0) BeginChange(table);
      tile.Sync();
      WriteRow(tile, table, locked.found, locked.way, rows + uint64_t{i} * table.row_bytes);
      __threadfence();
    }
    UnlockKey(tile, table, locked, locked.found);
  });
}

__global__ void __launch_bounds__(kThreads) EraseKernel(CacheTable table, const int64_t* keys, uint32_t count) {
  ForEachTile(count, [&](const WriteTile& tile, uint32_t i) {
    const LockedKey locked = LockKey(tile, table, keys[i], false);
    if (locked.found != nullptr && tile.lane == 0) {
      BeginChange(table);
      *reinterpret_cast<volatile int64_t*>(&locked.found->keys[locked.way]) =
          FillerOf(locked.found - table.buckets, table.num_buckets);
      atomicAnd(StateAddress(locked.found),
                ~static_cast<unsigned long long>(StateHolds(locked.way) | uint64_t{3} << (2 * locked.way)));
    }
    UnlockKey(tile, table, locked, locked.found);
  });
}

// Two ways of a bucket that is locked change places: rows, keys, and what the state says of them.
__device__ void ExchangeWays(const WriteTile& tile, const CacheTable& table, CacheBucket* bucket, int near, int far,
                             uint64_t state) {
  auto* const a = reinterpret_cast<uint32_t*>(StoredRow(table, bucket - table.buckets, near));
  auto* const b = reinterpret_cast<uint32_t*>(StoredRow(table, bucket - table.buckets, far));
  const uint32_t words = StoredRowBytes(table.format, table.row_bytes) / 4;
  for (uint32_t word = tile.lane; word < words; word += kLanes) {
    const uint32_t from_a = __ldcg(a + word), from_b = __ldcg(b + word);
    __stcg(a + word, from_b);
    __stcg(b + word, from_a);
  }
  if (tile.lane != 0) return;
  auto* const keys = reinterpret_cast<volatile int64_t*>(bucket->keys);
  const int64_t key = keys[near];
  keys[near] = keys[far];
  keys[far] = key;
  const uint64_t both = uint64_t{3} << (2 * near) | uint64_t{3} << (2 * far) | StateHolds(near) | StateHolds(far);
  atomicAnd(StateAddress(bucket), ~static_cast<unsigned long long>(both));
  atomicOr(StateAddress(bucket), static_cast<unsigned long long>(StateExchanged(state, near, far) & both));
}

// What lane 0 has read decides for all: the state changes under marks.
__global__ void __launch_bounds__(kThreads) ExchangeKernel(CacheTable table, uint64_t first, uint32_t count) {
  const auto device_ways = static_cast<int>(table.device_ways);
  ForEachTile(count, [&](const WriteTile& tile, uint32_t i) {
    CacheBucket* const bucket = table.buckets + first + i;
    const auto load_state = [&] {
      return tile.Broadcast(static_cast<unsigned long long>(tile.lane == 0 ? LoadState(bucket) : 0), 0);
    };
    int near, far;
    if (ChooseExchange(load_state(), device_ways, &near, &far)) {
      if (tile.lane == 0) {
        Lock(bucket);
        BeginChange(table);
        __threadfence();
      }
      tile.Sync();
      uint32_t exchanged = 0;
      for (uint64_t state = load_state(); ChooseExchange(state, device_ways, &near, &far); state = load_state()) {
        ExchangeWays(tile, table, bucket, near, far, state);
        __threadfence();
        tile.Sync();
        // Marks that come meanwhile could go on with this for ever.
        if (++exchanged == kCacheWays) break;
      }
      __threadfence();
      tile.Sync();
      if (tile.lane == 0) {
        EndChange(table);
        Unlock(bucket, exchanged != 0);
        if (exchanged != 0) {
          atomicAdd(reinterpret_cast<unsigned long long*>(&table.activity->exchanged),
                    static_cast<unsigned long long>(exchanged));
        }
      }
    }
    if (tile.lane == 0) {
      const uint64_t state = LoadState(bucket);
      const uint64_t gone = state & kStateRefs & ~StateAged(state);  // ageing only clears
      if (gone != 0) atomicAnd(StateAddress(bucket), ~static_cast<unsigned long long>(gone));
    }
  });
}

__global__ void __launch_bounds__(kThreads) ClearKernel(CacheTable table) {
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) *table.activity = CacheActivity();
    // Queries read the first row in place of those that are missing.
    const uint32_t words = StoredRowBytes(table.format, table.row_bytes) / 4;
    for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) static_cast<uint32_t*>(table.rows)[i] = 0;
  }
  for (uint64_t b = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; b < table.num_buckets; b += step) {
    const int64_t filler = FillerOf(b, table.num_buckets);
    for (int way = 0; way < kCacheWays; ++way) table.buckets[b].keys[way] = filler;
    table.buckets[b].state = 0;
  }
}

__global__ void __launch_bounds__(kThreads)
    DumpKernel(CacheTable table, uint64_t first, uint64_t last, int64_t* keys, uint32_t* count) {
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t b = first + uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; b < last; b += step) {
    const CacheBucket* bucket = table.buckets + b;
    int64_t found[kCacheWays];
    int number = 0;
    for (;;) {
      const uint64_t state = LoadState(bucket);
      number = 0;
      for (int way = 0; way < kCacheWays; ++way) {
        if (state & StateHolds(way)) found[number++] = *reinterpret_cast<const volatile int64_t*>(&bucket->keys[way]);
      }
      __threadfence();
      const uint64_t after = LoadState(bucket);
      if (!(state & kStateLocked) && ((state ^ after) & ~kStateRefs) == 0) break;
      __nanosleep(50);
    }
    if (number == 0) continue;
    const uint32_t place = atomicAdd(count, static_cast<uint32_t>(number));
    for (int i = 0; i < number; ++i) keys[place + i] = found[i];
  }
}

// As QueryPlan: a launch feels the bytes of its arguments.
template <int kMaxParts>
struct FillPlan {
  struct Part {
    QueryPart part;
    uint32_t first_position;
  } parts[kMaxParts];
  int num_parts;
  QueryWorkspace workspace;
  FillRequest request;

  __device__ const Part& PartOf(uint32_t position) const {
    int i = 0;
    if (kMaxParts > 1) {
      while (i + 1 < num_parts && position >= parts[i + 1].first_position) ++i;
    }
    return parts[i];
  }
};

// By a whole warp; from memory of the host it is read once and in as wide words as it can be.
__device__ __forceinline__ void CopyFilled(const WriteTile& tile, const char* from, char* to, uint32_t row_bytes) {
  if (((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | row_bytes) & 15) == 0) {
    for (uint32_t byte = tile.lane * 16; byte < row_bytes; byte += kLanes * 16) {
      *reinterpret_cast<uint4*>(to + byte) = *reinterpret_cast<const uint4*>(from + byte);
    }
  } else {
    for (uint32_t byte = tile.lane * 4; byte < row_bytes; byte += kLanes * 4) {
      *reinterpret_cast<uint32_t*>(to + byte) = *reinterpret_cast<const uint32_t*>(from + byte);
    }
  }
}

// Each missing position by one warp: the row goes into the output and, where the position is the key's first one, from
// there into the cache. Reads of the host's memory, where the missing keys and maybe the staging are, take a
// microsecond or more: each row is read once, and its key beside it.
template <int kMaxParts>
__global__ void __launch_bounds__(kThreads) FillKernel(const __grid_constant__ FillPlan<kMaxParts> plan) {
  const char* const staging = static_cast<const char*>(plan.request.staging);
  ForEachTile(plan.request.missing_positions, [&](const WriteTile& tile, uint32_t i) {
    const uint32_t position = plan.workspace.positions[i];
    const uint32_t leader = plan.workspace.leaders[i];
    const uint32_t unique = plan.workspace.unique_of[leader];
    const auto& part = plan.PartOf(position);
    const uint64_t offset = plan.request.row_offsets != nullptr ? plan.request.row_offsets[unique]
                                                                : uint64_t{unique} * part.part.table.row_bytes;
    if (offset == kNoRow) return;
    const int64_t key = plan.workspace.missing[unique].key;
    const uint32_t index = position - part.first_position;
    const CacheTable& table = part.part.table;
    char* const output = static_cast<char*>(part.part.output) + uint64_t{index} * OutputStride(part.part);
    CopyFilled(tile, staging + offset, output, table.row_bytes);
    if (position != leader) return;
    tile.Sync();
    (void)InsertKey(tile, table, key, output, plan.request.spill);
  });
}

// Writes that no lookup waits for use a sixteenth of the device: a query that comes meanwhile finds room on every
// multiprocessor. So they still change wide rows as fast as the link brings them, and narrow ones faster than tiers do.
unsigned BackgroundBlocks(uint64_t tiles) {
  int device = 0, processors = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  const uint64_t most = std::max(1, processors / 2);
  return static_cast<unsigned>(std::min<uint64_t>((tiles + kThreads / kLanes - 1) / (kThreads / kLanes), most));
}

unsigned BlocksFor(uint64_t tiles_or_threads, uint64_t per_block) {
  return static_cast<unsigned>(
      std::min<uint64_t>(std::max<uint64_t>((tiles_or_threads + per_block - 1) / per_block, 1), kMaxBlocks));
}

template <int kMaxParts>
int StartFill(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, const FillRequest& request,
              cudaStream_t stream) {
  FillPlan<kMaxParts> plan;
  plan.num_parts = 0;
  plan.workspace = workspace;
  plan.request = request;
  uint32_t positions = 0;
  for (int i = 0; i < num_parts; ++i) {
    if (parts[i].count > 0) plan.parts[plan.num_parts++] = {parts[i], positions};
    positions += parts[i].count;
  }
  FillKernel<kMaxParts><<<BlocksFor(request.missing_positions, kThreads / kLanes), kThreads, 0, stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace

int LaunchClear(const CacheTable& table, cudaStream_t stream) {
  if (!IsValid(table)) return cudaErrorInvalidValue;
  ClearKernel<<<BlocksFor(table.num_buckets, kThreads), kThreads, 0, stream>>>(table);
  return cudaGetLastError();
}

int LaunchInsert(const CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, bool spill,
                 uint32_t* evicted, cudaStream_t stream) {
  if (!IsValid(table)) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  InsertKernel<<<BackgroundBlocks(count), kThreads, 0, stream>>>(table, keys, static_cast<const char*>(rows), count,
                                                                 spill, evicted);
  return cudaGetLastError();
}

int LaunchUpdate(const CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, cudaStream_t stream) {
  if (!IsValid(table)) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  UpdateKernel<<<BackgroundBlocks(count), kThreads, 0, stream>>>(table, keys, static_cast<const char*>(rows), count);
  return cudaGetLastError();
}

int LaunchErase(const CacheTable& table, const int64_t* keys, uint32_t count, cudaStream_t stream) {
  if (!IsValid(table)) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  EraseKernel<<<BackgroundBlocks(count), kThreads, 0, stream>>>(table, keys, count);
  return cudaGetLastError();
}

int LaunchExchange(const CacheTable& table, uint64_t first, uint64_t last, cudaStream_t stream) {
  if (!IsValid(table) || first > last || last > table.num_buckets) return cudaErrorInvalidValue;
  if (first == last || table.device_ways == kCacheWays) return cudaSuccess;
  const auto count = static_cast<uint32_t>(last - first);
  ExchangeKernel<<<BackgroundBlocks(count), kThreads, 0, stream>>>(table, first, count);
  return cudaGetLastError();
}

int LaunchDump(const CacheTable& table, uint64_t first, uint64_t last, int64_t* keys, uint32_t* count,
               cudaStream_t stream) {
  if (!IsValid(table) || first > last || last > table.num_buckets) return cudaErrorInvalidValue;
  if (first == last) return cudaSuccess;
  DumpKernel<<<BlocksFor(last - first, kThreads), kThreads, 0, stream>>>(table, first, last, keys, count);
  return cudaGetLastError();
}

int LaunchFill(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, const FillRequest& request,
               cudaStream_t stream) {
  if (num_parts < 0 || num_parts > kMaxQueryParts) return cudaErrorInvalidValue;
  if (request.missing_positions == 0) return cudaSuccess;
  int asked = 0;
  for (int i = 0; i < num_parts; ++i) asked += parts[i].count > 0;
  if (asked != 1 && request.row_offsets == nullptr) return cudaErrorInvalidValue;
  return asked == 1 ? StartFill<1>(parts, num_parts, workspace, request, stream)
                    : StartFill<kMaxQueryParts>(parts, num_parts, workspace, request, stream);
}

}  // namespace hps::cuda
