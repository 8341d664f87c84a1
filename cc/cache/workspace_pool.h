// WorkspacePool: lends workspaces to the lookups of one device.
//
// `reserved` workspaces of the configured size are made at the start; more are made on demand up to `limit`, and when
// those are lent as well a lookup waits, asleep, until one comes back or its deadline has passed. A workspace grows to
// the largest batch it has met; Trim gives back what has not been needed since the last Trim.
//
// Thread safety: all methods may be called from any thread. Leases may outlive the pool object.

#ifndef HPS_CACHE_WORKSPACE_POOL_H_
#define HPS_CACHE_WORKSPACE_POOL_H_

#include <atomic>
#include <memory>
#include <utility>

#include "cc/cache/lookup_workspace.h"

namespace hps {

struct WorkspacePoolOptions {
  uint32_t reserved = 1;  // num_of_worker_buffer_in_pool
  uint32_t limit = 16;    // at least `reserved`
  WorkspaceSize size;     // of the reserved ones: the configured largest batch
};

class WorkspacePool {
 public:
  // A workspace until it is destroyed, whatever the stream has still to do.
  class Lease {
   public:
    Lease() = default;
    ~Lease() { Return(); }
    Lease(Lease&& other) noexcept : state_(std::move(other.state_)), workspace_(std::move(other.workspace_)) {}
    Lease& operator=(Lease&& other) noexcept {
      std::swap(state_, other.state_);
      std::swap(workspace_, other.workspace_);
      return *this;
    }
    // Room for more positions than it was lent for.
    Status Reserve(uint32_t positions);
    LookupWorkspace* operator->() const { return workspace_.get(); }
    LookupWorkspace& operator*() const { return *workspace_; }

   private:
    friend class WorkspacePool;
    void Return();
    std::shared_ptr<struct WorkspacePoolState> state_;
    std::unique_ptr<LookupWorkspace> workspace_;
  };

  static Result<std::unique_ptr<WorkspacePool>> Open(std::shared_ptr<DeviceContext> context,
                                                     const WorkspacePoolOptions& options);

  // A workspace for so many positions. kDeadlineExceeded, kCancelled; kResourceExhausted where one cannot grow so far.
  Result<Lease> Acquire(uint32_t positions, Deadline deadline, const std::atomic<bool>* cancelled = nullptr);

  // Frees workspaces beyond the reserved ones, and brings those that are larger than the reserved size and than
  // any batch since the last call back to that. Those in use are left alone. May wait for the device.
  Status Trim();

  struct Stats {
    uint32_t workspaces = 0;
    uint32_t lent = 0;
    uint64_t waits = 0;       // lookups that found all lent
    size_t device_bytes = 0;  // of those that are not lent
  };
  Stats stats() const;

 private:
  explicit WorkspacePool(std::shared_ptr<struct WorkspacePoolState> state) : state_(std::move(state)) {}
  const std::shared_ptr<struct WorkspacePoolState> state_;
};

}  // namespace hps

#endif  // HPS_CACHE_WORKSPACE_POOL_H_
