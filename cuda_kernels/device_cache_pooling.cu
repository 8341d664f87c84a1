// The pooled query: rows are found and added up in one launch, and written nowhere.
//
// A warp takes as many output rows at a time as its lanes can add up side by side, a lane for each word of each row.
// The keys of all of them lie one after the other, whichever row they belong to: first all lanes look for the keys of a
// window, sixteen or more at once as in the query, and leave the places of the rows in shared memory; then each lane
// walks over its row's keys with eight loads under way.
//
// Against writers: as the query, by CacheActivity, for all output rows of a warp together. Where a writer was about the
// warp does them anew, and looks at the buckets of each window again when its rows have been added. Rows that take more
// than one pass, of more keys than a window holds, and rows that writers do not leave alone count as missing then: the
// host looks such keys up one by one.
//
// Segments are not trusted. A mistake is noted, what it leads to is cut off, and a warp that has met one, or that finds
// one noted between two windows, leaves its rows alone.

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_kernels/cache_rows.cuh"
#include "cuda_kernels/device_cache_access.cuh"
#include "cuda_kernels/pooling_sums.cuh"
#include "cuda_kernels/resident_blocks.cuh"

namespace hps::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kResidentWarps = 24;  // of a multiprocessor, that the compiler shall leave registers for
constexpr uint32_t kProbes = 2;     // of a pair of lanes at once
constexpr uint32_t kStepKeys = 16 * kProbes;
constexpr uint32_t kWindow = 256;
constexpr uint64_t kRounds = 2;     // at least so many turns of each warp, if output rows can be dealt out so
constexpr uint64_t kTurnKeys = 64;  // about so many keys in a turn of a warp, if output rows have fewer
constexpr int kAttempts = 16;
constexpr uint32_t kNowhere = ~uint32_t{0};
constexpr uint64_t kManyWaves = 2;  // blocks for each that is resident at once, where there is enough to do
constexpr uint64_t kEnoughRounds = 8;

// Which instance of the kernel serves a part.
struct Shape {
  bool wide_word = false;  // 16 bytes, or 4
  int lanes = 32;          // of a row
  bool passes = false;     // a row has more words than lanes
  bool weighted = false;
  bool plain = true;  // PlainRows, or AnyRows
  bool operator==(const Shape& other) const {
    return wide_word == other.wide_word && lanes == other.lanes && passes == other.passes &&
           weighted == other.weighted && plain == other.plain;
  }
  // Where there are too few output rows to fill the device: all loads of an output row under way at once.
  bool CanHurry() const { return wide_word && !passes && !weighted && plain; }
};

struct PartPlan {
  PooledPart part;
  uint32_t number;  // among the parts of the call
  uint32_t first_block;
  uint32_t blocks;
  uint32_t group_rows;  // output rows of a warp's turn, at most 31
  bool aligned;         // output rows begin at multiples of 16
};

