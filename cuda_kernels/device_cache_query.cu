// The query: one launch for all tables of a call.
//
// A warp serves sixteen keys at a time. First two lanes look for each key, one half of its bucket each, so that a key
// is hashed twice and not thirty-two times; then all lanes copy the sixteen rows, with every load under way before the
// first store. What is rare (a second bucket, a missing key, a writer that was about) is decided by votes of the warp
// and done out of line. The kernel is bound by instructions as soon as it is not by memory; hence all this.
//
// Against writers: a warp that sees the table at rest before its first key and unchanged behind its last row (one word,
// CacheActivity) has met none. Where a writer was about, the warp looks at each bucket again after its row, and does
// single keys anew.
//
// Invariant of the dedup table: an entry is (stamp << 32) | position of the key's first occurrence; entries of older
// stamps are free.
//
// The grid is a few times what is resident at once, not as large as the batch, so that counting finished blocks costs
// little.

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_kernels/cache_rows.cuh"
#include "cuda_kernels/device_cache_access.cuh"
#include "cuda_kernels/resident_blocks.cuh"

namespace hps::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStepKeys = 16;        // of a warp at a time
constexpr uint32_t kWarpKeys = 128;  // at most so many keys go to one warp
// Blocks for each that is resident at once: one where the device has little to do (a second round would be a ragged
// one), many where there is enough, so that the end is less ragged.
constexpr uint64_t kManyWaves = 16;
constexpr uint64_t kEnoughRounds = 8;
constexpr int kAttempts =
    64;  // under writers that come again and again; then the key counts as missing, and is fetched

constexpr int kWideRows = 4;

// How the words of a row fit the lanes that copy it.
enum class Fit { kExact, kPartial, kWide };

// Which instance of the kernel serves a part.
struct Shape {
  uint8_t word = 0;    // 0: 16 bytes, 1: 8, 2: 4
  uint8_t lanes = 0;   // a row takes 4 << lanes lanes; kWideRows: all lanes, more than once
  bool exact = false;  // has as many words as lanes; told apart for the widest words alone
  bool plain = true;   // PlainRows, or AnyRows, which are never exact
  bool operator==(const Shape& other) const {
    return word == other.word && lanes == other.lanes && exact == other.exact && plain == other.plain;
  }
};

struct PartPlan {
  QueryPart part;
  uint32_t first_position;
  uint32_t first_block;
  uint32_t blocks;
  Shape shape;
};

// What a kernel is given. One part is a kernel of its own: a launch is slower by the bytes of its arguments, and what
// the compiler finds at fixed places it need not keep in registers.
template <int kMaxParts>
struct QueryPlan {
  QueryWorkspace workspace;
  uint32_t stamp;  // 0: nobody waits; missing keys are only counted
  uint32_t last;   // as many blocks have finished when this query has
  int num_parts;
  PartPlan parts[kMaxParts];

  __device__ __forceinline__ const PartPlan& PartOfBlock() const {
    int part = 0;
    if (kMaxParts > 1) {
      while (part + 1 < num_parts && blockIdx.x >= parts[part + 1].first_block) ++part;
    }
    return parts[part];
  }
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
    if (other < plan.part.count && plan.part.keys[uint64_t{other} * plan.part.key_stride] == key) {
      leader = static_cast<uint32_t>(seen);
      break;
    }
  }
  const uint32_t slot = atomicAdd(&workspace.counters[0], 1u);
  workspace.positions[slot] = position;
  workspace.leaders[slot] = leader;
}

using Warp = Tile<32>;

// The keys of a warp that need more than the common way: found nowhere, or met by a writer. In shared memory.
constexpr uint32_t kIsMissing = 0x80000000;
struct RareKeys {
  uint32_t entries[kWarpKeys];  // index in the part, and in the highest bit whether it is missing
};

