// TrackedDevice: a device, of whatever kind, in the place of one with another number and less memory. It counts what is
// allocated and can refuse it, so that tests of memory run over GPUs too, and so that one GPU can stand for two
// devices.
//
// Thread safety: as cuda::Device.

#ifndef HPS_TESTS_TRACKED_DEVICE_H_
#define HPS_TESTS_TRACKED_DEVICE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "cuda_kernels/device.h"

namespace hps::testing {

class TrackedDevice final : public cuda::Device {
 public:
  TrackedDevice(std::shared_ptr<cuda::Device> inner, int ordinal, uint64_t memory_bytes)
      : inner_(std::move(inner)), info_(inner_->info()) {
    info_.ordinal = ordinal;
    info_.memory_bytes = std::min(info_.memory_bytes, memory_bytes);
  }

  cuda::Device& inner() { return *inner_; }
  // The n-th allocation from now on, of either kind of memory, fails (1: the next); 0: none does.
  void FailAllocation(uint64_t n) { fail_allocation_.store(n); }
  uint64_t allocations() const {  // alive
    std::lock_guard lock(mutex_);
    return memory_.size();
  }
  uint64_t allocated_bytes() const {  // of the device, alive
    std::lock_guard lock(mutex_);
    return device_bytes_;
  }

  uint64_t pinned_bytes() const {  // of the host, alive
    std::lock_guard lock(mutex_);
    return pinned_bytes_;
  }

  const cuda::DeviceInfo& info() const override { return info_; }
  int Allocate(size_t bytes, void** memory) override {
    if (TakesItsTurnToFail()) return cuda::kErrorOutOfMemory;
    std::lock_guard lock(mutex_);
    if (bytes > info_.memory_bytes || device_bytes_ > info_.memory_bytes - bytes) return cuda::kErrorOutOfMemory;
    if (const int error = inner_->Allocate(bytes, memory)) return error;
    memory_[*memory] = bytes;
    device_bytes_ += bytes;
    return 0;
  }
  void Free(void* memory) override {
    std::lock_guard lock(mutex_);
    Forget(memory, &device_bytes_);
    inner_->Free(memory);
  }
  int FreeMemory(uint64_t* bytes) override {
    const int error = inner_->FreeMemory(bytes);
    std::lock_guard lock(mutex_);
    *bytes = std::min(*bytes, info_.memory_bytes - device_bytes_);
    return error;
  }
  int AllocateHost(size_t bytes, void** memory, void** device_address) override {
    if (TakesItsTurnToFail()) return cuda::kErrorOutOfMemory;
    std::lock_guard lock(mutex_);
    if (const int error = inner_->AllocateHost(bytes, memory, device_address)) return error;
    memory_[*memory] = bytes;
    pinned_bytes_ += bytes;
    return 0;
  }
  void FreeHost(void* memory) override {
    std::lock_guard lock(mutex_);
    Forget(memory, &pinned_bytes_);
    inner_->FreeHost(memory);
  }

