// Device: what the host side needs of one accelerator: memory, streams, events, copies and the launches of the device
// cache. Plain C++; users need no header of CUDA.
//
// There are two implementations: a GPU through the CUDA runtime (cuda_device.cu, where CUDA is built in) and the
// processor itself (cc/cache/host_device.h), which carries out the same launches by the same rules. Code above works
// with either, so that all of it is tested on machines without a GPU.
//
// Thread safety: all methods may be called from any thread. Each works on its own device and leaves the thread's
// current device as it was. Errors: 0, or the cudaError_t of the runtime (both implementations use its numbers). An
// error of a kernel appears at a later call, and stays.

#ifndef HPS_CUDA_KERNELS_DEVICE_H_
#define HPS_CUDA_KERNELS_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cuda_kernels/device_cache.h"
#include "cuda_kernels/device_pooling.h"

typedef struct CUevent_st* cudaEvent_t;  // as in CUDA's own headers

namespace hps::cuda {

inline constexpr int kErrorInvalidValue = 1;
inline constexpr int kErrorOutOfMemory = 2;
inline constexpr int kErrorNoDevice = 100;
inline constexpr int kErrorInvalidDevice = 101;
inline constexpr int kErrorUncorrectableMemory = 214;
inline constexpr int kErrorNotReady = 600;
inline constexpr int kErrorLaunchFailure = 719;
// Calls that do not go together with a capture into a graph: mistakes of who captures, not failures of the device.
inline constexpr int kErrorCaptureFirst = 900;
inline constexpr int kErrorCaptureInvalidated = 901;
inline constexpr int kErrorCaptureLast = 908;

struct DeviceInfo {
  int ordinal = 0;
  char name[256] = {};
  uint64_t memory_bytes = 0;
  int compute_major = 0;  // 0: not a GPU
  int compute_minor = 0;
};

class Device {
 public:
  virtual ~Device() = default;

  virtual const DeviceInfo& info() const = 0;
  virtual const char* ErrorText(int error) const = 0;

  // Memory of the device, at a multiple of 256, with arbitrary contents. bytes > 0.
  virtual int Allocate(size_t bytes, void** memory) = 0;
  // May wait for the device; nothing that runs there may use the memory any more. nullptr is ignored.
  virtual void Free(void* memory) = 0;
  virtual int FreeMemory(uint64_t* bytes) = 0;
  // Memory of the host that copies need no staging for and that kernels can use, under the address *device_address.
  virtual int AllocateHost(size_t bytes, void** memory, void** device_address) = 0;
  virtual void FreeHost(void* memory) = 0;

  // A stream that does not wait for the default stream (nullptr), nor it for this one.
  virtual int CreateStream(cudaStream_t* stream) = 0;
  virtual void DestroyStream(cudaStream_t stream) = 0;
  // 0: all work of the stream is done; kErrorNotReady: not yet.
  virtual int QueryStream(cudaStream_t stream) = 0;
  virtual int SynchronizeStream(cudaStream_t stream) = 0;
  // Whether what is queued on the stream is captured into a graph and not carried out, or may not be queued because of
  // a capture. Of the methods below that take a stream, launches, Copy (not of pageable memory) and Zero can be
  // captured.
  virtual int IsCapturing(cudaStream_t stream, bool* capturing) = 0;

  // Waits for all work of all streams.
  virtual int Synchronize() = 0;

  // An event counts as done until it is recorded for the first time.
  virtual int CreateEvent(cudaEvent_t* event) = 0;
  virtual void DestroyEvent(cudaEvent_t event) = 0;
  virtual int RecordEvent(cudaEvent_t event, cudaStream_t stream) = 0;
  virtual int QueryEvent(cudaEvent_t event) = 0;
  virtual int SynchronizeEvent(cudaEvent_t event) = 0;
  // Later work of the stream begins when what the event has recorded so far is done.
  virtual int WaitEvent(cudaStream_t stream, cudaEvent_t event) = 0;

  // Either side may be on the device or on the host. Host memory that is not from AllocateHost may make the call wait.
  virtual int Copy(void* to, const void* from, size_t bytes, cudaStream_t stream) = 0;
  virtual int Zero(void* memory, size_t bytes, cudaStream_t stream) = 0;

  // device_cache.h.
  virtual int Clear(const CacheTable& table, cudaStream_t stream) = 0;
  virtual int Query(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, uint32_t stamp,
                    cudaStream_t stream) = 0;
  virtual int UntoldQuery(const QueryPart* parts, int num_parts, cudaStream_t stream) = 0;
  virtual int Fill(const QueryPart* parts, int num_parts, const QueryWorkspace& workspace, const FillRequest& request,
                   cudaStream_t stream) = 0;
  virtual int Insert(const CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, bool spill,
                     uint32_t* evicted, cudaStream_t stream) = 0;
  virtual int Update(const CacheTable& table, const int64_t* keys, const void* rows, uint32_t count,
                     cudaStream_t stream) = 0;
  virtual int Erase(const CacheTable& table, const int64_t* keys, uint32_t count, cudaStream_t stream) = 0;
  virtual int Exchange(const CacheTable& table, uint64_t first, uint64_t last, cudaStream_t stream) = 0;
  virtual int Dump(const CacheTable& table, uint64_t first, uint64_t last, int64_t* keys, uint32_t* count,
                   cudaStream_t stream) = 0;

  // device_pooling.h.
  virtual int Widen(const WidenPart* parts, int num_parts, cudaStream_t stream) = 0;
  virtual int Splits(const IndexPart* parts, int num_parts, const PooledWorkspace& workspace, cudaStream_t stream) = 0;
  virtual int PooledQuery(const PooledPart* parts, int num_parts, const PooledWorkspace& workspace, uint32_t stamp,
                          cudaStream_t stream) = 0;
  virtual int Pool(const PooledPart* parts, int num_parts, cudaStream_t stream) = 0;
};

// The GPUs of this process (what CUDA_VISIBLE_DEVICES leaves). Where CUDA is not built in these are not linked.
int CudaDeviceCount(int* count);
// nullptr and *error where there is no such device or it cannot be used.
std::unique_ptr<Device> OpenCudaDevice(int ordinal, int* error);

}  // namespace hps::cuda

#endif  // HPS_CUDA_KERNELS_DEVICE_H_
