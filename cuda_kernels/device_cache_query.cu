// The query: one launch for all tables of a call.
//
// A warp serves eight keys at a time. First four lanes look for each key, one quarter of its bucket each, so that one
// load reads eight buckets and a key is hashed once a group of four, not once a lane; then all lanes copy the eight
// rows, with every load under way before the first store. What is rare (a second bucket, a writer that was about, a
// missing key) is decided by votes of the warp and done out of line. The kernel is bound by instructions as soon as it
// is not by memory; hence all this.
// Invariant of the dedup table: an entry is (stamp << 32) | position of the key's first occurrence; entries of older
// stamps are free.
//
// The grid is a few times what is resident at once, not as large as the batch, so that counting finished blocks costs
// little.

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "cuda_kernels/device_cache_access.cuh"

namespace hps::cuda {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kBlockKeys = 1024;  // at most so many keys go to one block
constexpr int kMaxDevices = 64;
constexpr uint32_t kWaves = 4;  // blocks for each that is resident at once: the end is then less ragged
constexpr int kAttempts = 64;   // under writers that come again and again; then the key counts as missing

// Which instance of the kernel serves a part.
struct Shape {
  uint8_t word = 0;   // 0: 16 bytes, 1: 8, 2: 4
  uint8_t steps = 0;  // a row takes 4 << steps lanes; 4: all lanes, more than once
  bool operator==(const Shape& other) const { return word == other.word && steps == other.steps; }
};

struct PartPlan {
  QueryPart part;
  uint32_t first_position;
  uint32_t first_block;
  uint32_t blocks;
  Shape shape;
};

struct QueryPlan {
  PartPlan parts[kMaxQueryParts];
  int num_parts;
  QueryWorkspace workspace;
  uint32_t stamp;
};

template <typename Word>
__device__ Word Filled(float value);
template <>
__device__ __forceinline__ float Filled<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ float2 Filled<float2>(float value) {
  return make_float2(value, value);
}
template <>
__device__ __forceinline__ float4 Filled<float4>(float value) {
  return make_float4(value, value, value, value);
}

// Lists a missing position; called by one thread.
__device__ void AddMissing(const PartPlan& plan, uint32_t index, int64_t key, const QueryWorkspace& workspace,
                           uint32_t stamp) {
  const uint32_t position = plan.first_position + index;
  const uint64_t mine = (static_cast<uint64_t>(stamp) << 32) | position;
  const uint32_t mask = workspace.first_wins_size - 1;
  uint32_t leader = position;
  for (uint32_t slot = static_cast<uint32_t>(CacheHash(key ^ (int64_t{plan.first_position} << 40)));; ++slot) {
    auto* entry = reinterpret_cast<unsigned long long*>(&workspace.first_wins[slot & mask]);
    unsigned long long seen = *reinterpret_cast<volatile unsigned long long*>(entry);
    if (static_cast<uint32_t>(seen >> 32) != stamp) {
      const unsigned long long before = atomicCAS(entry, seen, mine);
      if (before == seen) {
        const uint32_t unique = atomicAdd(&workspace.counters[1], 1u);
        workspace.unique_of[position] = unique;
        workspace.missing[unique] = MissingKey{key, position, 0};
        break;
      }
      seen = before;
      if (static_cast<uint32_t>(seen >> 32) != stamp) {  // impossible but for a race of two stamps
        --slot;
        continue;
      }
    }
    const uint32_t other = static_cast<uint32_t>(seen) - plan.first_position;
    if (other < plan.part.count && plan.part.keys[other] == key) {
      leader = static_cast<uint32_t>(seen);
      break;
    }
  }
  const uint32_t slot = atomicAdd(&workspace.counters[0], 1u);
  workspace.positions[slot] = position;
  workspace.leaders[slot] = leader;
}

using Warp = Tile<32>;

// The keys of a block that need more than the common way: found nowhere, or met by a writer. In shared memory.
struct RareKeys {
  uint32_t count;
  uint32_t entries[kBlockKeys];  // index in the part, and in the highest bit whether it is missing

