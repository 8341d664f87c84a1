// The folder of a RocksDB database as the file system shows it, without RocksDB.
//
// Thread safety: functions of their arguments and of the folder.

#ifndef HPS_STORAGE_ROCKSDB_FOLDER_H_
#define HPS_STORAGE_ROCKSDB_FOLDER_H_

#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>

#include "cc/storage/rocksdb_store.h"
#include "hps/status.h"

namespace hps {

inline constexpr const char* kRocksDbCurrentFile = "CURRENT";  // every database has one
// The remedy for what is damaged.
inline constexpr const char* kRestoreRocksDb = "; restore the folder, or delete it and load the model again";

// How errors name a database.
std::string LocatedRocksDb(std::string_view path);
// An error of the file system: `what` was tried.
Status MapFileError(const std::error_code& error, const std::string& what);
// Makes the folder where that is asked for; refuses what is no database. Returns its canonical path.
Result<std::string> PrepareRocksDbFolder(const RocksDbOptions& options);
// The names of the logs with something in them, for messages about damage that name no file.
std::string RocksDbLogFiles(const std::filesystem::path& folder);

}  // namespace hps

#endif  // HPS_STORAGE_ROCKSDB_FOLDER_H_
