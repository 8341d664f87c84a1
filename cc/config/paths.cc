// Which file a relative path means: the one in the working directory or the one beside ps.json.

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "cc/base/system_limits.h"
#include "cc/config/sharing.h"
#include "hps/config.h"

namespace hps {
namespace {

namespace fs = std::filesystem;

// `path` without "." and ".." and without a slash at its end, unless symbolic links give the short form another
// meaning.
fs::path Tidy(const fs::path& path) {
  fs::path tidy = path.lexically_normal();
  if (!tidy.has_filename() && tidy.has_relative_path()) tidy = tidy.parent_path();
  std::error_code error;
  if (fs::exists(path, error) && !fs::equivalent(path, tidy, error)) return path;
  return tidy;
}

Status MakeAbsolute(const std::string& folder, std::string_view what, bool must_exist, std::string* path) {
  if (path->find("://") != std::string::npos) return OkStatus();  // not a local path
  std::error_code error;
  if (fs::path(*path).is_absolute()) {
    *path = Tidy(*path).string();
    return OkStatus();
  }
  fs::path working_directory = fs::current_path(error);
  if (error) return FailedPrecondition("the working directory cannot be read: " + error.message());
  fs::path here = Tidy(working_directory / *path);
  fs::path there = folder.empty() ? here : Tidy(fs::path(folder) / *path);
  bool here_exists = fs::exists(here, error);
  bool there_exists = fs::exists(there, error);
  if (here_exists && there_exists && !fs::equivalent(here, there, error)) {
    return InvalidArgument(std::string(what) + ": the relative path \"" + *path + "\" means both " + here.string() +
                           " (from the working directory) and " + there.string() +
                           " (beside the configuration); write an absolute path");
  }
  if (must_exist && !here_exists && !there_exists) {
    return NotFound(std::string(what) + ": no such file or folder: " +
                    (here == there ? here.string() + " (from the working directory)"
                                   : "neither " + here.string() + " (from the working directory) nor " +
                                         there.string() + " (beside the configuration)"));
  }
  *path = (there_exists ? there : here).string();
  return OkStatus();
}

}  // namespace

Status MakePathsAbsolute(const std::string& folder, ModelConfig* model) {
  for (size_t i = 0; i < model->tables.size(); ++i) {
    HPS_RETURN_IF_ERROR(MakeAbsolute(folder, "/sparse_files/" + std::to_string(i), true, &model->tables[i].path));
  }
  return OkStatus();
}

Status MakePathsAbsolute(const std::string& folder, ServerConfig* config) {
  for (size_t i = 0; i < config->models.size(); ++i) {
    Status status = MakePathsAbsolute(folder, &config->models[i]);
    if (!status.ok())
      return Status(status.code(), config->origin + ": /models/" + std::to_string(i) + status.message());
  }
  HPS_RETURN_IF_ERROR(
      MakeAbsolute(folder, "/persistent_db/path", false, &config->persistent_db.path).WithContext(config->origin));
  VolatileConfig& redis = config->volatile_db;
  if (redis.type != VolatileType::kRedisCluster) return OkStatus();
  if (!redis.password_file.empty()) {
    HPS_RETURN_IF_ERROR(
        MakeAbsolute(folder, "/volatile_db/password_file", false, &redis.password_file).WithContext(config->origin));
  }
  if (!redis.enable_tls) return OkStatus();
  const std::pair<std::string_view, std::string*> tls_files[] = {
      {"/volatile_db/tls_ca_certificate", &redis.tls_ca_certificate},
      {"/volatile_db/tls_client_certificate", &redis.tls_client_certificate},
      {"/volatile_db/tls_client_key", &redis.tls_client_key},
  };
  for (const auto& [what, path] : tls_files) {
    HPS_RETURN_IF_ERROR(MakeAbsolute(folder, what, false, path).WithContext(config->origin));
  }
  return OkStatus();
}

Result<ServerConfig> LoadConfig(const std::string& path) {
  try {
    std::error_code error;
    fs::path file = fs::absolute(path, error);
    const size_t begin = path.find_first_not_of("\xEF\xBB\xBF \t\r\n");
    const bool text_like = begin != std::string::npos && path[begin] == '{';
    if (text_like && !fs::exists(file, error)) {  // not shown: there may be a password in it
      return InvalidArgument(
          "the configuration is JSON text where the path of a ps.json file is expected; write it into a file, or, in "
          "Python, pass a dict: hps.ParameterServer(json.loads(text))");
    }
    if (path.empty() || error || !fs::exists(file, error)) {
      std::string looked_for = file.string() == path ? "" : " (looked for " + file.string() + ")";
      return NotFound("there is no configuration file \"" + path + "\"" + looked_for + "; give the path of a ps.json");
    }
    if (fs::is_directory(file, error)) {
      return FailedPrecondition(file.string() + " is a folder; give the path of the ps.json in it");
    }
    std::ifstream stream(file, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
    if (!stream.is_open() || stream.bad()) {
      const int problem = errno;
      const std::string text = "the configuration file " + file.string() + " cannot be read: " + std::strerror(problem);
      return LimitReached(problem, text).value_or(FailedPrecondition(text));
    }
    HPS_ASSIGN_OR_RETURN(ServerConfig config, ParseConfig(text, Tidy(file).string()));
    HPS_RETURN_IF_ERROR(MakePathsAbsolute(file.parent_path().string(), &config));
    HPS_RETURN_IF_ERROR(CheckSharing(config.models).WithContext(config.origin));
    return config;
  } catch (const std::exception& error) {  // paths that the system refuses, memory
    return FailedPrecondition("the configuration file " + path + " cannot be read: " + error.what());
  }
}

std::string CanonicalFolder(const std::string& path) {
  std::error_code error;
  fs::path folder = fs::absolute(path, error);
  if (error) folder = path;
  const fs::path canonical = fs::weakly_canonical(folder, error);
  return Tidy(error ? folder : canonical).string();
}

namespace {
constexpr std::string_view kShared = "shared-";
constexpr std::string_view kHexDigits = "0123456789abcdef";
constexpr size_t kSharedDigits = 16;
}  // namespace

// It is part of what is stored: another name would have everybody load everything again.
std::string SharedTableName(const std::string& path) {
  constexpr size_t kMostOfName = 60;
  const fs::path canonical = CanonicalFolder(path);
  std::string name = canonical.filename().string().substr(0, kMostOfName);
  for (char& c : name) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
    if (!plain) c = '-';
  }
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (const char c : canonical.string()) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  std::string digits(kSharedDigits, '0');
  for (size_t i = kSharedDigits; i-- > 0; hash >>= 4) digits[i] = kHexDigits[hash & 15];
  return std::string(kShared) + name + "-" + digits;
}

bool IsSharedTableName(std::string_view name) {
  const size_t end = name.rfind('-');
  return name.starts_with(kShared) && end >= kShared.size() && end != std::string_view::npos &&
         name.size() - end - 1 == kSharedDigits &&
         name.find_first_not_of(kHexDigits, end + 1) == std::string_view::npos;
}

}  // namespace hps
