// Real redis-server processes for tests: a single server or a cluster, on free ports of 127.0.0.1, in a temporary
// folder.
//
//   RedisOptions options;
//   options.masters = 3;                                        // 0: a single server
//   auto redis = Value(RedisService::Start(options));           // every node says cluster_state:ok
//   config.volatile_db.address = redis->address_list();         // "127.0.0.1:12345,127.0.0.1:23456,..."
//   redis->Kill(0); ...; ASSERT_OK(redis->Restart(0)); ASSERT_OK(redis->WaitUntilHealthy());
//
// The servers die with the object, and with the process however it ends. Needs Debian's package redis-tools (its
// redis-check-rdb is the server under another name; the package redis-server adds a system service, which is neither
// needed nor touched) or a redis-server 7.0 or later in PATH, and openssl for TLS. tests/services.py is the same in
// Python.
//
// Thread safety: all methods may be called from several threads; those that change the same node one after another.

#ifndef HPS_TESTS_REDIS_SERVICE_H_
#define HPS_TESTS_REDIS_SERVICE_H_

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cc/tests/free_port.h"
#include "cc/tests/temp_folder.h"
#include "hps/status.h"

namespace hps::testing {

struct RedisOptions {
  int masters = 0;  // 0: a single server that is not in cluster mode
  int replicas_per_master = 0;
  int cluster_node_timeout_ms = 1500;  // a dead master is replaced after about twice this time

  bool tls = false;      // TLS only; clients must show a certificate (see RedisService::tls)
  std::string user;      // "default" or another name (then the user "default" is off); empty: no authentication
  std::string password;  // of `user`, or of the user "default" where `user` is empty
  std::vector<std::string> acl_lines;  // more lines of the ACL file, such as "user reader on >secret ~* +@read"

  bool appendonly = false;
  std::string save;                     // "60 1000"; empty: no snapshots
  uint64_t maxmemory_bytes = 0;         // 0: no limit
  std::vector<std::string> directives;  // more lines of redis.conf

  // For a proxy in front of each node: called with a node's index and real port before it starts; the node tells
  // clients the returned port. (Replicas connect to their master through that port too; the cluster bus does not.)
  std::function<uint16_t(int node, uint16_t port)> announced_port;
};

struct TlsFiles {
  std::filesystem::path ca_certificate;                  // the authority that signed the two below
  std::filesystem::path server_certificate, server_key;  // for localhost, redis.localhost and 127.0.0.1
  std::filesystem::path client_certificate, client_key;
  std::filesystem::path other_ca_certificate;  // an authority that signed nothing here
};

class RedisService {
 public:
  // Nodes 0 .. masters - 1 are the masters, in the order of their slots; node masters * (1 + r) + m replicates master
  // m.
  static Result<std::unique_ptr<RedisService>> Start(RedisOptions options = {});
  ~RedisService();

  int size() const { return static_cast<int>(nodes_.size()); }
  bool cluster() const { return options_.masters > 0; }
  // What clients are told: the announced port where there is one, otherwise the real one.
  uint16_t port(int node) const { return nodes_[node]->announced_port; }
  std::string address(int node) const { return "127.0.0.1:" + std::to_string(port(node)); }
  std::string address_list() const;  // of all nodes, separated by commas, as ps.json has them
  uint16_t real_port(int node) const { return nodes_[node]->port.number(); }
  pid_t pid(int node) const { return nodes_[node]->pid; }  // 0: not running
  std::filesystem::path folder(int node) const;            // its redis.conf, log, dump and append-only files
  std::string log(int node) const;                         // what it has logged so far
  const TlsFiles& tls() const { return tls_; }
  const RedisOptions& options() const { return options_; }

  // Faults. The calls return when the state is reached.
  void Kill(int node);        // SIGKILL; also of a stopped node
  void Stop(int node);        // SIGSTOP: its connections live and nobody answers
  void Continue(int node);    // SIGCONT
  Status Restart(int node);   // same port, same folder; killed first if it runs. Waits until it answers (data loaded)
  Status ShutDown(int node);  // SIGTERM: writes what its `save` rules ask for, and ends

  // Sends a command through redis-cli, past any proxy, and returns the reply as its raw text without the last line
  // break; lists have one line an element. An error reply is kInternal with its text, a dead server kUnavailable.
  Result<std::string> Command(int node, const std::vector<std::string>& words,
                              std::chrono::milliseconds timeout = std::chrono::seconds(20)) const;

  // Waits until every running node answers and, in a cluster, says cluster_state:ok.
  Status WaitUntilHealthy(std::chrono::milliseconds timeout = std::chrono::seconds(60)) const;

  // Waits until every replica has what its master has now. (WAIT of another connection than the one that wrote does
  // not: it returns at once.)
  Status WaitUntilReplicated(std::chrono::milliseconds timeout = std::chrono::seconds(60)) const;

  // The node that serves a slot in the view of `viewer`, or -1.
  int MasterOf(int slot, int viewer = 0) const;
  // Moves slots [first, last] with their keys to another master, as redis-cli --cluster reshard does. Clients see ASK
  // while it goes on and MOVED afterwards.
  Status MigrateSlots(int first, int last, int from, int to) const;

 private:
  struct Node {
    explicit Node(FreePort port, FreePort bus_port) : port(std::move(port)), bus_port(std::move(bus_port)) {}
    FreePort port;
    FreePort bus_port;
    uint16_t announced_port = 0;
    std::atomic<pid_t> pid = 0;
    std::string id;  // in a cluster
  };

  explicit RedisService(RedisOptions options);
  Status MakeCertificates();
  Status WriteConfig(int node) const;
  Status Launch(int node);
  Status MakeCluster();
  Status CheckAnswers(int node, bool formed) const;  // kFailedPrecondition: it has ended
  bool secured() const { return !options_.user.empty() || !options_.password.empty(); }
  std::string user() const { return options_.user.empty() ? "default" : options_.user; }

  const RedisOptions options_;
  TempFolder folder_{"hps_redis"};
  TlsFiles tls_;
  std::vector<std::unique_ptr<Node>> nodes_;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_REDIS_SERVICE_H_
