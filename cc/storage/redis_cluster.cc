// Lock order: refresh_mutex_, then mutex_, then a node's mutex. None is held while something is sent or awaited, but
// for refresh_mutex_, which those who wait for a newer slot map wait for. A topology is never changed after it was
// published; a moved slot makes a new one.

#include "cc/storage/redis_cluster.h"

#include <algorithm>
#include <charconv>
#include <random>

#include "cc/storage/redis_exchange.h"

namespace hps {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kRefreshInterval{40};  // the slot map is not asked for more often
constexpr milliseconds kAskTime{300};         // for one group of nodes, while rows are waiting
constexpr milliseconds kFirstAskTime{3000};   // for a seed, when the store is opened
constexpr size_t kAskedAtOnce = 3;

milliseconds ConnectBackOff(int failures) {
  thread_local std::minstd_rand random(std::random_device{}());
  const int64_t longest = std::min<int64_t>(int64_t{10} << std::min(failures, 6), 500);
  return milliseconds(longest / 2 + static_cast<int64_t>(random() % static_cast<uint64_t>(longest / 2 + 1)));
}

const RedisReply* Item(const RedisReply& reply, size_t index) {
  return index < reply.elements.size() ? &reply.elements[index] : nullptr;
}

// The host of a node that told it as `reply`: nil and "" mean the one that was asked.
std::string Host(const RedisReply* reply, const std::string& asked) {
  return reply == nullptr || reply->text.empty() ? asked : reply->text;
}

bool PortOf(const RedisReply* reply, uint16_t* port) {
  if (reply == nullptr || reply->integer <= 0 || reply->integer > 65535) return false;
  *port = static_cast<uint16_t>(reply->integer);
  return true;
}

// The value of a key in a map that is written as a list of keys and values.
const RedisReply* Member(const RedisReply& map, std::string_view key) {
  for (size_t i = 0; i + 1 < map.elements.size(); i += 2) {
    if (map.elements[i].text == key) return &map.elements[i + 1];
  }
  return nullptr;
}

}  // namespace

bool ParseRedisEndpoint(std::string_view text, uint16_t default_port, std::string_view default_host,
                        RedisEndpoint* endpoint) {
  // The last colon: hosts may be IPv6 addresses, in brackets or not (Redis writes them without).
  const size_t bracket = text.rfind(']');
  const size_t colon = text.rfind(':');
  const bool bare_ipv6 =
      bracket == std::string_view::npos && default_port != 0 && std::count(text.begin(), text.end(), ':') > 1;
  std::string_view host = text;
  endpoint->port = default_port;
  if (colon != std::string_view::npos && (bracket == std::string_view::npos || colon > bracket) && !bare_ipv6) {
    host = text.substr(0, colon);
    const std::string_view digits = text.substr(colon + 1);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), endpoint->port);
    if (error != std::errc() || end != digits.data() + digits.size() || endpoint->port == 0) return false;
  }
  if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
  endpoint->host = host.empty() ? default_host : host;
  return !endpoint->host.empty();
}

Result<std::shared_ptr<RedisCluster>> RedisCluster::Open(RedisClusterOptions options) {
  std::shared_ptr<RedisCluster> cluster(new RedisCluster(std::move(options)));
  auto empty = std::make_shared<RedisTopology>();
  empty->owner.fill(RedisTopology::kNobody);
  cluster->topology_ = std::move(empty);
  std::string problems;
  const Deadline end = steady_clock::now() + cluster->options_.patience;
  for (const RedisEndpoint& seed : cluster->options_.seeds) {
    const Deadline until = std::min(end, steady_clock::now() + kFirstAskTime);
    const Status status = cluster->Ask(std::span(&seed, 1), until);
    if (status.ok()) return cluster;
    if (status.code() != StatusCode::kUnavailable && status.code() != StatusCode::kDeadlineExceeded) return status;
    problems += (problems.empty() ? "" : "; ") + status.message();
  }
  const bool several = cluster->options_.seeds.size() > 1;
  return Unavailable(std::string("cannot reach ") + (several ? "any of the addresses" : "the server") + " (" +
                     problems + "); start Redis, or correct volatile_db.address");
}