template <typename Rows, typename Word>
__device__ void CopyRow(const CacheTable& table, uint32_t slot, Word* to, uint32_t words, int lane) {
#pragma unroll 1
  for (uint32_t word = lane; word < words; word += 32) {
    __stcs(to + word, Rows::template Load<Word>(table, slot, table.row_bytes, word));
  }
}

// kStrided: keys and rows need not be packed. So it is in kernels for several parts; a packed part alone has its own.

// The key of this lane's pair; behind the end the last one.
template <bool kStrided>
__device__ __forceinline__ int64_t LoadKey(const Warp& warp, const QueryPart& part, uint32_t base) {
  const uint32_t index = min(base + warp.lane / 2, part.count - 1);
  return __ldg(reinterpret_cast<const long long*>(part.keys) + (kStrided ? uint64_t{index} * part.key_stride : index));
}

// Words from one output row to the next.
template <typename Word, bool kStrided>
__device__ __forceinline__ uint32_t OutputStep(const QueryPart& part, uint32_t words) {
  return kStrided ? part.output_stride / static_cast<uint32_t>(sizeof(Word)) : words;
}

// Whether a bucket is not as it was at the first look; of a whole warp, which holds its quarters.
__device__ bool IsChanged(const Warp& warp, const CacheTable& table, uint64_t bucket, const BucketQuarter& before) {
  const BucketQuarter after = LoadQuarter(table.buckets + bucket, warp.quarter());
  return __any_sync(warp.mask, QuarterChanged(before, after, warp.quarter()));
}

// One key by the whole warp, as often as it takes: the way of the query where a writer was about. A table that is held
// whole has no other place to get the row from, so there it is never given up; writers finish, whoever waits for them.
template <typename Rows, typename Word>
__device__ bool QueryAgain(const Warp& warp, const CacheTable& table, int64_t key, Word* output) {
  const uint64_t hash = CacheHash(key);
#pragma unroll 1
  for (int attempt = 0; table.whole || attempt < kAttempts; ++attempt) {
    uint64_t bucket = FirstBucket(hash, table.num_buckets);
    BucketQuarter before = LoadQuarter(table.buckets + bucket, warp.quarter());
    int way = warp.WayOf(before, key);
    // Of two rows that change places one has its key nowhere for a moment.
    bool hidden = way < 0 && Rows::ChangePlaces(table) && IsChanged(warp, table, bucket, before);
    if (way < 0 && !hidden && (warp.StateOf(before) & kStateOverflowed)) {
      bucket = SecondBucket(hash, table.num_buckets);
      before = LoadQuarter(table.buckets + bucket, warp.quarter());
      way = warp.WayOf(before, key);
      hidden = way < 0 && Rows::ChangePlaces(table) && IsChanged(warp, table, bucket, before);
    }
    if (!hidden) {
      if (way < 0) return false;
      CopyRow<Rows>(table, static_cast<uint32_t>(bucket * kCacheWays + way), output, table.row_bytes / sizeof(Word),
                    warp.lane);
      if (!IsChanged(warp, table, bucket, before)) return true;
    }
    __nanosleep(100);
  }
  return false;
}

// Returns whether the key is missing; then its row is the default and it is listed, or counted where nobody waits.
template <typename Rows, typename Word, bool kStrided>
__device__ bool FinishRarely(const PartPlan& plan, uint32_t index, bool missing, const QueryWorkspace& workspace,
                             uint32_t stamp) {
  const QueryPart& part = plan.part;
  const Warp warp;
  const uint32_t words = part.table.row_bytes / sizeof(Word);
  const int64_t key = part.keys[kStrided ? uint64_t{index} * part.key_stride : index];
  Word* const output = static_cast<Word*>(part.output) + uint64_t{index} * OutputStep<Word, kStrided>(part, words);
  if ((!missing || Rows::ChangePlaces(part.table)) && QueryAgain<Rows, Word>(warp, part.table, key, output))
    return false;
#pragma unroll 1
  for (uint32_t word = warp.lane; word < words; word += 32) __stcs(output + word, Filled<Word>(part.default_value));
  if (warp.lane == 0) {
    if (stamp != 0) {
      AddMissing(plan, index, key, workspace, stamp);
    } else {
      atomicAdd(reinterpret_cast<unsigned long long*>(&part.table.activity->untold_missing), 1ull);
    }
  }
  return true;
}

