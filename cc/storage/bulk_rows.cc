// A run is a file of records (place in stored order, row), sorted, each key once. Of equal keys the one of the newest
// run counts, and rows in memory are the newest of all.

#include "cc/storage/bulk_rows.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

#include "cc/base/system_limits.h"
#include "cc/storage/rocksdb_folder.h"
#include "cc/storage/row_copy.h"
#include "cc/storage/stored_order.h"

namespace hps {
namespace {

constexpr size_t kWriteBytes = size_t{1} << 20;
constexpr size_t kReadBytesTotal = size_t{64} << 20;  // of all cursors of all visits
constexpr size_t kReadBytesLeast = size_t{16} << 10;
constexpr size_t kReadBytesMost = size_t{1} << 20;
constexpr size_t kSamplesPerRun = 1024;
constexpr size_t kPrefetchRows = 8;

Status FileError(const std::string& where, const std::string& what, int error) {
  return MapFileError({error, std::generic_category()}, where + ": " + what);
}

}  // namespace

// ---- runs -----------------------------------------------------------------------------------------------------------

class BulkRows::Run {
 public:
  // Opens a file that has no name.
  static Result<std::unique_ptr<Run>> Create(const std::string& where, const std::filesystem::path& folder,
                                             size_t record_bytes) {
    std::error_code error;
    std::filesystem::create_directory(folder, error);  // not that of a database that was deleted
    if (error) return FileError(where, "cannot make \"" + folder.string() + "\"", error.value());
    std::string name = (folder / "run_XXXXXX").string();
    const int file = ::mkostemp(name.data(), O_CLOEXEC);
    if (file < 0) return FileError(where, "cannot write to \"" + folder.string() + "\"", errno);
    ::unlink(name.c_str());
    return std::unique_ptr<Run>(new Run(where + ": a sorted run in \"" + folder.string() + "\"", file, record_bytes));
  }
  ~Run() { ::close(file_); }

  // Writes the rows of sorted entries, which lie in `rows`, as the records of the run. Records are of one size, so
  // threads write pieces side by side.
  Status Fill(std::span<const KeyIndex> entries, const std::byte* rows, size_t threads) {
    records_ = entries.size();
    const size_t piece_records = std::max<size_t>(kWriteBytes / record_bytes_, 1);
    const size_t pieces = (entries.size() + piece_records - 1) / piece_records;
    std::atomic<size_t> next{0};
    std::mutex mutex;  // guards the next
    Status status;
    const auto work = [&] {
      std::unique_ptr<std::byte[]> buffer(new (std::nothrow) std::byte[piece_records * record_bytes_]);
      for (size_t piece; (piece = next++) < pieces;) {
        const size_t first = piece * piece_records;
        const auto some = entries.subspan(first, std::min(piece_records, entries.size() - first));
        Status written = buffer == nullptr ? NoMemory(where_) : WritePiece(some, first, rows, buffer.get());
        if (written.ok()) continue;
        std::lock_guard lock(mutex);
        if (status.ok()) status = std::move(written);
        next = pieces;
      }
    };
    std::vector<std::jthread> helpers;
    try {
      while (helpers.size() + 1 < std::min(threads, pieces)) helpers.emplace_back(work);
    } catch (const std::exception&) {  // no more threads: those that run do the work
    }
    work();
    helpers.clear();
    return status;
  }

  Status Read(uint64_t first, size_t count, std::byte* to) const {
    return ReadBytes(first * record_bytes_, count * record_bytes_, to);
  }
  // The first record that is not before `order`.
  Result<uint64_t> Find(uint64_t order) const {
    uint64_t first = 0, last = records_;
    while (first < last) {
      const uint64_t middle = first + (last - first) / 2;
      HPS_ASSIGN_OR_RETURN(const uint64_t found, OrderAt(middle));
      found < order ? first = middle + 1 : last = middle;
    }
    return first;
  }
  Result<uint64_t> OrderAt(uint64_t record) const {
    uint64_t order = 0;
    HPS_RETURN_IF_ERROR(ReadBytes(record * record_bytes_, sizeof(order), reinterpret_cast<std::byte*>(&order)));
    return order;
  }
  uint64_t records() const { return records_; }
  size_t record_bytes() const { return record_bytes_; }

