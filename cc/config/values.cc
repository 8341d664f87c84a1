#include "cc/config/values.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <regex>

namespace hps {
namespace {

// What stands there, for "got ...": scalars as written (strings cut short), else the type.
std::string Shown(const JsonValue& value, bool secret) {
  if (value.is_null()) return "null";
  if (value.get_if<JsonArray>()) return "a list";
  if (value.get_if<JsonObject>()) return "an object";
  if (secret) return value.get_if<std::string>() ? "a string" : "another type";
  std::string text = DumpJson(value, false);
  if (text.size() > 100) {
    size_t length = 97;
    while (length > 0 && (text[length] & 0xC0) == 0x80) --length;
    text = text.substr(0, length) + "...";
  }
  return value.get_if<std::string>() ? "the string " + text : text;
}

Status Mismatch(const Place& place, const std::string& expected, const JsonValue& value, bool secret = false) {
  return place.Error("must be " + expected + ", got " + Shown(value, secret));
}

std::string NumberText(double value) {
  char buffer[64];
  auto result = std::to_chars(buffer, buffer + sizeof(buffer), value);
  return std::string(buffer, result.ptr);
}

std::string IntegerText(Int128 value) {
  return value < 0 ? std::to_string(static_cast<int64_t>(value)) : std::to_string(static_cast<uint64_t>(value));
}

bool Within(double value, const Limits& limits) {
  bool low = limits.above_minimum ? value > limits.minimum : value >= limits.minimum;
  bool high = limits.below_maximum ? value < limits.maximum : value <= limits.maximum;
  return low && high;
}

std::optional<double> AsNumber(const JsonValue& value) {
  if (const auto* number = value.get_if<int64_t>()) return static_cast<double>(*number);
  if (const auto* number = value.get_if<uint64_t>()) return static_cast<double>(*number);
  if (const auto* number = value.get_if<double>(); number != nullptr && std::isfinite(*number)) return *number;
  return std::nullopt;
}

bool IsName(std::string_view text) {
  auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
  };
  return !text.empty() && text.size() <= 120 && std::all_of(text.begin(), text.end(), allowed);
}

bool IsHost(std::string_view text) {
  size_t colon = text.rfind(':');
  size_t bracket = text.rfind(']');  // of an IPv6 address, whose own colons are no port
  if (colon != std::string_view::npos && (bracket == std::string_view::npos || colon > bracket)) {
    std::string_view port = text.substr(colon + 1);
    unsigned number = 0;
    auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), number);
    if (error != std::errc() || end != port.data() + port.size() || number < 1 || number > 65535) return false;
    text = text.substr(0, colon);
  }
  return !text.empty() && text.find_first_of(" \t\r\n/@") == std::string_view::npos;
}

bool IsHostList(std::string_view text) {
  for (;;) {
    size_t separator = text.find_first_of(",;");
    std::string_view host = text.substr(0, separator);
    size_t first = host.find_first_not_of(' ');
    size_t last = host.find_last_not_of(' ');
    if (first == std::string_view::npos || !IsHost(host.substr(first, last - first + 1))) return false;
    if (separator == std::string_view::npos) return true;
    text.remove_prefix(separator + 1);
  }
}

// nullptr if `text` has the format, else what it should have been.
const char* FormatProblem(StringFormat format, const std::string& text) {
  if (text.find('\0') != std::string::npos) return "a string without NUL characters";
  switch (format) {
    case StringFormat::kAny: return nullptr;
    case StringFormat::kNotEmpty: return text.empty() ? "a string that is not empty" : nullptr;
    case StringFormat::kName: return IsName(text) ? nullptr : "a name of 1 to 120 letters, digits, \"_\" and \"-\"";
    case StringFormat::kHosts:
      if (IsHostList(text)) return nullptr;
      return text.find_first_of("/@") == std::string::npos
                 ? "host[:port], several separated by commas, ports from 1 to 65535"
                 : "host:port, several separated by commas, without a scheme such as redis://, a login or a path "
                   "(logins and TLS have keys of their own)";
    case StringFormat::kRegularExpression:
      // The length limit keeps the recursive compiler of std::regex off the end of the stack.
      if (text.empty() || text.size() > 1000) return "a regular expression of 1 to 1000 bytes";
      try {
        std::regex compiled(text);
      } catch (const std::regex_error&) {
        return "a valid regular expression (ECMAScript)";
      }
      return nullptr;
  }
  return nullptr;
}