// Copies the rows of the slots that the lanes 0, 2, 4, ... hold to the output rows from `base` on, as far as there are.
template <typename Rows, typename Word, int kRowLanes, Fit kFit, bool kBusy, bool kStrided>
__device__ __forceinline__ void CopyRows(const Warp& warp, const QueryPart& part, uint32_t slot, uint32_t base) {
  // Known to the compiler, a row's length costs no registers for addresses.
  const uint32_t row_bytes = kFit == Fit::kExact ? kRowLanes * sizeof(Word) : part.table.row_bytes;
  const uint32_t words = row_bytes / sizeof(Word);
  const uint32_t step = OutputStep<Word, kStrided>(part, words);
  if (kFit == Fit::kWide) {
#pragma unroll 1
    for (int row = 0; row < kStepKeys; ++row) {
      const uint32_t from = __shfl_sync(0xFFFFFFFF, slot, row * 2);
      if (base + row >= part.count) continue;
      CopyRow<Rows>(part.table, from, static_cast<Word*>(part.output) + uint64_t{base + row} * step, words, warp.lane);
    }
    return;
  }
  constexpr int kAll = kStepKeys * kRowLanes / 32;
  constexpr int kAtOnce = kBusy && kAll > 4 ? 4 : kAll;  // else the registers of this way would bind the common one
  constexpr int kRows = 32 / kRowLanes;                  // of one instruction
  const uint32_t word = warp.lane % kRowLanes;
  const uint32_t row = warp.lane / kRowLanes;
  const bool copies = kFit == Fit::kExact || word < words;
  Word* const output = static_cast<Word*>(part.output) + uint64_t{base + row} * step + word;
#pragma unroll 1
  for (int first = 0; first < kAll; first += kAtOnce) {
    Word values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t from = __shfl_sync(0xFFFFFFFF, slot, ((first + i) * kRows + row) * 2);
      if (copies) values[i] = Rows::template Load<Word>(part.table, from, row_bytes, word);
    }
    if (base + kStepKeys <= part.count) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (copies) __stcs(output + static_cast<uint32_t>((first + i) * kRows) * step, values[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t number = (first + i) * kRows;
        if (copies && base + row + number < part.count) __stcs(output + number * step, values[i]);
      }
    }
  }
}

