// Invariants
// - Byte 0 of the lock file's lock range is the lock over coming and going, byte 1 + i the life of member i.
// - lock_file_ is opened once and neither duplicated nor mapped, so that closing it (also by the kernel) drops its
//   locks at once. A forked child closes its copy in a fork handler and touches nothing else.
// - The name is removed under the lock over coming and going; one who had opened the file before and gets the lock
//   later sees that the name is not this file's any more, and begins again.

#include "cc/storage/shared_file.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "cc/base/fork_guard.h"
#include "cc/base/system_limits.h"

namespace hps {
namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kHugePageBytes = 2 << 20;
constexpr int kMadvCollapse = 25;  // MADV_COLLAPSE, which older headers do not have
constexpr size_t kMaxNameBytes = 200;
constexpr auto kLockWait = std::chrono::seconds(30);

// Lock files that are open, plus one; 0: free. What does not fit is only kept open by forked children.
std::array<std::atomic<int>, 1024> lock_files;

void CloseLockFilesInChild() {
  for (std::atomic<int>& file : lock_files) {
    if (const int open = file.exchange(0); open != 0) ::close(open - 1);
  }
}
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, CloseLockFilesInChild);

void Remember(int lock_file) {
  for (std::atomic<int>& place : lock_files) {
    int free = 0;
    if (place.compare_exchange_strong(free, lock_file + 1)) return;
  }
}

void Forget(int lock_file) {
  for (std::atomic<int>& place : lock_files) {
    int open = lock_file + 1;
    if (place.compare_exchange_strong(open, 0)) return;
  }
}

struct flock LockRange(short type, uint64_t first, uint64_t count) {
  struct flock range = {};
  range.l_type = type;
  range.l_whence = SEEK_SET;
  range.l_start = static_cast<off_t>(first);
  range.l_len = static_cast<off_t>(count);
  return range;
}

bool TryLock(int file, uint64_t place) {
  struct flock range = LockRange(F_WRLCK, place, 1);
  return ::fcntl(file, F_OFD_SETLK, &range) == 0;
}

bool LockedByOthers(int file, uint64_t first, uint64_t count) {
  struct flock range = LockRange(F_WRLCK, first, count);
  return ::fcntl(file, F_OFD_GETLK, &range) == 0 && range.l_type != F_UNLCK;
}

std::string Error(int error) { return std::strerror(error); }

}  // namespace

SharedFile::SharedFile(std::string name, int lock_file)
    : name_(std::move(name)), path_("/dev/shm" + name_), lock_file_(lock_file), fork_generation_(ForkGeneration()) {
  Remember(lock_file_);
}

SharedFile::~SharedFile() {
  if (space_ != nullptr) ::munmap(space_, space_bytes_);
  if (file_ >= 0) ::close(file_);
  if (fork_generation_ != ForkGeneration()) return;  // closed when the child began; the number may be another's now
  Forget(lock_file_);
  ::close(lock_file_);
}

Status SharedFile::NameError(int error, const std::string& what) const {
  const std::string text = path_ + ": " + what + " (" + Error(error) + ")";
  return LimitReached(error, text).value_or(FailedPrecondition(text));
}

