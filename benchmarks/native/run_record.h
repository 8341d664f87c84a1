// What the native benchmarks say of a run: when, which commit, which machine.

#ifndef HPS_BENCHMARKS_NATIVE_RUN_RECORD_H_
#define HPS_BENCHMARKS_NATIVE_RUN_RECORD_H_

#include <cstdio>
#include <ctime>
#include <string>

namespace hps {

// The first line that a command prints, fit for a JSON string.
inline std::string Line(const char* command) {
  std::string text;
  FILE* pipe = ::popen(command, "r");
  for (int c = pipe == nullptr ? EOF : std::fgetc(pipe); c != EOF && c != '\n'; c = std::fgetc(pipe)) {
    if (c != '"') text += static_cast<char>(c);
  }
  if (pipe != nullptr) ::pclose(pipe);
  return text;
}

inline std::string UtcNow() {
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof(date), "%Y-%m-%d %H:%M UTC", std::gmtime(&now));
  return date;
}

inline std::string Commit() {
  const bool changed = !Line("git status --porcelain | head -1").empty();
  return Line("git rev-parse --short=12 HEAD") + (changed ? "+changes" : "");
}

inline std::string CpuName() { return Line("grep -m1 'model name' /proc/cpuinfo | sed 's/.*: //'"); }

}  // namespace hps

#endif  // HPS_BENCHMARKS_NATIVE_RUN_RECORD_H_
