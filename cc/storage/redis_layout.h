// Names and numbers that several programs must agree on: where a row of a table lies in Redis.
//
// Partition i of table T is two hashes: values (field: raw key, value: raw row) and, where the overflow policy needs
// them, metadata (field: raw key, value: time or count). Names, by the version that wrote the table:
//   current (4.2 and later):  hps_et{T/p<i>}v   hps_et{T/p<i>}t    partition: PartitionHash(key) % num_partitions
//   old (4.1 and earlier):    T/p<i>/v          T/p<i>/t           partition: XXH3 of the raw key % num_partitions
// Raw keys are 8 or 4 bytes, little-endian; keys of 4 bytes are hashed as unsigned numbers. Pure functions.

#ifndef HPS_STORAGE_REDIS_LAYOUT_H_
#define HPS_STORAGE_REDIS_LAYOUT_H_

#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "cc/base/hash.h"
#include "hps/table_store.h"

namespace hps {

inline constexpr uint32_t kRedisSlots = 16384;

// The slot of a Redis Cluster that a key belongs to: by what stands in the first pair of braces, if anything does.
uint16_t RedisSlot(std::string_view key);

// XXH3_64bits without seed of the 4 or 8 lowest bytes of `key`.
uint64_t Xxh3OfKey(uint64_t key, int key_bytes);

class RedisLayout {
 public:
  enum class Version { kCurrent, kOld };

  RedisLayout(Version version, std::string table, uint32_t num_partitions, int key_bytes)
      : version_(version), table_(std::move(table)), num_partitions_(num_partitions), key_bytes_(key_bytes) {}

  Version version() const { return version_; }
  uint32_t num_partitions() const { return num_partitions_; }
  int key_bytes() const { return key_bytes_; }

  std::string ValuesKey(uint32_t partition) const { return Name(partition, 'v'); }
  std::string MetadataKey(uint32_t partition) const { return Name(partition, 't'); }
  // A name for the values of a table that was dropped and is still held: in the same slot as ValuesKey.
  std::string DroppedKey(uint32_t partition, std::string_view id) const;

  // Whether the key can be stored: keys of 4 bytes are those of int32.
  bool Holds(Key key) const { return key_bytes_ == 8 || key == static_cast<int32_t>(key); }

  uint32_t PartitionOf(Key key) const {
    const uint64_t raw = key_bytes_ == 8 ? static_cast<uint64_t>(key) : static_cast<uint32_t>(key);
    return static_cast<uint32_t>((version_ == Version::kCurrent ? PartitionHash(raw) : Xxh3OfKey(raw, key_bytes_)) %
                                 num_partitions_);
  }

  // The raw key of `key_bytes` bytes as a number.
  static Key FromRaw(const char* raw, int key_bytes) {
    if (key_bytes == 4) {
      int32_t key = 0;
      std::memcpy(&key, raw, 4);
      return key;
    }
    Key key = 0;
    std::memcpy(&key, raw, 8);
    return key;
  }

 private:
  std::string Name(uint32_t partition, char kind) const;

  Version version_;
  std::string table_;
  uint32_t num_partitions_;
  int key_bytes_;
};

// The table that a Redis key belongs to, if it is a description or the values of a partition.
std::optional<std::string_view> RedisTableOfKey(std::string_view redis_key);

std::string RedisDescriptionKey(std::string_view table);
std::string RedisRecordKey(std::string_view record);

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_LAYOUT_H_