 private:
  Run(std::string where, int file, size_t record_bytes)
      : where_(std::move(where)), file_(file), record_bytes_(record_bytes) {}
  Status WritePiece(std::span<const KeyIndex> entries, size_t first_record, const std::byte* rows,
                    std::byte* buffer) const {
    const size_t row_bytes = record_bytes_ - sizeof(uint64_t);
    std::byte* to = buffer;
    for (size_t i = 0; i < entries.size(); ++i, to += record_bytes_) {
      if (i + kPrefetchRows < entries.size())
        PrefetchRow(rows + entries[i + kPrefetchRows].index * row_bytes, row_bytes);
      const uint64_t order = StoredOrder(entries[i].key);
      std::memcpy(to, &order, sizeof(order));
      CopyRow(to + sizeof(order), rows + entries[i].index * row_bytes, row_bytes);
    }
    const size_t size = static_cast<size_t>(to - buffer);
    const uint64_t offset = first_record * record_bytes_;
    for (size_t done = 0; done < size;) {
      const ssize_t written = ::pwrite(file_, buffer + done, size - done, static_cast<off_t>(offset + done));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return FileError(where_, "cannot be written", errno);
      done += static_cast<size_t>(written);
    }
    return OkStatus();
  }
  Status ReadBytes(uint64_t offset, size_t count, std::byte* to) const {
    for (size_t done = 0; done < count;) {
      const ssize_t got = ::pread(file_, to + done, count - done, static_cast<off_t>(offset + done));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return FileError(where_, "cannot be read", errno);
      if (got == 0) return DataLoss(where_ + " is shorter than written; load the table again");
      done += static_cast<size_t>(got);
    }
    return OkStatus();
  }

  const std::string where_;
  const int file_;
  const size_t record_bytes_;
  uint64_t records_ = 0;
};

// ---- cursors --------------------------------------------------------------------------------------------------------

// The rows of one source in a range, in order.
class BulkRows::Cursor {
 public:
  virtual ~Cursor() = default;
  // Steps to the next row; false at the end.
  virtual Result<bool> Next() = 0;

  uint64_t order = 0;
  const std::byte* row = nullptr;
};

class BulkRows::MemoryCursor final : public Cursor {
 public:
  MemoryCursor(const BulkRows& rows, Range range) : rows_(rows) {
    next_ = std::lower_bound(rows.sorted_.begin(), rows.sorted_.end(), range.first,
                             [](const KeyIndex& entry, uint64_t order) { return StoredOrder(entry.key) < order; });
    end_ = std::upper_bound(next_, rows.sorted_.end(), range.last,
                            [](uint64_t order, const KeyIndex& entry) { return order < StoredOrder(entry.key); });
  }
  Result<bool> Next() override {
    if (next_ == end_) return false;
    if (end_ - next_ > static_cast<ptrdiff_t>(kPrefetchRows))
      PrefetchRow(RowOf(next_[kPrefetchRows]), rows_.row_bytes_);
    order = StoredOrder(next_->key);
    row = RowOf(*next_++);
    return true;
  }

 private:
  const std::byte* RowOf(const KeyIndex& entry) const { return rows_.rows_.data() + entry.index * rows_.row_bytes_; }
  const BulkRows& rows_;
  std::span<KeyIndex>::iterator next_, end_;
};

class BulkRows::RunCursor final : public Cursor {
 public:
  RunCursor(const Run& run, uint64_t first, uint64_t last, size_t buffer_bytes)
      : run_(run), next_(first), last_(last), buffer_(std::max(buffer_bytes, run.record_bytes())) {}
  Result<bool> Next() override {
    if (at_ == filled_) {
      const size_t count = std::min<uint64_t>(buffer_.size() / run_.record_bytes(), last_ - next_);
      if (count == 0) return false;
      HPS_RETURN_IF_ERROR(run_.Read(next_, count, buffer_.data()));
      next_ += count;
      at_ = 0;
      filled_ = count * run_.record_bytes();
    }
    std::memcpy(&order, buffer_.data() + at_, sizeof(order));
    row = buffer_.data() + at_ + sizeof(order);
    at_ += run_.record_bytes();
    return true;
  }

