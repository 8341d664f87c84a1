// A task may be written again after a failure: it keeps no state that a second run would not overwrite.

#include "cc/storage/redis_row_tasks.h"

#include "cc/base/hash.h"

namespace hps {

RedisGroups::RedisGroups(const RedisLayout& layout, std::span<const Key> keys,
                         const std::optional<std::span<const uint32_t>>& positions) {
  // Counting sort: every key is hashed once.
  const size_t count = positions ? positions->size() : keys.size();
  std::vector<uint32_t> partition(count);
  begin.assign(layout.num_partitions() + 1, 0);
  for (size_t i = 0; i < count; ++i) {
    partition[i] = layout.PartitionOf(keys[positions ? (*positions)[i] : i]);
    ++begin[partition[i] + 1];
  }
  for (size_t i = 1; i < begin.size(); ++i) begin[i] += begin[i - 1];
  order.resize(count);
  std::vector<uint32_t> next(begin.begin(), begin.end() - 1);
  for (size_t i = 0; i < count; ++i) order[next[partition[i]]++] = static_cast<uint32_t>(i);
}

void FetchRowsTask::Write(RedisWriter& out) {
  out.Begin(members_.size() + 2);
  out.Word("HMGET");
  out.Word(*hash_.name);
  for (const uint32_t member : members_) out.Key(target_->keys[Position(member)], hash_.key_bytes);
}

Status FetchRowsTask::OnArray(size_t elements) {
  if (elements == members_.size()) return OkStatus();
  return DataLoss("HMGET of " + std::to_string(members_.size()) + " keys was answered with " +
                  std::to_string(elements) + " rows");
}

Status FetchRowsTask::OnElement(size_t index, const char* data, size_t size) {
  const uint32_t member = members_[index];
  const size_t position = Position(member);
  if (data == nullptr) {
    target_->found[member] = 0;
    return OkStatus();
  }
  if (size != target_->row_bytes) {
    return DataLoss("key " + std::to_string(target_->keys[position]) + " has a row of " + std::to_string(size) +
                    " bytes instead of " + std::to_string(target_->row_bytes) +
                    "; write that row again, or drop the table and load the model again");
  }
  std::memcpy(target_->rows.data + position * target_->rows.stride_bytes, data, size);
  target_->found[member] = 1;
  return OkStatus();
}

void WriteRowsTask::Write(RedisWriter& out) {
  const bool each = command == "HSETNX";
  if (!each) {
    out.Begin(2 * writes_.size() + 2);
    out.Word("HSET");
    out.Word(*hash_.name);
  }
  for (const RedisWrite& write : writes_) {
    if (each) {
      out.Begin(4);
      out.Word("HSETNX");
      out.Word(*hash_.name);
    }
    out.Key(write.key, hash_.key_bytes);
    out.Word(std::string_view(reinterpret_cast<const char*>(write.row), row_bytes_));
  }
}

void RemoveKeysTask::Write(RedisWriter& out) {
  out.Begin(keys_.size() + 2);
  out.Word("HDEL");
  out.Word(*hash_.name);
  for (const Key key : keys_) out.Key(key, hash_.key_bytes);
}

void WriteMetadataTask::Write(RedisWriter& out) {
  if (form_ != Form::kIncrement) {
    out.Begin(2 * values_.size() + 2);
    out.Word("HSET");
    out.Word(*hash_.name);
  }
  for (const auto& [key, value] : values_) {
    if (form_ == Form::kIncrement) {
      out.Begin(4);
      out.Word("HINCRBY");
      out.Word(*hash_.name);
    }
    out.Key(key, hash_.key_bytes);
    if (form_ == Form::kTime) {
      out.Word(std::string_view(reinterpret_cast<const char*>(&value), sizeof(value)));
    } else {
      out.Word(value);
    }
  }
}

void ScanTask::Write(RedisWriter& out) {
  out.Begin(5);
  out.Word("HSCAN");
  out.Word(*hash_.name);
  out.Word(from_);
  out.Word("COUNT");
  out.Word(static_cast<int64_t>(count_));
}

Status ScanTask::OnReply(size_t, RedisReply& reply) {
  const auto is_string = [](const RedisReply& element) { return element.kind == RedisReply::Kind::kString; };
  if (reply.elements.size() != 2 || reply.elements[1].elements.size() % 2 != 0 ||
      !std::all_of(reply.elements[1].elements.begin(), reply.elements[1].elements.end(), is_string)) {
    return Internal("a reply to HSCAN in a form that is not known");
  }
  cursor = std::move(reply.elements[0].text);
  elements = std::move(reply.elements[1].elements);
  return OkStatus();
}

bool RedisKeySet::Insert(Key key) {
  if (key == 0) return !std::exchange(has_zero_, true);
  if (2 * used_ >= slots_.size()) Grow();
  for (size_t i = SlotHash(static_cast<uint64_t>(key)) & (slots_.size() - 1);; i = (i + 1) & (slots_.size() - 1)) {
    if (slots_[i] == key) return false;
    if (slots_[i] != 0) continue;
    slots_[i] = key;
    ++used_;
    return true;
  }
}

void RedisKeySet::Grow() {
  std::vector<Key> old(std::max<size_t>(64, 2 * slots_.size()), 0);
  old.swap(slots_);
  used_ = 0;
  for (const Key key : old) {
    if (key != 0) Insert(key);
  }
}

}  // namespace hps