// All keys of a warp, from `first` on; returns how many of them are in `rare`. kRowLanes lanes copy a row.
template <typename Rows, typename Word, int kRowLanes, Fit kFit, bool kBusy, bool kStrided>
__device__ __forceinline__ uint32_t QueryKeys(const PartPlan& plan, uint32_t first, int64_t key, RareKeys* rare) {
  const Warp warp;
  const CacheTable& table = plan.part.table;
  const uint32_t count = plan.part.count;
  const int half = warp.lane & 1;
  const uint32_t step = plan.blocks * (kWarps * kStepKeys);
  uint32_t num_rare = 0;
  const auto add = [&](uint32_t base, bool is_rare, uint32_t missing) {
    is_rare = is_rare && half == 0 && base + warp.lane / 2 < count;
    const unsigned all = __ballot_sync(0xFFFFFFFF, is_rare);
    if (all == 0) return;
    if (is_rare) rare->entries[num_rare + __popc(all & ((1u << warp.lane) - 1))] = (base + warp.lane / 2) | missing;
    num_rare += __popc(all);
  };
#pragma unroll 1
  for (uint32_t base = first; base < count; base += step) {
    if (base != first) key = LoadKey<kStrided>(warp, plan.part, base);
    const uint64_t hash = CacheHash(key);
    auto bucket = static_cast<uint32_t>(FirstBucket(hash, table.num_buckets));
    uint64_t state;  // in the second half
    int way = HalfWayOf(table.buckets + bucket, key, half, &state);
    const bool overflowed = half == 1 && (state & kStateOverflowed) != 0;
    if (__any_sync(0xFFFFFFFF, overflowed && way < 0)) {
      const unsigned all = __ballot_sync(0xFFFFFFFF, overflowed);
      const bool second = way < 0 && (all >> (warp.lane | 1) & 1);
      if (second) bucket = static_cast<uint32_t>(SecondBucket(hash, table.num_buckets));
      way = HalfWayOf(table.buckets + bucket, key, half, &state);
    }
    if (half == 1 && way >= 0 && Rows::LeavesMarks(table)) {
      const uint64_t bit = StateNextRef(state, way);
      if (bit != 0) atomicOr(StateAddress(table.buckets + bucket), bit);
    }
    add(base, way < 0, kIsMissing);
    // Missing keys copy row 0 at first, which is cheaper than leaving it out; their default comes later.
    CopyRows<Rows, Word, kRowLanes, kFit, kBusy, kStrided>(warp, plan.part, way < 0 ? 0 : bucket * kCacheWays + way,
                                                           base);
    if (kBusy) {
      const bool changed = HalfChanged(table.buckets + bucket, key, way, half, VersionOf(state));
      add(base, way >= 0 && changed, 0);
    }
  }
  return num_rare;
}

// Without looking twice where no writer is about.
template <typename Rows, typename Word, int kRowLanes, Fit kFit, bool kStrided>
__device__ __forceinline__ uint32_t QueryKeys(const PartPlan& plan, uint32_t block, RareKeys* rare) {
  const CacheActivity* const activity = plan.part.table.activity;
  const uint32_t first = (block * kThreads + threadIdx.x) / 32 * kStepKeys;
  const int64_t key = LoadKey<kStrided>(Warp(), plan.part, first);
  // The votes make the warp wait for these loads: for the first before it loads anything of the table, and before the
  // last one for the rows, whose stores went out.
  const uint64_t before = LoadActivity(activity);
  if (!__any_sync(0xFFFFFFFF, IsBusy(before))) {
    const uint32_t num_rare = QueryKeys<Rows, Word, kRowLanes, kFit, false, kStrided>(plan, first, key, rare);
    const uint64_t after = LoadActivity(activity);
    if (!__any_sync(0xFFFFFFFF, static_cast<uint32_t>(after) != static_cast<uint32_t>(before))) return num_rare;
  }
  __syncwarp();  // what the first round has put into `rare` counts no more
  return QueryKeys<Rows, Word, kRowLanes, kFit, true, kStrided>(plan, first,
                                                                LoadKey<kStrided>(Warp(), plan.part, first), rare);
}

// What the warp could not do in its stride. Returns whether a key is missing.
template <typename Rows, typename Word, bool kStrided>
__device__ bool FinishRare(const PartPlan& plan, const RareKeys& rare, uint32_t num_rare,
                           const QueryWorkspace& workspace, uint32_t stamp) {
  __syncwarp();
  bool missed = false;
#pragma unroll 1
  for (uint32_t i = 0; i < num_rare; ++i) {
    const uint32_t entry = rare.entries[i];
    missed |=
        FinishRarely<Rows, Word, kStrided>(plan, entry & ~kIsMissing, (entry & kIsMissing) != 0, workspace, stamp);
  }
  return missed;
}

