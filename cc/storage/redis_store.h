// Redis store: tables shared by all hosts of a Redis Cluster, or in one Redis server ("redis_cluster").
//
// Format (the predecessor's since 4.2, see redis_layout.h): a table is num_partitions hashes; field = raw key, value =
// raw row. Tables of its version 4.1 and older are read and written where they are. A table is described by the hash
// "hps.table/<name>" with the fields num_partitions, row_bytes and key_bytes; a record is the string
// "hps.record/<name>". A table without a description (the predecessor's) gets one when it is opened, after a sample of
// its rows was checked. A configuration that disagrees with a description is kFailedPrecondition: hosts that disagree
// about num_partitions would look for keys in each other's partitions.
//
// Time: a Fetch ends by its deadline, and soon after *cancelled becomes true. What has no deadline ends when nothing
// has moved for RedisStoreOptions::patience. Within that time lost connections are made again, moved slots are
// followed, and a replica that took over is found.
//
// Errors: kUnavailable: the servers cannot be reached, or the cluster is down, or the table has vanished from it
// (dropped by another process, flushed, or restarted empty). kDeadlineExceeded: they did not answer in time.
// kFailedPrecondition: wrong password, certificate or permissions; the message names the command that the user must be
// allowed. kDataLoss: a row of a wrong length, with its key. kResourceExhausted: Redis is at its maxmemory.
//
// Writes: what was acknowledged is as durable as the servers' configuration says (RDB, AOF, replicas): Redis replicates
// after it acknowledges, so a fail-over may lose the last moments. Upserts that end with an error may have been written
// in part. A row is always whole.
//
// Beyond table_store.h: a table that was dropped in this process stays readable here while held, and for a day at most;
// writing to it is refused. For other processes it is gone. Scan and evictions remember the keys of one partition
// (16 to 32 bytes each) while they run. Thread safety: as in table_store.h.

#ifndef HPS_STORAGE_REDIS_STORE_H_
#define HPS_STORAGE_REDIS_STORE_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "cc/storage/overflow.h"
#include "hps/table_store.h"

namespace hps {

struct RedisStoreOptions {
  std::string address = "127.0.0.1:7000";  // host[:port] of one or more nodes, parted by commas or semicolons
  std::string user_name = "default";
  // At most one of the three. The variable and the first line of the file are read when the store is opened.
  std::string password;
  std::string password_env;
  std::string password_file;
  uint32_t num_partitions = 8;
  uint32_t num_node_connections = 5;    // at most, to each node
  uint32_t max_get_batch_size = 10000;  // keys in a command; split further below what a command takes
  uint32_t max_set_batch_size = 10000;  // rows in a command; likewise
  bool enable_tls = false;
  std::string tls_ca_certificate;      // file or folder
  std::string tls_client_certificate;  // with tls_client_key; a pair of files that do not exist is left out
  std::string tls_client_key;
  std::string tls_server_name_identification;  // asked for and checked
  OverflowOptions overflow;
  std::chrono::milliseconds patience = std::chrono::seconds(15);
};

// What the section "volatile_db" of a configuration says.
RedisStoreOptions RedisOptionsOf(const VolatileConfig& config);

// The port of an address that names none: that of the predecessor's default address.
inline constexpr uint16_t kRedisDefaultPort = 7000;

// Connects, so that a wrong address, password or certificate shows here. kInvalidArgument: a value of the options.
// kNotFound: a password or certificate file that does not exist.
Result<std::unique_ptr<TableStore>> OpenRedisStore(const RedisStoreOptions& options);

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_STORE_H_
