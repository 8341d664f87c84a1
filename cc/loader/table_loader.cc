// One loop for every source: chunks come in, are checked, and go to each target in the order given.

#include "cc/loader/table_loader.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <limits>
#include <utility>

#include "hps/log.h"

namespace hps {
namespace {

constexpr double kProgressIntervalSeconds = 0.5;
constexpr double kFirstLineSeconds = 2.0;
constexpr double kLineIntervalSeconds = 10.0;

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string Named(const LoadOptions& options) { return "table \"" + options.table + "\""; }

class ProgressMeter {
 public:
  ProgressMeter(const LoadProgressCallback& callback, uint64_t rows_total)
      : callback_(callback), rows_total_(rows_total), start_(std::chrono::steady_clock::now()) {}

  void Add(uint64_t rows) {
    rows_done_ += rows;
    const double seconds = SecondsSince(start_);
    if (!callback_ || seconds - last_seconds_ < kProgressIntervalSeconds) return;
    last_seconds_ = seconds;
    Report(seconds, std::max(rows_done_, rows_total_), /*finished=*/false);
  }
  void Finish() {
    if (callback_) Report(SecondsSince(start_), rows_done_, /*finished=*/true);
  }

 private:
  void Report(double seconds, uint64_t rows_total, bool finished) {
    LoadProgress progress{.rows_done = rows_done_, .rows_total = rows_total, .seconds = seconds, .finished = finished};
    progress.rows_per_second = static_cast<double>(rows_done_) / std::max(seconds, 1e-9);
    if (rows_done_ > 0) progress.seconds_left = static_cast<double>(rows_total - rows_done_) / progress.rows_per_second;
    callback_(progress);
  }

  const LoadProgressCallback& callback_;
  const uint64_t rows_total_;
  const std::chrono::steady_clock::time_point start_;
  uint64_t rows_done_ = 0;
  double last_seconds_ = 0.0;
};

Status CheckWanted(const LoadOptions& options) {
  if (options.cancelled == nullptr || !options.cancelled->load(std::memory_order_relaxed)) return OkStatus();
  return Cancelled(Named(options) + ": the load was cancelled");
}

Status CheckKeys(std::span<const Key> keys, uint64_t first_row, const LoadOptions& options) {
  if (options.long_keys) return OkStatus();
  for (size_t i = 0; i < keys.size(); ++i) {
    if (keys[i] == static_cast<int32_t>(keys[i])) continue;
    return OutOfRange(Named(options) + ": row " + std::to_string(first_row + i) + " has key " +
                      std::to_string(keys[i]) +
                      ", which does not fit in 32 bits; set supportlonglong to true, or export keys within int32");
  }
  return OkStatus();
}

// Rows are float32 here; a float is NaN or infinite where all bits of its exponent are set.
bool HoldsNonFinite(const std::byte* values, size_t count) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t found = 0;
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i * sizeof(bits), sizeof(bits));
    found |= (bits & kExponent) == kExponent;
  }
  return found != 0;
}

uint64_t CountNonFiniteRows(ConstRowBuffer rows, size_t count, size_t row_bytes) {
  constexpr size_t kBlockRows = 64;  // nearly all rows are finite: look at them by blocks first
  const size_t width = row_bytes / sizeof(float);
  const bool packed = rows.stride_bytes == row_bytes;
  uint64_t result = 0;
  for (size_t first = 0; first < count; first += kBlockRows) {
    const size_t block_rows = std::min(kBlockRows, count - first);
    if (packed && !HoldsNonFinite(rows.data + first * row_bytes, block_rows * width)) continue;
    for (size_t i = first; i < first + block_rows; ++i) {
      result += HoldsNonFinite(rows.data + i * rows.stride_bytes, width);
    }
  }
  return result;
}

uint64_t RowLimit(const LoadOptions& options, size_t target) {
  return options.row_limits.empty() ? std::numeric_limits<uint64_t>::max() : options.row_limits[target];
}

Status CheckTargets(size_t row_bytes, std::span<Table* const> targets, const LoadOptions& options) {
  if (!options.row_limits.empty() && options.row_limits.size() != targets.size()) {
    return InvalidArgument(Named(options) + ": " + std::to_string(options.row_limits.size()) + " row limits for " +
                           std::to_string(targets.size()) + " targets; give one each, or none");
  }
  for (const Table* target : targets) {
    if (target->spec().row_bytes == row_bytes) continue;
    return InvalidArgument(Named(options) + ": rows of " + std::to_string(row_bytes) + " bytes do not fit " +
                           target->spec().name + ", whose rows have " + std::to_string(target->spec().row_bytes) +
                           "; create it with the same row_bytes");
  }
  return OkStatus();
}

std::optional<uint64_t> ExactRows(const Table& table) {
  const Result<TableStats> stats = table.Stats();
  if (!stats.ok() || stats->rows_estimated || stats->evicted_rows > 0) return std::nullopt;
  return stats->rows;
}

// A target by whose row count the duplicates among `rows` rows will be known, or nullptr.
const Table* FindCountingTarget(std::span<Table* const> targets, const LoadOptions& options, uint64_t rows) {
  for (size_t i = 0; i < targets.size(); ++i) {
    if (RowLimit(options, i) >= rows && ExactRows(*targets[i]) == uint64_t{0}) return targets[i];
  }
  return nullptr;
}

