// The folder of a RocksDB database: looked at, and made, before the database is opened, and watched while it is open.
//
// RocksDB holds its files open. It goes on writing when they have been deleted, and says that all is well.

#ifndef HPS_STORAGE_ROCKSDB_FOLDER_H_
#define HPS_STORAGE_ROCKSDB_FOLDER_H_

#include <sys/stat.h>

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>

#include "hps/status.h"

namespace hps {

inline constexpr const char* kRocksDbCurrentFile = "CURRENT";  // every database has one
// The remedy for what is damaged.
inline constexpr const char* kRestoreRocksDb = "; restore the folder, or delete it and load the model again";

// For messages: rocks_db "path".
std::string LocatedRocksDb(std::string_view path);
// An error of the file system: `what` was tried.
Status MapFileError(const std::error_code& error, const std::string& what);

// Makes the folder unless `read_only`; refuses what is no database. Returns its canonical path.
Result<std::string> PrepareRocksDbFolder(const std::filesystem::path& path, bool read_only);

// The names of the logs with something in them, for messages about damage that name no file.
std::string RocksDbLogFiles(const std::filesystem::path& folder);

// Thread safety: Check from any thread.
class OpenRocksDbFolder {
 public:
  // To be made when the database has been opened. Errors have `where` in front.
  static Result<std::unique_ptr<OpenRocksDbFolder>> Open(const std::filesystem::path& path, const std::string& where);
  ~OpenRocksDbFolder();
  OpenRocksDbFolder(const OpenRocksDbFolder&) = delete;
  OpenRocksDbFolder& operator=(const OpenRocksDbFolder&) = delete;

  // kDataLoss, with `where` in front, if the path does not lead to the database any more.
  Status Check(const std::string& where) const;

 private:
  OpenRocksDbFolder(std::filesystem::path path, int folder);

  const std::filesystem::path path_;
  const int folder_;  // holds the folder's number
  bool has_lock_ = false;
  struct stat lock_ = {};
};

}  // namespace hps

#endif  // HPS_STORAGE_ROCKSDB_FOLDER_H_
