#include "cc/tests/redis_service.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <thread>

#include "cc/tests/subprocess.h"

namespace hps::testing {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr int kSlots = 16384;

// Polls every few milliseconds until `done` is OK. Its last error after `timeout`, or when it says FailedPrecondition:
// waiting will not help.
template <typename Function>
Status Poll(milliseconds timeout, const Function& done) {
  const auto end = Clock::now() + timeout;
  for (;;) {
    const Status status = done();
    if (status.ok() || status.code() == StatusCode::kFailedPrecondition || Clock::now() > end) return status;
    std::this_thread::sleep_for(milliseconds(5));
  }
}

std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// A redis-server of its own name, or the same program as Debian's redis-tools have it.
Result<Program> ServerProgram() {
  for (const char* name : {"redis-server", "redis-check-rdb"}) {
    const std::string path = FindProgram(name);
    if (!path.empty()) return Program{.path = path, .arguments = {}, .name = "redis-server"};
  }
  return NotFound("neither redis-server nor redis-check-rdb is in PATH; install Debian's package redis-tools");
}

Status Run(const Program& program) {
  const Result<Finished> finished = RunProgram(program);
  if (!finished.ok()) return finished.status();
  if (finished.value().exit_code == 0) return OkStatus();
  return Internal(program.path + " failed: " + finished.value().output);
}

// Whether a field of CLUSTER INFO or INFO ("name:value" lines) has this value.
bool HasField(const std::string& text, const std::string& field) {
  return text.find(field + "\r\n") != std::string::npos || text.find(field + "\n") != std::string::npos;
}

// The value of a field of INFO, or "".
std::string FieldOf(const std::string& text, const std::string& name) {
  size_t begin = text.find("\n" + name + ":");
  if (begin == std::string::npos) return {};
  begin += name.size() + 2;
  return text.substr(begin, text.find_first_of("\r\n", begin) - begin);
}

}  // namespace

RedisService::RedisService(RedisOptions options) : options_(std::move(options)) {}

RedisService::~RedisService() {
  for (int i = 0; i < size(); ++i) Kill(i);
}

Result<std::unique_ptr<RedisService>> RedisService::Start(RedisOptions options) {
  std::unique_ptr<RedisService> service(new RedisService(std::move(options)));
  if (service->options_.tls) {
    const Status status = service->MakeCertificates();
    if (!status.ok()) return status;
  }
  const int count = service->cluster() ? service->options_.masters * (1 + service->options_.replicas_per_master) : 1;
  for (int i = 0; i < count; ++i) {
    Result<FreePort> port = FreePort::Choose();
    Result<FreePort> bus_port = FreePort::Choose();
    if (!port.ok() || !bus_port.ok()) return port.ok() ? bus_port.status() : port.status();
    service->nodes_.push_back(std::make_unique<Node>(std::move(port).value(), std::move(bus_port).value()));
    Node& node = *service->nodes_.back();
    node.announced_port = node.port.number();
    if (service->options_.announced_port) node.announced_port = service->options_.announced_port(i, node.port.number());
    Status status = service->WriteConfig(i);
    if (status.ok()) status = service->Launch(i);
    if (!status.ok()) return status;
  }
  Status status = service->WaitUntilHealthy();  // with no cluster yet: they answer
  if (status.ok() && service->cluster()) status = service->MakeCluster();
  if (!status.ok()) return status;
  return service;
}

Status RedisService::MakeCertificates() {
  const auto file = [&](const char* name) { return folder_ / name; };
  tls_ = {file("ca.crt"),     file("server.crt"), file("server.key"),
          file("client.crt"), file("client.key"), file("other_ca.crt")};
  struct Certificate {
    std::string name;
    std::string alternatives;
    bool is_authority;
  };
  const Certificate all[] = {{"ca", "", true},
                             {"other_ca", "", true},
                             {"server", "DNS:localhost,DNS:redis.localhost,IP:127.0.0.1", false},
                             {"client", "DNS:client", false}};
  for (const auto& [name, alternatives, is_authority] : all) {
    const std::string base = (folder_ / name).string();
    Program openssl{
        .path = "openssl",
        .arguments = {"req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
                      "2", "-subj", "/O=hps tests/CN=" + name, "-keyout", base + ".key", "-out", base + ".crt"}};
    auto& arguments = openssl.arguments;
    if (!is_authority) {
      const std::string authority = (folder_ / "ca").string();
      arguments.insert(arguments.end(),
                       {"-CA", authority + ".crt", "-CAkey", authority + ".key", "-addext",
                        "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=" + alternatives});
    }
    const Status status = Run(openssl);
    if (!status.ok()) return status;
  }
  return OkStatus();
}

std::filesystem::path RedisService::folder(int node) const { return folder_ / ("node" + std::to_string(node)); }
std::string RedisService::log(int node) const { return ReadFile(folder(node) / "log"); }