// The last block to come here tells the host. Only what was listed as missing must be seen before that: the rows are
// ordered by the stream. So a block that has found all its keys needs no fence.
// One word counts finished blocks in its upper half, for ever and around, and those that have missed a key in its lower
// half, until that has been told. So a query that misses nothing ends with one access, and leaves nothing to be undone:
// who has been told uses the workspace anew, on any stream.
__device__ void PublishResult(const QueryWorkspace& workspace, uint32_t stamp, uint32_t last, bool missed) {
  missed = __syncthreads_or(missed);
  if (threadIdx.x != 0) return;
  if (missed) __threadfence_system();
  auto* const finished = reinterpret_cast<unsigned long long*>(workspace.counters + 2);
  const unsigned long long mine = (1ull << 32) + (missed ? 1 : 0);
  const unsigned long long all = atomicAdd(finished, mine) + mine;
  if (static_cast<uint32_t>(all >> 32) != last) return;
  uint32_t positions = 0;
  if (const auto blocks = static_cast<uint32_t>(all); blocks != 0) {
    atomicAdd(finished, 0ull - blocks);
    positions = atomicExch(&workspace.counters[0], 0u);
    *static_cast<volatile uint32_t*>(&workspace.result->missing_keys) = atomicExch(&workspace.counters[1], 0u);
    __threadfence_system();
  }
  *reinterpret_cast<volatile uint64_t*>(&workspace.result->done) = (static_cast<uint64_t>(stamp) << 32) | positions;
}

__global__ void PublishNothingKernel(QueryWorkspace workspace, uint32_t stamp, uint32_t last) {
  PublishResult(workspace, stamp, last, false);
}
int PublishNothing(const QueryWorkspace& workspace, uint32_t stamp, cudaStream_t stream) {
  PublishNothingKernel<<<1, 32, 0, stream>>>(workspace, stamp, *workspace.launched + 1);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) ++*workspace.launched;
  return error;
}

// Resident blocks that the compiler shall leave registers for; none of these makes it spill.
constexpr int MinBlocks(int row_lanes, Fit fit) {
  if (fit != Fit::kExact) return 1;
  return row_lanes == 4 ? 5 : row_lanes == 32 ? 2 : 4;
}

template <typename Rows, typename Word, int kRowLanes, Fit kFit, bool kStrided, typename Plan>
__device__ __forceinline__ bool RunPart(const PartPlan& part, const Plan& plan, RareKeys* rare) {
  RareKeys* const mine = &rare[threadIdx.x / 32];
  const uint32_t num_rare = QueryKeys<Rows, Word, kRowLanes, kFit, kStrided>(part, blockIdx.x - part.first_block, mine);
  return FinishRare<Rows, Word, kStrided>(part, *mine, num_rare, plan.workspace, plan.stamp);
}

// All parts of one shape.
template <typename Rows, typename Word, int kRowLanes, Fit kFit, int kMaxParts>
__global__ void __launch_bounds__(kThreads, MinBlocks(kRowLanes, kFit))
    QueryKernel(const __grid_constant__ QueryPlan<kMaxParts> plan) {
  __shared__ RareKeys rare[kWarps];
  const bool missed = RunPart<Rows, Word, kRowLanes, kFit, (kMaxParts > 1)>(plan.PartOfBlock(), plan, rare);
  if (plan.stamp != 0) PublishResult(plan.workspace, plan.stamp, plan.last, missed);
}

template <typename Rows, typename Word, typename Plan>
__device__ bool RunAnyPart(const PartPlan& part, const Plan& plan, RareKeys* rare) {
  switch (part.shape.lanes) {  // a kernel for rare calls: no exact rows
    case 0: return RunPart<Rows, Word, 4, Fit::kPartial, true>(part, plan, rare);
    case 1: return RunPart<Rows, Word, 8, Fit::kPartial, true>(part, plan, rare);
    case 2: return RunPart<Rows, Word, 16, Fit::kPartial, true>(part, plan, rare);
    case 3: return RunPart<Rows, Word, 32, Fit::kPartial, true>(part, plan, rare);
    default: return RunPart<Rows, Word, 32, Fit::kWide, true>(part, plan, rare);
  }
}

template <typename Rows, typename Plan>
__device__ bool RunAnyPart(const PartPlan& part, const Plan& plan, RareKeys* rare) {
  return part.shape.word == 0   ? RunAnyPart<Rows, float4>(part, plan, rare)
         : part.shape.word == 1 ? RunAnyPart<Rows, float2>(part, plan, rare)
                                : RunAnyPart<Rows, float>(part, plan, rare);
}

