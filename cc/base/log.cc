#include "hps/log.h"

#include <cstdio>
#include <mutex>

namespace hps {
namespace {

struct SinkHolder {
  std::mutex mutex;
  LogSink sink;
};

// Never destroyed: log lines may come from threads that outlive main.
SinkHolder& Holder() {
  static SinkHolder* holder = new SinkHolder;
  return *holder;
}

}  // namespace

void SetLogSink(LogSink sink) {
  std::lock_guard lock(Holder().mutex);
  Holder().sink = std::move(sink);
}

void Log(LogLevel level, std::string_view line) {
  LogSink sink;
  {
    std::lock_guard lock(Holder().mutex);
    sink = Holder().sink;
  }
  if (sink) {
    sink(level, line);
  } else {
    std::fprintf(stderr, "[hps] %s%.*s\n", level == LogLevel::kWarning ? "warning: " : "",
                 static_cast<int>(line.size()), line.data());
  }
}

}  // namespace hps
