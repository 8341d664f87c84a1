// TierRowSource: the tier stacks of a model's tables as the source of rows for caches.
//
// Thread safety: any number of threads at once. Ownership: keeps `owner` (the model) alive.

#ifndef HPS_CORE_TIER_ROW_SOURCE_H_
#define HPS_CORE_TIER_ROW_SOURCE_H_

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cc/cache/row_source.h"
#include "cc/core/tier_stack.h"

namespace hps {

// kOutOfRange where a key does not fit in 32 bits.
inline Status CheckShortKeys(std::span<const Key> keys) {
  for (const Key key : keys) {
    if (key == static_cast<int32_t>(key)) continue;
    return OutOfRange(
        "key " + std::to_string(key) +
        " does not fit in 32 bits; set \"supportlonglong\": true in the configuration to use 64-bit keys");
  }
  return OkStatus();
}

class TierRowSource final : public RowSource {
 public:
  // stacks[i] is table i. The executors outlive the source. Without long_keys (supportlonglong) keys beyond 32 bits are
  // kOutOfRange.
  TierRowSource(std::vector<const TierStack*> stacks, std::shared_ptr<const void> owner, Executor& executor,
                Executor& io_executor, bool long_keys = true)
      : stacks_(std::move(stacks)),
        owner_(std::move(owner)),
        executor_(&executor),
        io_executor_(&io_executor),
        long_keys_(long_keys) {}

  Status Fetch(std::span<const RowRequest> requests, const FetchLimits& limits, const RowsArrived& arrived,
               LookupReport* report) override {
    std::vector<TierWalk> walks(requests.size());
    for (size_t i = 0; i < requests.size(); ++i) {
      if (requests[i].table >= stacks_.size()) {
        return InvalidArgument("there is no table " + std::to_string(requests[i].table) + "; there are " +
                               std::to_string(stacks_.size()) + ", numbered from 0");
      }
      if (!long_keys_) HPS_RETURN_IF_ERROR(CheckShortKeys(requests[i].keys));
      walks[i].stack = stacks_[requests[i].table];
      walks[i].keys = requests[i].keys;
      walks[i].rows = requests[i].rows;
      walks[i].found = requests[i].found;
    }
    PieceOptions pieces;
    if (arrived) pieces = {.keys = PieceOf(walks), .streams = true, .done = &arrived};
    return FetchRows(walks, *executor_, *io_executor_, {limits.deadline, limits.cancelled}, report, pieces);
  }

 private:
  // A lookup on a device waits for these rows: the more threads fetch them, and the earlier their way to the device
  // begins, the better. But to wake threads takes some 40 us; what one thread does in little more it does alone.
  // Measured, it takes as long for a key's place in the index as for so many bytes of a row.
  static constexpr size_t kKeyCost = 256;
  static constexpr size_t kAloneCost = size_t{768} << 10;
  static constexpr size_t kPieceKeys = 256;
  static size_t PieceOf(const std::vector<TierWalk>& walks) {
    size_t keys = 0, cost = 0;
    for (const TierWalk& walk : walks) {
      keys += walk.keys.size();
      cost += walk.keys.size() * (kKeyCost + walk.stack->row_bytes());
    }
    return cost <= kAloneCost ? std::max<size_t>(keys, 1) : kPieceKeys;
  }

  const std::vector<const TierStack*> stacks_;
  const std::shared_ptr<const void> owner_;
  Executor* const executor_;
  Executor* const io_executor_;
  const bool long_keys_;
};

}  // namespace hps

#endif  // HPS_CORE_TIER_ROW_SOURCE_H_
