// RedisCluster: the nodes of a Redis Cluster (or one server), which of them serves each slot, and connections to them.
//
// Run carries a batch of tasks to the nodes that their slots belong to, over several connections to each node at once,
// and follows the cluster while it changes: MOVED, ASK, TRYAGAIN, CLUSTERDOWN, nodes that die, and replicas that take
// over. Everything is tried again, with back-off and jitter, until the deadline.
//
// The slot map comes from CLUSTER SLOTS (CLUSTER SHARDS where that is gone). A server that is not in cluster mode
// serves all slots. Thread safety: all methods from several threads at once.

#ifndef HPS_STORAGE_REDIS_CLUSTER_H_
#define HPS_STORAGE_REDIS_CLUSTER_H_

#include <array>
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "cc/storage/redis_connection.h"
#include "cc/storage/redis_layout.h"
#include "cc/storage/redis_task.h"

namespace hps {

struct RedisClusterOptions {
  std::vector<RedisEndpoint> seeds;  // at least one
  RedisLogin login;
  uint32_t num_node_connections = 5;
  std::chrono::milliseconds patience = std::chrono::seconds(15);
};

// What becomes of a batch where nothing listens at any known address: a server that restarts is worth waiting for,
// unless another tier has the rows.
enum class RedisWhenAllRefuse { kWait, kFail };

// A server and the connections to it. Connections are lent to one batch at a time.
struct RedisNode {
  explicit RedisNode(RedisEndpoint where) : endpoint(std::move(where)), name(endpoint.ToString()) {}
  const RedisEndpoint endpoint;
  const std::string name;
  RedisServerNotes notes;

  std::mutex mutex;  // guards the rest; a leaf
  std::condition_variable returned;
  std::vector<std::unique_ptr<RedisConnection>> idle;
  uint32_t lent = 0;
  int failures = 0;         // attempts to connect that failed since the last that did not
  bool refused = false;     // the last attempt was: nothing listens there
  Deadline retry_at{};      // not before
  uint64_t generation = 0;  // grows when a connection is lost: the server may be another process since then
};

struct RedisTopology {
  bool cluster = false;
  std::vector<std::shared_ptr<RedisNode>> masters;
  std::vector<RedisEndpoint> replicas;
  std::array<uint16_t, kRedisSlots> owner{};  // index into masters
  static constexpr uint16_t kNobody = 0xffff;
};

class RedisCluster {
 public:
  // Asks the seeds for the slot map, the first that answers decides. Errors: as in redis_store.h.
  static Result<std::shared_ptr<RedisCluster>> Open(RedisClusterOptions options);

  // Returns when all tasks are done, or with the first error that trying again does not cure, or when the time is up.
  // After an error the state of the tasks is unknown, but nothing touches them any more.
  // `when_all_refuse` kFail: also, as kUnavailable, as soon as nothing listens at any known address. A cluster of which
  // a node answers is waited for all the same: it may be failing over.
  Status Run(std::span<RedisTask* const> tasks, Deadline deadline, const std::atomic<bool>* cancelled = nullptr,
             RedisWhenAllRefuse when_all_refuse = RedisWhenAllRefuse::kWait);

  std::shared_ptr<const RedisTopology> topology() const;
  const RedisClusterOptions& options() const { return options_; }

  // Connections that come back are closed instead of kept. Batches that run go on.
  void Close();

 private:
  friend class RedisExchange;

  explicit RedisCluster(RedisClusterOptions options) : options_(std::move(options)) {}

  struct Loan {
    std::unique_ptr<RedisConnection> connection;  // nullptr: none now
    bool exhausted = false;                       // all are lent; `returned` will be notified
    Deadline retry_at{};                          // the node is given a rest until then
    Status problem;                               // an attempt to connect failed
  };
  // at_once: a node that refused is asked again without a rest, which costs next to nothing.
  Loan Borrow(RedisNode& node, Deadline deadline, bool beyond_limit, bool at_once);
  void Return(RedisNode& node, std::unique_ptr<RedisConnection> connection);
  // A lent connection was lost; `reached`: it had been in use; `refused`: nothing listens there.
  void Lost(RedisNode& node, bool reached, bool refused);
  void Reached(RedisNode& node);

  std::shared_ptr<RedisNode> NodeOf(const RedisEndpoint& endpoint);
  void MoveSlot(uint16_t slot, const RedisEndpoint& endpoint);
  // Asks for the slot map, unless that was done a moment ago; one thread at a time does, the others wait for it. True:
  // nothing listens at any known address.
  bool Refresh(Deadline deadline);
  std::vector<RedisEndpoint> KnownEndpoints() const;
  Status Ask(std::span<const RedisEndpoint> endpoints, Deadline deadline);
  // The master of slots [first, last] is `master`; replicas are noted.
  struct SlotRange {
    uint32_t first = 0;
    uint32_t last = 0;
    RedisEndpoint master;
  };
  Status Adopt(const std::vector<SlotRange>& ranges, std::vector<RedisEndpoint> replicas, const std::string& asked);
  void Publish(std::shared_ptr<RedisTopology> topology);

  const RedisClusterOptions options_;
  mutable std::mutex mutex_;  // guards the next two
  std::map<std::string, std::shared_ptr<RedisNode>> nodes_;
  std::shared_ptr<const RedisTopology> topology_;
  std::mutex refresh_mutex_;  // guards the next three; a leaf
  bool refreshing_ = false;   // a thread is asking
  bool all_refused_ = false;  // the last time
  Deadline refreshed_at_{};   // when the last answer came, or did not
  std::condition_variable refreshed_;
  std::atomic<bool> closed_{false};
};

// "host:port", "host" (default_port), ":port" (the host of `asked`). False: not an address.
bool ParseRedisEndpoint(std::string_view text, uint16_t default_port, std::string_view default_host,
                        RedisEndpoint* endpoint);

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_CLUSTER_H_
