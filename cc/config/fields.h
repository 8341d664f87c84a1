// The table of fields: every key of ps.json with its type, default, limits, meaning and state. It drives the parser,
// the suggestions for misspelt keys, the canonical text, the JSON schema and the reference page, so that they cannot
// differ.
//
// A section is one JSON object: the document, an element of "models", "volatile_db", "persistent_db", "update_source".
// Defaults are those of the structs in hps/config.h. Thread safety: the tables are built once and never change.

#ifndef HPS_CONFIG_FIELDS_H_
#define HPS_CONFIG_FIELDS_H_

#include <algorithm>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "cc/config/json_value.h"
#include "cc/config/values.h"
#include "hps/config.h"

namespace hps {

enum class FieldState {
  kEffective,
  kLater,        // parsed and checked; the feature that it tunes is not built yet
  kOldSpelling,  // of other fields
  kNoEffect,     // known to the predecessor, changes nothing here
};

struct SectionInfo;

struct FieldInfo {
  std::string_view name;
  ValueType type;
  Limits limits;
  FieldState state = FieldState::kEffective;
  bool required = false;
  bool per_table = false;                // a list with one element for each table of the model
  std::string_view description;          // one line
  JsonValue default_value;               // null: none
  std::string_view default_text;         // in place of default_value, where that depends on the host or on other keys
  const SectionInfo* section = nullptr;  // what an object, or each element of a list of objects, consists of
};

struct SectionInfo {
  std::string_view pointer;  // "/models/*"
  std::string_view description;
  std::vector<const FieldInfo*> fields;
};

// Gathered while reading: what the host should say once.
struct Notes {
  std::vector<std::string> no_effect_keys;  // unique
  std::vector<std::string> warnings;
};

template <typename S>
struct Field : FieldInfo {
  std::function<Status(const JsonValue&, const Place&, Notes*, S*)> read;
  std::function<JsonValue(const S&)> write;  // null: left out. Empty for what is not part of the canonical text
};

template <typename S>
struct Section {
  SectionInfo info;
  std::vector<Field<S>> fields;
  // What concerns several fields at once; called after all fields were read.
  std::function<Status(const JsonValue&, const Place&, Notes*, S*)> finish;
};

const Section<ServerConfig>& ServerSection();
const Section<ModelConfig>& ModelSection();
const Section<VolatileConfig>& VolatileSection();
const Section<PersistentConfig>& PersistentSection();
const Section<UpdateSourceConfig>& UpdateSourceSection();
// All five, the document first.
std::vector<const SectionInfo*> AllSections();

// The `finish` functions (checks.cc).
Status FinishServer(const JsonValue& json, const Place& place, Notes* notes, ServerConfig* config);
Status FinishModel(const JsonValue& json, const Place& place, Notes* notes, ModelConfig* model);
Status FinishVolatile(const JsonValue& json, const Place& place, Notes* notes, VolatileConfig* config);
Status FinishPersistent(const JsonValue& json, const Place& place, Notes* notes, PersistentConfig* config);
Status FinishUpdateSource(const JsonValue& json, const Place& place, Notes* notes, UpdateSourceConfig* config);

// An error naming the nearest key of the section, or the section that the key belongs to.
Status UnknownKey(const Place& place, std::string_view key, const SectionInfo& section);

template <typename S>
Status ReadSection(const Section<S>& section, const JsonValue& json, const Place& place, Notes* notes, S* out) {
  const auto* members = json.get_if<JsonObject>();
  if (members == nullptr) return place.Error("must be an object in braces, {...}");
  for (const auto& [key, value] : *members) {
    bool known = std::any_of(section.fields.begin(), section.fields.end(),
                             [&key = key](const Field<S>& field) { return field.name == key; });
    if (!known) return UnknownKey(place, key, section.info);
  }
  for (const Field<S>& field : section.fields) {
    const JsonValue* value = json.Find(field.name);
    if (value == nullptr) {
      if (!field.required) continue;
      return place.Error("the required key \"" + std::string(field.name) +
                         "\" is missing: " + std::string(field.description));
    }
    HPS_RETURN_IF_ERROR(field.read(*value, place.Child(field.name), notes, out));
    if (field.state == FieldState::kNoEffect && std::find(notes->no_effect_keys.begin(), notes->no_effect_keys.end(),
                                                          field.name) == notes->no_effect_keys.end()) {
      notes->no_effect_keys.emplace_back(field.name);
    }
  }
  return section.finish(json, place, notes, out);
}

// The canonical object: sorted by key.
template <typename S>
JsonValue WriteSection(const Section<S>& section, const S& config) {
  JsonObject members;
  for (const Field<S>& field : section.fields) {
    if (!field.write) continue;
    JsonValue value = field.write(config);
    if (!value.is_null()) members.emplace_back(field.name, std::move(value));
  }
  std::sort(members.begin(), members.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return {std::move(members)};
}

}  // namespace hps

#endif  // HPS_CONFIG_FIELDS_H_