Status RedisCluster::Run(std::span<RedisTask* const> tasks, Deadline deadline, const std::atomic<bool>* cancelled,
                         RedisWhenAllRefuse when_all_refuse) {
  RedisExchange exchange(*this, deadline, cancelled, /*probing=*/false, when_all_refuse);
  return exchange.Run(tasks);
}

std::shared_ptr<const RedisTopology> RedisCluster::topology() const {
  std::lock_guard lock(mutex_);
  return topology_;
}

void RedisCluster::Close() {
  closed_ = true;
  std::lock_guard lock(mutex_);
  for (auto& [name, node] : nodes_) {
    std::lock_guard node_lock(node->mutex);
    node->idle.clear();
  }
}

RedisCluster::Loan RedisCluster::Borrow(RedisNode& node, Deadline deadline, bool beyond_limit, bool at_once) {
  Loan loan;
  std::vector<std::unique_ptr<RedisConnection>> broken;  // closed when the lock is released
  {
    std::lock_guard lock(node.mutex);
    while (!node.idle.empty()) {
      std::unique_ptr<RedisConnection> connection = std::move(node.idle.back());
      node.idle.pop_back();
      if (connection->Healthy()) {
        ++node.lent;
        loan.connection = std::move(connection);
        return loan;
      }
      ++node.generation;
      broken.push_back(std::move(connection));
    }
    if (node.lent >= options_.num_node_connections && !beyond_limit) {
      loan.exhausted = true;
      return loan;
    }
    if (steady_clock::now() < node.retry_at && !(at_once && node.refused)) {
      loan.retry_at = node.retry_at;
      return loan;
    }
    ++node.lent;
  }
  bool refused = false;
  auto begun = RedisConnection::Begin(node.endpoint, options_.login, &node.notes, deadline, &refused);
  if (begun.ok()) {
    loan.connection = std::move(begun).value();
    return loan;
  }
  loan.problem = begun.status();
  Lost(node, false, refused);
  std::lock_guard lock(node.mutex);
  loan.retry_at = node.retry_at;
  return loan;
}

void RedisCluster::Return(RedisNode& node, std::unique_ptr<RedisConnection> connection) {
  {
    std::lock_guard lock(node.mutex);
    --node.lent;
    const bool room = node.idle.size() + node.lent < options_.num_node_connections;
    if (connection != nullptr && !closed_ && room) node.idle.push_back(std::move(connection));
  }
  node.returned.notify_one();
}

void RedisCluster::Lost(RedisNode& node, bool reached, bool refused) {
  {
    std::lock_guard lock(node.mutex);
    --node.lent;
    ++node.generation;
    node.refused = refused;
    node.failures = reached ? 0 : node.failures + 1;
    node.retry_at = steady_clock::now() + ConnectBackOff(node.failures);
  }
  node.returned.notify_one();
}

void RedisCluster::Reached(RedisNode& node) {
  std::lock_guard lock(node.mutex);
  node.failures = 0;
  node.refused = false;
  node.retry_at = {};
}

std::shared_ptr<RedisNode> RedisCluster::NodeOf(const RedisEndpoint& endpoint) {
  std::lock_guard lock(mutex_);
  std::shared_ptr<RedisNode>& node = nodes_[endpoint.ToString()];
  if (node == nullptr) node = std::make_shared<RedisNode>(endpoint);
  return node;
}

void RedisCluster::MoveSlot(uint16_t slot, const RedisEndpoint& endpoint) {
  const std::shared_ptr<RedisNode> node = NodeOf(endpoint);
  std::lock_guard lock(mutex_);
  auto moved = std::make_shared<RedisTopology>(*topology_);
  auto found = std::find(moved->masters.begin(), moved->masters.end(), node);
  if (found == moved->masters.end()) found = moved->masters.insert(found, node);
  moved->owner[slot] = static_cast<uint16_t>(found - moved->masters.begin());
  topology_ = std::move(moved);
}

