// What a Redis store and its tables share: the cluster, the options, and whether the store is open.

#ifndef HPS_STORAGE_REDIS_SESSION_H_
#define HPS_STORAGE_REDIS_SESSION_H_

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "cc/base/background_worker.h"
#include "cc/base/fork_guard.h"
#include "cc/storage/redis_cluster.h"
#include "cc/storage/redis_store.h"

namespace hps {

struct RedisSession {
  RedisSession(std::shared_ptr<RedisCluster> open_cluster, RedisStoreOptions store_options)
      : cluster(std::move(open_cluster)), options(std::move(store_options)) {}

  // kFailedPrecondition after Close, and in a forked child.
  Status CheckOpen() const {
    HPS_RETURN_IF_ERROR(CheckNotForked(fork_generation));
    if (closed) return FailedPrecondition(Where() + " was closed; open it again");
    return OkStatus();
  }

  // For messages: redis_cluster "address"[, table "name"].
  std::string Where() const { return "redis_cluster \"" + options.address + "\""; }
  std::string Where(std::string_view table) const { return Where() + ", table \"" + std::string(table) + "\""; }

  // Runs tasks of one kind that live in a container of values.
  template <typename Tasks>
  Status Run(Tasks& tasks, Deadline deadline = kNoDeadline, const std::atomic<bool>* cancelled = nullptr,
             RedisWhenAllRefuse when_all_refuse = RedisWhenAllRefuse::kWait) const {
    std::vector<RedisTask*> pointers;
    pointers.reserve(tasks.size());
    for (auto& task : tasks) pointers.push_back(&task);
    return cluster->Run(pointers, deadline, cancelled, when_all_refuse);
  }

  // Runs one command on the master of the key that is its second word.
  Result<RedisReply> Call(std::vector<std::string> words) const {
    const uint16_t slot = RedisSlot(words[1]);
    RedisCommandTask task(slot, std::move(words));
    RedisTask* const pointer = &task;
    HPS_RETURN_IF_ERROR(cluster->Run(std::span(&pointer, 1), kNoDeadline));
    return std::move(task.reply);
  }

  const std::shared_ptr<RedisCluster> cluster;
  const RedisStoreOptions options;  // without secrets
  const uint64_t fork_generation = ForkGeneration();
  std::atomic<bool> closed{false};
  BackgroundWorker worker{size_t{1} << 20};  // keys whose access is still to be noted
};

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_SESSION_H_
