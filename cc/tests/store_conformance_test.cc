// Every store backend through the conformance suite. Add a fixture here, nothing else.

#include "cc/tests/store_conformance.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cc/storage/hash_map_store.h"
#include "cc/storage/multi_process_store.h"
#include "cc/storage/redis_store.h"
#include "cc/storage/rocksdb_store.h"
#include "cc/tests/redis_service.h"
#include "cc/tests/rocksdb_races.h"

namespace hps::testing {
namespace {

// Servers that live as long as the test program; emptied for each test, which has a directory of its own.
StoreFixture OnRedis(const std::string& name, int masters, RedisStoreOptions store_options) {
  struct Servers {
    std::unique_ptr<RedisService> redis;
    std::filesystem::path directory;
  };
  static std::map<std::string, std::shared_ptr<Servers>> all;  // the list of fixtures is made once for each clause
  std::shared_ptr<Servers>& known = all[name];
  if (known == nullptr) known = std::make_shared<Servers>();
  return {.name = name,
          .open = [masters, store_options,
                   servers = known](const std::filesystem::path& directory) -> Result<std::unique_ptr<TableStore>> {
            if (servers->redis == nullptr) {
              HPS_ASSIGN_OR_RETURN(servers->redis, RedisService::Start({.masters = masters}));
            }
            for (int node = 0; servers->directory != directory && node < servers->redis->size(); ++node) {
              HPS_RETURN_IF_ERROR(servers->redis->Command(node, {"FLUSHALL"}).status());
            }
            servers->directory = directory;
            RedisStoreOptions options = store_options;
            options.address = servers->redis->address_list();
            return OpenRedisStore(options);
          },
          .reopens = true};
}

std::vector<StoreFixture> AllFixtures() {
  std::vector<StoreFixture> fixtures;
  fixtures.push_back({.name = "HashMap", .open = [](const std::filesystem::path&) {
                        static Executor& executor = *NewThreadPool(2).release();
                        return OpenHashMapStore({.num_partitions = 4, .executor = &executor});
                      }});
  // One partition, no helpers, the smallest steps of memory: every boundary is crossed many times.
  fixtures.push_back({.name = "HashMapOnePartition", .open = [](const std::filesystem::path&) {
                        return OpenHashMapStore({.num_partitions = 1, .allocation_rate_bytes = 4096});
                      }});
  // Named after the directory, so that each test has its own and a reopened store finds it gone.
  fixtures.push_back({.name = "MultiProcessHashMap", .open = [](const std::filesystem::path& directory) {
                        static Executor& executor = *NewThreadPool(2).release();
                        return OpenMultiProcessStore({.name = directory.filename(),
                                                      .bytes = 256 << 20,
                                                      .num_partitions = 4,
                                                      .allocation_rate_bytes = 1 << 20,
                                                      .executor = &executor});
                      }});
  // A margin that is not met: all clauses hold, whatever is noted beside the rows and however small the pieces.
  for (const OverflowPolicy policy : {OverflowPolicy::kEvictOldest, OverflowPolicy::kEvictLeastUsed}) {
    fixtures.push_back({.name = policy == OverflowPolicy::kEvictOldest ? "HashMapOldest" : "HashMapLeastUsed",
                        .open = [policy](const std::filesystem::path&) {
                          return OpenHashMapStore(
                              {.num_partitions = 2,
                               .overflow = {.margin = 1'000'000, .policy = policy, .refresh_time_after_fetch = true},
                               .max_get_batch_size = 70,
                               .max_set_batch_size = 90});
                        }});
  }
  const auto rocksdb = [](const std::filesystem::path& directory, bool read_only) {
    static Executor& executor = *NewThreadPool(2).release();
    return OpenRocksDbStore({.path = directory,
                             .num_threads = 2,
                             .read_only = read_only,
                             .max_get_batch_size = 700,
                             .max_set_batch_size = 900,
                             .executor = &executor});
  };
  fixtures.push_back(
      {.name = "RocksDb",
       .open = [rocksdb](const std::filesystem::path& directory) { return rocksdb(directory, false); },
       .open_read_only = [rocksdb](const std::filesystem::path& directory) { return rocksdb(directory, true); }});
  fixtures.push_back(OnRedis("RedisCluster", 3, {.num_partitions = 8}));
  // Commands and connections as few and as short as can be: every boundary is crossed many times.
  fixtures.push_back(
      OnRedis("RedisSingle", 0,
              {.num_partitions = 3, .num_node_connections = 1, .max_get_batch_size = 700, .max_set_batch_size = 300}));
  return fixtures;
}

std::vector<BoundedStoreFixture> BoundedFixtures() {
  const auto hash_map = [](const std::filesystem::path&, uint32_t num_partitions, const OverflowOptions& overflow) {
    return OpenHashMapStore({.num_partitions = num_partitions, .overflow = overflow});
  };
  const auto multi_process = [](const std::filesystem::path& directory, uint32_t num_partitions,
                                const OverflowOptions& overflow) {
    return OpenMultiProcessStore(
        {.name = directory.filename(), .bytes = 32 << 20, .num_partitions = num_partitions, .overflow = overflow});
  };
  return {{.name = "MultiProcessOldest", .policy = OverflowPolicy::kEvictOldest, .open = multi_process},
          {.name = "MultiProcessLeastUsed", .policy = OverflowPolicy::kEvictLeastUsed, .open = multi_process},
          {.name = "MultiProcessRandom", .policy = OverflowPolicy::kEvictRandom, .open = multi_process},
          {.name = "HashMapOldest", .policy = OverflowPolicy::kEvictOldest, .open = hash_map},
          {.name = "HashMapLeastUsed", .policy = OverflowPolicy::kEvictLeastUsed, .open = hash_map},
          {.name = "HashMapRandom", .policy = OverflowPolicy::kEvictRandom, .open = hash_map}};
}

INSTANTIATE_TEST_SUITE_P(Stores, StoreConformance, ::testing::ValuesIn(AllFixtures()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(Stores, BoundedStoreConformance, ::testing::ValuesIn(BoundedFixtures()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace hps::testing
