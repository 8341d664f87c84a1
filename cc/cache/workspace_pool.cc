// Invariant: made = free + lent workspaces <= limit; workspaces are made, grown and freed without the lock.

#include "cc/cache/workspace_pool.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <vector>

namespace hps {

struct WorkspacePoolState {
  std::shared_ptr<DeviceContext> context;
  WorkspacePoolOptions options;
  mutable std::mutex mutex;  // guards the following members
  std::condition_variable returned;
  std::vector<std::unique_ptr<LookupWorkspace>> free;
  uint32_t made = 0;
  uint64_t waits = 0;
  WorkspaceSize needed;  // the most since the last Trim
};

namespace {

// A flag has no bell: those who wait with one look at it so often.
constexpr auto kCancelPoll = std::chrono::milliseconds(5);

// Best is one whose last use is done and that is large enough, then small: large ones are left for who needs them.
size_t Choose(std::vector<std::unique_ptr<LookupWorkspace>>& free, uint32_t positions) {
  if (free.size() == 1) return 0;
  const auto rank = [&](LookupWorkspace& workspace) {
    const bool fits = workspace.size().positions >= positions;
    const uint64_t size = workspace.size().positions;
    return std::pair(!fits, fits ? (uint64_t{!workspace.idle()} << 32) + size : ~size);
  };
  size_t best = 0;
  auto best_rank = rank(*free[0]);
  for (size_t i = 1; i < free.size(); ++i) {
    const auto other = rank(*free[i]);
    if (!(other < best_rank)) continue;
    best = i;
    best_rank = other;
  }
  return best;
}

}  // namespace

Result<std::unique_ptr<WorkspacePool>> WorkspacePool::Open(std::shared_ptr<DeviceContext> context,
                                                           const WorkspacePoolOptions& options) {
  auto state = std::make_shared<WorkspacePoolState>();
  state->context = std::move(context);
  state->options = options;
  state->options.limit = std::max({options.limit, options.reserved, 1u});
  for (uint32_t i = 0; i < options.reserved; ++i) {
    HPS_ASSIGN_OR_RETURN(std::unique_ptr<LookupWorkspace> workspace,
                         LookupWorkspace::Make(state->context, options.size));
    state->free.push_back(std::move(workspace));
    ++state->made;
  }
  return std::unique_ptr<WorkspacePool>(new WorkspacePool(std::move(state)));
}

void WorkspacePool::Lease::Return() {
  if (state_ == nullptr || workspace_ == nullptr) return;
  {
    std::lock_guard lock(state_->mutex);
    const WorkspaceSize& size = workspace_->size();
    state_->needed.staging_bytes = std::max(state_->needed.staging_bytes, size.staging_bytes);
    state_->needed.pooling_bytes = std::max(state_->needed.pooling_bytes, size.pooling_bytes);
    state_->free.push_back(std::move(workspace_));
  }
  state_->returned.notify_one();
  state_ = nullptr;
}

Status WorkspacePool::Lease::Reserve(uint32_t positions) {
  {
    std::lock_guard lock(state_->mutex);
    state_->needed.positions = std::max(state_->needed.positions, positions);
  }
  return workspace_->Reserve(positions);
}

Result<WorkspacePool::Lease> WorkspacePool::Acquire(uint32_t positions, Deadline deadline,
                                                    const std::atomic<bool>* cancelled) {
  Lease lease;
  lease.state_ = state_;
  bool may_make = true;
  bool waited = false;
  std::unique_lock lock(state_->mutex);
  state_->needed.positions = std::max(state_->needed.positions, positions);
  while (lease.workspace_ == nullptr) {
    if (!state_->free.empty()) {
      const size_t chosen = Choose(state_->free, positions);
      lease.workspace_ = std::move(state_->free[chosen]);
      state_->free.erase(state_->free.begin() + static_cast<ptrdiff_t>(chosen));
      break;
    }
    if (may_make && state_->made < state_->options.limit) {
      ++state_->made;
      lock.unlock();
      Result<std::unique_ptr<LookupWorkspace>> made = LookupWorkspace::Make(
          state_->context, {std::max(positions, state_->options.size.positions), state_->options.size.staging_bytes});
      lock.lock();
      if (made.ok()) {
        lease.workspace_ = std::move(made).value();
        break;
      }
      --state_->made;
      if (made.status().code() != StatusCode::kResourceExhausted || state_->made == 0) return made.status();
      may_make = false;  // no memory for another one: wait for one of those there are
      continue;
    }
    if (!waited) ++state_->waits;
    waited = true;
    if (cancelled != nullptr && cancelled->load(std::memory_order_relaxed)) {
      return Cancelled("the caller gave the lookup up while it waited for a workspace");
    }
    if (std::chrono::steady_clock::now() >= deadline) {
      return DeadlineExceeded("all " + std::to_string(state_->made) +
                              " workspaces of the device were in use until the lookup's deadline; raise "
                              "num_of_worker_buffer_in_pool to the number of lookups at a time");
    }
    if (cancelled != nullptr) {
      state_->returned.wait_until(lock, std::min<Deadline>(deadline, std::chrono::steady_clock::now() + kCancelPoll));
    } else if (deadline == kNoDeadline) {
      state_->returned.wait(lock);
    } else {
      state_->returned.wait_until(lock, deadline);
    }
  }
  lock.unlock();
  HPS_RETURN_IF_ERROR(lease->Reserve(positions));
  return lease;
}

Status WorkspacePool::Trim() {
  std::vector<std::unique_ptr<LookupWorkspace>> taken, surplus;
  WorkspaceSize size;
  {
    std::lock_guard lock(state_->mutex);
    size = state_->options.size;
    size.positions = std::max(size.positions, state_->needed.positions);
    size.staging_bytes = std::max(size.staging_bytes, state_->needed.staging_bytes);
    size.pooling_bytes = std::max(size.pooling_bytes, state_->needed.pooling_bytes);
    state_->needed = {};
    auto& free = state_->free;
    for (size_t i = free.size(); i-- > 0;) {
      if (!free[i]->idle()) continue;
      if (state_->made > state_->options.reserved) {
        --state_->made;
        surplus.push_back(std::move(free[i]));
      } else if (free[i]->size().positions > size.positions || free[i]->size().staging_bytes > size.staging_bytes ||
                 free[i]->size().pooling_bytes > size.pooling_bytes) {
        taken.push_back(std::move(free[i]));
      } else {
        continue;
      }
      free.erase(free.begin() + static_cast<ptrdiff_t>(i));
    }
  }
  surplus.clear();
  Status status;
  for (auto& workspace : taken) {
    const Status shrunk = workspace->ShrinkTo(size);
    // A workspace that could not be made smaller for lack of memory stays as it is.
    if (!shrunk.ok() && shrunk.code() != StatusCode::kResourceExhausted && status.ok()) status = shrunk;
    {
      std::lock_guard lock(state_->mutex);
      state_->free.push_back(std::move(workspace));
    }
    state_->returned.notify_one();
  }
  return status;
}

WorkspacePool::Stats WorkspacePool::stats() const {
  std::lock_guard lock(state_->mutex);
  Stats stats{state_->made, state_->made - static_cast<uint32_t>(state_->free.size()), state_->waits, 0};
  for (const auto& workspace : state_->free) stats.device_bytes += workspace->device_bytes();
  return stats;
}

}  // namespace hps
