#include "cc/core/server_stats.h"

#include <nlohmann/json.hpp>

namespace hps {
namespace {

using Json = nlohmann::ordered_json;

Json LatencyJson(const Histogram& histogram) {
  return {{"count", histogram.count()},
          {"mean_us", histogram.count() ? static_cast<double>(histogram.sum_nanoseconds()) * 1e-3 /
                                              static_cast<double>(histogram.count())
                                        : 0.0},
          {"p50_us", histogram.Quantile(0.5) * 1e-3},
          {"p99_us", histogram.Quantile(0.99) * 1e-3}};
}

// Of a shared table the sizes are told once, under "shared_tables".
Json TierSizesJson(const Tier& tier) {
  // A store that does not answer would keep whoever asks for statistics waiting.
  if (tier.breaker != nullptr && !tier.breaker->closed()) {
    return {{"error", "the " + tier.breaker->name() + " does not answer"}};
  }
  const auto stats = tier.table->Stats();
  if (!stats.ok()) return {{"error", stats.status().ToString()}};
  return {{"rows", stats->rows},
          {"rows_estimated", stats->rows_estimated},
          {"memory_bytes", stats->memory_bytes},
          {"disk_bytes", stats->disk_bytes},
          {"evicted_rows", stats->evicted_rows}};
}

Json TierJson(const Tier& tier, bool shared) {
  Json json = shared ? Json::object() : TierSizesJson(tier);
  json["rows_skipped"] = tier.rows_skipped->value();
  json["fetches_failed"] = tier.fetches_failed->value();
  json["fetch_latency"] = LatencyJson(*tier.fetch_seconds);
  return json;
}

Json StateJson(const TableStore& store, const CircuitBreaker* breaker) {
  Json json = {{"store", std::string(store.kind())}};
  if (breaker == nullptr) return json;
  constexpr const char* kNames[] = {"closed", "open", "half_open"};
  json["breaker"] = kNames[static_cast<int>(breaker->state())];
  json["openings"] = breaker->openings();
  return json;
}

Json HitRate(const CacheStats& stats) {
  if (stats.keys_asked == 0) return nullptr;
  return static_cast<double>(stats.rows_served) / static_cast<double>(stats.keys_asked);
}

Json DevicesJson(const Model& model) {
  Json devices = Json::array();
  for (const ModelDevice& device : model.caches->devices()) {
    const WorkspacePool::Stats pool = device.resources.workspaces->stats();
    Json entry = {{"device", device.plan.device},
                  {"planned_bytes", device.plan.device_bytes},
                  {"workspaces", {{"made", pool.workspaces}, {"lent", pool.lent}, {"waits", pool.waits}}},
                  {"caches", Json::array()}};
    for (size_t i = 0; i < device.caches.size(); ++i) {
      if (const auto& shared = model.tables[i].shared) {
        entry["caches"].push_back({{"table", model.tables[i].name}, {"shared", shared->slot.name()}});
        continue;
      }
      const CacheStats stats = device.caches[i]->stats();
      entry["caches"].push_back({{"table", model.tables[i].name},
                                 {"capacity_rows", device.caches[i]->spec().capacity_rows},
                                 {"memory_bytes", stats.device_bytes},
                                 {"pinned_bytes", stats.pinned_bytes},
                                 {"keys_asked", stats.keys_asked},
                                 {"hit_rate", HitRate(stats)},
                                 {"rows_served", stats.rows_served},
                                 {"rows_missed", stats.rows_missed},
                                 {"rows_deferred", stats.rows_deferred},
                                 {"rows_defaulted", stats.rows_defaulted},
                                 {"rows_repeated", stats.rows_repeated},
                                 {"rows_inserted", stats.rows_inserted},
                                 {"rows_evicted", stats.rows_evicted},
                                 {"rows_updated", stats.rows_updated},
                                 {"rows_refreshed", stats.rows_refreshed},
                                 {"rows_erased", stats.rows_erased},
                                 {"rows_outdated", stats.rows_outdated},
                                 {"rows_exchanged", stats.rows_exchanged}});
    }
    devices.push_back(std::move(entry));
  }
  return devices;
}

// What the models share on each device.
Json SharedDevicesJson(const ServerDevices& devices) {
  Json json = Json::array();
  for (const auto& [number, device] : devices.opened()) {
    Json entry = {{"device", number}, {"name", std::string(device.context->device().info().name)}};
    if (const Status alive = device.context->CheckAlive(); !alive.ok()) entry["error"] = alive.ToString();
    if (device.inserts) {
      const InsertQueue::Stats stats = device.inserts->stats();
      entry["inserts"] = {{"inserted", stats.inserted}, {"absent", stats.absent}, {"dropped", stats.dropped},
                          {"repeated", stats.repeated}, {"failed", stats.failed}, {"queued", stats.queued}};
      if (const Status error = device.inserts->last_error(); !error.ok()) {
        entry["inserts"]["last_error"] = error.ToString();
      }
    }
    json.push_back(std::move(entry));
  }
  return json;
}

Json RefresherJson(const CacheRefresher& refresher) {
  const CacheRefresher::Stats stats = refresher.stats();
  Json json = {{"refreshes", stats.refreshes},
               {"failures", stats.failures},
               {"rows_refreshed", stats.total.rows_refreshed},
               {"rows_erased", stats.total.rows_erased},
               {"rows_kept", stats.total.rows_kept}};
  if (const Status error = refresher.last_error(); !error.ok()) json["last_error"] = error.ToString();
  return json;
}

Json TableJson(const ModelTable& table) {
  const TierMetrics& metrics = table.stack.metrics;
  Json json = {{"name", table.name},
               {"width", table.stack.default_row.size()},
               {"lookups", metrics.lookups->value()},
               {"keys", metrics.keys->value()},
               {"rows_served",
                {{"volatile", table.stack.volatile_tier.rows_served->value()},
                 {"persistent", table.stack.persistent_tier.rows_served->value()},
                 {"default", metrics.rows_from_default->value()}}},
               {"rows_unavailable", metrics.rows_unavailable->value()},
               {"load",
                {{"source", table.source},
                 {"rows_read", table.load.rows_read},
                 {"non_finite_rows", table.load.non_finite_rows},
                 {"bytes_read", table.load.bytes_read},
                 {"seconds", table.load.seconds},
                 {"rows_per_second", table.load.rows_per_second()}}}};
  if (table.shared) json["shared"] = table.shared->slot.name();
  if (table.load.duplicate_keys) json["load"]["duplicate_keys"] = *table.load.duplicate_keys;
  const PromotionCounters& promotions = table.stack.promotions;
  for (const auto& [name, tier] :
       {std::pair("volatile", &table.stack.volatile_tier), std::pair("persistent", &table.stack.persistent_tier)}) {
    if (tier->table) json[name] = TierJson(*tier, table.shared != nullptr);
  }
  if (table.stack.volatile_tier.table && promotions.promoted != nullptr) {
    json["volatile"]["rows_promoted"] = promotions.promoted->value();
    json["volatile"]["rows_promotion_dropped"] = promotions.dropped->value();
    json["volatile"]["rows_promotion_repeated"] = promotions.repeated->value();
  }
  return json;
}

}  // namespace

std::string ServerStatsJson(const ServerConfig& config, const ServerResources& resources,
                            const std::vector<std::shared_ptr<ModelSlot>>& slots,
                            const std::vector<SharedTables::Held>& shared_tables) {
  if (Status forked = CheckNotForked(resources.fork_generation); !forked.ok()) {
    return Json{{"error", forked.ToString()}}.dump();
  }
  Json json;
  json["config"] = config.origin;
  json["config_hash"] = ConfigHash(config);
  json["tiers"] = Json::object();
  if (resources.volatile_store) json["tiers"]["volatile"] = std::string(resources.volatile_store->kind());
  if (resources.persistent_store) json["tiers"]["persistent"] = std::string(resources.persistent_store->kind());
  json["tier_states"] = Json::object();
  if (resources.volatile_store) {
    json["tier_states"]["volatile"] = StateJson(*resources.volatile_store, resources.volatile_breaker.get());
  }
  if (resources.persistent_store) {
    json["tier_states"]["persistent"] = StateJson(*resources.persistent_store, resources.persistent_breaker.get());
  }
  json["gpus"] = resources.devices ? resources.devices->count() : 0;
  json["rows_promoted"] = resources.metrics.SumOfCounters("hps_rows_promoted_total");
  json["rows_promotion_dropped"] = resources.metrics.SumOfCounters("hps_rows_promotion_dropped_total");
  if (resources.devices) {
    if (Json devices = SharedDevicesJson(*resources.devices); !devices.empty()) json["devices"] = std::move(devices);
    if (const CacheRefresher* refresher = resources.devices->refresher()) json["refresher"] = RefresherJson(*refresher);
  }
  json["models"] = Json::array();
  for (const auto& slot : slots) {
    auto model = slot->Current();
    if (!model.ok()) continue;  // unloaded meanwhile
    Json entry = {{"name", slot->name()},
                  {"version", (*model)->version},
                  {"lookup_latency", LatencyJson(slot->lookup_seconds())},
                  {"tables", Json::array()}};
    for (const ModelTable& table : (*model)->tables) entry["tables"].push_back(TableJson(table));
    if ((*model)->caches) entry["devices"] = DevicesJson(**model);
    json["models"].push_back(std::move(entry));
  }
  for (const auto& [shared, models] : shared_tables) {
    auto model = shared->slot.Current();
    if (!model.ok()) continue;
    Json entry = {{"name", shared->slot.name()},
                  {"folder", shared->folder},
                  {"models", models},
                  {"table", TableJson((*model)->tables.front())}};
    if ((*model)->caches) entry["devices"] = DevicesJson(**model);
    json["shared_tables"].push_back(std::move(entry));
  }
  // The path of the configuration need not be UTF-8.
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace hps
