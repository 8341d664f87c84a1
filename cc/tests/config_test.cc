// The configuration: every key, every alias, every refusal with its place and its advice, the canonical text, the hash,
// the path rule, and the two pages that are made from the table of fields.

#include "hps/config.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "cc/config/fields.h"
#include "cc/config/json_value.h"

namespace hps {
namespace {

namespace fs = std::filesystem;
using ::testing::IsNotSubstring;
using ::testing::IsSubstring;

// A model of two tables; `members` come first and replace those given here, `left_out` is missing.
std::string Model(const std::string& members = "", const std::string& name = "dlrm", const std::string& left_out = "") {
  std::string text = "{" + members;
  std::pair<std::string, std::string> defaults[] = {
      {"model", "\"" + name + "\""},
      {"sparse_files", R"(["/data/a", "/data/b"])"},
      {"embedding_vecsize_per_table", "[16, 32]"},
      {"maxnum_catfeature_query_per_table_per_sample", "[2, 26]"},
  };
  for (const auto& [key, value] : defaults) {
    if (key == left_out || members.find("\"" + key + "\":") != std::string::npos) continue;
    text += std::string(text == "{" ? "" : ", ") + "\"" + key + "\": " + value;
  }
  return text + "}";
}

std::string Document(const std::string& models, const std::string& members = "") {
  return "{\"supportlonglong\": true, \"models\": [" + models + "]" + (members.empty() ? "" : ", " + members) + "}";
}

// The smallest document with `member` ("\"key\": value") in the named section.
std::string With(const std::string& pointer, const std::string& member) {
  if (pointer == "/models/*") return Document(Model(member));
  if (!pointer.empty()) return Document(Model(), "\"" + pointer.substr(1) + "\": {" + member + "}");
  if (member.starts_with("\"supportlonglong\"")) return "{" + member + ", \"models\": [" + Model() + "]}";
  if (member.starts_with("\"models\"")) return "{\"supportlonglong\": true, " + member + "}";
  return Document(Model(), member);
}

ServerConfig Parsed(const std::string& text) {
  Result<ServerConfig> config = ParseConfig(text, "ps.json");
  EXPECT_TRUE(config.ok()) << config.status().ToString() << "\n" << text;
  return config.ok() ? std::move(config).value() : ServerConfig();
}

std::string Refusal(const std::string& text, StatusCode code = StatusCode::kInvalidArgument) {
  Result<ServerConfig> config = ParseConfig(text, "ps.json");
  EXPECT_FALSE(config.ok()) << text;
  if (config.ok()) return "";
  EXPECT_EQ(config.status().code(), code);
  EXPECT_EQ(config.status().message().find("ps.json: "), 0u);
  return config.status().message();
}

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (fs::temp_directory_path() / "hps_config_test_XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~TemporaryFolder() { fs::remove_all(path_); }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

// Runs a test in another working directory and comes back.
class WorkingDirectory {
 public:
  explicit WorkingDirectory(const fs::path& path) : before_(fs::current_path()) { fs::current_path(path); }
  ~WorkingDirectory() { fs::current_path(before_); }

 private:
  fs::path before_;
};

void WriteFile(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

// ---------------------------------------------------------------------------------------------------------- each key

struct KeyCase {
  std::string section;
  std::string key;
  std::string value;                                  // differs from the default
  std::function<bool(const ServerConfig&)> is_taken;  // empty: the key has no effect
};

template <typename T>
auto ModelHas(T ModelConfig::*member, T value) {
  return [=](const ServerConfig& config) { return config.models[0].*member == value; };
}
template <typename T>
auto TablesHave(T TableConfig::*member, T first, T second) {
  return [=](const ServerConfig& config) {
    const auto& tables = config.models[0].tables;
    return tables.size() == 2 && tables[0].*member == first && tables[1].*member == second;
  };
}
template <typename S, typename T>
auto Has(S ServerConfig::*section, T S::*member, std::type_identity_t<T> value) {
  return [=](const ServerConfig& config) { return config.*section.*member == value; };
}

std::vector<KeyCase> KeyCases() {
  using C = ServerConfig;
  using M = ModelConfig;
  using T = TableConfig;
  using V = VolatileConfig;
  using P = PersistentConfig;
  using U = UpdateSourceConfig;
  const std::string model = "/models/*", memory = "/volatile_db", disk = "/persistent_db", source = "/update_source";
  const auto v = &C::volatile_db;
  const auto p = &C::persistent_db;
  const auto u = &C::update_source;
  using Strings = std::vector<std::string>;
  return {
      {"", "$schema", "\"ps.schema.json\"", [](const C&) { return true; }},
      {"", "supportlonglong", "false", [](const C& c) { return !c.long_keys; }},
      {"", "fuse_embedding_table", "true", {}},
      {"", "lookup_timeout_ms", "250", [](const C& c) { return c.lookup_timeout_ms == 250; }},
      {"", "models", "[" + Model("", "other") + "]", [](const C& c) { return c.models[0].name == "other"; }},
      {"", "volatile_db", R"({"type": "disabled"})", Has(v, &V::type, VolatileType::kDisabled)},
      {"", "persistent_db", R"({"type": "rocks_db"})", Has(p, &P::type, PersistentType::kRocksDb)},
      {"", "update_source", R"({"type": "kafka"})", Has(u, &U::type, UpdateSourceType::kKafka)},

      {model, "model", "\"A-1_b\"", ModelHas(&M::name, std::string("A-1_b"))},
      {model, "sparse_files", R"(["/x", "/y"])", TablesHave<std::string>(&T::path, "/x", "/y")},
      {model, "embedding_vecsize_per_table", "[1, 130]", TablesHave<uint32_t>(&T::width, 1, 130)},
      {model, "maxnum_catfeature_query_per_table_per_sample", "[5, 7]",
       TablesHave<uint32_t>(&T::max_keys_per_sample, 5, 7)},
      {model, "default_value_for_each_table", "[0.5, -2]", TablesHave<float>(&T::default_value, 0.5f, -2.0f)},
      {model, "embedding_table_names", R"(["user", "item"])", TablesHave<std::string>(&T::name, "user", "item")},
      {model, "deployed_device_list", "[1, 0]", ModelHas(&M::deployed_devices, std::vector<int32_t>{1, 0})},
      {model, "max_batch_size", "1000000", ModelHas(&M::max_batch_size, 1000000u)},
      {model, "share_tables", "true", ModelHas(&M::share_tables, true)},
      {model, "gpucache", "false", ModelHas(&M::gpucache, false)},
      {model, "gpucacheper", "1", ModelHas(&M::gpucacheper, 1.0)},
      {model, "hit_rate_threshold", "1.1", ModelHas(&M::hit_rate_threshold, std::optional<double>(1.1))},
      {model, "use_static_table", "true", ModelHas(&M::cache_type, CacheType::kStatic)},
      {model, "embedding_cache_type", "\"uvm\"", ModelHas(&M::cache_type, CacheType::kUvm)},
      {model, "init_ec", "false", ModelHas(&M::init_ec, false)},
      {model, "enable_pagelock", R"(true, "embedding_cache_type": "static")", ModelHas(&M::enable_pagelock, true)},
      {model, "fp8_quant", R"(true, "embedding_cache_type": "uvm")", ModelHas(&M::fp8_quant, true)},
      {model, "use_context_stream", "false", {}},
      {model, "cache_refresh_percentage_per_iteration", "0", ModelHas(&M::cache_refresh_percentage_per_iteration, 0.0)},
      {model, "refresh_delay", "1.5", ModelHas(&M::refresh_delay_seconds, 1.5)},
      {model, "refresh_interval", "0.25", ModelHas(&M::refresh_interval_seconds, 0.25)},
      {model, "num_of_worker_buffer_in_pool", "4", ModelHas(&M::worker_buffers, 4u)},
      {model, "num_of_refresher_buffer_in_pool", "0", {}},
      {model, "thread_pool_size", "3", {}},
      {model, "fuse_embedding_table", "false", {}},
      {model, "use_hctr_cache_implementation", "false", {}},
      {model, "device_id", "1", {}},
      {model, "freeze_sparse", "true", {}},
      {model, "dense_file", "\"dense.model\"", {}},
      {model, "network_file", "\"network.json\"", {}},
      {model, "maxnum_des_feature_per_sample", "13", {}},
      {model, "label_dim", "2", {}},
      {model, "slot_num", "3", {}},
      {model, "use_mixed_precision", "true", {}},
      {model, "scaler", "1024", {}},
      {model, "use_algorithm_search", "false", {}},
      {model, "use_cuda_graph", "false", {}},

      {memory, "type", "\"redis_cluster\"", Has(v, &V::type, VolatileType::kRedisCluster)},
      {memory, "num_partitions", "7", Has(v, &V::num_partitions, 7)},
      {memory, "max_batch_size", "65536", Has(v, &V::max_set_batch_size, 65536)},
      {memory, "max_get_batch_size", "1000000", Has(v, &V::max_get_batch_size, 1000000)},
      {memory, "max_set_batch_size", "1000000", Has(v, &V::max_set_batch_size, 1000000)},
      {memory, "allocation_rate", "1048576", Has(v, &V::allocation_rate_bytes, 1048576)},
      {memory, "shared_memory_size", "4096", Has(v, &V::shared_memory_bytes, 4096)},
      {memory, "shared_memory_name", "\"s\"", Has(v, &V::shared_memory_name, "s")},
      {memory, "shared_memory_auto_remove", "false", Has(v, &V::shared_memory_auto_remove, false)},
      {memory, "address", "\"a:7000,b:7001\"", Has(v, &V::address, "a:7000,b:7001")},
      {memory, "user_name", "\"u\"", Has(v, &V::user_name, "u")},
      {memory, "password", "\"secret\"", Has(v, &V::password, "secret")},
      {memory, "password_env", "\"E\"", Has(v, &V::password_env, "E")},
      {memory, "password_file", "\"f\"", Has(v, &V::password_file, "f")},
      {memory, "num_node_connections", "2", Has(v, &V::num_node_connections, 2)},
      {memory, "enable_tls", "true", Has(v, &V::enable_tls, true)},
      {memory, "tls_ca_certificate", "\"ca\"", Has(v, &V::tls_ca_certificate, "ca")},
      {memory, "tls_client_certificate", "\"c\"", Has(v, &V::tls_client_certificate, "c")},
      {memory, "tls_client_key", "\"k\"", Has(v, &V::tls_client_key, "k")},
      {memory, "tls_server_name_identification", "\"n\"", Has(v, &V::tls_server_name_identification, "n")},
      {memory, "overflow_margin", "1000000", Has(v, &V::overflow_margin, 1000000)},
      {memory, "overflow_policy", "\"evict_random\"", Has(v, &V::overflow_policy, OverflowPolicy::kEvictRandom)},
      {memory, "overflow_resolution_target", "0.5", Has(v, &V::overflow_resolution_target, 0.5)},
      {memory, "initial_cache_rate", "1.0", Has(v, &V::initial_cache_rate, 1.0)},
      {memory, "refresh_time_after_fetch", "true", Has(v, &V::refresh_time_after_fetch, true)},
      {memory, "cache_missed_embeddings", "true", Has(v, &V::cache_missed_embeddings, true)},
      {memory, "initialize_after_startup", "false", Has(v, &V::initialize_after_startup, false)},
      {memory, "timeout_ms", "7", Has(v, &V::timeout_ms, 7)},
      {memory, "when_unavailable", "\"default\"", Has(v, &V::when_unavailable, WhenUnavailable::kDefault)},
      {memory, "update_filters", R"(["^a$", "b"])", Has(v, &V::update_filters, Strings{"^a$", "b"})},
      {memory, "algorithm", "\"stl\"", {}},

      {disk, "type", "\"disabled\"", Has(p, &P::type, PersistentType::kDisabled)},
      {disk, "path", "\"/db\"", Has(p, &P::path, "/db")},
      {disk, "num_threads", "2", Has(p, &P::num_threads, 2)},
      {disk, "read_only", "true", Has(p, &P::read_only, true)},
      {disk, "max_batch_size", "65536", Has(p, &P::max_get_batch_size, 65536)},
      {disk, "max_get_batch_size", "3", Has(p, &P::max_get_batch_size, 3)},
      {disk, "max_set_batch_size", "4", Has(p, &P::max_set_batch_size, 4)},
      {disk, "initialize_after_startup", "false", Has(p, &P::initialize_after_startup, false)},
      {disk, "timeout_ms", "8", Has(p, &P::timeout_ms, 8)},
      {disk, "when_unavailable", "\"default\"", Has(p, &P::when_unavailable, WhenUnavailable::kDefault)},
      {disk, "update_filters", "[]", Has(p, &P::update_filters, Strings{})},

      {source, "type", "\"null\"", Has(u, &U::type, UpdateSourceType::kNone)},
      {source, "brokers", "\"a:9092;b:9092\"", Has(u, &U::brokers, "a:9092;b:9092")},
      {source, "poll_timeout_ms", "1", Has(u, &U::poll_timeout_ms, 1)},
      {source, "max_receive_buffer_size", "2", Has(u, &U::max_receive_buffer_size, 2)},
      {source, "max_batch_size", "8192", Has(u, &U::max_batch_size, 8192)},
      {source, "failure_backoff_ms", "0", Has(u, &U::failure_backoff_ms, 0)},
      {source, "metadata_refresh_interval_ms", "10", Has(u, &U::metadata_refresh_interval_ms, 10)},
      {source, "receive_buffer_size", "1024", Has(u, &U::receive_buffer_size, 1024)},
      {source, "max_commit_interval", "0", Has(u, &U::max_commit_interval, 0)},
  };
}

TEST(ConfigKeys, EachKeyIsTakenOrSaysThatItHasNoEffect) {
  for (const KeyCase& key : KeyCases()) {
    SCOPED_TRACE(key.section + "/" + key.key);
    ServerConfig config = Parsed(With(key.section, "\"" + key.key + "\": " + key.value));
    if (HasFatalFailure() || config.models.empty()) continue;
    EXPECT_TRUE(config.warnings.empty());
    if (key.is_taken) {
      EXPECT_TRUE(key.is_taken(config));
      EXPECT_TRUE(config.information.empty());
    } else {
      EXPECT_EQ(config.information,
                (std::vector<std::string>{"ps.json: these keys are known and change no lookup here: " + key.key}));
      EXPECT_EQ(CanonicalJson(config),
                CanonicalJson(Parsed(Document(Model(), key.section == "/volatile_db" ? "\"volatile_db\": {}" : ""))));
    }
  }
}

TEST(ConfigKeys, TheCasesAboveNameEveryKeyOfTheTable) {
  std::set<std::string> in_cases, in_table;
  for (const KeyCase& key : KeyCases()) in_cases.insert(key.section + "/" + key.key);
  for (const SectionInfo* section : AllSections()) {
    for (const FieldInfo* field : section->fields) {
      std::string name = std::string(section->pointer) + "/" + std::string(field->name);
      EXPECT_TRUE(in_table.insert(name).second) << name << " is in the table twice";
    }
  }
  EXPECT_EQ(in_cases, in_table);
}

TEST(ConfigKeys, OneLineNamesAllKeysWithoutEffectOnce) {
  std::string model = R"("dense_file": "d", "use_cuda_graph": true)";
  ServerConfig config =
      Parsed(Document(Model(model, "a") + "," + Model(model, "b"), R"("volatile_db": {"algorithm": "phm"})"));
  EXPECT_EQ(config.information,
            (std::vector<std::string>{
                "ps.json: these keys are known and change no lookup here: dense_file use_cuda_graph algorithm"}));
}

TEST(ConfigKeys, EachSpellingOfEachEnumeration) {
  const std::map<std::string, std::vector<std::string>> spellings[] = {
      {{"disabled", {"disabled", "disable", "none"}},
       {"hash_map",
        {"hash_map", "hashmap", "hash", "map", "parallel_hash_map", "parallel_hashmap", "parallel_hash",
         "parallel_map"}},
       {"multi_process_hash_map",
        {"multi_process_hash_map", "multi_process_hashmap", "multi_process_hash", "multi_process_map"}},
       {"redis_cluster", {"redis_cluster", "redis"}}},
      {{"disabled", {"disabled", "disable", "none"}}, {"rocks_db", {"rocks_db", "rocksdb", "rocks"}}},
      {{"null", {"null", "none"}}, {"kafka_message_queue", {"kafka_message_queue", "kafka_mq", "kafka"}}},
      {{"evict_oldest", {"evict_oldest"}},
       {"evict_random", {"evict_random"}},
       {"evict_least_used", {"evict_least_used"}}},
      {{"dynamic", {"dynamic", "stochastic"}}, {"static", {"static"}}, {"uvm", {"uvm"}}},
  };
  const std::pair<std::string, std::string> keys[] = {{"/volatile_db", "type"},
                                                      {"/persistent_db", "type"},
                                                      {"/update_source", "type"},
                                                      {"/volatile_db", "overflow_policy"},
                                                      {"/models/*", "embedding_cache_type"}};
  for (size_t i = 0; i < std::size(keys); ++i) {
    const auto& [section, key] = keys[i];
    for (const auto& [canonical, accepted] : spellings[i]) {
      for (const std::string& spelling : accepted) {
        std::string text = CanonicalJson(Parsed(With(section, "\"" + key + "\": \"" + spelling + "\"")));
        EXPECT_PRED_FORMAT2(IsSubstring, "\"" + key + "\": \"" + canonical + "\"", text) << section << " " << spelling;
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- defaults

TEST(ConfigDefaults, AreTheDocumentedOnes) {
  ServerConfig config = Parsed(Document(Model()));
  const ModelConfig& model = config.models[0];
  EXPECT_EQ(model.tables[0].name, "sparse_embedding0");
  EXPECT_EQ(model.tables[1].name, "sparse_embedding1");
  EXPECT_EQ(model.tables[1].default_value, 0.0f);
  EXPECT_EQ(model.deployed_devices, (std::vector<int32_t>{0}));
  EXPECT_EQ(model.max_batch_size, 64u);
  EXPECT_TRUE(model.gpucache);
  EXPECT_EQ(model.gpucacheper, 0.2);
  EXPECT_FALSE(model.hit_rate_threshold.has_value());
  EXPECT_EQ(model.cache_refresh_percentage_per_iteration, 0.1);
  EXPECT_EQ(config.volatile_db.type, VolatileType::kHashMap);
  EXPECT_EQ(config.volatile_db.num_partitions, std::min(16u, std::max(1u, std::thread::hardware_concurrency())));
  EXPECT_EQ(config.volatile_db.max_get_batch_size, 10000u);
  EXPECT_EQ(config.volatile_db.overflow_policy, OverflowPolicy::kEvictOldest);
  EXPECT_EQ(config.volatile_db.overflow_margin, UINT64_MAX);
  EXPECT_EQ(config.volatile_db.update_filters, (std::vector<std::string>{".+"}));
  EXPECT_EQ(config.persistent_db.type, PersistentType::kDisabled);
  EXPECT_EQ(config.persistent_db.path, (fs::temp_directory_path() / "rocksdb").string());
  EXPECT_EQ(config.update_source.type, UpdateSourceType::kNone);
  EXPECT_TRUE(config.information.empty());
  EXPECT_TRUE(config.warnings.empty());
}

TEST(ConfigDefaults, WhatFollowsAnUnavailableTier) {
  const std::string disk = R"("persistent_db": {"type": "rocks_db"})";
  EXPECT_EQ(Parsed(Document(Model())).volatile_db.when_unavailable, WhenUnavailable::kFail);
  EXPECT_EQ(Parsed(Document(Model(), disk)).volatile_db.when_unavailable, WhenUnavailable::kNextTier);
  EXPECT_EQ(Parsed(Document(Model(), disk)).persistent_db.when_unavailable, WhenUnavailable::kFail);
  EXPECT_PRED_FORMAT2(IsSubstring, "/volatile_db/when_unavailable: is \"next_tier\", but there is no persistent_db",
                      Refusal(With("/volatile_db", R"("when_unavailable": "next_tier")")));
  EXPECT_PRED_FORMAT2(IsSubstring, "/persistent_db/when_unavailable: is \"next_tier\", but no tier follows",
                      Refusal(With("/persistent_db", R"("when_unavailable": "next_tier")")));
}

TEST(ConfigDefaults, OnePlaceForThePassword) {
  EXPECT_PRED_FORMAT2(IsSubstring, "/volatile_db: has more than one of password, password_env and password_file",
                      Refusal(With("/volatile_db", R"("password_env": "A", "password_file": "b")")));
}

TEST(ConfigDefaults, SectionsWithoutType) {
  EXPECT_EQ(Parsed(With("/volatile_db", "")).volatile_db.type, VolatileType::kHashMap);
  EXPECT_EQ(Parsed(With("/persistent_db", "")).persistent_db.type, PersistentType::kRocksDb);
  EXPECT_EQ(Parsed(With("/update_source", "")).update_source.type, UpdateSourceType::kKafka);
  EXPECT_EQ(Parsed(With("/volatile_db", R"("type": "redis")")).volatile_db.num_partitions, 8u);
  EXPECT_EQ(Parsed(With("/volatile_db", R"("type": "multi_process_hash_map")")).volatile_db.num_partitions, 16u);
}

TEST(ConfigDefaults, ShortListOfDefaultValuesIsPaddedWithAWarning) {
  ServerConfig config = Parsed(With("/models/*", R"("default_value_for_each_table": [2.5])"));
  EXPECT_EQ(config.models[0].tables[0].default_value, 2.5f);
  EXPECT_EQ(config.models[0].tables[1].default_value, 0.0f);
  ASSERT_EQ(config.warnings.size(), 1u);
  EXPECT_PRED_FORMAT2(IsSubstring, "/models/0/default_value_for_each_table: has 1 elements for 2 tables",
                      config.warnings[0]);

  std::vector<std::string> warnings;
  ASSERT_TRUE(ParseModelConfig(Model(R"("default_value_for_each_table": [])"), "m.json", &warnings).ok());
  EXPECT_EQ(warnings.size(), 1u);
}

TEST(ConfigSpellings, OneBatchSizeSetsBoth) {
  for (const char* section : {"/volatile_db", "/persistent_db"}) {
    ServerConfig config = Parsed(With(section, R"("max_batch_size": 77, "max_get_batch_size": 77)"));
    bool is_volatile = std::string(section) == "/volatile_db";
    EXPECT_EQ(is_volatile ? config.volatile_db.max_get_batch_size : config.persistent_db.max_get_batch_size, 77u);
    EXPECT_EQ(is_volatile ? config.volatile_db.max_set_batch_size : config.persistent_db.max_set_batch_size, 77u);
    for (const char* other : {"max_get_batch_size", "max_set_batch_size"}) {
      EXPECT_PRED_FORMAT2(IsSubstring, std::string(section) + "/max_batch_size: stands for",
                          Refusal(With(section, "\"max_batch_size\": 77, \"" + std::string(other) + "\": 78")));
    }
  }
}

TEST(ConfigWarnings, KeysThatTheTypeOfCacheLeavesIdle) {
  const auto warnings = [](const std::string& keys) { return Parsed(With("/models/*", keys)).warnings; };
  const std::string idle = R"("init_ec": false, "hit_rate_threshold": 0.9, "refresh_delay": 1, "refresh_interval": 2)";
  EXPECT_TRUE(warnings(idle).empty());
  for (const std::string type : {"static", "uvm"}) {
    const std::string and_type = R"(, "embedding_cache_type": ")" + type + "\"";
    const auto found = warnings(idle + and_type);
    ASSERT_EQ(found.size(), 4u) << type;
    EXPECT_PRED_FORMAT2(IsSubstring, "/models/0/init_ec: has no effect: a cache of this embedding_cache_type",
                        found[0]);
    EXPECT_PRED_FORMAT2(IsSubstring, "/models/0/refresh_interval: has no effect", found[3]);
    EXPECT_TRUE(warnings(idle + R"(, "gpucache": false)" + and_type).empty());
    EXPECT_TRUE(warnings(R"("hit_rate_threshold": 1.0)" + and_type).empty());
  }
  const auto never = warnings(R"("refresh_interval": 2, "cache_refresh_percentage_per_iteration": 0)");
  ASSERT_EQ(never.size(), 1u);
  EXPECT_PRED_FORMAT2(IsSubstring, "/models/0/refresh_interval: has no effect while cache_refresh", never[0]);
}

TEST(ConfigSpellings, StaticTable) {
  EXPECT_EQ(
      Parsed(With("/models/*", R"("use_static_table": false, "embedding_cache_type": "uvm")")).models[0].cache_type,
      CacheType::kUvm);
  EXPECT_EQ(
      Parsed(With("/models/*", R"("use_static_table": true, "embedding_cache_type": "static")")).models[0].cache_type,
      CacheType::kStatic);
  EXPECT_PRED_FORMAT2(IsSubstring, "/models/0/use_static_table: means",
                      Refusal(With("/models/*", R"("use_static_table": true, "embedding_cache_type": "dynamic")")));
  EXPECT_PRED_FORMAT2(IsSubstring, "/models/0/use_static_table: is false",
                      Refusal(With("/models/*", R"("use_static_table": false, "embedding_cache_type": "static")")));
}

// ----------------------------------------------------------------------------------------------------------- refusals

struct RefusalCase {
  std::string section;
  std::string member;
  std::string message;
};

TEST(ConfigRefusals, NameThePlaceAndTheRemedy) {
  const std::string model = "/models/*", memory = "/volatile_db", disk = "/persistent_db", source = "/update_source";
  const RefusalCase cases[] = {
      // Unknown keys.
      {"", R"("volatile_bd": {})", R"(/volatile_bd: unknown key; did you mean "volatile_db"?)"},
      {"", R"("suportlonglong": true)", R"(did you mean "supportlonglong"?)"},
      {model, R"("gpucachper": 0.5)", R"(/models/0/gpucachper: unknown key; did you mean "gpucacheper"?)"},
      {model, R"("fp8": true)", R"(/models/0/fp8: unknown key; did you mean "fp8_quant"?)"},
      {model, R"("embeding_vecsize_per_table": [1])", R"(did you mean "embedding_vecsize_per_table"?)"},
      {model, R"("supportlonglong": true)", "/models/0/supportlonglong: unknown key here; it belongs to the top level"},
      {"", R"("gpucache": true)", "/gpucache: unknown key here; it belongs in /models/*"},
      {memory, R"("adress": "a")", R"(/volatile_db/adress: unknown key; did you mean "address"?)"},
      {memory, R"("path": "/x")", "/volatile_db/path: unknown key here; it belongs in /persistent_db"},
      {disk, R"("read-only": true)", R"(/persistent_db/read-only: unknown key; did you mean "read_only"?)"},
      {source, R"("broker": "a")", R"(/update_source/broker: unknown key; did you mean "brokers"?)"},
      {memory, R"("a/b~c": 1)", "/volatile_db/a~1b~0c: unknown key"},
      {memory, R"("": 1)", "/volatile_db/: unknown key"},
      // Types.
      {"", R"("supportlonglong": "true")", R"(/supportlonglong: must be true or false, got the string "true")"},
      {"", R"("supportlonglong": 1)", "/supportlonglong: must be true or false, got 1"},
      {"", R"("models": {})", "/models: must be a list of models, got an object"},
      {"", R"("models": [3])", "/models/0: must be an object"},
      {"", R"("models": [])", "/models: is empty"},
      {"", R"("volatile_db": null)", "/volatile_db: must be an object"},
      {"", R"("update_source": [])", "/update_source: must be an object"},
      {model, R"("model": 7)", "/models/0/model: must be a string, got 7"},
      {model, R"("max_batch_size": true)",
       "/models/0/max_batch_size: must be an integer from 1 to 4294967295, got true"},
      {model, R"("max_batch_size": "64")", "/models/0/max_batch_size: must be an integer"},
      {model, R"("max_batch_size": 64.5)", "got 64.5"},
      {model, R"("max_batch_size": null)", "got null"},
      {model, R"("gpucacheper": true)", "/models/0/gpucacheper: must be a number >= 0 and <= 1, got true"},
      {model, R"("sparse_files": "/data/a")", "/models/0/sparse_files: must be a list"},
      {model, R"("sparse_files": ["/data/a", 3])", "/models/0/sparse_files/1: must be a string, got 3"},
      {model, R"("deployed_device_list": 0)", "/models/0/deployed_device_list: must be a list, got 0"},
      {model, R"("dense_file": 1)", "/models/0/dense_file: must be a string, got 1"},
      {model, R"("use_cuda_graph": 1)", "/models/0/use_cuda_graph: must be true or false"},
      {model, R"("maxnum_des_feature_per_sample": -1)", "/models/0/maxnum_des_feature_per_sample: must be an integer"},
      {memory, R"("update_filters": ".+")", "/volatile_db/update_filters: must be a list"},
      // Limits.
      {model, R"("max_batch_size": 0)", "/models/0/max_batch_size: must be an integer from 1"},
      {model, R"("max_batch_size": -1)", "got -1"},
      {model, R"("max_batch_size": 4294967296)", "got 4294967296"},
      {model, R"("max_batch_size": 1e300)", "/models/0/max_batch_size: must be an integer"},
      {model, R"("gpucacheper": 1.5)", "got 1.5"},
      {model, R"("gpucacheper": -0.1)", "got -0.1"},
      {model, R"("gpucacheper": 0)", "/models/0/gpucacheper: must be > 0 while gpucache is true"},
      {model, R"("model": "shared-t-0123456789abcdef")", "/models/0/model: \"shared-t-0123456789abcdef\" is a name of"},
      {model, R"("enable_pagelock": true)", "/models/0/enable_pagelock: puts the rows of static caches"},
      {model, R"("enable_pagelock": true, "embedding_cache_type": "uvm")", "/models/0/enable_pagelock: puts the rows"},
      {model, R"("fp8_quant": true)", "/models/0/fp8_quant: is for caches that hold whole tables"},
      {model, R"("hit_rate_threshold": -0.5)", "/models/0/hit_rate_threshold: must be a number >= 0"},
      {model, R"("cache_refresh_percentage_per_iteration": 1.01)", "must be a number >= 0 and <= 1"},
      {model, R"("refresh_delay": -1)", "/models/0/refresh_delay"},
      {model, R"("refresh_interval": -1)", "/models/0/refresh_interval"},
      {model, R"("num_of_worker_buffer_in_pool": 0)", "/models/0/num_of_worker_buffer_in_pool"},
      {model, R"("thread_pool_size": 0)", "/models/0/thread_pool_size"},
      {model, R"("embedding_vecsize_per_table": [16, 0])", "/models/0/embedding_vecsize_per_table/1: must be"},
      {model, R"("maxnum_catfeature_query_per_table_per_sample": [0, 1])", "per_sample/0: must be an integer from 1"},
      {model, R"("default_value_for_each_table": [1e39, 0])",
       "/models/0/default_value_for_each_table/0: must be a "
       "number within the range of float32"},
      {model, R"("deployed_device_list": [-1])", "/models/0/deployed_device_list/0: must be an integer from 0"},
      {model, R"("deployed_device_list": [0, 1, 0])", "/models/0/deployed_device_list/2: the device is in the list"},
      {memory, R"("num_partitions": 0)", "/volatile_db/num_partitions: must be an integer from 1 to 65536"},
      {memory, R"("max_batch_size": 0)", "/volatile_db/max_batch_size"},
      {memory, R"("max_get_batch_size": 0)", "/volatile_db/max_get_batch_size"},
      {memory, R"("max_set_batch_size": 0)", "/volatile_db/max_set_batch_size"},
      {memory, R"("allocation_rate": 0)", "/volatile_db/allocation_rate"},
      {memory, R"("overflow_margin": 0)", "/volatile_db/overflow_margin"},
      {memory, R"("overflow_margin": 18446744073709551616)",
       "/volatile_db/overflow_margin: must be an integer from 1 "
       "to 18446744073709551615"},
      {memory, R"("overflow_resolution_target": 0)", "must be a number > 0 and < 1, got 0"},
      {memory, R"("overflow_resolution_target": 1.0)", "must be a number > 0 and < 1, got 1.0"},
      {memory, R"("initial_cache_rate": 1.5)", "/volatile_db/initial_cache_rate: must be a number"},
      {memory, R"("initial_cache_rate": 0.5)", "/volatile_db/initial_cache_rate: is below 1 without a persistent_db"},
      {memory, R"("num_node_connections": 0)", "/volatile_db/num_node_connections"},
      {memory, R"("shared_memory_size": 0)", "/volatile_db/shared_memory_size"},
      {memory, R"("shared_memory_name": "")", "/volatile_db/shared_memory_name: must be a string that is not empty"},
      {memory, R"("address": "")", "/volatile_db/address: must be host[:port]"},
      {memory, R"("address": "redis://host:7000")",
       R"(/volatile_db/address: must be host:port, several separated by commas, without a scheme such as redis://)"},
      {memory, R"("address": "rediss://user:secret@host:7000")", "keys of their own), got a string"},
      {memory, R"("address": "user:secret@host:7000")", "keys of their own), got a string"},
      {memory, R"("address": "host:7000,host:7001/0")", "or a path"},
      {memory, R"("address": "host:0")", "/volatile_db/address"},
      {memory, R"("address": "host:70000")", "/volatile_db/address"},
      {memory, R"("address": "host:7000,")", "/volatile_db/address"},
      {memory, R"("address": ":7000")", "/volatile_db/address"},
      {memory, R"("tls_ca_certificate": "")", "/volatile_db/tls_ca_certificate"},
      {memory, R"("user_name": "a\u0000b")", "/volatile_db/user_name: must be a string without NUL"},
      {disk, R"("path": "")", "/persistent_db/path: must be a string that is not empty"},
      {disk, R"("num_threads": 0)", "/persistent_db/num_threads"},
      {disk, R"("max_batch_size": -5)", "/persistent_db/max_batch_size"},
      {source, R"("brokers": "a b")", "/update_source/brokers"},
      {source, R"("poll_timeout_ms": 0)", "/update_source/poll_timeout_ms"},
      {source, R"("metadata_refresh_interval_ms": 9)", "/update_source/metadata_refresh_interval_ms"},
      {source, R"("receive_buffer_size": 1023)", "/update_source/receive_buffer_size"},
      {source, R"("max_batch_size": 0)", "/update_source/max_batch_size"},
      {source, R"("max_receive_buffer_size": 0)", "/update_source/max_receive_buffer_size"},
      // Enumerations.
      {memory, R"("type": "redis_claster")",
       R"(/volatile_db/type: must be one of "disabled", "hash_map", "parallel_hash_map", "multi_process_hash_map", )"
       R"("redis_cluster", got the string "redis_claster")"},
      {memory, R"("type": "Redis")", "must be one of"},
      {memory, R"("type": true)", "/volatile_db/type: must be one of"},
      {memory, R"("overflow_policy": "evict")", R"("evict_oldest", "evict_random", "evict_least_used")"},
      {memory, R"("algorithm": "abc")", R"(/volatile_db/algorithm: must be one of "phm", "stl")"},
      {disk, R"("type": "redis")", R"(/persistent_db/type: must be one of "disabled", "rocks_db")"},
      {source, R"("type": "kafka_queue")", R"(/update_source/type: must be one of "null", "kafka_message_queue")"},
      {model, R"("embedding_cache_type": "big")", R"(must be one of "dynamic", "static", "uvm")"},
      // Names, filters and lists.
      {model, R"("model": "")", "/models/0/model: must be a name of 1 to 120 letters"},
      {model, R"("model": "a.b")", "/models/0/model: must be a name"},
      {model, "\"model\": \"" + std::string(121, 'a') + "\"", "/models/0/model: must be a name"},
      {model, R"("embedding_table_names": ["a", "b c"])", "/models/0/embedding_table_names/1: must be a name"},
      {model, R"("embedding_table_names": ["a", "a"])",
       R"(/models/0/embedding_table_names/1: the name "a" is taken by another table)"},
      {memory, R"("update_filters": ["a", "("])", "/volatile_db/update_filters/1: must be a valid regular expression"},
      {memory, "\"update_filters\": [\"" + std::string(1001, '(') + "\"]", "must be a regular expression of 1 to 1000"},
      {disk, R"("update_filters": ["*"])", "/persistent_db/update_filters/0: must be a valid regular expression"},
      {model, R"("sparse_files": [])", "/models/0/sparse_files: names no table"},
      {model, R"("embedding_vecsize_per_table": [16])",
       R"(/models/0/embedding_vecsize_per_table: has 1 elements, but "sparse_files" names 2 tables)"},
      {model, R"("maxnum_catfeature_query_per_table_per_sample": [1, 2, 3])", "has 3 elements"},
      {model, R"("default_value_for_each_table": [0, 0, 0])", "/models/0/default_value_for_each_table: has 3 elements"},
      {model, R"("embedding_table_names": ["a"])", "/models/0/embedding_table_names: has 1 elements"},
  };
  for (const RefusalCase& refusal : cases) {
    EXPECT_PRED_FORMAT2(IsSubstring, refusal.message, Refusal(With(refusal.section, refusal.member))) << refusal.member;
  }
}

TEST(ConfigRefusals, MissingKeys) {
  EXPECT_PRED_FORMAT2(IsSubstring, R"(ps.json: the required key "supportlonglong" is missing: true: 64-bit keys)",
                      Refusal("{}"));
  EXPECT_PRED_FORMAT2(IsSubstring, R"(the required key "models" is missing)", Refusal(R"({"supportlonglong": true})"));
  for (const char* key :
       {"model", "sparse_files", "embedding_vecsize_per_table", "maxnum_catfeature_query_per_table_per_sample"}) {
    EXPECT_PRED_FORMAT2(IsSubstring, "/models/0: the required key \"" + std::string(key) + "\" is missing",
                        Refusal(Document(Model("", "dlrm", key))));
  }
  EXPECT_PRED_FORMAT2(IsSubstring, "ps.json: must be an object", Refusal("[]"));
}

TEST(ConfigRefusals, DuplicateModels) {
  EXPECT_PRED_FORMAT2(IsSubstring, R"(/models/2/model: the name "a" is taken by another model)",
                      Refusal(Document(Model("", "a") + "," + Model("", "b") + "," + Model("", "a"))));
}

TEST(ConfigRefusals, NotJson) {
  EXPECT_PRED_FORMAT2(IsSubstring, "not valid JSON at line 1, column 0: the text is empty", Refusal(""));
  EXPECT_PRED_FORMAT2(IsSubstring, "not valid JSON at line 3, column 1: syntax error", Refusal("{\n  \"a\": 1,\n}"));
  EXPECT_PRED_FORMAT2(IsSubstring, "line 2, column 3: comments are not part of JSON", Refusal("{\n  // note\n}"));
  EXPECT_PRED_FORMAT2(IsSubstring, "line 1, column 3: comments are not part of JSON", Refusal("{ /* note */ }"));
  EXPECT_PRED_FORMAT2(IsSubstring, "not valid JSON at line 1", Refusal("{} {}"));
  EXPECT_PRED_FORMAT2(IsSubstring, "not valid JSON at line 1", Refusal("{'a': 1}"));
  EXPECT_PRED_FORMAT2(IsSubstring, "not valid JSON at line 1", Refusal("{\"a\": NaN}"));
  EXPECT_PRED_FORMAT2(IsSubstring, "a number beyond the range of a 64-bit float", Refusal("{\"a\": 1e999}"));
  EXPECT_PRED_FORMAT2(IsSubstring, "not valid JSON at line 1", Refusal("{\"a\": \"\xff\"}"));
  EXPECT_PRED_FORMAT2(IsSubstring, "nested deeper than 32 levels", Refusal(std::string(100000, '[')));
  EXPECT_PRED_FORMAT2(IsSubstring, "/models/1/b~1c: the key occurs twice",
                      Refusal(R"({"models": [{"a": 1}, {"b/c": 1, "b/c": 2}]})"));
}

TEST(ConfigRefusals, NeverShowAPassword) {
  std::string documents[] = {
      With("/volatile_db", R"("password": 12345678)"),      With("/volatile_db", R"("password": "s3cret\u0000x")"),
      With("/volatile_db", "\"password\": \"s3cret\xff\""), With("/volatile_db", R"("password": "s3cret" "x": 1)"),
      With("/volatile_db", R"("password": "s3cret)"),       With("/volatile_db", R"("password": s3cret)"),
  };
  for (const std::string& document : documents) {
    std::string message = Refusal(document);
    EXPECT_PRED_FORMAT2(IsNotSubstring, "s3cr", message) << document;
    EXPECT_PRED_FORMAT2(IsNotSubstring, "1234", message) << document;
  }
}

TEST(ConfigRefusals, LongKeysAreCutBetweenCharacters) {
  std::string key(79, 'k');
  key += "\xC3\xA4";  // the 80th and 81st byte
  std::string message = Refusal(With("/volatile_db", "\"" + key + "\": 1"));
  EXPECT_PRED_FORMAT2(IsSubstring, std::string(79, 'k') + ": unknown key", message);
}

TEST(ConfigText, ByteOrderMarkAndIntegralDecimals) {
  EXPECT_EQ(Parsed("\xEF\xBB\xBF" + Document(Model())).models.size(), 1u);
  ServerConfig config = Parsed(With("/models/*", R"("max_batch_size": 1e6, "deployed_device_list": [1.0])"));
  EXPECT_EQ(config.models[0].max_batch_size, 1000000u);
  EXPECT_EQ(config.models[0].deployed_devices, (std::vector<int32_t>{1}));
}

TEST(ConfigText, Hosts) {
  for (const char* hosts : {"localhost", "10.0.0.1:7000", "[::1]:7000", "[::1]", "a:1,b:2", "a; b:65535"}) {
    EXPECT_EQ(Parsed(With("/volatile_db", "\"address\": \"" + std::string(hosts) + "\"")).volatile_db.address, hosts);
  }
}

TEST(ConfigText, CpuOnlyModel) {
  ServerConfig config = Parsed(With("/models/*", R"("gpucache": false, "gpucacheper": 0.0, "deployed_device_list": [],
                                  "enable_pagelock": true, "fp8_quant": true)"));
  EXPECT_TRUE(config.models[0].deployed_devices.empty());
}

// ------------------------------------------------------------------------------- configurations of the predecessor's
// users

TEST(ConfigPredecessor, TwoModelsOfItsUnitTest) {
  ServerConfig config = Parsed(R"({
    "supportlonglong": false,
    "models": [
      {"model": "foo", "sparse_files": ["foo_sparse.model"], "num_of_worker_buffer_in_pool": 3,
       "embedding_table_names": ["sparse_embedding1"], "embedding_vecsize_per_table": [16],
       "maxnum_catfeature_query_per_table_per_sample": [10], "default_value_for_each_table": [1.0],
       "deployed_device_list": [0], "max_batch_size": 16384, "cache_refresh_percentage_per_iteration": 0.2,
       "hit_rate_threshold": 1.0, "gpucacheper": 1.0, "gpucache": true},
      {"model": "bar", "sparse_files": ["bar_sparse_0.model", "bar_sparse_1.model"], "num_of_worker_buffer_in_pool": 3,
       "embedding_table_names": ["sparse_embedding0", "sparse_embedding1"], "embedding_vecsize_per_table": [64, 32],
       "maxnum_catfeature_query_per_table_per_sample": [3, 5], "default_value_for_each_table": [1.0, 1.0],
       "deployed_device_list": [0], "max_batch_size": 16384, "cache_refresh_percentage_per_iteration": 0.2,
       "hit_rate_threshold": 1.0, "gpucacheper": 1.0, "gpucache": true}
    ]})");
  ASSERT_EQ(config.models.size(), 2u);
  EXPECT_FALSE(config.long_keys);
  EXPECT_EQ(config.models[1].tables[1].width, 32u);
  EXPECT_EQ(config.models[0].tables[0].name, "sparse_embedding1");
  EXPECT_TRUE(CheckBuilt(config).ok());
}

TEST(ConfigPredecessor, FusedStaticTables) {
  ServerConfig config = Parsed(
      Document(Model(R"("embedding_cache_type": "static", "use_context_stream": true, "fuse_embedding_table": true)"),
               R"("fuse_embedding_table": true, "volatile_db": {"type": "disabled"})"));
  EXPECT_EQ(config.models[0].cache_type, CacheType::kStatic);
}

TEST(ConfigPredecessor, DocumentedDatabases) {
  ServerConfig config = Parsed(Document(
      Model(),
      R"("volatile_db": {"type": "redis_cluster", "algorithm": "phm", "num_partitions": 8, "address": "127.0.0.1:7000",
         "user_name": "default", "password": "", "max_get_batch_size": 10000, "max_set_batch_size": 10000,
         "overflow_margin": 10000000, "overflow_policy": "evict_oldest", "overflow_resolution_target": 0.8,
         "initial_cache_rate": 0.5, "refresh_time_after_fetch": false, "cache_missed_embeddings": true,
         "update_filters": [".+"]},
       "persistent_db": {"type": "rocks_db", "path": "/tmp/rocksdb", "num_threads": 16, "read_only": false,
         "max_get_batch_size": 10000, "max_set_batch_size": 10000, "update_filters": [".+"]},
       "update_source": {"type": "kafka_message_queue", "brokers": "127.0.0.1:9092;other", "poll_timeout_ms": 500,
         "max_receive_buffer_size": 2000, "max_batch_size": 1000, "failure_backoff_ms": 50})"));
  EXPECT_EQ(config.volatile_db.initial_cache_rate, 0.5);
  EXPECT_EQ(config.update_source.type, UpdateSourceType::kKafka);
}

// ----------------------------------------------------------------------------------------------------- what is not
// built

TEST(ConfigBuilt, RefusesOnlyWhatIsReallyNeeded) {
  auto check = [](const std::string& members) {
    Result<ServerConfig> config = ParseConfig(Document(Model(), members), "ps.json");
    return config.ok() ? CheckBuilt(*config) : config.status();
  };
  for (const char* accepted : {
           "",
           R"("volatile_db": {"type": "hash_map", "overflow_margin": 18446744073709551615, "enable_tls": true})",
           R"("volatile_db": {"type": "disabled", "overflow_margin": 5}, "persistent_db": {})",
           R"("volatile_db": {"initial_cache_rate": 0.5}, "persistent_db": {"path": "/x"})",
           R"("volatile_db": {"overflow_margin": 1000})",
           R"("persistent_db": {"read_only": true, "initialize_after_startup": false})",
           R"("persistent_db": {"initialize_after_startup": false})",
           R"("volatile_db": {"initialize_after_startup": false})",
           R"("update_source": {"type": "null"})",
           R"("volatile_db": {"type": "multi_process_hash_map", "overflow_margin": 1000})",
           R"("volatile_db": {"type": "redis", "overflow_margin": 5})",
       }) {
    EXPECT_EQ(check(accepted).ToString(), "OK") << accepted;
  }
  const std::pair<std::string, std::string> refused[] = {
      {R"("volatile_db": {"type": "disabled"})", "/volatile_db/type: not built yet: a server without any database"},
      {R"("update_source": {})", "/update_source/type: not built yet: kafka_message_queue"},
  };
  for (const auto& [members, message] : refused) {
    Status status = check(members);
    EXPECT_EQ(status.code(), StatusCode::kUnimplemented) << members;
    EXPECT_EQ(status.message().find("ps.json: " + message), 0u);
  }
  ServerConfig remote = Parsed(With("/models/*", R"("sparse_files": ["/a", "s3://bucket/b"])"));
  EXPECT_PRED_FORMAT2(IsSubstring, "/models/0/sparse_files/1: not built yet", CheckBuilt(remote).message());
}

// ------------------------------------------------------------------------------------------------- canonical text,
// hash

TEST(ConfigCanonical, IsTheGoldenText) {
  std::string document = Document(
      R"({"model": "m", "sparse_files": ["/t"], "embedding_vecsize_per_table": [4],
          "maxnum_catfeature_query_per_table_per_sample": [1], "default_value_for_each_table": [0.1]})",
      R"("volatile_db": {"num_partitions": 2, "password": "hidden"},
         "persistent_db": {"type": "disabled", "path": "/db"})");
  EXPECT_EQ(CanonicalJson(Parsed(document)), R"({
  "lookup_timeout_ms": 0,
  "models": [
    {
      "cache_refresh_percentage_per_iteration": 0.1,
      "default_value_for_each_table": [
        0.1
      ],
      "deployed_device_list": [
        0
      ],
      "embedding_cache_type": "dynamic",
      "embedding_table_names": [
        "sparse_embedding0"
      ],
      "embedding_vecsize_per_table": [
        4
      ],
      "enable_pagelock": false,
      "fp8_quant": false,
      "gpucache": true,
      "gpucacheper": 0.2,
      "init_ec": true,
      "max_batch_size": 64,
      "maxnum_catfeature_query_per_table_per_sample": [
        1
      ],
      "model": "m",
      "num_of_worker_buffer_in_pool": 1,
      "refresh_delay": 0.0,
      "refresh_interval": 0.0,
      "share_tables": false,
      "sparse_files": [
        "/t"
      ]
    }
  ],
  "persistent_db": {
    "initialize_after_startup": true,
    "max_get_batch_size": 10000,
    "max_set_batch_size": 10000,
    "num_threads": 16,
    "path": "/db",
    "read_only": false,
    "timeout_ms": 0,
    "type": "disabled",
    "update_filters": [
      ".+"
    ],
    "when_unavailable": "fail"
  },
  "supportlonglong": true,
  "update_source": {
    "brokers": "127.0.0.1:9092",
    "failure_backoff_ms": 50,
    "max_batch_size": 1000,
    "max_commit_interval": 32,
    "max_receive_buffer_size": 2000,
    "metadata_refresh_interval_ms": 30000,
    "poll_timeout_ms": 500,
    "receive_buffer_size": 262144,
    "type": "null"
  },
  "volatile_db": {
    "address": "127.0.0.1:7000",
    "allocation_rate": 268435456,
    "cache_missed_embeddings": false,
    "enable_tls": false,
    "initial_cache_rate": 1.0,
    "initialize_after_startup": true,
    "max_get_batch_size": 10000,
    "max_set_batch_size": 10000,
    "num_node_connections": 5,
    "num_partitions": 2,
    "overflow_margin": 18446744073709551615,
    "overflow_policy": "evict_oldest",
    "overflow_resolution_target": 0.8,
    "password_env": "",
    "password_file": "",
    "refresh_time_after_fetch": false,
    "shared_memory_auto_remove": true,
    "shared_memory_name": "hctr_mp_hash_map_database",
    "shared_memory_size": 17179869184,
    "timeout_ms": 500,
    "tls_ca_certificate": "cacertbundle.crt",
    "tls_client_certificate": "client_cert.pem",
    "tls_client_key": "client_key.pem",
    "tls_server_name_identification": "redis.localhost",
    "type": "hash_map",
    "update_filters": [
      ".+"
    ],
    "user_name": "default",
    "when_unavailable": "fail"
  }
}
)");
}

TEST(ConfigCanonical, ReadsBackAsItselfForEachKey) {
  for (const KeyCase& key : KeyCases()) {
    ServerConfig config = Parsed(With(key.section, "\"" + key.key + "\": " + key.value));
    std::string text = CanonicalJson(config);
    EXPECT_EQ(CanonicalJson(Parsed(text)), text) << key.key;
  }
}

TEST(ConfigHash, IsThatOfTheMeaning) {
  const std::string base = ConfigHash(Parsed(Document(Model())));
  EXPECT_EQ(base.size(), 16u);
  EXPECT_EQ(base.find_first_not_of("0123456789abcdef"), std::string::npos);
  // The order, the spelling, the origin and keys without effect change nothing.
  EXPECT_EQ(base, ConfigHash(Parsed("{\"models\": [" + Model() + "], \"supportlonglong\": true}")));
  EXPECT_EQ(base, ConfigHash(Parsed(With("/volatile_db", R"("type": "parallel_map", "max_batch_size": 1e4)"))));
  EXPECT_EQ(base, ConfigHash(Parsed(With("/models/*", R"("dense_file": "d")"))));
  EXPECT_EQ(base, ConfigHash(*ParseConfig(Document(Model()), "elsewhere.json")));
  // Secrets and everything else do, without being shown.
  ServerConfig secret = Parsed(With("/volatile_db", R"("password": "hidden")"));
  EXPECT_NE(base, ConfigHash(secret));
  EXPECT_EQ(CanonicalJson(secret), CanonicalJson(Parsed(Document(Model()))));
  for (const KeyCase& key : KeyCases()) {
    ServerConfig config = Parsed(With(key.section, "\"" + key.key + "\": " + key.value));
    bool is_default = key.section + "/" + key.key == "/volatile_db/initial_cache_rate" || key.value == "\"disabled\"" ||
                      key.value == "\"null\"" || key.key == "$schema";  // for editors
    bool sets_type = key.section == "/persistent_db" || key.section == "/update_source";
    EXPECT_EQ(ConfigHash(config) != base, (key.is_taken && !is_default) || (sets_type && !is_default)) << key.key;
  }
}

TEST(ConfigText, DamagedDocumentsAreRefusedOrReadConsistently) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const std::string base = CanonicalJson(Parsed(Document(Model())));
  const std::string alphabet = "{}[]\",:0123456789.eE+-truefalsn\\/ \n\xC3\xA4";
  size_t accepted = 0, refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string text = base;
    for (int damage = std::uniform_int_distribution<int>(1, 3)(random); damage > 0; --damage) {
      size_t at = random() % text.size();
      char letter = alphabet[random() % alphabet.size()];
      switch (random() % 3) {
        case 0: text[at] = letter; break;
        case 1: text.insert(at, 1, letter); break;
        default: text.erase(at, 1 + random() % 20); break;
      }
    }
    Result<ServerConfig> config = ParseConfig(text, "ps.json");
    if (!config.ok()) {
      ++refused;
      ASSERT_EQ(config.status().code(), StatusCode::kInvalidArgument) << config.status().message();
      ASSERT_EQ(config.status().message().find("ps.json: "), 0u);
      continue;
    }
    ++accepted;
    ASSERT_EQ(CanonicalJson(Parsed(CanonicalJson(*config))), CanonicalJson(*config)) << text;
  }
  EXPECT_GT(accepted, 0u);
  EXPECT_GT(refused, 0u);
}

// --------------------------------------------------------------------------------------------------------------- files

class ConfigFiles : public ::testing::Test {
 protected:
  ConfigFiles() {
    fs::create_directories(here());
    fs::create_directories(there());
  }
  fs::path here() const { return folder_.path() / "here"; }    // the working directory
  fs::path there() const { return folder_.path() / "there"; }  // where ps.json lies

  Result<ServerConfig> Load(const std::string& table, const std::string& members = "") {
    WriteFile(there() / "ps.json", Document(Model("\"sparse_files\": [\"" + table +
                                                  "\"], \"embedding_vecsize_per_table\": [4], "
                                                  "\"maxnum_catfeature_query_per_table_per_sample\": [1]"),
                                            members));
    WorkingDirectory working_directory(here());
    return LoadConfig("../there/ps.json");
  }

  TemporaryFolder folder_;
};

TEST_F(ConfigFiles, RelativePathsInTheWorkingDirectoryThenBesideTheFile) {
  fs::create_directories(here() / "in_here");
  fs::create_directories(there() / "in_there");
  Result<ServerConfig> config = Load("in_here/", R"("persistent_db": {"path": "./in_there/../in_there"})");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->origin, (there() / "ps.json").string());
  EXPECT_EQ(config->models[0].tables[0].path, (here() / "in_here").string());
  EXPECT_EQ(config->persistent_db.path, (there() / "in_there").string());
  config = Load("in_there");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->models[0].tables[0].path, (there() / "in_there").string());
}

TEST_F(ConfigFiles, ADatabaseThatDoesNotExistYetIsMadeInTheWorkingDirectory) {
  fs::create_directories(here() / "t");
  Result<ServerConfig> config = Load("t", R"("persistent_db": {"path": "db/new"})");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->persistent_db.path, (here() / "db/new").string());
}

TEST_F(ConfigFiles, TwoDifferentFoldersAreRefused) {
  fs::create_directories(here() / "t");
  fs::create_directories(there() / "t");
  for (bool database : {false, true}) {
    fs::create_directories(here() / "only");
    Result<ServerConfig> config = database ? Load("only", R"("persistent_db": {"path": "t"})") : Load("t");
    ASSERT_FALSE(config.ok());
    EXPECT_EQ(config.status().code(), StatusCode::kInvalidArgument);
    EXPECT_PRED_FORMAT2(IsSubstring, database ? "/persistent_db/path" : "/models/0/sparse_files/0",
                        config.status().message());
    EXPECT_PRED_FORMAT2(IsSubstring, (here() / "t").string(), config.status().message());
    EXPECT_PRED_FORMAT2(IsSubstring, (there() / "t").string(), config.status().message());
  }
  fs::remove(there() / "t");
  fs::create_directory_symlink(here() / "t", there() / "t");
  EXPECT_TRUE(Load("t").ok()) << "one folder under two names is no contradiction";
}

TEST_F(ConfigFiles, ATableThatIsNowhereNamesBothCandidates) {
  Result<ServerConfig> config = Load("missing");
  ASSERT_FALSE(config.ok());
  EXPECT_EQ(config.status().code(), StatusCode::kNotFound);
  EXPECT_PRED_FORMAT2(IsSubstring, "/models/0/sparse_files/0: no such file or folder", config.status().message());
  EXPECT_PRED_FORMAT2(IsSubstring, (here() / "missing").string(), config.status().message());
  EXPECT_PRED_FORMAT2(IsSubstring, (there() / "missing").string(), config.status().message());
}

TEST_F(ConfigFiles, AbsoluteAndRemotePathsStay) {
  Result<ServerConfig> config = Load("/nowhere/a/");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->models[0].tables[0].path, "/nowhere/a");
  config = Load("hdfs://host/a");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->models[0].tables[0].path, "hdfs://host/a");
}

TEST_F(ConfigFiles, TlsFilesFollowTheRuleWhereTlsIsUsed) {
  fs::create_directories(here() / "t");
  WriteFile(there() / "ca.crt", "");
  std::string redis = R"("volatile_db": {"type": "redis", "tls_ca_certificate": "ca.crt", "enable_tls": )";
  EXPECT_EQ(Load("t", redis + "true}")->volatile_db.tls_ca_certificate, (there() / "ca.crt").string());
  EXPECT_EQ(Load("t", redis + "false}")->volatile_db.tls_ca_certificate, "ca.crt");
}

TEST_F(ConfigFiles, PasswordFileFollowsTheRule) {
  fs::create_directories(here() / "t");
  WriteFile(there() / "secret", "");
  EXPECT_EQ(Load("t", R"("volatile_db": {"type": "redis", "password_file": "secret"})")->volatile_db.password_file,
            (there() / "secret").string());
  EXPECT_EQ(Load("t", R"("volatile_db": {"type": "redis"})")->volatile_db.password_file, "");
}

TEST_F(ConfigFiles, ModelsGivenAsTextFollowTheRule) {
  fs::create_directories(here() / "t");
  WorkingDirectory working_directory(here());
  Result<ModelConfig> model = ParseModelConfig(
      R"({"model": "m", "sparse_files": ["t"], "embedding_vecsize_per_table": [4],
          "maxnum_catfeature_query_per_table_per_sample": [1]})",
      "m.json");
  ASSERT_TRUE(model.ok()) << model.status().ToString();
  ASSERT_TRUE(MakePathsAbsolute("", &*model).ok());
  EXPECT_EQ(model->tables[0].path, (here() / "t").string());
  EXPECT_EQ(ParseModelConfig(R"({"modl": "m"})", "m.json").status().message(),
            "m.json: /modl: unknown key; did you mean \"model\"?");
}