constexpr EnumName kVolatileTypes[] = {
    {"disabled", int(VolatileType::kDisabled)},
    {"disable", int(VolatileType::kDisabled), true},
    {"none", int(VolatileType::kDisabled), true},
    {"hash_map", int(VolatileType::kHashMap)},
    {"hashmap", int(VolatileType::kHashMap), true},
    {"hash", int(VolatileType::kHashMap), true},
    {"map", int(VolatileType::kHashMap), true},
    {"parallel_hash_map", int(VolatileType::kHashMap)},
    {"parallel_hashmap", int(VolatileType::kHashMap), true},
    {"parallel_hash", int(VolatileType::kHashMap), true},
    {"parallel_map", int(VolatileType::kHashMap), true},
    {"multi_process_hash_map", int(VolatileType::kMultiProcessHashMap)},
    {"multi_process_hashmap", int(VolatileType::kMultiProcessHashMap), true},
    {"multi_process_hash", int(VolatileType::kMultiProcessHashMap), true},
    {"multi_process_map", int(VolatileType::kMultiProcessHashMap), true},
    {"redis_cluster", int(VolatileType::kRedisCluster)},
    {"redis", int(VolatileType::kRedisCluster), true},
};
constexpr EnumName kPersistentTypes[] = {
    {"disabled", int(PersistentType::kDisabled)},     {"disable", int(PersistentType::kDisabled), true},
    {"none", int(PersistentType::kDisabled), true},   {"rocks_db", int(PersistentType::kRocksDb)},
    {"rocksdb", int(PersistentType::kRocksDb), true}, {"rocks", int(PersistentType::kRocksDb), true},
};
constexpr EnumName kUpdateSourceTypes[] = {
    {"null", int(UpdateSourceType::kNone)},
    {"none", int(UpdateSourceType::kNone), true},
    {"kafka_message_queue", int(UpdateSourceType::kKafka)},
    {"kafka_mq", int(UpdateSourceType::kKafka), true},
    {"kafka", int(UpdateSourceType::kKafka), true},
};
constexpr EnumName kOverflowPolicies[] = {
    {"evict_oldest", int(OverflowPolicy::kEvictOldest)},
    {"evict_random", int(OverflowPolicy::kEvictRandom)},
    {"evict_least_used", int(OverflowPolicy::kEvictLeastUsed)},
};
constexpr EnumName kWhenUnavailable[] = {
    {"fail", int(WhenUnavailable::kFail)},
    {"next_tier", int(WhenUnavailable::kNextTier)},
    {"default", int(WhenUnavailable::kDefault)},
};
constexpr EnumName kCacheTypes[] = {
    {"dynamic", int(CacheType::kDynamic)},
    {"stochastic", int(CacheType::kDynamic), true},  // behaved as dynamic in the predecessor, too
    {"static", int(CacheType::kStatic)},
    {"uvm", int(CacheType::kUvm)},
};
constexpr EnumName kHashMapAlgorithms[] = {
    {"phm", int(HashMapAlgorithm::kPhm)},
    {"stl", int(HashMapAlgorithm::kStl)},
};

}  // namespace

template <>
std::span<const EnumName> EnumNames<VolatileType>() {
  return kVolatileTypes;
}
template <>
std::span<const EnumName> EnumNames<PersistentType>() {
  return kPersistentTypes;
}
template <>
std::span<const EnumName> EnumNames<UpdateSourceType>() {
  return kUpdateSourceTypes;
}
template <>
std::span<const EnumName> EnumNames<OverflowPolicy>() {
  return kOverflowPolicies;
}
template <>
std::span<const EnumName> EnumNames<WhenUnavailable>() {
  return kWhenUnavailable;
}
template <>
std::span<const EnumName> EnumNames<CacheType>() {
  return kCacheTypes;
}
template <>
std::span<const EnumName> EnumNames<HashMapAlgorithm>() {
  return kHashMapAlgorithms;
}

Status Place::Error(std::string_view message) const {
  return InvalidArgument(origin + ": " + (pointer.empty() ? "" : pointer + ": ") + std::string(message));
}

