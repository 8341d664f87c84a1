// Invariant: nothing that was read is trusted as an offset, a length or a number of elements before it was compared
// with the size of the file and the most that the format has.

#include "cc/storage/shared_inspection.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <set>
#include <thread>

namespace hps {
namespace {

constexpr uint64_t kMostTextBytes = 64 << 20;
constexpr uint32_t kMostPartitions = 4096;
constexpr int kAttempts = 20;

class File {
 public:
  explicit File(int file) : file_(file) {}
  ~File() { ::close(file_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int number() const { return file_; }
  bool Read(uint64_t offset, void* to, size_t bytes) const {
    for (auto* at = static_cast<char*>(to); bytes > 0;) {
      const ssize_t got = ::pread(file_, at, bytes, static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return false;
      at += got;
      offset += static_cast<uint64_t>(got);
      bytes -= static_cast<size_t>(got);
    }
    return true;
  }

 private:
  const int file_;
};

// A structure of the file, with its atomic members, as bytes.
template <typename T>
class Copy {
 public:
  bool Read(const File& file, uint64_t offset) { return file.Read(offset, bytes_, sizeof(T)); }
  const T* operator->() const { return reinterpret_cast<const T*>(bytes_); }
  const T& operator*() const { return *reinterpret_cast<const T*>(bytes_); }

 private:
  alignas(T) std::byte bytes_[sizeof(T)];
};

class Inspection {
 public:
  Inspection(const File& file, SharedMemoryFound* found) : file_(file), found_(*found) {}

  void Walk() {
    auto header = std::make_unique<Copy<SharedHeader>>();
    if (!header->Read(file_, 0)) return Damaged("it ends within its header");
    const SharedHeader& there = **header;
    found_.used_bytes = there.used_units * kUnitBytes;
    for (uint32_t i = 0; i < SharedFile::kMaxMembers; ++i) {
      if (there.members[i].joined != 0 && Locked(1 + i)) found_.processes.push_back(there.members[i].process);
    }
    for (uint64_t at = there.first_table; at != 0 && found_.damage.empty();) at = Table(at);
    for (uint64_t at = there.first_record; at != 0 && found_.damage.empty();) at = Record(at);
  }

 private:
  void Damaged(const std::string& what) { found_.damage = what; }
  uint64_t End(const std::string& what) {
    Damaged(what);
    return 0;
  }
  bool Within(uint64_t offset, uint64_t bytes) const {
    return offset >= sizeof(SharedHeader) && offset <= found_.file_bytes && bytes <= found_.file_bytes - offset;
  }

  // A member's place is locked while its process lives.
  bool Locked(uint64_t place) const {
    struct flock range = {};
    range.l_type = F_WRLCK;
    range.l_whence = SEEK_SET;
    range.l_start = static_cast<off_t>(place);
    range.l_len = 1;
    return ::fcntl(file_.number(), F_OFD_GETLK, &range) == 0 && range.l_type != F_UNLCK;
  }

  // Adds the table at `offset`; returns the offset of the next one.
  uint64_t Table(uint64_t offset) {
    Copy<SharedTable> table;
    const std::string where = "the table at " + std::to_string(offset);
    if (!seen_.insert(offset).second) return End("its list of tables goes round");
    if (!Within(offset, sizeof(SharedTable)) || !table.Read(file_, offset)) return End(where + " is not in the file");
    const uint64_t fixed = sizeof(SharedTable) + uint64_t{table->num_partitions} * sizeof(SharedPartition);
    if (table->num_partitions == 0 || table->num_partitions > kMostPartitions || table->name_bytes > kMostTextBytes ||
        table->bytes != fixed + table->name_bytes || !Within(offset, table->bytes) || table->row_bytes == 0 ||
        table->first_bits < 2 || table->first_bits > 32) {
      return End(where + " makes no sense");
    }
    SharedTableFound added;
    added.name.resize(table->name_bytes);
    if (!file_.Read(offset + fixed, added.name.data(), added.name.size())) return End(where + " is not in the file");
    added.row_bytes = table->row_bytes;
    added.bytes = table->bytes;
    if (table->dense != 0) added.bytes += DenseLine::LinesFor(table->expected_rows) * sizeof(DenseLine);
    auto partition = std::make_unique<Copy<SharedPartition>>();
    for (uint32_t p = 0; p < table->num_partitions; ++p) {
      if (!partition->Read(file_, offset + sizeof(SharedTable) + p * sizeof(SharedPartition))) {
        return End(where + " is not in the file");
      }
      const SharedPartition& there = **partition;
      added.rows += there.rows;
      added.evicted_rows += there.evicted_rows;
      const uint64_t published = there.published;
      if (published != 0) added.bytes += there.index[published % 2].num_buckets * sizeof(HashBuckets::Bucket);
      for (size_t region = 0; region < SharedPartition::kMaxRegions; ++region) {
        if (there.regions[region] != 0) added.bytes += table->RegionBytes(region);
      }
    }
    if (table->dropped == 0) found_.tables.push_back(std::move(added));
    return table->next;
  }

  uint64_t Record(uint64_t offset) {
    Copy<SharedRecord> record;
    const std::string where = "the record at " + std::to_string(offset);
    if (!seen_.insert(offset).second) return End("its list of records goes round");
    if (!Within(offset, sizeof(SharedRecord)) || !record.Read(file_, offset)) return End(where + " is not in the file");
    if (record->name_bytes > kMostTextBytes || record->value_bytes > kMostTextBytes ||
        !Within(offset, sizeof(SharedRecord) + record->name_bytes + record->value_bytes)) {
      return End(where + " makes no sense");
    }
    std::string name(record->name_bytes, '\0');
    std::string value(record->value_bytes, '\0');
    const uint64_t text = offset + sizeof(SharedRecord);
    if (!file_.Read(text, name.data(), name.size()) || !file_.Read(text + name.size(), value.data(), value.size())) {
      return End(where + " is not in the file");
    }
    found_.records.emplace_back(std::move(name), std::move(value));
    return record->next;
  }

  const File& file_;
  SharedMemoryFound& found_;
  std::set<uint64_t> seen_;  // offsets of blocks
};

}  // namespace

Result<SharedMemoryFound> InspectSharedMemory(const std::string& path) {
  const int opened = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (opened < 0) {
    const std::string reason = std::strerror(errno);
    if (errno == ENOENT) return NotFound(path + " does not exist");
    return FailedPrecondition(path + " cannot be opened (" + reason + "); run as the user whose servers made it");
  }
  const File file(opened);
  struct stat info;
  if (::fstat(opened, &info) != 0) return FailedPrecondition(path + ": " + std::strerror(errno));
  if (S_ISDIR(info.st_mode)) return FailedPrecondition(path + " is a folder, and shared memory is a file");
  if (!S_ISREG(info.st_mode)) return FailedPrecondition(path + " is no file");
  SharedMemoryFound found;
  found.file_bytes = static_cast<uint64_t>(info.st_size);
  found.taken_bytes = static_cast<uint64_t>(info.st_blocks) * 512;
  found.user = info.st_uid;
  uint64_t magic = 0;
  (void)file.Read(0, &magic, sizeof(magic));
  if (magic == 0) return found;
  if (magic != SharedHeader::kMagic) return InvalidArgument(path + " is not shared memory of multi_process_hash_map");
  found.finished = true;
  if (!file.Read(offsetof(SharedHeader, layout), &found.layout, sizeof(found.layout))) {
    found.damage = "it ends within its header";
    return found;
  }
  found.known_format =
      found.layout.format == SharedLayout::kFormat && found.layout.mutex_bytes == sizeof(pthread_mutex_t);
  if (!found.known_format) return found;
  if (found.layout.bytes != found.file_bytes) {
    found.damage =
        "it has " + std::to_string(found.file_bytes) + " bytes and was made with " + std::to_string(found.layout.bytes);
  }
  uint32_t numbers[2] = {0, 0};
  static_assert(offsetof(SharedHeader, attachments) == offsetof(SharedHeader, auto_remove) + 4);
  if (file.Read(offsetof(SharedHeader, auto_remove), numbers, sizeof(numbers))) {
    found.auto_remove = numbers[0] != 0;
    found.attachments = numbers[1];
  }
  if (!found.damage.empty()) return found;
  // What is changed at this moment may look damaged; what is damaged looks so again.
  SharedMemoryFound walked = found;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    walked = found;
    Inspection(file, &walked).Walk();
    if (walked.damage.empty() || walked.processes.empty()) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return walked;
}

}  // namespace hps
