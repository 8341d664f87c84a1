// Devices: where a server may put caches.
//
// Thread safety: the functions of a source may be called from any thread. Ownership: an open device lives as long as
// somebody holds it.

#ifndef HPS_CORE_DEVICES_H_
#define HPS_CORE_DEVICES_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "cc/core/host_memory.h"
#include "cuda_kernels/device.h"
#include "hps/embedding_cache.h"
#include "hps/status.h"

namespace hps {

// How many GPUs this process sees, numbered from 0. 0 where CUDA is not built in, where there is no driver and where
// the driver does not work; *why_none, if given, then says which.
int DeviceCount(std::string* why_none = nullptr);
// kInvalidArgument: there is no such GPU. kUnavailable: it cannot be used, and why.
Result<std::shared_ptr<cuda::Device>> OpenDevice(int ordinal);

// What a server asks for devices (ServerOptions::devices). Tests put others in the place of GPUs.
struct DeviceSource {
  std::function<int()> count = [] { return DeviceCount(); };
  std::function<Result<std::shared_ptr<cuda::Device>>(int ordinal)> open = OpenDevice;
  // nullptr: memory comes from the device itself.
  std::function<std::shared_ptr<DeviceAllocator>(int ordinal)> allocator = [](int) { return nullptr; };
  // Memory of the host that may still be pinned; absent where nobody knows.
  std::function<std::optional<uint64_t>()> host_memory = [] { return AvailableMemoryBytes(); };
  std::chrono::milliseconds trim_interval{10'000};  // workspaces that were not needed for so long are given back
};

using DeviceAllocators = std::map<int, std::shared_ptr<DeviceAllocator>>;  // by ordinal; nullptr: the device itself

// Of the source's devices those that the map names, with its allocators. Opening another one is kInvalidArgument.
DeviceSource OnlyDevices(const DeviceSource& source, const DeviceAllocators& devices);

}  // namespace hps

#endif  // HPS_CORE_DEVICES_H_
