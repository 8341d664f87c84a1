// The launches of the device cache (cuda_kernels/device_cache.h) carried out by the processor, at once and on the
// caller's thread: the same buckets, marks, choice of ways, second buckets and versions, by the functions of
// cache_bucket.h. What the GPU must do, said in the plainest way; also what the host device (host_device.h) runs.
//
// Differences that no contract speaks of: keys are served one after the other (those of an insert or update from the
// last to the first, so that nobody relies on their order), and a bucket is locked while it is read, instead of
// being read again after the row (the thread sanitizer understands locks). The lock bit of a bucket is not used.
//
// Thread safety: calls may overlap in any combination on one table, as on the device. Errors: as there.

#ifndef HPS_CACHE_HOST_KERNELS_H_
#define HPS_CACHE_HOST_KERNELS_H_

#include <array>
#include <mutex>
#include <vector>

#include "cuda_kernels/device_cache.h"

namespace hps {

// The locks of the buckets of all tables; several buckets share one.
class BucketLocks {
 public:
  std::mutex& Of(const cuda::CacheBucket* bucket) {
    return mutexes_[(reinterpret_cast<uintptr_t>(bucket) / sizeof(cuda::CacheBucket)) % kLocks];
  }

 private:
  static constexpr size_t kLocks = 1021;
  std::array<std::mutex, kLocks> mutexes_;
};

// Each checks its arguments like the launch of that name; to be called before the work is queued.
int CheckTable(const cuda::CacheTable& table);
int CheckQuery(const std::vector<cuda::QueryPart>& parts, const cuda::QueryWorkspace& workspace, uint32_t stamp);

// Copies the row of the key, marking it as read; whether it is there.
bool HostReadRow(const cuda::CacheTable& table, int64_t key, void* output, BucketLocks& locks);

void HostClear(const cuda::CacheTable& table, BucketLocks& locks);
void HostUntoldQuery(const std::vector<cuda::QueryPart>& parts, BucketLocks& locks);
void HostQuery(const std::vector<cuda::QueryPart>& parts, const cuda::QueryWorkspace& workspace, uint32_t stamp,
               BucketLocks& locks);
void HostFill(const std::vector<cuda::QueryPart>& parts, const cuda::QueryWorkspace& workspace,
              const cuda::FillRequest& request, BucketLocks& locks);
void HostInsert(const cuda::CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, bool spill,
                uint32_t* evicted, BucketLocks& locks);
void HostUpdate(const cuda::CacheTable& table, const int64_t* keys, const void* rows, uint32_t count,
                BucketLocks& locks);
void HostErase(const cuda::CacheTable& table, const int64_t* keys, uint32_t count, BucketLocks& locks);
void HostExchange(const cuda::CacheTable& table, uint64_t first, uint64_t last, BucketLocks& locks);
void HostDump(const cuda::CacheTable& table, uint64_t first, uint64_t last, int64_t* keys, uint32_t* count,
              BucketLocks& locks);

}  // namespace hps

#endif  // HPS_CACHE_HOST_KERNELS_H_
