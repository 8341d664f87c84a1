// The loop thread owns all sockets and connections; others leave orders under the mutex, wake the loop through a pipe
// and wait until it has carried them out. There is one lock and it is never held during a system call.

#include "cc/tests/tcp_proxy.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <list>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "cc/tests/free_port.h"

namespace hps::testing {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr size_t kQueueBytes = 256 << 10;  // a direction holds about so much; then its source has to wait
constexpr std::string_view kGarbage = "\x01\x7f?garbage\xff\xfe\x80";

sockaddr_in Loopback(uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

int NewSocket() { return ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0); }

void CloseSocket(int* fd, bool reset) {
  if (*fd < 0) return;
  if (reset) {
    const linger now{1, 0};
    ::setsockopt(*fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
  }
  ::close(*fd);
  *fd = -1;
}

// Bytes on their way from one socket to the other.
struct Flow {
  struct Piece {
    std::string bytes;
    Clock::time_point due;
  };
  std::deque<Piece> queue;
  size_t queued_bytes = 0;
  bool source_ended = false;  // and when the queue is empty, so does the destination
  bool ended = false;
  Clock::time_point next_send{};  // under bytes_per_second
  std::optional<size_t> bytes_to_cut, bytes_to_garbage;
};

struct Connection {
  int client = -1;
  int server = -1;  // -1: leads nowhere
  bool connecting = false;
  bool was_half_open = false;
  bool dead = false;
  Flow requests, replies;
};

class Proxy final : public TcpProxy {
 public:
  Proxy(uint16_t target, uint64_t seed, FreePort port, int listener)
      : target_(target), port_(std::move(port)), listener_(listener), random_(seed) {
    wake_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    loop_ = std::thread([this] { Run(); });
  }
  ~Proxy() override {
    Order([](Orders* orders) { orders->stop = true; });
    loop_.join();
    ::close(wake_);
  }

  static int Listen(uint16_t port) {
    int fd = NewSocket();
    const int on = 1;
    const sockaddr_in address = Loopback(port);
    ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 || ::listen(fd, 512) != 0) {
      ::close(fd);
      return -1;
    }
    return fd;
  }

  uint16_t port() const override { return port_.number(); }
  void Set(const Faults& faults) override {
    Order([&](Orders* orders) { orders->faults = faults; });
  }
  void Cut() override {
    Order([](Orders* orders) { orders->cut = true; });
  }
  void Reset() override {
    Order([](Orders* orders) { orders->reset = true; });
  }
  Counts counts() const override {
    std::lock_guard lock(mutex_);
    return counts_;
  }

 private:
  struct Orders {
    std::optional<Faults> faults;
    bool cut = false;
    bool reset = false;
    bool stop = false;
  };

  template <typename Change>
  void Order(const Change& change) {
    std::unique_lock lock(mutex_);
    change(&orders_);
    const uint64_t mine = ++given_;
    const uint64_t one = 1;
    (void)!::write(wake_, &one, sizeof(one));
    carried_out_.wait(lock, [&] { return done_ >= mine; });
  }

  void Run() {
    while (CarryOutOrders()) {
      const Clock::time_point now = Clock::now();
      Clock::time_point next = now + std::chrono::hours(1);
      for (Connection& connection : connections_) Advance(&connection, now, &next);
      Sweep();
      Wait(now, next);
      if (listener_ >= 0 && Ready(listener_)) Accept();
      for (Connection& connection : connections_) Read(&connection);
      Sweep();
    }
    for (Connection& connection : connections_) Close(&connection, true);
    CloseSocket(&listener_, false);
  }

  bool CarryOutOrders() {
    Orders orders;
    uint64_t given = 0;
    {
      std::lock_guard lock(mutex_);
      orders = std::exchange(orders_, {});
      given = given_;
    }
    if (orders.faults) Apply(*orders.faults);
    if (orders.cut || orders.reset) {
      for (Connection& connection : connections_) Close(&connection, orders.reset);
    }
    Sweep();
    {
      std::lock_guard lock(mutex_);
      done_ = given;
    }
    carried_out_.notify_all();
    return !orders.stop;
  }

  void Apply(const Faults& faults) {
    if (faults_.half_open && !faults.half_open) {
      for (Connection& connection : connections_) {
        if (connection.was_half_open) Close(&connection, true);
      }
    }
    faults_ = faults;
    for (Connection& connection : connections_) Draw(&connection);
    if (faults_.refuse) CloseSocket(&listener_, false);
    if (!faults_.refuse && listener_ < 0) listener_ = Listen(port());
  }

  // The points at which the faults that are set strike this connection.
  void Draw(Connection* connection) {
    const auto draw = [&](std::optional<size_t> within) -> std::optional<size_t> {
      if (!within) return std::nullopt;
      return std::uniform_int_distribution<size_t>(0, *within == 0 ? 0 : *within - 1)(random_);
    };
    for (auto [flow, faults] :
         {std::pair(&connection->requests, &faults_.requests), std::pair(&connection->replies, &faults_.replies)}) {
      flow->bytes_to_cut = draw(faults->cut_within);
      flow->bytes_to_garbage = draw(faults->garbage_within);
      flow->next_send = {};
    }
    connection->was_half_open |= faults_.half_open;
  }

  void Accept() {
    for (;;) {
      const int client = ::accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (client < 0) return;
      Connection& connection = connections_.emplace_back();
      connection.client = client;
      SetNoDelay(client);
      Draw(&connection);
      if (!faults_.half_open) {
        connection.server = NewSocket();
        connection.connecting = true;
        SetNoDelay(connection.server);
        const sockaddr_in address = Loopback(target_);
        const int result = ::connect(connection.server, reinterpret_cast<const sockaddr*>(&address), sizeof(address));
        if (result != 0 && errno != EINPROGRESS) Close(&connection, true);
      }
      std::lock_guard lock(mutex_);
      ++counts_.accepted;
    }
  }

  static void SetNoDelay(int fd) {
    const int on = 1;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  }

  // Sends what is due, and notes when more will be.
  void Advance(Connection* connection, Clock::time_point now, Clock::time_point* next) {
    if (faults_.stall || faults_.half_open || connection->dead || connection->connecting) return;
    Send(connection, &connection->requests, faults_.requests, connection->server, now, next);
    if (!connection->dead) Send(connection, &connection->replies, faults_.replies, connection->client, now, next);
    if (connection->requests.ended && connection->replies.ended) Close(connection, false);
  }

  void Send(Connection* connection, Flow* flow, const FlowFaults& faults, int to, Clock::time_point now,
            Clock::time_point* next) {
    while (!flow->queue.empty()) {
      Flow::Piece& piece = flow->queue.front();
      const Clock::time_point due = std::max(piece.due, flow->next_send);
      if (due > now) {
        *next = std::min(*next, due);
        return;
      }
      size_t count = piece.bytes.size();
      // At most a hundredth of a second's bytes at once, and at least one.
      if (faults.bytes_per_second > 0) count = std::min(count, std::max<size_t>(1, faults.bytes_per_second / 100));
      if (flow->bytes_to_cut) {
        if (*flow->bytes_to_cut == 0) return Close(connection, false);
        count = std::min(count, *flow->bytes_to_cut);
      }
      if (flow->bytes_to_garbage) {
        if (*flow->bytes_to_garbage == 0) {
          for (char& byte : piece.bytes) byte = kGarbage[random_() % kGarbage.size()];
        } else {
          count = std::min(count, *flow->bytes_to_garbage);
        }
      }
      const ssize_t sent = ::send(to, piece.bytes.data(), count, MSG_NOSIGNAL);
      if (sent < 0 && (errno == EAGAIN || errno == EINTR)) return;
      if (sent < 0) return Close(connection, true);
      const auto bytes = static_cast<size_t>(sent);
      piece.bytes.erase(0, bytes);
      if (piece.bytes.empty()) flow->queue.pop_front();
      flow->queued_bytes -= bytes;
      if (flow->bytes_to_cut) *flow->bytes_to_cut -= bytes;
      if (flow->bytes_to_garbage) *flow->bytes_to_garbage -= std::min(bytes, *flow->bytes_to_garbage);
      if (faults.bytes_per_second > 0) {
        flow->next_send = now + std::chrono::nanoseconds(1'000'000'000ull * bytes / faults.bytes_per_second);
      }
      std::lock_guard lock(mutex_);
      (flow == &connection->requests ? counts_.request_bytes : counts_.reply_bytes) += bytes;
    }
    if (flow->source_ended && !flow->ended) {
      flow->ended = true;
      ::shutdown(to, SHUT_WR);
    }
  }

  // Which sockets to look at; then sleeps until one is ready, something is due or an order comes.
  void Wait(Clock::time_point now, Clock::time_point next) {
    polled_.clear();
    polled_.push_back({wake_, POLLIN, 0});
    if (listener_ >= 0) polled_.push_back({listener_, POLLIN, 0});
    for (const Connection& connection : connections_) {
      // A stalled connection is not looked at: poll would report its end again and again.
      if (faults_.stall) continue;
      const auto interest = [&](int fd, const Flow& from, const Flow& to) {
        short events = 0;
        if (!from.source_ended && from.queued_bytes < kQueueBytes) events |= POLLIN;
        // Only bytes that are due wait for the socket; others wait for the clock.
        const bool due = !to.queue.empty() && std::max(to.queue.front().due, to.next_send) <= now;
        if (due && !faults_.half_open) events |= POLLOUT;
        if (fd >= 0 && events != 0) polled_.push_back({fd, events, 0});
      };
      if (connection.connecting) {
        polled_.push_back({connection.server, POLLOUT, 0});
        continue;
      }
      interest(connection.client, connection.requests, connection.replies);
      interest(connection.server, connection.replies, connection.requests);
    }
    const auto left = std::chrono::duration_cast<milliseconds>(next - now + std::chrono::microseconds(999));
    ::poll(polled_.data(), polled_.size(), static_cast<int>(std::clamp<int64_t>(left.count(), 0, 1000)));
    uint64_t ignored;
    (void)!::read(wake_, &ignored, sizeof(ignored));
    ready_.clear();
    for (const pollfd& entry : polled_) {
      if (entry.revents != 0) ready_.push_back(entry.fd);
    }
    std::sort(ready_.begin(), ready_.end());
  }
  bool Ready(int fd) const { return std::binary_search(ready_.begin(), ready_.end(), fd); }

  void Read(Connection* connection) {
    if (connection->dead) return;
    if (connection->connecting) {
      if (!Ready(connection->server)) return;
      int error = 0;
      socklen_t size = sizeof(error);
      ::getsockopt(connection->server, SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) return Close(connection, true);
      connection->connecting = false;
    }
    Receive(connection, &connection->requests, faults_.requests, &connection->client);
    if (!connection->dead) Receive(connection, &connection->replies, faults_.replies, &connection->server);
  }

  void Receive(Connection* connection, Flow* flow, const FlowFaults& faults, int* from) {
    if (*from < 0 || !Ready(*from) || flow->source_ended) return;
    char buffer[16 << 10];
    while (flow->queued_bytes < kQueueBytes) {
      const ssize_t count = ::recv(*from, buffer, sizeof(buffer), 0);
      if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
      if (faults_.half_open) {
        if (count > 0) continue;
        // The other side must not learn of this end.
        if (from == &connection->client) return Close(connection, false);
        return CloseSocket(from, false);
      }
      if (count < 0) return Close(connection, true);
      if (count == 0) {
        flow->source_ended = true;
        return;
      }
      flow->queue.push_back({std::string(buffer, static_cast<size_t>(count)), Clock::now() + faults.latency});
      flow->queued_bytes += static_cast<size_t>(count);
    }
  }

  void Close(Connection* connection, bool reset) {
    CloseSocket(&connection->client, reset);
    CloseSocket(&connection->server, reset);
    connection->dead = true;
  }

  void Sweep() {
    connections_.remove_if([](const Connection& connection) { return connection.dead; });
    std::lock_guard lock(mutex_);
    counts_.open = connections_.size();
  }

  const uint16_t target_;
  const FreePort port_;
  int wake_ = -1;

  // The loop's own.
  int listener_;
  std::mt19937_64 random_;
  Faults faults_;
  std::list<Connection> connections_;
  std::vector<pollfd> polled_;
  std::vector<int> ready_;

  mutable std::mutex mutex_;
  std::condition_variable carried_out_;
  Orders orders_;
  uint64_t given_ = 0, done_ = 0;
  Counts counts_;

  std::thread loop_;
};

}  // namespace

Result<std::unique_ptr<TcpProxy>> TcpProxy::Start(uint16_t target_port, uint64_t seed) {
  Result<FreePort> port = FreePort::Choose();
  if (!port.ok()) return port.status();
  const int listener = Proxy::Listen(port.value().number());
  if (listener < 0) return Unavailable("cannot listen on port " + std::to_string(port.value().number()));
  return std::unique_ptr<TcpProxy>(std::make_unique<Proxy>(target_port, seed, std::move(port).value(), listener));
}

}  // namespace hps::testing
