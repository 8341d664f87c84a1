// Combine: adds up the rows of each output row. The arithmetic half of a sparse lookup.

#ifndef HPS_CORE_COMBINE_H_
#define HPS_CORE_COMBINE_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "hps/lookup_session.h"

namespace hps {

struct CombineRequest {
  std::span<const std::byte* const> rows;  // (n) address of the float32 row of each key, never nullptr
  std::span<const int64_t> row_splits;     // (rows + 1), valid
  std::span<const float> weights;          // (n), or empty
  Combiner combiner = Combiner::kMean;
  size_t width = 0;
  float* output = nullptr;  // (rows, width)
};

// Writes the output rows [first, last). Semantics: SparseLookup in hps/lookup_session.h.
void Combine(const CombineRequest& request, size_t first, size_t last);

}  // namespace hps

#endif  // HPS_CORE_COMBINE_H_
