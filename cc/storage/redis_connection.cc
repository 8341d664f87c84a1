// Invariants: replies come in the order of outstanding_, so its front is the task that the parser feeds. Lists for
// streaming tasks are taken by RedisListParser. hiredis parses everything else with our object functions, which build a
// RedisReply, where the vector that is being filled is always the last element of its parent's; it is never asked while
// a list is next, so a reply of its own is under way (ridx >= 0) only where no list is.
// A failed status is final. OpenSSL's error queue of the thread is left empty.

#include "cc/storage/redis_connection.h"

#include <fcntl.h>
#include <hiredis/hiredis.h>
#include <hiredis/hiredis_ssl.h>
#include <hiredis/sds.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <filesystem>
#include <mutex>
#include <system_error>
#include <thread>

#include "cc/base/system_limits.h"
#include "cc/storage/redis_list_parser.h"

namespace hps {
namespace {

constexpr size_t kReadBytes = 128 << 10;
constexpr long long kMaxElements = 1 << 24;       // of an array; more is garbage
constexpr size_t kMaxBuffered = size_t{1} << 30;  // of one reply that does not end; more is garbage

// TLS --------------------------------------------------------------------------------------------------------------

std::string OpenSslReason() {
  const unsigned long code = ERR_peek_last_error();
  const char* reason = code == 0 ? nullptr : ERR_reason_error_string(code);
  ERR_clear_error();
  return reason == nullptr ? "unknown error" : reason;
}

class Tls final : public RedisTls {
 public:
  Tls(SSL_CTX* context, std::string server_name) : context_(context), server_name_(std::move(server_name)) {}
  ~Tls() override { SSL_CTX_free(context_); }

  const std::string& server_name() const { return server_name_; }

  // nullptr where there is no memory.
  SSL* NewSession() const {
    SSL* ssl = SSL_new(context_);
    if (ssl == nullptr) return nullptr;
    if (server_name_.empty()) return ssl;
    // The name is checked as well as asked for: a certificate of the right authority for another server is refused.
    X509_VERIFY_PARAM* parameters = SSL_get0_param(ssl);
    const bool is_address = X509_VERIFY_PARAM_set1_ip_asc(parameters, server_name_.c_str()) == 1;
    if (!is_address && (SSL_set_tlsext_host_name(ssl, server_name_.c_str()) != 1 ||
                        X509_VERIFY_PARAM_set1_host(parameters, server_name_.data(), server_name_.size()) != 1)) {
      SSL_free(ssl);
      return nullptr;
    }
    ERR_clear_error();
    return ssl;
  }

