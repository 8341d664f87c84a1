// Several processes may evict from one partition at once: each removes what it chose and looks again how many rows
// there are, so that together they may remove a few more than needed, never fewer.

#include "cc/storage/redis_eviction.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <deque>
#include <random>

#include "cc/storage/redis_row_tasks.h"

namespace hps {
namespace {

constexpr size_t kPieceKeys = 1000;       // in one command that changes a partition
constexpr size_t kScanCount = 1000;       // of metadata
constexpr size_t kScanBytes = 128 << 10;  // of rows
constexpr int kRounds = 8;
constexpr size_t kAwaitedNotes = 2048;  // of reads: takes a millisecond or two. A longer queue is not waited for
constexpr std::chrono::seconds kNotesTime{2};

struct Ranked {
  uint64_t rank;  // the lowest leave first
  Key key;
};

class Eviction {
 public:
  Eviction(RedisSession& session, const RedisLayout& layout, const RedisTablePlace::Partition& partition,
           std::span<const Key> last, std::atomic<uint64_t>* evicted)
      : session_(session),
        overflow_(session.options.overflow),
        values_{&partition.values, partition.values_slot, layout.key_bytes()},
        metadata_{&partition.metadata, partition.metadata_slot, layout.key_bytes()},
        last_(last),
        evicted_(evicted) {}

  // `rows`: how many there are.
  Status Run(uint64_t rows) {
    // What is not noted by then is taken for unread, as where the notes were dropped.
    if (ReadingCounts(overflow_)) {
      (void)session_.worker.Drain(kAwaitedNotes, std::chrono::steady_clock::now() + kNotesTime);
    }
    for (int round = 0; round < kRounds && rows > overflow_.target_rows(); ++round) {
      const size_t excess = rows - overflow_.target_rows();
      removed_ = 0;
      HPS_RETURN_IF_ERROR(NeedsMetadata(overflow_) ? EvictRanked(rows, excess) : EvictAny(excess));
      if (removed_ >= excess) return OkStatus();
      HPS_ASSIGN_OR_RETURN(rows, Length(values_));  // another process removes rows at the same time
    }
    return OkStatus();
  }

 private:
  bool IsLast(Key key) const { return std::binary_search(last_.begin(), last_.end(), key); }

  Status RunTask(RedisTask& task) {
    RedisTask* const pointer = &task;
    return session_.cluster->Run(std::span(&pointer, 1), kNoDeadline);
  }

  Result<uint64_t> Length(const RedisHash& hash) {
    RedisCommandTask task(hash.slot, {"HLEN", *hash.name});
    HPS_RETURN_IF_ERROR(RunTask(task));
    return static_cast<uint64_t>(task.reply.integer);
  }

  Status Remove(std::span<const Key> keys) {
    std::deque<RemoveKeysTask> rows;
    std::deque<RemoveKeysTask> metadata;
    ForEachPiece(keys.size(), kPieceKeys, [&](size_t first, size_t count) {
      const std::vector<Key> piece(keys.begin() + first, keys.begin() + first + count);
      rows.emplace_back(values_, piece);
      if (NeedsMetadata(overflow_)) metadata.emplace_back(metadata_, piece);
    });
    std::vector<RedisTask*> pointers;
    for (RemoveKeysTask& task : rows) pointers.push_back(&task);
    for (RemoveKeysTask& task : metadata) pointers.push_back(&task);
    const Status status = session_.cluster->Run(pointers, kNoDeadline);
    for (const RemoveKeysTask& task : rows) removed_ += task.removed, *evicted_ += task.removed;
    return status;
  }

  // Visits (key, value) of a hash in pieces, from a cursor on, until visit returns false or the end.
  template <typename Visit>
  Status ScanHash(const RedisHash& hash, std::string cursor, size_t count, Visit&& visit) {
    do {
      ScanTask task(hash, cursor, count);
      HPS_RETURN_IF_ERROR(RunTask(task));
      HPS_ASSIGN_OR_RETURN(const bool more, visit(task.elements));
      if (!more) return OkStatus();
      cursor = task.cursor;
    } while (cursor != "0");
    return OkStatus();
  }

