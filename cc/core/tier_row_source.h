// TierRowSource: the tier stacks of a model's tables as the source of rows for caches.
//
// Thread safety: any number of threads at once. Ownership: keeps `owner` (the model) alive.

#ifndef HPS_CORE_TIER_ROW_SOURCE_H_
#define HPS_CORE_TIER_ROW_SOURCE_H_

#include <memory>
#include <utility>
#include <vector>

#include "cc/cache/row_source.h"
#include "cc/core/tier_stack.h"

namespace hps {

class TierRowSource final : public RowSource {
 public:
  // stacks[i] is table i. The executors outlive the source.
  TierRowSource(std::vector<const TierStack*> stacks, std::shared_ptr<const void> owner, Executor& executor,
                Executor& io_executor)
      : stacks_(std::move(stacks)), owner_(std::move(owner)), executor_(&executor), io_executor_(&io_executor) {}

  Status Fetch(std::span<const RowRequest> requests, const FetchLimits& limits, LookupReport* report) override {
    std::vector<TierWalk> walks(requests.size());
    for (size_t i = 0; i < requests.size(); ++i) {
      if (requests[i].table >= stacks_.size()) {
        return InvalidArgument("there is no table " + std::to_string(requests[i].table) + "; there are " +
                               std::to_string(stacks_.size()) + ", numbered from 0");
      }
      walks[i].stack = stacks_[requests[i].table];
      walks[i].keys = requests[i].keys;
      walks[i].rows = requests[i].rows;
      walks[i].found = requests[i].found;
    }
    return FetchRows(walks, *executor_, *io_executor_, {limits.deadline, limits.cancelled}, report);
  }

 private:
  const std::vector<const TierStack*> stacks_;
  const std::shared_ptr<const void> owner_;
  Executor* const executor_;
  Executor* const io_executor_;
};

}  // namespace hps

#endif  // HPS_CORE_TIER_ROW_SOURCE_H_
