// What the tests of the Redis store share: rows that prove their key, and keys that can be typed into redis-cli.

#ifndef HPS_TESTS_REDIS_FIXTURE_H_
#define HPS_TESTS_REDIS_FIXTURE_H_

#include <memory>
#include <string>
#include <vector>

#include "cc/storage/redis_store.h"
#include "cc/tests/core_fixture.h"
#include "cc/tests/redis_service.h"
#include "cc/tests/row_pattern.h"

namespace hps::testing {

inline constexpr size_t kRowBytes = 16;
inline const TableSpec kTable = {.name = "hps_et.m.t", .row_bytes = kRowBytes};

// The key whose 8 (or 4) raw bytes are `text`.
inline Key KeyOf(const std::string& text) {
  if (text.size() == 4) {
    int32_t key = 0;
    std::memcpy(&key, text.data(), 4);
    return key;
  }
  Key key = 0;
  std::memcpy(&key, text.data(), 8);
  return key;
}

inline Status Put(Table& table, const std::vector<Key>& keys, uint32_t version, const UpsertOptions& options = {}) {
  return table.Upsert(keys, RowBlock::Of(keys, version, table.spec().row_bytes).source(), options);
}

struct Fetched {
  Status status;
  std::vector<uint32_t> versions;  // 0: missing
  size_t found() const {
    return versions.size() - static_cast<size_t>(std::count(versions.begin(), versions.end(), 0));
  }
};

// Every row that is found must be whole and of its key.
inline Fetched Get(const Table& table, const std::vector<Key>& keys, Deadline deadline = kNoDeadline,
                   const std::atomic<bool>* cancelled = nullptr) {
  Fetched fetched;
  RowBlock rows(keys.size(), table.spec().row_bytes);
  std::vector<uint32_t> misses;
  fetched.status =
      table.Fetch({.keys = keys, .rows = rows.buffer(), .deadline = deadline, .cancelled = cancelled}, &misses);
  if (!fetched.status.ok()) return fetched;
  size_t miss = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (miss < misses.size() && misses[miss] == i) {
      ++miss;
      fetched.versions.push_back(0);
      continue;
    }
    const std::optional<uint32_t> version = RowVersion(keys[i], rows.row(i));
    EXPECT_TRUE(version) << "key " << keys[i] << " came with a torn or foreign row";
    fetched.versions.push_back(version.value_or(0));
  }
  return fetched;
}

inline void ExpectAll(const Table& table, const std::vector<Key>& keys, uint32_t version) {
  const Fetched fetched = Get(table, keys);
  ASSERT_OK(fetched.status);
  for (size_t i = 0; i < keys.size(); ++i) ASSERT_EQ(fetched.versions[i], version) << "key " << keys[i];
}

inline uint64_t RowsOf(const Table& table) { return Value(table.Stats()).rows; }

// Sends a command to node 0 and fails the test if that is refused.
inline std::string Ask(const RedisService& redis, const std::vector<std::string>& words, int node = 0) {
  const Result<std::string> reply = redis.Command(node, words);
  EXPECT_TRUE(reply.ok()) << reply.status().ToString();
  return reply.ok() ? *reply : "";
}

inline RedisStoreOptions OptionsFor(const RedisService& redis) {
  RedisStoreOptions options;
  options.address = redis.address_list();
  if (!redis.options().user.empty()) options.user_name = redis.options().user;
  options.password = redis.options().password;
  if (redis.options().tls) {
    options.enable_tls = true;
    options.tls_ca_certificate = redis.tls().ca_certificate;
    options.tls_client_certificate = redis.tls().client_certificate;
    options.tls_client_key = redis.tls().client_key;
    options.tls_server_name_identification = "redis.localhost";
  }
  return options;
}

}  // namespace hps::testing

#endif  // HPS_TESTS_REDIS_FIXTURE_H_
