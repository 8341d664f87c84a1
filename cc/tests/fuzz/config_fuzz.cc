// ps.json: whatever text comes, there is a configuration or a message; a configuration survives its own normal form.

#include "cc/tests/fuzz/fuzz_target.h"
#include "hps/config.h"

namespace hps::fuzz {

std::vector<std::string> Seeds() {
  return {
      R"({"supportlonglong": true, "models": [{"model": "m", "sparse_files": ["a", "b"],
          "embedding_table_names": ["x", "y"], "embedding_vecsize_per_table": [16, 7],
          "maxnum_catfeature_query_per_table_per_sample": [2, 3], "default_value_for_each_table": [0.5, -1.0],
          "gpucache": false, "max_batch_size": 64, "deployed_device_list": [0], "num_of_worker_buffer_in_pool": 3,
          "hit_rate_threshold": 0.9, "gpucacheper": 0.5, "use_mixed_precision": false}]})",
      R"({"supportlonglong": false, "volatile_db": {"type": "redis_cluster", "address": "127.0.0.1:7000,h:7001",
          "user_name": "u", "password": "p", "num_partitions": 8, "max_get_batch_size": 100, "overflow_margin": 1000,
          "overflow_policy": "evict_random", "overflow_resolution_target": 0.7, "initial_cache_rate": 0.5,
          "cache_missed_embeddings": true, "update_filters": ["^hps_.+$"]},
          "persistent_db": {"type": "rocks_db", "path": "/tmp/db", "num_threads": 4, "read_only": false},
          "update_source": {"type": "kafka_message_queue", "brokers": "127.0.0.1:9092"}, "models": []})",
      R"({"volatile_db": {"type": "multi_process_hash_map", "shared_memory_size": 17179869184, "shared_memory_name": "n",
          "allocation_rate": 268435456}, "models": []})",
      R"({"models": [], "volatile_db": {"type": "hash_map", "overflow_margin": 18446744073709551615}})",
      "{}",
      "",
      "[1, 2.5e3, null, true, \"\\u00e9\\ud83d\\ude00\"]",
      std::string(2000, '[') + std::string(2000, ']'),
  };
}

std::vector<std::string> Words() {
  return {"\"models\"",
          "\"volatile_db\"",
          "\"persistent_db\"",
          "\"type\"",
          "\"hash_map\"",
          "\"redis_cluster\"",
          "\"rocks_db\"",
          "\"disabled\"",
          "true",
          "false",
          "null",
          "{",
          "}",
          "[",
          "]",
          ",",
          ":",
          "\"",
          "\\u0000",
          "\\ud800",
          "\"model\"",
          "\"num_partitions\"",
          "\"address\"",
          "\xff\xfe",
          "// c\n",
          "1e400",
          "-0",
          "\xef\xbb\xbf"};
}

}  // namespace hps::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const hps::Result<hps::ServerConfig> config = hps::ParseConfig(text, "fuzz");
  if (config.ok()) {
    const std::string canonical = hps::CanonicalJson(config.value());
    const hps::Result<hps::ServerConfig> again = hps::ParseConfig(canonical, "fuzz");
    FUZZ_CHECK(again.ok(), again.status().ToString() + "\n" + canonical);
    FUZZ_CHECK(hps::CanonicalJson(again.value()) == canonical, canonical);
    FUZZ_CHECK(hps::ConfigHash(config.value()).size() == 16, canonical);
    (void)hps::CheckBuilt(config.value());
  } else {
    FUZZ_CHECK(!config.status().message().empty(), "an error without a message");
  }
  std::vector<std::string> warnings;
  (void)hps::ParseModelConfig(text, "fuzz", &warnings);
  return 0;
}
