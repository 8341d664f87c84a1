// What concerns several keys at once: defaults that depend on others, old and new spellings, names that must be unique;
// and what this build cannot do.

#include <algorithm>
#include <filesystem>
#include <set>
#include <thread>

#include "cc/config/fields.h"

namespace hps {
namespace {

size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

// The one number of "max_batch_size" must not contradict the two that it stands for.
template <typename S>
Status CheckBatchSizes(const JsonValue& json, const Place& place, const S& config) {
  const JsonValue* both = json.Find("max_batch_size");
  if (both == nullptr) return OkStatus();
  uint32_t value = 0;
  HPS_RETURN_IF_ERROR(ReadValue(*both, place.Child("max_batch_size"), {}, &value));
  if (config.max_get_batch_size == value && config.max_set_batch_size == value) return OkStatus();
  return place.Child("max_batch_size")
      .Error("stands for max_get_batch_size and max_set_batch_size, which are given with another value; keep one form");
}

// Caches that hold whole tables have nothing to evict, to fetch or to fill later.
void WarnOfIdleKeys(const Place& place, const ModelConfig& model, Notes* notes) {
  if (model.cache_type == CacheType::kDynamic) {
    if (model.refresh_interval_seconds > 0 && model.cache_refresh_percentage_per_iteration == 0) {
      notes->warnings.push_back(place.origin + ": " + place.pointer +
                                "/refresh_interval: has no effect while cache_refresh_percentage_per_iteration is 0");
    }
    return;
  }
  for (const auto& [key, is_set] : {std::pair("init_ec", !model.init_ec),
                                    {"hit_rate_threshold", model.hit_rate_threshold && *model.hit_rate_threshold < 1},
                                    {"refresh_delay", model.refresh_delay_seconds > 0},
                                    {"refresh_interval", model.refresh_interval_seconds > 0}}) {
    if (!is_set) continue;
    notes->warnings.push_back(place.origin + ": " + place.pointer + "/" + key +
                              ": has no effect: a cache of this embedding_cache_type holds the whole table, from the "
                              "start, and updates reach it as they reach the tiers");
  }
}

}  // namespace

Status UnknownKey(const Place& place, std::string_view key, const SectionInfo& section) {
  Place here = place.Child(key);
  const std::string_view start = key.substr(0, 80);
  // A beginning of three letters and more says more than a name with few other letters.
  const auto distance = [&](const FieldInfo* field) -> size_t {
    const std::string_view name = field->name;
    return start.size() >= 3 && name.starts_with(start) ? 0 : EditDistance(start, name);
  };
  const FieldInfo* nearest =
      *std::min_element(section.fields.begin(), section.fields.end(),
                        [&](const FieldInfo* a, const FieldInfo* b) { return distance(a) < distance(b); });
  for (const SectionInfo* other : AllSections()) {
    for (const FieldInfo* field : other->fields) {
      if (field->name != key) continue;
      return here.Error("unknown key here; it belongs " +
                        (other->pointer.empty() ? "to the top level" : "in " + std::string(other->pointer)) +
                        " (the nearest key here is \"" + std::string(nearest->name) + "\")");
    }
  }
  return here.Error("unknown key; did you mean \"" + std::string(nearest->name) + "\"?");
}

Status FinishModel(const JsonValue& json, const Place& place, Notes* notes, ModelConfig* model) {
  if (IsSharedTableName(model->name)) {
    return place.Child("model").Error("\"" + model->name +
                                      "\" is a name of the kind that tables have which models share "
                                      "(\"share_tables\"); give the model another one");
  }
  std::set<std::string_view> names;
  for (size_t i = 0; i < model->tables.size(); ++i) {
    if (!names.insert(model->tables[i].name).second) {
      return place.Child("embedding_table_names")
          .Child(i)
          .Error("the name \"" + model->tables[i].name + "\" is taken by another table of this model");
    }
  }
  if (json.Find("deployed_device_list") == nullptr) model->deployed_devices = {0};
  std::set<int32_t> devices;
  for (size_t i = 0; i < model->deployed_devices.size(); ++i) {
    if (!devices.insert(model->deployed_devices[i]).second) {
      return place.Child("deployed_device_list").Child(i).Error("the device is in the list already");
    }
  }
  if (model->gpucache && model->gpucacheper == 0) {
    return place.Child("gpucacheper").Error("must be > 0 while gpucache is true; set gpucache to false instead");
  }
  const JsonValue* is_static = json.Find("use_static_table");
  if (is_static != nullptr && *is_static->get_if<bool>() != (model->cache_type == CacheType::kStatic)) {
    return place.Child("use_static_table")
        .Error(*is_static->get_if<bool>()
                   ? "means the embedding_cache_type \"static\", but another one is given; keep one form"
                   : "is false, but the embedding_cache_type is \"static\"; keep one form");
  }
  if (!model->gpucache) return OkStatus();
  if (model->enable_pagelock && model->cache_type != CacheType::kStatic) {
    return place.Child("enable_pagelock")
        .Error(
            "puts the rows of static caches into pinned host memory; set \"embedding_cache_type\": \"static\", or "
            "leave it out");
  }
  if (model->fp8_quant && model->cache_type == CacheType::kDynamic) {
    return place.Child("fp8_quant")
        .Error(
            "is for caches that hold whole tables; set \"embedding_cache_type\" to \"static\" or \"uvm\", or leave it "
            "out");
  }
  WarnOfIdleKeys(place, *model, notes);
  return OkStatus();
}

Status FinishVolatile(const JsonValue& json, const Place& place, Notes*, VolatileConfig* config) {
  const int secrets = !config->password.empty() + !config->password_env.empty() + !config->password_file.empty();
  if (secrets > 1) return place.Error("has more than one of password, password_env and password_file; keep one");
  return CheckBatchSizes(json, place, *config);
}

Status FinishPersistent(const JsonValue& json, const Place& place, Notes*, PersistentConfig* config) {
  if (json.Find("type") == nullptr) config->type = PersistentType::kRocksDb;
  if (config->when_unavailable == WhenUnavailable::kNextTier) {
    return place.Child("when_unavailable").Error("is \"next_tier\", but no tier follows; use \"fail\" or \"default\"");
  }
  return CheckBatchSizes(json, place, *config);
}

Status FinishUpdateSource(const JsonValue& json, const Place&, Notes*, UpdateSourceConfig* config) {
  if (json.Find("type") == nullptr) config->type = UpdateSourceType::kKafka;
  return OkStatus();
}

Status FinishServer(const JsonValue& json, const Place& place, Notes*, ServerConfig* config) {
  std::set<std::string_view> names;
  for (size_t i = 0; i < config->models.size(); ++i) {
    if (!names.insert(config->models[i].name).second) {
      return place.Child("models").Child(i).Child("model").Error("the name \"" + config->models[i].name +
                                                                 "\" is taken by another model");
    }
  }
  VolatileConfig& memory = config->volatile_db;
  if (memory.num_partitions == 0) {
    uint32_t cores = std::max(1u, std::thread::hardware_concurrency());
    switch (memory.type) {
      case VolatileType::kRedisCluster: memory.num_partitions = 8; break;
      // Shared by processes that may run on unlike numbers of cores.
      case VolatileType::kMultiProcessHashMap: memory.num_partitions = 16; break;
      default: memory.num_partitions = std::min(16u, cores);
    }
  }
  bool persistent = config->persistent_db.type != PersistentType::kDisabled;
  if (memory.type != VolatileType::kDisabled && memory.initial_cache_rate < 1 && !persistent) {
    return place.Child("volatile_db")
        .Child("initial_cache_rate")
        .Error(
            "is below 1 without a persistent_db: no tier could serve the rows that are left out; set it to 1 or "
            "add a persistent_db");
  }
  if (!persistent && memory.when_unavailable == WhenUnavailable::kNextTier) {
    const JsonValue* section = json.Find("volatile_db");
    if (section != nullptr && section->Find("when_unavailable") != nullptr) {
      return place.Child("volatile_db")
          .Child("when_unavailable")
          .Error("is \"next_tier\", but there is no persistent_db; use \"fail\" or \"default\", or add one");
    }
    memory.when_unavailable = WhenUnavailable::kFail;
  }
  if (config->persistent_db.path.empty()) {
    std::error_code error;
    std::filesystem::path folder = std::filesystem::temp_directory_path(error);
    config->persistent_db.path = ((error ? std::filesystem::path("/tmp") : folder) / "rocksdb").string();
  }
  return OkStatus();
}

Status CheckBuilt(const ServerConfig& config) {
  auto not_built = [&](std::string_view pointer, std::string_view text) {
    return Unimplemented(config.origin + ": " + std::string(pointer) + ": not built yet: " + std::string(text));
  };
  const VolatileConfig& memory = config.volatile_db;
  switch (memory.type) {
    case VolatileType::kRedisCluster:
    case VolatileType::kMultiProcessHashMap:
    case VolatileType::kHashMap: break;
    case VolatileType::kDisabled:
      if (config.persistent_db.type == PersistentType::kDisabled) {
        return not_built("/volatile_db/type",
                         "a server without any database; leave volatile_db out to keep the tables in memory");
      }
      break;
  }
  if (config.update_source.type == UpdateSourceType::kKafka) {
    return not_built("/update_source/type", "kafka_message_queue; leave update_source out");
  }
  for (size_t i = 0; i < config.models.size(); ++i) {
    for (size_t j = 0; j < config.models[i].tables.size(); ++j) {
      const std::string& path = config.models[i].tables[j].path;
      if (path.find("://") == std::string::npos) continue;
      return not_built("/models/" + std::to_string(i) + "/sparse_files/" + std::to_string(j),
                       "tables in a remote file system (\"" + path + "\"); copy the folder to a local disk");
    }
  }
  return OkStatus();
}

}  // namespace hps