  size_t RowScanCount() const { return std::clamp<size_t>(kScanBytes / 128, 16, kScanCount); }

  // Removes `excess` rows, starting at a random place: a scan goes through a hash in an order of its own.
  Status EvictAny(size_t excess) {
    std::minstd_rand random(std::random_device{}());
    std::vector<Key> spared;
    for (const bool from_start : {false, true}) {
      const std::string cursor = from_start ? "0" : std::to_string(random());
      HPS_RETURN_IF_ERROR(ScanHash(values_, cursor, RowScanCount(), [&](auto& elements) -> Result<bool> {
        std::vector<Key> victims;
        std::vector<size_t> order(elements.size() / 2);
        for (size_t i = 0; i < order.size(); ++i) order[i] = 2 * i;
        std::shuffle(order.begin(), order.end(), random);  // a small hash comes as a whole
        for (const size_t i : order) {
          Key key = 0;
          if (victims.size() == excess || !RawKey(elements[i], values_.key_bytes, &key)) continue;
          if (!IsLast(key)) victims.push_back(key);
        }
        HPS_RETURN_IF_ERROR(Remove(victims));
        excess -= victims.size();
        return excess > 0;
      }));
      if (excess == 0) return OkStatus();
    }
    return Remove(last_.first(std::min(excess, last_.size())));  // nothing else is left
  }

  // Keys of rows that have no metadata, at most `most`.
  Status AppendUnranked(size_t most, std::vector<Ranked>* ranked) {
    const size_t end = ranked->size() + most;
    return ScanHash(values_, "0", RowScanCount(), [&](auto& elements) -> Result<bool> {
      if (elements.empty()) return true;
      std::vector<std::string> words = {"HMGET", *metadata_.name};
      for (size_t i = 0; i < elements.size(); i += 2) words.push_back(elements[i].text);
      RedisCommandTask task(metadata_.slot, std::move(words));
      HPS_RETURN_IF_ERROR(RunTask(task));
      for (size_t i = 0; 2 * i < elements.size() && i < task.reply.elements.size() && ranked->size() < end; ++i) {
        Key key = 0;
        if (task.reply.elements[i].kind != RedisReply::Kind::kNil) continue;
        if (RawKey(elements[2 * i], values_.key_bytes, &key)) ranked->push_back({0, key});
      }
      return ranked->size() < end;
    });
  }

  uint64_t RankOf(const std::string& value) const {
    uint64_t rank = 0;
    if (overflow_.policy == OverflowPolicy::kEvictOldest) {
      std::memcpy(&rank, value.data(), std::min(value.size(), sizeof(rank)));
    } else {
      (void)std::from_chars(value.data(), value.data() + value.size(), rank);
    }
    return rank;
  }

  Status EvictRanked(uint64_t rows, size_t excess) {
    std::vector<Ranked> ranked;
    ranked.reserve(rows);
    RedisKeySet seen;
    HPS_RETURN_IF_ERROR(ScanHash(metadata_, "0", kScanCount, [&](auto& elements) -> Result<bool> {
      for (size_t i = 0; i < elements.size(); i += 2) {
        Key key = 0;
        if (!RawKey(elements[i], metadata_.key_bytes, &key) || !seen.Insert(key)) continue;
        ranked.push_back({RankOf(elements[i + 1].text), key});
      }
      return true;
    }));
    if (ranked.size() < rows) HPS_RETURN_IF_ERROR(AppendUnranked(rows - ranked.size(), &ranked));
    const auto leaves_before = [&](const Ranked& a, const Ranked& b) {
      return std::pair(IsLast(a.key), a.rank) < std::pair(IsLast(b.key), b.rank);
    };
    const size_t count = std::min(excess, ranked.size());
    std::nth_element(ranked.begin(), ranked.begin() + static_cast<ptrdiff_t>(count), ranked.end(), leaves_before);
    std::vector<Key> victims;
    victims.reserve(count);
    for (size_t i = 0; i < count; ++i) victims.push_back(ranked[i].key);
    HPS_RETURN_IF_ERROR(Remove(victims));
    if (overflow_.policy == OverflowPolicy::kEvictLeastUsed) return Fade(std::span(ranked).subspan(count));
    return OkStatus();
  }

