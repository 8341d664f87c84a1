// A TCP proxy on 127.0.0.1 with faults that are switched while it runs: what a network does to a service on a bad day.
//
//   auto proxy = Value(TcpProxy::Start(redis_port));
//   ... clients connect to proxy->port() ...
//   proxy->Set({.replies = {.latency = milliseconds(50)}});
//   proxy->Reset();   // every connection gets RST
//   proxy->Heal();
//
// Thread safety: all methods may be called from any thread. They return when the new state is in force.
// One thread of its own serves all connections.

#ifndef HPS_TESTS_TCP_PROXY_H_
#define HPS_TESTS_TCP_PROXY_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <string>

#include "hps/status.h"

namespace hps::testing {

// What happens to the bytes of one direction.
struct FlowFaults {
  std::chrono::milliseconds latency{0};  // each byte arrives so much later; order is kept
  size_t bytes_per_second = 0;           // for each connection; 0: no limit. Small numbers are a slow drip
  // Each connection chooses at random a number of bytes below this one, lets so many pass, and then
  std::optional<size_t> cut_within = {};      // is closed: the answer ends in its middle
  std::optional<size_t> garbage_within = {};  // passes on garbage in the place of every further byte. Garbage has no
                                              // line breaks, digits or signs, so that no protocol of lines can read it
};

struct Faults {
  FlowFaults requests = {};  // from the client to the server
  FlowFaults replies = {};
  bool stall = false;  // nothing moves, nothing is lost: all of it arrives after healing. New connections are accepted
  bool half_open = false;  // bytes are swallowed, the ends of connections too; new connections are accepted and lead
                           // nowhere. When this ends, connections that lived in it are reset, for their bytes are lost
  bool refuse = false;     // new connections are refused; established ones live
};

class TcpProxy {
 public:
  // Listens on a free port and forwards to a port of 127.0.0.1, where nothing needs to listen yet.
  static Result<std::unique_ptr<TcpProxy>> Start(uint16_t target_port, uint64_t seed = std::random_device{}());
  virtual ~TcpProxy() = default;

  virtual uint16_t port() const = 0;
  std::string address() const { return "127.0.0.1:" + std::to_string(port()); }

  virtual void Set(const Faults& faults) = 0;  // replaces what was set before
  void Heal() { Set({}); }
  virtual void Cut() = 0;    // closes every connection, both sides; bytes on the way are lost
  virtual void Reset() = 0;  // the same with RST

  struct Counts {
    uint64_t accepted = 0;                        // connections so far
    uint64_t open = 0;                            // now
    uint64_t request_bytes = 0, reply_bytes = 0;  // passed on so far
  };
  virtual Counts counts() const = 0;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_TCP_PROXY_H_
