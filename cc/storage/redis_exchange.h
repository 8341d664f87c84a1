// RedisExchange: one batch of tasks on its way, driven by the caller's thread: a loop over all connections of all
// nodes.
//
// Each node has a queue; its connections take from it as they have room, so that all of them are busy until it is empty
// and a slow one holds up nobody. At most two tasks are under way on a connection: one is answered while the other
// waits.

#ifndef HPS_STORAGE_REDIS_EXCHANGE_H_
#define HPS_STORAGE_REDIS_EXCHANGE_H_

#include <atomic>
#include <deque>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cc/storage/redis_cluster.h"

namespace hps {

class RedisExchange {
 public:
  // probing: asks for the way; returns when one task is done, and when all nodes failed, without trying again.
  RedisExchange(RedisCluster& cluster, Deadline deadline, const std::atomic<bool>* cancelled, bool probing = false,
                RedisWhenAllRefuse when_all_refuse = RedisWhenAllRefuse::kWait)
      : cluster_(cluster),
        deadline_(deadline),
        cancelled_(cancelled),
        probing_(probing),
        fails_when_all_refuse_(when_all_refuse == RedisWhenAllRefuse::kFail) {}
  ~RedisExchange();

  Status Run(std::span<RedisTask* const> tasks);

 private:
  struct Lane {
    std::unique_ptr<RedisConnection> connection;
    Deadline moved;  // when something last happened on it
    bool reached = false;
    short ready_for = 0;  // what poll said
  };
  struct Route {
    std::shared_ptr<RedisNode> node;
    std::deque<RedisTask*> queue;
    std::vector<Lane> lanes;
    bool exhausted = false;
    bool tried = false;  // to connect to it, in this batch
    Deadline retry_at{};
  };
  struct Delayed {
    Deadline at;
    RedisTask* task;
  };

  Status Loop();
  void Send(RedisTask* task);
  Route& RouteTo(const std::shared_ptr<RedisNode>& node);
  Status Fill(Route& route);
  Status Wait();
  Status Move(Route& route, size_t lane, bool readable);
  Status Done(RedisTask* task);
  Status TryAgain(RedisTask* task, const std::string& problem);
  Status LaneLost(Route& route, size_t lane, const Status& status);
  void DropLane(Route& route, size_t lane, bool lost);
  void CheckSilence();
  Status RefreshAndReroute();
  Status OutOfTime(bool cancelled) const;

  RedisCluster& cluster_;
  const Deadline deadline_;
  const std::atomic<bool>* const cancelled_;
  const bool probing_;
  const bool fails_when_all_refuse_;
  std::vector<std::unique_ptr<Route>> routes_;
  std::vector<Delayed> delayed_;
  std::vector<RedisTask*> done_;
  std::shared_ptr<const RedisTopology> topology_;
  size_t remaining_ = 0;
  bool refresh_ = false;
  Deadline now_{};
  Deadline progress_{};  // when a task was last done
  std::string problem_;  // why it takes so long; empty: nobody knows
};

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_EXCHANGE_H_
