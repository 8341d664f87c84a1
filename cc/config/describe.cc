// What the table of fields says, for editors (JSON schema) and for readers (the reference page).

#include <cmath>

#include "cc/config/fields.h"

namespace hps {
namespace {

using Kind = ValueType::Kind;

JsonValue Text(std::string_view text) { return {std::string(text)}; }

JsonValue NumberOf(double value) {
  return std::trunc(value) == value ? JsonValue{uint64_t(value)} : JsonValue{value};  // limits are never negative
}

JsonValue SectionSchema(const SectionInfo& section);

// One value, or one element of a list.
JsonObject ScalarSchema(const FieldInfo& field) {
  JsonObject schema;
  switch (field.type.kind) {
    case Kind::kBool: schema.emplace_back("type", Text("boolean")); break;
    case Kind::kInteger: schema.emplace_back("type", Text("integer")); break;
    case Kind::kNumber: schema.emplace_back("type", Text("number")); break;
    case Kind::kString: schema.emplace_back("type", Text("string")); break;
    case Kind::kSection: return std::get<JsonObject>(SectionSchema(*field.section).data);
    case Kind::kEnum: {
      JsonArray names;
      for (const EnumName& name : field.type.enum_names) names.push_back(Text(name.name));
      schema.emplace_back("enum", JsonValue{std::move(names)});
      break;
    }
  }
  const Limits& limits = field.limits;
  if (std::isfinite(limits.minimum)) {
    schema.emplace_back(limits.above_minimum ? "exclusiveMinimum" : "minimum", NumberOf(limits.minimum));
  }
  if (std::isfinite(limits.maximum)) {
    schema.emplace_back(limits.below_maximum ? "exclusiveMaximum" : "maximum", NumberOf(limits.maximum));
  }
  if (limits.format == StringFormat::kName) schema.emplace_back("pattern", Text("^[a-zA-Z0-9_\\-]{1,120}$"));
  if (limits.format == StringFormat::kRegularExpression) schema.emplace_back("format", Text("regex"));
  if (limits.format != StringFormat::kAny) schema.emplace_back("minLength", JsonValue{uint64_t{1}});
  return schema;
}

JsonValue FieldSchema(const FieldInfo& field) {
  JsonObject schema;
  if (field.type.list) {
    schema.emplace_back("type", Text("array"));
    schema.emplace_back("items", JsonValue{ScalarSchema(field)});
    if (field.required) schema.emplace_back("minItems", JsonValue{uint64_t{1}});
  } else {
    schema = ScalarSchema(field);
  }
  if (field.type.kind != Kind::kSection || field.type.list) {
    schema.emplace_back("description", Text(field.description));
  }
  if (!field.default_value.is_null()) schema.emplace_back("default", field.default_value);
  if (field.state == FieldState::kOldSpelling || field.state == FieldState::kNoEffect) {
    schema.emplace_back("deprecated", JsonValue{true});
  }
  return {std::move(schema)};
}

JsonValue SectionSchema(const SectionInfo& section) {
  JsonObject properties;
  JsonArray required;
  for (const FieldInfo* field : section.fields) {
    properties.emplace_back(field->name, FieldSchema(*field));
    if (field->required) required.push_back(Text(field->name));
  }
  JsonObject schema = {{"type", Text("object")},
                       {"description", Text(section.description)},
                       {"properties", JsonValue{std::move(properties)}},
                       {"additionalProperties", JsonValue{false}}};
  if (!required.empty()) schema.emplace_back("required", JsonValue{std::move(required)});
  return {std::move(schema)};
}

std::string TypeText(const FieldInfo& field) {
  std::string text;
  switch (field.type.kind) {
    case Kind::kBool: text = "boolean"; break;
    case Kind::kInteger: text = "integer"; break;
    case Kind::kNumber: text = "number"; break;
    case Kind::kString: text = "string"; break;
    case Kind::kSection: text = "object"; break;
    case Kind::kEnum:
      for (const EnumName& name : field.type.enum_names) {
        if (!name.alias) text += (text.empty() ? "`\"" : ", `\"") + std::string(name.name) + "\"`";
      }
      break;
  }
  if (field.type.list) text = "list of " + text;
  if (std::string limits = LimitsText(field.limits); !limits.empty()) text += ", " + limits;
  return text;
}

std::string DefaultText(const FieldInfo& field) {
  if (field.required) return "**required**";
  if (!field.default_text.empty()) return std::string(field.default_text);
  return "`" + DumpJson(field.default_value, false) + "`";
}

std::string StateText(const FieldInfo& field) {
  switch (field.state) {
    case FieldState::kEffective: return "effective";
    case FieldState::kLater: return "checked; feature not built yet";
    case FieldState::kOldSpelling: return "old spelling";
    case FieldState::kNoEffect: return "checked; no effect";
  }
  return "";
}

}  // namespace

std::string ConfigJsonSchema() {
  JsonValue schema = SectionSchema(ServerSection().info);
  auto& members = std::get<JsonObject>(schema.data);
  members.insert(members.begin(), {{"$schema", Text("https://json-schema.org/draft/2020-12/schema")},
                                   {"title", Text("Configuration of a Hierarchical Parameter Server (ps.json)")}});
  return DumpJson(schema, true) + "\n";
}

std::string ConfigReferenceMarkdown() {
  std::string page =
      "# Configuration: every key of ps.json\n"
      "\n"
      "This page is generated from the table of fields in `cc/config/fields.cc`, which also drives the parser; "
      "`config_test` says how.\n"
      "[compatibility.md](compatibility.md) lists where this differs from the predecessor.\n"
      "\n"
      "A key that is not listed here is an error that names the nearest one. Comments and repeated keys are errors; "
      "a byte-order mark is accepted.\n"
      "Integers may be written as `64` or `64.0`. The state of a key is one of\n"
      "\n"
      "- *effective*: it does what its line says;\n"
      "- *checked; feature not built yet*: it is read and checked; a configuration that could not work without it is "
      "refused with \"not built yet\";\n"
      "- *old spelling*: it stands for other keys; if both forms are given they must agree;\n"
      "- *checked; no effect*: the predecessor knows it and it changes no lookup; one line at start says so.\n";
  for (const SectionInfo* section : AllSections()) {
    page += "\n## " + (section->pointer.empty() ? "Top level" : "`" + std::string(section->pointer) + "`") + ": " +
            std::string(section->description) +
            "\n\n| key | type | default | meaning | state |\n|---|---|---|---|---|\n";
    for (const FieldInfo* field : section->fields) {
      page += "| `" + std::string(field->name) + "` | " + TypeText(*field) + " | " + DefaultText(*field) + " | " +
              std::string(field->description) + " | " + StateText(*field) + " |\n";
    }
    std::string aliases;
    for (const FieldInfo* field : section->fields) {
      for (const EnumName& name : field->type.enum_names) {
        if (!name.alias) continue;
        aliases += "\n- `" + std::string(field->name) + "`: `\"" + std::string(name.name) + "\"` means `\"" +
                   std::string(EnumText(field->type.enum_names, name.value)) + "\"`";
      }
    }
    if (!aliases.empty()) page += "\nOther spellings that are accepted:\n" + aliases + "\n";
  }
  return page;
}

}  // namespace hps
