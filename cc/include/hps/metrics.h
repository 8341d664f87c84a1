// Metrics: counters, gauges and latency histograms that every stage of a lookup, load or update feeds.
//
// Names are hps_<noun>_<verb>_<unit> with the labels model, table and tier. Reading is a snapshot: each value is right,
// values of one snapshot may be a few operations apart.
//
// Thread safety: all methods may be called from any thread; adding costs one relaxed atomic addition.

#ifndef HPS_METRICS_H_
#define HPS_METRICS_H_

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace hps {

class Counter {
 public:
  void Add(uint64_t n) { value_.fetch_add(n, std::memory_order_relaxed); }
  uint64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

// A value that goes up and down.
class Gauge {
 public:
  void Set(int64_t value) { value_.store(value, std::memory_order_relaxed); }
  int64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> value_{0};
};

// Durations in nanoseconds, in buckets of powers of two.
class Histogram {
 public:
  static constexpr int kBuckets = 48;

  void Record(uint64_t nanoseconds) {
    int bucket = std::bit_width(nanoseconds);
    buckets_[bucket < kBuckets ? bucket : kBuckets - 1].fetch_add(1, std::memory_order_relaxed);
    sum_.fetch_add(nanoseconds, std::memory_order_relaxed);
  }
  uint64_t count() const;
  uint64_t sum_nanoseconds() const { return sum_.load(std::memory_order_relaxed); }
  uint64_t bucket(int i) const { return buckets_[i].load(std::memory_order_relaxed); }
  // Upper bound in nanoseconds of bucket i (durations below it).
  static uint64_t BucketLimit(int i) { return uint64_t{1} << i; }
  // Estimate of the q-quantile (0 < q < 1), interpolated inside its bucket; 0 when nothing was recorded.
  double Quantile(double q) const;

 private:
  std::array<std::atomic<uint64_t>, kBuckets> buckets_{};
  std::atomic<uint64_t> sum_{0};
};

using MetricLabels = std::vector<std::pair<std::string, std::string>>;

class MetricsRegistry {
 public:
  // The metric of that name and those labels, made at the first call. The pointer lives as long as the registry.
  Counter* FindCounter(const std::string& name, const MetricLabels& labels);
  Gauge* FindGauge(const std::string& name, const MetricLabels& labels);
  Histogram* FindHistogram(const std::string& name, const MetricLabels& labels);
  // Over all labels; 0 where there is no counter of that name.
  uint64_t SumOfCounters(const std::string& name) const;

  struct Sample {
    std::string name;
    MetricLabels labels;
    const Counter* counter = nullptr;  // one of the three is set
    const Gauge* gauge = nullptr;
    const Histogram* histogram = nullptr;
  };
  // Sorted by name and labels.
  std::vector<Sample> Samples() const;
  // The text format that Prometheus scrapes.
  std::string PrometheusText() const;
  // The same of several registries in one text, each with labels of its own put first.
  static std::string PrometheusText(std::span<const std::pair<MetricLabels, const MetricsRegistry*>> registries);

 private:
  struct Metric {
    std::unique_ptr<Counter> counter;
    std::unique_ptr<Gauge> gauge;
    std::unique_ptr<Histogram> histogram;
  };
  mutable std::mutex mutex_;
  std::map<std::pair<std::string, MetricLabels>, Metric> metrics_;
};

}  // namespace hps

#endif  // HPS_METRICS_H_