using AnyPlan = QueryPlan<kMaxQueryParts>;

__global__ void __launch_bounds__(kThreads) MixedQueryKernel(const __grid_constant__ AnyPlan plan) {
  __shared__ RareKeys rare[kWarps];
  const PartPlan& part = plan.PartOfBlock();
  const bool missed =
      part.shape.plain ? RunAnyPart<PlainRows>(part, plan, rare) : RunAnyPart<AnyRows>(part, plan, rare);
  if (plan.stamp != 0) PublishResult(plan.workspace, plan.stamp, plan.last, missed);
}

template <int kMaxParts>
using Kernel = void (*)(QueryPlan<kMaxParts>);

template <typename Rows, typename Word, Fit kFit, int kMaxParts>
Kernel<kMaxParts> KernelOf(int lanes) {
  switch (lanes) {
    case 0: return QueryKernel<Rows, Word, 4, kFit, kMaxParts>;
    case 1: return QueryKernel<Rows, Word, 8, kFit, kMaxParts>;
    case 2: return QueryKernel<Rows, Word, 16, kFit, kMaxParts>;
    case 3: return QueryKernel<Rows, Word, 32, kFit, kMaxParts>;
    default: return QueryKernel<Rows, Word, 32, Fit::kWide, kMaxParts>;
  }
}

template <typename Rows, int kMaxParts>
Kernel<kMaxParts> KernelOf(Shape shape) {
  return shape.word == 0   ? KernelOf<Rows, float4, Fit::kPartial, kMaxParts>(shape.lanes)
         : shape.word == 1 ? KernelOf<Rows, float2, Fit::kPartial, kMaxParts>(shape.lanes)
                           : KernelOf<Rows, float, Fit::kPartial, kMaxParts>(shape.lanes);
}

// The kernel of one shape and its number. Several tables whose rows are not plain take the kernel of mixed calls.
constexpr int kMixedKernel = 40;
constexpr int kNumKernels = 56;
template <int kMaxParts>
Kernel<kMaxParts> KernelOf(Shape shape, bool uniform, int* number) {
  if constexpr (kMaxParts > 1) {
    if (!uniform || !shape.plain) {
      *number = kMixedKernel;
      return MixedQueryKernel;
    }
  } else if (!shape.plain) {
    *number = kMixedKernel + 1 + shape.word * 5 + shape.lanes;
    return KernelOf<AnyRows, kMaxParts>(shape);
  }
  *number = (kMaxParts == 1 ? 0 : 20) + (shape.exact ? 3 : shape.word) * 5 + shape.lanes;
  return shape.exact ? KernelOf<PlainRows, float4, Fit::kExact, kMaxParts>(shape.lanes)
                     : KernelOf<PlainRows, kMaxParts>(shape);
}

ResidentBlocks<kNumKernels, kThreads> resident_blocks;

// The widest word that all addresses allow, and as many lanes as a row has such words.
Shape ShapeOf(const QueryPart& part) {
  const uintptr_t alignment = RowAlignment(part.table) | reinterpret_cast<uintptr_t>(part.output) | OutputStride(part);
  Shape shape;
  shape.plain = HasPlainRows(part.table);
  shape.word = alignment % 16 == 0 ? 0 : alignment % 8 == 0 ? 1 : 2;
  const uint32_t words = part.table.row_bytes / (16u >> shape.word);
  shape.lanes = words <= 4 ? 0 : words <= 8 ? 1 : words <= 16 ? 2 : words <= 32 ? 3 : kWideRows;
  shape.exact = shape.plain && shape.word == 0 && shape.lanes < kWideRows && words == 4u << shape.lanes;
  return shape;
}

