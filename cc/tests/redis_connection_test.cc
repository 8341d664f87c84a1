// One connection to a server that says what the test wants: what is taken for a row, and what is said of a connection
// that fails.

#include "cc/storage/redis_connection.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "cc/storage/redis_row_tasks.h"
#include "cc/tests/core_fixture.h"
#include "cc/tests/row_pattern.h"

namespace hps::testing {
namespace {

constexpr size_t kRowBytes = 8;

std::string Bulk(const std::string& text) { return "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n"; }

class RedisConnectionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    ASSERT_EQ(::bind(listener_, reinterpret_cast<sockaddr*>(&address), size), 0);
    ASSERT_EQ(::listen(listener_, 8), 0);
    ASSERT_EQ(::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size), 0);
    endpoint_ = {"127.0.0.1", ntohs(address.sin_port)};
    Connect();
  }
  void TearDown() override {
    connection_.reset();
    CloseServer();
    ::close(listener_);
  }

  void Connect() {
    CloseServer();
    connection_ = Value(RedisConnection::Begin(endpoint_, login_, &notes_, kNoDeadline));
    server_ = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    ASSERT_GE(server_, 0);
    done_.clear();
    WaitUntil([&] { return !Progress().ok() || connection_->ready(); }, "the connection");
    ASSERT_TRUE(connection_->ready());
  }
  void Say(const std::string& text) { ASSERT_EQ(::send(server_, text.data(), text.size(), MSG_NOSIGNAL), text.size()); }
  void CloseServer() {
    if (server_ >= 0) ::close(server_);
    server_ = -1;
  }
  void ResetServer() {
    const linger now{1, 0};
    ::setsockopt(server_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
    CloseServer();
  }

  Status Progress() {
    pollfd waiting{connection_->fd(), connection_->events(), 0};
    ::poll(&waiting, 1, 10);
    return connection_->Progress(true, &done_);
  }
  // The error that the connection ends with, or OK when `count` tasks are done.
  Status Drive(size_t count) {
    Status status;
    WaitUntil(
        [&] {
          status = Progress();
          return !status.ok() || done_.size() >= count;
        },
        "the end of the connection");
    return status;
  }

  // Fetches two rows; the server answers with `reply`.
  Status Fetch(const std::string& reply) {
    const std::vector<Key> keys = {1, 2};
    const std::vector<uint32_t> members = {0, 1};
    rows_ = RowBlock(keys.size(), kRowBytes);
    found_ = {2, 2};
    const FetchRowsTask::Target target{keys, nullptr, rows_.buffer(), kRowBytes, found_.data()};
    FetchRowsTask task(RedisHash{&name_, 0, 8}, &target, members);
    connection_->Submit(&task, false);
    Say(reply);
    return Drive(1);
  }
  // Sends one command; the server closes, resets or says `garbage` instead of answering.
  Status Fail(const std::function<void()>& fault) {
    RedisCommandTask task(0, {"GET", "key"});
    connection_->Submit(&task, false);
    EXPECT_TRUE(connection_->Progress(false, &done_).ok());
    fault();
    return Drive(1);
  }

  const std::string name_ = "hps_et{t/p0}v";
  const RedisLogin login_{"default", "", nullptr};
  RedisServerNotes notes_;
  RedisEndpoint endpoint_;
  int listener_ = -1;
  int server_ = -1;
  std::unique_ptr<RedisConnection> connection_;
  std::vector<RedisTask*> done_;
  RowBlock rows_{2, kRowBytes};
  std::vector<uint8_t> found_;
};

TEST_F(RedisConnectionTest, StringsAreRowsAndNilIsNone) {
  ASSERT_OK(Fetch("*2\r\n$-1\r\n" + Bulk("abcdefgh")));
  EXPECT_EQ(found_, (std::vector<uint8_t>{0, 1}));
  EXPECT_TRUE(rows_.RowUntouched(0));
  EXPECT_EQ(std::memcmp(rows_.row(1).data(), "abcdefgh", kRowBytes), 0);
}

