// Invariant: closed_ is false exactly while the breaker is open or half-open; both imply disturbed_. mutex_ is a leaf;
// log lines are written after it was let go.

#include "cc/core/circuit_breaker.h"

#include <algorithm>

#include "hps/log.h"

namespace hps {

CircuitBreaker::CircuitBreaker(std::string tier, std::string store, MetricsRegistry& metrics,
                               const BreakerOptions& options)
    : name_(tier + " tier (" + store + ")"),
      options_(options),
      reachable_(metrics.FindGauge("hps_tier_reachable_state", {{"tier", tier}})),
      openings_(metrics.FindCounter("hps_tier_openings_total", {{"tier", tier}})) {
  reachable_->Set(1);
}

CircuitBreaker::State CircuitBreaker::state() const {
  std::lock_guard lock(mutex_);
  return closed() ? State::kClosed : probing_ ? State::kHalfOpen : State::kOpen;
}

Status CircuitBreaker::AdmitOpen() {
  std::lock_guard lock(mutex_);
  if (closed()) return OkStatus();
  if (!probing_ && Clock::now() >= next_probe_) {
    probing_ = true;
    return OkStatus();
  }
  return Unavailable("it did not answer before and is not asked for a while (" + cause_ + ")");
}

void CircuitBreaker::Open(Clock::time_point now, std::chrono::milliseconds wait) {
  wait_ = std::min(wait, options_.longest_wait);
  // Between half of the wait and all of it: many servers must not come back to a store at one moment.
  const double part = std::uniform_real_distribution<double>(0.5, 1.0)(random_);
  next_probe_ = now + std::chrono::duration_cast<Clock::duration>(wait_ * part);
  probing_ = false;
}

void CircuitBreaker::Failed(const Status& cause) {
  {
    std::lock_guard lock(mutex_);
    disturbed_.store(true, std::memory_order_relaxed);
    if (!closed()) {
      if (!probing_) return;  // began before the breaker opened
      cause_ = cause.ToString();
      return Open(Clock::now(), wait_ * 2);
    }
    if (++failures_ < options_.failures_to_open) return;
    const Clock::time_point now = Clock::now();
    cause_ = cause.ToString();
    opened_ = now;
    Open(now, options_.first_wait);
    closed_.store(false, std::memory_order_relaxed);
    openings_->Add(1);
    reachable_->Set(0);
  }
  Log(LogLevel::kWarning, "the " + name_ + " does not answer and is left out until it does: " + cause.ToString());
}

void CircuitBreaker::SucceededAfterFailures() {
  double seconds = 0.0;
  {
    std::lock_guard lock(mutex_);
    failures_ = 0;
    disturbed_.store(false, std::memory_order_relaxed);
    if (closed()) return;
    seconds = std::chrono::duration<double>(Clock::now() - opened_).count();
    probing_ = false;
    closed_.store(true, std::memory_order_relaxed);
    reachable_->Set(1);
  }
  std::string text = std::to_string(seconds);
  text.resize(text.find('.') + 2);
  Log(LogLevel::kInfo, "the " + name_ + " answers again after " + text + " s");
}

void CircuitBreaker::EndProbe() {
  std::lock_guard lock(mutex_);
  probing_ = false;  // next_probe_ has passed: the next call tries
}

void CircuitBreaker::Damaged(const Status& cause) {
  if (damage_logged_.exchange(true)) return;
  Log(LogLevel::kWarning,
      "the " + name_ + " holds damaged rows; they are taken from the next tier: " + cause.ToString());
}

}  // namespace hps
