#include "cc/core/server_stats.h"

#include <nlohmann/json.hpp>

namespace hps {
namespace {

using Json = nlohmann::ordered_json;

Json TierJson(const Table& table) {
  auto stats = table.Stats();
  if (!stats.ok()) return {{"error", stats.status().ToString()}};
  return {{"rows", stats->rows},
          {"rows_estimated", stats->rows_estimated},
          {"memory_bytes", stats->memory_bytes},
          {"disk_bytes", stats->disk_bytes},
          {"evicted_rows", stats->evicted_rows}};
}

Json TableJson(const ModelTable& table) {
  const TierMetrics& metrics = table.stack.metrics;
  Json json = {{"name", table.name},
               {"width", table.stack.default_row.size()},
               {"lookups", metrics.lookups->value()},
               {"keys", metrics.keys->value()},
               {"rows_served",
                {{"volatile", metrics.rows_from_volatile->value()},
                 {"persistent", metrics.rows_from_persistent->value()},
                 {"default", metrics.rows_from_default->value()}}},
               {"load",
                {{"source", table.source},
                 {"rows_read", table.load.rows_read},
                 {"non_finite_rows", table.load.non_finite_rows},
                 {"bytes_read", table.load.bytes_read},
                 {"seconds", table.load.seconds},
                 {"rows_per_second", table.load.rows_per_second()}}}};
  if (table.load.duplicate_keys) json["load"]["duplicate_keys"] = *table.load.duplicate_keys;
  if (table.stack.volatile_table) json["volatile"] = TierJson(*table.stack.volatile_table);
  if (table.stack.persistent_table) json["persistent"] = TierJson(*table.stack.persistent_table);
  return json;
}

Json LatencyJson(const Histogram& histogram) {
  return {{"count", histogram.count()},
          {"mean_us", histogram.count() ? static_cast<double>(histogram.sum_nanoseconds()) * 1e-3 /
                                              static_cast<double>(histogram.count())
                                        : 0.0},
          {"p50_us", histogram.Quantile(0.5) * 1e-3},
          {"p99_us", histogram.Quantile(0.99) * 1e-3}};
}

}  // namespace

std::string ServerStatsJson(const ServerConfig& config, const ServerResources& resources,
                            const std::vector<std::shared_ptr<ModelSlot>>& slots) {
  if (Status forked = CheckNotForked(resources.fork_generation); !forked.ok()) {
    return Json{{"error", forked.ToString()}}.dump();
  }
  Json json;
  json["config"] = config.origin;
  json["config_hash"] = ConfigHash(config);
  json["tiers"] = Json::object();
  if (resources.volatile_store) json["tiers"]["volatile"] = std::string(resources.volatile_store->kind());
  if (resources.persistent_store) json["tiers"]["persistent"] = std::string(resources.persistent_store->kind());
  json["rows_promoted"] = resources.metrics.FindCounter("hps_rows_promoted_total", {})->value();
  json["rows_promotion_dropped"] = resources.metrics.FindCounter("hps_rows_promotion_dropped_total", {})->value();
  json["models"] = Json::array();
  for (const auto& slot : slots) {
    auto model = slot->Current();
    if (!model.ok()) continue;  // unloaded meanwhile
    Json entry = {{"name", slot->name()},
                  {"version", (*model)->version},
                  {"lookup_latency", LatencyJson(slot->lookup_seconds())},
                  {"tables", Json::array()}};
    for (const ModelTable& table : (*model)->tables) entry["tables"].push_back(TableJson(table));
    json["models"].push_back(std::move(entry));
  }
  // The path of the configuration need not be UTF-8.
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace hps
