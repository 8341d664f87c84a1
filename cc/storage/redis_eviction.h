// Evictions: shrinks partitions that hold more rows than the overflow margin allows.
//
// By the metadata hash in the predecessor's formats: evict_oldest keeps a raw 8-byte time in seconds for each key,
// evict_least_used a decimal count. evict_random needs none. Rows without metadata are the first to leave. Everything
// is done in pieces that do not hold up the server.

#ifndef HPS_STORAGE_REDIS_EVICTION_H_
#define HPS_STORAGE_REDIS_EVICTION_H_

#include <atomic>
#include <memory>
#include <span>
#include <vector>

#include "cc/storage/redis_table.h"

namespace hps {

// Whether the policy keeps metadata at all, and whether reading rows changes it.
bool NeedsMetadata(const OverflowOptions& overflow);
bool ReadingCounts(const OverflowOptions& overflow);

// Appends the tasks that note an access (a read or a write) to each of the keys.
void AppendAccessTasks(const OverflowOptions& overflow, const RedisLayout& layout, const RedisTablePlace& place,
                       std::span<const Key> keys, std::vector<std::unique_ptr<RedisTask>>* tasks);

// A partition that an upsert has just written to, and the keys, ascending, which leave only if nothing else is left.
struct WrittenPartition {
  const RedisTablePlace::Partition* partition;
  std::span<const Key> keys;
};

// Shrinks those of the partitions that hold more than the margin. *evicted grows by the rows that left, also where it
// ends with an error. Reads of this process that came before are counted, unless notes of very many are waiting.
Status EvictOverflow(RedisSession& session, const RedisLayout& layout, std::span<const WrittenPartition> written,
                     std::atomic<uint64_t>* evicted);

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_EVICTION_H_
