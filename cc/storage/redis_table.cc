// Invariants: a Fetch answers from one place of the rows (RedisTablePlace): misses count only if the place is still
// current when all replies are in. A missing row is a miss, and a row is written, only while the description of this
// very table is there.
// Lock order: RedisTableState::mutex_ is held while rows are moved away, over commands; nothing is taken after it.

#include "cc/storage/redis_table.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <random>

#include "cc/storage/redis_eviction.h"
#include "cc/storage/redis_row_tasks.h"
#include "hps/log.h"

namespace hps {
namespace {

using std::chrono::steady_clock;

constexpr size_t kMostWords = 500'000;       // keys, or pairs, in a command: a command takes 1,048,576 words
constexpr size_t kCommandBytes = 512 << 10;  // of rows, in a command or its reply
constexpr size_t kFewestKeys = 256;          // a smaller command is not worth its overhead
constexpr size_t kSliceRows = 1 << 18;       // rows of an upsert that are on their way at once
constexpr size_t kScanBytes = 256 << 10;
constexpr std::string_view kDroppedSeconds = "86400";

size_t RowsIn(size_t bytes, size_t row_bytes) { return std::max<size_t>(bytes / (row_bytes + 32), 1); }

class RedisTable final : public Table {
 public:
  RedisTable(std::shared_ptr<RedisSession> session, std::shared_ptr<RedisTableState> state, TableSpec spec)
      : session_(std::move(session)),
        state_(std::move(state)),
        spec_(std::move(spec)),
        where_(session_->Where(spec_.name)) {}

  const TableSpec& spec() const override { return spec_; }

  Status Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const override {
    HPS_RETURN_IF_ERROR(session_->CheckOpen());
    HPS_RETURN_IF_ERROR(CheckStride(request.rows.stride_bytes));
    const size_t count = request.positions ? request.positions->size() : request.keys.size();
    for (size_t i = 0; i < count; ++i) {
      HPS_RETURN_IF_ERROR(CheckKey(request.keys[request.positions ? (*request.positions)[i] : i]));
    }
    if (steady_clock::now() >= request.deadline) return DeadlineExceeded(where_ + ": the deadline had passed before");
    if (count == 0) return OkStatus();
    const RedisGroups groups(state_->layout(), request.keys, request.positions);
    std::vector<uint8_t> found(count);
    while (true) {
      const std::shared_ptr<const RedisTablePlace> place = state_->place();
      const Status status = FetchFrom(*place, request, groups, found);
      if (!status.ok()) return status.WithContext(where_);
      if (std::find(found.begin(), found.end(), 0) == found.end()) break;
      if (!state_->IsCurrent(place)) continue;  // the rows were moved meanwhile
      if (!place->dropped) {
        const Status there = CheckThere(request.deadline, request.cancelled, RedisWhenAllRefuse::kFail);
        if (!there.ok()) return there.WithContext(where_);
      }
      break;
    }
    for (size_t i = 0; i < count; ++i) {
      if (found[i] == 0) misses->push_back(request.positions ? (*request.positions)[i] : static_cast<uint32_t>(i));
    }
    if (ReadingCounts(overflow())) NoteReads(request, found);
    return OkStatus();
  }

  Status Locate(std::span<const Key>, std::span<const std::byte*>) const override {
    return Unimplemented(where_ + ": rows of Redis have no address; use Fetch");
  }

  Status Upsert(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) override {
    HPS_RETURN_IF_ERROR(session_->CheckOpen());
    HPS_RETURN_IF_ERROR(CheckStride(rows.stride_bytes));
    for (const Key key : keys) HPS_RETURN_IF_ERROR(CheckKey(key));
    if (keys.empty()) return OkStatus();
    // With a margin, so few rows at once that a partition does not grow far beyond it.
    const size_t slice = overflow().bounded() ? std::min<size_t>(batch_rows(), kSliceRows) : kSliceRows;
    for (size_t first = 0; first < keys.size(); first += slice) {
      const size_t count = std::min(slice, keys.size() - first);
      const Status status =
          UpsertSlice(keys.subspan(first, count), {rows.data + first * rows.stride_bytes, rows.stride_bytes}, options);
      if (!status.ok()) return status.WithContext(where_);
    }
    return OkStatus();
  }

