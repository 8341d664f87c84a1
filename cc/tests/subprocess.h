// Child processes of a test. Servers (StartProgram) never outlive it: the kernel kills them when this process ends,
// however it ends. Commands (RunProgram) end by themselves, or when their time is up.
//
// Thread safety: all functions may be called from any thread.

#ifndef HPS_TESTS_SUBPROCESS_H_
#define HPS_TESTS_SUBPROCESS_H_

#include <sys/types.h>

#include <chrono>
#include <filesystem>
#include <string>
#include <vector>

#include "hps/status.h"

namespace hps::testing {

struct Program {
  std::string path;                           // looked up in PATH where it has no '/'
  std::vector<std::string> arguments;         // from argv[1] on
  std::string name = {};                      // argv[0]; empty: path
  std::vector<std::string> environment = {};  // "NAME=value", added to ours
  std::filesystem::path output = {};          // standard output and error are appended to this file
};

// Starts a program. The caller must wait for it (waitpid).
Result<pid_t> StartProgram(const Program& program);

struct Finished {
  int exit_code = -1;  // 128 + signal where a signal ended it
  std::string output;  // standard output and error
};

// Runs a program to its end; kDeadlineExceeded (and it is killed) after `timeout`.
Result<Finished> RunProgram(Program program, std::chrono::milliseconds timeout = std::chrono::seconds(30));

// Where `name` is found in PATH, or nothing.
std::string FindProgram(const std::string& name);

}  // namespace hps::testing

#endif  // HPS_TESTS_SUBPROCESS_H_
