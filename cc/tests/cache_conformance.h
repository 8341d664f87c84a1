// The conformance suite of EmbeddingCache: one test per clause of embedding_cache.h, over a device. The host device
// runs it everywhere (cache_conformance_test.cc), a GPU where there is one (cuda_cache_test.cc). Tests touch memory of
// the device through copies only.

#ifndef HPS_TESTS_CACHE_CONFORMANCE_H_
#define HPS_TESTS_CACHE_CONFORMANCE_H_

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cc/cache/device_cache.h"
#include "cc/tests/core_fixture.h"

namespace hps::testing {

struct CacheFixture {
  std::string name;  // letters and digits; becomes part of the test's name
  std::function<std::shared_ptr<cuda::Device>()> open;
};

// Memory of a device that tests fill and read.
template <typename T>
class DeviceArray {
 public:
  DeviceArray(cuda::Device& device, size_t count) : device_(&device), count_(count) {
    void* data = nullptr;
    EXPECT_EQ(device.Allocate(std::max<size_t>(count, 1) * sizeof(T), &data), 0);
    data_ = static_cast<T*>(data);
  }
  DeviceArray(cuda::Device& device, const std::vector<T>& values) : DeviceArray(device, values.size()) { Set(values); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { device_->Free(data_); }

  T* get() const { return data_; }
  void Set(const std::vector<T>& values) {
    if (values.empty()) return;
    EXPECT_EQ(device_->Copy(data_, values.data(), values.size() * sizeof(T), nullptr), 0);
    EXPECT_EQ(device_->SynchronizeStream(nullptr), 0);
  }
  std::vector<T> Get(DeviceStream stream = nullptr) const {
    std::vector<T> values(count_);
    if (count_ > 0) EXPECT_EQ(device_->Copy(values.data(), data_, count_ * sizeof(T), stream), 0);
    EXPECT_EQ(device_->SynchronizeStream(stream), 0);
    return values;
  }

 private:
  cuda::Device* const device_;
  const size_t count_;
  T* data_ = nullptr;
};

inline constexpr float kCacheDefault = -3.25f;

// A stream of a test's own.
class TestStream {
 public:
  explicit TestStream(cuda::Device& device) : device_(&device) { EXPECT_EQ(device.CreateStream(&stream_), 0); }
  TestStream(const TestStream&) = delete;
  ~TestStream() {
    (void)device_->SynchronizeStream(stream_);
    device_->DestroyStream(stream_);
  }
  DeviceStream get() const { return stream_; }

 private:
  cuda::Device* const device_;
  DeviceStream stream_ = nullptr;
};

class CacheConformance : public ::testing::TestWithParam<CacheFixture> {
 protected:
  void SetUp() override;

  std::shared_ptr<DeviceCache> Make(uint32_t width, uint64_t capacity_rows);

  const std::shared_ptr<cuda::Device>& device() const { return device_; }

  std::shared_ptr<cuda::Device> device_;
  DeviceResources resources_;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_CACHE_CONFORMANCE_H_
