// Table loader: fills tables, from a model's files (LoadTable) or from another table (CopyTable), with progress and a
// report of what really happened.
//
// Rows are written as bulk upserts: call TableStore::Flush of a persistent target before recording that it is complete.
// After an error the targets hold a part of the rows and the report says how many.
// Thread safety: calls on different readers and targets are independent.

#ifndef HPS_LOADER_TABLE_LOADER_H_
#define HPS_LOADER_TABLE_LOADER_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "hps/model_reader.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

struct LoadProgress {
  uint64_t rows_done = 0;
  uint64_t rows_total = 0;  // an estimate where the source only estimates
  double seconds = 0.0;
  double rows_per_second = 0.0;
  double seconds_left = 0.0;
  bool finished = false;  // the last call of a load that succeeded
};

// Called at most twice a second, and once at the end.
using LoadProgressCallback = std::function<void(const LoadProgress&)>;

// A callback that writes lines through hps::Log once a load takes longer than two seconds: then one every ten seconds,
// and one at its end. Quick loads stay silent.
LoadProgressCallback LogLoadProgress(std::string table);

struct LoadOptions {
  std::string table;                             // names the table in errors, the warning and progress
  bool long_keys = true;                         // false: a key outside int32 is kOutOfRange
  std::vector<uint64_t> row_limits;              // per target, its first so many rows; empty: all rows
  LoadProgressCallback progress;                 // may be empty
  const std::atomic<bool>* cancelled = nullptr;  // true: the load ends soon, with kCancelled
};

struct LoadReport {
  uint64_t rows_read = 0;
  std::vector<uint64_t> rows_written;      // per target; a duplicate counts each time
  std::optional<uint64_t> duplicate_keys;  // known where a target without limit was empty and counts exactly
  uint64_t non_finite_rows = 0;            // rows with NaN or infinity: loaded as they are, one warning
  uint64_t bytes_read = 0;                 // keys and rows
  double seconds = 0.0;

  double rows_per_second() const { return seconds > 0.0 ? static_cast<double>(rows_read) / seconds : 0.0; }
};

// Reads all rows of `reader` (which is rewound first) once and upserts each chunk into every target. Later duplicates
// win. Reading stops early where every target has reached its limit.
// kInvalidArgument: a target's row_bytes differ from the reader's. kOutOfRange: see long_keys; names row and key.
Status LoadTable(ModelReader& reader, std::span<Table* const> targets, const LoadOptions& options, LoadReport* report);

// Copies rows of `from` that `to` does not have yet, at most row_limits[0] of them if given. Rows that `to` holds,
// or receives meanwhile, are newer and stay. rows_written counts rows offered to `to`.
Status CopyTable(const Table& from, Table& to, const LoadOptions& options, LoadReport* report);

}  // namespace hps

#endif  // HPS_LOADER_TABLE_LOADER_H_
