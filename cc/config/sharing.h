// What models that share a table folder ("share_tables") must have the same.
//
// Thread safety: functions of their arguments.

#ifndef HPS_CONFIG_SHARING_H_
#define HPS_CONFIG_SHARING_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "hps/config.h"
#include "hps/status.h"

namespace hps {

inline constexpr const char* kSharedRows = "rows";  // the table of a folder's model

// The model of one table that a model's table is part of, with caches on these devices.
ModelConfig SharedTableModel(const ModelConfig& model, const TableConfig& table, std::vector<int32_t> devices);

// The first key in which two such models differ, and what it is; of the keys about caches only where both have some.
struct SharingDifference {
  std::string key, there, here;
};
std::optional<SharingDifference> FirstDifference(const ModelConfig& there, const ModelConfig& here, bool caches);

// kInvalidArgument: the model `here` shares the folder with `there`, maybe itself, and they differ.
Status RefuseSharing(const SharingDifference& difference, const std::string& folder, const std::string& there,
                     const std::string& here);

// Of models that are to be loaded together, whether or not this machine has the devices they name.
Status CheckSharing(std::span<const ModelConfig> models);

}  // namespace hps

#endif  // HPS_CONFIG_SHARING_H_