template <int kMaxParts>
struct PooledPlan {
  PooledWorkspace workspace;
  uint32_t stamp;  // 0: another launch of the call will tell
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

// Of one warp, in shared memory: for each key of a window the place of its row, and the version of its bucket.
struct Window {
  uint32_t slots[kWindow];
  uint32_t versions[kWindow];
};

// The output rows of a warp's turn, and their keys [first, last).
struct Group {
  uint32_t first_row, num_rows;
  uint32_t first, last;
  uint32_t split;  // of row first_row + lane, between first and last
};

__device__ __forceinline__ int64_t LoadKey(const QueryPart& query, uint32_t i) {
  return __ldg(reinterpret_cast<const long long*>(query.keys) + i);
}

// Finds the keys [first, last); returns how many are nowhere. By a whole warp.
template <bool kBusy>
__device__ __forceinline__ uint32_t FindKeys(const QueryPart& query, uint32_t first, uint32_t last, Window* window,
                                             bool marks) {
  const CacheTable& table = query.table;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int half = lane & 1;
  uint32_t missing = 0;
#pragma unroll 1
  for (uint32_t base = first; base < last; base += kStepKeys) {
    int64_t keys[kProbes];
    uint64_t hashes[kProbes];
    uint32_t buckets[kProbes];
    BucketHalf halves[kProbes];
#pragma unroll
    for (uint32_t p = 0; p < kProbes; ++p) keys[p] = LoadKey(query, min(base + 16 * p + lane / 2, last - 1));
#pragma unroll
    for (uint32_t p = 0; p < kProbes; ++p) {
      hashes[p] = CacheHash(keys[p]);
      buckets[p] = static_cast<uint32_t>(FirstBucket(hashes[p], table.num_buckets));
      halves[p] = LoadHalf(table.buckets + buckets[p], half);
    }
#pragma unroll
    for (uint32_t p = 0; p < kProbes; ++p) {
      const uint32_t i = base + 16 * p + lane / 2;
      uint64_t state = halves[p].high.high;  // in the second half
      int way = HalfWayIn(halves[p], keys[p], half);
      const bool overflowed = half == 1 && (state & kStateOverflowed) != 0;
      if (__any_sync(0xFFFFFFFF, overflowed && way < 0)) {
        const unsigned all = __ballot_sync(0xFFFFFFFF, overflowed);
        const bool second = way < 0 && (all >> (lane | 1) & 1);
        if (second) buckets[p] = static_cast<uint32_t>(SecondBucket(hashes[p], table.num_buckets));
        way = HalfWayOf(table.buckets + buckets[p], keys[p], half, &state);
      }
      if (half == 1 && way >= 0 && marks) {
        const uint64_t bit = StateNextRef(state, way);
        if (bit != 0) atomicOr(StateAddress(table.buckets + buckets[p]), bit);
      }
      const bool counts = i < last;
      missing += __popc(__ballot_sync(0xFFFFFFFF, counts && half == 0 && way < 0));
      if (counts && half == 0) window->slots[i - first] = way < 0 ? kNowhere : buckets[p] * kCacheWays + way;
      if (kBusy && counts && half == 1) window->versions[i - first] = VersionOf(state);
    }
  }
  return missing;
}

// Whether the buckets of the keys [first, last) are as they were found. By a whole warp.
__device__ bool AreUnchanged(const QueryPart& query, uint32_t first, uint32_t last, const Window& window) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  bool changed = false;
#pragma unroll 1
  for (uint32_t base = first; base < last; base += 16) {
    const uint32_t i = min(base + lane / 2, last - 1);
    const uint32_t slot = window.slots[i - first];
    const int way = slot == kNowhere ? -1 : static_cast<int>(slot % kCacheWays);
    changed |= HalfChanged(query.table.buckets + (way < 0 ? 0 : slot / kCacheWays), LoadKey(query, i), way, lane & 1,
                           window.versions[i - first]);
  }
  return !__any_sync(0xFFFFFFFF, changed);
}

