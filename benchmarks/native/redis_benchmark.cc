// How much of what a Redis server can give reaches our rows: Fetch of random keys through the Redis store, beside raw
// pipelines of HMGET over the same connections to the same server in the same minute.
//
// The raw side sends commands that were formatted before the clock starts and counts the replies with hiredis' parser
// without making objects or copying a row; it is run with several commands sizes, and the best of them is what the
// store is compared with. Rounds of both alternate. Every Fetch is checked once. Prints JSON lines, a "run" record
// first.
//
// Usage: redis_benchmark [ROWS]      with redis-server or redis-tools installed; starts its own servers.

#include <hiredis/hiredis.h>
#include <poll.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "benchmarks/native/run_record.h"
#include "cc/storage/redis_layout.h"
#include "cc/storage/redis_store.h"
#include "cc/tests/redis_service.h"
#include "cc/tests/row_pattern.h"

namespace hps::testing {
namespace {

constexpr uint32_t kPartitions = 8;
constexpr int kBatches = 8;  // of different keys
constexpr int kRounds = 41;  // many and short: other programs disturb both sides alike
constexpr double kRoundSeconds = 0.1;

void Check(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}
template <typename T>
T Value(Result<T> result) {
  Check(result.status());
  return std::move(result).value();
}

void PrintRun(int argc, char** argv) {
  std::string command = "redis_benchmark";
  for (int i = 1; i < argc; ++i) command += std::string(" ") + argv[i];
  double load = 0;
  ::getloadavg(&load, 1);
  std::printf(
      "{\"kind\": \"run\", \"date\": \"%s\", \"command\": \"%s\", \"commit\": \"%s\", \"machine\": {\"cpu\": "
      "\"%s\", \"cores\": %ld}, \"redis\": \"%s\", \"load_average\": %.2f}\n",
      UtcNow().c_str(), command.c_str(), Commit().c_str(), CpuName().c_str(), ::sysconf(_SC_NPROCESSORS_ONLN),
      Line("redis-server --version | sed 's/.*v=\\([0-9.]*\\).*/\\1/'").c_str(), load);
}

// Raw pipelines: `connections` to each node, each with its share of the commands of a batch.
class Pipelines {
 public:
  Pipelines(const RedisService& redis, int connections, uint32_t keys_per_command, const std::vector<Key>& keys) {
    const RedisLayout layout(RedisLayout::Version::kCurrent, "hps_et.m.t", kPartitions, 8);
    std::vector<std::vector<Key>> partitions(kPartitions);
    for (const Key key : keys) partitions[layout.PartitionOf(key)].push_back(key);
    std::map<int, std::vector<std::string>> commands;  // by node
    for (uint32_t i = 0; i < kPartitions; ++i) {
      const std::string name = layout.ValuesKey(i);
      const int node = redis.cluster() ? redis.MasterOf(RedisSlot(name)) : 0;
      for (size_t first = 0; first < partitions[i].size(); first += keys_per_command) {
        const size_t count = std::min<size_t>(keys_per_command, partitions[i].size() - first);
        std::string& command = commands[node].emplace_back();
        command = "*" + std::to_string(count + 2) + "\r\n$5\r\nHMGET\r\n$" + std::to_string(name.size()) + "\r\n" +
                  name + "\r\n";
        for (size_t j = first; j < first + count; ++j) {
          command += "$8\r\n" + std::string(reinterpret_cast<const char*>(&partitions[i][j]), 8) + "\r\n";
        }
      }
    }
    for (const auto& [node, texts] : commands) {
      for (int c = 0; c < connections; ++c) {
        Lane lane;
        for (size_t i = c; i < texts.size(); i += connections) lane.commands.push_back(texts[i]);
        if (lane.commands.empty()) continue;
        lane.context = redisConnectNonBlock("127.0.0.1", redis.port(node));
        if (lane.context == nullptr || lane.context->err != 0) Check(Unavailable("cannot connect"));
        redisReaderFree(lane.context->reader);
        lane.context->reader = redisReaderCreateWithFunctions(nullptr);  // makes no objects
        lane.context->reader->maxbuf = 0;
        lanes_.push_back(std::move(lane));
      }
    }
  }
  ~Pipelines() {
    for (Lane& lane : lanes_) redisFree(lane.context);
  }

