// Device over the CUDA runtime. Each call makes its device current and afterwards puts back the one that was: the host
// (TensorFlow, a server) has its own idea of the current device.

#include <cuda_runtime.h>

#include <cstdio>

#include "cuda_kernels/device.h"

namespace hps::cuda {
namespace {

static_assert(kErrorInvalidValue == cudaErrorInvalidValue);
static_assert(kErrorOutOfMemory == cudaErrorMemoryAllocation);
static_assert(kErrorNoDevice == cudaErrorNoDevice);
static_assert(kErrorInvalidDevice == cudaErrorInvalidDevice);
static_assert(kErrorUncorrectableMemory == cudaErrorECCUncorrectable);
static_assert(kErrorNotReady == cudaErrorNotReady);
static_assert(kErrorLaunchFailure == cudaErrorLaunchFailure);
static_assert(kErrorCaptureFirst == cudaErrorStreamCaptureUnsupported);
static_assert(kErrorCaptureInvalidated == cudaErrorStreamCaptureInvalidated);
static_assert(kErrorCaptureLast == cudaErrorStreamCaptureWrongThread);

class CurrentDevice {
 public:
  explicit CurrentDevice(int ordinal) : error_(cudaGetDevice(&before_)) {
    if (error_ == cudaSuccess && before_ != ordinal) {
      error_ = cudaSetDevice(ordinal);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~CurrentDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  int error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(const DeviceInfo& info) : info_(info) {}

  const DeviceInfo& info() const override { return info_; }
  const char* ErrorText(int error) const override { return hps::cuda::ErrorText(error); }

  int Allocate(size_t bytes, void** memory) override {
    return Here([&] { return cudaMalloc(memory, bytes); });
  }
  void Free(void* memory) override {
    Here([&] { return cudaFree(memory); });
  }
  int FreeMemory(uint64_t* bytes) override {
    return Here([&] {
      size_t free = 0, total = 0;
      const cudaError_t error = cudaMemGetInfo(&free, &total);
      *bytes = free;
      return error;
    });
  }
  int AllocateHost(size_t bytes, void** memory, void** device_address) override {
    return Here([&] {
      cudaError_t error = cudaHostAlloc(memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
      if (error != cudaSuccess) return error;
      error = cudaHostGetDevicePointer(device_address, *memory, 0);
      if (error != cudaSuccess) cudaFreeHost(*memory);
      return error;
    });
  }
  void FreeHost(void* memory) override {
    if (memory == nullptr) return;
    Here([&] { return cudaFreeHost(memory); });
  }

  int CreateStream(cudaStream_t* stream) override {
    return Here([&] { return cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking); });
  }
  void DestroyStream(cudaStream_t stream) override {
    Here([&] { return cudaStreamDestroy(stream); });
  }
  int QueryStream(cudaStream_t stream) override {
    return Here([&] { return cudaStreamQuery(stream); });
  }
  int SynchronizeStream(cudaStream_t stream) override {
    return Here([&] { return cudaStreamSynchronize(stream); });
  }
  int IsCapturing(cudaStream_t stream, bool* capturing) override {
    return Here([&] {
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
      cudaError_t error = cudaStreamIsCapturing(stream, &status);
      // The default stream, while a capture of another one forbids its use.
      const bool forbidden = error == cudaErrorStreamCaptureImplicit;
      if (forbidden) error = (cudaGetLastError(), cudaSuccess);
      *capturing = forbidden || status != cudaStreamCaptureStatusNone;
      return error;
    });
  }
  int Synchronize() override {
    return Here([] { return cudaDeviceSynchronize(); });
  }

  int CreateEvent(cudaEvent_t* event) override {
    return Here([&] { return cudaEventCreateWithFlags(event, cudaEventDisableTiming); });
  }
  void DestroyEvent(cudaEvent_t event) override {
    Here([&] { return cudaEventDestroy(event); });
  }
  int RecordEvent(cudaEvent_t event, cudaStream_t stream) override {
    return Here([&] { return cudaEventRecord(event, stream); });
  }
  int QueryEvent(cudaEvent_t event) override {
    return Here([&] { return cudaEventQuery(event); });
  }
  int SynchronizeEvent(cudaEvent_t event) override {
    return Here([&] { return cudaEventSynchronize(event); });
  }
  int WaitEvent(cudaStream_t stream, cudaEvent_t event) override {
    return Here([&] { return cudaStreamWaitEvent(stream, event, 0); });
  }

  int Copy(void* to, const void* from, size_t bytes, cudaStream_t stream) override {
    return Here([&] { return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream); });
  }
  int Zero(void* memory, size_t bytes, cudaStream_t stream) override {
    return Here([&] { return cudaMemsetAsync(memory, 0, bytes, stream); });
  }

  int Clear(const CacheTable& table, cudaStream_t stream) override {
    return Here([&] { return LaunchClear(table, stream); });
  }
  int Query(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, uint32_t stamp,
            cudaStream_t stream) override {
    return Here([&] { return LaunchQuery(parts, num_parts, workspace, stamp, stream); });
  }
  int UntoldQuery(const QueryPart* parts, int num_parts, cudaStream_t stream) override {
    return Here([&] { return LaunchUntoldQuery(parts, num_parts, stream); });
  }
  int Fill(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, const FillRequest& request,
           cudaStream_t stream) override {
    return Here([&] { return LaunchFill(parts, num_parts, workspace, request, stream); });
  }
  int Insert(const CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, bool spill,
             uint32_t* evicted, cudaStream_t stream) override {
    return Here([&] { return LaunchInsert(table, keys, rows, count, spill, evicted, stream); });
  }
  int Update(const CacheTable& table, const int64_t* keys, const void* rows, uint32_t count,
             cudaStream_t stream) override {
    return Here([&] { return LaunchUpdate(table, keys, rows, count, stream); });
  }
  int Erase(const CacheTable& table, const int64_t* keys, uint32_t count, cudaStream_t stream) override {
    return Here([&] { return LaunchErase(table, keys, count, stream); });
  }
  int Exchange(const CacheTable& table, uint64_t first, uint64_t last, cudaStream_t stream) override {
    return Here([&] { return LaunchExchange(table, first, last, stream); });
  }
  int Dump(const CacheTable& table, uint64_t first, uint64_t last, int64_t* keys, uint32_t* count,
           cudaStream_t stream) override {
    return Here([&] { return LaunchDump(table, first, last, keys, count, stream); });
  }
  int Widen(const WidenPart* parts, int num_parts, cudaStream_t stream) override {
    return Here([&] { return LaunchWiden(parts, num_parts, stream); });
  }
  int Splits(const IndexPart* parts, int num_parts, const PooledWorkspace& workspace, cudaStream_t stream) override {
    return Here([&] { return LaunchSplits(parts, num_parts, workspace, stream); });
  }
  int PooledQuery(const PooledPart* parts, int num_parts, const PooledWorkspace& workspace, uint32_t stamp,
                  cudaStream_t stream) override {
    return Here([&] { return LaunchPooledQuery(parts, num_parts, workspace, stamp, stream); });
  }
  int Pool(const PooledPart* parts, int num_parts, cudaStream_t stream) override {
    return Here([&] { return LaunchPool(parts, num_parts, stream); });
  }

 private:
  // An error that is not sticky is taken back, so that the next caller of cudaGetLastError does not meet it.
  template <typename Body>
  int Here(Body body) const {
    const CurrentDevice current(info_.ordinal);
    if (current.error() != 0) return current.error();
    const int error = static_cast<int>(body());
    if (error != 0) (void)cudaGetLastError();
    return error;
  }

  const DeviceInfo info_;
};

}  // namespace

int CudaDeviceCount(int* count) {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error != cudaSuccess) {
    *count = 0;
    (void)cudaGetLastError();
  }
  return error;
}

std::unique_ptr<Device> OpenCudaDevice(int ordinal, int* error) {
  cudaDeviceProp properties;
  *error = cudaGetDeviceProperties(&properties, ordinal);
  if (*error != 0) {
    (void)cudaGetLastError();
    return nullptr;
  }
  DeviceInfo info;
  info.ordinal = ordinal;
  std::snprintf(info.name, sizeof(info.name), "%s", properties.name);
  info.memory_bytes = properties.totalGlobalMem;
  info.compute_major = properties.major;
  info.compute_minor = properties.minor;
  return std::make_unique<CudaDevice>(info);
}

}  // namespace hps::cuda