  Status Erase(std::span<const Key> keys, uint64_t* erased) override {
    HPS_RETURN_IF_ERROR(session_->CheckOpen());
    for (const Key key : keys) HPS_RETURN_IF_ERROR(CheckKey(key));
    if (erased != nullptr) *erased = 0;
    const auto found = PlaceToWrite();
    if (!found.ok()) return found.status().WithContext(where_);
    const std::shared_ptr<const RedisTablePlace>& place = *found;
    const RedisGroups groups(state_->layout(), keys, std::nullopt);
    std::vector<std::unique_ptr<RemoveKeysTask>> rows;
    std::vector<std::unique_ptr<RemoveKeysTask>> metadata;
    std::vector<RedisTask*> tasks;
    for (uint32_t i = 0; i < place->partitions.size(); ++i) {
      const auto members = groups.members(i);
      const RedisTablePlace::Partition& partition = place->partitions[i];
      ForEachPiece(members.size(), std::min<size_t>(batch_rows(), kMostWords), [&](size_t first, size_t count) {
        std::vector<Key> piece;
        piece.reserve(count);
        for (const uint32_t member : members.subspan(first, count)) piece.push_back(keys[member]);
        if (NeedsMetadata(overflow())) {
          metadata.push_back(std::make_unique<RemoveKeysTask>(MetadataOf(partition), piece));
          tasks.push_back(metadata.back().get());
        }
        rows.push_back(std::make_unique<RemoveKeysTask>(ValuesOf(partition), std::move(piece)));
        tasks.push_back(rows.back().get());
      });
    }
    const Status status = session_->cluster->Run(tasks, kNoDeadline);
    if (!status.ok()) return status.WithContext(where_);
    if (erased != nullptr) {
      for (const auto& task : rows) *erased += task->removed;
    }
    return OkStatus();
  }

  Status Scan(const ScanVisitor& visitor) const override {
    HPS_RETURN_IF_ERROR(session_->CheckOpen());
    for (uint32_t i = 0; i < state_->layout().num_partitions(); ++i) HPS_RETURN_IF_ERROR(ScanPartition(i, visitor));
    if (state_->place()->dropped) return OkStatus();
    return CheckThere(kNoDeadline, nullptr).WithContext(where_);
  }

  Result<TableStats> Stats() const override {
    HPS_RETURN_IF_ERROR(session_->CheckOpen());
    while (true) {
      const std::shared_ptr<const RedisTablePlace> place = state_->place();
      std::deque<RedisCommandTask> tasks;
      for (const RedisTablePlace::Partition& partition : place->partitions) {
        tasks.emplace_back(partition.values_slot, std::vector<std::string>{"HLEN", partition.values});
      }
      const Status status = session_->Run(tasks);
      if (!status.ok()) return status.WithContext(where_);
      if (!state_->IsCurrent(place)) continue;
      if (!place->dropped) HPS_RETURN_IF_ERROR(CheckThere(kNoDeadline, nullptr).WithContext(where_));
      TableStats stats;
      for (const RedisCommandTask& task : tasks) stats.rows += static_cast<uint64_t>(task.reply.integer);
      stats.evicted_rows = state_->evicted_rows;
      return stats;
    }
  }

 private:
  const OverflowOptions& overflow() const { return session_->options.overflow; }
  size_t batch_rows() const { return session_->options.max_set_batch_size; }
  RedisHash ValuesOf(const RedisTablePlace::Partition& partition) const {
    return {&partition.values, partition.values_slot, spec_.key_bytes};
  }
  RedisHash MetadataOf(const RedisTablePlace::Partition& partition) const {
    return {&partition.metadata, partition.metadata_slot, spec_.key_bytes};
  }

  Status CheckStride(size_t stride_bytes) const {
    if (stride_bytes >= spec_.row_bytes) return OkStatus();
    return InvalidArgument(where_ + ": rows are " + std::to_string(stride_bytes) + " bytes apart and " +
                           std::to_string(spec_.row_bytes) + " bytes long");
  }
  Status CheckKey(Key key) const {
    if (state_->layout().Holds(key)) return OkStatus();
    return OutOfRange(where_ + ": key " + std::to_string(key) +
                      " does not fit in 32 bits; set supportlonglong to true, and load the model again");
  }

