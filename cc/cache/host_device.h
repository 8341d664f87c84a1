// HostDevice: the processor in the place of a GPU, for tests and for builds without CUDA.
//
// "Device memory" is memory of the host, and each stream is a thread that carries out what was queued, so that
// everything above runs as concurrently as over a GPU and the sanitizers see it. New memory is filled with rubbish, and
// freed memory is gone at once (a GPU may wait with that for running work): both are stricter than CUDA.
//
// A stream can be captured as into a CUDA graph, whose nodes are the closures that would have been queued.
//
// Faults can be ordered: the n-th allocation fails; the device is lost; streams stand still.
//
// Thread safety: as cuda::Device. Streams and events must be destroyed before the device.

#ifndef HPS_CACHE_HOST_DEVICE_H_
#define HPS_CACHE_HOST_DEVICE_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cc/cache/host_kernels.h"
#include "cuda_kernels/device.h"

namespace hps {

struct HostDeviceOptions {
  int ordinal = 0;
  uint64_t memory_bytes = uint64_t{1} << 40;  // allocations beyond fail: out of memory
};

using HostGraph = std::vector<std::function<void()>>;

class HostDevice final : public cuda::Device {
 public:
  explicit HostDevice(const HostDeviceOptions& options = {});
  ~HostDevice() override;

  // Faults. The n-th allocation from now on, of either kind of memory, fails (1: the next); 0: none does.
  void FailAllocation(uint64_t n) { fail_allocation_.store(n); }
  // From now on every call fails with this error and queued work is not done; events count as done.
  void Lose(int error) { lost_.store(error); }
  // While true, streams finish what they are at and begin nothing.
  void Hold(bool hold);
  void HoldStream(cudaStream_t stream, bool hold);

  // Until EndCapture, launches and copies on the stream go into the graph. What has no place there (asking the stream
  // or waiting for it, events) fails, spoils the capture, and EndCapture says so.
  int BeginCapture(cudaStream_t stream);
  int EndCapture(cudaStream_t stream, HostGraph* graph);
  int Replay(const HostGraph& graph, cudaStream_t stream);

  enum Launch {
    kClear,
    kQuery,
    kFill,
    kInsert,
    kUpdate,
    kErase,
    kExchange,
    kDump,
    kWiden,
    kSplits,
    kPooledQuery,
    kPool,
    kLaunches,
  };
  uint64_t launches(Launch kind) const { return launches_[kind].load(); }
  uint64_t copies() const { return copies_.load(); }
  uint64_t events_recorded() const { return events_recorded_.load(); }
  uint64_t allocations() const;      // alive
  uint64_t allocated_bytes() const;  // of the device, alive
  uint64_t pinned_bytes() const;     // of the host, alive

  const cuda::DeviceInfo& info() const override { return info_; }
  const char* ErrorText(int error) const override;
  int Allocate(size_t bytes, void** memory) override;
  void Free(void* memory) override;
  int FreeMemory(uint64_t* bytes) override;
  int AllocateHost(size_t bytes, void** memory, void** device_address) override;
  void FreeHost(void* memory) override;
  int CreateStream(cudaStream_t* stream) override;
  void DestroyStream(cudaStream_t stream) override;
  int QueryStream(cudaStream_t stream) override;
  int SynchronizeStream(cudaStream_t stream) override;
  int IsCapturing(cudaStream_t stream, bool* capturing) override;
  int Synchronize() override;
  int CreateEvent(cudaEvent_t* event) override;
  void DestroyEvent(cudaEvent_t event) override;
  int RecordEvent(cudaEvent_t event, cudaStream_t stream) override;
  int QueryEvent(cudaEvent_t event) override;
  int SynchronizeEvent(cudaEvent_t event) override;
  int WaitEvent(cudaStream_t stream, cudaEvent_t event) override;
  int Copy(void* to, const void* from, size_t bytes, cudaStream_t stream) override;
  int Zero(void* memory, size_t bytes, cudaStream_t stream) override;
  int Clear(const cuda::CacheTable& table, cudaStream_t stream) override;
  int Query(const cuda::QueryPart* parts, int num_parts, const cuda::QueryWorkspace& workspace, uint32_t stamp,
            cudaStream_t stream) override;
  int UntoldQuery(const cuda::QueryPart* parts, int num_parts, cudaStream_t stream) override;
  int Fill(const cuda::QueryPart* parts, int num_parts, const cuda::QueryWorkspace& workspace,
           const cuda::FillRequest& request, cudaStream_t stream) override;
  int Insert(const cuda::CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, bool spill,
             uint32_t* evicted, cudaStream_t stream) override;
  int Update(const cuda::CacheTable& table, const int64_t* keys, const void* rows, uint32_t count,
             cudaStream_t stream) override;
  int Erase(const cuda::CacheTable& table, const int64_t* keys, uint32_t count, cudaStream_t stream) override;
  int Exchange(const cuda::CacheTable& table, uint64_t first, uint64_t last, cudaStream_t stream) override;
  int Dump(const cuda::CacheTable& table, uint64_t first, uint64_t last, int64_t* keys, uint32_t* count,
           cudaStream_t stream) override;
  int Widen(const cuda::WidenPart* parts, int num_parts, cudaStream_t stream) override;
  int Splits(const cuda::IndexPart* parts, int num_parts, const cuda::PooledWorkspace& workspace,
             cudaStream_t stream) override;
  int PooledQuery(const cuda::PooledPart* parts, int num_parts, const cuda::PooledWorkspace& workspace, uint32_t stamp,
                  cudaStream_t stream) override;
  int Pool(const cuda::PooledPart* parts, int num_parts, cudaStream_t stream) override;

 private:
  struct Stream;
  struct Event;
  struct Gate;

  int TakeMemory(size_t bytes, bool on_device, void** memory);
  void GiveMemory(void* memory);
  Stream* StreamOf(cudaStream_t stream);
  int Enqueue(cudaStream_t stream, std::function<void()> work);
  int EnqueueLaunch(Launch kind, cudaStream_t stream, std::function<void()> work);

  cuda::DeviceInfo info_;
  BucketLocks locks_;
  std::atomic<uint64_t> fail_allocation_{0};
  std::atomic<int> lost_{0};
  std::array<std::atomic<uint64_t>, kLaunches> launches_{};
  std::atomic<uint64_t> copies_{0};
  std::atomic<uint64_t> events_recorded_{0};
  const std::shared_ptr<Gate> gate_;
  mutable std::mutex mutex_;                         // guards the following members
  std::map<void*, std::pair<size_t, bool>> memory_;  // bytes; whether of the device
  uint64_t device_bytes_ = 0;
  uint64_t pinned_bytes_ = 0;
  std::unique_ptr<Stream> default_stream_;
  std::map<Stream*, std::shared_ptr<Stream>> streams_;  // the others
};

}  // namespace hps

#endif  // HPS_CACHE_HOST_DEVICE_H_
