#include "hps/metrics.h"

#include <algorithm>
#include <cstdio>
#include <string_view>

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

// docs/operations.md has the same names; tests/test_parameter_server.py sees that none is left out.
constexpr std::pair<std::string_view, std::string_view> kHelp[] = {
    {"hps_cache_fills_outdated_total", "Rows fetched for a lookup that were not left in a cache: updated meanwhile."},
    {"hps_cache_keys_absent_total", "Keys of lookups that did not wait, which no tier holds."},
    {"hps_cache_keys_asked_total", "Keys that lookups asked the table's cache on the device for, with repetitions."},
    {"hps_cache_keys_dropped_total", "Keys of lookups that did not wait, dropped: queue full, or the cache is gone."},
    {"hps_cache_keys_failed_total", "Keys of lookups that did not wait, whose rows a tier or the device did not take."},
    {"hps_cache_keys_inserted_total", "Keys of lookups that did not wait, whose rows are in the cache now."},
    {"hps_cache_keys_queued_count", "Keys whose rows are to be inserted."},
    {"hps_cache_keys_repeated_total", "Keys of lookups that did not wait, which were in the queue already."},
    {"hps_cache_memory_bytes", "Memory of the device that the table's cache takes."},
    {"hps_cache_pinned_bytes", "Pinned memory of the host that the rows of the table's cache take."},
    {"hps_cache_refreshes_done_total", "Refreshes of a whole cache in the background."},
    {"hps_cache_refreshes_failed_total", "Refreshes in the background that failed."},
    {"hps_cache_rows_defaulted_total", "Default values of keys that are not in a cache of the whole table."},
    {"hps_cache_rows_deferred_total", "Default values of keys that are inserted later (hit_rate_threshold)."},
    {"hps_cache_rows_erased_total", "Keys that were to be taken out of the cache."},
    {"hps_cache_rows_evicted_total", "Rows pushed out by inserts, those of lookups not counted."},
    {"hps_cache_rows_exchanged_total", "Rows that came from pinned memory to lie in the device's (uvm)."},
    {"hps_cache_rows_inserted_total", "Rows given to the cache, those of lookups that waited not counted."},
    {"hps_cache_rows_missed_total", "Keys that lookups on the device missed and fetched, each once a call."},
    {"hps_cache_rows_outdated_total", "Rows left out of the cache or taken out again: updated meanwhile."},
    {"hps_cache_rows_refreshed_total", "Rows that were read anew for the cache."},
    {"hps_cache_rows_repeated_total", "Further positions, in a call, of keys that the cache missed."},
    {"hps_cache_rows_served_total", "Rows of lookups on the device that came from the cache."},
    {"hps_cache_rows_updated_total", "Updated rows that were brought to the cache."},
    {"hps_device_alive_state", "1: the device works; 0: it has failed, and its caches serve nothing any more."},
    {"hps_fetch_duration_seconds", "Time of a lookup in one tier, once a table and call."},
    {"hps_fetches_failed_total", "Requests to the tier that failed."},
    {"hps_keys_asked_total", "Keys that lookups asked for, with repetitions."},
    {"hps_keys_waited_total", "Keys that were taken from another lookup's fetch."},
    {"hps_lookup_duration_seconds", "Time of whole lookup calls, failed ones too."},
    {"hps_lookups_done_total", "Lookup calls that asked the table."},
    {"hps_rows_promoted_total", "Rows offered to the volatile tier by cache_missed_embeddings."},
    {"hps_rows_promotion_dropped_total", "Rows that were not promoted: queue full, store down or table gone."},
    {"hps_rows_promotion_repeated_total", "Rows that were waiting for their promotion already."},
    {"hps_rows_served_total", "Rows that came from the tier, or are the default value."},
    {"hps_rows_skipped_total", "Rows that the tier was not asked for, or did not give, because it could not be asked."},
    {"hps_rows_unavailable_total", "Default values of keys that a tier that could not be asked may hold."},
    {"hps_tier_openings_total", "How often the tier was left out because it failed."},
    {"hps_tier_reachable_state", "1: the tier answers; 0: it is left out until it does."},
    {"hps_workspaces_lent_count", "Workspaces that lookups on the device are using."},
    {"hps_workspaces_made_count", "Workspaces of the model on the device."},
    {"hps_workspaces_memory_bytes", "Memory of the device that idle workspaces take."},
    {"hps_workspaces_trimmed_total", "Rounds in which idle workspaces were given back."},
    {"hps_workspaces_waited_total", "Lookups on the device that found all workspaces lent."},
};

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
      for (const auto& [name, help] : kHelp) {
        if (name == sample.name) out += "# HELP " + sample.name + " " + std::string(help) + "\n";
      }
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
