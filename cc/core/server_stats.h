// Server statistics as a JSON object, for hps.stats() and people.

#ifndef HPS_CORE_SERVER_STATS_H_
#define HPS_CORE_SERVER_STATS_H_

#include <memory>
#include <string>
#include <vector>

#include "cc/core/model.h"
#include "cc/core/shared_tables.h"
#include "hps/config.h"

namespace hps {

std::string ServerStatsJson(const ServerConfig& config, const ServerResources& resources,
                            const std::vector<std::shared_ptr<ModelSlot>>& slots,
                            const std::vector<SharedTables::Held>& shared_tables);

}  // namespace hps

#endif  // HPS_CORE_SERVER_STATS_H_
