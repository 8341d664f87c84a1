// StagingCopier: takes rows to the device while others are still being fetched.
//
// Rows arrive in pieces and in any order. What has arrived without a gap from the beginning on is copied as soon as it
// is worth a copy of its own, by the thread that has brought the last of it.
//
// Thread safety: Arrived from any number of threads; the others by the owner, with none of those at work.

#ifndef HPS_CACHE_STAGING_COPIER_H_
#define HPS_CACHE_STAGING_COPIER_H_

#include <cstddef>
#include <mutex>
#include <utility>
#include <vector>

#include "cc/cache/device_context.h"

namespace hps {

class StagingCopier {
 public:
  // A copy takes some microseconds besides the time of its bytes, during which the link would take so many.
  static constexpr size_t kCopyBytes = size_t{256} << 10;

  explicit StagingCopier(DeviceContext* context) : context_(context) {}

  // From `from`, pinned, to `to`. Nothing has arrived yet.
  void Begin(const std::byte* from, std::byte* to, DeviceStream stream);
  // Bytes [first, last), disjoint from those of other calls, will not change until the stream has passed their copy.
  void Arrived(size_t first, size_t last);
  // Copies what is left of `bytes` bytes. The error of a copy, of earlier ones as well.
  Status Finish(size_t bytes);
  size_t copied() const { return copied_; }

 private:
  DeviceContext* const context_;
  const std::byte* from_ = nullptr;
  std::byte* to_ = nullptr;
  DeviceStream stream_ = nullptr;
  std::mutex mutex_;  // guards the following members
  size_t arrived_ = 0;
  size_t copied_ = 0;
  bool copying_ = false;                           // by one thread, without the mutex
  std::vector<std::pair<size_t, size_t>> beyond_;  // arrived behind a gap
  Status status_;
};

}  // namespace hps

#endif  // HPS_CACHE_STAGING_COPIER_H_
