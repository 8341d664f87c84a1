// Rows reach the device whole, whatever order they arrive in, and before all of them have arrived.

#include "cc/cache/staging_copier.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cc/tests/cache_fixture.h"

namespace hps::testing {
namespace {

constexpr size_t kPiece = 16 << 10;

class StagingCopierTest : public ::testing::Test {
 protected:
  void Fill(size_t bytes) {
    from_.resize(bytes);
    to_.assign(bytes, std::byte{0});
    for (std::byte& byte : from_) byte = static_cast<std::byte>(random_());
  }
  bool Same() {
    EXPECT_EQ(device_->SynchronizeStream(nullptr), 0);
    return from_ == to_;
  }

  std::shared_ptr<HostDevice> device_ = std::make_shared<HostDevice>();
  std::shared_ptr<DeviceContext> context_ = DeviceContext::Make(device_);
  StagingCopier copier_{context_.get()};
  std::vector<std::byte> from_, to_;
  std::mt19937 random_{5};
};

TEST_F(StagingCopierTest, WhatHasArrivedWithoutAGapIsCopiedAtOnce) {
  Fill(4 * StagingCopier::kCopyBytes + 100);
  copier_.Begin(from_.data(), to_.data(), nullptr);
  copier_.Arrived(0, 1000);
  EXPECT_EQ(copier_.copied(), 0u) << "not worth a copy yet";
  copier_.Arrived(2000, 2 * StagingCopier::kCopyBytes);
  copier_.Arrived(2 * StagingCopier::kCopyBytes, 3 * StagingCopier::kCopyBytes);
  EXPECT_EQ(copier_.copied(), 0u) << "behind a gap";
  copier_.Arrived(1000, 2000);
  EXPECT_EQ(copier_.copied(), 3 * StagingCopier::kCopyBytes);
  // What never arrived goes with the end.
  ASSERT_OK(copier_.Finish(from_.size()));
  EXPECT_TRUE(Same());
  // Nothing is left of the use before.
  Fill(StagingCopier::kCopyBytes + 1);
  copier_.Begin(from_.data(), to_.data(), nullptr);
  EXPECT_EQ(copier_.copied(), 0u);
  ASSERT_OK(copier_.Finish(from_.size()));
  EXPECT_TRUE(Same());
}

TEST_F(StagingCopierTest, ManyThreadsInAnyOrder) {
  for (int round = 0; round < 20; ++round) {
    Fill(100 * kPiece + round * 7);
    copier_.Begin(from_.data(), to_.data(), nullptr);
    std::vector<size_t> pieces(100);
    for (size_t i = 0; i < pieces.size(); ++i) pieces[i] = i;
    std::shuffle(pieces.begin(), pieces.end(), random_);
    std::atomic<size_t> next{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        for (size_t i = next++; i < pieces.size(); i = next++) {
          // The row's bytes are written by the thread that tells of them.
          std::byte* const piece = from_.data() + pieces[i] * kPiece;
          std::transform(piece, piece + kPiece, piece, [](std::byte byte) { return ~byte; });
          copier_.Arrived(pieces[i] * kPiece, (pieces[i] + 1) * kPiece);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_GT(copier_.copied(), 100 * kPiece - StagingCopier::kCopyBytes);
    ASSERT_OK(copier_.Finish(from_.size()));
    ASSERT_TRUE(Same());
  }
}

TEST_F(StagingCopierTest, AFailedCopyIsTold) {
  Fill(2 * StagingCopier::kCopyBytes);
  copier_.Begin(from_.data(), to_.data(), nullptr);
  device_->Lose(cuda::kErrorLaunchFailure);
  copier_.Arrived(0, StagingCopier::kCopyBytes);
  copier_.Arrived(StagingCopier::kCopyBytes, from_.size());
  ExpectError(copier_.Finish(from_.size()), StatusCode::kInternal, {"copying missing rows"});
}

}  // namespace
}  // namespace hps::testing
