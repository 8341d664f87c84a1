// Reads a table folder in chunks with pread, never mapped: a file that shrinks under a mapping would kill the process.
//
// Invariant: while the caller works on one buffer, a thread reads the next chunk into the other; nobody else touches
// that buffer or next_row_ until the read has been waited for. Both files must keep size and modification time from
// the opening on.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <future>
#include <memory>
#include <utility>
#include <vector>

#include "cc/base/hash.h"
#include "cc/base/system_limits.h"
#include "hps/model_reader.h"

namespace hps {
namespace {

constexpr uint64_t kChunkBytes = uint64_t{4} << 20;
constexpr uint64_t kFingerprintBlocks = 64;  // per file
constexpr uint64_t kFingerprintBlockBytes = 4096;

class File {
 public:
  static Result<File> Open(std::string path);
  File(File&& other) noexcept
      : path_(std::move(other.path_)),
        descriptor_(std::exchange(other.descriptor_, -1)),
        bytes_(other.bytes_),
        modified_ns_(other.modified_ns_) {}
  File& operator=(File&&) = delete;
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  const std::string& path() const { return path_; }
  uint64_t bytes() const { return bytes_; }
  int64_t modified_ns() const { return modified_ns_; }

  // kDataLoss if the file ends before `size` bytes.
  Status ReadAt(uint64_t offset, void* data, size_t size) const;
  Status CheckUnchanged() const;
  void ExpectRandomReads() const { ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_RANDOM); }

 private:
  File(std::string path, int descriptor) : path_(std::move(path)), descriptor_(descriptor) {}