  // The rest is the inner device's.
  const char* ErrorText(int error) const override { return inner_->ErrorText(error); }
  int CreateStream(cudaStream_t* stream) override { return inner_->CreateStream(stream); }
  void DestroyStream(cudaStream_t stream) override { inner_->DestroyStream(stream); }
  int QueryStream(cudaStream_t stream) override { return inner_->QueryStream(stream); }
  int SynchronizeStream(cudaStream_t stream) override { return inner_->SynchronizeStream(stream); }
  int IsCapturing(cudaStream_t stream, bool* capturing) override { return inner_->IsCapturing(stream, capturing); }
  int Synchronize() override { return inner_->Synchronize(); }
  int CreateEvent(cudaEvent_t* event) override { return inner_->CreateEvent(event); }
  void DestroyEvent(cudaEvent_t event) override { inner_->DestroyEvent(event); }
  int RecordEvent(cudaEvent_t event, cudaStream_t stream) override { return inner_->RecordEvent(event, stream); }
  int QueryEvent(cudaEvent_t event) override { return inner_->QueryEvent(event); }
  int SynchronizeEvent(cudaEvent_t event) override { return inner_->SynchronizeEvent(event); }
  int WaitEvent(cudaStream_t stream, cudaEvent_t event) override { return inner_->WaitEvent(stream, event); }
  int Copy(void* to, const void* from, size_t bytes, cudaStream_t stream) override {
    return inner_->Copy(to, from, bytes, stream);
  }
  int Zero(void* memory, size_t bytes, cudaStream_t stream) override { return inner_->Zero(memory, bytes, stream); }
  int Clear(const cuda::CacheTable& table, cudaStream_t stream) override { return inner_->Clear(table, stream); }
  int Query(const cuda::QueryPart* parts, int num_parts, const cuda::QueryWorkspace& workspace, uint32_t stamp,
            cudaStream_t stream) override {
    return inner_->Query(parts, num_parts, workspace, stamp, stream);
  }
  int UntoldQuery(const cuda::QueryPart* parts, int num_parts, cudaStream_t stream) override {
    return inner_->UntoldQuery(parts, num_parts, stream);
  }
  int Fill(const cuda::QueryPart* parts, int num_parts, const cuda::QueryWorkspace& workspace,
           const cuda::FillRequest& request, cudaStream_t stream) override {
    return inner_->Fill(parts, num_parts, workspace, request, stream);
  }
  int Insert(const cuda::CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, bool spill,
             uint32_t* evicted, cudaStream_t stream) override {
    return inner_->Insert(table, keys, rows, count, spill, evicted, stream);
  }
  int Update(const cuda::CacheTable& table, const int64_t* keys, const void* rows, uint32_t count,
             cudaStream_t stream) override {
    return inner_->Update(table, keys, rows, count, stream);
  }
  int Erase(const cuda::CacheTable& table, const int64_t* keys, uint32_t count, cudaStream_t stream) override {
    return inner_->Erase(table, keys, count, stream);
  }
  int Exchange(const cuda::CacheTable& table, uint64_t first, uint64_t last, cudaStream_t stream) override {
    return inner_->Exchange(table, first, last, stream);
  }
  int Dump(const cuda::CacheTable& table, uint64_t first, uint64_t last, int64_t* keys, uint32_t* count,
           cudaStream_t stream) override {
    return inner_->Dump(table, first, last, keys, count, stream);
  }
  int Widen(const cuda::WidenPart* parts, int num_parts, cudaStream_t stream) override {
    return inner_->Widen(parts, num_parts, stream);
  }
  int Splits(const cuda::IndexPart* parts, int num_parts, const cuda::PooledWorkspace& workspace,
             cudaStream_t stream) override {
    return inner_->Splits(parts, num_parts, workspace, stream);
  }
  int PooledQuery(const cuda::PooledPart* parts, int num_parts, const cuda::PooledWorkspace& workspace, uint32_t stamp,
                  cudaStream_t stream) override {
    return inner_->PooledQuery(parts, num_parts, workspace, stamp, stream);
  }
  int Pool(const cuda::PooledPart* parts, int num_parts, cudaStream_t stream) override {
    return inner_->Pool(parts, num_parts, stream);
  }

 private:
  bool TakesItsTurnToFail() {
    uint64_t left = fail_allocation_.load();
    while (left > 0 && !fail_allocation_.compare_exchange_weak(left, left - 1)) continue;
    return left == 1;
  }

  void Forget(void* memory, uint64_t* sum) {
    const auto found = memory_.find(memory);
    if (found == memory_.end()) return;
    *sum -= found->second;
    memory_.erase(found);
  }

  const std::shared_ptr<cuda::Device> inner_;
  cuda::DeviceInfo info_;
  std::atomic<uint64_t> fail_allocation_{0};
  mutable std::mutex mutex_;          // guards the following members
  std::map<void*, uint64_t> memory_;  // bytes, of either kind
  uint64_t device_bytes_ = 0;
  uint64_t pinned_bytes_ = 0;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_TRACKED_DEVICE_H_