  __device__ void Add(uint32_t index, bool missing) {
    entries[atomicAdd(&count, 1u)] = index | (missing ? 0x80000000u : 0u);
  }
};

template <typename Word>
__device__ void CopyRow(const Word* from, Word* to, uint32_t words, int lane) {
#pragma unroll 1
  for (uint32_t word = lane; word < words; word += 32) __stcs(to + word, __ldcg(from + word));
}

// One key by the whole warp, as often as it takes: the way of the query where a writer was about.
template <typename Word>
__device__ bool QueryAgain(const Warp& warp, const CacheTable& table, int64_t key, Word* output) {
  const uint64_t hash = CacheHash(key);
#pragma unroll 1
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    uint64_t bucket = FirstBucket(hash, table.num_buckets);
    BucketQuarter before = LoadQuarter(table.buckets + bucket, warp.quarter());
    int way = warp.WayOf(before, key);
    if (way < 0 && (warp.StateOf(before) & kStateOverflowed)) {
      bucket = SecondBucket(hash, table.num_buckets);
      before = LoadQuarter(table.buckets + bucket, warp.quarter());
      way = warp.WayOf(before, key);
    }
    if (way < 0) return false;
    CopyRow(RowOf<Word>(table, bucket, way), output, table.row_bytes / sizeof(Word), warp.lane);
    const BucketQuarter after = LoadQuarter(table.buckets + bucket, warp.quarter());
    if (!__any_sync(warp.mask, QuarterChanged(before, after, warp.quarter()))) return true;
    __nanosleep(100);
  }
  return false;
}

// Returns whether the key is missing; then its row is the default and it is listed.
template <typename Word>
__device__ bool FinishRarely(const PartPlan& plan, uint32_t index, bool missing, const QueryWorkspace& workspace,
                             uint32_t stamp) {
  const QueryPart& part = plan.part;
  const Warp warp;
  const uint32_t words = part.table.row_bytes / sizeof(Word);
  const int64_t key = part.keys[index];
  Word* const output = static_cast<Word*>(part.output) + uint64_t{index} * words;
  if (!missing && QueryAgain<Word>(warp, part.table, key, output)) return false;
#pragma unroll 1
  for (uint32_t word = warp.lane; word < words; word += 32) __stcs(output + word, Filled<Word>(part.default_value));
  if (warp.lane == 0) AddMissing(plan, index, key, workspace, stamp);
  return true;
}

// A row takes 4 * kSteps lanes; kWide: more words than there are lanes.
template <typename Word, int kSteps, bool kWide>
__device__ __forceinline__ void QueryKeys(const PartPlan& plan, uint32_t block, RareKeys* rare) {
  constexpr int kRowLanes = 4 * kSteps;
  constexpr uint32_t kNoSlot = 0xFFFFFFFF;
  const Warp warp;
  const CacheBucket* const buckets = plan.part.table.buckets;
  const uint64_t num_buckets = plan.part.table.num_buckets;
  const char* const rows = static_cast<const char*>(plan.part.table.rows);
  const uint32_t row_bytes = plan.part.table.row_bytes;
  const uint32_t words = row_bytes / sizeof(Word);
  const uint32_t count = plan.part.count;
  const int64_t* const keys = plan.part.keys;
  const int quarter = warp.quarter();
  const uint32_t step = plan.blocks * (kThreads / 4);
#pragma unroll 1
  for (uint32_t base = (block * kThreads + threadIdx.x) / 32 * 8; base < count; base += step) {
    const uint32_t index = base + warp.lane / 4;
    const bool asked = index < count;
    const int64_t key = __ldg(reinterpret_cast<const long long*>(keys) + (asked ? index : count - 1));
    const uint64_t hash = CacheHash(key);
    const CacheBucket* bucket = buckets + FirstBucket(hash, num_buckets);
    BucketQuarter before = LoadQuarter(bucket, quarter);
    int way = GroupWayOf(before, key, quarter);
    if (__any_sync(0xFFFFFFFF, quarter == 3 && way < 0 && (before.high & kStateOverflowed))) {
      const unsigned overflowed = __ballot_sync(0xFFFFFFFF, quarter == 3 && (before.high & kStateOverflowed) != 0);
      const bool second = way < 0 && (overflowed >> (warp.lane | 3) & 1);
      if (second) {
        bucket = buckets + SecondBucket(hash, num_buckets);
        before = LoadQuarter(bucket, quarter);
      }
      way = GroupWayOf(before, key, quarter);
    }
    const uint32_t slot = way < 0 ? kNoSlot : static_cast<uint32_t>(bucket - buckets) * kCacheWays + way;
    if (kWide) {
#pragma unroll 1
      for (int row = 0; row < 8; ++row) {
        const uint32_t from = __shfl_sync(0xFFFFFFFF, slot, row * 4);
        if (base + row >= count || from == kNoSlot) continue;
        CopyRow(reinterpret_cast<const Word*>(rows + uint64_t{from} * row_bytes),
                static_cast<Word*>(plan.part.output) + uint64_t{base + row} * words, words, warp.lane);
      }
    } else {
      Word values[kSteps];
      const uint32_t word = warp.lane % kRowLanes;
      const uint32_t row = warp.lane / kRowLanes;
      unsigned copies = 0;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const uint32_t number = i * (8 / kSteps) + row;
        const uint32_t from = __shfl_sync(0xFFFFFFFF, slot, number * 4);
        if (from != kNoSlot && base + number < count && word < words) {
          copies |= 1u << i;
          values[i] = __ldcg(reinterpret_cast<const Word*>(rows + uint64_t{from} * row_bytes) + word);
        }
      }
      Word* const output = static_cast<Word*>(plan.part.output) + uint64_t{base + row} * words + word;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (copies >> i & 1) __stcs(output + static_cast<uint32_t>(i * (8 / kSteps)) * words, values[i]);
      }
    }
    const BucketQuarter after = LoadQuarter(bucket, quarter);
    const unsigned changed = __ballot_sync(0xFFFFFFFF, QuarterChanged(before, after, quarter));
    const bool again = (changed >> (warp.lane & ~3) & 0xF) != 0;
    if (quarter == 3 && way >= 0) {
      const uint64_t bit = StateNextRef(before.high, way);
      if (bit != 0) atomicOr(StateAddress(const_cast<CacheBucket*>(bucket)), bit);
    }
    if (quarter == 0 && asked && (way < 0 || again)) rare->Add(index, way < 0);
  }
}