  std::string path_;
  int descriptor_;
  uint64_t bytes_ = 0;
  int64_t modified_ns_ = 0;
};

int64_t ModifiedNs(const struct stat& info) { return info.st_mtim.tv_sec * 1'000'000'000 + info.st_mtim.tv_nsec; }

Status SystemError(const std::string& path, int error) {
  const std::string text = path + ": " + std::strerror(error);
  if (error == ENOENT || error == ENOTDIR)
    return NotFound(text + "; a table folder holds the files key and emb_vector");
  if (error == EIO) return DataLoss(text);
  if (auto limit = LimitReached(error, text)) return *std::move(limit);
  return FailedPrecondition(text);
}

Result<File> File::Open(std::string path) {
  // O_NONBLOCK: to open a pipe that lies in a file's place would wait for its writer.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) return SystemError(path, errno);
  File file(std::move(path), descriptor);
  struct stat info;
  if (::fstat(descriptor, &info) != 0) return SystemError(file.path_, errno);
  if (!S_ISREG(info.st_mode)) return InvalidArgument(file.path_ + " is not a file");
  file.bytes_ = static_cast<uint64_t>(info.st_size);
  file.modified_ns_ = ModifiedNs(info);
  ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_SEQUENTIAL);
  return file;
}

Status File::ReadAt(uint64_t offset, void* data, size_t size) const {
  char* to = static_cast<char*>(data);
  while (size > 0) {
    const ssize_t count = ::pread(descriptor_, to, size, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return SystemError(path_, errno);
    if (count == 0) {
      return DataLoss(path_ + " shrank while it was read: it had " + std::to_string(bytes_) +
                      " bytes and now ends before " + std::to_string(offset + size) + "; write it again and reload");
    }
    to += count;
    offset += static_cast<uint64_t>(count);
    size -= static_cast<size_t>(count);
  }
  return OkStatus();
}

Status File::CheckUnchanged() const {
  struct stat info;
  if (::fstat(descriptor_, &info) != 0) return SystemError(path_, errno);
  if (static_cast<uint64_t>(info.st_size) == bytes_ && ModifiedNs(info) == modified_ns_) return OkStatus();
  return DataLoss(path_ + " was changed while it was read; write new versions beside it and rename, then reload");
}

struct TableFiles {
  File keys;
  File rows;
  uint64_t row_count;
};

Result<TableFiles> OpenTableFiles(const std::string& path, uint32_t width) {
  if (width == 0) return InvalidArgument(path + ": rows of width 0; embedding_vecsize_per_table is at least 1");
  HPS_ASSIGN_OR_RETURN(File keys, File::Open(path + "/key"));
  HPS_ASSIGN_OR_RETURN(File rows, File::Open(path + "/emb_vector"));
  for (const File* file : {&keys, &rows}) {
    if (file->bytes() == 0) return DataLoss(file->path() + " is empty; export the model again");
  }
  if (keys.bytes() % sizeof(Key) != 0) {
    return DataLoss(keys.path() + " has " + std::to_string(keys.bytes()) +
                    " bytes, no multiple of 8: it is truncated, or its keys are not int64; export the model again");
  }
  const uint64_t count = keys.bytes() / sizeof(Key);
  const uint64_t expected_bytes = count * width * sizeof(float);
  if (rows.bytes() != expected_bytes) {
    const std::string text = rows.path() + " has " + std::to_string(rows.bytes()) + " bytes and " + keys.path() + " " +
                             std::to_string(count) + " keys, which at width " + std::to_string(width) + " need " +
                             std::to_string(expected_bytes) + " bytes";
    if (rows.bytes() % (count * sizeof(float)) == 0) {
      return InvalidArgument(text + "; the files fit width " + std::to_string(rows.bytes() / (count * sizeof(float))) +
                             ": correct embedding_vecsize_per_table or the path");
    }
    return DataLoss(text + "; no width fits: a file is truncated, or they do not belong together");
  }
  return TableFiles{std::move(keys), std::move(rows), count};
}

class TableFolderReader final : public ModelReader {
 public:
  TableFolderReader(TableFiles files, uint32_t width)
      : files_(std::move(files)),
        row_bytes_(width * sizeof(float)),
        chunk_rows_(std::clamp<uint64_t>(kChunkBytes / (sizeof(Key) + row_bytes_), 1, files_.row_count)) {
    for (Buffer& buffer : buffers_) {
      buffer.keys = std::make_unique_for_overwrite<Key[]>(chunk_rows_);
      buffer.rows = std::make_unique_for_overwrite<std::byte[]>(chunk_rows_ * row_bytes_);
    }
  }
  ~TableFolderReader() override {
    if (pending_.valid()) pending_.wait();
  }

  uint64_t rows() const override { return files_.row_count; }
  size_t row_bytes() const override { return row_bytes_; }

  Result<RowChunk> Next() override {
    if (!pending_.valid()) StartRead();
    HPS_RETURN_IF_ERROR(pending_.get());
    Buffer& ready = buffers_[filling_];
    filling_ = 1 - filling_;
    if (next_row_ < files_.row_count) StartRead();
    return RowChunk{{ready.keys.get(), ready.count}, {ready.rows.get(), row_bytes_}};
  }

  Status Rewind() override {
    if (pending_.valid()) pending_.wait();
    pending_ = {};
    next_row_ = 0;
    return OkStatus();
  }

 private:
  struct Buffer {
    std::unique_ptr<Key[]> keys;
    std::unique_ptr<std::byte[]> rows;
    size_t count = 0;
  };

  // Without a thread to be had, the read takes place in Next.
  void StartRead() {
    pending_ = std::async(std::launch::async | std::launch::deferred, [this] { return Read(&buffers_[filling_]); });
  }

  Status Read(Buffer* buffer) {
    buffer->count = std::min(chunk_rows_, files_.row_count - next_row_);
    HPS_RETURN_IF_ERROR(files_.keys.ReadAt(next_row_ * sizeof(Key), buffer->keys.get(), buffer->count * sizeof(Key)));
    HPS_RETURN_IF_ERROR(files_.rows.ReadAt(next_row_ * row_bytes_, buffer->rows.get(), buffer->count * row_bytes_));
    HPS_RETURN_IF_ERROR(files_.keys.CheckUnchanged());
    HPS_RETURN_IF_ERROR(files_.rows.CheckUnchanged());
    next_row_ += buffer->count;
    return OkStatus();
  }

  const TableFiles files_;
  const size_t row_bytes_;
  const uint64_t chunk_rows_;
  std::array<Buffer, 2> buffers_;
  size_t filling_ = 0;
  uint64_t next_row_ = 0;
  std::future<Status> pending_;
};

// Hashes blocks spread evenly over the file, its first and last bytes among them; small files whole.
Result<uint64_t> HashBlocks(const File& file) {
  std::array<uint64_t, kFingerprintBlockBytes / sizeof(uint64_t)> words;
  const uint64_t blocks =
      std::min(kFingerprintBlocks, (file.bytes() + kFingerprintBlockBytes - 1) / kFingerprintBlockBytes);
  const uint64_t block_bytes = std::min(kFingerprintBlockBytes, file.bytes());
  uint64_t hash = file.bytes();
  for (uint64_t block = 0; block < blocks; ++block) {
    const uint64_t offset = blocks == 1 ? 0 : (file.bytes() - block_bytes) / (blocks - 1) * block;
    words.fill(0);
    const uint64_t last = file.bytes() - block_bytes;
    HPS_RETURN_IF_ERROR(file.ReadAt(block + 1 == blocks ? last : offset, words.data(), block_bytes));
    for (uint64_t word : words) hash = SlotHash(hash ^ word) + word;
  }
  return hash;
}

}  // namespace

Result<std::unique_ptr<ModelReader>> OpenTableFolder(const std::string& path, uint32_t width) {
  HPS_ASSIGN_OR_RETURN(TableFiles files, OpenTableFiles(path, width));
  return std::unique_ptr<ModelReader>(std::make_unique<TableFolderReader>(std::move(files), width));
}

Result<std::string> FingerprintTableFolder(const std::string& path, uint32_t width) {
  HPS_ASSIGN_OR_RETURN(const TableFiles files, OpenTableFiles(path, width));
  std::string text = "width " + std::to_string(width);
  for (const File* file : {&files.keys, &files.rows}) {
    HPS_ASSIGN_OR_RETURN(const uint64_t hash, HashBlocks(*file));
    HPS_RETURN_IF_ERROR(file->CheckUnchanged());
    text += ", " + std::to_string(file->bytes()) + " bytes of " + std::to_string(file->modified_ns()) + " ns " +
            std::to_string(hash);
  }
  return text;
}

Result<DenseKeys> CountDenseKeys(const std::string& path, uint64_t rows, uint64_t whole_rows) {
  constexpr uint64_t kBlockKeys = 1024;
  constexpr uint64_t kBlocks = 1024;
  if (rows == 0) return DenseKeys();
  HPS_ASSIGN_OR_RETURN(const File file, File::Open(path + "/key"));
  std::vector<Key> keys(kBlockKeys);
  const bool sampled = rows > std::max(whole_rows, kBlocks * kBlockKeys);
  if (sampled) file.ExpectRandomReads();
  const uint64_t blocks = sampled ? kBlocks : (rows + kBlockKeys - 1) / kBlockKeys;
  uint64_t seen = 0;
  DenseKeys found{.sampled = sampled};
  for (uint64_t block = 0; block < blocks; ++block) {
    const uint64_t first = sampled ? (rows - kBlockKeys) / (kBlocks - 1) * block : block * kBlockKeys;
    const uint64_t count = std::min(kBlockKeys, rows - first);
    HPS_RETURN_IF_ERROR(file.ReadAt(first * sizeof(Key), keys.data(), count * sizeof(Key)));
    seen += count;
    for (uint64_t i = 0; i < count; ++i) {
      const bool dense = static_cast<uint64_t>(keys[i]) < rows;
      found.rows += dense;
      if (!dense && first + i < rows / 16) found.others_early = true;
    }
  }
  if (sampled && found.rows == seen) {
    found.rows = rows;
  } else if (sampled) {
    found.rows =
        static_cast<uint64_t>(static_cast<double>(rows) * static_cast<double>(found.rows) / static_cast<double>(seen));
  }
  return found;
}

Result<uint64_t> CountDistinctKeys(const std::string& path, uint64_t rows, uint64_t keys_at_once) {
  constexpr uint64_t kBlockKeys = 8192;
  constexpr uint64_t kSpread = 0x9e3779b97f4a7c15;  // keys in a row go to different shares
  if (rows == 0) return uint64_t{0};
  HPS_ASSIGN_OR_RETURN(const File file, File::Open(path + "/key"));
  const uint64_t shares = (rows - 1) / std::max<uint64_t>(keys_at_once, 1) + 1;
  std::vector<Key> block(kBlockKeys);
  std::vector<Key> share_keys;
  uint64_t distinct = 0;
  for (uint64_t share = 0; share < shares; ++share) {
    share_keys.clear();
    for (uint64_t first = 0; first < rows; first += kBlockKeys) {
      const uint64_t count = std::min(kBlockKeys, rows - first);
      HPS_RETURN_IF_ERROR(file.ReadAt(first * sizeof(Key), block.data(), count * sizeof(Key)));
      for (uint64_t i = 0; i < count; ++i) {
        if (((static_cast<uint64_t>(block[i]) * kSpread) >> 32) % shares == share) share_keys.push_back(block[i]);
      }
    }
    std::sort(share_keys.begin(), share_keys.end());
    distinct += static_cast<uint64_t>(std::unique(share_keys.begin(), share_keys.end()) - share_keys.begin());
  }
  return distinct;
}

}  // namespace hps
