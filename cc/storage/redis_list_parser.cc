// Invariant: *at is never moved into an element that is not whole, so that nothing of one needs to be remembered.

#include "cc/storage/redis_list_parser.h"

#include <algorithm>
#include <string>
#include <string_view>

namespace hps {
namespace {

constexpr int64_t kMostElements = 1 << 24;        // of a list; more is garbage
constexpr int64_t kMostBytes = int64_t{1} << 30;  // of an element
constexpr size_t kMostDigits = 11;                // of either
constexpr size_t kShownBytes = 200;               // of an error

enum class Line { kWhole, kCut, kBroken };

// Reads "<kind><number>\r\n", where *at is at the kind, and moves *at behind it if it is whole.
Line ReadNumber(const char** at, const char* end, int64_t* number) {
  const char* next = *at + 1;
  const bool negative = next < end && *next == '-';
  if (negative) ++next;
  const char* const digits = next;
  int64_t value = 0;
  while (next < end && *next >= '0' && *next <= '9' && next - digits < static_cast<ptrdiff_t>(kMostDigits)) {
    value = 10 * value + (*next++ - '0');
  }
  if (next == end) return Line::kCut;
  if (next == digits || *next != '\r') return Line::kBroken;
  if (next + 1 == end) return Line::kCut;
  if (next[1] != '\n') return Line::kBroken;
  *number = negative ? -value : value;
  *at = next + 2;
  return Line::kWhole;
}

// What an element that is no string is. "": it cannot be said yet.
std::string OtherElement(const RedisTask& task, const char* at, const char* end) {
  if (*at != '-') return "a reply to " + task.command + " of another form";
  const std::string_view rest(at + 1, static_cast<size_t>(end - at - 1));
  const size_t line = std::min(rest.find('\r'), kShownBytes);
  if (line > rest.size()) return "";
  return "an error in the place of an element of a reply to " + task.command + ": " + std::string(rest.substr(0, line));
}

}  // namespace

Status RedisListParser::Take(RedisTask& task, const char** at, const char* end, bool* complete) {
  *complete = false;
  int64_t number = 0;
  if (!inside_) {
    const Line line = ReadNumber(at, end, &number);
    if (line == Line::kCut) return OkStatus();
    if (line == Line::kBroken || number > kMostElements)
      return Unavailable("not a Redis reply: a list without a length");
    if (number < 0) return Unavailable("a reply to " + task.command + " that is no list");
    elements_ = static_cast<size_t>(number);
    next_ = 0;
    inside_ = true;
    HPS_RETURN_IF_ERROR(task.OnArray(elements_));
  }
  for (; next_ < elements_; ++next_) {
    if (*at == end) return OkStatus();
    if (**at != '$') {
      const std::string problem = OtherElement(task, *at, end);
      return problem.empty() ? OkStatus() : Unavailable(problem);
    }
    const char* row = *at;
    const Line line = ReadNumber(&row, end, &number);
    if (line == Line::kCut) return OkStatus();
    if (line == Line::kBroken || number < -1 || number > kMostBytes) {
      return Unavailable("not a Redis reply: a string without a length");
    }
    if (number == -1) {
      HPS_RETURN_IF_ERROR(task.OnElement(next_, nullptr, 0));
      *at = row;
      continue;
    }
    if (end - row < number + 2) return OkStatus();
    // Without this the last row of a reply would be taken though its end is garbage.
    if (row[number] != '\r' || row[number + 1] != '\n') {
      return Unavailable("not a Redis reply: a string without a line break behind it");
    }
    HPS_RETURN_IF_ERROR(task.OnElement(next_, row, static_cast<size_t>(number)));
    *at = row + number + 2;
  }
  inside_ = false;
  *complete = true;
  return OkStatus();
}

}  // namespace hps
