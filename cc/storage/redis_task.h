// RedisTask: commands that go to one node in one piece, and what becomes of their replies. No networking here.

#ifndef HPS_STORAGE_REDIS_TASK_H_
#define HPS_STORAGE_REDIS_TASK_H_

#include <charconv>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "hps/status.h"

namespace hps {

// Puts commands into the form of the protocol.
class RedisWriter {
 public:
  // asking: each command is preceded by ASKING.
  explicit RedisWriter(std::string* out, bool asking = false) : out_(out), asking_(asking) {}

  // A command of `words` words, which must follow.
  void Begin(size_t words) {
    if (asking_) out_->append("*1\r\n$6\r\nASKING\r\n");
    Number('*', words);
  }
  void Word(std::string_view word) {
    Number('$', word.size());
    out_->append(word);
    out_->append("\r\n", 2);
  }
  void Word(int64_t number) {
    char text[24];
    const auto end = std::to_chars(text, text + sizeof(text), number).ptr;
    Word(std::string_view(text, static_cast<size_t>(end - text)));
  }
  // The raw key of a table.
  void Key(int64_t key, int key_bytes) {
    char word[14] = {'$', static_cast<char>('0' + key_bytes), '\r', '\n'};
    std::memcpy(word + 4, &key, static_cast<size_t>(key_bytes));
    word[4 + key_bytes] = '\r';
    word[5 + key_bytes] = '\n';
    out_->append(word, static_cast<size_t>(key_bytes) + 6);
  }
  void Command(std::initializer_list<std::string_view> words) {
    Begin(words.size());
    for (const std::string_view word : words) Word(word);
  }

 private:
  void Number(char kind, size_t number) {
    char text[24];
    text[0] = kind;
    char* end = std::to_chars(text + 1, text + 22, number).ptr;
    *end++ = '\r';
    *end++ = '\n';
    out_->append(text, static_cast<size_t>(end - text));
  }

  std::string* const out_;
  const bool asking_;
};

struct RedisReply {
  enum class Kind { kNil, kInteger, kString, kStatus, kError, kArray };
  Kind kind = Kind::kNil;
  int64_t integer = 0;
  std::string text;  // of a string of given length, of an error, or (kStatus) of anything else that is text
  std::vector<RedisReply> elements;
};

// A task may be written several times: after a redirection, or when the connection was lost before all replies came.
class RedisTask {
 public:
  // `replies`: how many commands Write writes. `first_command`: named in errors.
  RedisTask(uint16_t slot, size_t replies, std::string first_command)
      : slot(slot), replies(replies), command(std::move(first_command)) {}
  virtual ~RedisTask() = default;
  RedisTask(const RedisTask&) = delete;
  RedisTask& operator=(const RedisTask&) = delete;

  virtual void Write(RedisWriter& out) = 0;

  // For tasks whose single reply is a flat array that is taken as it arrives: the number of elements, then each element
  // (data is nullptr for nil). Elements of other kinds never get here: they fail the connection. An error ends the
  // whole batch.
  virtual bool streams() const { return false; }
  virtual Status OnArray(size_t elements) { return OkStatus(); }
  virtual Status OnElement(size_t index, const char* data, size_t size) { return OkStatus(); }

  // The whole reply of command `index` of all other tasks. Not called for error replies, nor when one came before it.
  virtual Status OnReply(size_t index, RedisReply& reply) { return OkStatus(); }
  // Before each Write.
  virtual void Reset() {}

  const uint16_t slot;
  const size_t replies;
  const std::string command;
  std::string node;  // "host:port": the only node that may answer; empty: the master of the slot

  // Kept by the cluster and the connection while the task is under way.
  size_t received = 0;
  std::string error;                 // the first error reply
  std::string ask;                   // "host:port" to ask once
  std::string answered_by;           // the node that gave the last replies
  uint64_t answered_generation = 0;  // of that node: grows when one of its connections is lost
  int attempts = 0;
};

// One command made of words; its reply is kept.
class RedisCommandTask : public RedisTask {
 public:
  RedisCommandTask(uint16_t slot, std::vector<std::string> command_words)
      : RedisTask(slot, 1, command_words[0]), words(std::move(command_words)) {}

  void Write(RedisWriter& out) override {
    out.Begin(words.size());
    for (const std::string& word : words) out.Word(word);
  }
  Status OnReply(size_t, RedisReply& value) override {
    reply = std::move(value);
    return OkStatus();
  }

  const std::vector<std::string> words;
  RedisReply reply;
};

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_TASK_H_
