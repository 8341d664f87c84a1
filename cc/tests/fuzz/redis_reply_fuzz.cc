// What a server may say: an input is the bytes that come as replies, in pieces that the first byte chooses, to a
// pipeline of every kind of task. Whatever comes, the connection ends with a Status or with all tasks done, rows are
// written at their places and nowhere else, and a row is taken only where its reply is whole.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstring>
#include <span>

#include "cc/storage/redis_connection.h"
#include "cc/storage/redis_row_tasks.h"
#include "cc/tests/fuzz/fuzz_target.h"
#include "cc/tests/row_pattern.h"

namespace hps::fuzz {
namespace {

constexpr size_t kRowBytes = 8;
constexpr std::array<Key, 4> kKeys = {1, 2, 3, 4};
constexpr std::array<uint32_t, 3> kMembers = {0, 1, 3};  // the row of key 3 is somebody else's

std::string Bulk(const std::string& text) { return "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n"; }

// A listening socket of this process: the far end of every connection.
class Listener {
 public:
  static Listener& Get() {
    static Listener& instance = *new Listener;
    return instance;
  }
  uint16_t port() const { return port_; }
  int Accept() const { return ::accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC); }

 private:
  Listener() {
    std::signal(SIGPIPE, SIG_IGN);
    fd_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    FUZZ_CHECK(::bind(fd_, reinterpret_cast<sockaddr*>(&address), size) == 0, "bind");
    FUZZ_CHECK(::listen(fd_, 64) == 0, "listen");
    FUZZ_CHECK(::getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size) == 0, "getsockname");
    port_ = ntohs(address.sin_port);
  }
  int fd_;
  uint16_t port_ = 0;
};

// Of a reply that was accepted as three rows: where its elements are strings of given length they end with a line
// break, and each is the row at its place. Elements of other forms end the comparison.
void CheckRows(std::string_view reply, const testing::RowBlock& rows, std::span<const uint8_t> found) {
  if (!reply.starts_with("*3\r\n")) return;
  reply.remove_prefix(4);
  for (size_t i = 0; i < found.size(); ++i) {
    if (reply.starts_with("$-1\r\n")) {
      FUZZ_CHECK(found[i] == 0, "a missing row was taken for one");
      reply.remove_prefix(5);
    } else if (reply.starts_with("$8\r\n")) {
      const std::string_view row = reply.substr(4, kRowBytes);
      FUZZ_CHECK(found[i] == 1 && std::memcmp(rows.row(kMembers[i]).data(), row.data(), kRowBytes) == 0, "another row");
      FUZZ_CHECK(reply.substr(4 + kRowBytes, 2) == "\r\n", "a row without a line break behind it was accepted");
      reply.remove_prefix(4 + kRowBytes + 2);
    } else {
      FUZZ_CHECK(!reply.empty() && std::string_view("+-:,#(=").find(reply[0]) == std::string_view::npos,
                 "no row was taken for one");
      return;
    }
  }
}

}  // namespace

std::vector<std::string> Seeds() {
  const std::string rows = "*3\r\n" + Bulk("11111111") + "$-1\r\n" + Bulk("44444444");
  const std::string slots =
      "*1\r\n*3\r\n:0\r\n:16383\r\n*4\r\n" + Bulk("127.0.0.1") + ":7000\r\n" + Bulk("id") + "*0\r\n";
  const std::string scan =
      "*2\r\n" + Bulk("17") + "*4\r\n" + Bulk("kkkkkkkk") + Bulk("rrrrrrrr") + Bulk("k") + Bulk("");
  const std::string all = rows + ":2\r\n" + scan + slots + "+OK\r\n";
  return {"\x01" + all, "\xff" + all, "\xff" + rows + "-MOVED 3999 127.0.0.1:6381\r\n" + scan + slots + "$-1\r\n",
          "\xff-LOADING Redis is loading the dataset in memory\r\n-ASK 1 :1\r\n-ERR x\r\n*-1\r\n-TRYAGAIN\r\n",
          // A row whose line break is garbage, as the last of its reply: hiredis does not look at it.
          "\xff*3\r\n" + Bulk("11111111") + "$-1\r\n$8\r\n44444444??",
          // As long as a row, and none.
          "\xff*3\r\n" + Bulk("11111111") + "$-1\r\n-ERR 4444\r\n",
          "\xff*3\r\n+11111111\r\n,1.500000\r\n=8\r\ntxt:4444\r\n",
          "\xff*4\r\n" + Bulk("1") + Bulk("2") + Bulk("3") + Bulk("4"), "\xff*3\r\n*3\r\n:1\r\n:2\r\n:3\r\n",
          "\xff*2147483647\r\n", "\xff$9223372036854775807\r\nx",
          "\xff%1\r\n+a\r\n~2\r\n_\r\n#t\r\n,1.5\r\n(123\r\n=7\r\ntxt:abc\r\n>1\r\n+x\r\n|1\r\n+k\r\n+v\r\n",
          "\xff" + std::string(64, '*') + "1\r\n", ""};
}
std::vector<std::string> Words() {
  return {"\r\n",
          "*",
          "$",
          ":",
          "+",
          "-",
          "*3\r\n",
          "$8\r\n",
          "$-1\r\n",
          "*-1\r\n",
          "*1\r\n*1\r\n*1\r\n",
          "-MOVED 1 a:1\r\n",
          "-ASK 1 a:1\r\n",
          "-44444444\r\n",
          "+44444444\r\n",
          "$8\r\n44444444\r\n",
          "%",
          "~",
          "_\r\n",
          ">",
          "=",
          "(",
          ",nan\r\n",
          "#t\r\n"};
}

