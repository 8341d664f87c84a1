// Status and Result: how every fallible call of the library reports its outcome.
//
// A missing key is data and never an error. Everything else that goes wrong is a Status with a closed list of codes;
// it carries a message that says what failed, where, and what to do instead. No function of the library throws across
// its interface, and third-party exceptions are caught in the adapter that called the library.
//
// Thread safety: values; a const Status or Result may be read from several threads.

#ifndef HPS_STATUS_H_
#define HPS_STATUS_H_

#include <cassert>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace hps {

enum class StatusCode {
  kOk = 0,
  kInvalidArgument,     // the caller's value is wrong whatever the state of the system
  kNotFound,            // a model, table, file or database that was named does not exist
  kAlreadyExists,       // the name is taken
  kFailedPrecondition,  // the system is in the wrong state; the caller must change it first
  kOutOfRange,          // an index or key lies outside what the configuration allows
  kResourceExhausted,   // memory, disk or a pool is used up
  kUnavailable,         // a server or lock that may come back; retry with back-off
  kDeadlineExceeded,    // not done in time; the answer was not written
  kCancelled,           // the caller gave up
  kDataLoss,            // stored data is damaged or truncated
  kUnimplemented,       // known, but not built (into this binary)
  kInternal,            // a broken invariant of ours
};

std::string_view StatusCodeName(StatusCode code);

// True where the same call may succeed later without any change by the caller.
bool IsRetryable(StatusCode code);

class [[nodiscard]] Status {
 public:
  Status() = default;  // OK
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

  // The same error with "context: " put before its message; OK stays OK. One layer adds context once.
  Status WithContext(std::string_view context) const;

  // "InvalidArgument: message", or "OK".
  std::string ToString() const;

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status OkStatus() { return Status(); }
Status InvalidArgument(std::string message);
Status NotFound(std::string message);
Status AlreadyExists(std::string message);
Status FailedPrecondition(std::string message);
Status OutOfRange(std::string message);
Status ResourceExhausted(std::string message);
Status Unavailable(std::string message);
Status DeadlineExceeded(std::string message);
Status Cancelled(std::string message);
Status DataLoss(std::string message);
Status Unimplemented(std::string message);
Status Internal(std::string message);

// A value or the error that prevented it. Never holds an OK status without a value.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}                                  // NOLINT: implicit by design
  Result(Status status) : status_(std::move(status)) { assert(!status_.ok()); }  // NOLINT: implicit by design

  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }

  // REQUIRES: ok()
  T& value() & {
    assert(ok());
    return *value_;
  }
  const T& value() const& {
    assert(ok());
    return *value_;
  }
  T&& value() && {
    assert(ok());
    return *std::move(value_);
  }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }

 private:
  Status status_;
  std::optional<T> value_;
};

// The only two macros of the library.
#define HPS_RETURN_IF_ERROR(expression)        \
  do {                                         \
    ::hps::Status hps_status_ = (expression);  \
    if (!hps_status_.ok()) return hps_status_; \
  } while (false)

#define HPS_CONCAT_INNER_(a, b) a##b
#define HPS_CONCAT_(a, b) HPS_CONCAT_INNER_(a, b)
#define HPS_ASSIGN_OR_RETURN(declaration, expression)                                               \
  auto HPS_CONCAT_(hps_result_, __LINE__) = (expression);                                           \
  if (!HPS_CONCAT_(hps_result_, __LINE__).ok()) return HPS_CONCAT_(hps_result_, __LINE__).status(); \
  declaration = std::move(HPS_CONCAT_(hps_result_, __LINE__)).value()

}  // namespace hps

#endif  // HPS_STATUS_H_
