// Invariants: a task is in exactly one place: a route's queue, a connection's outstanding tasks, delayed_, or done. A
// lane goes back to its node only when nothing is outstanding on it; otherwise it is destroyed, so that no late reply
// can reach a task or a row. While tasks are outstanding no lock is held.

#include "cc/storage/redis_exchange.h"

#include <poll.h>
#include <signal.h>

#include <algorithm>

namespace hps {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr size_t kTasksPerLane = 2;
constexpr size_t kUnsentBytes = 256 << 10;   // a lane with more to send gets no further task
constexpr milliseconds kConnectTime{1500};   // then another attempt is made
constexpr milliseconds kSilence{250};        // then the way is asked for anew
constexpr milliseconds kCancelInterval{10};  // how often `cancelled` is looked at

// No SIGPIPE for this thread: OpenSSL writes to sockets that the other side may have closed.
class SigpipeGuard {
 public:
  SigpipeGuard() {
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &pipe, &before_);
  }
  ~SigpipeGuard() {
    if (!was_pending_ && sigismember(&before_, SIGPIPE) == 0) {
      sigset_t pipe;
      sigemptyset(&pipe);
      sigaddset(&pipe, SIGPIPE);
      const timespec none{};
      while (sigtimedwait(&pipe, nullptr, &none) == SIGPIPE) {
      }
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }

 private:
  sigset_t before_;
  bool was_pending_ = false;
};

bool HasRoom(const RedisConnection& connection) {
  return connection.ready() && connection.outstanding() < kTasksPerLane && connection.unsent_bytes() <= kUnsentBytes;
}

// Half to all of 5, 10, 20, ... 320 ms: callers that failed together do not come back together.
milliseconds BackOff(int attempts) {
  thread_local std::minstd_rand random(std::random_device{}());
  const int64_t longest = int64_t{5} << std::clamp(attempts, 0, 6);
  return milliseconds(longest / 2 + static_cast<int64_t>(random() % static_cast<uint64_t>(longest / 2 + 1)));
}

// "MOVED 3999 host:port": the last word.
std::string_view LastWord(std::string_view redirection) {
  const size_t space = redirection.rfind(' ');
  return space == std::string_view::npos ? std::string_view() : redirection.substr(space + 1);
}

// Errors that pass by themselves, or with a newer slot map.
bool Passes(std::string_view error, bool cluster) {
  for (const std::string_view prefix : {"TRYAGAIN", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "BUSY ", "NOREPLICAS",
                                        "ERR max number of clients", "UNBLOCKED"}) {
    if (error.starts_with(prefix)) return true;
  }
  return cluster && error.starts_with("READONLY");
}

Status ErrorOf(const RedisTask& task, const std::string& node) {
  const std::string where = "redis node " + node + ": ";
  const std::string& error = task.error;
  if (error.starts_with("NOPERM")) {
    return FailedPrecondition(where + error + " (while sending " + task.command +
                              "); the ACL must allow the user this command, and the keys ~hps* and, for tables of old "
                              "versions, ~hctr*");
  }
  if (error.starts_with("NOAUTH")) {
    return FailedPrecondition(where + error + " (while sending " + task.command +
                              "); set password (or password_env, password_file), "
                              "and user_name for another user than \"default\"");
  }
  if (error.starts_with("OOM")) {
    return ResourceExhausted(where + error + "; raise maxmemory, add nodes, or set an overflow_margin");
  }
  if (error.starts_with("WRONGTYPE")) {
    return FailedPrecondition(where + task.command + ": " + error +
                              "; another program uses a key of this name, remove that key");
  }
  if (error.starts_with("READONLY")) {
    return FailedPrecondition(where + error + "; address must name the master");
  }
  if (error.starts_with("MISCONF")) return Unavailable(where + error);
  return Internal(where + task.command + ": " + error);
}

}  // namespace

RedisExchange::~RedisExchange() {
  for (auto& route : routes_) {
    while (!route->lanes.empty()) DropLane(*route, route->lanes.size() - 1, false);
  }
}

Status RedisExchange::Run(std::span<RedisTask* const> tasks) {
  if (tasks.empty()) return OkStatus();
  const SigpipeGuard guard;
  now_ = progress_ = steady_clock::now();
  topology_ = cluster_.topology();
  remaining_ = tasks.size();
  for (RedisTask* task : tasks) {
    task->attempts = 0;
    task->ask.clear();
    Send(task);
  }
  return Loop();
}