template <int kMaxParts>
int Launch(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, uint32_t stamp,
           cudaStream_t stream) {
  QueryPlan<kMaxParts> plan;
  plan.workspace = workspace;
  plan.stamp = stamp;
  plan.num_parts = 0;
  uint64_t positions = 0, bytes = 0;
  bool uniform = true;
  for (int i = 0; i < num_parts; ++i) {
    const QueryPart& part = parts[i];
    if (part.count > 0) {
      PartPlan& next = plan.parts[plan.num_parts++];
      next.part = part;
      next.part.output_stride = OutputStride(part);
      next.first_position = static_cast<uint32_t>(positions);
      next.shape = ShapeOf(part);
      uniform = uniform && next.shape == plan.parts[0].shape;
      bytes += uint64_t{part.count} * (part.table.row_bytes + 64);
    }
    positions += part.count;
  }
  if (plan.num_parts == 0) return stamp == 0 ? 0 : PublishNothing(workspace, stamp, stream);
  int number = 0;
  const Kernel<kMaxParts> kernel = KernelOf<kMaxParts>(plan.parts[0].shape, uniform, &number);
  const uint64_t resident = resident_blocks.Of(reinterpret_cast<const void*>(kernel), number);
  const bool enough = positions >= kEnoughRounds * resident * kWarps * kStepKeys;
  const uint64_t wanted = resident * (enough ? kManyWaves : 1);
  uint32_t blocks = 0;
  for (int i = 0; i < plan.num_parts; ++i) {
    PartPlan& next = plan.parts[i];
    // A fair part of the device, by bytes, and no more than there is to do.
    const uint64_t count = next.part.count;
    const uint64_t share = count * (next.part.table.row_bytes + 64) * wanted / bytes;
    const uint64_t needed = (count + kWarps * kStepKeys - 1) / (kWarps * kStepKeys);
    const uint64_t least = (count + kWarps * kWarpKeys - 1) / (kWarps * kWarpKeys);
    next.first_block = blocks;
    next.blocks = static_cast<uint32_t>(std::min(needed, std::max(share, least)));
    blocks += next.blocks;
  }
  plan.last = stamp == 0 ? 0 : *workspace.launched + blocks;
  kernel<<<blocks, kThreads, 0, stream>>>(plan);
  const cudaError_t error = cudaGetLastError();
  if (stamp != 0 && error == cudaSuccess) *workspace.launched = plan.last;
  return error;
}

bool IsPacked(const QueryPart& part) { return part.key_stride == 1 && OutputStride(part) == part.table.row_bytes; }

int LaunchAny(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, uint32_t stamp,
              cudaStream_t stream) {
  if (num_parts < 0 || num_parts > kMaxQueryParts) return cudaErrorInvalidValue;
  for (int i = 0; i < num_parts; ++i) {
    if (!IsValid(parts[i].table)) return cudaErrorInvalidValue;
    const uint32_t stride = OutputStride(parts[i]);
    if (parts[i].key_stride == 0 || stride < parts[i].table.row_bytes || stride % 4 != 0) return cudaErrorInvalidValue;
  }
  return num_parts == 1 && IsPacked(parts[0]) ? Launch<1>(parts, 1, workspace, stamp, stream)
                                              : Launch<kMaxQueryParts>(parts, num_parts, workspace, stamp, stream);
}

}  // namespace

int LaunchQuery(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, uint32_t stamp,
                cudaStream_t stream) {
  if (stamp == 0 || workspace.launched == nullptr) return cudaErrorInvalidValue;
  uint64_t positions = 0;
  for (int i = 0; i < num_parts; ++i) positions += parts[i].count;
  if (positions > workspace.max_positions) return cudaErrorInvalidValue;
  return LaunchAny(parts, num_parts, workspace, stamp, stream);
}

int LaunchUntoldQuery(const QueryPart* parts, int num_parts, cudaStream_t stream) {
  return LaunchAny(parts, num_parts, QueryWorkspace(), 0, stream);
}

}  // namespace hps::cuda
