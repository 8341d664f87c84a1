// Lock order: Registry::mutex is held for map operations only, never while a server opens, closes or is destroyed.
// Entry::mutex of one configuration is held while its server opens, so that equal configurations wait for each other
// and others do not.

#include "hps/server_registry.h"

#include <map>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

#include "cc/base/fork_guard.h"
#include "cc/core/devices.h"

namespace hps {
namespace {

struct Entry {
  std::mutex mutex;
  std::weak_ptr<ParameterServer> server;
};

struct Handle {
  std::string config_path;
  std::shared_ptr<ParameterServer> server;  // nullptr until opened
};

struct Registry {
  std::shared_mutex mutex;
  std::shared_ptr<ParameterServer> default_server;
  std::map<std::string, std::shared_ptr<Entry>> entries;  // by configuration hash
  std::unordered_map<std::string, Handle> handles;
  DeviceAllocators devices;
};

Registry& Instance() { return ProcessInstance<Registry>(); }

}  // namespace

Result<std::shared_ptr<ParameterServer>> OpenSharedServer(const ServerConfig& config, const ServerOptions& options) {
  Registry& registry = Instance();
  std::shared_ptr<Entry> entry;
  {
    std::lock_guard lock(registry.mutex);
    std::shared_ptr<Entry>& slot = registry.entries[ConfigHash(config)];
    if (!slot) slot = std::make_shared<Entry>();
    entry = slot;
  }
  std::lock_guard lock(entry->mutex);
  std::shared_ptr<ParameterServer> server = entry->server.lock();
  if (server && !server->closed()) return server;
  ServerOptions with_devices = options;
  if (with_devices.devices == nullptr) {
    std::lock_guard lock(registry.mutex);
    with_devices.devices = std::make_shared<const DeviceSource>(OnlyDevices(DeviceSource(), registry.devices));
  }
  HPS_ASSIGN_OR_RETURN(server, ParameterServer::Open(config, with_devices));
  entry->server = server;
  return server;
}

Status InitDefaultServer(const std::string& config_path, const ServerOptions& options) {
  HPS_ASSIGN_OR_RETURN(ServerConfig config, LoadConfig(config_path));
  Registry& registry = Instance();
  auto check = [&](const std::shared_ptr<ParameterServer>& current) -> Status {
    if (ConfigHash(current->config()) == ConfigHash(config)) return OkStatus();
    if (current->config().origin == config.origin) {
      return FailedPrecondition("the process is initialised with " + config.origin +
                                ", and what that file says has changed since; call hps.shutdown() first to use it");
    }
    return FailedPrecondition(
        "the process is initialised with the configuration " + current->config().origin +
        " and cannot be initialised again with another one, " + config.origin +
        "; call hps.shutdown() first, or give the layers ps_config_file to use both side by side");
  };
  auto is_open = [&] { return registry.default_server && !registry.default_server->closed(); };
  {
    std::shared_lock lock(registry.mutex);
    if (is_open()) return check(registry.default_server);
  }
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<ParameterServer> server, OpenSharedServer(config, options));
  std::lock_guard lock(registry.mutex);
  if (is_open()) return check(registry.default_server);
  registry.default_server.swap(server);
  return OkStatus();
}

Result<std::shared_ptr<ParameterServer>> DefaultServer() {
  Registry& registry = Instance();
  std::shared_lock lock(registry.mutex);
  if (registry.default_server) return registry.default_server;
  if (ForkGeneration() > 0) HPS_RETURN_IF_ERROR(CheckNotForked(0));
  return FailedPrecondition(
      "no parameter server is initialised in this process; call hps.Init(ps_config_file=..., global_batch_size=...) "
      "before the first lookup, or give the layer ps_config_file");
}

Status BindHandle(const std::string& handle, const std::string& config_path) {
  Registry& registry = Instance();
  std::lock_guard lock(registry.mutex);
  Handle& bound = registry.handles[handle];
  if (!bound.config_path.empty() && bound.config_path != config_path) {
    return FailedPrecondition("the handle '" + handle + "' is bound to the configuration " + bound.config_path +
                              " and cannot be bound to " + config_path);
  }
  bound.config_path = config_path;
  return OkStatus();
}

Status OpenHandle(const std::string& handle) { return ServerOfHandle(handle).status(); }

Result<std::shared_ptr<ParameterServer>> ServerOfHandle(const std::string& handle) {
  if (handle == kDefaultHandle) return DefaultServer();
  Registry& registry = Instance();
  std::string config_path;
  {
    std::shared_lock lock(registry.mutex);
    auto found = registry.handles.find(handle);
    if (found == registry.handles.end()) {
      if (ForkGeneration() > 0) HPS_RETURN_IF_ERROR(CheckNotForked(0));
      return FailedPrecondition("the server handle '" + handle +
                                "' was not initialised in this process; run the SavedModel's initialiser (loading "
                                "does), and see that HPS_INIT is not 'off'");
    }
    const std::shared_ptr<ParameterServer>& server = found->second.server;
    if (server && !server->closed()) return server;
    config_path = found->second.config_path;
  }
  HPS_ASSIGN_OR_RETURN(ServerConfig config, LoadConfig(config_path));
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<ParameterServer> server, OpenSharedServer(config));
  std::shared_ptr<ParameterServer> closed;
  std::lock_guard lock(registry.mutex);
  auto found = registry.handles.find(handle);
  if (found != registry.handles.end()) closed = std::exchange(found->second.server, server);
  return server;
}

void AddDevice(int ordinal, std::shared_ptr<DeviceAllocator> allocator) {
  Registry& registry = Instance();
  std::lock_guard lock(registry.mutex);
  registry.devices.emplace(ordinal, std::move(allocator));
}

void ReleaseHandle(const std::string& handle) {
  Registry& registry = Instance();
  std::shared_ptr<ParameterServer> last;  // closed after the lock
  std::lock_guard lock(registry.mutex);
  auto found = registry.handles.find(handle);
  if (found == registry.handles.end()) return;
  last = std::move(found->second.server);
  registry.handles.erase(found);
}

std::vector<std::shared_ptr<ParameterServer>> OpenServers() {
  Registry& registry = Instance();
  std::vector<std::shared_ptr<ParameterServer>> servers;
  std::vector<std::shared_ptr<ParameterServer>> others;  // this may be their last reference
  std::shared_lock lock(registry.mutex);
  if (registry.default_server && !registry.default_server->closed()) servers.push_back(registry.default_server);
  for (const auto& [hash, entry] : registry.entries) {
    // A held mutex means that the server is being opened: it is not open yet.
    std::unique_lock entry_lock(entry->mutex, std::try_to_lock);
    if (!entry_lock) continue;
    auto server = entry->server.lock();
    const bool listed = server && !server->closed() && server != registry.default_server;
    (listed ? servers : others).push_back(std::move(server));
  }
  return servers;
}

Status ShutdownServers() {
  Registry& registry = Instance();
  std::vector<std::shared_ptr<ParameterServer>> servers = OpenServers();
  {
    std::lock_guard lock(registry.mutex);
    servers.push_back(std::exchange(registry.default_server, nullptr));
    for (auto& [name, handle] : registry.handles) servers.push_back(std::exchange(handle.server, nullptr));
  }
  std::erase(servers, nullptr);
  Status status;
  for (auto& server : servers) {
    Status closed = server->Close();
    if (status.ok()) status = std::move(closed);
  }
  return status;
}

}  // namespace hps
