// From text to ServerConfig and back. What a key means is said in fields.cc, what several keys mean together in
// checks.cc.

#include "hps/config.h"

#include <cstdio>

#include "cc/config/fields.h"
#include "cc/config/json_value.h"

namespace hps {

Result<ServerConfig> ParseConfig(std::string_view json, std::string_view origin) {
  HPS_ASSIGN_OR_RETURN(JsonValue document, ParseJson(json, origin));
  ServerConfig config;
  config.origin = origin;
  Notes notes;
  HPS_RETURN_IF_ERROR(ReadSection(ServerSection(), document, Place{config.origin, ""}, &notes, &config));
  config.warnings = std::move(notes.warnings);
  if (!notes.no_effect_keys.empty()) {
    std::string line = config.origin + ": these keys are known and change no lookup here:";
    for (const std::string& key : notes.no_effect_keys) line += " " + key;
    config.information.push_back(std::move(line));
  }
  return config;
}

Result<ModelConfig> ParseModelConfig(std::string_view json, std::string_view origin,
                                     std::vector<std::string>* warnings) {
  HPS_ASSIGN_OR_RETURN(JsonValue document, ParseJson(json, origin));
  ModelConfig model;
  Notes notes;
  HPS_RETURN_IF_ERROR(ReadSection(ModelSection(), document, Place{std::string(origin), ""}, &notes, &model));
  if (warnings != nullptr) *warnings = std::move(notes.warnings);
  return model;
}

std::string CanonicalJson(const ServerConfig& config) {
  return DumpJson(WriteSection(ServerSection(), config), true) + "\n";
}

std::string ConfigHash(const ServerConfig& config) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (unsigned char c : CanonicalJson(config) + '\0' + config.volatile_db.password) {
    hash = (hash ^ c) * 0x100000001b3;
  }
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace hps
