// Pure functions over outside formats; the tests hold values computed by other programs against them.

#include "cc/storage/redis_layout.h"

#include <array>

namespace hps {
namespace {

constexpr std::string_view kTablePrefix = "hps.table/";
constexpr std::string_view kRecordPrefix = "hps.record/";
constexpr std::string_view kValuesPrefix = "hps_et{";

// CRC16 of the XMODEM protocol: polynomial 0x1021, start 0, most significant bit first.
constexpr std::array<uint16_t, 256> MakeCrcTable() {
  std::array<uint16_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte << 8;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 0x8000) != 0 ? (crc << 1) ^ 0x1021 : crc << 1;
    table[byte] = static_cast<uint16_t>(crc);
  }
  return table;
}
constexpr std::array<uint16_t, 256> kCrcTable = MakeCrcTable();

// "<table>/p<i>", the stem of both naming schemes: the table, if it is one.
std::optional<std::string_view> TableOfStem(std::string_view stem) {
  const size_t slash = stem.rfind("/p");
  if (slash == std::string_view::npos || slash == 0 || slash + 2 == stem.size()) return std::nullopt;
  for (const char c : stem.substr(slash + 2)) {
    if (c < '0' || c > '9') return std::nullopt;
  }
  return stem.substr(0, slash);
}

}  // namespace

uint16_t RedisSlot(std::string_view key) {
  const size_t open = key.find('{');
  if (open != std::string_view::npos) {
    const size_t close = key.find('}', open + 1);
    if (close != std::string_view::npos && close > open + 1) key = key.substr(open + 1, close - open - 1);
  }
  uint32_t crc = 0;
  for (const char c : key) crc = ((crc << 8) ^ kCrcTable[((crc >> 8) ^ static_cast<uint8_t>(c)) & 0xff]) & 0xffff;
  return static_cast<uint16_t>(crc % kRedisSlots);
}

uint64_t Xxh3OfKey(uint64_t key, int key_bytes) {
  // Bytes 8 .. 15 and 16 .. 23 of the algorithm's default secret.
  constexpr uint64_t kFlip = 0x1cad21f72c81017cull ^ 0xdb979083e96dd4deull;
  constexpr uint64_t kPrime = 0x9FB21C651E98DF25ull;
  const auto rotate = [](uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); };
  const auto first = static_cast<uint32_t>(key);
  const auto last = key_bytes == 8 ? static_cast<uint32_t>(key >> 32) : first;
  uint64_t hash = (last + (static_cast<uint64_t>(first) << 32)) ^ kFlip;
  hash ^= rotate(hash, 49) ^ rotate(hash, 24);
  hash *= kPrime;
  hash ^= (hash >> 35) + static_cast<uint64_t>(key_bytes);
  hash *= kPrime;
  return hash ^ (hash >> 28);
}

std::string RedisLayout::Name(uint32_t partition, char kind) const {
  const std::string stem = table_ + "/p" + std::to_string(partition);
  if (version_ == Version::kCurrent) return std::string(kValuesPrefix) + stem + "}" + kind;
  return stem + "/" + kind;
}

std::string RedisLayout::DroppedKey(uint32_t partition, std::string_view id) const {
  std::string name = ValuesKey(partition);
  if (version_ == Version::kOld) name = "{" + name + "}";
  return name + ".dropped." + std::string(id);
}

std::optional<std::string_view> RedisTableOfKey(std::string_view redis_key) {
  if (redis_key.starts_with(kTablePrefix)) return redis_key.substr(kTablePrefix.size());
  if (redis_key.starts_with(kValuesPrefix) && redis_key.ends_with("}v")) {
    return TableOfStem(redis_key.substr(kValuesPrefix.size(), redis_key.size() - kValuesPrefix.size() - 2));
  }
  const bool old = redis_key.starts_with("hps_et.") || redis_key.starts_with("hctr_et.");
  if (old && redis_key.ends_with("/v")) return TableOfStem(redis_key.substr(0, redis_key.size() - 2));
  return std::nullopt;
}

std::string RedisDescriptionKey(std::string_view table) { return std::string(kTablePrefix) + std::string(table); }
std::string RedisRecordKey(std::string_view record) { return std::string(kRecordPrefix) + std::string(record); }

}  // namespace hps
