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
class RedisServers {
 public:
  // 0 masters: a single server. The lists of fixtures are made once for each clause, the servers once.
  static RedisServers& Of(int masters) {
    static std::map<int, RedisServers> all;
    return all.try_emplace(masters, masters).first->second;
  }
  explicit RedisServers(int masters) : masters_(masters) {}

  Result<std::unique_ptr<TableStore>> Open(const std::filesystem::path& directory, RedisStoreOptions options) {
    if (redis_ == nullptr) {
      HPS_ASSIGN_OR_RETURN(redis_, RedisService::Start({.masters = masters_}));
    }
    if (directory_ != directory) HPS_RETURN_IF_ERROR(OnAll({"FLUSHALL"}));
    directory_ = directory;
    options.address = redis_->address_list();
    return OpenRedisStore(options);
  }

  // The times that evict_oldest notes are whole seconds: instead of a second that passes all of them become one less.
  void LetTimePass() {
    const char* script =
        "for _, hash in ipairs(redis.call('KEYS', 'hps_et{*}t')) do "
        "for _, key in ipairs(redis.call('HKEYS', hash)) do "
        "local time = redis.call('HGET', hash, key) "
        "if #time == 8 then redis.call('HSET', hash, key, struct.pack('<i8', struct.unpack('<i8', time) - 1)) end "
        "end end";
    const Status status = OnAll({"EVAL", script, "0"});
    EXPECT_TRUE(status.ok()) << status.ToString();
  }

 private:
  Status OnAll(const std::vector<std::string>& words) {
    for (int node = 0; node < redis_->size(); ++node) {
      HPS_RETURN_IF_ERROR(redis_->Command(node, words).status());
    }
    return OkStatus();
  }

  const int masters_;
  std::unique_ptr<RedisService> redis_;
  std::filesystem::path directory_;
};

StoreFixture OnRedis(const std::string& name, int masters, RedisStoreOptions options) {
  RedisServers& servers = RedisServers::Of(masters);
  return {
      .name = name,
      .open = [&servers, options](const std::filesystem::path& directory) { return servers.Open(directory, options); },
      .reopens = true};
}

BoundedStoreFixture BoundedOnRedis(const std::string& name, int masters, OverflowPolicy policy) {
  RedisServers& servers = RedisServers::Of(masters);
  return {
      .name = name,
      .policy = policy,
      .open =
          [&servers](const std::filesystem::path& directory, uint32_t num_partitions, const OverflowOptions& overflow) {
            return servers.Open(directory, {.num_partitions = num_partitions, .overflow = overflow});
          },
      .let_time_pass = [&servers] { servers.LetTimePass(); },
      .writes_first = true,
      .rounds = 2};
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
          {.name = "HashMapRandom", .policy = OverflowPolicy::kEvictRandom, .open = hash_map},
          BoundedOnRedis("RedisOldest", 0, OverflowPolicy::kEvictOldest),
          BoundedOnRedis("RedisLeastUsed", 0, OverflowPolicy::kEvictLeastUsed),
          BoundedOnRedis("RedisRandom", 0, OverflowPolicy::kEvictRandom),
          BoundedOnRedis("RedisClusterOldest", 3, OverflowPolicy::kEvictOldest),
          BoundedOnRedis("RedisClusterLeastUsed", 3, OverflowPolicy::kEvictLeastUsed)};
}

INSTANTIATE_TEST_SUITE_P(Stores, StoreConformance, ::testing::ValuesIn(AllFixtures()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(Stores, BoundedStoreConformance, ::testing::ValuesIn(BoundedFixtures()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace hps::testing