 private:
  SSL_CTX* const context_;
  const std::string server_name_;
};

Status CheckExists(const char* key, const std::string& path) {
  std::error_code error;
  if (std::filesystem::exists(path, error)) return OkStatus();
  return NotFound(std::string(key) + ": there is no file or folder \"" + path + "\"");
}

// Addresses --------------------------------------------------------------------------------------------------------

struct Address {
  sockaddr_storage storage{};
  socklen_t size = 0;
  int family = 0;
};

struct Resolution {
  std::mutex mutex;
  std::condition_variable finished;
  bool done = false;
  int code = 0;
  std::vector<Address> addresses;
};

int LookUp(const std::string& host, uint16_t port, int flags, std::vector<Address>* addresses) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int code = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (code != 0) return code;
  for (const addrinfo* entry = found; entry != nullptr; entry = entry->ai_next) {
    Address& address = addresses->emplace_back();
    std::memcpy(&address.storage, entry->ai_addr, entry->ai_addrlen);
    address.size = entry->ai_addrlen;
    address.family = entry->ai_family;
  }
  ::freeaddrinfo(found);
  return 0;
}

// Names are looked up by a thread of their own, because nothing limits how long that takes.
Result<std::vector<Address>> Resolve(const RedisEndpoint& endpoint, Deadline deadline) {
  std::vector<Address> addresses;
  if (LookUp(endpoint.host, endpoint.port, AI_NUMERICHOST, &addresses) == 0) return addresses;
  auto state = std::make_shared<Resolution>();
  try {
    std::thread([state, host = endpoint.host, port = endpoint.port] {
      std::vector<Address> found;
      const int code = LookUp(host, port, 0, &found);
      std::lock_guard lock(state->mutex);
      state->done = true;
      state->code = code;
      state->addresses = std::move(found);
      state->finished.notify_all();
    }).detach();
  } catch (const std::system_error&) {
    return Unavailable(NoThreads(endpoint.ToString() + ": the name cannot be looked up").message());
  }
  std::unique_lock lock(state->mutex);
  // Not wait_until(Deadline::max()): its conversion overflows.
  const Deadline end = std::min(deadline, std::chrono::steady_clock::now() + std::chrono::seconds(10));
  if (!state->finished.wait_until(lock, end, [&] { return state->done; })) {
    return Unavailable(endpoint.ToString() + ": the name could not be looked up in time");
  }
  if (state->code != 0) return Unavailable(endpoint.ToString() + ": " + ::gai_strerror(state->code));
  return std::move(state->addresses);
}

// The connection ---------------------------------------------------------------------------------------------------

class AuthTask final : public RedisTask {
 public:
  explicit AuthTask(const RedisLogin* login) : RedisTask(0, 1, "AUTH"), login_(login) {}
  void Write(RedisWriter& out) override {
    // The form with one word is understood by servers older than 6 as well.
    const bool named = login_->user_name != "default" && !login_->user_name.empty();
    out.Begin(named ? 3 : 2);
    out.Word("AUTH");
    if (named) out.Word(login_->user_name);
    out.Word(login_->password);
  }

 private:
  const RedisLogin* const login_;
};

class Connection final : public RedisConnection {
 public:
  Connection(RedisEndpoint endpoint, const RedisLogin* login, RedisServerNotes* notes, std::vector<Address> addresses)
      : endpoint_(std::move(endpoint)), login_(login), notes_(notes), auth_(login), addresses_(std::move(addresses)) {}
  ~Connection() override {
    if (context_ != nullptr) {
      redisFree(context_);  // the socket and the TLS session too
    } else {
      CloseSocket();
    }
  }

