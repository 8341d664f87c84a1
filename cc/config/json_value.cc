// Invariants: the handler's stack holds the arrays and objects that are open, outermost first; an object's pending key
// waits in the frame of that object. The library reports errors through the handler, so that nothing is thrown.

#include "cc/config/json_value.h"

#include <algorithm>
#include <exception>
#include <nlohmann/json.hpp>
#include <unordered_set>

namespace hps {
namespace {

constexpr size_t kMaxDepth = 32;  // ps.json needs four; the limit keeps hostile input off the call stack

// The library's description of a syntax error without its tag, its position and the text it last read.
std::string PlainReason(std::string reason) {
  if (size_t tag = reason.find("] "); reason.starts_with('[') && tag != std::string::npos) reason.erase(0, tag + 2);
  if (size_t position = reason.find(": "); reason.starts_with("parse error at") && position != std::string::npos) {
    reason.erase(0, position + 2);
  }
  if (size_t last_read = reason.find("; last read: '"); last_read != std::string::npos) {
    size_t rest = reason.rfind("'; expected");
    reason.erase(last_read, rest == std::string::npos || rest < last_read ? std::string::npos : rest + 1 - last_read);
  }
  if (reason.starts_with("number overflow")) return "a number beyond the range of a 64-bit float";
  return reason;
}

class TreeBuilder {
 public:
  using json = nlohmann::json;

  TreeBuilder(std::string_view text, std::string_view origin) : text_(text), origin_(origin) {}

  bool null() { return Add({nullptr}); }
  bool boolean(bool value) { return Add({value}); }
  bool number_integer(json::number_integer_t value) { return Add({int64_t{value}}); }
  bool number_unsigned(json::number_unsigned_t value) { return Add({uint64_t{value}}); }
  bool number_float(json::number_float_t value, const json::string_t&) { return Add({double{value}}); }
  bool string(json::string_t& value) { return Add({std::move(value)}); }
  bool binary(json::binary_t&) { return false; }  // not part of JSON text
  bool start_object(size_t) { return Open({JsonObject{}}); }
  bool start_array(size_t) { return Open({JsonArray{}}); }
  bool end_object() { return CloseTop(); }
  bool end_array() { return CloseTop(); }

  bool key(json::string_t& key) {
    Frame& frame = stack_.back();
    if (!frame.keys.insert(key).second) {
      error_ = InvalidArgument(origin_ + ": " + Pointer() + "/" + PointerToken(key) +
                               ": the key occurs twice in this object; remove one of the two");
      return false;
    }
    frame.pending_key = std::move(key);
    return true;
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& error) {
    std::string_view read = text_.substr(0, position);
    size_t line_start = read.rfind('\n');
    size_t column = read.size() - (line_start == std::string_view::npos ? 0 : line_start + 1);
    std::string reason = PlainReason(error.what());
    bool comment = position > 0 && position < text_.size() && text_[position - 1] == '/' &&
                   (text_[position] == '/' || text_[position] == '*');
    if (comment) reason = "comments are not part of JSON; remove this one";
    if (text_.empty()) reason = "the text is empty";
    error_ = InvalidArgument(origin_ + ": not valid JSON at line " +
                             std::to_string(1 + std::count(read.begin(), read.end(), '\n')) + ", column " +
                             std::to_string(column) + ": " + reason);
    return false;
  }

  Result<JsonValue> Finish(bool complete) {
    if (!error_.ok()) return error_;
    if (!complete) return Internal(origin_ + ": the JSON reader stopped without a reason");
    return std::move(root_);
  }

 private:
  struct Frame {
    JsonValue value;
    std::string pending_key;
    std::unordered_set<std::string> keys;
  };

  std::string Pointer() const {
    std::string pointer;
    for (size_t i = 0; i + 1 < stack_.size(); ++i) {
      const JsonArray* array = stack_[i].value.get_if<JsonArray>();
      pointer += "/" + (array ? std::to_string(array->size()) : PointerToken(stack_[i].pending_key));
    }
    return pointer;
  }

  bool Add(JsonValue value) {
    if (stack_.empty()) {
      root_ = std::move(value);
    } else if (auto* array = std::get_if<JsonArray>(&stack_.back().value.data)) {
      array->push_back(std::move(value));
    } else {
      std::get<JsonObject>(stack_.back().value.data)
          .emplace_back(std::move(stack_.back().pending_key), std::move(value));
    }
    return true;
  }

  bool Open(JsonValue empty) {
    if (stack_.size() == kMaxDepth) {
      error_ = InvalidArgument(origin_ + ": " + Pointer() + ": nested deeper than " + std::to_string(kMaxDepth) +
                               " levels; no configuration needs that");
      return false;
    }
    stack_.push_back({std::move(empty), {}, {}});
    return true;
  }

  bool CloseTop() {
    JsonValue value = std::move(stack_.back().value);
    stack_.pop_back();
    return Add(std::move(value));
  }

  std::string_view text_;
  std::string origin_;
  std::vector<Frame> stack_;
  JsonValue root_;
  Status error_;
};

nlohmann::ordered_json ToLibrary(const JsonValue& value) {
  return std::visit(
      [](const auto& data) -> nlohmann::ordered_json {
        using T = std::decay_t<decltype(data)>;
        if constexpr (std::is_same_v<T, JsonArray>) {
          auto array = nlohmann::ordered_json::array();
          for (const JsonValue& element : data) array.push_back(ToLibrary(element));
          return array;
        } else if constexpr (std::is_same_v<T, JsonObject>) {
          auto object = nlohmann::ordered_json::object();
          for (const auto& [key, member] : data) object[key] = ToLibrary(member);
          return object;
        } else {
          return data;
        }
      },
      value.data);
}

}  // namespace

const JsonValue* JsonValue::Find(std::string_view key) const {
  const JsonObject* object = get_if<JsonObject>();
  if (object == nullptr) return nullptr;
  auto member = std::find_if(object->begin(), object->end(), [&](const auto& item) { return item.first == key; });
  return member == object->end() ? nullptr : &member->second;
}

Result<JsonValue> ParseJson(std::string_view text, std::string_view origin) {
  TreeBuilder builder(text, origin);
  try {
    bool complete = nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
    return builder.Finish(complete);
  } catch (const std::exception& error) {
    return Internal(std::string(origin) + ": the JSON reader failed: " + error.what());
  }
}

std::string DumpJson(const JsonValue& value, bool indented) {
  return ToLibrary(value).dump(indented ? 2 : -1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string PointerToken(std::string_view key) {
  size_t length = std::min<size_t>(key.size(), 80);
  while (length < key.size() && length > 0 && (key[length] & 0xC0) == 0x80) --length;
  std::string escaped;
  for (char c : key.substr(0, length)) {
    if (c == '~') {
      escaped += "~0";
    } else if (c == '/') {
      escaped += "~1";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

}  // namespace hps
