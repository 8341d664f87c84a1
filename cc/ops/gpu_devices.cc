// TensorFlow's allocators belong to the process and are never destroyed, so pointers to them may be kept.

#include "cc/ops/gpu_devices.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "hps/server_registry.h"
#include "tensorflow/core/common_runtime/device.h"
#include "tensorflow/core/common_runtime/device_mgr.h"
#include "tensorflow/core/framework/function.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "xla/stream_executor/stream.h"

namespace hps {
namespace {

namespace tf = tensorflow;

class TensorFlowAllocator : public DeviceAllocator {
 public:
  explicit TensorFlowAllocator(tf::Allocator* allocator) : allocator_(allocator) {}

  void* Allocate(size_t bytes) override {
    // Without a second try: it would wait ten seconds for others to free memory.
    const tf::AllocationAttributes attributes(/*retry_on_failure=*/false, /*allocation_will_be_logged=*/true, nullptr);
    return allocator_->AllocateRaw(256, bytes, attributes);
  }
  void Free(void* memory) override { allocator_->DeallocateRaw(memory); }
  std::optional<uint64_t> FreeBytes() const override {
    const auto stats = allocator_->GetStats();
    if (!stats || !stats->bytes_limit) return std::nullopt;
    return static_cast<uint64_t>(std::max<int64_t>(0, *stats->bytes_limit - stats->bytes_in_use));
  }

 private:
  tf::Allocator* const allocator_;
};

}  // namespace

void AddTensorFlowDevices(tf::OpKernelContext* context) {
  if (context->function_library() == nullptr) return;
  const tf::DeviceMgr* const manager = context->function_library()->device_mgr();
  if (manager == nullptr) return;
  for (tf::Device* device : manager->ListDevices()) {
    const auto* info = device->tensorflow_accelerator_device_info();
    if (device->device_type() != tf::DEVICE_GPU || info == nullptr || info->gpu_id < 0) continue;
    AddDevice(info->gpu_id, std::make_shared<TensorFlowAllocator>(device->GetAllocator(tf::AllocatorAttributes())));
  }
}

void AddTensorFlowDevicesOnce(tf::OpKernelContext* context) {
  static std::atomic<bool> done{false};
  if (done.load(std::memory_order_acquire)) return;
  AddTensorFlowDevices(context);
  done.store(true, std::memory_order_release);
}

int GpuOrdinal(tf::OpKernelContext* context) {
  const auto* info = context->device()->tensorflow_accelerator_device_info();
  return info == nullptr ? -1 : info->gpu_id;
}

DeviceStream StreamOf(tf::OpKernelContext* context) {
  return static_cast<DeviceStream>(context->op_device_context()->stream()->platform_specific_handle().stream);
}

}  // namespace hps
