// One output row after the other: its rows are gathered, then added up in the order of the contract.

#include "cc/cache/host_pooling.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>

#include "cuda_kernels/device.h"

namespace hps {
namespace {

using cuda::Mistake;
using cuda::Pooling;

void Note(const cuda::PooledWorkspace& workspace, Mistake mistake, uint32_t part, uint64_t position) {
  workspace.words[1] = std::max(workspace.words[1], ~cuda::PackMistake(mistake, part, position));
}

// Adds up n rows, packed.
void PoolRows(const cuda::PooledPart& part, const float* rows, const float* weights, uint32_t n, float* output) {
  const size_t width = part.query.table.row_bytes / sizeof(float);
  double denominator = 1.0;
  if (weights != nullptr && part.pooling != Pooling::kSum) {
    denominator = 0.0;
    for (uint32_t i = 0; i < n; ++i) {
      const double weight = weights[i];
      denominator += part.pooling == Pooling::kMean ? weight : weight * weight;
    }
    if (part.pooling == Pooling::kSqrtn) denominator = std::sqrt(denominator);
  }
  for (size_t j = 0; j < width; ++j) {
    if (n == 0 || denominator == 0.0) {
      output[j] = 0.0f;
    } else if (weights != nullptr) {
      double sum = 0.0;
      for (uint32_t i = 0; i < n; ++i) sum += double{weights[i]} * double{rows[i * width + j]};
      output[j] = static_cast<float>(sum / denominator);
    } else {
      const uint32_t head = cuda::PooledHead(n);
      float sum = rows[j];
      for (uint32_t i = 1; i < head; ++i) sum += rows[i * width + j];
      for (uint32_t i = head; i < n; i += 8) {
        float block = rows[i * width + j];
        for (uint32_t k = 1; k < 8; ++k) block += rows[(i + k) * width + j];
        sum += block;
      }
      const auto count = static_cast<float>(n);
      const float divisor = part.pooling == Pooling::kSum    ? 1.0f
                            : part.pooling == Pooling::kMean ? count
                                                             : std::sqrt(count);
      output[j] = n < 10 ? sum * (1.0f / divisor) : sum / divisor;
    }
  }
}

// Calls body(row, first key, keys) for each output row; splits that lead outside are cut off.
void ForEachRow(const cuda::PooledPart& part, const std::function<void(uint32_t, uint32_t, uint32_t)>& body) {
  const int64_t count = part.query.count;
  for (uint32_t r = 0; r < part.rows; ++r) {
    const int64_t begin = std::clamp<int64_t>(part.row_splits[r], 0, count);
    const int64_t end = std::clamp<int64_t>(part.row_splits[r + 1], begin, count);
    body(r, static_cast<uint32_t>(begin), static_cast<uint32_t>(end - begin));
  }
}

void CheckRowSplits(const cuda::PooledPart& part, uint32_t number, const cuda::PooledWorkspace& workspace) {
  const int64_t* const splits = part.row_splits;
  if (splits[0] != 0 || splits[part.rows] != int64_t{part.query.count}) Note(workspace, Mistake::kEnds, number, 0);
  for (uint32_t r = 1; r <= part.rows; ++r) {
    if (splits[r] < splits[r - 1]) return Note(workspace, Mistake::kSplitsDescend, number, r);
  }
}

}  // namespace

int CheckSplits(const cuda::IndexPart* parts, int num_parts) {
  if (num_parts < 0 || num_parts > cuda::kMaxQueryParts) return cuda::kErrorInvalidValue;
  for (int i = 0; i < num_parts; ++i) {
    if (parts[i].rank < 1 || parts[i].rank > cuda::kMostRank) return cuda::kErrorInvalidValue;
  }
  return 0;
}

int CheckPooled(const std::vector<cuda::PooledPart>& parts, uint32_t stamp) {
  if (parts.size() > cuda::kMaxQueryParts || stamp == 0) return cuda::kErrorInvalidValue;
  uint64_t positions = 0;
  for (const cuda::PooledPart& part : parts) {
    if (CheckTable(part.query.table) != 0) return cuda::kErrorInvalidValue;
    positions += part.query.count;
  }
  return positions < cuda::kHasMistake ? 0 : cuda::kErrorInvalidValue;
}

void HostWiden(const std::vector<cuda::WidenPart>& parts) {
  for (const cuda::WidenPart& part : parts) {
    for (size_t i = 0; i < part.count; ++i) part.to[i] = part.from[i * part.stride];
  }
}

void HostSplits(const std::vector<HostIndexPart>& parts, const cuda::PooledWorkspace& workspace) {
  for (const auto& [part, bounds] : parts) {
    for (uint64_t i = 0; i < part.count; ++i) {
      const int64_t* const index = part.indices + i * part.rank;
      for (uint32_t j = 0; j < part.rank; ++j) {
        if (index[j] < 0 || index[j] >= bounds[j]) Note(workspace, Mistake::kOutside, part.part, i);
      }
      if (i > 0 && index[0] < *(index - part.rank)) Note(workspace, Mistake::kIndicesDescend, part.part, i);
    }
    part.row_splits[0] = 0;
    part.row_splits[part.rows] = part.count;
    for (int64_t r = 1; r < int64_t{part.rows}; ++r) {  // the first key of row r or a later one
      uint64_t low = 0, high = part.count;
      while (low < high) {
        const uint64_t middle = (low + high) / 2;
        if (part.indices[middle * part.rank] < r) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      part.row_splits[r] = static_cast<int64_t>(low);
    }
  }
}

void HostPooledQuery(const std::vector<cuda::PooledPart>& parts, const cuda::PooledWorkspace& workspace, uint32_t stamp,
                     BucketLocks& locks) {
  uint32_t missing = 0;
  uint64_t missing_parts = 0;
  std::vector<float> rows;
  for (size_t p = 0; p < parts.size(); ++p) {
    if (!parts[p].from_indices) CheckRowSplits(parts[p], static_cast<uint32_t>(p), workspace);
  }
  for (size_t p = 0; p < parts.size() && workspace.words[1] == 0; ++p) {
    const cuda::PooledPart& part = parts[p];
    const cuda::QueryPart& query = part.query;
    const size_t width = query.table.row_bytes / sizeof(float);
    ForEachRow(part, [&](uint32_t r, uint32_t first, uint32_t n) {
      rows.resize(n * width);
      for (uint32_t i = 0; i < n; ++i) {
        float* const row = rows.data() + i * width;
        if (HostReadRow(query.table, query.keys[first + i], row, locks)) continue;
        std::fill_n(row, width, query.default_value);
        if (query.table.whole) {
          std::atomic_ref(query.table.activity->untold_missing).fetch_add(1, std::memory_order_relaxed);
        } else {
          ++missing;
          missing_parts |= uint64_t{1} << p;
        }
      }
      PoolRows(part, rows.data(), part.weights == nullptr ? nullptr : part.weights + first, n, part.output + r * width);
    });
  }
  const uint64_t mistake = workspace.words[1] == 0 ? 0 : ~workspace.words[1];
  workspace.words[1] = 0;
  workspace.result->missing_parts = missing_parts;
  workspace.result->mistake = mistake;
  std::atomic_ref(workspace.result->done)
      .store((uint64_t{stamp} << 32) | missing | (mistake == 0 ? 0 : cuda::kHasMistake), std::memory_order_release);
}

void HostPool(const std::vector<cuda::PooledPart>& parts) {
  for (const cuda::PooledPart& part : parts) {
    const size_t width = part.query.table.row_bytes / sizeof(float);
    const auto* const rows = static_cast<const float*>(part.query.output);
    ForEachRow(part, [&](uint32_t r, uint32_t first, uint32_t n) {
      PoolRows(part, rows + first * width, part.weights == nullptr ? nullptr : part.weights + first, n,
               part.output + r * width);
    });
  }
}

}  // namespace hps