  // Halves the counts of the rows that stay, so that old fame fades.
  Status Fade(std::span<const Ranked> staying) {
    std::vector<std::unique_ptr<RedisTask>> tasks;
    std::vector<RedisTask*> pointers;
    ForEachPiece(staying.size(), kPieceKeys, [&](size_t first, size_t count) {
      std::vector<std::pair<Key, int64_t>> values;
      for (const Ranked& row : staying.subspan(first, count)) {
        values.emplace_back(row.key, static_cast<int64_t>(row.rank / 2));
      }
      tasks.push_back(
          std::make_unique<WriteMetadataTask>(metadata_, WriteMetadataTask::Form::kCount, std::move(values)));
      pointers.push_back(tasks.back().get());
    });
    return session_.cluster->Run(pointers, kNoDeadline);
  }

  RedisSession& session_;
  const OverflowOptions& overflow_;
  const RedisHash values_;
  const RedisHash metadata_;
  const std::span<const Key> last_;
  std::atomic<uint64_t>* const evicted_;
  uint64_t removed_ = 0;  // in this round
};

}  // namespace

bool NeedsMetadata(const OverflowOptions& overflow) {
  return overflow.bounded() && overflow.policy != OverflowPolicy::kEvictRandom;
}

bool ReadingCounts(const OverflowOptions& overflow) {
  if (!overflow.bounded()) return false;
  if (overflow.policy == OverflowPolicy::kEvictOldest) return overflow.refresh_time_after_fetch;
  return overflow.policy == OverflowPolicy::kEvictLeastUsed;
}

void AppendAccessTasks(const OverflowOptions& overflow, const RedisLayout& layout, const RedisTablePlace& place,
                       std::span<const Key> keys, std::vector<std::unique_ptr<RedisTask>>* tasks) {
  if (!NeedsMetadata(overflow)) return;
  const bool times = overflow.policy == OverflowPolicy::kEvictOldest;
  const int64_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  const RedisGroups groups(layout, keys, std::nullopt);
  for (uint32_t i = 0; i < place.partitions.size(); ++i) {
    const RedisTablePlace::Partition& partition = place.partitions[i];
    const auto members = groups.members(i);
    ForEachPiece(members.size(), kPieceKeys, [&](size_t first, size_t count) {
      std::vector<std::pair<Key, int64_t>> values;
      values.reserve(count);
      for (const uint32_t member : members.subspan(first, count)) values.emplace_back(keys[member], times ? now : 1);
      tasks->push_back(std::make_unique<WriteMetadataTask>(
          RedisHash{&partition.metadata, partition.metadata_slot, layout.key_bytes()},
          times ? WriteMetadataTask::Form::kTime : WriteMetadataTask::Form::kIncrement, std::move(values)));
    });
  }
}

Status EvictOverflow(RedisSession& session, const RedisLayout& layout, std::span<const WrittenPartition> written,
                     std::atomic<uint64_t>* evicted) {
  std::deque<RedisCommandTask> lengths;
  for (const auto& [partition, keys] : written) {
    lengths.emplace_back(partition->values_slot, std::vector<std::string>{"HLEN", partition->values});
  }
  HPS_RETURN_IF_ERROR(session.Run(lengths));
  for (size_t i = 0; i < written.size(); ++i) {
    const auto rows = static_cast<uint64_t>(lengths[i].reply.integer);
    if (rows <= session.options.overflow.margin) continue;
    HPS_RETURN_IF_ERROR(Eviction(session, layout, *written[i].partition, written[i].keys, evicted).Run(rows));
  }
  return OkStatus();
}

}  // namespace hps
