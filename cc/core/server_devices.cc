// Lock order: mutex_, those of queues and refresher.

#include "cc/core/server_devices.h"

#include <algorithm>

namespace hps {
namespace {

std::string Mebibytes(uint64_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

}  // namespace

int ServerDevices::count() const {
  std::call_once(counted_, [this] { count_ = source_.count(); });
  return count_;
}

Result<ServerDevices::Shared*> ServerDevices::Open(int device) {
  if (const auto found = devices_.find(device); found != devices_.end()) return &found->second;
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<cuda::Device> opened, source_.open(device));
  Shared& shared = devices_[device];
  shared.context = DeviceContext::Make(std::move(opened), source_.allocator(device));
  return &shared;
}

Result<ServerDevices::Shared> ServerDevices::Use(int device) {
  std::lock_guard lock(mutex_);
  if (stopped_) return FailedPrecondition("the parameter server was closed");
  HPS_ASSIGN_OR_RETURN(Shared * shared, Open(device));
  HPS_RETURN_IF_ERROR(shared->context->CheckAlive());
  if (shared->writer == nullptr) {
    HPS_ASSIGN_OR_RETURN(shared->writer, CacheWriter::Open(shared->context));
    shared->inserts = std::make_shared<InsertQueue>();
  }
  if (refresher_ == nullptr) refresher_ = std::make_unique<CacheRefresher>(source_.trim_interval);
  return *shared;
}

Status ServerDevices::CheckFreeMemory(const std::vector<Need>& needs) {
  std::map<int, std::vector<const Need*>> by_device;
  for (const Need& need : needs) by_device[need.device].push_back(&need);
  std::lock_guard lock(mutex_);
  uint64_t buffers = 0;
  for (const auto& [device, wants] : by_device) {
    auto opened = Open(device);
    if (!opened.ok()) return opened.status().WithContext("model '" + wants.front()->model + "'");
    Shared* const shared = *opened;
    HPS_ASSIGN_OR_RETURN(const uint64_t free, shared->context->FreeMemory());
    uint64_t bytes = shared->writer == nullptr ? CacheWriter::kBufferBytes : 0;
    buffers += bytes;  // as much is pinned
    for (const Need* want : wants) bytes += want->bytes;
    if (bytes <= free) continue;
    const Need& largest = **std::max_element(wants.begin(), wants.end(),
                                             [](const Need* a, const Need* b) { return a->bytes < b->bytes; });
    const std::string whose = wants.size() == 1 ? "the caches and workspaces of model '" + largest.model + "' need "
                                                : "the caches and workspaces of " + std::to_string(wants.size()) +
                                                      " models (most of all '" + largest.model + "' with " +
                                                      Mebibytes(largest.bytes) + ") need ";
    return ResourceExhausted("device " + std::to_string(device) + " (" + shared->context->device().info().name +
                             "): " + whose + std::to_string(bytes) + " bytes (" + Mebibytes(bytes) + ") and " +
                             std::to_string(free) + " (" + Mebibytes(free) +
                             ") are free; use a smaller gpucacheper or max_batch_size, give the device fewer models "
                             "(deployed_device_list), unload models, or set \"gpucache\": false");
  }
  return CheckHostMemory(needs, buffers);
}

Status ServerDevices::CheckHostMemory(const std::vector<Need>& needs, uint64_t buffers) const {
  uint64_t bytes = buffers;
  const Need* largest = nullptr;
  for (const Need& need : needs) {
    bytes += need.pinned_bytes;
    if (largest == nullptr || need.pinned_bytes > largest->pinned_bytes) largest = &need;
  }
  const std::optional<uint64_t> available = needs.empty() ? std::nullopt : source_.host_memory();
  if (!available || bytes <= *available) return OkStatus();
  return ResourceExhausted("host memory: caches and workspaces pin " + std::to_string(bytes) + " bytes (" +
                           Mebibytes(bytes) + "), most of all model '" + largest->model + "' with " +
                           Mebibytes(largest->pinned_bytes) + " for device " + std::to_string(largest->device) +
                           ", and " + std::to_string(*available) + " (" + Mebibytes(*available) +
                           ") are available; leave enable_pagelock out where the GPU has room, use "
                           "\"embedding_cache_type\": \"dynamic\", or name fewer GPUs in deployed_device_list (each "
                           "pins rows of its own)");
}

CacheRefresher* ServerDevices::refresher() const {
  std::lock_guard lock(mutex_);
  return refresher_.get();
}

std::map<int, ServerDevices::Shared> ServerDevices::opened() const {
  std::lock_guard lock(mutex_);
  return devices_;
}

void ServerDevices::Stop() {
  std::lock_guard lock(mutex_);
  stopped_ = true;
  if (refresher_) refresher_->Stop();
  for (auto& [device, shared] : devices_) {
    if (shared.inserts) shared.inserts->Stop();
    shared.writer.reset();
  }
}

}  // namespace hps
