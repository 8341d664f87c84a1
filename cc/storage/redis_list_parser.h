// RedisListParser: takes a reply that is a flat list of strings, element by element, from wherever its bytes lie.
//
// Rows are nearly all that ever comes from Redis, and this is all that a row costs: its length is read, the line break
// behind it is checked, and the task gets its address. Other replies go through hiredis. Thread safety: one thread at a
// time.

#ifndef HPS_STORAGE_REDIS_LIST_PARSER_H_
#define HPS_STORAGE_REDIS_LIST_PARSER_H_

#include <cstddef>

#include "cc/storage/redis_task.h"
#include "hps/status.h"

namespace hps {

class RedisListParser {
 public:
  // Whether a reply begins like a list.
  static bool BeginsList(char first) { return first == '*'; }
  // A list was begun and is not complete.
  bool inside() const { return inside_; }

  // Takes the whole elements of [*at, end) for the task and moves *at behind them; what is left is the beginning of an
  // element, and must come again with what follows it. *complete: the list has ended, at *at.
  // kUnavailable: these are no bytes of such a list. Any other error is the task's.
  Status Take(RedisTask& task, const char** at, const char* end, bool* complete);

 private:
  bool inside_ = false;
  size_t elements_ = 0;
  size_t next_ = 0;
};

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_LIST_PARSER_H_