// What the block could not do in its stride.
template <typename Word>
__device__ bool FinishRare(const PartPlan& plan, const RareKeys& rare, const QueryWorkspace& workspace,
                           uint32_t stamp) {
  __syncthreads();
  bool missed = false;
#pragma unroll 1
  for (uint32_t i = threadIdx.x / 32; i < rare.count; i += kThreads / 32) {
    const uint32_t entry = rare.entries[i];
    missed |= FinishRarely<Word>(plan, entry & 0x7FFFFFFF, entry >> 31, workspace, stamp);
  }
  return missed;
}

// The last block to come here tells the host. Only what was listed as missing must be seen before that: the rows are
// ordered by the stream. So a block that has found all its keys needs no fence.
__device__ void PublishResult(const QueryWorkspace& workspace, uint32_t stamp, uint32_t blocks, bool missed) {
  missed = __syncthreads_or(missed);
  if (threadIdx.x != 0) return;
  if (missed) __threadfence_system();
  if (atomicAdd(&workspace.counters[2], 1u) != blocks - 1) return;
  const uint32_t positions = atomicExch(&workspace.counters[0], 0u);
  const uint32_t keys = atomicExch(&workspace.counters[1], 0u);
  workspace.counters[2] = 0;
  if (positions != 0) {
    *static_cast<volatile uint32_t*>(&workspace.result->missing_keys) = keys;
    __threadfence_system();
  }
  *reinterpret_cast<volatile uint64_t*>(&workspace.result->done) = (static_cast<uint64_t>(stamp) << 32) | positions;
}

__device__ __forceinline__ int PartOfBlock(const QueryPlan& plan) {
  int part = 0;
  while (part + 1 < plan.num_parts && blockIdx.x >= plan.parts[part + 1].first_block) ++part;
  return part;
}

// All parts of one shape.
template <typename Word, int kSteps, bool kWide>
__global__ void __launch_bounds__(kThreads) QueryKernel(const __grid_constant__ QueryPlan plan) {
  __shared__ RareKeys rare;
  if (threadIdx.x == 0) rare.count = 0;
  __syncthreads();
  const PartPlan& part = plan.parts[PartOfBlock(plan)];
  QueryKeys<Word, kSteps, kWide>(part, blockIdx.x - part.first_block, &rare);
  PublishResult(plan.workspace, plan.stamp, gridDim.x, FinishRare<Word>(part, rare, plan.workspace, plan.stamp));
}

template <typename Word>
__device__ bool RunPart(const PartPlan& part, uint32_t block, const QueryPlan& plan, RareKeys* rare) {
  switch (part.shape.steps) {
    case 0: QueryKeys<Word, 1, false>(part, block, rare); break;
    case 1: QueryKeys<Word, 2, false>(part, block, rare); break;
    case 2: QueryKeys<Word, 4, false>(part, block, rare); break;
    case 3: QueryKeys<Word, 8, false>(part, block, rare); break;
    default: QueryKeys<Word, 8, true>(part, block, rare);
  }
  return FinishRare<Word>(part, *rare, plan.workspace, plan.stamp);
}