  // Connects to the next address.
  Status ConnectNext() {
    std::string problem = "no address";
    while (next_address_ < addresses_.size()) {
      const Address& address = addresses_[next_address_++];
      CloseSocket();
      fd_ = ::socket(address.family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
      if (fd_ < 0) {
        problem = std::strerror(errno) + LimitAdvice(errno);
        reachable_ = true;  // for all that is known
        continue;
      }
      const int on = 1;
      ::setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
      ::setsockopt(fd_, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
      if (::connect(fd_, reinterpret_cast<const sockaddr*>(&address.storage), address.size) == 0 ||
          errno == EINPROGRESS) {
        phase_ = Phase::kConnecting;
        return OkStatus();
      }
      problem = std::strerror(errno);
      if (errno != ECONNREFUSED) reachable_ = true;
    }
    refused_ = !reachable_ && !addresses_.empty();
    return Lost("cannot connect: " + problem);
  }

  int fd() const override { return fd_; }
  bool ready() const override { return phase_ == Phase::kReady; }
  bool refused() const override { return refused_; }
  std::string waits_for() const override {
    switch (phase_) {
      case Phase::kConnecting: return "the connection";
      case Phase::kHandshake: return "the TLS handshake" + TlsDoubt();
      case Phase::kLogin: return "the login";
      case Phase::kReady: break;
    }
    return "nothing";
  }
  size_t outstanding() const override { return outstanding_.size(); }
  size_t unsent_bytes() const override { return context_ == nullptr ? 0 : sdslen(context_->obuf); }

  short events() const override {
    if (phase_ == Phase::kConnecting) return POLLOUT;
    if (phase_ == Phase::kHandshake) return SSL_want_write(ssl_) ? POLLOUT : POLLIN;
    return static_cast<short>(POLLIN | (unsent_bytes() > 0 ? POLLOUT : 0));
  }

  std::vector<RedisTask*> outstanding_tasks() const override {
    std::vector<RedisTask*> tasks;
    for (const Entry& entry : outstanding_) {
      if (entry.task != &auth_) tasks.push_back(entry.task);
    }
    return tasks;
  }

  void Submit(RedisTask* task, bool asking) override {
    buffer_.clear();
    RedisWriter writer(&buffer_, asking);
    task->Reset();
    task->received = 0;
    task->error.clear();
    task->Write(writer);
    outstanding_.push_back({task, asking, asking});
    (void)redisAppendFormattedCommand(context_, buffer_.data(), buffer_.size());  // Progress sees an error
  }

  Status Progress(bool readable, std::vector<RedisTask*>* done) override {
    if (phase_ == Phase::kConnecting) {
      int error = 0;
      socklen_t size = sizeof(error);
      pollfd waiting = {fd_, POLLOUT, 0};
      if (::poll(&waiting, 1, 0) == 0) return OkStatus();
      ::getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) {
        if (error != ECONNREFUSED) reachable_ = true;
        if (next_address_ < addresses_.size()) return ConnectNext();
        refused_ = !reachable_;
        return Lost(std::string("cannot connect: ") + std::strerror(error));
      }
      HPS_RETURN_IF_ERROR(Establish());
    }
    if (phase_ == Phase::kHandshake) HPS_RETURN_IF_ERROR(Handshake());
    if (phase_ == Phase::kHandshake) return OkStatus();
    HPS_RETURN_IF_ERROR(Send());
    return readable ? Receive(done) : OkStatus();
  }

  bool Healthy() const override {
    if (phase_ != Phase::kReady || !outstanding_.empty() || unsent_bytes() > 0) return false;
    pollfd waiting = {fd_, POLLIN, 0};
    if (::poll(&waiting, 1, 0) == 0) return true;
    // TLS 1.3 sends session tickets after the handshake, which are no replies: look whether a reply stands behind them.
    if (ssl_ == nullptr || (waiting.revents & (POLLHUP | POLLERR)) != 0) return false;
    char byte = 0;
    const int peeked = SSL_peek(ssl_, &byte, 1);
    const bool nothing = peeked <= 0 && SSL_get_error(ssl_, peeked) == SSL_ERROR_WANT_READ;
    ERR_clear_error();
    return nothing;
  }

 private:
  enum class Phase { kConnecting, kHandshake, kLogin, kReady };
  struct Entry {
    RedisTask* task;
    bool asking;  // a reply to ASKING comes before each other one
    bool asking_is_next;
  };

  Status Lost(const std::string& what) const { return Unavailable("redis node " + endpoint_.ToString() + ": " + what); }
  Status Refused(const std::string& what) const {
    return FailedPrecondition("redis node " + endpoint_.ToString() + ": " + what);
  }

  // The hints stand where they may be true: only until the server has understood something, be it on another
  // connection.
  std::string TlsDoubt() const { return notes_->spoke ? "" : "; does the server speak TLS at this port?"; }
  std::string PlainDoubt() const {
    return notes_->spoke || login_->tls != nullptr ? "" : "; if the server speaks TLS only, set enable_tls";
  }

  void CloseSocket() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

  // The socket is connected: hands it to hiredis, and begins TLS or the login.
  Status Establish() {
    redisOptions options{};
    options.type = REDIS_CONN_USERFD;
    options.options = REDIS_OPT_NONBLOCK | REDIS_OPT_NO_PUSH_AUTOFREE;
    options.endpoint.fd = fd_;
    context_ = redisConnectWithOptions(&options);
    if (context_ == nullptr || context_->err != 0) return Lost("no memory for a connection");
    redisReaderFree(context_->reader);
    context_->reader = redisReaderCreateWithFunctions(&Functions());
    if (context_->reader == nullptr) return Lost("no memory for a connection");
    context_->reader->privdata = this;
    context_->reader->maxbuf = 0;  // keeps its memory between replies
    context_->reader->maxelements = kMaxElements;
    if (login_->tls == nullptr) {
      BeginLogin();
      return OkStatus();
    }
    phase_ = Phase::kHandshake;
    SSL* ssl = static_cast<const Tls&>(*login_->tls).NewSession();
    if (ssl == nullptr) return Lost("no memory for a TLS session: " + OpenSslReason());
    ERR_clear_error();
    if (redisInitiateSSL(context_, ssl) != REDIS_OK) {
      const Status status = TlsFailure(ssl);
      SSL_free(ssl);  // it is hiredis' only after success
      return status;
    }
    ssl_ = ssl;
    return OkStatus();
  }

  Status Handshake() {
    ERR_clear_error();
    const int done = SSL_do_handshake(ssl_);
    if (done == 1) {
      BeginLogin();
      return OkStatus();
    }
    const int error = SSL_get_error(ssl_, done);
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) return OkStatus();
    if (error == SSL_ERROR_SYSCALL && ERR_peek_error() == 0) {
      return Lost("the connection was lost in the TLS handshake" + TlsDoubt());
    }
    return TlsFailure(ssl_);
  }

