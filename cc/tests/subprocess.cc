// PR_SET_PDEATHSIG speaks of the thread that forked, not of its process. So one thread that lives as long as the
// process forks for all others; a server started from a short-lived thread would otherwise die with that thread.

#include "cc/tests/subprocess.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <future>
#include <mutex>
#include <thread>

namespace hps::testing {
namespace {

class ForkThread {
 public:
  static ForkThread& Get() {
    static ForkThread& instance = *new ForkThread;  // never ends
    return instance;
  }

  pid_t Fork(const std::function<void()>& in_child) {
    std::promise<pid_t> pid;
    {
      std::lock_guard lock(mutex_);
      jobs_.push_back([&] {
        const pid_t parent = ::getpid();
        const pid_t child = ::fork();
        if (child == 0) {
          ::prctl(PR_SET_PDEATHSIG, SIGKILL);
          if (::getppid() != parent) ::_exit(127);  // it died before the line above
          in_child();
          ::_exit(127);
        }
        pid.set_value(child);
      });
    }
    changed_.notify_one();
    return pid.get_future().get();
  }

 private:
  ForkThread() {
    std::thread([this] { Run(); }).detach();
  }

  void Run() {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return !jobs_.empty(); });
      const std::function<void()> job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
};

struct Prepared {
  explicit Prepared(const Program& program) : more(program.environment) {
    path = program.path.find('/') == std::string::npos ? FindProgram(program.path) : program.path;
    words.push_back(program.name.empty() ? path : program.name);
    words.insert(words.end(), program.arguments.begin(), program.arguments.end());
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    for (std::string& entry : more) environment.push_back(entry.data());
    for (char** entry = environ; *entry != nullptr; ++entry) environment.push_back(*entry);
    environment.push_back(nullptr);
  }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  std::string path;  // empty: there is none
  std::vector<std::string> words, more;
  std::vector<char*> arguments, environment;
};

Status NoSuchProgram(const Program& program) {
  return NotFound("the program '" + program.path + "' is not in PATH; install its package");
}

// A server: dies with us.
Result<pid_t> Fork(const Program& program, int output) {
  Prepared prepared(program);  // everything that allocates comes before the fork: the child may call almost nothing
  if (prepared.path.empty()) return NoSuchProgram(program);
  const pid_t pid = ForkThread::Get().Fork([&] {
    // A test that ignores or blocks signals must not teach its children to.
    sigset_t none;
    ::sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    ::signal(SIGPIPE, SIG_DFL);
    const int nothing = ::open("/dev/null", O_RDONLY);
    if (nothing >= 0) ::dup2(nothing, STDIN_FILENO);
    ::dup2(output, STDOUT_FILENO);
    ::dup2(output, STDERR_FILENO);
    ::close_range(3, ~0u, 0);
    ::execve(prepared.path.c_str(), prepared.arguments.data(), prepared.environment.data());
  });
  if (pid < 0) return Unavailable("fork for " + prepared.path + " failed");
  return pid;
}

// A command that ends by itself. Unlike fork this copies no page tables, which under the sanitizers take a while.
Result<pid_t> Spawn(const Program& program, int output) {
  Prepared prepared(program);
  if (prepared.path.empty()) return NoSuchProgram(program);
  posix_spawn_file_actions_t files;
  ::posix_spawn_file_actions_init(&files);
  ::posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  ::posix_spawn_file_actions_adddup2(&files, output, STDOUT_FILENO);
  ::posix_spawn_file_actions_adddup2(&files, output, STDERR_FILENO);
  ::posix_spawn_file_actions_addclosefrom_np(&files, 3);
  posix_spawnattr_t attributes;
  ::posix_spawnattr_init(&attributes);
  sigset_t none, pipe;
  ::sigemptyset(&none);
  ::sigemptyset(&pipe);
  ::sigaddset(&pipe, SIGPIPE);
  ::posix_spawnattr_setsigmask(&attributes, &none);
  ::posix_spawnattr_setsigdefault(&attributes, &pipe);
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  pid_t pid = -1;
  const int error = ::posix_spawn(&pid, prepared.path.c_str(), &files, &attributes, prepared.arguments.data(),
                                  prepared.environment.data());
  ::posix_spawnattr_destroy(&attributes);
  ::posix_spawn_file_actions_destroy(&files);
  if (error != 0) return Unavailable("cannot start " + prepared.path + ": " + std::strerror(error));
  return pid;
}

}  // namespace

std::string FindProgram(const std::string& name) {
  const char* variable = std::getenv("PATH");
  std::string paths = variable == nullptr ? "" : variable;
  paths += ":/usr/sbin:/sbin";
  for (size_t begin = 0; begin <= paths.size();) {
    const size_t end = std::min(paths.find(':', begin), paths.size());
    const std::string candidate = paths.substr(begin, end - begin) + "/" + name;
    if (::access(candidate.c_str(), X_OK) == 0) return candidate;
    begin = end + 1;
  }
  return {};
}

Result<pid_t> StartProgram(const Program& program) {
  const std::string file = program.output.empty() ? "/dev/null" : program.output.string();
  const int output = ::open(file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (output < 0) return NotFound("cannot write " + file + ": " + std::strerror(errno));
  const Result<pid_t> pid = Fork(program, output);
  ::close(output);
  return pid;
}

Result<Finished> RunProgram(Program program, std::chrono::milliseconds timeout) {
  const auto end = std::chrono::steady_clock::now() + timeout;
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return ResourceExhausted(std::string("pipe: ") + std::strerror(errno));
  const Result<pid_t> pid = Spawn(program, ends[1]);
  ::close(ends[1]);
  if (!pid.ok()) {
    ::close(ends[0]);
    return pid.status();
  }
  Finished finished;
  bool in_time = true;
  for (char buffer[4096];;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
    pollfd readable{ends[0], POLLIN, 0};
    const int ready = left.count() <= 0 ? 0 : ::poll(&readable, 1, static_cast<int>(left.count()));
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) {
      in_time = false;
      ::kill(pid.value(), SIGKILL);
      break;
    }
    const ssize_t count = ::read(ends[0], buffer, sizeof(buffer));
    if (count <= 0) break;
    finished.output.append(buffer, static_cast<size_t>(count));
  }
  ::close(ends[0]);
  int status = 0;
  while (::waitpid(pid.value(), &status, 0) < 0 && errno == EINTR) {
  }
  if (!in_time) {
    return DeadlineExceeded(program.path + " did not end within " + std::to_string(timeout.count()) +
                            " ms; it had printed: " + finished.output);
  }
  finished.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return finished;
}

}  // namespace hps::testing
