// Reading and writing single values of the configuration: one overload a type, each with its limits and its refusal.
//
// Integers may be written as 64 or 64.0 (JSON has one number type); booleans are never numbers. Errors are
// kInvalidArgument "<origin>: <pointer>: must be ..., got ...". Values of secret fields are never quoted.

#ifndef HPS_CONFIG_VALUES_H_
#define HPS_CONFIG_VALUES_H_

#include <concepts>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "cc/config/json_value.h"
#include "hps/config.h"
#include "hps/status.h"

namespace hps {

// Where a value stands, for messages.
struct Place {
  std::string origin;
  std::string pointer;  // JSON pointer; "" is the whole document

  Place Child(std::string_view key) const { return {origin, pointer + "/" + PointerToken(key)}; }
  Place Child(size_t index) const { return {origin, pointer + "/" + std::to_string(index)}; }
  Status Error(std::string_view message) const;
};

enum class StringFormat {
  kAny,
  kNotEmpty,
  kName,               // of a model or table: [a-zA-Z0-9_\-]{1,120}
  kRegularExpression,  // ECMAScript, at most 1000 bytes
  kHosts,              // host[:port], several separated by ',' or ';'
};

struct Limits {
  double minimum = -std::numeric_limits<double>::infinity();
  double maximum = std::numeric_limits<double>::infinity();
  bool above_minimum = false;  // the minimum itself is not allowed
  bool below_maximum = false;
  StringFormat format = StringFormat::kAny;
  bool secret = false;
};

struct EnumName {
  std::string_view name;
  int value;
  bool alias = false;  // another spelling, accepted and not advertised
};

// The spellings of an enumeration; the first of a value is the one that is written.
template <typename E>
std::span<const EnumName> EnumNames();
enum class HashMapAlgorithm { kPhm, kStl };
template <>
std::span<const EnumName> EnumNames<VolatileType>();
template <>
std::span<const EnumName> EnumNames<PersistentType>();
template <>
std::span<const EnumName> EnumNames<UpdateSourceType>();
template <>
std::span<const EnumName> EnumNames<OverflowPolicy>();
template <>
std::span<const EnumName> EnumNames<WhenUnavailable>();
template <>
std::span<const EnumName> EnumNames<CacheType>();
template <>
std::span<const EnumName> EnumNames<HashMapAlgorithm>();

// What a field holds, for the schema and the reference page.
struct ValueType {
  enum class Kind { kBool, kInteger, kNumber, kString, kEnum, kSection };
  Kind kind = Kind::kBool;
  bool list = false;
  std::span<const EnumName> enum_names;
};

template <typename T>
struct IsVector : std::false_type {};
template <typename T>
struct IsVector<std::vector<T>> : std::true_type {};

template <typename T>
ValueType TypeOf() {
  if constexpr (IsVector<T>::value) {
    ValueType type = TypeOf<typename T::value_type>();
    type.list = true;
    return type;
  } else if constexpr (std::is_enum_v<T>) {
    return {ValueType::Kind::kEnum, false, EnumNames<T>()};
  } else if constexpr (std::same_as<T, bool>) {
    return {ValueType::Kind::kBool, false, {}};
  } else if constexpr (std::integral<T>) {
    return {ValueType::Kind::kInteger, false, {}};
  } else if constexpr (std::same_as<T, std::string>) {
    return {ValueType::Kind::kString, false, {}};
  } else {
    return {ValueType::Kind::kNumber, false, {}};
  }
}

// "of at least 1", ">= 0 and <= 1"; empty if anything of the type is allowed.
std::string LimitsText(const Limits& limits);

__extension__ using Int128 = __int128;
Status ReadInteger(const JsonValue& value, const Place& place, const Limits& limits, Int128 lowest, Int128 highest,
                   Int128* out);
Status ReadEnum(const JsonValue& value, const Place& place, std::span<const EnumName> names, int* out);
std::string_view EnumText(std::span<const EnumName> names, int value);

Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, bool* out);
Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, double* out);
Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, float* out);
Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, std::optional<double>* out);
Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, std::string* out);

// The elements of a list; an error naming `expected` if `value` is none.
Result<const JsonArray*> ReadList(const JsonValue& value, const Place& place, std::string_view expected);

template <std::integral T>
Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, T* out) {
  Int128 number = 0;
  HPS_RETURN_IF_ERROR(
      ReadInteger(value, place, limits, std::numeric_limits<T>::min(), std::numeric_limits<T>::max(), &number));
  *out = static_cast<T>(number);
  return OkStatus();
}

template <typename E>
requires std::is_enum_v<E> Status ReadValue(const JsonValue& value, const Place& place, const Limits&, E* out) {
  int number = 0;
  HPS_RETURN_IF_ERROR(ReadEnum(value, place, EnumNames<E>(), &number));
  *out = static_cast<E>(number);
  return OkStatus();
}

template <typename T>
Status ReadValue(const JsonValue& value, const Place& place, const Limits& limits, std::vector<T>* out) {
  HPS_ASSIGN_OR_RETURN(const JsonArray* elements, ReadList(value, place, "a list"));
  out->assign(elements->size(), T());
  for (size_t i = 0; i < elements->size(); ++i) {
    HPS_RETURN_IF_ERROR(ReadValue((*elements)[i], place.Child(i), limits, &(*out)[i]));
  }
  return OkStatus();
}

JsonValue WriteValue(float value);  // the shortest decimal that reads back as the same float
inline JsonValue WriteValue(double value) { return {value}; }
inline JsonValue WriteValue(bool value) { return {value}; }
inline JsonValue WriteValue(const std::string& value) { return {value}; }
inline JsonValue WriteValue(const std::optional<double>& value) {
  return value.has_value() ? JsonValue{*value} : JsonValue{};
}
template <std::integral T>
JsonValue WriteValue(T value) {
  return std::in_range<uint64_t>(value) ? JsonValue{uint64_t(value)} : JsonValue{int64_t(value)};
}
template <typename E>
requires std::is_enum_v<E> JsonValue WriteValue(E value) {
  return {std::string(EnumText(EnumNames<E>(), static_cast<int>(value)))};
}
template <typename T>
JsonValue WriteValue(const std::vector<T>& values) {
  JsonArray array;
  for (const T& value : values) array.push_back(WriteValue(value));
  return {std::move(array)};
}

}  // namespace hps

#endif  // HPS_CONFIG_VALUES_H_
