// A database is known by its file CURRENT; without one only what an interrupted creation leaves may be there.

#include "cc/storage/rocksdb_folder.h"

#include "cc/base/system_limits.h"

namespace hps {
namespace {

namespace fs = std::filesystem;

// What an interrupted creation, or the system, may leave in a folder without a database.
bool MayLieInEmptyFolder(const std::string& name) {
  return name == "LOCK" || name == "IDENTITY" || name == "lost+found" || name.starts_with("LOG") ||
         name.starts_with("MANIFEST-") || name.ends_with(".dbtmp");
}

}  // namespace

std::string LocatedRocksDb(std::string_view path) { return "rocks_db \"" + std::string(path) + "\""; }

Status MapFileError(const std::error_code& error, const std::string& what) {
  const std::string text = what + ": " + error.message();
  if (error == std::errc::no_space_on_device) return ResourceExhausted(text + "; free disk space");
  if (auto limit = LimitReached(error.value(), text)) return *std::move(limit);
  if (error == std::errc::not_a_directory) return InvalidArgument(text + "; a part of the path is a file");
  return FailedPrecondition(text);
}

Result<std::string> PrepareRocksDbFolder(const RocksDbOptions& options) {
  const std::string where = LocatedRocksDb(options.path);
  if (options.path.empty()) return InvalidArgument(where + ": the path is empty");
  const fs::path path(options.path);
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::not_found) {
    if (options.read_only) return NotFound(where + ": no such folder, and read_only makes none");
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
    if (options.read_only) return NotFound(where + ": the folder holds no database, and read_only makes none");
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

}  // namespace hps
