// Log lines for people: warnings, one-line information and progress. Errors travel as Status and are not logged here.

#ifndef HPS_LOG_H_
#define HPS_LOG_H_

#include <functional>
#include <string>
#include <string_view>

namespace hps {

enum class LogLevel { kInfo, kWarning };
using LogSink = std::function<void(LogLevel level, std::string_view line)>;

// Replaces the process's sink; the default writes "[hps] line" to standard error. Thread-safe.
void SetLogSink(LogSink sink);
void Log(LogLevel level, std::string_view line);

}  // namespace hps

#endif  // HPS_LOG_H_
