// ServerConfig: what a ps.json says, parsed, checked and with every default filled in.
//
// There is one parser for every host (Python, TensorFlow, C++). It knows each key of the predecessor's v24.06
// configuration and of its older documentation, with old and new spellings; docs/configuration.md (generated from the
// same table of fields) lists them. Unknown keys, wrong types, values out of range and lists that do not match the
// tables are kInvalidArgument with the JSON pointer of the place and, for a misspelt key, the nearest known name.
//
// Thread safety: plain values.

#ifndef HPS_CONFIG_H_
#define HPS_CONFIG_H_

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "hps/status.h"

namespace hps {

enum class VolatileType { kDisabled, kHashMap, kMultiProcessHashMap, kRedisCluster };
enum class PersistentType { kDisabled, kRocksDb };
enum class UpdateSourceType { kNone, kKafka };
enum class OverflowPolicy { kEvictOldest, kEvictRandom, kEvictLeastUsed };
// What a lookup does about rows of a tier that cannot be asked: it is down, or too slow.
enum class WhenUnavailable { kFail, kNextTier, kDefault };
enum class CacheType { kDynamic, kStatic, kUvm };

struct TableConfig {
  std::string name;    // embedding_table_names[i]; default "sparse_embedding<i>"
  std::string path;    // sparse_files[i], absolute after LoadConfig: the folder with `key` and `emb_vector`
  uint32_t width = 0;  // embedding_vecsize_per_table[i], float32 values per row
  uint32_t max_keys_per_sample = 0;  // maxnum_catfeature_query_per_table_per_sample[i]; sizes buffers, is no limit
  float default_value = 0.0f;        // default_value_for_each_table[i]; every element of the row of an unknown key
};

struct ModelConfig {
  std::string name;
  std::vector<TableConfig> tables;
  uint32_t max_batch_size = 64;  // sizes buffers, is no limit
  bool share_tables = false;     // with all models that say so and name the same folders: one copy of rows and caches
  // GPU cache.
  bool gpucache = true;
  double gpucacheper = 0.2;
  std::optional<double> hit_rate_threshold;  // absent: exact. Above 1: always wait for misses
  std::vector<int32_t> deployed_devices;     // GPU ordinals
  CacheType cache_type = CacheType::kDynamic;
  bool init_ec = true;
  bool enable_pagelock = false;
  bool fp8_quant = false;
  double cache_refresh_percentage_per_iteration = 0.1;
  double refresh_delay_seconds = 0.0;
  double refresh_interval_seconds = 0.0;
  uint32_t worker_buffers = 1;
};

struct VolatileConfig {
  VolatileType type = VolatileType::kHashMap;
  uint32_t num_partitions = 0;  // filled in: min(16, cores) for hash maps, 8 for Redis
  uint32_t max_get_batch_size = 10000;
  uint32_t max_set_batch_size = 10000;
  uint64_t allocation_rate_bytes = uint64_t{256} << 20;
  uint64_t shared_memory_bytes = uint64_t{16} << 30;
  std::string shared_memory_name = "hctr_mp_hash_map_database";
  bool shared_memory_auto_remove = true;
  std::string address = "127.0.0.1:7000";
  std::string user_name = "default";
  std::string password;
  std::string password_env;   // the environment variable that holds the password
  std::string password_file;  // the file whose first line is the password
  uint32_t num_node_connections = 5;
  bool enable_tls = false;
  std::string tls_ca_certificate = "cacertbundle.crt";
  std::string tls_client_certificate = "client_cert.pem";
  std::string tls_client_key = "client_key.pem";
  std::string tls_server_name_identification = "redis.localhost";
  uint64_t overflow_margin = std::numeric_limits<uint64_t>::max();  // rows per partition
  OverflowPolicy overflow_policy = OverflowPolicy::kEvictOldest;
  double overflow_resolution_target = 0.8;
  double initial_cache_rate = 1.0;
  bool refresh_time_after_fetch = false;
  bool cache_missed_embeddings = false;
  bool initialize_after_startup = true;
  uint32_t timeout_ms = 500;  // one lookup's wait for this tier; 0: none but the lookup's own
  WhenUnavailable when_unavailable = WhenUnavailable::kNextTier;  // filled in: kFail without a persistent tier
  std::vector<std::string> update_filters = {".+"};
};

struct PersistentConfig {
  PersistentType type = PersistentType::kDisabled;
  std::string path;  // default "<temporary folder>/rocksdb"; absolute after LoadConfig
  uint32_t num_threads = 16;
  bool read_only = false;
  uint32_t max_get_batch_size = 10000;
  uint32_t max_set_batch_size = 10000;
  bool initialize_after_startup = true;
  uint32_t timeout_ms = 0;                                    // as above
  WhenUnavailable when_unavailable = WhenUnavailable::kFail;  // kFail or kDefault
  std::vector<std::string> update_filters = {".+"};
};

struct UpdateSourceConfig {
  UpdateSourceType type = UpdateSourceType::kNone;
  std::string brokers = "127.0.0.1:9092";
  uint32_t poll_timeout_ms = 500;
  uint32_t max_receive_buffer_size = 2000;
  uint32_t max_batch_size = 1000;
  uint32_t failure_backoff_ms = 50;
  uint32_t metadata_refresh_interval_ms = 30000;
  uint32_t receive_buffer_size = 262144;
  uint32_t max_commit_interval = 32;
};

struct ServerConfig {
  bool long_keys = true;  // supportlonglong; false: keys must fit in 32 bits, stored databases hold 4-byte keys
  uint32_t lookup_timeout_ms = 0;  // of a whole lookup that brings no deadline of its own; 0: none
  std::vector<ModelConfig> models;
  VolatileConfig volatile_db;
  PersistentConfig persistent_db;
  UpdateSourceConfig update_source;