std::vector<RedisEndpoint> RedisCluster::KnownEndpoints() const {
  const auto known = topology();
  std::vector<RedisEndpoint> endpoints;
  const auto add = [&](const RedisEndpoint& endpoint) {
    const auto same = [&](const RedisEndpoint& other) {
      return other.host == endpoint.host && other.port == endpoint.port;
    };
    if (std::none_of(endpoints.begin(), endpoints.end(), same)) endpoints.push_back(endpoint);
  };
  for (const auto& node : known->masters) add(node->endpoint);
  // Of servers that are no cluster, the one that answered when the store was opened has the rows.
  if (!known->cluster) return endpoints;
  for (const RedisEndpoint& endpoint : known->replicas) add(endpoint);
  for (const RedisEndpoint& endpoint : options_.seeds) add(endpoint);
  return endpoints;
}

bool RedisCluster::Refresh(Deadline deadline) {
  std::vector<RedisEndpoint> endpoints = KnownEndpoints();
  const auto all_refused = [&] {
    return std::all_of(endpoints.begin(), endpoints.end(), [&](const RedisEndpoint& endpoint) {
      const std::shared_ptr<RedisNode> node = NodeOf(endpoint);
      std::lock_guard lock(node->mutex);
      return node->refused;
    });
  };
  if (!topology()->cluster) return all_refused();
  const Deadline patience = std::min(deadline, steady_clock::now() + std::chrono::seconds(2));
  {
    std::unique_lock lock(refresh_mutex_);
    if (refreshing_) {
      return refreshed_.wait_until(lock, patience, [this] { return !refreshing_; }) && all_refused_;
    }
    if (steady_clock::now() - refreshed_at_ < kRefreshInterval) return all_refused_;
    refreshing_ = true;
  }
  // Nodes that answered last come first; of equals any.
  std::shuffle(endpoints.begin(), endpoints.end(), std::minstd_rand(std::random_device{}()));
  std::stable_partition(endpoints.begin(), endpoints.end(), [&](const RedisEndpoint& endpoint) {
    const std::shared_ptr<RedisNode> node = NodeOf(endpoint);
    std::lock_guard lock(node->mutex);
    return node->failures == 0 && steady_clock::now() >= node->retry_at;
  });
  bool asked_all = true;
  for (size_t first = 0; first < endpoints.size(); first += kAskedAtOnce) {
    const Deadline now = steady_clock::now();
    const size_t count = std::min(kAskedAtOnce, endpoints.size() - first);
    asked_all =
        now < patience && !Ask(std::span(endpoints).subspan(first, count), std::min(deadline, now + kAskTime)).ok();
    if (!asked_all) break;
  }
  const bool refused = asked_all && all_refused();
  {
    std::lock_guard lock(refresh_mutex_);
    refreshing_ = false;
    all_refused_ = refused;
    refreshed_at_ = steady_clock::now();
  }
  refreshed_.notify_all();
  return refused;
}