void RunTarget(std::string_view input) {
  static const RedisLogin& login = *new RedisLogin{"default", "", nullptr};
  if (input.empty()) return;
  const size_t piece_bytes = std::max<size_t>(1, static_cast<uint8_t>(input[0]) * size_t{64} / 4);
  input.remove_prefix(1);
  const std::string_view all = input;

  RedisServerNotes notes;
  const RedisEndpoint endpoint{"127.0.0.1", Listener::Get().port()};
  Result<std::unique_ptr<RedisConnection>> connection = RedisConnection::Begin(endpoint, login, &notes, kNoDeadline);
  FUZZ_CHECK(connection.ok(), connection.status().ToString());
  const int server = Listener::Get().Accept();
  FUZZ_CHECK(server >= 0, "accept");
  // No port may be held by a connection that has ended: there are many of them.
  const linger now{1, 0};
  ::setsockopt(server, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
  const int on = 1;
  ::setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));

  const std::string name = "hps_et{t/p0}v";
  const RedisHash hash{&name, 0, 8};
  testing::RowBlock rows(kKeys.size(), kRowBytes, kRowBytes + 4);
  std::array<uint8_t, 3> found{2, 2, 2};
  const FetchRowsTask::Target target{kKeys, kMembers.data(), rows.buffer(), kRowBytes, found.data()};
  const std::array<uint32_t, 3> members{0, 1, 2};
  FetchRowsTask fetch(hash, &target, members);
  RemoveKeysTask remove(hash, {1, 2, 3});
  ScanTask scan(hash, "0", 10);
  RedisCommandTask slots(0, {"CLUSTER", "SLOTS"});
  RedisCommandTask set(0, {"SET", "a", "b"});
  const std::array<RedisTask*, 5> tasks{&fetch, &remove, &scan, &slots, &set};

  std::vector<RedisTask*> done;
  Status status;
  const auto progress = [&] {
    status = connection.value()->Progress(true, &done);
    return status.ok() && done.size() < tasks.size();
  };
  while (progress() && !connection.value()->ready()) {
    pollfd waiting{connection.value()->fd(), connection.value()->events(), 0};
    ::poll(&waiting, 1, 1000);
  }
  FUZZ_CHECK(status.ok(), status.ToString());
  for (RedisTask* task : tasks) connection.value()->Submit(task, false);
  bool going_on = progress();
  while (going_on && !input.empty()) {
    const std::string_view piece = input.substr(0, piece_bytes);
    if (::send(server, piece.data(), piece.size(), MSG_NOSIGNAL) < 0) break;
    input.remove_prefix(piece.size());
    pollfd waiting{connection.value()->fd(), POLLIN, 0};
    ::poll(&waiting, 1, 1000);
    going_on = progress();
  }
  ::shutdown(server, SHUT_WR);
  for (int i = 0; i < 100 && going_on; ++i) {
    pollfd waiting{connection.value()->fd(), POLLIN, 0};
    ::poll(&waiting, 1, 1000);
    going_on = progress();
  }
  FUZZ_CHECK(!going_on, "the connection was closed and nobody noticed");
  FUZZ_CHECK(!status.ok() || done.size() == tasks.size(), "no error, yet tasks are not done");

  for (size_t i = 0; i < kKeys.size(); ++i) FUZZ_CHECK(rows.GapUntouched(i), "bytes between rows were written");
  FUZZ_CHECK(rows.RowUntouched(2), "the row of a key that was not asked for was written");
  for (size_t i = 0; i < done.size(); ++i) FUZZ_CHECK(done[i] == tasks[i], "tasks were done in another order");
  if (!done.empty() && fetch.error.empty()) {
    for (size_t i = 0; i < found.size(); ++i) {
      FUZZ_CHECK(found[i] <= 1, "a row of a whole reply is neither there nor missing");
      FUZZ_CHECK(found[i] == 1 || rows.RowUntouched(kMembers[i]), "the row of a missing key was written");
    }
    CheckRows(all, rows, found);
  }
  connection.value().reset();
  ::close(server);
}

}  // namespace hps::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  hps::fuzz::RunTarget(std::string_view(reinterpret_cast<const char*>(data), size));
  return 0;
}