  std::string origin;  // the file it was read from, or "configuration"
  // One line each, for the host to show once: keys without effect here, padded lists and the like.
  std::vector<std::string> information;
  std::vector<std::string> warnings;
};

// Parses and checks `json`. `origin` names it in errors. Paths stay as written.
Result<ServerConfig> ParseConfig(std::string_view json, std::string_view origin = "configuration");

// Reads and parses a file, then makes paths absolute: a relative path is taken from the working directory, then from
// the folder of the file; where both exist and are not the same, kInvalidArgument names both. kNotFound if there is no
// such file or a table's relative path exists in neither place, kFailedPrecondition if the file cannot be read.
Result<ServerConfig> LoadConfig(const std::string& path);

// Parses one element of "models" (the form that ParameterServer::LoadModel takes).
// *warnings, if given, receives what ServerConfig::warnings would.
Result<ModelConfig> ParseModelConfig(std::string_view json, std::string_view origin = "configuration",
                                     std::vector<std::string>* warnings = nullptr);

// The path rule of LoadConfig for what came as text: `folder` is searched after the working directory ("": only that).
// A table's relative path that exists in neither place is kNotFound.
Status MakePathsAbsolute(const std::string& folder, ServerConfig* config);
Status MakePathsAbsolute(const std::string& folder, ModelConfig* model);

// A table's folder however it is written: absolute, without links, also where it is not there.
std::string CanonicalFolder(const std::string& path);
// The name that stores and metrics have, in the place of a model's, for the rows that models share (share_tables): made
// of the canonical folder. Its one table is "rows".
std::string SharedTableName(const std::string& path);
// Whether a name could be one of those; models cannot be called so.
bool IsSharedTableName(std::string_view name);

// The configuration in one normal form: every key spelt out, sorted, without secrets and without `origin`. Equal
// configurations give equal text.
std::string CanonicalJson(const ServerConfig& config);
// 16 hexadecimal digits over CanonicalJson and the secrets.
std::string ConfigHash(const ServerConfig& config);

// kUnimplemented "not built yet: ..." where the configuration really needs a feature that this build does not have.
Status CheckBuilt(const ServerConfig& config);

// A JSON schema (draft 2020-12) of ps.json for editors, and the reference page, both made from the table of fields.
std::string ConfigJsonSchema();
std::string ConfigReferenceMarkdown();

}  // namespace hps

#endif  // HPS_CONFIG_H_
