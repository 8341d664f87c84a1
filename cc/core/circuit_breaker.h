// CircuitBreaker: remembers that a store does not answer, so that lookups do without it at once instead of waiting.
//
// Closed: every call may go to the store. After `failures_to_open` failures in a row it opens: calls are refused with
// kUnavailable and nobody waits. When a wait is over, which doubles from try to try and is never the same twice, one
// call is let through (half-open): its success closes the breaker, its failure opens it for longer. Each change writes
// one log line; the state is the gauge hps_tier_reachable_state (1: closed).
//
// Thread safety: all methods may be called from any thread. While closed they cost one relaxed load each and read no
// clock.

#ifndef HPS_CORE_CIRCUIT_BREAKER_H_
#define HPS_CORE_CIRCUIT_BREAKER_H_

#include <atomic>
#include <chrono>
#include <mutex>
#include <random>
#include <string>

#include "hps/metrics.h"
#include "hps/status.h"

namespace hps {

struct BreakerOptions {
  int failures_to_open = 5;  // in a row
  std::chrono::milliseconds first_wait{100};
  std::chrono::milliseconds longest_wait{10'000};
};

class CircuitBreaker {
 public:
  enum class State { kClosed, kOpen, kHalfOpen };

  // `tier` and `store` name it in messages: "volatile", "redis_cluster". Metrics carry the label tier.
  CircuitBreaker(std::string tier, std::string store, MetricsRegistry& metrics, const BreakerOptions& options = {});

  // kUnavailable while open. After OK exactly one of the following three is called.
  Status Admit() { return closed() ? OkStatus() : AdmitOpen(); }
  // Also to be called, without Admit, by whoever has seen otherwise that the store answers: a load.
  void Succeeded() {
    if (disturbed_.load(std::memory_order_relaxed)) SucceededAfterFailures();
  }
  void Failed(const Status& cause);
  // The call ended for a reason that says nothing about the store (cancelled, the caller's mistake).
  void Undecided() {
    if (disturbed_.load(std::memory_order_relaxed)) EndProbe();
  }
  // Logs, once, that the store holds damaged rows that a lower tier replaces.
  void Damaged(const Status& cause);

  bool closed() const { return closed_.load(std::memory_order_relaxed); }
  State state() const;
  uint64_t openings() const { return openings_->value(); }
  // "volatile tier (redis_cluster)"
  const std::string& name() const { return name_; }

 private:
  using Clock = std::chrono::steady_clock;

  Status AdmitOpen();
  void SucceededAfterFailures();
  void EndProbe();
  void Open(Clock::time_point now, std::chrono::milliseconds wait);  // REQUIRES: mutex_

  const std::string name_;
  const BreakerOptions options_;
  Gauge* const reachable_;
  Counter* const openings_;
  std::atomic<bool> closed_{true};
  std::atomic<bool> disturbed_{false};  // a failure since the last success
  std::atomic<bool> damage_logged_{false};

  mutable std::mutex mutex_;  // guards the following members and changes of the ones above
  int failures_ = 0;          // in a row, while closed
  bool probing_ = false;      // half-open: a call is on its way
  std::chrono::milliseconds wait_{0};
  Clock::time_point next_probe_{};
  Clock::time_point opened_{};
  std::string cause_;
  std::minstd_rand random_{std::random_device{}()};
};

}  // namespace hps

#endif  // HPS_CORE_CIRCUIT_BREAKER_H_