Status LoadRows(ModelReader& reader, std::span<Table* const> targets, const LoadOptions& options, LoadReport* report) {
  HPS_RETURN_IF_ERROR(CheckTargets(reader.row_bytes(), targets, options));
  uint64_t rows_wanted = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    rows_wanted = std::max(rows_wanted, std::min(reader.rows(), RowLimit(options, i)));
  }
  const Table* counting = FindCountingTarget(targets, options, reader.rows());
  ProgressMeter meter(options.progress, rows_wanted);
  HPS_RETURN_IF_ERROR(reader.Rewind());
  while (report->rows_read < rows_wanted) {
    HPS_ASSIGN_OR_RETURN(const RowChunk chunk, reader.Next());
    if (chunk.keys.empty()) break;
    HPS_RETURN_IF_ERROR(CheckWanted(options));
    HPS_RETURN_IF_ERROR(CheckKeys(chunk.keys, report->rows_read, options));
    for (size_t i = 0; i < targets.size(); ++i) {
      const uint64_t left = RowLimit(options, i) - report->rows_written[i];
      const std::span<const Key> keys = chunk.keys.first(std::min<uint64_t>(left, chunk.keys.size()));
      if (keys.empty()) continue;
      HPS_RETURN_IF_ERROR(targets[i]->Upsert(keys, chunk.rows, {.bulk = true}));
      report->rows_written[i] += keys.size();
    }
    report->non_finite_rows += CountNonFiniteRows(chunk.rows, chunk.keys.size(), reader.row_bytes());
    report->rows_read += chunk.keys.size();
    report->bytes_read += chunk.keys.size() * (sizeof(Key) + reader.row_bytes());
    meter.Add(chunk.keys.size());
  }
  meter.Finish();
  if (counting != nullptr) {
    if (const std::optional<uint64_t> rows = ExactRows(*counting)) report->duplicate_keys = report->rows_read - *rows;
  }
  if (report->non_finite_rows > 0) {
    Log(LogLevel::kWarning, Named(options) + ": " + std::to_string(report->non_finite_rows) + " of " +
                                std::to_string(report->rows_read) +
                                " rows hold NaN or infinity; they are served as they are");
  }
  return OkStatus();
}

Status CopyRows(const Table& from, Table& to, const LoadOptions& options, LoadReport* report) {
  Table* const targets[] = {&to};
  const size_t row_bytes = from.spec().row_bytes;
  HPS_RETURN_IF_ERROR(CheckTargets(row_bytes, targets, options));
  const uint64_t limit = RowLimit(options, 0);
  HPS_ASSIGN_OR_RETURN(const TableStats stats, from.Stats());
  ProgressMeter meter(options.progress, std::min(stats.rows, limit));
  bool full = limit == 0;
  Status status = full ? OkStatus() : from.Scan([&](std::span<const Key> keys, ConstRowBuffer rows) -> Status {
    HPS_RETURN_IF_ERROR(CheckWanted(options));
    keys = keys.first(std::min<uint64_t>(limit - report->rows_written[0], keys.size()));
    HPS_RETURN_IF_ERROR(CheckKeys(keys, report->rows_read, options));
    HPS_RETURN_IF_ERROR(to.Upsert(keys, rows, {.only_absent = true, .bulk = true}));
    report->rows_read += keys.size();
    report->rows_written[0] += keys.size();
    report->bytes_read += keys.size() * (sizeof(Key) + row_bytes);
    meter.Add(keys.size());
    full = report->rows_written[0] == limit;
    return full ? Cancelled("the row limit is reached") : OkStatus();
  });
  if (!full) HPS_RETURN_IF_ERROR(status);
  meter.Finish();
  return OkStatus();
}

// Runs a load around a fresh report and its clock.
template <typename Load>
Status Timed(size_t targets, LoadReport* report, Load&& load) {
  const auto start = std::chrono::steady_clock::now();
  *report = {};
  report->rows_written.assign(targets, 0);
  Status status = load();
  report->seconds = SecondsSince(start);
  return status;
}

}  // namespace

LoadProgressCallback LogLoadProgress(std::string table) {
  return [table = std::move(table), next_line_seconds = kFirstLineSeconds](const LoadProgress& progress) mutable {
    const bool spoken = next_line_seconds > kFirstLineSeconds;
    if (progress.seconds < next_line_seconds && !(progress.finished && spoken)) return;
    next_line_seconds = progress.seconds + kLineIntervalSeconds;
    char line[160];
    if (progress.finished) {
      std::snprintf(line, sizeof(line), ": %.2f M rows in %.1f s (%.2f M rows/s)", progress.rows_done * 1e-6,
                    progress.seconds, progress.rows_per_second * 1e-6);
    } else {
      std::snprintf(line, sizeof(line), ": %.2f of %.2f M rows (%.0f %%), %.2f M rows/s, %.0f s left",
                    progress.rows_done * 1e-6, progress.rows_total * 1e-6,
                    100.0 * static_cast<double>(progress.rows_done) / static_cast<double>(progress.rows_total),
                    progress.rows_per_second * 1e-6, progress.seconds_left);
    }
    Log(LogLevel::kInfo, (progress.finished ? "loaded " : "loading ") + table + line);
  };
}

Status LoadTable(ModelReader& reader, std::span<Table* const> targets, const LoadOptions& options, LoadReport* report) {
  return Timed(targets.size(), report, [&] { return LoadRows(reader, targets, options, report); });
}

Status CopyTable(const Table& from, Table& to, const LoadOptions& options, LoadReport* report) {
  return Timed(1, report, [&] { return CopyRows(from, to, options, report); });
}

}  // namespace hps