std::string RedisService::address_list() const {
  std::string list;
  for (int i = 0; i < size(); ++i) list += (i == 0 ? "" : ",") + address(i);
  return list;
}

Status RedisService::WriteConfig(int i) const {
  const Node& node = *nodes_[i];
  std::error_code failed;
  std::filesystem::create_directories(folder(i), failed);
  const std::string number = std::to_string(node.port.number());
  const std::string announced = std::to_string(node.announced_port);
  std::ofstream config(folder(i) / "redis.conf");
  config << "bind 127.0.0.1\ndaemonize no\nlogfile \"\"\nenable-debug-command local\nappendfsync everysec\n"
         << "dir " << folder(i).string() << "\n"
         << "appendonly " << (options_.appendonly ? "yes" : "no") << "\n"
         << "save " << (options_.save.empty() ? "\"\"" : options_.save) << "\n"
         << "maxmemory " << options_.maxmemory_bytes << "\n";
  if (options_.tls) {
    config << "port 0\ntls-port " << number << "\ntls-cert-file " << tls_.server_certificate.string()
           << "\ntls-key-file " << tls_.server_key.string() << "\ntls-ca-cert-file " << tls_.ca_certificate.string()
           << "\ntls-auth-clients yes\ntls-replication yes\ntls-cluster yes\n";
  } else {
    config << "port " << number << "\n";
  }
  if (cluster()) {
    config << "cluster-enabled yes\ncluster-config-file nodes.conf\ncluster-node-timeout "
           << options_.cluster_node_timeout_ms << "\ncluster-port " << node.bus_port.number()
           << "\ncluster-announce-ip 127.0.0.1\ncluster-announce-bus-port " << node.bus_port.number() << "\n"
           << (options_.tls ? "cluster-announce-tls-port " : "cluster-announce-port ") << announced
           << "\n"
           // A replica takes over whatever the age of its data, and replicates at once.
           << "cluster-replica-validity-factor 0\nrepl-diskless-sync yes\nrepl-diskless-sync-delay 0\n"
           << "repl-ping-replica-period 1\n";
  }
  if (secured()) {
    std::ofstream acl(folder(i) / "users.acl");
    const std::string rights = options_.password.empty() ? " on nopass" : " on >" + options_.password;
    if (user() != "default") acl << "user default off\n";
    acl << "user " << user() << rights << " ~* &* +@all\n";
    for (const std::string& line : options_.acl_lines) acl << line << "\n";
    config << "aclfile " << (folder(i) / "users.acl").string() << "\nmasteruser " << user() << "\n";
    if (!options_.password.empty()) config << "masterauth " << options_.password << "\n";
  }
  for (const std::string& line : options_.directives) config << line << "\n";
  config.close();
  return config ? OkStatus() : Internal("cannot write " + (folder(i) / "redis.conf").string());
}

Status RedisService::Launch(int i) {
  Result<Program> program = ServerProgram();
  if (!program.ok()) return program.status();
  program.value().arguments = {(folder(i) / "redis.conf").string()};
  program.value().output = folder(i) / "log";
  const Result<pid_t> pid = StartProgram(program.value());
  if (!pid.ok()) return pid.status();
  nodes_[i]->pid = pid.value();
  return OkStatus();
}

void RedisService::Kill(int node) {
  const pid_t pid = nodes_[node]->pid.exchange(0);
  if (pid == 0) return;
  ::kill(pid, SIGKILL);
  while (::waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
  }
}

void RedisService::Stop(int node) {
  const pid_t pid = nodes_[node]->pid;
  if (pid == 0) return;
  ::kill(pid, SIGSTOP);
  int status = 0;  // returns at once if it is stopped, or has ended
  while (::waitpid(pid, &status, WUNTRACED) < 0 && errno == EINTR) {
  }
  if (!WIFSTOPPED(status)) nodes_[node]->pid = 0;
}

void RedisService::Continue(int node) {
  const pid_t pid = nodes_[node]->pid;
  if (pid != 0) ::kill(pid, SIGCONT);
}

Status RedisService::Restart(int node) {
  Kill(node);
  const Status status = Launch(node);
  if (!status.ok()) return status;
  return Poll(std::chrono::seconds(60), [&] { return CheckAnswers(node, false); });
}

Status RedisService::CheckAnswers(int node, bool formed) const {
  siginfo_t ended{};
  if (::waitid(P_PID, static_cast<id_t>(nodes_[node]->pid), &ended, WEXITED | WNOHANG | WNOWAIT) == 0 &&
      ended.si_pid != 0) {
    return FailedPrecondition("redis node " + std::to_string(node) + " ended by itself; its log:\n" + log(node));
  }
  const Result<std::string> answer = formed ? Command(node, {"CLUSTER", "INFO"}) : Command(node, {"PING"});
  if (!answer.ok()) return answer.status();
  const bool healthy = formed ? HasField(answer.value(), "cluster_state:ok") : answer.value() == "PONG";
  return healthy ? OkStatus() : Unavailable("redis node " + std::to_string(node) + " says " + answer.value());
}