Result<std::unique_ptr<SharedFile>> SharedFile::OpenLocked(const std::string& name) {
  if (name.empty() || name.size() > kMaxNameBytes || name.find('/') != std::string::npos || name.front() == '.' ||
      name.find('\0') != std::string::npos) {
    return InvalidArgument("shared_memory_name \"" + name + "\" cannot be the name of shared memory; choose 1 to " +
                           std::to_string(kMaxNameBytes) + " characters without '/' that do not begin with '.'");
  }
  const std::string full_name = "/" + name;
  const auto end = std::chrono::steady_clock::now() + kLockWait;
  while (std::chrono::steady_clock::now() < end) {
    const int opened = ::shm_open(full_name.c_str(), O_RDWR | O_CREAT, 0600);
    if (opened < 0) {
      const int error = errno;
      const std::string path = "/dev/shm" + full_name;
      if (error == EACCES || error == EPERM) {
        struct stat info;
        const std::string owner =
            ::stat(path.c_str(), &info) == 0 ? " (it is that of user " + std::to_string(info.st_uid) + ")" : "";
        return FailedPrecondition("this user may not use " + path + owner +
                                  "; choose another shared_memory_name, or have its owner remove it");
      }
      struct stat there;
      if (::stat(path.c_str(), &there) == 0 && S_ISDIR(there.st_mode)) {
        return FailedPrecondition(path +
                                  " is a folder, and shared memory is a file; choose another "
                                  "shared_memory_name, or remove the folder");
      }
      if (error == ENOSPC) return ResourceExhausted(path + " cannot be made: /dev/shm is full; give it more memory");
      const std::string text = path + " cannot be opened (" + Error(error) + ")";
      return LimitReached(error, text)
          .value_or(FailedPrecondition(text + "; multi_process_hash_map needs a writable /dev/shm"));
    }
    std::unique_ptr<SharedFile> file(new SharedFile(full_name, opened));
    struct stat info;
    if (::fstat(opened, &info) != 0) return file->NameError(errno, "cannot be looked at");
    if (!S_ISREG(info.st_mode)) return FailedPrecondition(file->path_ + " is no shared memory; remove it");
    if (info.st_uid != ::geteuid()) {
      return FailedPrecondition(file->path_ + " belongs to user " + std::to_string(info.st_uid) +
                                "; choose another shared_memory_name, or have its owner remove it");
    }
    HPS_RETURN_IF_ERROR(file->Lock());
    if (::fstat(opened, &info) != 0) return file->NameError(errno, "cannot be looked at");
    // The open file that is mapped and grows. It tells at once whether the name still means the file that is locked.
    file->file_ = ::shm_open(full_name.c_str(), O_RDWR, 0600);
    if (file->file_ < 0 && errno != ENOENT) {
      Status failed = file->NameError(errno, "cannot be opened again");
      if (info.st_size == 0) (void)file->Remove();  // made just now, or left by a creator that died
      return failed;
    }
    struct stat again;
    if (file->file_ >= 0 && ::fstat(file->file_, &again) == 0 && again.st_ino == info.st_ino &&
        again.st_dev == info.st_dev) {
      return file;
    }
  }
  return Unavailable("/dev/shm" + full_name + " is made and removed all the time; try again");
}

Status SharedFile::Lock() {
  const auto end = std::chrono::steady_clock::now() + kLockWait;
  for (auto pause = std::chrono::microseconds(50); !TryLock(lock_file_, 0);) {
    if (errno != EAGAIN && errno != EACCES && errno != EINTR) return NameError(errno, "cannot be locked");
    if (std::chrono::steady_clock::now() > end) {
      return Unavailable(path_ + " has been locked by another process for " + std::to_string(kLockWait.count()) +
                         " seconds; is one that uses it stopped?");
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(5000));
  }
  return OkStatus();
}

void SharedFile::Unlock() {
  struct flock range = LockRange(F_UNLCK, 0, 1);
  (void)::fcntl(lock_file_, F_OFD_SETLK, &range);
}

Result<uint64_t> SharedFile::FileBytes() const {
  struct stat info;
  if (::fstat(file_, &info) != 0) return NameError(errno, "cannot be looked at");
  return static_cast<uint64_t>(info.st_size);
}

Status SharedFile::Read(void* to, size_t bytes) const {
  std::memset(to, 0, bytes);
  ssize_t got = -1;
  do {
    got = ::pread(file_, to, bytes, 0);
  } while (got < 0 && errno == EINTR);
  return got < 0 ? NameError(errno, "cannot be read") : OkStatus();
}

Status SharedFile::Reset(uint64_t bytes) {
  for (const uint64_t size : {uint64_t{0}, bytes}) {
    if (size > static_cast<uint64_t>(INT64_MAX) || ::ftruncate(file_, static_cast<off_t>(size)) != 0) {
      const int error = size > static_cast<uint64_t>(INT64_MAX) ? EOVERFLOW : errno;
      return ResourceExhausted(path_ + " cannot have " + std::to_string(size) + " bytes (" + Error(error) + ")" +
                               LimitAdvice(error) + "; or lower shared_memory_size");
    }
  }
  return OkStatus();
}