// Writes the output rows of a group; returns false where a writer was met. *missing: keys that are nowhere.
template <typename Rows, typename Word, int kLanes, bool kPasses, bool kWeighted, int kChunks, bool kBusy>
__device__ __forceinline__ bool AddGroup(const PartPlan& plan, const Group& group, const PooledWorkspace& workspace,
                                         Window* window, uint32_t* missing) {
  const PooledPart& part = plan.part;
  const CacheTable& table = part.query.table;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const uint32_t words = table.row_bytes / sizeof(Word);
  const auto split_of = [&](uint32_t row) { return __shfl_sync(0xFFFFFFFF, group.split, min(row, group.num_rows)); };
  const auto find = [&](uint32_t first, uint32_t last, bool marks) {
    __syncwarp();
    const uint32_t nowhere = FindKeys<kBusy>(part.query, first, last, window, marks && Rows::LeavesMarks(table));
    __syncwarp();
    return nowhere;
  };
  const auto unchanged = [&](uint32_t first, uint32_t last) {
    __threadfence();  // the rows have arrived
    __syncwarp();
    return AreUnchanged(part.query, first, last, *window);
  };
  const bool fits = group.last - group.first <= kWindow;
  if (kPasses && kBusy && !fits) return false;
  *missing = fits ? find(group.first, group.last, true) : 0;
#pragma unroll 1
  for (uint32_t side = 0; side < group.num_rows; side += 32 / kLanes) {
    const uint32_t row = side + lane / kLanes;
    const uint32_t begin = split_of(row);
    const uint32_t end = max(begin, split_of(row + 1));
    const uint32_t from = fits ? group.first : split_of(side);
    const uint32_t to = fits ? group.last : max(from, split_of(side + 32 / kLanes));
#pragma unroll 1
    for (uint32_t pass = 0; pass == 0 || (kPasses && pass < words); pass += kLanes) {
      const uint32_t word = pass + lane % kLanes;
      const bool adds = row < group.num_rows && word < words;
      RowSum<Word, kWeighted, kChunks> sum;
      sum.Begin(part.pooling, end - begin);
#pragma unroll 1
      for (uint32_t first = from;;) {
        const uint32_t last = min(first + kWindow, to);
        if (!fits) {
          const uint32_t nowhere = find(first, last, pass == 0);
          if (pass == 0) *missing += nowhere;
        }
        if (adds) {
          const typename Rows::template Column<Word> column(table, word);
          sum.Add(max(begin, first), min(end, last), part.weights, [&](uint32_t i, bool wanted) {
            Word value;
#pragma unroll
            for (int e = 0; e < static_cast<int>(sizeof(Word) / sizeof(float)); ++e) {
              ElementOf(value, e) = part.query.default_value;
            }
            const uint32_t slot = wanted ? window->slots[i - first] : kNowhere;
            if (slot != kNowhere) value = column.Load(table, slot);
            return value;
          });
        }
        if (kBusy && !fits && !unchanged(first, last)) return false;
        first = last;
        if (first >= to) break;
        const uint64_t noted = LoadWord(&workspace.words[1]);
        if (__any_sync(0xFFFFFFFF, noted != 0)) return true;
      }
      if (adds) {
        float* const output = part.output + uint64_t{group.first_row + row} * (table.row_bytes / sizeof(float));
        StoreWord(output, word, sum.Result(), plan.aligned);
      }
    }
  }
  return !kBusy || !fits || unchanged(group.first, group.last);
}

// Returns false, and notes it, where its splits are wrong.
__device__ __forceinline__ bool MakeGroup(const PartPlan& plan, uint32_t number, const PooledWorkspace& workspace,
                                          Group* group) {
  const PooledPart& part = plan.part;
  const uint32_t lane = threadIdx.x & 31;
  const auto* const splits = reinterpret_cast<const long long*>(part.row_splits);
  group->first_row = number * plan.group_rows;
  group->num_rows = min(plan.group_rows, part.rows - group->first_row);
  const int64_t split = __ldg(splits + group->first_row + min(lane, group->num_rows));
  if (!part.from_indices) {
    const int64_t before = __shfl_up_sync(0xFFFFFFFF, static_cast<long long>(split), 1);
    bool wrong = false;
    if (lane > 0 && split < before) {
      wrong = true;
      NoteMistake(workspace, Mistake::kSplitsDescend, plan.number, uint64_t{group->first_row} + lane);
    }
    if (number == 0 && lane == 0 && (split != 0 || __ldg(splits + part.rows) != int64_t{part.query.count})) {
      wrong = true;
      NoteMistake(workspace, Mistake::kEnds, plan.number, 0);
    }
    if (__any_sync(0xFFFFFFFF, wrong)) return false;
  }
  const uint32_t clamped = ClampSplit(split, 0, part.query.count);
  group->first = __shfl_sync(0xFFFFFFFF, clamped, 0);
  group->last = max(group->first, __shfl_sync(0xFFFFFFFF, clamped, group->num_rows));
  group->split = min(max(clamped, group->first), group->last);
  return true;
}

