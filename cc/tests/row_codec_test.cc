// What 8-bit rows lose: bounds, edges, and why int8 and not e4m3.

#include "cc/cache/row_codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <iostream>
#include <limits>
#include <random>
#include <vector>

namespace hps::testing {
namespace {

using cuda::RowFormat;

std::vector<float> ThroughInt8(const std::vector<float>& row) {
  const auto row_bytes = static_cast<uint32_t>(row.size() * sizeof(float));
  std::vector<char> stored(cuda::StoredRowBytes(RowFormat::kInt8, row_bytes), 0x5A);
  EncodeRow(RowFormat::kInt8, row_bytes, row.data(), stored.data());
  std::vector<float> back(row.size());
  DecodeRow(RowFormat::kInt8, row_bytes, stored.data(), back.data());
  return back;
}

// The predecessor's rows: the largest value is brought to 448, the largest of e4m3, and each rounded to three bits
// behind the first one.
std::vector<float> ThroughE4m3(const std::vector<float>& row) {
  float largest = 0;
  for (const float x : row) largest = std::max(largest, std::fabs(x));
  const float scale = std::max(largest / 448.0f, 1.0f / (448.0f * 512.0f));
  std::vector<float> back;
  for (const float x : row) {
    const float scaled = x / scale;
    int exponent = 0;
    (void)std::frexp(scaled, &exponent);
    const float step = std::ldexp(1.0f, std::max(exponent - 1, -6) - 3);
    back.push_back(std::clamp(std::nearbyint(scaled / step) * step, -448.0f, 448.0f) * scale);
  }
  return back;
}

struct Errors {
  double most_of_largest = 0;  // largest error, as a part of the row's largest value
  double of_length = 0;        // the error's length as a part of the row's, mean of the rows
};

template <typename Draw>
Errors ErrorsOf(const std::function<std::vector<float>(const std::vector<float>&)>& through, Draw draw) {
  Errors errors;
  constexpr int kRows = 2000;
  for (int r = 0; r < kRows; ++r) {
    std::vector<float> row(64);
    for (float& x : row) x = draw();
    const std::vector<float> back = through(row);
    double largest = 0, lost = 0, length = 0;
    for (size_t i = 0; i < row.size(); ++i) {
      const double error = double{back[i]} - double{row[i]};
      largest = std::max(largest, double{std::fabs(row[i])});
      lost += error * error;
      length += double{row[i]} * double{row[i]};
    }
    for (size_t i = 0; i < row.size(); ++i) {
      errors.most_of_largest = std::max(errors.most_of_largest, std::fabs(double{back[i]} - double{row[i]}) / largest);
    }
    errors.of_length += std::sqrt(lost / length) / kRows;
  }
  return errors;
}

TEST(RowCodec, Int8LosesLessThanE4m3) {
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal(0.0f, 0.05f);
  std::student_t_distribution<float> heavy(3.0f);
  std::cauchy_distribution<float> wild;
  const auto compare = [](const char* name, const auto& draw) {
    const Errors int8 = ErrorsOf(ThroughInt8, draw), e4m3 = ErrorsOf(ThroughE4m3, draw);
    std::cout << name << ": of the row's largest value at most " << int8.most_of_largest << " (int8), "
              << e4m3.most_of_largest << " (e4m3); of the row's length " << int8.of_length << ", " << e4m3.of_length
              << std::endl;
    EXPECT_LE(int8.most_of_largest, 1.0 / 254 + std::ldexp(1.0, -20)) << name;
    EXPECT_GT(e4m3.most_of_largest, 5 * int8.most_of_largest) << name;
    EXPECT_LT(int8.of_length, e4m3.of_length) << name;
  };
  compare("normal", [&] { return normal(random); });
  compare("Student's t, 3 degrees", [&] { return heavy(random); });
  compare("Cauchy", [&] { return wild(random); });
}

// Of any floats there are.
TEST(RowCodec, ErrorsStayWithinTheBound) {
  std::mt19937_64 random(2);
  for (int turn = 0; turn < 20'000; ++turn) {
    std::vector<float> row(1 + random() % 40);
    const int below = static_cast<int>(random() % 250);
    for (float& x : row) {
      do {
        x = cuda::BitsFloat(static_cast<uint32_t>(random()));
        if (turn % 2 == 0) x = std::ldexp(x, -below);
      } while (!std::isfinite(x));
    }
    double largest = 0;
    for (const float x : row) largest = std::max(largest, double{std::fabs(x)});
    const std::vector<float> back = ThroughInt8(row);
    for (size_t i = 0; i < row.size(); ++i) {
      ASSERT_LE(std::fabs(double{back[i]} - double{row[i]}), largest * (1.0 / 254 + std::ldexp(1.0, -20)) + 2e-43)
          << row[i] << " became " << back[i] << ", largest " << largest;
    }
  }
}

TEST(RowCodec, Edges) {
  constexpr float kMost = std::numeric_limits<float>::max(), kLeast = std::numeric_limits<float>::denorm_min();
  const auto same = [](const std::vector<float>& row) { EXPECT_EQ(ThroughInt8(row), row); };
  same({0, 0, 0, 0, 0});
  same({127, -127, 1, 0, -64});
  const std::vector<float> large = ThroughInt8({kMost, -kMost, 0, kMost / 2});
  for (const float x : large) EXPECT_TRUE(std::isfinite(x)) << x;
  EXPECT_NEAR(large[0], kMost, kMost * 1e-6);
  EXPECT_EQ(large[1], -large[0]);
  for (const float x : ThroughInt8({kLeast, -kLeast})) EXPECT_LE(std::fabs(x), 2e-43f);
  EXPECT_EQ(ThroughInt8({-0.0f})[0], 0.0f);
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {nan, -nan, infinity, -infinity}) {
    for (const float x : ThroughInt8({1, bad, 2})) EXPECT_TRUE(std::isnan(x)) << "a row that is not finite shows";
  }
}

TEST(RowCodec, SizesAndAlignment) {
  EXPECT_EQ(cuda::StoredRowBytes(RowFormat::kFloat32, 68), 68u);
  EXPECT_EQ(cuda::StoredRowBytes(RowFormat::kInt8, 4), 8u);
  EXPECT_EQ(cuda::StoredRowBytes(RowFormat::kInt8, 68), 24u);
  EXPECT_EQ(cuda::StoredRowBytes(RowFormat::kInt8, 512), 132u);
  std::vector<char> memory(64);
  const std::vector<float> row = {1, 2, 3};
  std::memcpy(memory.data() + 1, row.data(), 12);
  EncodeRow(RowFormat::kInt8, 12, memory.data() + 1, memory.data() + 21);
  DecodeRow(RowFormat::kInt8, 12, memory.data() + 21, memory.data() + 35);
  EXPECT_EQ(memory[21 + 4 + 3], 0) << "what is left over is zero";
  std::vector<float> back(3);
  std::memcpy(back.data(), memory.data() + 35, 12);
  EXPECT_EQ(back, ThroughInt8(row));
}

}  // namespace
}  // namespace hps::testing
