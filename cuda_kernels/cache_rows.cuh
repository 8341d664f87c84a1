// How kernels read rows: a word of a row by the row's slot (way + 7 * bucket). Kernels are templates over these two, so
// that rows which lie all in one place and as they are, the common ones, cost nothing more.

#ifndef HPS_CUDA_KERNELS_CACHE_ROWS_CUH_
#define HPS_CUDA_KERNELS_CACHE_ROWS_CUH_

#include <cuda_runtime.h>

#include "cuda_kernels/device_cache.h"

namespace hps::cuda {

// float32, all in one place.
struct PlainRows {
  static __device__ __forceinline__ bool LeavesMarks(const CacheTable& table) { return !table.whole; }
  static __device__ __forceinline__ bool ChangePlaces(const CacheTable&) { return false; }
  // row_bytes: the table's, perhaps known to the compiler.
  template <typename Word>
  static __device__ __forceinline__ Word Load(const CacheTable& table, uint32_t slot, uint32_t row_bytes,
                                              uint32_t word) {
    return __ldcg(reinterpret_cast<const Word*>(static_cast<const char*>(table.rows) + uint64_t{slot} * row_bytes) +
                  word);
  }
  // One word of many rows.
  template <typename Word>
  class Column {
   public:
    __device__ __forceinline__ Column(const CacheTable& table, uint32_t word)
        : rows_(static_cast<const char*>(table.rows) + uint64_t{word} * sizeof(Word)) {}
    __device__ __forceinline__ Word Load(const CacheTable& table, uint32_t slot) const {
      return __ldcg(reinterpret_cast<const Word*>(rows_ + uint64_t{slot} * table.row_bytes));
    }

   private:
    const char* rows_;
  };
};

// Values of a row as the bits of one load.
template <typename Word>
struct Int8Word;
template <>
struct Int8Word<float> {
  static __device__ __forceinline__ float Load(const char* values, uint32_t word, float scale) {
    return __fmul_rn(__ldcg(reinterpret_cast<const signed char*>(values) + word), scale);
  }
};
template <>
struct Int8Word<float2> {
  static __device__ __forceinline__ float2 Load(const char* values, uint32_t word, float scale) {
    const char2 bytes = __ldcg(reinterpret_cast<const char2*>(values) + word);
    return make_float2(__fmul_rn(bytes.x, scale), __fmul_rn(bytes.y, scale));
  }
};
template <>
struct Int8Word<float4> {
  static __device__ __forceinline__ float4 Load(const char* values, uint32_t word, float scale) {
    const char4 bytes = __ldcg(reinterpret_cast<const char4*>(values) + word);
    return make_float4(__fmul_rn(bytes.x, scale), __fmul_rn(bytes.y, scale), __fmul_rn(bytes.z, scale),
                       __fmul_rn(bytes.w, scale));
  }
};

// Whatever the table says. Products are never joined with sums: the host adds up the same bits.
struct AnyRows {
  static __device__ __forceinline__ bool LeavesMarks(const CacheTable& table) { return cuda::LeavesMarks(table); }
  static __device__ __forceinline__ bool ChangePlaces(const CacheTable& table) { return RowsChangePlaces(table); }
  template <typename Word>
  static __device__ __forceinline__ Word Load(const CacheTable& table, uint32_t slot, uint32_t, uint32_t word) {
    const char* const row = StoredRow(table, slot / kCacheWays, slot % kCacheWays);
    if (table.format == RowFormat::kFloat32) return __ldcg(reinterpret_cast<const Word*>(row) + word);
    return Int8Word<Word>::Load(row + kInt8ValuesAt, word, __ldcg(reinterpret_cast<const float*>(row)));
  }
  template <typename Word>
  class Column {
   public:
    __device__ __forceinline__ Column(const CacheTable&, uint32_t word) : word_(word) {}
    __device__ __forceinline__ Word Load(const CacheTable& table, uint32_t slot) const {
      return AnyRows::Load<Word>(table, slot, table.row_bytes, word_);
    }

   private:
    uint32_t word_;
  };
};

inline bool HasPlainRows(const CacheTable& table) {
  return table.format == RowFormat::kFloat32 && table.device_ways == kCacheWays;
}

// All bits that must be zero for words of some size: of the addresses of rows, where those are read by such words.
inline uintptr_t RowAlignment(const CacheTable& table) {
  if (table.format != RowFormat::kFloat32) return table.row_bytes;
  return reinterpret_cast<uintptr_t>(table.rows) | reinterpret_cast<uintptr_t>(table.pinned_rows) | table.row_bytes;
}

}  // namespace hps::cuda

#endif  // HPS_CUDA_KERNELS_CACHE_ROWS_CUH_
