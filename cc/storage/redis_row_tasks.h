// The commands on the hashes of a partition: reading, writing, removing and scanning rows, and their metadata.
//
// Each task is at most as long as PiecesOf says, below what one Redis command takes, and short enough that a server is
// not busy with one for long. Tasks refer to the caller's keys and rows, which must outlive them.

#ifndef HPS_STORAGE_REDIS_ROW_TASKS_H_
#define HPS_STORAGE_REDIS_ROW_TASKS_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cc/storage/redis_layout.h"
#include "cc/storage/redis_task.h"
#include "hps/table_store.h"

namespace hps {

// A hash of a partition.
struct RedisHash {
  const std::string* name;
  uint16_t slot;
  int key_bytes;
};

// Which of a batch's keys lie in which partition.
struct RedisGroups {
  RedisGroups(const RedisLayout& layout, std::span<const Key> keys,
              const std::optional<std::span<const uint32_t>>& positions);
  // The members of a partition: indices into positions, or into keys where there are none; ascending.
  std::span<const uint32_t> members(uint32_t partition) const {
    return std::span(order).subspan(begin[partition], begin[partition + 1] - begin[partition]);
  }
  std::vector<uint32_t> order;
  std::vector<uint32_t> begin;  // one for each partition, and the end
};

// How many pieces of at most `most` make up `count`.
inline size_t PiecesOf(size_t count, size_t most) { return (count + most - 1) / most; }
// Calls body(first, count) for about equal pieces of at most `most`.
template <typename Body>
void ForEachPiece(size_t count, size_t most, Body&& body) {
  const size_t pieces = PiecesOf(count, std::max<size_t>(most, 1));
  for (size_t i = 0; i < pieces; ++i) {
    const size_t first = count * i / pieces;
    body(first, count * (i + 1) / pieces - first);
  }
}

// HMGET: rows go straight from the connection's buffer to their places.
class FetchRowsTask final : public RedisTask {
 public:
  struct Target {
    std::span<const Key> keys;
    const uint32_t* positions;  // nullptr: members are indices of keys
    RowBuffer rows;
    size_t row_bytes;
    uint8_t* found;  // by member
  };
  FetchRowsTask(const RedisHash& hash, const Target* target, std::span<const uint32_t> members)
      : RedisTask(hash.slot, 1, "HMGET"), hash_(hash), target_(target), members_(members) {}

  void Write(RedisWriter& out) override;
  bool streams() const override { return true; }
  Status OnArray(size_t elements) override;
  Status OnElement(size_t index, const char* data, size_t size) override;

 private:
  size_t Position(uint32_t member) const { return target_->positions == nullptr ? member : target_->positions[member]; }

  const RedisHash hash_;
  const Target* const target_;
  const std::span<const uint32_t> members_;
};

// A row to write.
struct RedisWrite {
  Key key;
  const std::byte* row;
};

// HSET of many rows, or HSETNX of each.
class WriteRowsTask final : public RedisTask {
 public:
  WriteRowsTask(const RedisHash& hash, std::span<const RedisWrite> writes, size_t row_bytes, bool only_absent)
      : RedisTask(hash.slot, only_absent ? writes.size() : 1, only_absent ? "HSETNX" : "HSET"),
        hash_(hash),
        writes_(writes),
        row_bytes_(row_bytes) {}
  void Write(RedisWriter& out) override;

 private:
  const RedisHash hash_;
  const std::span<const RedisWrite> writes_;
  const size_t row_bytes_;
};

// HDEL.
class RemoveKeysTask final : public RedisTask {
 public:
  RemoveKeysTask(const RedisHash& hash, std::vector<Key> keys)
      : RedisTask(hash.slot, 1, "HDEL"), hash_(hash), keys_(std::move(keys)) {}
  void Write(RedisWriter& out) override;
  Status OnReply(size_t, RedisReply& reply) override {
    removed = static_cast<uint64_t>(reply.integer);
    return OkStatus();
  }
  uint64_t removed = 0;

 private:
  const RedisHash hash_;
  const std::vector<Key> keys_;
};

// HSET of raw 8-byte numbers, HSET of decimal ones, or HINCRBY of 1 for each key.
class WriteMetadataTask final : public RedisTask {
 public:
  enum class Form { kTime, kCount, kIncrement };
  WriteMetadataTask(const RedisHash& hash, Form form, std::vector<std::pair<Key, int64_t>> values)
      : RedisTask(hash.slot, form == Form::kIncrement ? values.size() : 1,
                  form == Form::kIncrement ? "HINCRBY" : "HSET"),
        hash_(hash),
        form_(form),
        values_(std::move(values)) {}
  void Write(RedisWriter& out) override;

 private:
  const RedisHash hash_;
  const Form form_;
  const std::vector<std::pair<Key, int64_t>> values_;
};

// HSCAN of one piece.
class ScanTask final : public RedisTask {
 public:
  ScanTask(const RedisHash& hash, std::string from, size_t count)
      : RedisTask(hash.slot, 1, "HSCAN"), hash_(hash), from_(std::move(from)), count_(count) {}
  void Write(RedisWriter& out) override;
  Status OnReply(size_t, RedisReply& reply) override;

  std::string cursor;                // "0": the end
  std::vector<RedisReply> elements;  // field, value, field, value, ...

 private:
  const RedisHash hash_;
  const std::string from_;
  const size_t count_;
};

// The raw key in a reply; false: it has another length.
inline bool RawKey(const RedisReply& field, int key_bytes, Key* key) {
  if (field.text.size() != static_cast<size_t>(key_bytes)) return false;
  *key = RedisLayout::FromRaw(field.text.data(), key_bytes);
  return true;
}

// A set of keys, 16 to 32 bytes each.
class RedisKeySet {
 public:
  // True: the key is new.
  bool Insert(Key key);

 private:
  void Grow();
  std::vector<Key> slots_;  // open addressing; 0: free
  size_t used_ = 0;
  bool has_zero_ = false;
};

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_ROW_TASKS_H_
