// How much memory this process may still take, so that a load that cannot fit is refused before it begins.

#ifndef HPS_CORE_HOST_MEMORY_H_
#define HPS_CORE_HOST_MEMORY_H_

#include <cstdint>
#include <optional>
#include <string>

namespace hps {

// Bytes available to this process: the smaller of the host's MemAvailable and what its control group leaves, where file
// pages count as free. Absent where neither can be read. `root` stands before "/proc" and "/sys".
std::optional<uint64_t> AvailableMemoryBytes(const std::string& root = "");

}  // namespace hps

#endif  // HPS_CORE_HOST_MEMORY_H_
