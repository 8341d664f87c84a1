// DeviceContext: what all caches and lookups of one device share: the device, where its memory comes from, the gate of
// updates, and the memory of the first failure.
//
// A device that has failed (see Check) stays failed: every later call returns that first error, and
// nothing is tried again.
//
// Thread safety: all methods may be called from any thread. Ownership: caches, workspaces and lookups keep it alive.

#ifndef HPS_CACHE_DEVICE_CONTEXT_H_
#define HPS_CACHE_DEVICE_CONTEXT_H_

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include "cc/cache/update_gate.h"
#include "cuda_kernels/device.h"
#include "hps/embedding_cache.h"
#include "hps/status.h"

namespace hps {

class DeviceContext : public std::enable_shared_from_this<DeviceContext> {
 public:
  // Without an allocator memory comes from the device itself (cudaMalloc). What an allocator lends may be in use by
  // work that its owner has launched; it is waited for.
  static std::shared_ptr<DeviceContext> Make(std::shared_ptr<cuda::Device> device,
                                             std::shared_ptr<DeviceAllocator> allocator = nullptr);

  cuda::Device& device() { return *device_; }
  UpdateGate& gate() { return gate_; }
  // Numbers the caches of this device, for the gate.
  uint32_t NextCache() { return next_cache_.fetch_add(1); }

  // OK for 0. kResourceExhausted for a lack of memory, kInternal for arguments that a call refuses, kFailedPrecondition
  // for what may not be done during a capture into a graph; any other error is the device's failure: see above.
  Status Check(int error, std::string_view what);
  // The failure, or OK.
  Status CheckAlive() const;
  // Bytes that can still be allocated, as far as the allocator or else the device knows.
  Result<uint64_t> FreeMemory();

 private:
  friend class DeviceMemory;
  DeviceContext(std::shared_ptr<cuda::Device> device, std::shared_ptr<DeviceAllocator> allocator)
      : device_(std::move(device)), allocator_(std::move(allocator)) {}

  const std::shared_ptr<cuda::Device> device_;
  const std::shared_ptr<DeviceAllocator> allocator_;  // or nullptr
  UpdateGate gate_;
  std::atomic<uint32_t> next_cache_{0};
  std::atomic<bool> failed_{false};
  mutable std::mutex mutex_;  // guards failure_
  Status failure_;
};

// Memory of the device. Whoever destroys it knows that nothing uses it any more. Movable; empty by default.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  // kResourceExhausted, saying what the bytes were for.
  static Result<DeviceMemory> Allocate(DeviceContext& context, size_t bytes, std::string_view purpose);
  ~DeviceMemory() { Reset(); }
  DeviceMemory(DeviceMemory&& other) noexcept { Swap(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    DeviceMemory taken(std::move(other));
    Swap(taken);
    return *this;
  }

  std::byte* get() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void Reset();
  void Swap(DeviceMemory& other) {
    std::swap(context_, other.context_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  std::shared_ptr<DeviceContext> context_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// Pinned memory of the host that the device sees under device(). As DeviceMemory.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  static Result<PinnedMemory> Allocate(DeviceContext& context, size_t bytes, std::string_view purpose);
  ~PinnedMemory() { Reset(); }
  PinnedMemory(PinnedMemory&& other) noexcept { Swap(other); }
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    PinnedMemory taken(std::move(other));
    Swap(taken);
    return *this;
  }

  std::byte* get() const { return host_; }
  std::byte* device() const { return device_; }
  size_t bytes() const { return bytes_; }

 private:
  void Reset();
  void Swap(PinnedMemory& other) {
    std::swap(context_, other.context_);
    std::swap(host_, other.host_);
    std::swap(device_, other.device_);
    std::swap(bytes_, other.bytes_);
  }
  std::shared_ptr<DeviceContext> context_;
  std::byte* host_ = nullptr;
  std::byte* device_ = nullptr;
  size_t bytes_ = 0;
};

// A stream and an event that end with their owner, who knows that no work is left in them.
class OwnedStream {
 public:
  OwnedStream() = default;
  static Result<OwnedStream> Create(DeviceContext& context);
  ~OwnedStream() {
    if (stream_ != nullptr) context_->device().DestroyStream(stream_);
  }
  OwnedStream(OwnedStream&& other) noexcept
      : context_(std::move(other.context_)), stream_(std::exchange(other.stream_, nullptr)) {}
  OwnedStream& operator=(OwnedStream&& other) noexcept {
    std::swap(context_, other.context_);
    std::swap(stream_, other.stream_);
    return *this;
  }
  cudaStream_t get() const { return stream_; }

 private:
  std::shared_ptr<DeviceContext> context_;
  cudaStream_t stream_ = nullptr;
};

class OwnedEvent {
 public:
  OwnedEvent() = default;
  static Result<OwnedEvent> Create(DeviceContext& context);
  ~OwnedEvent() {
    if (event_ != nullptr) context_->device().DestroyEvent(event_);
  }
  OwnedEvent(OwnedEvent&& other) noexcept
      : context_(std::move(other.context_)), event_(std::exchange(other.event_, nullptr)) {}
  OwnedEvent& operator=(OwnedEvent&& other) noexcept {
    std::swap(context_, other.context_);
    std::swap(event_, other.event_);
    return *this;
  }
  cudaEvent_t get() const { return event_; }

 private:
  std::shared_ptr<DeviceContext> context_;
  cudaEvent_t event_ = nullptr;
};

}  // namespace hps

#endif  // HPS_CACHE_DEVICE_CONTEXT_H_
