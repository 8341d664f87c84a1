// Invariant: [0, arrived_) has arrived and [0, copied_) was given to the stream, or will be by the thread that copies;
// no piece of beyond_ begins at arrived_ or before.

#include "cc/cache/staging_copier.h"

#include <algorithm>

namespace hps {
namespace {

constexpr std::string_view kWhat = "copying missing rows to the device";

}  // namespace

void StagingCopier::Begin(const std::byte* from, std::byte* to, DeviceStream stream) {
  from_ = from;
  to_ = to;
  stream_ = stream;
  arrived_ = copied_ = 0;
  beyond_.clear();
  status_ = OkStatus();
}

void StagingCopier::Arrived(size_t first, size_t last) {
  std::unique_lock lock(mutex_);
  if (first != arrived_) {
    beyond_.emplace_back(first, last);
    return;
  }
  arrived_ = last;
  for (size_t i = 0; i < beyond_.size();) {
    if (beyond_[i].first != arrived_) {
      ++i;
      continue;
    }
    arrived_ = beyond_[i].second;
    beyond_[i] = beyond_.back();
    beyond_.pop_back();
    i = 0;
  }
  if (copying_) return;  // that thread looks again
  copying_ = true;
  while (arrived_ - copied_ >= kCopyBytes && status_.ok()) {
    const size_t begin = std::exchange(copied_, arrived_);
    const size_t bytes = copied_ - begin;
    lock.unlock();
    Status status = context_->Check(context_->device().Copy(to_ + begin, from_ + begin, bytes, stream_), kWhat);
    lock.lock();
    status_ = std::move(status);
  }
  copying_ = false;
}

Status StagingCopier::Finish(size_t bytes) {
  HPS_RETURN_IF_ERROR(status_);
  const size_t begin = std::exchange(copied_, bytes);
  if (begin >= bytes) return OkStatus();
  return context_->Check(context_->device().Copy(to_ + begin, from_ + begin, bytes - begin, stream_), kWhat);
}

}  // namespace hps