  Status TlsFailure(SSL* ssl) const {
    const long verified = SSL_get_verify_result(ssl);
    const std::string reason = OpenSslReason();
    if (verified == X509_V_OK) return TlsRefusal(reason);
    std::string text =
        std::string("the server's certificate is not accepted: ") + X509_verify_cert_error_string(verified);
    if (verified == X509_V_ERR_HOSTNAME_MISMATCH || verified == X509_V_ERR_IP_ADDRESS_MISMATCH) {
      text += "; it is not for \"" + static_cast<const Tls&>(*login_->tls).server_name() +
              "\" (tls_server_name_identification)";
    } else {
      text += "; tls_ca_certificate must name the authority that signed it";
    }
    return Refused(text);
  }

  // What a certificate is the reason of would come again. All else may be damage on the way: another connection may
  // live.
  Status TlsRefusal(const std::string& reason) const {
    for (const char* permanent : {"certificate", "unknown ca", "access denied"}) {
      if (reason.find(permanent) == std::string::npos) continue;
      return Refused("TLS failed: " + reason +
                     "; the server refused this client: check tls_client_certificate and tls_client_key");
    }
    return Lost("TLS failed: " + reason + TlsDoubt());
  }

  void BeginLogin() {
    phase_ = Phase::kReady;
    if (login_->password.empty() && (login_->user_name.empty() || login_->user_name == "default")) return;
    Submit(&auth_, false);
    phase_ = Phase::kLogin;
  }

  // After a call of hiredis that failed.
  Status Failure() {
    std::string text = context_->errstr[0] != '\0' ? context_->errstr : std::strerror(errno);
    if (ssl_ == nullptr) return Lost(text + PlainDoubt());
    // A server that wants another certificate says so after the handshake, and what we send then may meet a connection
    // that it has closed: its word has arrived before that, and is still to be read.
    std::array<char, 4096> ignored;
    for (int reads = 0; ERR_peek_last_error() == 0 && reads < 64; ++reads) {
      if (SSL_read(ssl_, ignored.data(), ignored.size()) <= 0) break;
    }
    if (ERR_peek_last_error() != 0) {
      const std::string reason = OpenSslReason();
      if (reason.find("unexpected eof") == std::string::npos) return TlsRefusal(reason);
      text = "the server closed the connection";
    }
    if (notes_->spoke) return Lost(text);
    return Lost(text + "; does the server ask for a client certificate (tls_client_certificate, tls_client_key)?");
  }

  Status Send() {
    for (size_t before = unsent_bytes(); before > 0;) {
      int done = 0;
      if (redisBufferWrite(context_, &done) != REDIS_OK) return Failure();
      const size_t left = unsent_bytes();
      if (left >= before) break;  // the socket takes no more
      before = left;
    }
    return OkStatus();
  }

