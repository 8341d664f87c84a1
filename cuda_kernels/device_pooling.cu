// What pooled lookups need beside the cache's own kernel: int32 keys, segments from indices, and sums of rows that lie
// one after the other. Grid-stride loops; the blocks of a launch are dealt out to its parts.

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_kernels/pooling_sums.cuh"

namespace hps::cuda {
namespace {

constexpr int kThreads = 256;
constexpr uint64_t kMaxBlocks = 2048;  // of a part

template <typename Part>
struct Parts {
  int num_parts = 0;
  struct Planned {
    Part part;
    uint32_t first_block;
  } parts[kMaxQueryParts];

  __device__ const Part& OfBlock(uint64_t* thread, uint64_t* threads) const {
    int i = 0;
    while (i + 1 < num_parts && blockIdx.x >= parts[i + 1].first_block) ++i;
    const uint32_t end = i + 1 < num_parts ? parts[i + 1].first_block : gridDim.x;
    *thread = uint64_t{blockIdx.x - parts[i].first_block} * kThreads + threadIdx.x;
    *threads = uint64_t{end - parts[i].first_block} * kThreads;
    return parts[i].part;
  }
};

// Adds a part of so many threads' work; returns the blocks so far.
template <typename Part>
uint32_t Deal(Parts<Part>* plan, const Part& part, uint64_t work, uint32_t blocks) {
  plan->parts[plan->num_parts++] = {part, blocks};
  return blocks + static_cast<uint32_t>(std::min<uint64_t>((work + kThreads - 1) / kThreads, kMaxBlocks));
}

__global__ void __launch_bounds__(kThreads) WidenKernel(const __grid_constant__ Parts<WidenPart> plan) {
  uint64_t thread, threads;
  const WidenPart& part = plan.OfBlock(&thread, &threads);
  for (uint64_t i = thread; i < part.count; i += threads) part.to[i] = part.from[i * part.stride];
}

struct SplitsPlan {
  struct Part {
    IndexPart part;
    uint32_t first_bound;
  };
  Parts<Part> parts;
  PooledWorkspace workspace;
  int64_t bounds[2 * kMostRank];
};

// Thread i looks at the indices of key i and finds the first key of output row i.
__global__ void __launch_bounds__(kThreads) SplitsKernel(const __grid_constant__ SplitsPlan plan) {
  uint64_t thread, threads;
  const SplitsPlan::Part& planned = plan.parts.OfBlock(&thread, &threads);
  const IndexPart& part = planned.part;
  const auto row_of = [&](uint64_t i) {
    return __ldg(reinterpret_cast<const long long*>(part.indices) + i * part.rank);
  };
  for (uint64_t i = thread; i < part.count; i += threads) {
    const int64_t* const index = part.indices + i * part.rank;
    for (uint32_t j = 0; j < part.rank; ++j) {
      const int64_t value = __ldg(reinterpret_cast<const long long*>(index) + j);
      if (value < 0 || value >= plan.bounds[planned.first_bound + j]) {
        NoteMistake(plan.workspace, Mistake::kOutside, part.part, i);
      }
    }
    if (i > 0 && row_of(i) < row_of(i - 1)) NoteMistake(plan.workspace, Mistake::kIndicesDescend, part.part, i);
  }
  for (uint64_t r = thread; r <= part.rows; r += threads) {
    uint64_t low = 0, high = part.count;
    if (r == 0) high = 0;
    if (r == part.rows) low = high;
    while (low < high) {
      const uint64_t middle = (low + high) / 2;
      if (row_of(middle) < static_cast<int64_t>(r)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    part.row_splits[r] = static_cast<int64_t>(low);
  }
}

struct PoolPart {
  PooledPart part;
  bool aligned;
};

// A thread for each word of each output row: neighbours read neighbouring words.
template <typename Word, bool kWeighted>
__device__ void PoolWords(const PoolPart& planned, uint64_t thread, uint64_t threads) {
  const PooledPart& part = planned.part;
  const uint32_t words = part.query.table.row_bytes / sizeof(Word);
  const auto* const rows = static_cast<const Word*>(part.query.output);
  for (uint64_t i = thread; i < uint64_t{part.rows} * words; i += threads) {
    const uint64_t r = i / words;
    const auto word = static_cast<uint32_t>(i - r * words);
    const uint32_t begin = ClampSplit(part.row_splits[r], 0, part.query.count);
    const uint32_t end = ClampSplit(part.row_splits[r + 1], begin, part.query.count);
    RowSum<Word, kWeighted> sum;
    sum.Begin(part.pooling, end - begin);
    sum.Add(begin, end, part.weights,
            [&](uint32_t key, bool wanted) { return wanted ? __ldcs(rows + uint64_t{key} * words + word) : Word(); });
    StoreWord(part.output + r * (part.query.table.row_bytes / sizeof(float)), word, sum.Result(), planned.aligned);
  }
}

__global__ void __launch_bounds__(kThreads) PoolKernel(const __grid_constant__ Parts<PoolPart> plan) {
  uint64_t thread, threads;
  const PoolPart& part = plan.OfBlock(&thread, &threads);
  if (part.part.query.table.row_bytes % sizeof(float4) == 0) {
    part.part.weights == nullptr ? PoolWords<float4, false>(part, thread, threads)
                                 : PoolWords<float4, true>(part, thread, threads);
  } else {
    part.part.weights == nullptr ? PoolWords<float, false>(part, thread, threads)
                                 : PoolWords<float, true>(part, thread, threads);
  }
}

bool IsCount(int num_parts) { return num_parts >= 0 && num_parts <= kMaxQueryParts; }

int LaunchSome(const SplitsPlan& plan, uint32_t blocks, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  SplitsKernel<<<blocks, kThreads, 0, stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace

int LaunchWiden(const WidenPart* parts, int num_parts, cudaStream_t stream) {
  if (!IsCount(num_parts)) return cudaErrorInvalidValue;
  Parts<WidenPart> plan;
  uint32_t blocks = 0;
  for (int i = 0; i < num_parts; ++i) {
    if (parts[i].count > 0) blocks = Deal(&plan, parts[i], parts[i].count, blocks);
  }
  if (blocks == 0) return cudaSuccess;
  WidenKernel<<<blocks, kThreads, 0, stream>>>(plan);
  return cudaGetLastError();
}

int LaunchSplits(const IndexPart* parts, int num_parts, const PooledWorkspace& workspace, cudaStream_t stream) {
  if (!IsCount(num_parts)) return cudaErrorInvalidValue;
  for (int i = 0; i < num_parts; ++i) {
    if (parts[i].rank < 1 || parts[i].rank > kMostRank) return cudaErrorInvalidValue;
  }
  SplitsPlan plan;
  plan.workspace = workspace;
  uint32_t blocks = 0, bounds = 0;
  for (int i = 0; i < num_parts; ++i) {
    if (bounds + parts[i].rank > 2 * kMostRank) {
      if (const int error = LaunchSome(plan, blocks, stream)) return error;
      plan.parts.num_parts = 0;
      blocks = bounds = 0;
    }
    std::copy_n(parts[i].dense_shape, parts[i].rank, plan.bounds + bounds);
    const uint64_t work = std::max<uint64_t>(parts[i].count, uint64_t{parts[i].rows} + 1);
    blocks = Deal(&plan.parts, SplitsPlan::Part{parts[i], bounds}, work, blocks);
    bounds += parts[i].rank;
  }
  return LaunchSome(plan, blocks, stream);
}

int LaunchPool(const PooledPart* parts, int num_parts, cudaStream_t stream) {
  if (!IsCount(num_parts)) return cudaErrorInvalidValue;
  Parts<PoolPart> plan;
  uint32_t blocks = 0;
  for (int i = 0; i < num_parts; ++i) {
    const uint32_t row_bytes = parts[i].query.table.row_bytes;
    if (row_bytes == 0 || row_bytes % sizeof(float) != 0) return cudaErrorInvalidValue;
    const uint32_t words = row_bytes / (row_bytes % sizeof(float4) == 0 ? sizeof(float4) : sizeof(float));
    if (parts[i].rows == 0) continue;
    blocks = Deal(&plan, PoolPart{parts[i], IsAligned(parts[i])}, uint64_t{parts[i].rows} * words, blocks);
  }
  if (blocks == 0) return cudaSuccess;
  PoolKernel<<<blocks, kThreads, 0, stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace hps::cuda