 private:
  const Run& run_;
  uint64_t next_;  // record
  const uint64_t last_;
  std::vector<std::byte> buffer_;
  size_t at_ = 0, filled_ = 0;  // bytes
};

// ---- the rows -------------------------------------------------------------------------------------------------------

BulkRows::BulkRows(std::string where, std::filesystem::path folder, size_t row_bytes, BulkMemory* memory,
                   size_t threads)
    : where_(std::move(where)), folder_(std::move(folder)), row_bytes_(row_bytes), memory_(memory), threads_(threads) {}

BulkRows::~BulkRows() { memory_->used_bytes -= charged_rows_ * BytesPerRow(); }

Status BulkRows::Allocate() {
  if (capacity_ > 0) return OkStatus();
  const size_t capacity = std::max<size_t>(memory_->limit_bytes / BytesPerRow(), 1);
  HPS_ASSIGN_OR_RETURN(rows_, AnonymousMemory::Allocate(capacity * row_bytes_, /*huge_pages=*/true));
  HPS_ASSIGN_OR_RETURN(entries_, AnonymousMemory::Allocate(2 * capacity * sizeof(KeyIndex), /*huge_pages=*/false));
  capacity_ = capacity;
  return OkStatus();
}

Status BulkRows::Add(std::span<const Key> keys, ConstRowBuffer rows) {
  HPS_RETURN_IF_ERROR(Allocate());
  if (!sorted_.empty()) {  // a visit has failed and rows go on coming
    std::copy(sorted_.begin(), sorted_.end(), Entries().begin());
    entry_count_ = sorted_.size();
    sorted_ = {};
  }
  const size_t least_rows = std::min(capacity_, BulkMemory::kLeastBytes / BytesPerRow());
  for (size_t i = 0; i < keys.size(); ++i) {
    if (count_ >= charged_rows_ && count_ < capacity_) {
      const size_t more = std::clamp<size_t>(least_rows, 1, capacity_ - charged_rows_);
      const size_t bytes = more * BytesPerRow();
      if (charged_rows_ == 0 || memory_->used_bytes + bytes <= memory_->limit_bytes) {
        memory_->used_bytes += bytes;
        charged_rows_ += more;
      }
    }
    if (count_ == charged_rows_) HPS_RETURN_IF_ERROR(Spill());
    CopyRow(rows_.data() + count_ * row_bytes_, rows.data + i * rows.stride_bytes, row_bytes_);
    Entries()[entry_count_++] = {keys[i], count_++};
  }
  return OkStatus();
}

void BulkRows::Sort() {
  if (entry_count_ == 0 || !sorted_.empty()) return;
  const std::span<KeyIndex> other = {Entries().data() + capacity_, entry_count_};
  const std::span<KeyIndex> sorted = SortStored(Entries().first(entry_count_), other);
  size_t kept = 0;
  for (size_t i = 0; i < sorted.size(); ++i) {
    if (i + 1 < sorted.size() && sorted[i].key == sorted[i + 1].key) continue;  // a later row follows
    sorted[kept++] = sorted[i];
  }
  sorted_ = sorted.first(kept);
}

Status BulkRows::Spill() {
  Sort();
  HPS_ASSIGN_OR_RETURN(std::unique_ptr<Run> run, Run::Create(where_, folder_, sizeof(uint64_t) + row_bytes_));
  HPS_RETURN_IF_ERROR(run->Fill(sorted_, rows_.data(), threads_));
  runs_.push_back(std::move(run));
  written_rows_ += count_;
  count_ = 0;
  entry_count_ = 0;
  sorted_ = {};
  return OkStatus();
}

Result<std::vector<BulkRows::Range>> BulkRows::Cut(size_t parts) const {
  constexpr uint64_t kEnd = std::numeric_limits<uint64_t>::max();
  // Samples stand for equally many rows, wherever they come from.
  const uint64_t step = std::max<uint64_t>(rows() / (kSamplesPerRun * (runs_.size() + 1)), 1);
  std::vector<uint64_t> samples;
  for (const std::unique_ptr<Run>& run : runs_) {
    for (uint64_t record = step / 2; record < run->records(); record += step) {
      HPS_ASSIGN_OR_RETURN(samples.emplace_back(), run->OrderAt(record));
    }
  }
  for (uint64_t entry = step / 2; entry < sorted_.size(); entry += step)
    samples.push_back(StoredOrder(sorted_[entry].key));
  std::sort(samples.begin(), samples.end());
  std::vector<Range> ranges;
  uint64_t first = 0;
  for (size_t part = 1; part < parts && !samples.empty(); ++part) {
    const uint64_t cut = samples[part * samples.size() / parts];
    if (cut <= first) continue;
    ranges.push_back({first, cut - 1});
    first = cut;
  }
  ranges.push_back({first, kEnd});
  return ranges;
}

Status BulkRows::Visit(Range range, const Visitor& visit) const {
  std::vector<std::unique_ptr<Cursor>> cursors;  // the later the newer
  const size_t buffer_bytes = std::clamp(kReadBytesTotal / (std::max<size_t>(threads_, 1) * (runs_.size() + 1)),
                                         kReadBytesLeast, kReadBytesMost);
  for (const std::unique_ptr<Run>& run : runs_) {
    HPS_ASSIGN_OR_RETURN(const uint64_t first, run->Find(range.first));
    uint64_t last = run->records();
    if (range.last < std::numeric_limits<uint64_t>::max()) {
      HPS_ASSIGN_OR_RETURN(last, run->Find(range.last + 1));
    }
    cursors.push_back(std::make_unique<RunCursor>(*run, first, last, buffer_bytes));
  }
  cursors.push_back(std::make_unique<MemoryCursor>(*this, range));

  // A heap of the cursors that have a row: the first in order on top, of equal ones the newest.
  std::vector<size_t> heap;
  const auto after = [&](size_t a, size_t b) {
    return cursors[a]->order != cursors[b]->order ? cursors[a]->order > cursors[b]->order : a < b;
  };
  for (size_t i = 0; i < cursors.size(); ++i) {
    HPS_ASSIGN_OR_RETURN(const bool more, cursors[i]->Next());
    if (more) heap.push_back(i);
  }
  std::make_heap(heap.begin(), heap.end(), after);
  bool any = false;
  uint64_t previous = 0;
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), after);
    Cursor& cursor = *cursors[heap.back()];
    if (!any || cursor.order != previous) HPS_RETURN_IF_ERROR(visit(KeyAtStoredOrder(cursor.order), cursor.row));
    any = true;
    previous = cursor.order;
    HPS_ASSIGN_OR_RETURN(const bool more, cursor.Next());
    if (more) {
      std::push_heap(heap.begin(), heap.end(), after);
    } else {
      heap.pop_back();
    }
  }
  return OkStatus();
}

}  // namespace hps