TEST_F(RedisConnectionTest, NothingElseOfTheLengthOfARowIsOne) {
  const std::vector<std::string> elements = {"-ERR 4444\r\n",
                                             "+abcdefgh\r\n",
                                             ":12345678\r\n",
                                             ",1.500000\r\n",
                                             "(12345678\r\n",
                                             "#t\r\n",
                                             "=12\r\ntxt:abcdefgh\r\n",
                                             "=8\r\ntxt:abcd\r\n",
                                             "*1\r\n" + Bulk("abcdefgh"),
                                             "*8\r\n:1\r\n:1\r\n:1\r\n:1\r\n:1\r\n:1\r\n:1\r\n:1\r\n"};
  for (const std::string& element : elements) {
    SCOPED_TRACE(element);
    Connect();
    const Status status = Fetch("*2\r\n" + Bulk("abcdefgh") + element);
    ExpectError(status, StatusCode::kUnavailable, {endpoint_.ToString(), "HMGET"});
    if (element[0] == '-') ExpectError(status, StatusCode::kUnavailable, {"ERR 4444"});
    EXPECT_TRUE(rows_.RowUntouched(1));
    EXPECT_EQ(found_[1], 2);
    EXPECT_TRUE(done_.empty());
  }
}

TEST_F(RedisConnectionTest, ScannedRowsAreStrings) {
  const auto scan = [&](const std::string& row, ScanTask* task) {
    Connect();
    connection_->Submit(task, false);
    Say("*2\r\n" + Bulk("0") + "*2\r\n" + Bulk("kkkkkkkk") + row);
    return Drive(1);
  };
  ScanTask good(RedisHash{&name_, 0, 8}, "0", 10);
  ASSERT_OK(scan(Bulk("abcdefgh"), &good));
  EXPECT_EQ(good.elements.size(), 2u);
  for (const std::string& row : {"-ERR 4444\r\n", "+abcdefgh\r\n", ",1.500000\r\n", ":12345678\r\n", "$-1\r\n"}) {
    SCOPED_TRACE(row);
    ScanTask task(RedisHash{&name_, 0, 8}, "0", 10);
    ExpectError(scan(row, &task), StatusCode::kInternal, {"HSCAN"});
    EXPECT_TRUE(task.elements.empty());
  }
}

// What a server that speaks TLS only does to a client that does not, and what happens to any connection on a bad day.
TEST_F(RedisConnectionTest, TlsIsThoughtOfUntilTheServerHasUnderstoodSomething) {
  const std::vector<std::function<void()>> faults = {[&] { CloseServer(); }, [&] { ResetServer(); },
                                                     [&] { Say(std::string("\x15\x03\x01\x00\x02\x02\x46", 7)); }};
  for (const auto& fault : faults) {
    Connect();
    ExpectError(Fail(fault), StatusCode::kUnavailable, {endpoint_.ToString(), "enable_tls"});
  }
  for (const bool anew : {false, true}) {
    for (const auto& fault : faults) {
      Connect();
      if (!anew) {
        RedisCommandTask task(0, {"PING"});
        connection_->Submit(&task, false);
        Say("+PONG\r\n");
        ASSERT_OK(Drive(1));
        done_.clear();
      }
      const Status status = Fail(fault);
      ExpectError(status, StatusCode::kUnavailable, {endpoint_.ToString()});
      EXPECT_EQ(status.message().find("TLS"), std::string::npos) << status.ToString();
    }
  }
}

TEST_F(RedisConnectionTest, RefusalIsTold) {
  connection_.reset();
  CloseServer();
  ::shutdown(listener_, SHUT_RDWR);
  bool refused = false;
  auto begun = RedisConnection::Begin(endpoint_, login_, &notes_, kNoDeadline, &refused);
  if (begun.ok()) {  // it is refused while it connects
    connection_ = std::move(begun).value();
    EXPECT_EQ(Drive(1).code(), StatusCode::kUnavailable);
    refused = connection_->refused();
  }
  EXPECT_TRUE(refused);
}

}  // namespace
}  // namespace hps::testing