  // Rows are taken where they were read to, a buffer that stays in the processor's cache; all else, and the beginning
  // of a row whose end has not come, waits in hiredis' buffer.
  Status Receive(std::vector<RedisTask*>* done) {
    thread_local std::vector<char> bytes(2 * kReadBytes);
    redisReader& reader = *context_->reader;
    while (true) {
      const size_t kept = TakeBack(bytes.data());
      const ssize_t count = context_->funcs->read(context_, bytes.data() + kept, kReadBytes);
      const char* at = bytes.data();
      const char* const end = at + kept + std::max<ssize_t>(count, 0);
      const Status status = reader.pos == reader.len ? TakeLists(&at, end, done) : OkStatus();
      if (redisReaderFeed(&reader, at, static_cast<size_t>(end - at)) != REDIS_OK) {
        return Lost(reader.errstr + PlainDoubt());
      }
      HPS_RETURN_IF_ERROR(status);
      if (count < 0) return Failure();
      if (count == 0) return OkStatus();
      HPS_RETURN_IF_ERROR(Parse(done));
      // Less than was asked for: the socket is empty. A TLS session may hold more in its own buffer.
      if (ssl_ == nullptr && static_cast<size_t>(count) < kReadBytes) return OkStatus();
    }
  }

  // Moves the beginning of an element of a list out of hiredis' buffer.
  size_t TakeBack(char* to) {
    redisReader& reader = *context_->reader;
    const size_t kept = reader.len - reader.pos;
    if (kept > kReadBytes || (kept > 0 && !ListIsNext(reader.buf[reader.pos]))) return 0;
    std::memcpy(to, reader.buf + reader.pos, kept);
    sdsclear(reader.buf);
    reader.pos = reader.len = 0;
    return kept;
  }

  // Whether the byte, the next one, belongs to a list that goes to its task.
  bool ListIsNext(char next) const {
    if (list_.inside()) return true;
    return Streaming() && context_->reader->ridx < 0 && RedisListParser::BeginsList(next);
  }

  // Takes lists from *at on, until something else comes or the bytes end.
  Status TakeLists(const char** at, const char* end, std::vector<RedisTask*>* done) {
    while (*at < end && ListIsNext(**at)) {
      bool complete = false;
      const Status status = list_.Take(*outstanding_.front().task, at, end, &complete);
      if (status.code() == StatusCode::kUnavailable) return Lost(status.message());
      HPS_RETURN_IF_ERROR(status);
      if (!complete) break;
      streamed_ = true;
      HPS_RETURN_IF_ERROR(OnReply(done));
    }
    return OkStatus();
  }

  Status Parse(std::vector<RedisTask*>* done) {
    redisReader& reader = *context_->reader;
    while (reader.pos < reader.len) {  // asked without a byte, hiredis would begin a reply
      if (ListIsNext(reader.buf[reader.pos])) {
        const char* at = reader.buf + reader.pos;
        HPS_RETURN_IF_ERROR(TakeLists(&at, reader.buf + reader.len, done));
        reader.pos = static_cast<size_t>(at - reader.buf);
        if (reader.pos >= kReadBytes) {
          sdsrange(reader.buf, static_cast<ssize_t>(reader.pos), -1);
          reader.pos = 0;
          reader.len = sdslen(reader.buf);
        }
        if (reader.pos == reader.len || !ListIsNext(reader.buf[reader.pos])) continue;
        return CheckEnds();
      }
      void* reply = nullptr;
      const int result = redisReaderGetReply(&reader, &reply);
      if (!refusal_.ok()) return refusal_;
      if (result != REDIS_OK) return Lost(std::string("not a Redis reply: ") + reader.errstr + PlainDoubt());
      if (reply == nullptr) return CheckEnds();
      HPS_RETURN_IF_ERROR(OnReply(done));
    }
    return OkStatus();
  }

  Status CheckEnds() const {
    if (context_->reader->len < kMaxBuffered) return OkStatus();
    return Lost("not a Redis reply: it does not end");
  }

