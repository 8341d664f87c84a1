// BulkRows: rows of one table on their way into sorted files. They come in any order, a later row of a key replacing an
// earlier one, and are visited in the order of the stored keys (little-endian bytes compared from the first), each key
// once.
//
// Memory is bounded: what does not fit is sorted and written to a file without a name in `folder`, which the kernel
// frees however the process ends. Visiting merges these runs; ranges may be visited by several threads at the same
// time. Thread safety: Add and Sort need the object for themselves; Cut and Visit are const.

#ifndef HPS_STORAGE_BULK_ROWS_H_
#define HPS_STORAGE_BULK_ROWS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cc/storage/anonymous_memory.h"
#include "cc/storage/stored_order.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

// What several BulkRows may hold in memory together. Each may hold kLeastBytes whatever the others do.
struct BulkMemory {
  static constexpr size_t kLeastBytes = size_t{8} << 20;

  const size_t limit_bytes;
  std::atomic<size_t> used_bytes{0};
};

class BulkRows {
 public:
  using Visitor = std::function<Status(const Key& key, const std::byte* row)>;
  // Positions in stored order: big-endian values of the keys' bytes. Both ends belong to it.
  struct Range {
    uint64_t first;
    uint64_t last;
  };
  static constexpr size_t kMaxRuns = 128;

  // `where` is for messages. `folder` need not exist before a run is written. `memory` outlives the object. `threads`
  // of its own write a run, and so many visits at a time are expected, which share the memory for reading runs.
  BulkRows(std::string where, std::filesystem::path folder, size_t row_bytes, BulkMemory* memory, size_t threads);
  ~BulkRows();
  BulkRows(const BulkRows&) = delete;
  BulkRows& operator=(const BulkRows&) = delete;

  // kResourceExhausted: no memory or disk space; rows added before stay, of these some may have come in.
  Status Add(std::span<const Key> keys, ConstRowBuffer rows);
  // To be called after the last Add, and before Cut and Visit.
  void Sort();
  // Disjoint ranges that cover everything, of about equally many rows; at most `parts`.
  Result<std::vector<Range>> Cut(size_t parts) const;
  Status Visit(Range range, const Visitor& visit) const;

  // Rows added, repetitions included.
  uint64_t rows() const { return written_rows_ + count_; }
  uint64_t bytes() const { return rows() * row_bytes_; }
  size_t row_bytes() const { return row_bytes_; }
  size_t runs() const { return runs_.size(); }

 private:
  class Run;
  class Cursor;
  class MemoryCursor;
  class RunCursor;
  Status Allocate();
  Status Spill();
  std::span<KeyIndex> Entries() { return {reinterpret_cast<KeyIndex*>(entries_.data()), 2 * capacity_}; }
  size_t BytesPerRow() const { return row_bytes_ + 2 * sizeof(KeyIndex); }

  const std::string where_;
  const std::filesystem::path folder_;
  const size_t row_bytes_;
  BulkMemory* const memory_;
  const size_t threads_;

  AnonymousMemory rows_;     // capacity_ rows
  AnonymousMemory entries_;  // key and row number; twice capacity_, because sorting needs another place
  size_t capacity_ = 0;
  size_t count_ = 0;            // rows in memory
  size_t entry_count_ = 0;      // fewer, where repetitions have been left out
  size_t charged_rows_ = 0;     // for which memory_ has been charged
  std::span<KeyIndex> sorted_;  // after Sort: entries in stored order, of each key the latest
  uint64_t written_rows_ = 0;
  std::vector<std::unique_ptr<Run>> runs_;  // the later the newer
};

}  // namespace hps

#endif  // HPS_STORAGE_BULK_ROWS_H_