__global__ void __launch_bounds__(kThreads) MixedQueryKernel(const __grid_constant__ QueryPlan plan) {
  const PartPlan& part = plan.parts[PartOfBlock(plan)];
  const uint32_t block = blockIdx.x - part.first_block;
  __shared__ RareKeys rare;
  if (threadIdx.x == 0) rare.count = 0;
  __syncthreads();
  const bool missed = part.shape.word == 0   ? RunPart<float4>(part, block, plan, &rare)
                      : part.shape.word == 1 ? RunPart<float2>(part, block, plan, &rare)
                                             : RunPart<float>(part, block, plan, &rare);
  PublishResult(plan.workspace, plan.stamp, gridDim.x, missed);
}

using Kernel = void (*)(QueryPlan);

template <typename Word>
Kernel KernelOf(int steps) {
  switch (steps) {
    case 0: return QueryKernel<Word, 1, false>;
    case 1: return QueryKernel<Word, 2, false>;
    case 2: return QueryKernel<Word, 4, false>;
    case 3: return QueryKernel<Word, 8, false>;
    default: return QueryKernel<Word, 8, true>;
  }
}

Kernel KernelOf(Shape shape) {
  return shape.word == 0   ? KernelOf<float4>(shape.steps)
         : shape.word == 1 ? KernelOf<float2>(shape.steps)
                           : KernelOf<float>(shape.steps);
}

// Blocks of 256 threads that this device holds at once at best.
uint32_t ResidentBlocks() {
  static std::atomic<uint32_t> known[kMaxDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  uint32_t blocks = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (blocks != 0) return blocks;
  int threads = 0, processors = 0;
  cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  blocks = static_cast<uint32_t>(std::max(1, threads / kThreads * processors));
  if (device < kMaxDevices) known[device].store(blocks, std::memory_order_relaxed);
  return blocks;
}

// The widest word that all addresses allow, and as many lanes as a row has such words.
Shape ShapeOf(const QueryPart& part) {
  const uintptr_t alignment =
      reinterpret_cast<uintptr_t>(part.table.rows) | reinterpret_cast<uintptr_t>(part.output) | part.table.row_bytes;
  Shape shape;
  shape.word = alignment % 16 == 0 ? 0 : alignment % 8 == 0 ? 1 : 2;
  const uint32_t words = part.table.row_bytes / (16u >> shape.word);
  shape.steps = words <= 4 ? 0 : words <= 8 ? 1 : words <= 16 ? 2 : words <= 32 ? 3 : 4;
  return shape;
}

}  // namespace

int LaunchQuery(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, uint32_t stamp,
                cudaStream_t stream) {
  if (num_parts < 0 || num_parts > kMaxQueryParts || stamp == 0) return cudaErrorInvalidValue;
  QueryPlan plan;
  plan.workspace = workspace;
  plan.stamp = stamp;
  plan.num_parts = 0;
  const uint32_t resident = ResidentBlocks();
  uint64_t positions = 0, bytes = 0;
  for (int i = 0; i < num_parts; ++i) bytes += uint64_t{parts[i].count} * (parts[i].table.row_bytes + 64);
  uint32_t blocks = 0;
  bool uniform = true;
  for (int i = 0; i < num_parts; ++i) {
    const QueryPart& part = parts[i];
    if (part.table.row_bytes == 0 || part.table.row_bytes % 4 != 0 || part.table.num_buckets < kMinBuckets) {
      return cudaErrorInvalidValue;
    }
    if (part.count > 0) {
      PartPlan& next = plan.parts[plan.num_parts++];
      next.part = part;
      next.first_position = static_cast<uint32_t>(positions);
      next.first_block = blocks;
      next.shape = ShapeOf(part);
      uniform = uniform && next.shape == plan.parts[0].shape;
      // A fair part of the device, by bytes, and no more than there is to do.
      const uint64_t share = uint64_t{part.count} * (part.table.row_bytes + 64) * resident * kWaves / bytes;
      const uint64_t needed = (part.count + kThreads / 4 - 1) / (kThreads / 4);
      const uint64_t least = (part.count + kBlockKeys - 1) / kBlockKeys;
      next.blocks = static_cast<uint32_t>(std::min(needed, std::max(share, least)));
      blocks += next.blocks;
    }
    positions += part.count;
  }
  if (positions > workspace.max_positions) return cudaErrorInvalidValue;
  if (plan.num_parts == 0) {  // nothing to ask: the result must be published all the same
    PartPlan& nothing = plan.parts[plan.num_parts++];
    nothing = {};
    nothing.blocks = 1;
    nothing.part.table.row_bytes = 16;
    blocks = 1;
  }
  const Kernel kernel = uniform ? KernelOf(plan.parts[0].shape) : MixedQueryKernel;
  kernel<<<blocks, kThreads, 0, stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace hps::cuda