// Returns how many positions are to be told as missing; the same in all lanes.
template <typename Rows, typename Word, int kLanes, bool kPasses, bool kWeighted, int kChunks>
__device__ __forceinline__ uint32_t RunPart(const PartPlan& plan, const PooledWorkspace& workspace, Window* window) {
  const PooledPart& part = plan.part;
  const CacheActivity* const activity = part.query.table.activity;
  const uint32_t groups = part.rows == 0 ? 1 : (part.rows - 1) / plan.group_rows + 1;
  uint32_t nowhere = 0, told = 0;
#pragma unroll 1
  for (uint32_t number = (blockIdx.x - plan.first_block) * kWarps + threadIdx.x / 32; number < groups;
       number += plan.blocks * kWarps) {
    const uint64_t before = LoadActivity(activity);
    Group group;
    if (!MakeGroup(plan, number, workspace, &group)) continue;
    uint32_t missing = 0;
    bool done = false;
    if (!__any_sync(0xFFFFFFFF, IsBusy(before))) {
      AddGroup<Rows, Word, kLanes, kPasses, kWeighted, kChunks, false>(plan, group, workspace, window, &missing);
      const uint64_t after = LoadActivity(activity);
      done = !__any_sync(0xFFFFFFFF, static_cast<uint32_t>(after) != static_cast<uint32_t>(before));
    }
#pragma unroll 1
    for (int attempt = 0; !done && attempt < kAttempts; ++attempt) {
      if (attempt > 0) __nanosleep(200);
      done = AddGroup<Rows, Word, kLanes, kPasses, kWeighted, 1, true>(plan, group, workspace, window, &missing);
      // Of two rows that change places one has its key nowhere for a moment.
      if (missing != 0 && Rows::ChangePlaces(part.query.table)) done = false;
    }
    if (!done) {
      missing = 0;
      told += 1;
    }
    nowhere += missing;
  }
  if (!part.query.table.whole) return told + nowhere;
  if (nowhere != 0 && (threadIdx.x & 31) == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&part.query.table.activity->untold_missing),
              static_cast<unsigned long long>(nowhere));
  }
  return told;
}

// The last block of the call's last launch tells the host. Who has something to tell fences before it comes here.
__device__ void Publish(const PooledWorkspace& workspace, uint32_t stamp, uint32_t blocks) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (atomicAdd(&workspace.counters[1], 1u) != blocks - 1) return;
  const uint32_t counted = atomicExch(&workspace.counters[1], 0u);
  if (stamp == 0) return;
  auto* const words = reinterpret_cast<unsigned long long*>(workspace.words);
  const uint32_t missing = atomicExch(&workspace.counters[0], 0u);
  const uint64_t noted = atomicExch(&words[1], 0ull);
  const uint64_t parts = missing != 0 ? atomicExch(&words[0], 0ull) : 0;
  // Made of what the atomics have returned: who has been told uses the workspace anew, on any stream.
  uint64_t told = (missing + (counted - blocks)) & ~kHasMistake;
  if (noted != 0) told |= kHasMistake;
  if (told != 0) {
    *static_cast<volatile uint64_t*>(&workspace.result->missing_parts) = parts;
    *static_cast<volatile uint64_t*>(&workspace.result->mistake) = noted == 0 ? 0 : ~noted;
    __threadfence_system();
  }
  *static_cast<volatile uint64_t*>(&workspace.result->done) = (uint64_t{stamp} << 32) | told;
}

template <typename Rows, typename Word, int kLanes, bool kPasses, bool kWeighted, int kMaxParts, int kChunks = 1>
__global__ void __launch_bounds__(kThreads, (kWeighted || kChunks > 1 ? 16 : kResidentWarps) / kWarps)
    PooledKernel(const __grid_constant__ PooledPlan<kMaxParts> plan) {
  __shared__ Window windows[kWarps];
  const PartPlan& part = plan.PartOfBlock();
  const uint32_t told =
      RunPart<Rows, Word, kLanes, kPasses, kWeighted, kChunks>(part, plan.workspace, &windows[threadIdx.x / 32]);
  if (told != 0 && (threadIdx.x & 31) == 0) {
    atomicAdd(&plan.workspace.counters[0], told);
    atomicOr(reinterpret_cast<unsigned long long*>(&plan.workspace.words[0]), 1ull << part.number);
    __threadfence();
  }
  Publish(plan.workspace, plan.stamp, gridDim.x);
}