  Status OnReply(std::vector<RedisTask*>* done) {
    if (outstanding_.empty()) return Lost("a reply to no command");
    notes_->spoke = true;
    Entry& entry = outstanding_.front();
    RedisTask& task = *entry.task;
    RedisReply reply = std::move(root_);
    root_ = {};
    const bool streamed = std::exchange(streamed_, false);
    if (reply.kind == RedisReply::Kind::kError && task.error.empty()) task.error = std::move(reply.text);
    if (entry.asking_is_next) {
      entry.asking_is_next = false;
      return OkStatus();
    }
    entry.asking_is_next = entry.asking;
    if (task.streams()) {
      if (!streamed && task.error.empty()) return Lost("a reply to " + task.command + " that is no list");
    } else if (task.error.empty()) {
      HPS_RETURN_IF_ERROR(task.OnReply(task.received, reply));
    }
    if (++task.received < task.replies) return OkStatus();
    outstanding_.pop_front();
    if (&task != &auth_) {
      done->push_back(&task);
      return OkStatus();
    }
    phase_ = Phase::kReady;
    if (task.error.empty()) return OkStatus();
    if (task.error.starts_with("LOADING")) return Lost(task.error);
    if (task.error.ends_with('.')) task.error.pop_back();
    return Refused("user \"" + login_->user_name + "\" could not log in: " + task.error +
                   "; check user_name and password (or password_env, password_file)");
  }

  // hiredis' object functions. What they return is never looked at but for being no nullptr.
  static redisReplyObjectFunctions& Functions() {
    static redisReplyObjectFunctions functions = {
        .createString = [](const redisReadTask* item, char* text, size_t size) -> void* {
          using Kind = RedisReply::Kind;
          const Kind kind = item->type == REDIS_REPLY_STRING  ? Kind::kString
                            : item->type == REDIS_REPLY_ERROR ? Kind::kError
                                                              : Kind::kStatus;
          // hiredis skips what stands behind a string of given length. Unless that is a line break the bytes are not
          // from Redis.
          if (item->type == REDIS_REPLY_STRING && std::memcmp(text + size, "\r\n", 2) != 0) {
            Self(item).Refuse(Self(item).Lost("not a Redis reply: a string without a line break behind it"));
          }
          return Self(item).OnItem(item, kind, 0, text, size);
        },
        .createArray = [](const redisReadTask* item, size_t) -> void* { return Self(item).OnArray(item); },
        .createInteger = [](const redisReadTask* item, long long number) -> void* {
          return Self(item).OnItem(item, RedisReply::Kind::kInteger, number, nullptr, 0);
        },
        .createDouble = [](const redisReadTask* item, double, char* text, size_t size) -> void* {
          return Self(item).OnItem(item, RedisReply::Kind::kStatus, 0, text, size);
        },
        .createNil = [](const redisReadTask* item) -> void* {
          return Self(item).OnItem(item, RedisReply::Kind::kNil, 0, nullptr, 0);
        },
        .createBool = [](const redisReadTask* item, int value) -> void* {
          return Self(item).OnItem(item, RedisReply::Kind::kInteger, value, nullptr, 0);
        },
        .freeObject = [](void*) {},
    };
    return functions;
  }
  static Connection& Self(const redisReadTask* item) { return *static_cast<Connection*>(item->privdata); }

  bool Streaming() const {
    return !outstanding_.empty() && !outstanding_.front().asking_is_next && outstanding_.front().task->streams();
  }
  void Refuse(Status status) {
    if (refusal_.ok()) refusal_ = std::move(status);
  }

  void* OnItem(const redisReadTask* item, RedisReply::Kind kind, int64_t integer, const char* text, size_t size) {
    RedisReply& reply = item->parent == nullptr ? root_ : Parent(item).elements.emplace_back();
    reply.kind = kind;
    reply.integer = integer;
    if (text != nullptr) reply.text.assign(text, size);
    return &reply;
  }

