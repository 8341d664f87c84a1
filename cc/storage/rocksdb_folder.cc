// The folder's own number is compared while it is held open, so that no folder made later can have it. Its LOCK, which
// RocksDB holds open, tells a folder whose contents were exchanged; one that somebody has deleted tells nothing.

#include "cc/storage/rocksdb_folder.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "cc/base/system_limits.h"

namespace hps {
namespace {

namespace fs = std::filesystem;

// What an interrupted creation, or the system, may leave in a folder without a database.
bool MayLieInEmptyFolder(const std::string& name) {
  return name == "LOCK" || name == "IDENTITY" || name == "lost+found" || name.starts_with("LOG") ||
         name.starts_with("MANIFEST-") || name.ends_with(".dbtmp");
}

bool SameFile(const struct stat& a, const struct stat& b) { return a.st_ino == b.st_ino && a.st_dev == b.st_dev; }

}  // namespace

std::string LocatedRocksDb(std::string_view path) { return "rocks_db \"" + std::string(path) + "\""; }

Status MapFileError(const std::error_code& error, const std::string& what) {
  const std::string text = what + ": " + error.message();
  const bool no_space = error == std::errc::no_space_on_device || error.value() == EDQUOT;
  if (no_space) return ResourceExhausted(text + "; free disk space");
  if (auto limit = LimitReached(error.value(), text)) return *std::move(limit);
  if (error == std::errc::not_a_directory) return InvalidArgument(text + "; a part of the path is a file");
  return error == std::errc::io_error ? Unavailable(text) : FailedPrecondition(text);
}

Result<std::string> PrepareRocksDbFolder(const fs::path& path, bool read_only) {
  const std::string where = LocatedRocksDb(path.string());
  if (path.empty()) return InvalidArgument(where + ": the path is empty");
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::not_found) {
    if (read_only) return NotFound(where + ": no such folder, and read_only makes none");
    fs::create_directories(path, error);
    if (error) return MapFileError(error, where + ": cannot make the folder");
  } else if (error) {
    return MapFileError(error, where);
  } else if (status.type() != fs::file_type::directory) {
    return InvalidArgument(where + " is not a folder; name the folder of a RocksDB database, or one to be made");
  }
  if (!fs::exists(path / kRocksDbCurrentFile, error)) {
    std::string other;
    bool manifest = false;
    fs::directory_iterator entry(path, error);
    for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
      const std::string name = entry->path().filename().string();
      manifest |= name.starts_with("MANIFEST-");
      if (!MayLieInEmptyFolder(name)) other = name;
    }
    if (error) return MapFileError(error, where);
    if (!other.empty() && manifest) {
      return DataLoss(where + ": the file \"" + (path / kRocksDbCurrentFile).string() + "\" is missing" +
                      kRestoreRocksDb);
    }
    if (!other.empty()) {
      return InvalidArgument(where + " is not a RocksDB database and holds other things (\"" + other +
                             "\"); name an empty or a new folder");
    }
    if (read_only) return NotFound(where + ": the folder holds no database, and read_only makes none");
  }
  const fs::path canonical = fs::canonical(path, error);
  if (error) return MapFileError(error, where);
  return canonical.string();
}

std::string RocksDbLogFiles(const fs::path& folder) {
  std::string names;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error); !error && entry != fs::directory_iterator();
       entry.increment(error)) {
    if (entry->path().extension() != ".log" || entry->file_size(error) == 0) continue;
    names += (names.empty() ? "" : ", ") + entry->path().filename().string();
  }
  return names.empty() ? "no log" : names;
}

Result<std::unique_ptr<OpenRocksDbFolder>> OpenRocksDbFolder::Open(const fs::path& path, const std::string& where) {
  const int folder = ::open(path.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC);
  const std::error_code error(errno, std::generic_category());
  if (folder < 0) return MapFileError(error, where + ": cannot open the folder");
  return std::unique_ptr<OpenRocksDbFolder>(new OpenRocksDbFolder(path, folder));
}

OpenRocksDbFolder::OpenRocksDbFolder(fs::path path, int folder) : path_(std::move(path)), folder_(folder) {
  has_lock_ = ::stat((path_ / "LOCK").c_str(), &lock_) == 0;
}

OpenRocksDbFolder::~OpenRocksDbFolder() { ::close(folder_); }

Status OpenRocksDbFolder::Check(const std::string& where) const {
  struct stat own = {};
  struct stat named = {};
  if (::fstat(folder_, &own) != 0) return OkStatus();  // nothing to compare with
  bool gone = ::stat(path_.c_str(), &named) != 0 || !SameFile(own, named);
  if (!gone) gone = ::stat((path_ / kRocksDbCurrentFile).c_str(), &named) != 0;
  if (!gone && has_lock_ && ::stat((path_ / "LOCK").c_str(), &named) == 0) gone = !SameFile(lock_, named);
  if (!gone) return OkStatus();
  return DataLoss(where +
                  ": the folder was deleted or replaced while it was in use, so nothing can be stored there any "
                  "more, and rows are served out of files that are still open. Restore the folder if you need it, "
                  "then start again");
}

}  // namespace hps