template <int kMaxParts>
using Kernel = void (*)(PooledPlan<kMaxParts>);

template <typename Rows, int kMaxParts, bool kWeighted>
Kernel<kMaxParts> KernelOf(const Shape& shape, int* number) {
  if (!shape.wide_word) {
    *number = shape.passes ? 1 : shape.lanes == 4 ? 2 : 0;
    return shape.passes       ? PooledKernel<Rows, float, 32, true, kWeighted, kMaxParts>
           : shape.lanes == 4 ? PooledKernel<Rows, float, 4, false, kWeighted, kMaxParts>
                              : PooledKernel<Rows, float, 32, false, kWeighted, kMaxParts>;
  }
  *number = shape.passes ? 3 : shape.lanes == 4 ? 4 : shape.lanes == 8 ? 5 : shape.lanes == 16 ? 6 : 7;
  return shape.passes        ? PooledKernel<Rows, float4, 32, true, kWeighted, kMaxParts>
         : shape.lanes == 4  ? PooledKernel<Rows, float4, 4, false, kWeighted, kMaxParts>
         : shape.lanes == 8  ? PooledKernel<Rows, float4, 8, false, kWeighted, kMaxParts>
         : shape.lanes == 16 ? PooledKernel<Rows, float4, 16, false, kWeighted, kMaxParts>
                             : PooledKernel<Rows, float4, 32, false, kWeighted, kMaxParts>;
}

template <int kMaxParts>
Kernel<kMaxParts> HurryingKernelOf(const Shape& shape, int* number) {
  *number = shape.lanes <= 8 ? 0 : shape.lanes == 16 ? 1 : 2;
  return shape.lanes <= 8    ? PooledKernel<PlainRows, float, 32, false, false, kMaxParts, 4>
         : shape.lanes == 16 ? PooledKernel<PlainRows, float4, 16, false, false, kMaxParts, 2>
                             : PooledKernel<PlainRows, float4, 32, false, false, kMaxParts, 2>;
}

constexpr int kNumKernels = 46;
ResidentBlocks<kNumKernels, kThreads> resident_blocks;

Shape ShapeOf(const PooledPart& part) {
  Shape shape;
  const uint32_t row_bytes = part.query.table.row_bytes;
  shape.wide_word = row_bytes % sizeof(float4) == 0;
  const uint32_t words = row_bytes / (shape.wide_word ? sizeof(float4) : sizeof(float));
  shape.lanes = words <= 4 ? 4 : !shape.wide_word ? 32 : words <= 8 ? 8 : words <= 16 ? 16 : 32;
  shape.passes = words > 32;
  shape.weighted = part.weights != nullptr;
  shape.plain = HasPlainRows(part.query.table);
  return shape;
}

