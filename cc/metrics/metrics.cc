#include "hps/metrics.h"

#include <algorithm>
#include <cstdio>

namespace hps {

uint64_t Histogram::count() const {
  uint64_t total = 0;
  for (const auto& bucket : buckets_) total += bucket.load(std::memory_order_relaxed);
  return total;
}

double Histogram::Quantile(double q) const {
  uint64_t total = count();
  if (total == 0) return 0.0;
  double rank = q * static_cast<double>(total);
  double seen = 0.0;
  for (int i = 0; i < kBuckets; ++i) {
    double here = static_cast<double>(bucket(i));
    if (here > 0 && seen + here >= rank) {
      double low = i == 0 ? 0.0 : static_cast<double>(BucketLimit(i - 1));
      double high = static_cast<double>(BucketLimit(i));
      return low + (high - low) * (rank - seen) / here;
    }
    seen += here;
  }
  return static_cast<double>(BucketLimit(kBuckets - 1));
}

Counter* MetricsRegistry::FindCounter(const std::string& name, const MetricLabels& labels) {
  std::lock_guard lock(mutex_);
  Metric& metric = metrics_[{name, labels}];
  if (!metric.counter) metric.counter = std::make_unique<Counter>();
  return metric.counter.get();
}

Gauge* MetricsRegistry::FindGauge(const std::string& name, const MetricLabels& labels) {
  std::lock_guard lock(mutex_);
  Metric& metric = metrics_[{name, labels}];
  if (!metric.gauge) metric.gauge = std::make_unique<Gauge>();
  return metric.gauge.get();
}

Histogram* MetricsRegistry::FindHistogram(const std::string& name, const MetricLabels& labels) {
  std::lock_guard lock(mutex_);
  Metric& metric = metrics_[{name, labels}];
  if (!metric.histogram) metric.histogram = std::make_unique<Histogram>();
  return metric.histogram.get();
}

uint64_t MetricsRegistry::SumOfCounters(const std::string& name) const {
  std::lock_guard lock(mutex_);
  uint64_t sum = 0;
  for (auto it = metrics_.lower_bound({name, {}}); it != metrics_.end() && it->first.first == name; ++it) {
    if (it->second.counter) sum += it->second.counter->value();
  }
  return sum;
}

std::vector<MetricsRegistry::Sample> MetricsRegistry::Samples() const {
  std::lock_guard lock(mutex_);
  std::vector<Sample> samples;
  for (const auto& [key, metric] : metrics_) {
    samples.push_back({key.first, key.second, metric.counter.get(), metric.gauge.get(), metric.histogram.get()});
  }
  return samples;
}

namespace {

// {model="a",table="b"} with an optional further label; label values follow our name grammar and need no escapes.
std::string LabelText(const MetricLabels& labels, const std::string& extra = "") {
  std::string text;
  for (const auto& [name, value] : labels) text += (text.empty() ? "" : ",") + name + "=\"" + value + "\"";
  if (!extra.empty()) text += (text.empty() ? "" : ",") + extra;
  return text.empty() ? "" : "{" + text + "}";
}

std::string Seconds(uint64_t nanoseconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", static_cast<double>(nanoseconds) * 1e-9);
  return text;
}

}  // namespace

std::string MetricsRegistry::PrometheusText() const {
  const std::pair<MetricLabels, const MetricsRegistry*> alone = {{}, this};
  return PrometheusText(std::span(&alone, 1));
}

std::string MetricsRegistry::PrometheusText(
    std::span<const std::pair<MetricLabels, const MetricsRegistry*>> registries) {
  std::vector<Sample> samples;
  for (const auto& [labels, registry] : registries) {
    for (Sample& sample : registry->Samples()) {
      sample.labels.insert(sample.labels.begin(), labels.begin(), labels.end());
      samples.push_back(std::move(sample));
    }
  }
  // All lines of a metric stand together.
  std::stable_sort(samples.begin(), samples.end(), [](const Sample& a, const Sample& b) { return a.name < b.name; });
  std::string out;
  std::string last_name;
  for (const Sample& sample : samples) {
    if (sample.name != last_name) {
      out += "# TYPE " + sample.name + (sample.counter ? " counter\n" : sample.gauge ? " gauge\n" : " histogram\n");
      last_name = sample.name;
    }
    if (sample.counter) {
      out += sample.name + LabelText(sample.labels) + " " + std::to_string(sample.counter->value()) + "\n";
      continue;
    }
    if (sample.gauge) {
      out += sample.name + LabelText(sample.labels) + " " + std::to_string(sample.gauge->value()) + "\n";
      continue;
    }
    // From a microsecond to half a minute, whatever was recorded: a scraper wants the same buckets each time.
    uint64_t seen = 0;
    for (int i = 0; i < Histogram::kBuckets; ++i) {
      seen += sample.histogram->bucket(i);
      if (i < 10 || i > 35) continue;
      out += sample.name + "_bucket" + LabelText(sample.labels, "le=\"" + Seconds(Histogram::BucketLimit(i)) + "\"") +
             " " + std::to_string(seen) + "\n";
    }
    out += sample.name + "_bucket" + LabelText(sample.labels, "le=\"+Inf\"") + " " + std::to_string(seen) + "\n";
    out += sample.name + "_sum" + LabelText(sample.labels) + " " + Seconds(sample.histogram->sum_nanoseconds()) + "\n";
    out += sample.name + "_count" + LabelText(sample.labels) + " " + std::to_string(seen) + "\n";
  }
  return out;
}

}  // namespace hps