Status SharedFile::Map(uint64_t bytes) {
  const auto no_space = [&] {
    const int error = errno;
    return ResourceExhausted(path_ + ": no address space for shared_memory_size " + std::to_string(bytes) + " (" +
                             Error(error) + ")" + LimitAdvice(error));
  };
  // Address space first, to begin where a huge page can.
  const uint64_t space_bytes = bytes + kHugePageBytes;
  void* space = ::mmap(nullptr, space_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) return no_space();
  const auto begin = reinterpret_cast<uintptr_t>(space);
  const uintptr_t aligned = (begin + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  void* mapping =
      ::mmap(reinterpret_cast<void*>(aligned), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file_, 0);
  if (mapping == MAP_FAILED) {
    const Status status = no_space();
    ::munmap(space, space_bytes);
    return status;
  }
  space_ = space;
  space_bytes_ = space_bytes;
  data_ = static_cast<std::byte*>(mapping);
  bytes_ = bytes;
  return OkStatus();
}

bool SharedFile::AnyMemberLives() const { return LockedByOthers(lock_file_, 1, kMaxMembers); }
bool SharedFile::MemberLives(uint32_t member) const { return LockedByOthers(lock_file_, 1 + member, 1); }

Result<uint32_t> SharedFile::Join() {
  for (uint32_t member = 0; member < kMaxMembers; ++member) {
    if (TryLock(lock_file_, 1 + member)) return member;
  }
  return ResourceExhausted(path_ + " is in use by " + std::to_string(kMaxMembers) + " processes, the most it can have");
}

Status SharedFile::Remove() {
  struct stat own;
  struct stat named;  // without opening it, for there may be no more files to open
  if (::fstat(lock_file_, &own) != 0) return NameError(errno, "cannot be looked at");
  if (::stat(path_.c_str(), &named) != 0) return errno == ENOENT ? OkStatus() : NameError(errno, "cannot be looked at");
  const bool same = own.st_ino == named.st_ino && own.st_dev == named.st_dev;
  if (same && ::shm_unlink(name_.c_str()) != 0 && errno != ENOENT) return NameError(errno, "cannot be removed");
  return OkStatus();
}

Status SharedFile::CheckNamed() const {
  struct stat own;
  struct stat named;
  if (::fstat(file_, &own) != 0) return OkStatus();  // nothing to compare with
  if (::stat(path_.c_str(), &named) == 0 && own.st_ino == named.st_ino && own.st_dev == named.st_dev) return OkStatus();
  return DataLoss(path_ +
                  " was deleted or replaced while it was in use: this process goes on serving its rows, which are gone "
                  "with the last process that has it open, and servers that start now do not find them; restart all "
                  "servers that share it, one after the other");
}

Status SharedFile::NotFree(uint64_t bytes, const std::string& why) const {
  struct statvfs info = {};
  const uint64_t free = ::fstatvfs(file_, &info) == 0 ? uint64_t{info.f_bavail} * info.f_frsize : 0;
  return ResourceExhausted(path_ + ": " + std::to_string(bytes) + " bytes more are wanted and /dev/shm has " +
                           std::to_string(free) + " bytes free" + why +
                           "; give it more memory (in a container: raise --shm-size), or keep fewer rows in memory");
}

Status SharedFile::CheckFree(uint64_t bytes) const {
  struct statvfs info;
  const bool limited = ::fstatvfs(file_, &info) == 0 && info.f_blocks > 0;
  return limited && bytes > uint64_t{info.f_bavail} * info.f_frsize ? NotFree(bytes, "") : OkStatus();
}

Status SharedFile::Commit(uint64_t first, uint64_t last, uint64_t step_bytes) const {
  first = first / kPageBytes * kPageBytes;
  last = std::min((last + kPageBytes - 1) / kPageBytes * kPageBytes, bytes_);
  if (first >= last) return OkStatus();
  const uint64_t huge_first = first / kHugePageBytes * kHugePageBytes;
  // A system that is asked for far more than it has takes all of it before it says so.
  HPS_RETURN_IF_ERROR(CheckFree(last - first));
  const uint64_t step = std::max(step_bytes / kPageBytes * kPageBytes, kPageBytes);
  while (first < last) {
    const uint64_t bytes = std::min(step, last - first);
    const int error = ::posix_fallocate(file_, static_cast<off_t>(first), static_cast<off_t>(bytes));
    if (error == EINTR) continue;
    if (error == EFBIG) return NameError(error, "cannot grow");
    if (error != 0) return NotFree(last - first, " (" + Error(error) + ")");
    first += bytes;
  }
  // Huge pages halve the cost of a read. Shared memory gets them only when they are asked for afterwards (Linux 6.1);
  // where that is not possible everything works, with more misses of the address translation.
  const uint64_t huge_last = last / kHugePageBytes * kHugePageBytes;
  if (huge_first < huge_last) (void)::madvise(data_ + huge_first, huge_last - huge_first, kMadvCollapse);
  return OkStatus();
}

}  // namespace hps
