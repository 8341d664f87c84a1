// RedisConnection: one connection to one Redis server that never blocks. The only door to hiredis and OpenSSL.
//
// The owner polls fd() for events() and calls Progress. Tasks are written in the order in which they were submitted,
// and their replies come in that order, parsed straight into the tasks. A connection that failed, or that is given up
// with replies outstanding, is destroyed and never used again.
//
// Thread safety: one thread at a time. The owner blocks SIGPIPE (OpenSSL writes without MSG_NOSIGNAL).

#ifndef HPS_STORAGE_REDIS_CONNECTION_H_
#define HPS_STORAGE_REDIS_CONNECTION_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cc/storage/redis_task.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

struct RedisEndpoint {
  std::string host;
  uint16_t port = 0;
  // "host:port", for messages and as a name; an IPv6 address stands in brackets.
  std::string ToString() const {
    const bool colons = host.find(':') != std::string::npos;
    return (colons ? "[" + host + "]" : host) + ":" + std::to_string(port);
  }
};

// What certificates a server must show, and which one this client shows.
class RedisTls {
 public:
  // `ca`: a file or a folder. `certificate` and `key`: both or none ("").
  // kNotFound: a file does not exist. kFailedPrecondition: it is no certificate, or key and certificate do not match.
  static Result<std::shared_ptr<const RedisTls>> Load(const std::string& ca, const std::string& certificate,
                                                      const std::string& key, const std::string& server_name);
  virtual ~RedisTls() = default;
};

// What is known of a server beyond one connection to it.
struct RedisServerNotes {
  std::atomic<bool> spoke{false};  // it has understood us before: neither side expects TLS where the other has none
};

struct RedisLogin {
  std::string user_name;  // "default" with an empty password: no login
  std::string password;
  std::shared_ptr<const RedisTls> tls;  // nullptr: plain text
};

class RedisConnection {
 public:
  // Begins to connect. Login and notes must outlive the connection. kUnavailable: the name is unknown, no socket can be
  // had, or (*refused is set to true) nothing listens there.
  static Result<std::unique_ptr<RedisConnection>> Begin(const RedisEndpoint& endpoint, const RedisLogin& login,
                                                        RedisServerNotes* notes, Deadline deadline,
                                                        bool* refused = nullptr);
  virtual ~RedisConnection() = default;

  virtual int fd() const = 0;
  virtual short events() const = 0;
  // Logged in and in use, as opposed to still connecting.
  virtual bool ready() const = 0;
  // Of a connection whose Progress failed: nothing listens at any of the server's addresses.
  virtual bool refused() const = 0;
  // What a connection that is not ready waits for; for messages.
  virtual std::string waits_for() const = 0;
  // Tasks submitted and not done.
  virtual size_t outstanding() const = 0;
  virtual std::vector<RedisTask*> outstanding_tasks() const = 0;
  // Bytes that wait to be sent.
  virtual size_t unsent_bytes() const = 0;

  // asking: the task is preceded by ASKING.
  virtual void Submit(RedisTask* task, bool asking) = 0;

  // Does what can be done at once; reads only if `readable`. Tasks whose replies are complete are appended to *done.
  // kUnavailable: the connection is lost and another may do better; any other error would come again (login,
  // certificates, what a task refused).
  virtual Status Progress(bool readable, std::vector<RedisTask*>* done) = 0;

  // Whether an idle connection may be used: nothing has come, and the server has not closed it.
  virtual bool Healthy() const = 0;
};

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_CONNECTION_H_