  void Run() {
    size_t open = lanes_.size();
    for (Lane& lane : lanes_) lane.sent = lane.received = 0;
    std::vector<pollfd> waiting;
    std::vector<char> bytes(128 << 10);
    while (open > 0) {
      waiting.clear();
      for (Lane& lane : lanes_) {
        // Two commands on their way, as redis-benchmark -P does.
        while (lane.sent < lane.commands.size() && lane.sent - lane.received < 2) {
          const std::string& command = lane.commands[lane.sent++];
          redisAppendFormattedCommand(lane.context, command.data(), command.size());
          lane.unsent = true;
        }
        int done = 0;
        if (lane.unsent && redisBufferWrite(lane.context, &done) != REDIS_OK) Check(Unavailable(lane.context->errstr));
        if (done != 0) lane.unsent = false;
        const bool active = lane.received < lane.commands.size();
        waiting.push_back(
            {active ? lane.context->fd : -1, static_cast<short>(POLLIN | (lane.unsent ? POLLOUT : 0)), 0});
      }
      (void)::poll(waiting.data(), waiting.size(), -1);
      for (size_t i = 0; i < lanes_.size(); ++i) {
        Lane& lane = lanes_[i];
        if ((waiting[i].revents & POLLIN) == 0) continue;
        while (true) {
          const ssize_t count = lane.context->funcs->read(lane.context, bytes.data(), bytes.size());
          if (count < 0) Check(Unavailable(lane.context->errstr));
          if (count == 0) break;
          redisReaderFeed(lane.context->reader, bytes.data(), static_cast<size_t>(count));
          void* reply = nullptr;
          while (redisReaderGetReply(lane.context->reader, &reply) == REDIS_OK && reply != nullptr) {
            if (reinterpret_cast<uintptr_t>(reply) != REDIS_REPLY_ARRAY) Check(Internal("an error reply"));
            if (++lane.received == lane.commands.size()) --open;
          }
          if (static_cast<size_t>(count) < bytes.size()) break;
        }
      }
    }
  }

 private:
  struct Lane {
    redisContext* context = nullptr;
    std::vector<std::string> commands;
    size_t sent = 0;
    size_t received = 0;
    bool unsent = false;
  };
  std::vector<Lane> lanes_;
};

double ProcessorSeconds() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Adds this thread's processor time for a key, in nanoseconds, to *processor.
double KeysPerSecond(const std::function<size_t()>& work, std::vector<double>* processor) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const double processor_start = ProcessorSeconds();
  size_t keys = 0;
  double seconds = 0;
  while (seconds < kRoundSeconds) {
    keys += work();
    seconds = std::chrono::duration<double>(Clock::now() - start).count();
  }
  processor->push_back(1e9 * (ProcessorSeconds() - processor_start) / static_cast<double>(keys));
  return static_cast<double>(keys) / seconds;
}

double Median(std::vector<double> values, double at = 0.5) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(at * static_cast<double>(values.size() - 1))];
}

