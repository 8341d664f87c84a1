// ServerRegistry: the process's parameter servers, shared by everything in it that looks up.
//
// - The default server is set by hps.Init. The same configuration again is a no-op, another one an error naming both.
// - Servers opened from a configuration are named by its hash: equal configurations share one server, different ones
//   live side by side. The registry does not keep them alive, their users do.
// - A handle is a name that a TensorFlow resource carries. Binding says which configuration stands behind it; the
//   server is opened by an explicit OpenHandle (a SavedModel being loaded) or by the first lookup through it.
//
// Thread safety: all functions may be called from any thread. The registry is never destroyed; in a forked child it is
// empty.

#ifndef HPS_SERVER_REGISTRY_H_
#define HPS_SERVER_REGISTRY_H_

#include <memory>
#include <string>
#include <vector>

#include "hps/config.h"
#include "hps/parameter_server.h"
#include "hps/status.h"

namespace hps {

// The handle name of the default server.
inline constexpr char kDefaultHandle[] = "hps_default";

// Opens the server of a configuration, or shares the one that is open.
Result<std::shared_ptr<ParameterServer>> OpenSharedServer(const ServerConfig& config,
                                                          const ServerOptions& options = {});

Status InitDefaultServer(const std::string& config_path, const ServerOptions& options = {});
// kFailedPrecondition, telling how to initialise, if there is none.
Result<std::shared_ptr<ParameterServer>> DefaultServer();

// kFailedPrecondition if the handle is bound to another configuration file.
Status BindHandle(const std::string& handle, const std::string& config_path);
// Opens the server behind the handle now and keeps it open until ReleaseHandle.
Status OpenHandle(const std::string& handle);
Result<std::shared_ptr<ParameterServer>> ServerOfHandle(const std::string& handle);
void ReleaseHandle(const std::string& handle);

// A GPU that servers which the registry opens from now on may use, and where their memory there comes from; nullptr:
// from the device itself. What was said of a GPU first stays. Without any, these servers have no caches: a framework
// that is the process's host says which GPUs are its own and lends their memory.
void AddDevice(int ordinal, std::shared_ptr<DeviceAllocator> allocator);

// Every server open now, the default one first.
std::vector<std::shared_ptr<ParameterServer>> OpenServers();

// Closes every open server and forgets the default one. Handles stay bound: a later lookup through one opens its
// server again.
Status ShutdownServers();

}  // namespace hps

#endif  // HPS_SERVER_REGISTRY_H_
