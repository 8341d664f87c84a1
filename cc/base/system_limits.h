// Errors at the limits of the process and its control group: which limit is in force, and what to do.
//
// Thread safety: all functions from several threads at once. They read the limits when they are called; they are for
// the way of errors, not of lookups.

#ifndef HPS_BASE_SYSTEM_LIMITS_H_
#define HPS_BASE_SYSTEM_LIMITS_H_

#include <cstddef>
#include <exception>
#include <optional>
#include <string>
#include <string_view>

#include "hps/status.h"

namespace hps {

// "; <the limit in force, and the remedy>" for an errno that says that a limit was reached (too many open files, a file
// too large, no memory); "" for all others. EAGAIN has many meanings: see NoThreads.
std::string LimitAdvice(int error);
// kResourceExhausted with `text` and the advice, where there is one.
std::optional<Status> LimitReached(int error, const std::string& text);

// kResourceExhausted: "<what>: the system refuses ...", with the limits in force.
Status NoThreads(const std::string& what);
Status NoMemory(const std::string& what);

// Whether RLIMIT_AS is set: then nobody can tell beforehand how many threads can be had, because each may reserve an
// arena.
bool AddressSpaceIsLimited();
// Whether `count` more threads could be started now; NoThreads(what) if not. For libraries that end the process, or are
// left unusable, where they get none.
Status CheckThreads(size_t count, const std::string& what);

// The Status for the exception that is being handled: memory or threads that the system refuses are kResourceExhausted,
// all else is kInternal. For `catch (const std::exception&)`.
Status CaughtStatus(std::string_view what);

// What body() returns, a Status or Result, or CaughtStatus(what) for what it throws.
template <typename Body>
auto WithinLimits(std::string_view what, Body&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::exception&) {
    return CaughtStatus(what);
  }
}

}  // namespace hps

#endif  // HPS_BASE_SYSTEM_LIMITS_H_
