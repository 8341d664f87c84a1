// Looking at the shared memory of multi_process_hash_map from outside: without attaching to it, without its locks, and
// without changing a byte, so that no server notices.
//
// The file is read, never mapped: a file that shrinks meanwhile is an error here, not SIGBUS. Since no lock is taken,
// a table that is dropped or made at this moment may be listed or not; what is listed is checked for sense, and the
// walk ends at what makes none. Rows are counted as the tables count them, not looked at.
//
// Thread safety: plain functions.

#ifndef HPS_STORAGE_SHARED_INSPECTION_H_
#define HPS_STORAGE_SHARED_INSPECTION_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cc/storage/shared_layout.h"
#include "hps/status.h"

namespace hps {

struct SharedTableFound {
  std::string name;
  uint64_t row_bytes = 0;
  uint64_t rows = 0;
  uint64_t evicted_rows = 0;  // since the table was made
  uint64_t bytes = 0;         // of its blocks
};

struct SharedMemoryFound {
  uint64_t file_bytes = 0;
  uint64_t taken_bytes = 0;  // memory that the system has given to the file
  uint32_t user = 0;         // whose file it is: the user of the process that made it
  bool finished = false;     // false: its creation has not ended, or was cut short; the rest is not known
  SharedLayout layout;
  bool known_format = false;  // false: written by another version; the rest is not known
  bool auto_remove = false;
  uint32_t attachments = 0;         // so many processes have attached since it was made
  uint64_t used_bytes = 0;          // of blocks
  std::vector<uint32_t> processes;  // attached now; numbers as the processes see themselves (in their containers)
  std::vector<SharedTableFound> tables;
  std::vector<std::pair<std::string, std::string>> records;  // name, value
  std::string damage;                                        // what made no sense, empty: all did
};

// `path`: of the file, such as /dev/shm/NAME.
// kNotFound: there is none. kFailedPrecondition: it may not be read, or is no file. kInvalidArgument: a file of another
// program.
Result<SharedMemoryFound> InspectSharedMemory(const std::string& path);

}  // namespace hps

#endif  // HPS_STORAGE_SHARED_INSPECTION_H_