Status RedisService::ShutDown(int node) {
  const pid_t pid = nodes_[node]->pid;
  if (pid == 0) return OkStatus();
  ::kill(pid, SIGTERM);
  const Status status = Poll(std::chrono::seconds(60), [&] {
    return ::waitpid(pid, nullptr, WNOHANG) == pid ? OkStatus() : DeadlineExceeded("redis-server ignores SIGTERM");
  });
  if (status.ok()) nodes_[node]->pid = 0;
  return status;
}

Result<std::string> RedisService::Command(int node, const std::vector<std::string>& words, milliseconds timeout) const {
  Program cli{.path = "redis-cli", .arguments = {"-e", "-h", "127.0.0.1", "-p", std::to_string(real_port(node))}};
  auto& arguments = cli.arguments;
  if (options_.tls) {
    arguments.insert(arguments.end(), {"--tls", "--cacert", tls_.ca_certificate.string(), "--cert",
                                       tls_.client_certificate.string(), "--key", tls_.client_key.string()});
  }
  if (secured() && !options_.password.empty()) {
    cli.environment.push_back("REDISCLI_AUTH=" + options_.password);
    arguments.insert(arguments.end(), {"--no-auth-warning", "--user", user()});
  }
  arguments.insert(arguments.end(), words.begin(), words.end());
  Result<Finished> finished = RunProgram(cli, timeout);
  if (!finished.ok()) return finished.status();
  std::string output = std::move(finished.value().output);
  while (!output.empty() && output.back() == '\n') output.pop_back();
  if (finished.value().exit_code == 0) return output;
  const bool connected =
      output.find("Could not connect") == std::string::npos && output.find("Server closed") == std::string::npos;
  return Status(connected ? StatusCode::kInternal : StatusCode::kUnavailable,
                "redis node " + std::to_string(node) + ": " + output);
}

Status RedisService::WaitUntilHealthy(milliseconds timeout) const {
  const bool formed = cluster() && !nodes_.back()->id.empty();
  for (int i = 0; i < size(); ++i) {
    if (nodes_[i]->pid == 0) continue;
    const Status status = Poll(timeout, [&] { return CheckAnswers(i, formed); });
    if (!status.ok()) return status;
  }
  return OkStatus();
}

Status RedisService::WaitUntilReplicated(milliseconds timeout) const {
  std::map<std::string, int64_t> offsets;  // of masters, by the port that replicas know
  std::vector<int> replicas;
  for (int i = 0; i < size(); ++i) {
    if (nodes_[i]->pid == 0) continue;
    const Result<std::string> info = Command(i, {"INFO", "replication"});
    if (!info.ok()) return info.status();
    if (FieldOf(info.value(), "role") == "slave") {
      replicas.push_back(i);
    } else {
      offsets[std::to_string(port(i))] = std::atoll(FieldOf(info.value(), "master_repl_offset").c_str());
    }
  }
  for (const int replica : replicas) {
    const Status status = Poll(timeout, [&] {
      const Result<std::string> info = Command(replica, {"INFO", "replication"});
      if (!info.ok()) return info.status();
      const auto master = offsets.find(FieldOf(info.value(), "master_port"));
      const int64_t offset = std::atoll(FieldOf(info.value(), "slave_repl_offset").c_str());
      const bool linked = FieldOf(info.value(), "master_link_status") == "up";
      if (linked && (master == offsets.end() || offset >= master->second)) return OkStatus();
      return Unavailable("redis node " + std::to_string(replica) + " lags behind its master");
    });
    if (!status.ok()) return status;
  }
  return OkStatus();
}

