// ServerDevices: what the models of one server share on the devices: each device's context, writer and insert queue,
// and the thread that refreshes caches and gives idle workspaces back. A device is opened by the first model that is
// placed on it.
//
// Thread safety: all methods may be called from any thread.

#ifndef HPS_CORE_SERVER_DEVICES_H_
#define HPS_CORE_SERVER_DEVICES_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cc/cache/cache_plan.h"
#include "cc/cache/cache_refresher.h"
#include "cc/cache/cache_writer.h"
#include "cc/cache/insert_queue.h"
#include "cc/core/devices.h"

namespace hps {

class ServerDevices {
 public:
  struct Shared {
    std::shared_ptr<DeviceContext> context;
    std::shared_ptr<CacheWriter> writer;  // both nullptr where nothing was placed on the device yet
    std::shared_ptr<InsertQueue> inserts;
  };

  explicit ServerDevices(DeviceSource source) : source_(std::move(source)) {}
  ~ServerDevices() { Stop(); }

  // Devices of the process, numbered from 0. The first call asks the driver.
  int count() const;

  // Makes the writer and the queue of the device if they are not there.
  Result<Shared> Use(int device);

  // Memory that a model wants on a device, on top of what is taken.
  struct Need {
    std::string model;
    int device = 0;
    uint64_t bytes = 0;
    uint64_t pinned_bytes = 0;  // of the host
  };
  // kResourceExhausted where a device has less free than all needs of it together, or the host less than what they want
  // to pin; it names models, bytes and remedy. Takes no memory.
  Status CheckFreeMemory(const std::vector<Need>& needs);

  // nullptr until a device is used.
  CacheRefresher* refresher() const;
  // By number, those that were opened.
  std::map<int, Shared> opened() const;

  // Ends the threads and lets go of what caches do not hold. Nothing can be placed on a device afterwards. Idempotent.
  void Stop();

 private:
  Result<Shared*> Open(int device);  // REQUIRES: mutex_
  Status CheckHostMemory(const std::vector<Need>& needs, uint64_t buffers) const;

  const DeviceSource source_;
  mutable std::once_flag counted_;
  mutable int count_ = 0;
  mutable std::mutex mutex_;  // guards the following members
  bool stopped_ = false;
  std::map<int, Shared> devices_;
  std::unique_ptr<CacheRefresher> refresher_;
};

}  // namespace hps

#endif  // HPS_CORE_SERVER_DEVICES_H_
