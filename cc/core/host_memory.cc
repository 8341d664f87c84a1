// Sources: proc(5) "MemAvailable"; Linux control groups v2 (memory.max, memory.current, memory.stat) and v1. The usage
// of a group counts pages of files, which the kernel gives back when memory is short: reading a large model must not
// make the host look full.

#include "cc/core/host_memory.h"

#include <algorithm>
#include <fstream>
#include <string>

namespace hps {
namespace {

std::optional<uint64_t> ReadNumber(const std::string& path) {
  std::ifstream file(path);
  uint64_t value = 0;
  if (file >> value) return value;  // "max" is no number: no limit
  return std::nullopt;
}

std::optional<uint64_t> HostAvailable(const std::string& path) {
  std::ifstream file(path);
  std::string name;
  uint64_t kibibytes = 0;
  std::string unit;
  while (file >> name >> kibibytes) {
    std::getline(file, unit);
    if (name == "MemAvailable:") return kibibytes * 1024;
  }
  return std::nullopt;
}

// `prefix` is that of the names of a group's own and all its children's pages in memory.stat.
uint64_t FilePages(const std::string& path, const std::string& prefix) {
  std::ifstream file(path);
  uint64_t total = 0;
  std::string name;
  uint64_t bytes = 0;
  while (file >> name >> bytes) {
    if (name == prefix + "inactive_file" || name == prefix + "active_file") total += bytes;
  }
  return total;
}

std::optional<uint64_t> GroupAvailable(const std::string& limit_path, const std::string& usage_path,
                                       uint64_t file_pages) {
  const std::optional<uint64_t> limit = ReadNumber(limit_path);
  const std::optional<uint64_t> usage = ReadNumber(usage_path);
  if (!limit || !usage) return std::nullopt;
  const uint64_t held = *usage - std::min(*usage, file_pages);
  return *limit - std::min(*limit, held);
}

}  // namespace

std::optional<uint64_t> AvailableMemoryBytes(const std::string& root) {
  const std::string v2 = root + "/sys/fs/cgroup/memory.";
  const std::string v1 = root + "/sys/fs/cgroup/memory/memory.";
  std::optional<uint64_t> available = HostAvailable(root + "/proc/meminfo");
  for (auto group : {GroupAvailable(v2 + "max", v2 + "current", FilePages(v2 + "stat", "")),
                     GroupAvailable(v1 + "limit_in_bytes", v1 + "usage_in_bytes", FilePages(v1 + "stat", "total_"))}) {
    if (group) available = std::min(available.value_or(*group), *group);
  }
  return available;
}

}  // namespace hps
