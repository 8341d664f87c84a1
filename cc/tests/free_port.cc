#include "cc/tests/free_port.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <random>

namespace hps::testing {
namespace {

constexpr uint16_t kFirst = 12000;
constexpr uint16_t kLast = 31999;  // outgoing connections use 32768 and above

int BoundSocket(int type, uint16_t port) {
  const int fd = ::socket(AF_INET, type | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (fd >= 0 && ::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) return fd;
  if (fd >= 0) ::close(fd);
  return -1;
}

}  // namespace

Result<FreePort> FreePort::Choose() {
  std::random_device random;
  for (int attempt = 0; attempt < 1000; ++attempt) {
    const uint16_t port = std::uniform_int_distribution<uint16_t>(kFirst, kLast)(random);
    const int token = BoundSocket(SOCK_DGRAM, port);
    if (token < 0) continue;
    const int probe = BoundSocket(SOCK_STREAM, port);
    if (probe < 0) {
      ::close(token);
      continue;
    }
    ::close(probe);
    return FreePort(port, token);
  }
  return Unavailable("no free TCP port of 127.0.0.1 was found between 12000 and 31999");
}

FreePort::~FreePort() {
  if (token_ >= 0) ::close(token_);
}

}  // namespace hps::testing