TEST_F(ConfigFiles, WhatCannotBeRead) {
  EXPECT_EQ(LoadConfig((here() / "none.json").string()).status().code(), StatusCode::kNotFound);
  EXPECT_PRED_FORMAT2(IsSubstring, "none.json", LoadConfig((here() / "none.json").string()).status().message());
  EXPECT_EQ(LoadConfig("").status().code(), StatusCode::kNotFound);
  Status folder = LoadConfig(here().string()).status();
  EXPECT_EQ(folder.code(), StatusCode::kFailedPrecondition);
  EXPECT_PRED_FORMAT2(IsSubstring, "is a folder", folder.message());
  WriteFile(here() / "empty.json", "");
  EXPECT_EQ(LoadConfig((here() / "empty.json").string()).status().code(), StatusCode::kInvalidArgument);
  WriteFile(here() / "locked.json", Document(Model()));
  fs::permissions(here() / "locked.json", fs::perms::none);
  if (!std::ifstream(here() / "locked.json").is_open()) {  // the superuser reads everything
    EXPECT_EQ(LoadConfig((here() / "locked.json").string()).status().code(), StatusCode::kFailedPrecondition);
  }
  EXPECT_FALSE(LoadConfig(std::string(100000, 'x')).ok());
}

// ----------------------------------------------------------------------------------------------- schema, reference
// page