  // The table's description is gone when another process dropped the table, and when Redis lost its contents; and it is
  // another one's when somebody has made the table anew. Missing rows say nothing then. Callers name the table.
  Status CheckThere(Deadline deadline, const std::atomic<bool>* cancelled,
                    RedisWhenAllRefuse when_all_refuse = RedisWhenAllRefuse::kWait) const {
    const std::string key = RedisDescriptionKey(spec_.name);
    RedisCommandTask task(RedisSlot(key), {"HMGET", key, "num_partitions", "dropping", "id"});
    RedisTask* const pointer = &task;
    const Status status = session_->cluster->Run(std::span(&pointer, 1), deadline, cancelled, when_all_refuse);
    HPS_RETURN_IF_ERROR(status);
    const std::vector<RedisReply>& fields = task.reply.elements;
    if (fields.size() == 3 && fields[0].kind == RedisReply::Kind::kString && fields[1].kind == RedisReply::Kind::kNil) {
      if (fields[2].text == state_->id()) return OkStatus();
      return Unavailable(
          "the table was replaced by another one of the same name: another process dropped it, or the servers lost "
          "their "
          "contents, and it was loaded anew; load the model again to use that one");
    }
    return Unavailable(
        "the table has vanished from Redis: another process dropped it, or the servers lost their contents or evict "
        "(set maxmemory-policy to noeviction); load the model again");
  }

  Result<std::shared_ptr<const RedisTablePlace>> PlaceToWrite() const {
    std::shared_ptr<const RedisTablePlace> place = state_->place();
    if (place->dropped) return FailedPrecondition("the table was dropped");
    HPS_RETURN_IF_ERROR(CheckThere(kNoDeadline, nullptr));
    return place;
  }

  Status FetchFrom(const RedisTablePlace& place, const FetchRequest& request, const RedisGroups& groups,
                   std::vector<uint8_t>& found) const {
    const FetchRowsTask::Target target = {.keys = request.keys,
                                          .positions = request.positions ? request.positions->data() : nullptr,
                                          .rows = request.rows,
                                          .row_bytes = spec_.row_bytes,
                                          .found = found.data()};
    // Enough commands that every connection of every node has one to work on and one that waits.
    const size_t nodes = std::max<size_t>(session_->cluster->topology()->masters.size(), 1);
    const size_t lanes = nodes * session_->options.num_node_connections;
    size_t most = std::max(found.size() / (2 * lanes), kFewestKeys);
    most = std::min({most, kMostWords, size_t{session_->options.max_get_batch_size},
                     std::max(RowsIn(kCommandBytes, spec_.row_bytes), kFewestKeys / 4)});
    std::deque<FetchRowsTask> tasks;
    for (uint32_t i = 0; i < place.partitions.size(); ++i) {
      const auto members = groups.members(i);
      ForEachPiece(members.size(), most, [&](size_t first, size_t count) {
        tasks.emplace_back(ValuesOf(place.partitions[i]), &target, members.subspan(first, count));
      });
    }
    return session_->Run(tasks, request.deadline, request.cancelled, RedisWhenAllRefuse::kFail);
  }

  void NoteReads(const FetchRequest& request, const std::vector<uint8_t>& found) const {
    std::vector<Key> keys;
    for (size_t i = 0; i < found.size(); ++i) {
      if (found[i] != 0) keys.push_back(request.keys[request.positions ? (*request.positions)[i] : i]);
    }
    if (keys.empty()) return;
    const size_t weight = keys.size();
    RedisSession* session = session_.get();  // the worker ends before the session
    (void)session_->worker.Offer(
        weight, [session, layout = state_->layout(), place = state_->place(), keys = std::move(keys)](bool dropped) {
          if (dropped || place->dropped || session->closed) return;
          std::vector<std::unique_ptr<RedisTask>> tasks;
          AppendAccessTasks(session->options.overflow, layout, *place, keys, &tasks);
          std::vector<RedisTask*> pointers;
          for (const auto& task : tasks) pointers.push_back(task.get());
          // Which rows are old need not be known exactly.
          (void)session->cluster->Run(pointers, steady_clock::now() + std::chrono::seconds(2));
        });
  }

