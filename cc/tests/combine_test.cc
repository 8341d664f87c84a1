// Combine: equal to the bit to the documented order of additions, and close to the plain sum in double.

#include "cc/core/combine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace hps {
namespace {

constexpr uint64_t kSeed = 987654321;

struct Case {
  size_t width;
  std::vector<float> rows;  // (n, width)
  std::vector<int64_t> row_splits;
  std::vector<float> weights;

  std::vector<float> Run(Combiner combiner, bool weighted) const {
    std::vector<const std::byte*> addresses;
    for (size_t i = 0; i < rows.size() / width; ++i) {
      addresses.push_back(reinterpret_cast<const std::byte*>(rows.data() + i * width));
    }
    std::vector<float> output((row_splits.size() - 1) * width, 777.0f);
    CombineRequest request{addresses, row_splits, {}, combiner, width, output.data()};
    if (weighted) request.weights = weights;
    Combine(request, 0, row_splits.size() - 1);
    return output;
  }
};

// Every number of rows from 0 to 40 once.
Case RandomCase(size_t width) {
  std::mt19937_64 random(kSeed + width);
  Case result{width, {}, {0}, {}};
  for (int64_t n = 0; n <= 40; ++n) result.row_splits.push_back(result.row_splits.back() + n);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < result.row_splits.back(); ++i) {
    // Magnitudes far apart, so that each order of additions rounds differently.
    for (size_t j = 0; j < width; ++j) result.rows.push_back(normal(random) * std::exp2(normal(random) * 4));
    result.weights.push_back(normal(random));
  }
  return result;
}

// The documented order, one element at a time. volatile: each addition is rounded to float by itself.
float DocumentedSum(const float* x, size_t stride, int64_t n) {
  const auto at = [&](int64_t i) { return x[static_cast<size_t>(i) * stride]; };
  if (n == 1) return at(0);
  int64_t head = n % 8;
  if (head == 0) head = 8;
  if (head == 1) head = 9;
  volatile float sum = at(0);
  for (int64_t i = 1; i < head; ++i) sum = sum + at(i);
  for (int64_t i = head; i < n; i += 8) {
    volatile float block = at(i);
    for (int64_t k = 1; k < 8; ++k) block = block + at(i + k);
    sum = sum + block;
  }
  return sum;
}

float DocumentedResult(Combiner combiner, float sum, int64_t n) {
  if (combiner == Combiner::kSum || n == 1) return sum;
  const float denominator = combiner == Combiner::kMean ? static_cast<float>(n) : std::sqrt(static_cast<float>(n));
  if (n >= 10) return sum / denominator;
  const float reciprocal = 1.0f / denominator;
  return sum * reciprocal;
}

TEST(CombineTest, UnweightedFollowsTheDocumentedOrderToTheBit) {
  for (size_t width : {1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 100, 128}) {
    const Case input = RandomCase(width);
    for (Combiner combiner : {Combiner::kSum, Combiner::kMean, Combiner::kSqrtn}) {
      const std::vector<float> output = input.Run(combiner, false);
      for (size_t r = 0; r + 1 < input.row_splits.size(); ++r) {
        const int64_t begin = input.row_splits[r];
        const int64_t n = input.row_splits[r + 1] - begin;
        for (size_t j = 0; j < width; ++j) {
          const float expected =
              n == 0 ? 0.0f
                     : DocumentedResult(
                           combiner, DocumentedSum(&input.rows[static_cast<size_t>(begin) * width + j], width, n), n);
          const float actual = output[r * width + j];
          ASSERT_EQ(std::memcmp(&expected, &actual, 4), 0)
              << "width " << width << ", " << n << " rows, column " << j << ", combiner " << static_cast<int>(combiner)
              << ": " << actual << " instead of " << expected << ", seed " << kSeed;
        }
      }
    }
  }
}

TEST(CombineTest, AgreesWithSumsInDouble) {
  for (size_t width : {1, 7, 16, 36}) {
    const Case input = RandomCase(width);
    for (bool weighted : {false, true}) {
      for (Combiner combiner : {Combiner::kSum, Combiner::kMean, Combiner::kSqrtn}) {
        const std::vector<float> output = input.Run(combiner, weighted);
        for (size_t r = 0; r + 1 < input.row_splits.size(); ++r) {
          double weight_sum = 0.0, square_sum = 0.0;
          for (int64_t i = input.row_splits[r]; i < input.row_splits[r + 1]; ++i) {
            const double w = weighted ? input.weights[static_cast<size_t>(i)] : 1.0;
            weight_sum += w;
            square_sum += w * w;
          }
          double denominator = combiner == Combiner::kSum    ? 1.0
                               : combiner == Combiner::kMean ? weight_sum
                                                             : std::sqrt(square_sum);
          const bool empty = input.row_splits[r] == input.row_splits[r + 1];
          for (size_t j = 0; j < width; ++j) {
            double sum = 0.0, magnitude = 0.0;
            for (int64_t i = input.row_splits[r]; i < input.row_splits[r + 1]; ++i) {
              const double w = weighted ? input.weights[static_cast<size_t>(i)] : 1.0;
              const double x = input.rows[static_cast<size_t>(i) * width + j];
              sum += w * x;
              magnitude += std::abs(w * x);
            }
            const double expected = empty ? 0.0 : sum / denominator;
            const double limit = empty ? 0.0 : 1e-6 * magnitude / std::abs(denominator);
            ASSERT_NEAR(output[r * width + j], expected, limit)
                << "width " << width << ", row " << r << ", seed " << kSeed;
          }
        }
      }
    }
  }
}

TEST(CombineTest, ADenominatorOfZeroGivesZeros) {
  const Case input{2, {1, 2, 3, 4}, {0, 2}, {1.0f, -1.0f}};
  EXPECT_EQ(input.Run(Combiner::kMean, true), (std::vector<float>{0, 0}));
  EXPECT_EQ(input.Run(Combiner::kSum, true), (std::vector<float>{-2, -2}));
  const Case zeros{2, {1, 2, 3, 4}, {0, 2}, {0.0f, 0.0f}};
  EXPECT_EQ(zeros.Run(Combiner::kSqrtn, true), (std::vector<float>{0, 0}));
}

TEST(CombineTest, NotANumberAndInfinityPassThrough) {
  const float infinity = std::numeric_limits<float>::infinity();
  const Case input{1, {infinity, 1, std::nanf(""), 1}, {0, 2, 4}, {}};
  const std::vector<float> output = input.Run(Combiner::kMean, false);
  EXPECT_EQ(output[0], infinity);
  EXPECT_TRUE(std::isnan(output[1]));
}

TEST(CombineTest, WritesOnlyTheRowsAskedFor) {
  const Case input = RandomCase(4);
  std::vector<const std::byte*> addresses;
  for (size_t i = 0; i < input.rows.size() / 4; ++i) {
    addresses.push_back(reinterpret_cast<const std::byte*>(input.rows.data() + i * 4));
  }
  std::vector<float> output(41 * 4, 777.0f);
  Combine({addresses, input.row_splits, {}, Combiner::kSum, 4, output.data()}, 10, 20);
  for (size_t i = 0; i < output.size(); ++i) EXPECT_EQ(output[i] == 777.0f, i < 40 || i >= 80) << i;
}

}  // namespace
}  // namespace hps