Status RedisService::MakeCluster() {
  const auto run = [&](int node, const std::vector<std::string>& words) { return Command(node, words).status(); };
  for (int i = 0; i < size(); ++i) {
    Result<std::string> id = Command(i, {"CLUSTER", "MYID"});
    if (!id.ok()) return id.status();
    // Distinct epochs: else the nodes settle their ranks by quarrelling.
    Status status = run(i, {"CLUSTER", "SET-CONFIG-EPOCH", std::to_string(i + 1)});
    if (status.ok() && i < options_.masters) {
      const int first = kSlots * i / options_.masters;
      const int last = kSlots * (i + 1) / options_.masters - 1;
      status = run(i, {"CLUSTER", "ADDSLOTSRANGE", std::to_string(first), std::to_string(last)});
    }
    for (int other = 0; status.ok() && other < i; ++other) {
      status = run(i, {"CLUSTER", "MEET", "127.0.0.1", std::to_string(real_port(other)),
                       std::to_string(nodes_[other]->bus_port.number())});
    }
    if (!status.ok()) return status;
    nodes_[i]->id = id.value();
  }
  // Every node must know every other before a replica can be told its master.
  const std::string known = "cluster_known_nodes:" + std::to_string(size());
  for (int i = 0; i < size(); ++i) {
    Status status = Poll(std::chrono::seconds(60), [&] {
      const Result<std::string> info = Command(i, {"CLUSTER", "INFO"});
      if (!info.ok()) return info.status();
      if (HasField(info.value(), known) && HasField(info.value(), "cluster_state:ok")) return OkStatus();
      return Unavailable("the cluster does not form; node " + std::to_string(i) + " says " + info.value());
    });
    if (status.ok() && i >= options_.masters) {
      status = Poll(std::chrono::seconds(60), [&] {
        return run(i, {"CLUSTER", "REPLICATE", nodes_[i % options_.masters]->id});
      });
    }
    if (!status.ok()) return status;
  }
  for (int i = options_.masters; i < size(); ++i) {
    const Status status = Poll(std::chrono::seconds(60), [&] {
      const Result<std::string> info = Command(i, {"INFO", "replication"});
      if (!info.ok()) return info.status();
      return HasField(info.value(), "master_link_status:up") ? OkStatus() : Unavailable("a replica has no master yet");
    });
    if (!status.ok()) return status;
  }
  // A master fails over only to replicas that the others know as such.
  const auto replicas_known = [&](int i) {
    const Result<std::string> nodes = Command(i, {"CLUSTER", "NODES"});
    if (!nodes.ok()) return nodes.status();
    int replicas = 0;
    for (size_t at = 0; (at = nodes.value().find("slave ", at)) != std::string::npos; ++at) ++replicas;
    const bool all = replicas == size() - options_.masters;
    return all ? OkStatus() : Unavailable("a node does not know all replicas yet");
  };
  for (int i = 0; size() > options_.masters && i < size(); ++i) {
    const Status status = Poll(std::chrono::seconds(60), [&] { return replicas_known(i); });
    if (!status.ok()) return status;
  }
  return WaitUntilHealthy();
}

int RedisService::MasterOf(int slot, int viewer) const {
  const Result<std::string> nodes = Command(viewer, {"CLUSTER", "NODES"});
  if (!nodes.ok()) return -1;
  std::istringstream lines(nodes.value());
  for (std::string line; std::getline(lines, line);) {
    // id address flags master ping pong epoch state [slots or migrations]...
    std::istringstream fields(line);
    std::string id, skipped, range;
    fields >> id;
    for (int i = 0; i < 7; ++i) fields >> skipped;
    while (fields >> range) {
      if (range.front() == '[') continue;
      const size_t dash = range.find('-');
      const int first = std::stoi(range);
      const int last = dash == std::string::npos ? first : std::stoi(range.substr(dash + 1));
      if (slot < first || slot > last) continue;
      for (int i = 0; i < size(); ++i) {
        if (nodes_[i]->id == id) return i;
      }
    }
  }
  return -1;
}

Status RedisService::MigrateSlots(int first, int last, int from, int to) const {
  for (int slot = first; slot <= last; ++slot) {
    const std::string number = std::to_string(slot);
    Status status = Command(to, {"CLUSTER", "SETSLOT", number, "IMPORTING", nodes_[from]->id}).status();
    if (status.ok()) status = Command(from, {"CLUSTER", "SETSLOT", number, "MIGRATING", nodes_[to]->id}).status();
    while (status.ok()) {
      const Result<std::string> keys = Command(from, {"CLUSTER", "GETKEYSINSLOT", number, "100"});
      if (!keys.ok()) return keys.status();
      if (keys.value().empty()) break;
      std::vector<std::string> words{"MIGRATE", "127.0.0.1", std::to_string(real_port(to)), "", "0", "10000"};
      if (secured() && !options_.password.empty()) {
        words.insert(words.end(), {"AUTH2", user(), options_.password});
      }
      words.push_back("KEYS");
      std::istringstream lines(keys.value());
      for (std::string key; std::getline(lines, key);) words.push_back(key);
      status = Command(from, words).status();
    }
    // The new owner first: it must know before anybody is sent there.
    for (const int node : {to, from}) {
      if (status.ok()) status = Command(node, {"CLUSTER", "SETSLOT", number, "NODE", nodes_[to]->id}).status();
    }
    for (int node = 0; node < size(); ++node) {
      const bool other = node != to && node != from && nodes_[node]->pid != 0;
      if (status.ok() && other) (void)Command(node, {"CLUSTER", "SETSLOT", number, "NODE", nodes_[to]->id});
    }
    if (!status.ok()) return status;
  }
  return OkStatus();
}

}  // namespace hps::testing
