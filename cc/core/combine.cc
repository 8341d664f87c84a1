// The order of float additions is an outside format here: unweighted results are bit-equal to TensorFlow 2.21's. With n
// rows in an output row: one row is copied; else the first r rows are added left to right, r = n mod 8 with 0 -> 8 and
// 1 -> 9, and every further block of eight is added up by itself before it is added to the sum. mean and sqrtn multiply
// by the rounded reciprocal when n < 10 and divide from 10 on. This file is compiled with -ffp-contract=off.

#include "cc/core/combine.h"

#include <cmath>

namespace hps {
namespace {

// Ten to twenty cache lines in flight hide the memory latency of one core.
constexpr int64_t kPrefetchKeys = 16;

#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define HPS_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HPS_VECTOR_CLONES
#endif

struct Scale {
  bool divide = false;
  float factor = 1.0f;
};

Scale UnweightedScale(Combiner combiner, int64_t n) {
  if (combiner == Combiner::kSum || n <= 1) return {};
  float denominator = combiner == Combiner::kMean ? static_cast<float>(n) : std::sqrt(static_cast<float>(n));
  return n < 10 ? Scale{false, 1.0f / denominator} : Scale{true, denominator};
}

template <int kTile>
[[gnu::always_inline]] inline void AddTile(const std::byte* const* rows, int64_t n, size_t column, Scale scale,
                                           float* output) {
  auto row = [&](int64_t i) { return reinterpret_cast<const float*>(rows[i]) + column; };
  float sum[kTile];
  const float* first = row(0);
  for (int j = 0; j < kTile; ++j) sum[j] = first[j];
  int64_t head = n % 8 < 2 ? n % 8 + 8 : n % 8;
  if (n == 1) head = 1;
  for (int64_t i = 1; i < head; ++i) {
    const float* x = row(i);
    for (int j = 0; j < kTile; ++j) sum[j] += x[j];
  }
  for (int64_t i = head; i < n; i += 8) {
    float block[kTile];
    const float* x = row(i);
    for (int j = 0; j < kTile; ++j) block[j] = x[j];
    for (int64_t k = 1; k < 8; ++k) {
      x = row(i + k);
      for (int j = 0; j < kTile; ++j) block[j] += x[j];
    }
    for (int j = 0; j < kTile; ++j) sum[j] += block[j];
  }
  if (scale.divide) {
    for (int j = 0; j < kTile; ++j) output[column + j] = sum[j] / scale.factor;
  } else {
    for (int j = 0; j < kTile; ++j) output[column + j] = sum[j] * scale.factor;
  }
}

template <int kTile>
[[gnu::always_inline]] inline void AddWeightedTile(const std::byte* const* rows, const float* weights, int64_t n,
                                                   size_t column, double denominator, float* output) {
  double sum[kTile] = {};
  for (int64_t i = 0; i < n; ++i) {
    const float* x = reinterpret_cast<const float*>(rows[i]) + column;
    double weight = weights[i];
    for (int j = 0; j < kTile; ++j) sum[j] += weight * static_cast<double>(x[j]);
  }
  for (int j = 0; j < kTile; ++j) output[column + j] = static_cast<float>(sum[j] / denominator);
}

double WeightedDenominator(Combiner combiner, const float* weights, int64_t n) {
  if (combiner == Combiner::kSum) return 1.0;
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    double weight = weights[i];
    sum += combiner == Combiner::kMean ? weight : weight * weight;
  }
  return combiner == Combiner::kMean ? sum : std::sqrt(sum);
}

[[gnu::always_inline]] inline void CombineBody(const CombineRequest& request, size_t first, size_t last) {
  const size_t width = request.width;
  const int64_t total = request.row_splits[last];
  const bool weighted = !request.weights.empty();
  for (size_t r = first; r < last; ++r) {
    const int64_t begin = request.row_splits[r];
    const int64_t end = request.row_splits[r + 1];
    const int64_t n = end - begin;
    for (int64_t i = begin + kPrefetchKeys; i < end + kPrefetchKeys && i < total; ++i) {
      for (size_t byte = 0; byte < width * 4; byte += 64) __builtin_prefetch(request.rows[i] + byte);
    }
    float* output = request.output + r * width;
    const float* weights = weighted ? request.weights.data() + begin : nullptr;
    const double denominator = weighted ? WeightedDenominator(request.combiner, weights, n) : 1.0;
    if (n == 0 || (weighted && denominator == 0.0)) {
      for (size_t j = 0; j < width; ++j) output[j] = 0.0f;
      continue;
    }
    const std::byte* const* rows = request.rows.data() + begin;
    size_t column = 0;
    if (weighted) {
      for (; column + 16 <= width; column += 16) AddWeightedTile<16>(rows, weights, n, column, denominator, output);
      for (; column + 4 <= width; column += 4) AddWeightedTile<4>(rows, weights, n, column, denominator, output);
      for (; column < width; ++column) AddWeightedTile<1>(rows, weights, n, column, denominator, output);
    } else {
      const Scale scale = UnweightedScale(request.combiner, n);
      for (; column + 32 <= width; column += 32) AddTile<32>(rows, n, column, scale, output);
      for (; column + 16 <= width; column += 16) AddTile<16>(rows, n, column, scale, output);
      for (; column + 4 <= width; column += 4) AddTile<4>(rows, n, column, scale, output);
      for (; column < width; ++column) AddTile<1>(rows, n, column, scale, output);
    }
  }
}

}  // namespace

HPS_VECTOR_CLONES void Combine(const CombineRequest& request, size_t first, size_t last) {
  CombineBody(request, first, last);
}

}  // namespace hps
