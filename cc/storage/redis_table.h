// RedisTable: one table in Redis, see redis_store.h. The store finds, describes and drops tables; a table reads and
// writes rows.

#ifndef HPS_STORAGE_REDIS_TABLE_H_
#define HPS_STORAGE_REDIS_TABLE_H_

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cc/storage/redis_layout.h"
#include "cc/storage/redis_session.h"
#include "hps/table_store.h"

namespace hps {

// Where the rows of a table lie now: one entry for each partition.
struct RedisTablePlace {
  struct Partition {
    std::string values;
    std::string metadata;
    uint16_t values_slot = 0;
    uint16_t metadata_slot = 0;
  };
  std::vector<Partition> partitions;
  bool dropped = false;

  static std::shared_ptr<const RedisTablePlace> Of(const RedisLayout& layout);
  static std::shared_ptr<const RedisTablePlace> Dropped(const RedisLayout& layout, std::string_view id);
};

// A number that no other process draws.
std::string RandomRedisId();

// What all Table objects of one table in one store share. The rows of a dropped table are freed with it.
class RedisTableState {
 public:
  // `id`: of the table, by its description; a later table of the same name has another one.
  RedisTableState(std::shared_ptr<RedisSession> session, RedisLayout layout, std::string name, std::string id);
  ~RedisTableState();

  const RedisLayout& layout() const { return layout_; }
  const std::string& name() const { return name_; }
  const std::string& id() const { return id_; }

  // Waits while the rows are being moved away.
  std::shared_ptr<const RedisTablePlace> place() const {
    std::lock_guard lock(mutex_);
    return place_;
  }
  // Whether a miss in `seen` means that the row is not there: otherwise it must be looked for again.
  bool IsCurrent(const std::shared_ptr<const RedisTablePlace>& seen) const { return place() == seen; }

  std::atomic<uint64_t> evicted_rows{0};  // by this process

  // Gives the rows other names, so that they stay readable here after a table of the same name was made.
  Status MoveAway();
  // Frees rows that were moved away. The store is closed: nobody reads them.
  void FreeMoved();

 private:
  const std::shared_ptr<RedisSession> session_;
  const RedisLayout layout_;
  const std::string name_;
  const std::string id_;
  const std::string dropped_id_;
  bool freed_ = false;        // guarded by mutex_
  mutable std::mutex mutex_;  // held while the rows are moved away
  std::shared_ptr<const RedisTablePlace> place_;
};

std::shared_ptr<Table> MakeRedisTable(std::shared_ptr<RedisSession> session, std::shared_ptr<RedisTableState> state,
                                      TableSpec spec);

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_TABLE_H_
