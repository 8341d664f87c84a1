#include "cc/config/sharing.h"

#include <cstdio>
#include <map>
#include <utility>

namespace hps {
namespace {

std::string Text(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

}  // namespace

ModelConfig SharedTableModel(const ModelConfig& model, const TableConfig& table, std::vector<int32_t> devices) {
  ModelConfig shared = model;
  shared.share_tables = false;
  shared.tables = {table};
  shared.tables[0].path = CanonicalFolder(table.path);
  shared.tables[0].name = kSharedRows;
  shared.name = SharedTableName(table.path);
  shared.deployed_devices = std::move(devices);
  return shared;
}

std::optional<SharingDifference> FirstDifference(const ModelConfig& there, const ModelConfig& here, bool caches) {
  const auto differ = [](const char* key, const auto& a, const auto& b) -> std::optional<SharingDifference> {
    if (a == b) return std::nullopt;
    return SharingDifference{key, Text(static_cast<double>(a)), Text(static_cast<double>(b))};
  };
  constexpr const char* kTypes[] = {"dynamic", "static", "uvm"};
  const TableConfig &table_there = there.tables[0], &table_here = here.tables[0];
  if (auto found = differ("embedding_vecsize_per_table", table_there.width, table_here.width)) return found;
  if (auto found = differ("default_value_for_each_table", table_there.default_value, table_here.default_value)) {
    return found;
  }
  if (!caches) return std::nullopt;
  if (there.cache_type != here.cache_type) {
    return SharingDifference{"embedding_cache_type", kTypes[static_cast<int>(there.cache_type)],
                             kTypes[static_cast<int>(here.cache_type)]};
  }
  for (const auto& [key, member] : {std::pair("init_ec", &ModelConfig::init_ec),
                                    {"enable_pagelock", &ModelConfig::enable_pagelock},
                                    {"fp8_quant", &ModelConfig::fp8_quant}}) {
    if (there.*member != here.*member) {
      return SharingDifference{key, there.*member ? "true" : "false", here.*member ? "true" : "false"};
    }
  }
  for (const auto& [key, member] :
       {std::pair("gpucacheper", &ModelConfig::gpucacheper),
        {"cache_refresh_percentage_per_iteration", &ModelConfig::cache_refresh_percentage_per_iteration},
        {"refresh_delay", &ModelConfig::refresh_delay_seconds},
        {"refresh_interval", &ModelConfig::refresh_interval_seconds}}) {
    if (auto found = differ(key, there.*member, here.*member)) return found;
  }
  return std::nullopt;
}

Status RefuseSharing(const SharingDifference& difference, const std::string& folder, const std::string& there,
                     const std::string& here) {
  const bool same = there == here;
  return InvalidArgument("model '" + here + "' shares the table folder " + folder + " with " +
                         (same ? "itself (it is loaded, or has the folder for two tables)" : "model '" + there + "'") +
                         " (\"share_tables\": true), but " + difference.key + " is " + difference.there +
                         " there and " + difference.here + " here; give both the same, or leave share_tables out" +
                         (same ? "" : " of one") +
                         ". To change it for rows that are loaded, unload their models first");
}

Status CheckSharing(std::span<const ModelConfig> models) {
  struct First {
    ModelConfig shared;
    std::string model;
  };
  std::map<std::string, First> firsts;  // of each folder; where some have caches, the first that has
  for (const ModelConfig& model : models) {
    if (!model.share_tables) continue;
    for (const TableConfig& table : model.tables) {
      ModelConfig shared = SharedTableModel(model, table, model.gpucache ? model.deployed_devices : std::vector<int>());
      const auto [found, added] = firsts.try_emplace(shared.name, First{shared, model.name});
      if (added) continue;
      First& first = found->second;
      const bool cached = !first.shared.deployed_devices.empty();
      const bool caches = cached && !shared.deployed_devices.empty();
      if (const auto difference = FirstDifference(first.shared, shared, caches)) {
        return RefuseSharing(*difference, shared.tables[0].path, first.model, model.name);
      }
      if (!cached && !shared.deployed_devices.empty()) first = {std::move(shared), model.name};
    }
  }
  return OkStatus();
}

}  // namespace hps