Status RedisExchange::Loop() {
  while (remaining_ > 0) {
    if (cancelled_ != nullptr && cancelled_->load(std::memory_order_relaxed)) return OutOfTime(true);
    if (now_ >= deadline_ || now_ - progress_ > cluster_.options().patience) return OutOfTime(false);
    for (size_t i = 0; i < delayed_.size();) {
      if (delayed_[i].at > now_) {
        ++i;
        continue;
      }
      RedisTask* task = delayed_[i].task;
      delayed_[i] = delayed_.back();
      delayed_.pop_back();
      Send(task);
    }
    // By index: a redirection may add routes.
    for (size_t i = 0; i < routes_.size(); ++i) HPS_RETURN_IF_ERROR(Fill(*routes_[i]));
    HPS_RETURN_IF_ERROR(Wait());
    for (size_t i = 0; i < routes_.size(); ++i) {
      for (size_t j = routes_[i]->lanes.size(); j-- > 0;) {
        Lane& lane = routes_[i]->lanes[j];
        const short ready_for = std::exchange(lane.ready_for, 0);
        const bool late = !lane.reached && now_ - lane.moved > kConnectTime;
        if (ready_for == 0 && !late) continue;
        // Whatever it is (data, the end, an error), reading finds out.
        HPS_RETURN_IF_ERROR(Move(*routes_[i], j, (ready_for & ~POLLOUT) != 0));
      }
    }
    if (!probing_) CheckSilence();
    if (refresh_) HPS_RETURN_IF_ERROR(RefreshAndReroute());
  }
  return OkStatus();
}

Status RedisExchange::OutOfTime(bool cancelled) const {
  if (cancelled) return Cancelled("the caller gave up");
  if (!problem_.empty()) return Unavailable(problem_ + "; tried again until the time was up");
  std::string nodes;
  for (const auto& route : routes_) {
    const bool waiting = std::any_of(route->lanes.begin(), route->lanes.end(),
                                     [](const Lane& lane) { return lane.connection->outstanding() > 0; });
    if (waiting) nodes += (nodes.empty() ? "" : ", ") + route->node->name;
  }
  if (nodes.empty()) return DeadlineExceeded("no connection became free or ready in time");
  return DeadlineExceeded("no answer in time from " + nodes);
}

RedisExchange::Route& RedisExchange::RouteTo(const std::shared_ptr<RedisNode>& node) {
  for (const auto& route : routes_) {
    if (route->node == node) return *route;
  }
  routes_.push_back(std::make_unique<Route>());
  routes_.back()->node = node;
  return *routes_.back();
}

// Puts a task into the queue of the node it belongs to.
void RedisExchange::Send(RedisTask* task) {
  const std::string& fixed = task->ask.empty() ? task->node : task->ask;
  if (!fixed.empty()) {
    RedisEndpoint endpoint;
    ParseRedisEndpoint(fixed, 0, "", &endpoint);
    RouteTo(cluster_.NodeOf(endpoint)).queue.push_back(task);
    return;
  }
  const uint16_t owner = topology_->owner[task->slot];
  if (owner == RedisTopology::kNobody) {
    problem_ = "no node serves slot " + std::to_string(task->slot) + " of the cluster";
    refresh_ = true;
    delayed_.push_back({now_ + BackOff(task->attempts++), task});
    return;
  }
  RouteTo(topology_->masters[owner]).queue.push_back(task);
}

// Gives the route connections and the connections work.
Status RedisExchange::Fill(Route& route) {
  route.exhausted = false;
  route.retry_at = {};
  const size_t most = cluster_.options().num_node_connections;
  const size_t wanted = std::min(most, (route.queue.size() + kTasksPerLane - 1) / kTasksPerLane);
  size_t open = 0;  // lanes with room
  for (const Lane& lane : route.lanes) open += lane.connection->outstanding() < kTasksPerLane ? 1 : 0;
  while (open < wanted && route.lanes.size() < most) {
    RedisCluster::Loan loan =
        cluster_.Borrow(*route.node, deadline_, /*beyond_limit=*/probing_, !std::exchange(route.tried, true));
    if (!loan.problem.ok()) {
      if (loan.problem.code() != StatusCode::kUnavailable) return loan.problem;
      problem_ = loan.problem.message();
      refresh_ = true;
    }
    if (loan.connection == nullptr) {
      route.exhausted = loan.exhausted;
      route.retry_at = loan.retry_at;
      if (!probing_ || !route.lanes.empty()) break;
      remaining_ -= route.queue.size();
      route.queue.clear();
      return remaining_ > 0 ? OkStatus() : Unavailable(problem_.empty() ? "no node answers" : problem_);
    }
    const bool reached = loan.connection->ready();
    route.lanes.push_back({std::move(loan.connection), now_, reached});
    ++open;
  }
  for (size_t depth = 0; depth < kTasksPerLane && !route.queue.empty(); ++depth) {
    for (Lane& lane : route.lanes) {
      RedisConnection& connection = *lane.connection;
      if (route.queue.empty()) break;
      if (!HasRoom(connection) || connection.outstanding() > depth) continue;
      RedisTask* task = route.queue.front();
      route.queue.pop_front();
      if (connection.outstanding() == 0) lane.moved = now_;
      connection.Submit(task, !task->ask.empty());
      task->ask.clear();
    }
  }
  // What this batch does not need any more, others may.
  for (size_t i = route.lanes.size(); i-- > 0;) {
    if (route.queue.empty() && route.lanes[i].connection->outstanding() == 0) DropLane(route, i, false);
  }
  // A first attempt to send at once saves a turn of the loop.
  for (size_t lane = route.lanes.size(); lane-- > 0;) {
    if (route.lanes[lane].connection->unsent_bytes() > 0) HPS_RETURN_IF_ERROR(Move(route, lane, false));
  }
  return OkStatus();
}

