// Read once, when a store is opened.

#include "cc/storage/redis_secrets.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "cc/base/system_limits.h"

namespace hps {
namespace {

Result<std::string> Password(const RedisStoreOptions& options) {
  const int sources = !options.password.empty() + !options.password_env.empty() + !options.password_file.empty();
  if (sources > 1) return InvalidArgument("more than one of password, password_env and password_file; keep one");
  if (!options.password_env.empty()) {
    const char* value = std::getenv(options.password_env.c_str());
    if (value == nullptr) return NotFound("password_env: there is no environment variable " + options.password_env);
    if (*value == '\0') return FailedPrecondition("password_env: " + options.password_env + " is empty");
    return std::string(value);
  }
  if (!options.password_file.empty()) {
    std::error_code error;
    if (!std::filesystem::exists(options.password_file, error)) {
      return NotFound("password_file: there is no file \"" + options.password_file + "\"");
    }
    std::ifstream file(options.password_file);
    std::string line;
    if (!std::getline(file, line) && !file.eof()) {
      return FailedPrecondition("password_file: \"" + options.password_file +
                                "\" cannot be read: " + std::strerror(errno) + LimitAdvice(errno));
    }
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty())
      return FailedPrecondition("password_file: the first line of \"" + options.password_file + "\" is empty");
    return line;
  }
  return options.password;
}

}  // namespace

Result<RedisLogin> LoadRedisLogin(const RedisStoreOptions& options) {
  RedisLogin login;
  login.user_name = options.user_name;
  HPS_ASSIGN_OR_RETURN(login.password, Password(options));
  if (!options.enable_tls) return login;
  // The configuration's default names stand for "none" where no such files exist: few servers ask for a certificate.
  std::error_code error;
  const auto absent = [&](const std::string& path, const char* default_name) {
    return path.empty() ||
           (std::filesystem::path(path).filename() == default_name && !std::filesystem::exists(path, error));
  };
  const bool no_certificate =
      absent(options.tls_client_certificate, "client_cert.pem") && absent(options.tls_client_key, "client_key.pem");
  HPS_ASSIGN_OR_RETURN(
      login.tls, RedisTls::Load(options.tls_ca_certificate, no_certificate ? "" : options.tls_client_certificate,
                                no_certificate ? "" : options.tls_client_key, options.tls_server_name_identification));
  return login;
}

}  // namespace hps