  Status UpsertSlice(std::span<const Key> keys, ConstRowBuffer rows, const UpsertOptions& options) {
    HPS_ASSIGN_OR_RETURN(const std::shared_ptr<const RedisTablePlace> place, PlaceToWrite());
    // Commands of one partition may be carried out in any order: of a repeated key only one row is sent.
    const RedisGroups groups(state_->layout(), keys, std::nullopt);
    std::vector<uint32_t> order = groups.order;
    std::vector<RedisWrite> writes;
    writes.reserve(keys.size());
    std::vector<size_t> ends;
    for (uint32_t i = 0; i < place->partitions.size(); ++i) {
      const auto first = order.begin() + groups.begin[i];
      const auto last = order.begin() + groups.begin[i + 1];
      std::sort(first, last, [&](uint32_t a, uint32_t b) { return std::pair(keys[a], a) < std::pair(keys[b], b); });
      for (auto it = first; it != last; ++it) {
        const bool repeated = options.only_absent ? it != first && keys[*(it - 1)] == keys[*it]
                                                  : it + 1 != last && keys[*(it + 1)] == keys[*it];
        if (!repeated) writes.push_back({keys[*it], rows.data + *it * rows.stride_bytes});
      }
      ends.push_back(writes.size());
    }
    std::vector<std::unique_ptr<RedisTask>> tasks;
    const size_t most = std::min({batch_rows(), kMostWords, RowsIn(kCommandBytes, spec_.row_bytes)});
    for (uint32_t i = 0; i < place->partitions.size(); ++i) {
      const size_t begin = i == 0 ? 0 : ends[i - 1];
      const auto part = std::span<const RedisWrite>(writes).subspan(begin, ends[i] - begin);
      ForEachPiece(part.size(), most, [&](size_t first, size_t count) {
        tasks.push_back(std::make_unique<WriteRowsTask>(ValuesOf(place->partitions[i]), part.subspan(first, count),
                                                        spec_.row_bytes, options.only_absent));
      });
    }
    std::vector<Key> written;
    if (overflow().bounded()) {
      for (const RedisWrite& write : writes) written.push_back(write.key);
      AppendAccessTasks(overflow(), state_->layout(), *place, written, &tasks);
    }
    std::vector<RedisTask*> pointers;
    for (const auto& task : tasks) pointers.push_back(task.get());
    HPS_RETURN_IF_ERROR(session_->cluster->Run(pointers, kNoDeadline));
    if (!overflow().bounded()) return OkStatus();
    std::vector<WrittenPartition> filled;
    for (uint32_t i = 0; i < place->partitions.size(); ++i) {
      const size_t begin = i == 0 ? 0 : ends[i - 1];
      if (begin == ends[i]) continue;
      filled.push_back({&place->partitions[i], std::span<const Key>(written).subspan(begin, ends[i] - begin)});
    }
    return EvictOverflow(*session_, state_->layout(), filled, &state_->evicted_rows);
  }

  // A cursor means something only to the process that gave it. When the rows were moved, or the node changed or was
  // restarted, the partition is scanned again; what was visited before is left out.
  Status ScanPartition(uint32_t index, const ScanVisitor& visitor) const {
    RedisKeySet visited;
    std::vector<Key> keys;
    std::vector<std::byte> rows;
    const size_t count = std::clamp<size_t>(RowsIn(kScanBytes, spec_.row_bytes), 16, 4096);
    std::shared_ptr<const RedisTablePlace> place;
    std::string cursor = "0";
    std::string node;
    uint64_t generation = 0;
    while (true) {
      HPS_RETURN_IF_ERROR(session_->CheckOpen());
      if (place == nullptr) place = state_->place();
      ScanTask task(ValuesOf(place->partitions[index]), cursor, count);
      RedisTask* const pointer = &task;
      const Status status = session_->cluster->Run(std::span(&pointer, 1), kNoDeadline);
      if (!status.ok()) return status.WithContext(where_);
      const bool same = cursor == "0" || (task.answered_by == node && task.answered_generation == generation);
      node = task.answered_by;
      generation = task.answered_generation;
      const bool moved = !state_->IsCurrent(place);
      keys.clear();
      rows.clear();
      for (size_t i = 0; i + 1 < task.elements.size(); i += 2) {
        Key key = 0;
        if (!RawKey(task.elements[i], spec_.key_bytes, &key)) {
          return DataLoss(where_ + ": a key of " + std::to_string(task.elements[i].text.size()) + " bytes instead of " +
                          std::to_string(spec_.key_bytes));
        }
        const std::string& row = task.elements[i + 1].text;
        if (row.size() != spec_.row_bytes) {
          return DataLoss(where_ + ": key " + std::to_string(key) + " has a row of " + std::to_string(row.size()) +
                          " bytes instead of " + std::to_string(spec_.row_bytes));
        }
        if (!visited.Insert(key)) continue;
        keys.push_back(key);
        const auto* bytes = reinterpret_cast<const std::byte*>(row.data());
        rows.insert(rows.end(), bytes, bytes + row.size());
      }
      if (!keys.empty()) HPS_RETURN_IF_ERROR(visitor(keys, {rows.data(), spec_.row_bytes}));
      if (moved) place = nullptr;
      if (moved || !same) {
        cursor = "0";
        continue;
      }
      cursor = task.cursor;
      if (cursor == "0") return OkStatus();
    }
  }