// Those of the parts that have the shape.
template <int kMaxParts>
int Launch(const PooledPart* parts, int num_parts, const Shape& shape, const PooledWorkspace& workspace, uint32_t stamp,
           cudaStream_t stream) {
  PooledPlan<kMaxParts> plan;
  plan.workspace = workspace;
  plan.stamp = stamp;
  plan.num_parts = 0;
  uint64_t bytes = 0, rows = 0, keys = 0;
  const auto bytes_of = [](const PooledPart& part) {
    return uint64_t{part.query.count} * (part.query.table.row_bytes + 64) + part.rows * uint64_t{64} + 64;
  };
  for (int i = 0; i < num_parts; ++i) {
    if (!(ShapeOf(parts[i]) == shape)) continue;
    PartPlan& next = plan.parts[plan.num_parts++];
    next.part = parts[i];
    next.number = static_cast<uint32_t>(i);
    next.aligned = IsAligned(parts[i]);
    bytes += bytes_of(parts[i]);
    rows += parts[i].rows;
    keys += parts[i].query.count;
  }
  int number = 0;
  Kernel<kMaxParts> kernel = nullptr;
  uint64_t resident = 0;
  uint32_t group_rows = 1;
  if (shape.CanHurry()) {
    kernel = HurryingKernelOf<kMaxParts>(shape, &number);
    resident = resident_blocks.Of(reinterpret_cast<const void*>(kernel), 24 + number + (kMaxParts == 1 ? 0 : 3));
  }
  if (kernel == nullptr || rows > resident * kWarps) {
    if constexpr (kMaxParts == 1) {
      kernel = KernelOf<PlainRows, 1, false>(shape, &number);
    } else if (shape.plain) {
      kernel = shape.weighted ? KernelOf<PlainRows, kMaxParts, true>(shape, &number)
                              : KernelOf<PlainRows, kMaxParts, false>(shape, &number);
      number += shape.weighted ? 16 : 8;
    } else {
      kernel = shape.weighted ? KernelOf<AnyRows, kMaxParts, true>(shape, &number)
                              : KernelOf<AnyRows, kMaxParts, false>(shape, &number);
      number += shape.weighted ? 38 : 30;
    }
    resident = resident_blocks.Of(reinterpret_cast<const void*>(kernel), number);
    // Side by side, and one after the other as well where they have few keys; but fewer where there are not enough of
    // them to keep every warp busy for some rounds.
    const uint32_t side = 32 / static_cast<uint32_t>(shape.lanes);
    const uint64_t turns = std::max<uint64_t>(kTurnKeys * rows / ((keys + rows + 1) * side), 1);
    group_rows = static_cast<uint32_t>(std::min<uint64_t>(turns * side, 31 / side * side));
    while (group_rows > 1 && rows < kRounds * resident * kWarps * group_rows) group_rows /= 2;
  }
  const bool enough = rows >= kEnoughRounds * resident * kWarps * group_rows;
  const uint64_t wanted = resident * (enough ? kManyWaves : 1);
  uint32_t blocks = 0;
  for (int i = 0; i < plan.num_parts; ++i) {
    PartPlan& next = plan.parts[i];
    next.group_rows = group_rows;
    const uint64_t groups = std::max<uint64_t>((uint64_t{next.part.rows} + group_rows - 1) / group_rows, 1);
    const uint64_t share = bytes_of(next.part) * wanted / bytes;
    next.first_block = blocks;
    next.blocks = static_cast<uint32_t>(std::min((groups + kWarps - 1) / kWarps, std::max<uint64_t>(share, 1)));
    blocks += next.blocks;
  }
  kernel<<<blocks, kThreads, 0, stream>>>(plan);
  return cudaGetLastError();
}

__global__ void PublishNothingKernel(PooledWorkspace workspace, uint32_t stamp) { Publish(workspace, stamp, 1); }

}  // namespace

int LaunchPooledQuery(const PooledPart* parts, int num_parts, const PooledWorkspace& workspace, uint32_t stamp,
                      cudaStream_t stream) {
  if (stamp == 0 || num_parts < 0 || num_parts > kMaxQueryParts) return cudaErrorInvalidValue;
  uint64_t positions = 0;
  for (int i = 0; i < num_parts; ++i) {
    if (!IsValid(parts[i].query.table)) return cudaErrorInvalidValue;
    positions += parts[i].query.count;
  }
  if (positions >= kHasMistake) return cudaErrorInvalidValue;
  if (num_parts == 0) {
    PublishNothingKernel<<<1, 32, 0, stream>>>(workspace, stamp);
    return cudaGetLastError();
  }
  // One launch for each shape, which is one as long as the tables are alike.
  Shape shapes[kMaxQueryParts];
  int num_shapes = 0;
  for (int i = 0; i < num_parts; ++i) {
    const Shape shape = ShapeOf(parts[i]);
    if (std::find(shapes, shapes + num_shapes, shape) == shapes + num_shapes) shapes[num_shapes++] = shape;
  }
  for (int i = 0; i < num_shapes; ++i) {
    const uint32_t tells = i + 1 == num_shapes ? stamp : 0;
    const int error = num_parts == 1 && !shapes[i].weighted && shapes[i].plain
                          ? Launch<1>(parts, 1, shapes[i], workspace, tells, stream)
                          : Launch<kMaxQueryParts>(parts, num_parts, shapes[i], workspace, tells, stream);
    if (error != 0) return error;
  }
  return cudaSuccess;
}

}  // namespace hps::cuda