void RedisExchange::DropLane(Route& route, size_t index, bool lost) {
  Lane lane = std::move(route.lanes[index]);
  route.lanes.erase(route.lanes.begin() + static_cast<ptrdiff_t>(index));
  const bool usable = !lost && lane.connection->ready() && lane.connection->outstanding() == 0;
  if (usable) return cluster_.Return(*route.node, std::move(lane.connection));
  const bool idle = lane.connection->outstanding() == 0;
  const bool refused = lane.connection->refused();
  lane.connection.reset();
  if (lost || !idle) {
    cluster_.Lost(*route.node, lane.reached || !lost, refused);
  } else {
    cluster_.Return(*route.node, nullptr);  // it was still connecting
  }
}

// Sleeps until something can be done.
Status RedisExchange::Wait() {
  thread_local std::vector<pollfd> waiting;
  thread_local std::vector<Lane*> lanes;
  waiting.clear();
  lanes.clear();
  Deadline until = std::min(deadline_, progress_ + cluster_.options().patience + milliseconds(1));
  if (cancelled_ != nullptr) until = std::min(until, now_ + kCancelInterval);
  if (refresh_ && !probing_) until = now_;  // the way is asked for before anything is waited for
  for (const Delayed& delayed : delayed_) until = std::min(until, delayed.at);
  RedisNode* exhausted = nullptr;
  for (const auto& route : routes_) {
    if (route->retry_at != Deadline{}) until = std::min(until, route->retry_at);
    if (route->exhausted) exhausted = route->node.get();
    for (Lane& lane : route->lanes) {
      if (!route->queue.empty() && HasRoom(*lane.connection)) return OkStatus();  // do not sleep, fill it
      if (lane.connection->outstanding() == 0 && lane.connection->ready()) continue;
      waiting.push_back({lane.connection->fd(), lane.connection->events(), 0});
      lanes.push_back(&lane);
      until = std::min(until, lane.moved + (lane.reached ? kSilence : kConnectTime) + milliseconds(1));
      if (now_ - lane.moved > kSilence && lane.reached) until = std::min(until, now_ + kSilence);
    }
  }
  if (remaining_ == 0) return OkStatus();
  if (waiting.empty() && exhausted != nullptr) {
    std::unique_lock lock(exhausted->mutex);
    if (exhausted->lent >= cluster_.options().num_node_connections) {
      exhausted->returned.wait_until(lock, std::min(until, now_ + milliseconds(20)));
    }
  } else {
    if (exhausted != nullptr) until = std::min(until, now_ + milliseconds(1));
    const auto left = std::chrono::duration_cast<std::chrono::microseconds>(until - steady_clock::now()).count();
    const int64_t timeout = std::clamp<int64_t>((left + 999) / 1000, 0, 60'000);
    (void)::poll(waiting.data(), waiting.size(), static_cast<int>(timeout));
    for (size_t i = 0; i < waiting.size(); ++i) lanes[i]->ready_for = waiting[i].revents;
  }
  now_ = steady_clock::now();
  return OkStatus();
}

Status RedisExchange::Move(Route& route, size_t index, bool readable) {
  Lane& lane = route.lanes[index];
  RedisConnection& connection = *lane.connection;
  if (connection.ready() && connection.outstanding() == 0) return OkStatus();
  done_.clear();
  const size_t unsent = connection.unsent_bytes();
  const bool was_ready = connection.ready();
  const Status status = connection.Progress(readable, &done_);
  if (!done_.empty() || connection.unsent_bytes() < unsent || connection.ready() != was_ready) lane.moved = now_;
  if (connection.ready() && !lane.reached) {
    lane.reached = true;
    cluster_.Reached(*route.node);
  }
  uint64_t generation = 0;
  if (!done_.empty()) {
    std::lock_guard lock(route.node->mutex);
    generation = route.node->generation;
  }
  for (RedisTask* task : std::exchange(done_, {})) {
    task->answered_by = route.node->name;
    task->answered_generation = generation;
    HPS_RETURN_IF_ERROR(Done(task));
  }
  if (!status.ok()) return LaneLost(route, index, status);
  if (!lane.reached && now_ - lane.moved > kConnectTime) {
    return LaneLost(
        route, index,
        Unavailable("redis node " + route.node->name + ": waited in vain for " + std::string(connection.waits_for())));
  }
  return OkStatus();
}

Status RedisExchange::LaneLost(Route& route, size_t index, const Status& status) {
  std::vector<RedisTask*> tasks = route.lanes[index].connection->outstanding_tasks();
  DropLane(route, index, true);
  if (status.code() != StatusCode::kUnavailable) return status;
  problem_ = status.message();
  refresh_ = true;
  for (RedisTask* task : tasks) HPS_RETURN_IF_ERROR(TryAgain(task, status.message()));
  if (!probing_ || !route.lanes.empty()) return OkStatus();
  remaining_ -= std::min(remaining_, route.queue.size());
  route.queue.clear();
  return remaining_ == 0 ? status : OkStatus();
}

Status RedisExchange::TryAgain(RedisTask* task, const std::string& problem) {
  problem_ = problem;
  if (probing_) return --remaining_ == 0 ? Unavailable(problem) : OkStatus();
  delayed_.push_back({now_ + BackOff(task->attempts++), task});
  return OkStatus();
}

Status RedisExchange::Done(RedisTask* task) {
  if (task->error.empty() || probing_) {
    remaining_ = probing_ ? 0 : remaining_ - 1;
    progress_ = now_;
    if (remaining_ == 0 || !refresh_) problem_.clear();
    return OkStatus();
  }
  const bool moved = task->error.starts_with("MOVED ");
  if (moved || task->error.starts_with("ASK ")) {
    RedisEndpoint asked;
    RedisEndpoint endpoint;
    ParseRedisEndpoint(task->answered_by, 0, "", &asked);
    if (!ParseRedisEndpoint(LastWord(task->error), 0, asked.host, &endpoint) || endpoint.port == 0) {
      return Internal("redis node " + task->answered_by + ": a redirection to nowhere: " + task->error);
    }
    if (moved) {
      refresh_ = true;
      cluster_.MoveSlot(task->slot, endpoint);
      topology_ = cluster_.topology();
    } else {
      task->ask = endpoint.ToString();
    }
    // Nodes that send each other's clients away do so for a moment only.
    if (++task->attempts > 5) return TryAgain(task, "redis node " + task->answered_by + ": " + task->error);
    Send(task);
    return OkStatus();
  }
  if (Passes(task->error, topology_->cluster)) {
    refresh_ = true;
    return TryAgain(task, "redis node " + task->answered_by + ": " + task->error);
  }
  return ErrorOf(*task, task->answered_by);
}

// A node that has said nothing for a while may have been replaced.
void RedisExchange::CheckSilence() {
  if (!topology_->cluster) return;
  for (const auto& route : routes_) {
    for (const Lane& lane : route->lanes) {
      if (lane.connection->outstanding() > 0 && now_ - lane.moved > kSilence) refresh_ = true;
    }
  }
}

Status RedisExchange::RefreshAndReroute() {
  refresh_ = false;
  if (probing_ || remaining_ == 0) return OkStatus();
  const bool all_refuse = cluster_.Refresh(deadline_);
  const auto in_use = [](const auto& route) { return !route->lanes.empty(); };
  if (all_refuse && fails_when_all_refuse_ && std::none_of(routes_.begin(), routes_.end(), in_use)) {
    return Unavailable(problem_ + "; nothing listens at any known address");
  }
  topology_ = cluster_.topology();
  now_ = steady_clock::now();
  for (size_t i = 0; i < routes_.size(); ++i) {
    Route& route = *routes_[i];
    const auto elsewhere = [&](const RedisTask* task) {
      if (!task->ask.empty() || !task->node.empty()) return false;
      const uint16_t owner = topology_->owner[task->slot];
      return owner == RedisTopology::kNobody || topology_->masters[owner] != route.node;
    };
    // Whoever waits for a silent node that does not own the slots any more, waits no longer.
    for (size_t lane = route.lanes.size(); lane-- > 0;) {
      if (now_ - route.lanes[lane].moved <= kSilence || route.lanes[lane].connection->outstanding() == 0) continue;
      std::vector<RedisTask*> tasks = route.lanes[lane].connection->outstanding_tasks();
      if (!std::any_of(tasks.begin(), tasks.end(), elsewhere)) continue;
      DropLane(route, lane, true);
      for (RedisTask* task : tasks) Send(task);
    }
    std::deque<RedisTask*> queue;
    queue.swap(route.queue);
    for (RedisTask* task : queue) elsewhere(task) ? Send(task) : routes_[i]->queue.push_back(task);
  }
  return OkStatus();
}

}  // namespace hps
