// The arithmetic of pooled lookups, the same bits wherever rows come from: one thread adds up one word (1 to 4 floats)
// of the rows of one output row, from the first key to the last. device_pooling.h tells the order; combine.cc is its
// model.

#ifndef HPS_CUDA_KERNELS_POOLING_SUMS_CUH_
#define HPS_CUDA_KERNELS_POOLING_SUMS_CUH_

#include <cuda_runtime.h>

#include "cuda_kernels/device_pooling.h"

namespace hps::cuda {

constexpr uint32_t kRowsAtOnce = 8;  // loads of a thread under way, in each of so many chunks

template <typename Word>
__device__ __forceinline__ float& ElementOf(Word& word, int i) {
  return reinterpret_cast<float*>(&word)[i];
}

// -0 is what leaves every addend as it is.
template <typename Word, bool kWeighted, int kChunks = 1>
class RowSum {
 public:
  static constexpr int kElements = sizeof(Word) / sizeof(float);

  __device__ __forceinline__ void Begin(Pooling pooling, uint32_t n) {
    pooling_ = pooling;
    n_ = n;
    left_ = PooledHead(n);
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum_[e] = block_[e] = -0.0f;
  }

  // Adds the rows [first, last) of those that load(i, wanted) gives; it may be asked for one that is not wanted.
  template <typename Load>
  __device__ __forceinline__ void Add(uint32_t first, uint32_t last, const float*, const Load& load) {
#pragma unroll 1
    while (first < last) {
      Word values[kChunks][kRowsAtOnce];
      uint32_t sizes[kChunks];
      uint32_t left = left_;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {  // a chunk ends where a block does
        const uint32_t m = min(min(kRowsAtOnce, last - first), left);
#pragma unroll
        for (uint32_t j = 0; j < kRowsAtOnce; ++j) values[c][j] = load(first + j, j < m);
        first += m;
        left = left == m ? 8 : left - m;
        sizes[c] = m;
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (uint32_t j = 0; j < kRowsAtOnce; ++j) {
          if (j >= sizes[c]) continue;
#pragma unroll
          for (int e = 0; e < kElements; ++e) block_[e] = __fadd_rn(block_[e], ElementOf(values[c][j], e));
        }
        left_ -= sizes[c];
        if (left_ != 0) continue;
        left_ = 8;
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          sum_[e] = __fadd_rn(sum_[e], block_[e]);
          block_[e] = -0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ Word Result() const {
    const float count = static_cast<float>(n_);
    const float divisor = pooling_ == Pooling::kSum ? 1.0f : pooling_ == Pooling::kMean ? count : __fsqrt_rn(count);
    Word result;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      ElementOf(result, e) = n_ == 0   ? 0.0f
                             : n_ < 10 ? __fmul_rn(sum_[e], __fdiv_rn(1.0f, divisor))
                                       : __fdiv_rn(sum_[e], divisor);
    }
    return result;
  }

 private:
  Pooling pooling_;
  uint32_t n_;
  uint32_t left_;  // rows until the block is complete
  float sum_[kElements];
  float block_[kElements];
};

// The product of two floats is exact in double.
template <typename Word, int kChunks>
class RowSum<Word, true, kChunks> {
 public:
  static constexpr int kElements = sizeof(Word) / sizeof(float);

  __device__ __forceinline__ void Begin(Pooling pooling, uint32_t n) {
    pooling_ = pooling;
    n_ = n;
    denominator_ = 0.0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum_[e] = 0.0;
  }

  template <typename Load>
  __device__ __forceinline__ void Add(uint32_t first, uint32_t last, const float* weights, const Load& load) {
    constexpr uint32_t kAtOnce = kRowsAtOnce / 2;  // the sums take twice the registers
#pragma unroll 1
    while (first < last) {
      const uint32_t m = min(kAtOnce, last - first);
      Word values[kAtOnce];
      float weight[kAtOnce];
#pragma unroll
      for (uint32_t j = 0; j < kAtOnce; ++j) {
        values[j] = load(first + j, j < m);
        weight[j] = j < m ? __ldg(weights + first + j) : 0.0f;
      }
#pragma unroll
      for (uint32_t j = 0; j < kAtOnce; ++j) {
        if (j >= m) continue;
        const double w = weight[j];
        denominator_ = pooling_ == Pooling::kMean ? denominator_ + w : fma(w, w, denominator_);
#pragma unroll
        for (int e = 0; e < kElements; ++e) sum_[e] = fma(w, static_cast<double>(ElementOf(values[j], e)), sum_[e]);
      }
      first += m;
    }
  }

  __device__ __forceinline__ Word Result() const {
    const double divisor = pooling_ == Pooling::kSum    ? 1.0
                           : pooling_ == Pooling::kMean ? denominator_
                                                        : __dsqrt_rn(denominator_);
    Word result;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      ElementOf(result, e) = n_ == 0 || divisor == 0.0 ? 0.0f : static_cast<float>(__ddiv_rn(sum_[e], divisor));
    }
    return result;
  }

 private:
  Pooling pooling_;
  uint32_t n_;
  double denominator_;
  double sum_[kElements];
};

// Wherever the output begins.
template <typename Word>
__device__ __forceinline__ void StoreWord(float* row, uint32_t word, Word value, bool aligned) {
  constexpr int kElements = sizeof(Word) / sizeof(float);
  if constexpr (kElements > 1) {
    if (!aligned) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) __stcs(row + word * kElements + e, ElementOf(value, e));
      return;
    }
  }
  __stcs(reinterpret_cast<Word*>(row) + word, value);
}

inline bool IsAligned(const PooledPart& part) {
  return (reinterpret_cast<uintptr_t>(part.output) | part.query.table.row_bytes) % sizeof(float4) == 0;
}

// The keys of an output row, inside [low, high] whatever the splits say.
__device__ __forceinline__ uint32_t ClampSplit(int64_t split, uint32_t low, uint32_t high) {
  return split <= static_cast<int64_t>(low)    ? low
         : split >= static_cast<int64_t>(high) ? high
                                               : static_cast<uint32_t>(split);
}

__device__ __forceinline__ void NoteMistake(const PooledWorkspace& workspace, Mistake mistake, uint32_t part,
                                            uint64_t position) {
  atomicMax(reinterpret_cast<unsigned long long*>(&workspace.words[1]),
            ~static_cast<unsigned long long>(PackMistake(mistake, part, position)));
  __threadfence();
}

}  // namespace hps::cuda

#endif  // HPS_CUDA_KERNELS_POOLING_SUMS_CUH_
