#include "cc/core/devices.h"

namespace hps {

#ifdef HPS_WITH_CUDA

int DeviceCount(std::string* why_none) {
  int count = 0;
  const int error = cuda::CudaDeviceCount(&count);
  if (error == 0 && count > 0) return count;
  if (why_none != nullptr) {
    *why_none = error == 0 || error == cuda::kErrorNoDevice
                    ? "this process sees no GPU"
                    : "CUDA does not work here: " + std::string(cuda::ErrorText(error));
  }
  return 0;
}

Result<std::shared_ptr<cuda::Device>> OpenDevice(int ordinal) {
  std::string why_none;
  const int count = DeviceCount(&why_none);
  if (ordinal < 0 || ordinal >= count) {
    return InvalidArgument("there is no GPU " + std::to_string(ordinal) + ": " +
                           (count == 0 ? why_none : "this process sees " + std::to_string(count)));
  }
  int error = 0;
  std::shared_ptr<cuda::Device> device = cuda::OpenCudaDevice(ordinal, &error);
  if (device == nullptr) {
    return Unavailable("GPU " + std::to_string(ordinal) + " cannot be used: " + cuda::ErrorText(error));
  }
  return device;
}

#else

int DeviceCount(std::string* why_none) {
  if (why_none != nullptr) *why_none = "this build is without CUDA";
  return 0;
}

Result<std::shared_ptr<cuda::Device>> OpenDevice(int ordinal) {
  return InvalidArgument("there is no GPU " + std::to_string(ordinal) + ": this build is without CUDA");
}

#endif

DeviceSource OnlyDevices(const DeviceSource& source, const DeviceAllocators& devices) {
  DeviceSource only = source;
  if (devices.empty()) only.count = [] { return 0; };
  only.open = [devices, open = source.open](int ordinal) -> Result<std::shared_ptr<cuda::Device>> {
    if (devices.contains(ordinal)) return open(ordinal);
    std::string there;
    for (const auto& [each, allocator] : devices) there += (there.empty() ? "" : ", ") + std::to_string(each);
    return InvalidArgument("GPU " + std::to_string(ordinal) +
                           " is in a deployed_device_list, but this process's framework does not use it, only " +
                           there + "; change the list, or let the framework see that GPU");
  };
  only.allocator = [devices](int ordinal) {
    const auto found = devices.find(ordinal);
    return found == devices.end() ? nullptr : found->second;
  };
  return only;
}

}  // namespace hps
