// SharedFile: a file of shared memory (/dev/shm), who is attached to it, and its memory.
//
// Who lives is known from locks that belong to an open file (fcntl's F_OFD_SETLK): the kernel drops them when a process
// ends, however it ends. One lock covers coming and going; one for each member is held for as long as it is attached.
// They work between containers that share /dev/shm, where process numbers say nothing. A child made by fork() closes
// its copy, so it does not keep its parent alive.
//
// Memory is taken from the system (posix_fallocate) before it is touched: a full /dev/shm is an error here, never
// SIGBUS.
//
// Thread safety: none, but MemberLives and the accessors may be called by any thread.

#ifndef HPS_STORAGE_SHARED_FILE_H_
#define HPS_STORAGE_SHARED_FILE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "hps/status.h"

namespace hps {

class SharedFile {
 public:
  static constexpr uint32_t kMaxMembers = 256;

  // Opens the file of that name, or makes an empty one, and takes the lock over coming and going.
  // kInvalidArgument: no name for a file. kFailedPrecondition: it is another user's, or no file that can be mapped.
  // kUnavailable: the lock was held for half a minute.
  static Result<std::unique_ptr<SharedFile>> OpenLocked(const std::string& name);
  // Lets go of everything; what the kernel does as well when the process dies.
  ~SharedFile();
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;

  const std::string& path() const { return path_; }  // for messages
  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

  // The lock over coming and going.
  Status Lock();
  void Unlock();

  // REQUIRES the lock, up to Remove.
  Result<uint64_t> FileBytes() const;
  Status Read(void* to, size_t bytes) const;  // the beginning; what the file has not is zeroed
  // Gives the file `bytes` zeros, for which no memory is taken yet.
  Status Reset(uint64_t bytes);
  Status Map(uint64_t bytes);
  bool AnyMemberLives() const;  // other than this one
  // Becomes the member of the lowest free number. kResourceExhausted if there is none.
  Result<uint32_t> Join();
  // Removes the name, unless it is another file's by now.
  Status Remove();

  // kDataLoss if the name was removed, or is another file's by now: nobody will attach to this one any more.
  Status CheckNamed() const;

  bool MemberLives(uint32_t member) const;  // of others; this one's own number is not seen

  // kResourceExhausted if the system has not so many bytes free now.
  Status CheckFree(uint64_t bytes) const;
  // Takes memory for [first, last) in steps of `step_bytes`. kResourceExhausted says what is free.
  Status Commit(uint64_t first, uint64_t last, uint64_t step_bytes) const;

 private:
  SharedFile(std::string name, int lock_file);

  Status NameError(int error, const std::string& what) const;
  Status NotFree(uint64_t bytes, const std::string& why) const;

  const std::string name_;  // as shm_open takes it
  const std::string path_;
  const int lock_file_;  // the locks' own open file: nothing else keeps it open
  const uint64_t fork_generation_;
  int file_ = -1;
  void* space_ = nullptr;  // address space that holds the mapping
  uint64_t space_bytes_ = 0;
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

}  // namespace hps

#endif  // HPS_STORAGE_SHARED_FILE_H_
