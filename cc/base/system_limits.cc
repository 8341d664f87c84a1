// Sources: getrlimit(2); Linux control groups v2 and v1, which both lie where a container sees its own.

#include "cc/base/system_limits.h"

#include <sys/mman.h>
#include <sys/resource.h>

#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace hps {
namespace {

std::optional<uint64_t> Limit(decltype(RLIMIT_AS) which) {
  rlimit limit = {};
  if (::getrlimit(which, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return std::nullopt;
  return limit.rlim_cur;
}

std::optional<uint64_t> GroupLimit(const char* v2, const char* v1) {
  for (const char* path : {v2, v1}) {
    std::ifstream file(path);
    uint64_t value = 0;
    if (file >> value && value < (uint64_t{1} << 60)) return value;  // "max", or a number for none
  }
  return std::nullopt;
}

// "; in force: a, b" of those that are there.
std::string LimitsText(const std::vector<std::string>& limits) {
  std::string text;
  for (const std::string& limit : limits) {
    if (!limit.empty()) text += (text.empty() ? "; in force: " : ", ") + limit;
  }
  return text;
}

std::string AddressSpace() {
  const std::optional<uint64_t> limit = Limit(RLIMIT_AS);
  return limit ? std::to_string(*limit >> 20) + " MiB of address space (RLIMIT_AS, ulimit -v)" : "";
}

std::string MemoryAdvice() {
  const std::optional<uint64_t> group =
      GroupLimit("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes");
  return LimitsText({AddressSpace(), group ? std::to_string(*group >> 20) + " MiB of the control group" : ""}) +
         "; raise the limit, or keep fewer rows in memory (`hps memory ps.json` does the sum)";
}

bool HasAddressSpace(size_t bytes) {
  void* space = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return space != MAP_FAILED && ::munmap(space, bytes) == 0;
}

}  // namespace

std::string LimitAdvice(int error) {
  if (error == EMFILE) {
    const std::optional<uint64_t> limit = Limit(RLIMIT_NOFILE);
    return "; the process may have " + (limit ? std::to_string(*limit) : std::string("no more")) +
           " open files (RLIMIT_NOFILE): raise that (ulimit -n, LimitNOFILE of a systemd unit, --ulimit nofile of a "
           "container)";
  }
  if (error == ENFILE) return "; the system has no more open files to give: raise the sysctl fs.file-max";
  if (error == EFBIG) {
    const std::optional<uint64_t> limit = Limit(RLIMIT_FSIZE);
    return limit ? "; files of this process may have " + std::to_string(*limit) +
                       " bytes (RLIMIT_FSIZE): raise that (ulimit -f, LimitFSIZE of a systemd unit)"
                 : "; the file system takes no larger files: use a folder on another one";
  }
  if (error == ENOMEM) return MemoryAdvice();
  return "";
}

std::optional<Status> LimitReached(int error, const std::string& text) {
  const std::string advice = LimitAdvice(error);
  if (advice.empty()) return std::nullopt;
  return ResourceExhausted(text + advice);
}

Status NoThreads(const std::string& what) {
  const std::optional<uint64_t> user = Limit(RLIMIT_NPROC);
  const std::optional<uint64_t> group = GroupLimit("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max");
  return ResourceExhausted(
      what + ": the system refuses to start a thread" +
      LimitsText({AddressSpace(), user ? std::to_string(*user) + " threads of this user (RLIMIT_NPROC, ulimit -u)" : "",
                  group ? std::to_string(*group) + " threads of the control group (pids.max)" : ""}) +
      "; raise the limit that was reached, or ask for fewer threads (persistent_db.num_threads)");
}

Status NoMemory(const std::string& what) {
  return ResourceExhausted(what + ": the system refuses more memory" + MemoryAdvice());
}

Status CaughtStatus(std::string_view what) {
  const std::string where(what);
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return NoMemory(where);
  } catch (const std::system_error& error) {
    const int code = error.code().value();
    if (code == EAGAIN) return NoThreads(where);
    const std::string text = where + ": " + error.what();
    return LimitReached(code, text).value_or(Internal(text));
  } catch (const std::exception& error) {
    return Internal(where + ": " + error.what());
  }
}

bool AddressSpaceIsLimited() { return Limit(RLIMIT_AS).has_value(); }

Status CheckThreads(size_t count, const std::string& what) {
  static const volatile size_t kSmall = 64;  // volatile: the allocation is what counts
  std::mutex mutex;                          // guards the next two
  size_t ready = 0;
  bool ended = false;
  std::condition_variable changed;
  bool all = true;
  std::vector<std::thread> threads;
  try {
    threads.reserve(count);
    while (threads.size() < count) {
      threads.emplace_back([&] {
        // A thread that allocates takes 64 MiB of address space for an arena, as those that are to come will do. Arenas
        // are handed on to later threads.
        std::free(std::malloc(kSmall));
        std::unique_lock lock(mutex);
        ++ready;
        changed.notify_all();
        changed.wait(lock, [&] { return ended; });
      });
    }
  } catch (const std::exception&) {
    all = false;
  }
  {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return ready == threads.size(); });
    // With room for an arena left none of the threads went without, so that later ones take no more address space.
    if (AddressSpaceIsLimited()) all = all && HasAddressSpace(size_t{256} << 20);
    ended = true;
  }
  changed.notify_all();
  for (std::thread& thread : threads) thread.join();
  return all ? OkStatus() : NoThreads(what);
}

}  // namespace hps