Status RedisCluster::Ask(std::span<const RedisEndpoint> endpoints, Deadline deadline) {
  Status status;
  for (const bool shards : {false, true}) {
    std::vector<std::unique_ptr<RedisCommandTask>> owners;
    std::vector<RedisTask*> tasks;
    for (const RedisEndpoint& endpoint : endpoints) {
      owners.push_back(std::make_unique<RedisCommandTask>(
          uint16_t{0}, std::vector<std::string>{"CLUSTER", shards ? "SHARDS" : "SLOTS"}));
      owners.back()->node = endpoint.ToString();
      tasks.push_back(owners.back().get());
    }
    RedisExchange exchange(*this, deadline, nullptr, /*probing=*/true);
    HPS_RETURN_IF_ERROR(exchange.Run(tasks));
    bool unknown = false;
    for (size_t i = 0; i < owners.size(); ++i) {
      RedisCommandTask& task = *owners[i];
      if (task.received == 0) continue;
      const std::string where = "redis node " + task.node + ": ";
      if (task.error.find("cluster support disabled") != std::string::npos) {
        auto single = std::make_shared<RedisTopology>();
        single->masters = {NodeOf(endpoints[i])};
        Publish(std::move(single));
        return OkStatus();
      }
      const bool unknown_user = task.error.starts_with("NOAUTH");
      if (unknown_user || task.error.starts_with("NOPERM")) {
        return FailedPrecondition(where + task.error + " (while sending CLUSTER " + task.words[1] + "); " +
                                  (unknown_user ? "set password (or password_env, password_file), and user_name for "
                                                  "another user than \"default\""
                                                : "allow the user +cluster|slots"));
      }
      if (!task.error.empty()) {
        unknown = task.error.starts_with("ERR");
        status = Unavailable(where + task.error);
        continue;
      }
      std::vector<SlotRange> ranges;
      std::vector<RedisEndpoint> replicas;
      const std::string& asked = endpoints[i].host;
      bool good = true;
      if (!shards) {
        for (const RedisReply& range : task.reply.elements) {
          SlotRange& slots = ranges.emplace_back();
          good = good && range.elements.size() >= 3;
          for (size_t j = 2; good && j < range.elements.size(); ++j) {
            RedisEndpoint node;
            good = PortOf(Item(range.elements[j], 1), &node.port);
            node.host = Host(Item(range.elements[j], 0), asked);
            if (j == 2) slots.master = node;
            if (j > 2) replicas.push_back(node);
          }
          if (!good) break;
          slots.first = static_cast<uint32_t>(range.elements[0].integer);
          slots.last = static_cast<uint32_t>(range.elements[1].integer);
        }
      } else {
        for (const RedisReply& shard : task.reply.elements) {
          const RedisReply* slots = Member(shard, "slots");
          const RedisReply* nodes = Member(shard, "nodes");
          RedisEndpoint master;
          for (const RedisReply& node : nodes == nullptr ? std::vector<RedisReply>() : nodes->elements) {
            const RedisReply* role = Member(node, "role");
            RedisEndpoint endpoint;
            if (!PortOf(Member(node, options_.login.tls == nullptr ? "port" : "tls-port"), &endpoint.port)) continue;
            endpoint.host = Host(Member(node, "endpoint"), asked);
            if (role != nullptr && role->text == "master") {
              master = endpoint;
            } else {
              replicas.push_back(endpoint);
            }
          }
          for (size_t j = 0; slots != nullptr && j + 1 < slots->elements.size(); j += 2) {
            if (master.port == 0) break;
            ranges.push_back({static_cast<uint32_t>(slots->elements[j].integer),
                              static_cast<uint32_t>(slots->elements[j + 1].integer), master});
          }
        }
      }
      if (!good) return Internal(where + "CLUSTER SLOTS in a form that is not known");
      status = Adopt(ranges, std::move(replicas), task.node);
      if (status.ok()) return status;
    }
    if (!unknown) break;
  }
  return status.ok() ? Unavailable("no node answers") : status;
}

Status RedisCluster::Adopt(const std::vector<SlotRange>& ranges, std::vector<RedisEndpoint> replicas,
                           const std::string& asked) {
  if (ranges.empty()) return Unavailable("redis node " + asked + ": is in cluster mode and knows of no slots");
  auto topology = std::make_shared<RedisTopology>();
  topology->cluster = true;
  topology->owner.fill(RedisTopology::kNobody);
  for (const SlotRange& range : ranges) {
    if (range.first > range.last || range.last >= kRedisSlots) continue;
    const std::shared_ptr<RedisNode> node = NodeOf(range.master);
    auto found = std::find(topology->masters.begin(), topology->masters.end(), node);
    if (found == topology->masters.end()) found = topology->masters.insert(found, node);
    const auto index = static_cast<uint16_t>(found - topology->masters.begin());
    std::fill(topology->owner.begin() + range.first, topology->owner.begin() + range.last + 1, index);
  }
  topology->replicas = std::move(replicas);
  Publish(std::move(topology));
  return OkStatus();
}

void RedisCluster::Publish(std::shared_ptr<RedisTopology> topology) {
  std::shared_ptr<const RedisTopology> old = std::move(topology);
  std::lock_guard lock(mutex_);
  topology_.swap(old);
  old.reset();
  // Nodes that left: nobody holds them any more.
  std::erase_if(nodes_, [](const auto& entry) { return entry.second.use_count() == 1; });
}

}  // namespace hps