  const std::shared_ptr<RedisSession> session_;
  const std::shared_ptr<RedisTableState> state_;
  const TableSpec spec_;
  const std::string where_;
};

}  // namespace

std::string RandomRedisId() {
  std::random_device random;
  return std::to_string((uint64_t{random()} << 32) | random());
}

std::shared_ptr<const RedisTablePlace> RedisTablePlace::Of(const RedisLayout& layout) {
  auto place = std::make_shared<RedisTablePlace>();
  for (uint32_t i = 0; i < layout.num_partitions(); ++i) {
    std::string values = layout.ValuesKey(i);
    std::string metadata = layout.MetadataKey(i);
    const uint16_t values_slot = RedisSlot(values);
    const uint16_t metadata_slot = RedisSlot(metadata);
    place->partitions.push_back({std::move(values), std::move(metadata), values_slot, metadata_slot});
  }
  return place;
}

std::shared_ptr<const RedisTablePlace> RedisTablePlace::Dropped(const RedisLayout& layout, std::string_view id) {
  auto place = std::make_shared<RedisTablePlace>(*Of(layout));
  place->dropped = true;
  for (uint32_t i = 0; i < layout.num_partitions(); ++i) place->partitions[i].values = layout.DroppedKey(i, id);
  return place;
}

Status RedisTableState::MoveAway() {
  const auto dropped = RedisTablePlace::Dropped(layout_, dropped_id_);
  std::lock_guard lock(mutex_);
  if (place_->dropped) return OkStatus();
  for (size_t i = 0; i < place_->partitions.size(); ++i) {
    const std::string& from = place_->partitions[i].values;
    const std::string& to = dropped->partitions[i].values;
    // An empty partition has no key. (A retry after a lost connection finds it moved already.)
    HPS_ASSIGN_OR_RETURN(const RedisReply there, session_->Call({"EXISTS", from}));
    if (there.integer == 0) continue;
    HPS_RETURN_IF_ERROR(session_->Call({"RENAME", from, to}).status());
    // If this process dies, Redis frees the rows.
    HPS_RETURN_IF_ERROR(session_->Call({"EXPIRE", to, std::string(kDroppedSeconds)}).status());
  }
  place_ = dropped;
  return OkStatus();
}

RedisTableState::RedisTableState(std::shared_ptr<RedisSession> session, RedisLayout layout, std::string name,
                                 std::string id)
    : session_(std::move(session)),
      layout_(std::move(layout)),
      name_(std::move(name)),
      id_(std::move(id)),
      dropped_id_(RandomRedisId()),
      place_(RedisTablePlace::Of(layout_)) {}

RedisTableState::~RedisTableState() {
  if (CheckNotForked(session_->fork_generation).ok()) FreeMoved();
}

void RedisTableState::FreeMoved() {
  std::lock_guard lock(mutex_);
  if (!place_->dropped || std::exchange(freed_, true)) return;
  RedisSession* session = session_.get();  // the worker ends before the session
  (void)session_->worker.Post([session, place = place_](bool) {
    std::deque<RedisCommandTask> tasks;
    for (const RedisTablePlace::Partition& partition : place->partitions) {
      tasks.emplace_back(partition.values_slot, std::vector<std::string>{"UNLINK", partition.values});
    }
    const Status status = session->Run(tasks, steady_clock::now() + std::chrono::seconds(2));
    if (!status.ok()) {
      Log(LogLevel::kWarning, session->Where() + ": a dropped table stays for a day: " + status.message());
    }
  });
}

std::shared_ptr<Table> MakeRedisTable(std::shared_ptr<RedisSession> session, std::shared_ptr<RedisTableState> state,
                                      TableSpec spec) {
  return std::make_shared<RedisTable>(std::move(session), std::move(state), std::move(spec));
}

}  // namespace hps