  void* OnArray(const redisReadTask* item) {
    RedisReply& reply = item->parent == nullptr ? root_ : Parent(item).elements.emplace_back();
    reply.kind = RedisReply::Kind::kArray;
    return &reply;
  }
  static RedisReply& Parent(const redisReadTask* item) { return *static_cast<RedisReply*>(item->parent->obj); }

  const RedisEndpoint endpoint_;
  const RedisLogin* const login_;
  RedisServerNotes* const notes_;
  AuthTask auth_;
  const std::vector<Address> addresses_;
  size_t next_address_ = 0;
  bool reachable_ = false;  // an address failed otherwise than by refusing
  bool refused_ = false;
  Phase phase_ = Phase::kConnecting;
  int fd_ = -1;
  redisContext* context_ = nullptr;
  SSL* ssl_ = nullptr;  // owned by the context
  std::deque<Entry> outstanding_;
  std::string buffer_;
  RedisReply root_;
  RedisListParser list_;
  bool streamed_ = false;  // the reply that has just ended went to its task element by element
  Status refusal_;         // of a task, while its reply was parsed
};

}  // namespace

Result<std::shared_ptr<const RedisTls>> RedisTls::Load(const std::string& ca, const std::string& certificate,
                                                       const std::string& key, const std::string& server_name) {
  // Neither the machine's configuration file, which may load modules of another OpenSSL, nor a handler at exit, when
  // threads may still be at work.
  OPENSSL_init_ssl(OPENSSL_INIT_NO_LOAD_CONFIG | OPENSSL_INIT_NO_ATEXIT, nullptr);
  ERR_clear_error();
  SSL_CTX* context = SSL_CTX_new(TLS_client_method());
  if (context == nullptr) return ResourceExhausted("no memory for TLS: " + OpenSslReason());
  auto tls = std::make_shared<Tls>(context, server_name);
  SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
  SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  SSL_CTX_set_verify(context, SSL_VERIFY_PEER, nullptr);
  HPS_RETURN_IF_ERROR(CheckExists("tls_ca_certificate", ca));
  std::error_code error;
  const bool folder = std::filesystem::is_directory(ca, error);
  if (SSL_CTX_load_verify_locations(context, folder ? nullptr : ca.c_str(), folder ? ca.c_str() : nullptr) != 1) {
    return FailedPrecondition("tls_ca_certificate: \"" + ca + "\" has no certificate in PEM form: " + OpenSslReason());
  }
  if (certificate.empty() && key.empty()) return std::shared_ptr<const RedisTls>(tls);
  HPS_RETURN_IF_ERROR(CheckExists("tls_client_certificate", certificate));
  HPS_RETURN_IF_ERROR(CheckExists("tls_client_key", key));
  if (SSL_CTX_use_certificate_chain_file(context, certificate.c_str()) != 1) {
    return FailedPrecondition("tls_client_certificate: \"" + certificate +
                              "\" is no certificate in PEM form: " + OpenSslReason());
  }
  if (SSL_CTX_use_PrivateKey_file(context, key.c_str(), SSL_FILETYPE_PEM) != 1) {
    return FailedPrecondition("tls_client_key: \"" + key + "\" is not the key in PEM form of the certificate \"" +
                              certificate + "\": " + OpenSslReason());
  }
  return std::shared_ptr<const RedisTls>(tls);
}

Result<std::unique_ptr<RedisConnection>> RedisConnection::Begin(const RedisEndpoint& endpoint, const RedisLogin& login,
                                                                RedisServerNotes* notes, Deadline deadline,
                                                                bool* refused) {
  HPS_ASSIGN_OR_RETURN(std::vector<Address> addresses, Resolve(endpoint, deadline));
  auto connection = std::make_unique<Connection>(endpoint, &login, notes, std::move(addresses));
  const Status status = connection->ConnectNext();
  if (refused != nullptr) *refused = connection->refused();
  HPS_RETURN_IF_ERROR(status);
  return std::unique_ptr<RedisConnection>(std::move(connection));
}

}  // namespace hps
