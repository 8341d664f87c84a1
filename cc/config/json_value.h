// JsonValue: a parsed JSON document as plain data, and the two functions that read and write its text.
//
// The JSON library is used in json_value.cc alone; everything else of the configuration works on this type.
// Thread safety: plain values.

#ifndef HPS_CONFIG_JSON_VALUE_H_
#define HPS_CONFIG_JSON_VALUE_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "hps/status.h"

namespace hps {

struct JsonValue;
using JsonArray = std::vector<JsonValue>;
using JsonObject = std::vector<std::pair<std::string, JsonValue>>;  // in the order of the text, keys unique

struct JsonValue {
  // An integer is int64_t if it is negative, else uint64_t; one that fits in neither is a double.
  std::variant<std::nullptr_t, bool, int64_t, uint64_t, double, std::string, JsonArray, JsonObject> data = nullptr;

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(data); }
  template <typename T>
  const T* get_if() const {
    return std::get_if<T>(&data);
  }
  // The member of an object; nullptr if there is none or this is no object.
  const JsonValue* Find(std::string_view key) const;
};

// kInvalidArgument with line and column if `text` is not one JSON document in UTF-8, has comments, repeats a key within
// one object, or nests deeper than 32 levels. A byte-order mark is accepted. Values are never quoted in errors: they
// may be secrets.
Result<JsonValue> ParseJson(std::string_view text, std::string_view origin);

// One line, or indented by two blanks a level. Bytes that are not UTF-8 are replaced, so that any text can be shown.
std::string DumpJson(const JsonValue& value, bool indented);

// `key` as part of a JSON pointer: "~" and "/" escaped, cut after 80 bytes (never within a character).
std::string PointerToken(std::string_view key);

}  // namespace hps

#endif  // HPS_CONFIG_JSON_VALUE_H_