void Measure(const RedisService& redis, TableStore& store, size_t rows, size_t width, size_t batch, int connections) {
  const auto table = Value(store.OpenTable({.name = "hps_et.m.t", .row_bytes = width * 4}));
  std::mt19937_64 random(20262);
  std::vector<std::vector<Key>> keys(kBatches, std::vector<Key>(batch));
  for (auto& of_batch : keys) {
    for (Key& key : of_batch) key = static_cast<Key>(random() % rows);
  }
  RowBlock out(batch, width * 4);
  std::vector<uint32_t> misses;
  int next = 0;
  const auto fetch = [&] {
    Check(table->Fetch({.keys = keys[next], .rows = out.buffer()}, &misses));
    next = (next + 1) % kBatches;
    return batch;
  };
  for (int i = 0; i < kBatches; ++i) {
    const std::vector<Key>& asked = keys[next];
    fetch();
    for (size_t j = 0; j < batch; ++j) {
      if (RowVersion(asked[j], out.row(j)) != 1u || !misses.empty()) Check(Internal("a wrong row"));
    }
  }
  const std::array<uint32_t, 3> sizes = {250, 1000, 4000};
  std::vector<std::vector<std::unique_ptr<Pipelines>>> raw;  // by size, by batch
  for (const uint32_t size : sizes) {
    raw.emplace_back();
    for (const auto& of_batch : keys) {
      raw.back().push_back(std::make_unique<Pipelines>(redis, connections, size, of_batch));
    }
  }
  std::vector<double> ours;
  std::vector<double> our_processor;
  std::map<uint32_t, std::vector<double>> raw_rates;
  std::map<uint32_t, std::vector<double>> raw_processor;
  for (int round = 0; round < kRounds; ++round) {
    ours.push_back(KeysPerSecond(fetch, &our_processor));
    for (size_t i = 0; i < sizes.size(); ++i) {
      int turn = 0;
      const auto pipeline = [&] {
        raw[i][turn]->Run();
        turn = (turn + 1) % kBatches;
        return batch;
      };
      raw_rates[sizes[i]].push_back(KeysPerSecond(pipeline, &raw_processor[sizes[i]]));
    }
  }
  uint32_t best = sizes[0];
  for (const uint32_t size : sizes) {
    if (Median(raw_rates[size]) > Median(raw_rates[best])) best = size;
  }
  std::vector<double> ratios;
  for (int round = 0; round < kRounds; ++round) ratios.push_back(ours[round] / raw_rates[best][round]);
  std::printf(
      "{\"kind\": \"redis\", \"nodes\": %d, \"rows\": %zu, \"width\": %zu, \"batch\": %zu, \"connections\": %d, "
      "\"rounds\": %d, \"hps_keys_per_second\": %.0f, \"raw_keys_per_second\": %.0f, "
      "\"raw_keys_per_command\": %u, \"ratio\": %.3f, \"ratio_quartiles\": [%.3f, %.3f], "
      "\"hps_processor_ns_per_key\": %.0f, \"raw_processor_ns_per_key\": %.0f}\n",
      redis.size(), rows, width, batch, connections, kRounds, Median(ours), Median(raw_rates[best]), best,
      Median(ratios), Median(ratios, 0.25), Median(ratios, 0.75), Median(our_processor), Median(raw_processor[best]));
  std::fflush(stdout);
}

void MeasureServers(int masters, size_t rows, size_t width) {
  const auto redis = Value(RedisService::Start({.masters = masters}));
  RedisStoreOptions options;
  options.address = redis->address_list();
  options.num_partitions = kPartitions;
  const auto store = Value(OpenRedisStore(options));
  const auto table = Value(store->CreateTable({.name = "hps_et.m.t", .row_bytes = width * 4}));
  for (size_t first = 0; first < rows; first += 100'000) {
    std::vector<Key> keys(std::min<size_t>(100'000, rows - first));
    for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<Key>(first + i);
    Check(table->Upsert(keys, RowBlock::Of(keys, 1, width * 4).source()));
  }
  for (const size_t batch : {1024, 65'536}) Measure(*redis, *store, rows, width, batch, 5);
}

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) {
  const size_t rows = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 500'000;
  hps::testing::PrintRun(argc, argv);
  for (const int masters : {0, 3}) {
    for (const size_t width : {16, 64}) hps::testing::MeasureServers(masters, rows, width);
  }
}
