#include "cc/cache/device_context.h"

namespace hps {
namespace {

std::string NameOf(const cuda::Device& device) {
  return "device " + std::to_string(device.info().ordinal) + " (" + device.info().name + ")";
}

}  // namespace

std::shared_ptr<DeviceContext> DeviceContext::Make(std::shared_ptr<cuda::Device> device,
                                                   std::shared_ptr<DeviceAllocator> allocator) {
  return std::shared_ptr<DeviceContext>(new DeviceContext(std::move(device), std::move(allocator)));
}

Status DeviceContext::Check(int error, std::string_view what) {
  if (error == 0) return OkStatus();
  if (error == cuda::kErrorOutOfMemory) {
    return ResourceExhausted(NameOf(*device_) + ": no memory left for " + std::string(what));
  }
  if (error == cuda::kErrorInvalidValue) {
    return Internal(NameOf(*device_) + ": " + std::string(what) + " was refused: " + device_->ErrorText(error));
  }
  if (error >= cuda::kErrorCaptureFirst && error <= cuda::kErrorCaptureLast) {
    return FailedPrecondition(
        NameOf(*device_) + ": " + std::string(what) + ": " + device_->ErrorText(error) +
        ". While a stream is captured into a CUDA graph in mode 'global', no other thread may use "
        "the device freely: capture in mode 'thread local' or 'relaxed'");
  }
  std::lock_guard lock(mutex_);
  if (failure_.ok()) {
    const StatusCode code = error == cuda::kErrorUncorrectableMemory ? StatusCode::kDataLoss : StatusCode::kInternal;
    failure_ = Status(code, NameOf(*device_) + " failed: " + std::string(what) + ": " + device_->ErrorText(error) +
                                " (error " + std::to_string(error) +
                                "); its caches cannot be used any more. Look for its messages in the system's log and "
                                "start the process anew");
    failed_.store(true, std::memory_order_release);
  }
  return failure_;
}

Status DeviceContext::CheckAlive() const {
  if (!failed_.load(std::memory_order_acquire)) return OkStatus();
  std::lock_guard lock(mutex_);
  return failure_;
}

Result<uint64_t> DeviceContext::FreeMemory() {
  if (allocator_ != nullptr) {
    if (const auto free = allocator_->FreeBytes()) return *free;
  }
  uint64_t free = 0;
  HPS_RETURN_IF_ERROR(Check(device_->FreeMemory(&free), "asking for its free memory"));
  return free;
}

Result<DeviceMemory> DeviceMemory::Allocate(DeviceContext& context, size_t bytes, std::string_view purpose) {
  void* data = nullptr;
  int error = 0;
  if (context.allocator_ != nullptr) {
    data = context.allocator_->Allocate(bytes);
    error = data == nullptr ? cuda::kErrorOutOfMemory : context.device().Synchronize();
    if (error != 0 && data != nullptr) context.allocator_->Free(data);
  } else {
    error = context.device().Allocate(bytes, &data);
  }
  HPS_RETURN_IF_ERROR(
      context.Check(error, std::to_string(bytes) + " bytes of device memory for " + std::string(purpose)));
  DeviceMemory memory;
  memory.context_ = context.shared_from_this();
  memory.data_ = static_cast<std::byte*>(data);
  memory.bytes_ = bytes;
  return memory;
}

void DeviceMemory::Reset() {
  if (data_ == nullptr) return;
  if (context_->allocator_ != nullptr) {
    context_->allocator_->Free(data_);
  } else {
    context_->device().Free(data_);
  }
  data_ = nullptr;
  bytes_ = 0;
}

Result<PinnedMemory> PinnedMemory::Allocate(DeviceContext& context, size_t bytes, std::string_view purpose) {
  void* host = nullptr;
  void* device = nullptr;
  HPS_RETURN_IF_ERROR(
      context.Check(context.device().AllocateHost(bytes, &host, &device),
                    std::to_string(bytes) + " bytes of pinned host memory for " + std::string(purpose)));
  PinnedMemory memory;
  memory.context_ = context.shared_from_this();
  memory.host_ = static_cast<std::byte*>(host);
  memory.device_ = static_cast<std::byte*>(device);
  memory.bytes_ = bytes;
  return memory;
}

void PinnedMemory::Reset() {
  if (host_ != nullptr) context_->device().FreeHost(host_);
  host_ = nullptr;
  bytes_ = 0;
}

Result<OwnedStream> OwnedStream::Create(DeviceContext& context) {
  OwnedStream result;
  HPS_RETURN_IF_ERROR(context.Check(context.device().CreateStream(&result.stream_), "making a stream"));
  result.context_ = context.shared_from_this();
  return result;
}

Result<OwnedEvent> OwnedEvent::Create(DeviceContext& context) {
  OwnedEvent result;
  HPS_RETURN_IF_ERROR(context.Check(context.device().CreateEvent(&result.event_), "making an event"));
  result.context_ = context.shared_from_this();
  return result;
}

}  // namespace hps