std::string LimitsText(const Limits& limits) {
  std::string text;
  if (std::isfinite(limits.minimum)) text = (limits.above_minimum ? "> " : ">= ") + NumberText(limits.minimum);
  if (std::isfinite(limits.maximum)) {
    text +=
        (text.empty() ? "" : " and ") + std::string(limits.below_maximum ? "< " : "<= ") + NumberText(limits.maximum);
  }
  return text;
}

Status ReadInteger(const JsonValue& value, const Place& place, const Limits& limits, Int128 lowest, Int128 highest,
                   Int128* out) {
  if (std::isfinite(limits.minimum)) lowest = std::max(lowest, static_cast<Int128>(limits.minimum));
  if (std::isfinite(limits.maximum)) highest = std::min(highest, static_cast<Int128>(limits.maximum));
  std::string expected = "an integer from " + IntegerText(lowest) + " to " + IntegerText(highest);
  Int128 number = 0;
  if (const auto* negative = value.get_if<int64_t>()) {
    number = *negative;
  } else if (const auto* positive = value.get_if<uint64_t>()) {
    number = *positive;
  } else if (const auto* decimal = value.get_if<double>();
             decimal != nullptr && std::abs(*decimal) <= 0x1p53 && std::trunc(*decimal) == *decimal) {
    number = static_cast<Int128>(*decimal);
  } else {
    return Mismatch(place, expected, value, limits.secret);
  }
  if (number < lowest || number > highest) return Mismatch(place, expected, value, limits.secret);
  *out = number;
  return OkStatus();
}

Status ReadEnum(const JsonValue& value, const Place& place, std::span<const EnumName> names, int* out) {
  const auto* text = value.get_if<std::string>();
  std::string expected;
  for (const EnumName& name : names) {
    if (text != nullptr && *text == name.name) {
      *out = name.value;
      return OkStatus();
    }
    if (!name.alias) expected += (expected.empty() ? "one of \"" : ", \"") + std::string(name.name) + "\"";
  }
  return Mismatch(place, expected, value);
}

std::string_view EnumText(std::span<const EnumName> names, int value) {
  return std::find_if(names.begin(), names.end(), [&](const EnumName& name) { return name.value == value; })->name;
}

Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, bool* out) {
  const bool* flag = value.get_if<bool>();
  if (flag == nullptr) return Mismatch(place, "true or false", value, limits.secret);
  *out = *flag;
  return OkStatus();
}

Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, double* out) {
  std::optional<double> number = AsNumber(value);
  if (!number.has_value() || !Within(*number, limits)) {
    std::string text = LimitsText(limits);
    return Mismatch(place, "a number" + (text.empty() ? "" : " " + text), value, limits.secret);
  }
  *out = *number == 0 ? 0.0 : *number;  // -0.0 would be another text for the same value
  return OkStatus();
}

Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, float* out) {
  std::optional<double> number = AsNumber(value);
  if (!number.has_value() || std::abs(*number) > std::numeric_limits<float>::max()) {
    return Mismatch(place, "a number within the range of float32", value, limits.secret);
  }
  *out = static_cast<float>(*number);
  return OkStatus();
}

Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, std::optional<double>* out) {
  double number = 0;
  HPS_RETURN_IF_ERROR(ReadValue(value, place, limits, &number));
  *out = number;
  return OkStatus();
}

Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, std::string* out) {
  const auto* text = value.get_if<std::string>();
  if (text == nullptr) return Mismatch(place, "a string", value, limits.secret);
  if (const char* expected = FormatProblem(limits.format, *text)) {
    // What is no plain list of hosts may hold a password: redis://user:password@host.
    const bool login = limits.format == StringFormat::kHosts && text->find('@') != std::string::npos;
    return Mismatch(place, expected, value, limits.secret || login);
  }
  *out = *text;
  return OkStatus();
}

Result<const JsonArray*> ReadList(const JsonValue& value, const Place& place, std::string_view expected) {
  const auto* elements = value.get_if<JsonArray>();
  if (elements == nullptr) return Mismatch(place, std::string(expected), value);
  return elements;
}

JsonValue WriteValue(float value) {
  char buffer[64];
  auto written = std::to_chars(buffer, buffer + sizeof(buffer), value);
  double number = 0;
  std::from_chars(buffer, written.ptr, number);
  return {number};
}

}  // namespace hps
