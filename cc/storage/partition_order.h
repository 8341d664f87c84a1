// Sorting the keys of a batch by partition, so that each partition is locked once and partitions are written in
// parallel.

#ifndef HPS_STORAGE_PARTITION_ORDER_H_
#define HPS_STORAGE_PARTITION_ORDER_H_

#include <cstdint>
#include <span>
#include <vector>

#include "hps/executor.h"
#include "hps/table_store.h"

namespace hps {

// Calls body(partition number, positions of its keys in input order) for each partition that has some; large batches
// on the executor. partition_of(key) < num_partitions.
template <typename PartitionOf, typename Body>
void ForEachPartition(std::span<const Key> keys, uint32_t num_partitions, Executor& executor, PartitionOf partition_of,
                      Body body) {
  // Writes of fewer rows are not worth waking other threads for.
  constexpr size_t kParallelRows = 4096;
  // A stable counting sort of the positions by partition; ends[p] is where the positions of p end.
  std::vector<uint32_t> ends(num_partitions + 1, 0);
  for (const Key key : keys) ++ends[partition_of(key) + 1];
  for (uint32_t p = 0; p < num_partitions; ++p) ends[p + 1] += ends[p];
  std::vector<uint32_t> order(keys.size());
  for (uint32_t i = 0; i < keys.size(); ++i) order[ends[partition_of(keys[i])]++] = i;
  const size_t grain = keys.size() < kParallelRows ? num_partitions : 1;
  executor.ParallelFor(num_partitions, grain, [&](size_t first, size_t last) {
    for (size_t p = first; p < last; ++p) {
      const uint32_t begin = p == 0 ? 0 : ends[p - 1];
      if (begin < ends[p]) {
        body(static_cast<uint32_t>(p), std::span<const uint32_t>(order).subspan(begin, ends[p] - begin));
      }
    }
  });
}

}  // namespace hps

#endif  // HPS_STORAGE_PARTITION_ORDER_H_
