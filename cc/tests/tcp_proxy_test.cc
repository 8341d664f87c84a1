// The proxy itself: each fault does what its name says, and all of it heals.

#include "cc/tests/tcp_proxy.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <thread>
#include <vector>

#include "cc/tests/core_fixture.h"
#include "cc/tests/free_port.h"

namespace hps::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

sockaddr_in Loopback(uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

// Sends back what it gets, one thread a connection.
class EchoServer {
 public:
  EchoServer() {
    listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const sockaddr_in address = Loopback(port());
    if (::bind(listener_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) std::abort();
    if (::listen(listener_, 64) != 0) std::abort();
    acceptor_ = std::thread([this] {
      for (int fd; (fd = ::accept(listener_, nullptr, nullptr)) >= 0;) {
        fds_.push_back(fd);
        threads_.emplace_back([fd] {
          char buffer[4096];
          for (ssize_t count; (count = ::recv(fd, buffer, sizeof(buffer), 0)) > 0;) {
            if (::send(fd, buffer, static_cast<size_t>(count), MSG_NOSIGNAL) < 0) break;
          }
          ::shutdown(fd, SHUT_RDWR);
        });
      }
    });
  }
  ~EchoServer() {
    ::shutdown(listener_, SHUT_RDWR);
    acceptor_.join();
    for (int fd : fds_) ::shutdown(fd, SHUT_RDWR);
    for (std::thread& thread : threads_) thread.join();
    for (int fd : fds_) ::close(fd);
    ::close(listener_);
  }
  uint16_t port() const { return port_.number(); }

 private:
  const FreePort port_ = Value(FreePort::Choose());
  int listener_;
  std::vector<int> fds_;  // of acceptor_ until it has ended; so are threads_
  std::vector<std::thread> threads_;
  std::thread acceptor_;
};

class Client {
 public:
  explicit Client(uint16_t port) {
    fd_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const sockaddr_in address = Loopback(port);
    error_ = ::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0 ? 0 : errno;
  }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  ~Client() { ::close(fd_); }

  int error() const { return error_; }  // of connecting
  void Send(const std::string& bytes) { (void)!::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL); }
  void EndSending() { ::shutdown(fd_, SHUT_WR); }

  // Receives until there are so many bytes, the connection ends (see ended(), errno in error()) or the time is over.
  std::string Receive(size_t count, milliseconds timeout = std::chrono::seconds(30)) {
    const auto end = steady_clock::now() + timeout;
    std::string bytes;
    while (bytes.size() < count) {
      const auto left = std::chrono::duration_cast<milliseconds>(end - steady_clock::now());
      pollfd readable{fd_, POLLIN, 0};
      if (left.count() <= 0 || ::poll(&readable, 1, static_cast<int>(left.count())) <= 0) break;
      char buffer[4096];
      const ssize_t got = ::recv(fd_, buffer, std::min(sizeof(buffer), count - bytes.size()), 0);
      if (got <= 0) {
        ended_ = true;
        error_ = got < 0 ? errno : 0;
        break;
      }
      bytes.append(buffer, static_cast<size_t>(got));
    }
    return bytes;
  }
  bool ended() const { return ended_; }
  std::string Echo(const std::string& bytes) {
    Send(bytes);
    return Receive(bytes.size());
  }

 private:
  int fd_ = -1;
  int error_ = 0;
  bool ended_ = false;
};

constexpr milliseconds kShort(150);  // long enough to see that nothing comes

class TcpProxyTest : public ::testing::Test {
 protected:
  EchoServer server_;
  std::unique_ptr<TcpProxy> proxy_ = Value(TcpProxy::Start(server_.port(), 7));
};

TEST_F(TcpProxyTest, PassesEverythingOn) {
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      Client client(proxy_->port());
      std::string bytes(300'000, static_cast<char>('a' + t));
      for (size_t i = 0; i < bytes.size(); i += 7) bytes[i] = static_cast<char>(i);
      std::thread sender([&] {
        client.Send(bytes);
        client.EndSending();
      });
      right += client.Receive(bytes.size()) == bytes;
      right += client.Receive(1).empty() && client.ended() && client.error() == 0;  // the end is passed on too
      sender.join();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 16);
  EXPECT_EQ(proxy_->counts().accepted, 8u);
  EXPECT_EQ(proxy_->counts().reply_bytes, 8u * 300'000);
  WaitUntil([&] { return proxy_->counts().open == 0; }, "connections to end");
}

TEST_F(TcpProxyTest, LatencyInBothDirections) {
  Client client(proxy_->port());
  EXPECT_EQ(client.Echo("a"), "a");
  proxy_->Set({.requests = {.latency = milliseconds(60)}, .replies = {.latency = milliseconds(40)}});
  const auto start = steady_clock::now();
  EXPECT_EQ(client.Echo("hello"), "hello");
  EXPECT_GE(steady_clock::now() - start, milliseconds(100));
  proxy_->Heal();
  EXPECT_EQ(client.Echo("hello"), "hello");
}

TEST_F(TcpProxyTest, SlowDrip) {
  Client client(proxy_->port());
  proxy_->Set({.replies = {.bytes_per_second = 500}});
  const auto start = steady_clock::now();
  const std::string bytes(100, 'x');
  EXPECT_EQ(client.Echo(bytes), bytes);
  EXPECT_GE(steady_clock::now() - start, milliseconds(180));
  client.Send(std::string(100'000, 'y'));  // at this rate: more than three minutes
  EXPECT_LT(client.Receive(100'000, kShort).size(), 100'000u);
  proxy_->Heal();
  WaitUntil([&] { return proxy_->counts().reply_bytes == 100'100; }, "the rest");
}

TEST_F(TcpProxyTest, CutAndReset) {
  Client cut(proxy_->port());
  EXPECT_EQ(cut.Echo("a"), "a");
  proxy_->Cut();
  EXPECT_EQ(cut.Receive(1), "");
  EXPECT_TRUE(cut.ended());
  EXPECT_EQ(cut.error(), 0);
  EXPECT_EQ(proxy_->counts().open, 0u);

  Client reset(proxy_->port());
  EXPECT_EQ(reset.Echo("a"), "a");
  proxy_->Reset();
  EXPECT_EQ(reset.Receive(1), "");
  EXPECT_TRUE(reset.ended());
  EXPECT_EQ(reset.error(), ECONNRESET);

  EXPECT_EQ(Client(proxy_->port()).Echo("new"), "new");
}

TEST_F(TcpProxyTest, RepliesAreTruncated) {
  proxy_->Set({.replies = {.cut_within = 50}});
  size_t shortest = 1000, longest = 0;
  for (int i = 0; i < 50; ++i) {
    Client client(proxy_->port());
    client.Send(std::string(100, 'x'));
    const std::string got = client.Receive(100);
    EXPECT_TRUE(client.ended());
    shortest = std::min(shortest, got.size());
    longest = std::max(longest, got.size());
  }
  EXPECT_LT(shortest, 10u);
  EXPECT_GT(longest, 40u);
  EXPECT_LT(longest, 50u);
}

TEST_F(TcpProxyTest, RepliesBecomeGarbageThatNoProtocolReads) {
  proxy_->Set({.replies = {.garbage_within = 50}});
  const std::string bytes = "$5\r\nhello\r\n$5\r\nhello\r\n$5\r\nhello\r\n$5\r\nhello\r\n$5\r\nhello\r\n";
  for (int i = 0; i < 20; ++i) {
    Client client(proxy_->port());
    const std::string got = client.Echo(bytes);
    ASSERT_EQ(got.size(), bytes.size());
    const size_t first = static_cast<size_t>(std::mismatch(got.begin(), got.end(), bytes.begin()).first - got.begin());
    EXPECT_LT(first, 50u);
    EXPECT_EQ(got.substr(first).find_first_of("\r\n0123456789+-$*:"), std::string::npos);
  }
  proxy_->Heal();
  EXPECT_EQ(Client(proxy_->port()).Echo(bytes), bytes);
}

TEST_F(TcpProxyTest, StallLosesNothing) {
  Client client(proxy_->port());
  EXPECT_EQ(client.Echo("a"), "a");
  proxy_->Set({.stall = true});
  Client later(proxy_->port());
  EXPECT_EQ(later.error(), 0);
  client.Send("held");
  later.Send("held too");
  EXPECT_EQ(client.Receive(1, kShort), "");
  EXPECT_FALSE(client.ended());
  proxy_->Heal();
  EXPECT_EQ(client.Receive(4), "held");
  EXPECT_EQ(later.Receive(8), "held too");
}

TEST_F(TcpProxyTest, HalfOpenConnectionsAreSilentAndNeverComeBack) {
  Client client(proxy_->port());
  EXPECT_EQ(client.Echo("a"), "a");
  proxy_->Set({.half_open = true});
  Client later(proxy_->port());
  EXPECT_EQ(later.error(), 0);
  client.Send("lost");
  later.Send("lost");
  EXPECT_EQ(client.Receive(1, kShort), "");
  EXPECT_EQ(later.Receive(1, kShort), "");
  EXPECT_FALSE(client.ended());
  EXPECT_FALSE(later.ended());
  proxy_->Heal();
  for (Client* lost : {&client, &later}) {
    EXPECT_EQ(lost->Receive(1), "");
    EXPECT_EQ(lost->error(), ECONNRESET);
  }
  EXPECT_EQ(Client(proxy_->port()).Echo("new"), "new");
}

TEST_F(TcpProxyTest, RefusesNewConnectionsOnly) {
  Client client(proxy_->port());
  EXPECT_EQ(client.Echo("a"), "a");
  proxy_->Set({.refuse = true});
  EXPECT_EQ(Client(proxy_->port()).error(), ECONNREFUSED);
  EXPECT_EQ(client.Echo("b"), "b");
  proxy_->Heal();
  EXPECT_EQ(Client(proxy_->port()).Echo("c"), "c");
}

TEST(TcpProxy, TargetMayComeLater) {
  auto echo = std::make_unique<EchoServer>();
  const uint16_t port = echo->port();
  auto proxy = Value(TcpProxy::Start(port));
  EXPECT_EQ(Client(proxy->port()).Echo("a"), "a");
  echo.reset();
  Client nowhere(proxy->port());
  EXPECT_EQ(nowhere.Receive(1), "");
  EXPECT_TRUE(nowhere.ended());
}

}  // namespace
}  // namespace hps::testing