TEST(ConfigPages, TheSchemaKnowsEachKeyAndItsDefault) {
  Result<JsonValue> schema = ParseJson(ConfigJsonSchema(), "schema");
  ASSERT_TRUE(schema.ok()) << schema.status().ToString();
  EXPECT_EQ(*schema->Find("$schema")->get_if<std::string>(), "https://json-schema.org/draft/2020-12/schema");
  for (const KeyCase& key : KeyCases()) {
    const JsonValue* section = &*schema;
    if (key.section == "/models/*") {
      section = section->Find("properties")->Find("models")->Find("items");
    } else if (!key.section.empty()) {
      section = section->Find("properties")->Find(key.section.substr(1));
    }
    ASSERT_NE(section, nullptr) << key.section;
    EXPECT_FALSE(*section->Find("additionalProperties")->get_if<bool>());
    const JsonValue* property = section->Find("properties")->Find(key.key);
    ASSERT_NE(property, nullptr) << key.key;
    EXPECT_NE(property->Find("description"), nullptr) << key.key;
    EXPECT_TRUE(property->Find("type") != nullptr || property->Find("enum") != nullptr) << key.key;
    if (const JsonValue* value = property->Find("default")) {
      // A default written out means what leaving the key out means.
      std::string member = "\"" + key.key + "\": " + DumpJson(*value, false);
      EXPECT_EQ(CanonicalJson(Parsed(With(key.section, member))), CanonicalJson(Parsed(With(key.section, ""))))
          << member;
    }
  }
}

// HPS_UPDATE_DOCS=1 writes the page instead of comparing it.
TEST(ConfigPages, TheReferencePageIsCurrent) {
  const fs::path path = fs::path(HPS_SOURCE_DIR) / "docs" / "configuration.md";
  if (std::getenv("HPS_UPDATE_DOCS") != nullptr) WriteFile(path, ConfigReferenceMarkdown());
  std::ifstream stream(path, std::ios::binary);
  std::string page{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  EXPECT_EQ(page, ConfigReferenceMarkdown()) << "run: HPS_UPDATE_DOCS=1 config_test --gtest_filter='ConfigPages.*'";
  for (const KeyCase& key : KeyCases()) EXPECT_PRED_FORMAT2(IsSubstring, "| `" + key.key + "` |", page);
}

}  // namespace
}  // namespace hps
