// The launches of pooled lookups (cuda_kernels/device_pooling.h) carried out by the processor, as host_kernels.h does
// with those of the cache: what the GPU must do, said in the plainest way.
//
// Thread safety and errors: as host_kernels.h.

#ifndef HPS_CACHE_HOST_POOLING_H_
#define HPS_CACHE_HOST_POOLING_H_

#include <vector>

#include "cc/cache/host_kernels.h"
#include "cuda_kernels/device_pooling.h"

namespace hps {

// An IndexPart whose dense shape was copied when the work was queued.
struct HostIndexPart {
  cuda::IndexPart part;
  std::vector<int64_t> dense_shape;
};

// Each checks its arguments like the launch of that name.
int CheckSplits(const cuda::IndexPart* parts, int num_parts);
int CheckPooled(const std::vector<cuda::PooledPart>& parts, uint32_t stamp);

void HostWiden(const std::vector<cuda::WidenPart>& parts);
void HostSplits(const std::vector<HostIndexPart>& parts, const cuda::PooledWorkspace& workspace);
void HostPooledQuery(const std::vector<cuda::PooledPart>& parts, const cuda::PooledWorkspace& workspace, uint32_t stamp,
                     BucketLocks& locks);
void HostPool(const std::vector<cuda::PooledPart>& parts);

}  // namespace hps

#endif  // HPS_CACHE_HOST_POOLING_H_
