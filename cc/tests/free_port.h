// TCP ports of 127.0.0.1 for test services.
//
// A port stays ours from the moment it is chosen until the object is destroyed, also while nothing listens on it (a
// killed server comes back on the same port). Two measures see to that:
//   - Ports come from below the range from which the system takes the ports of outgoing connections. Without that, a
//     client's connection could take the port of a killed server, or, on loopback, connect to itself.
//   - The UDP port of the same number is held as a token, so that test programs that run side by side
//   (tests/services.py
//     does the same) never choose the same port. The token dies with the process.

#ifndef HPS_TESTS_FREE_PORT_H_
#define HPS_TESTS_FREE_PORT_H_

#include <cstdint>
#include <utility>

#include "hps/status.h"

namespace hps::testing {

class FreePort {
 public:
  static Result<FreePort> Choose();

  FreePort(FreePort&& other) noexcept : port_(std::exchange(other.port_, 0)), token_(std::exchange(other.token_, -1)) {}
  FreePort& operator=(FreePort&& other) noexcept {
    std::swap(port_, other.port_);
    std::swap(token_, other.token_);
    return *this;
  }
  ~FreePort();

  uint16_t number() const { return port_; }

 private:
  FreePort(uint16_t port, int token) : port_(port), token_(token) {}

  uint16_t port_;
  int token_;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_FREE_PORT_H_
