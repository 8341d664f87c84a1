// What the stack of tiers costs and how it behaves under load. Each line of output is one measurement in JSON. Usage:
//   stack_benchmark hits           lookups that the volatile tier answers alone, by batch size
//   stack_benchmark load [ROWS]    one model's lookups while another model loads and is replaced, beside quiet
//   stack_benchmark flights        one hot key, and keys of one's own, under 16 threads, with and without sharing
//   fetches
// `hits` and `load` need the public interface alone, so that older versions can be measured with the same file:
// compile it with HPS_STACK_BENCHMARK_PUBLIC then.

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#ifndef HPS_STACK_BENCHMARK_PUBLIC
#include "cc/core/single_flight.h"
#include "cc/storage/rocksdb_store.h"
#endif
#include "hps/parameter_server.h"

namespace hps {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

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

double ThreadSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<size_t>(q * static_cast<double>(values.size())))];
}

class Folder {
 public:
  Folder() {
    std::string pattern = (fs::temp_directory_path() / "hps_stack_XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~Folder() { fs::remove_all(path_); }
  fs::path operator/(const std::string& name) const { return path_ / name; }

 private:
  fs::path path_;
};

// Row i has key i and i in every element.
void WriteTable(const fs::path& folder, uint64_t rows, uint32_t width) {
  fs::create_directories(folder);
  std::ofstream keys(folder / "key", std::ios::binary), vectors(folder / "emb_vector", std::ios::binary);
  std::vector<float> row(width);
  for (uint64_t i = 0; i < rows; ++i) {
    keys.write(reinterpret_cast<const char*>(&i), sizeof(i));
    std::fill(row.begin(), row.end(), static_cast<float>(i));
    vectors.write(reinterpret_cast<const char*>(row.data()), static_cast<std::streamsize>(width * sizeof(float)));
  }
}

ModelConfig Model(const std::string& name, const fs::path& folder, uint32_t width) {
  ModelConfig model;
  model.name = name;
  model.gpucache = false;
  model.tables = {{.name = "t", .path = folder.string(), .width = width}};
  return model;
}

// Lookups of random keys by one caller, each row checked.
class Caller {
 public:
  Caller(LookupSession session, uint64_t rows, uint32_t width, size_t batch, uint64_t seed)
      : session_(std::move(session)), rows_(rows), width_(width), keys_(batch), output_(batch * width), random_(seed) {}

  void Draw() {
    for (Key& key : keys_) key = static_cast<Key>(random_() % rows_);
  }
  void Lookup(Executor* executor = nullptr) {
    const DenseLookup lookup{.table = 0, .width = width_, .keys = keys_, .rows = output_.data()};
    Check(session_.Lookup(std::span(&lookup, 1), {.executor = executor}));
  }
  void CheckRows() const {
    for (size_t i = 0; i < keys_.size(); ++i) {
      if (output_[i * width_ + width_ - 1] != static_cast<float>(keys_[i])) Check(Internal("a wrong row"));
    }
  }

 private:
  const LookupSession session_;
  const uint64_t rows_;
  const uint32_t width_;
  std::vector<Key> keys_;
  std::vector<float> output_;
  std::mt19937_64 random_;
};

// ---- hits -----------------------------------------------------------------------------------------------------------

void MeasureHits() {
  constexpr uint64_t kRows = 200'000;
  constexpr uint32_t kWidth = 16;
  Folder folder;
  WriteTable(folder / "t", kRows, kWidth);
  ServerConfig config;
  config.models = {Model("m", folder / "t", kWidth)};
  config.volatile_db.num_partitions = 4;
  auto server = Value(ParameterServer::Open(config, {.show_progress = false}));
  for (const size_t batch : {1, 16, 256, 2048}) {
    Caller caller(Value(server->NewSession("m")), kRows, kWidth, batch, 1);
    caller.Draw();
    const size_t calls = 400'000 / (batch + 20);
    double best = 1e9;
    for (int round = 0; round < 15; ++round) {
      const double start = ThreadSeconds();
      for (size_t i = 0; i < calls; ++i) caller.Lookup(&InlineExecutor());
      best = std::min(best, (ThreadSeconds() - start) / static_cast<double>(calls));
      caller.CheckRows();
    }
    std::printf("{\"kind\": \"hits\", \"batch\": %zu, \"width\": %u, \"processor_ns\": %.1f}\n", batch, kWidth,
                best * 1e9);
    std::fflush(stdout);
  }
}

// ---- load beside lookups
// ----------------------------------------------------------------------------------------------

// Calls that come at fixed times, whether the one before has ended or not: a late answer delays those behind it, and
// their wait counts.
std::vector<double> RunPaced(Caller& caller, const std::function<bool()>& go_on) {
  constexpr std::chrono::microseconds kInterval{1000};
  std::vector<double> microseconds;
  Clock::time_point due = Clock::now();
  while (go_on()) {
    due += kInterval;
    std::this_thread::sleep_until(due);
    caller.Draw();
    caller.Lookup();
    microseconds.push_back(std::chrono::duration<double, std::micro>(Clock::now() - due).count());
    caller.CheckRows();
  }
  return microseconds;
}

void MeasureLoad(uint64_t rows) {
  constexpr uint32_t kWidth = 32;
  constexpr size_t kBatch = 256;
  constexpr uint64_t kServedRows = 200'000;
  constexpr int kRounds = 9;
  for (const bool database : {false, true}) {
    const uint64_t loaded_rows = database ? rows / 4 : rows;
    Folder folder;
    WriteTable(folder / "served", kServedRows, kWidth);
    WriteTable(folder / "a", loaded_rows, kWidth);
    WriteTable(folder / "b", loaded_rows, kWidth);
    ::sync();  // else the system writes them out while it measures
    ServerConfig config;
    config.models = {Model("served", folder / "served", kWidth)};
    config.volatile_db.num_partitions = 4;
    if (database) {
      config.persistent_db.type = PersistentType::kRocksDb;
      config.persistent_db.path = (folder / "database").string();
      config.persistent_db.num_threads = 2;
    }
    auto server = Value(ParameterServer::Open(config, {.show_progress = false}));
    Caller caller(Value(server->NewSession("served")), kServedRows, kWidth, kBatch, 1);
    std::vector<double> quiet_p50, quiet_p99, loading_p50, loading_p99, p99_ratio;
    double load_seconds = 0.0;
    size_t calls = 0;
    // Quiet and loading take turns, so that what else the machine does meets both.
    for (int round = 0; round < kRounds; ++round) {
      std::atomic<bool> done{false};
      double seconds = 0.0;
      std::thread loader([&] {
        const Clock::time_point start = Clock::now();
        const ModelConfig model = Model("loaded", folder / (round % 2 == 0 ? "a" : "b"), kWidth);
        Check(round == 0 ? server->LoadModel(model) : server->ReplaceModel(model));
        seconds = std::chrono::duration<double>(Clock::now() - start).count();
        done = true;
      });
      const std::vector<double> loading = RunPaced(caller, [&] { return !done; });
      loader.join();
      const Clock::time_point end = Clock::now() + std::chrono::milliseconds(static_cast<int>(seconds * 1000));
      const std::vector<double> quiet = RunPaced(caller, [&] { return Clock::now() < end; });
      quiet_p50.push_back(Quantile(quiet, 0.5));
      quiet_p99.push_back(Quantile(quiet, 0.99));
      loading_p50.push_back(Quantile(loading, 0.5));
      loading_p99.push_back(Quantile(loading, 0.99));
      p99_ratio.push_back(loading_p99.back() / quiet_p99.back());
      load_seconds += seconds;
      calls += loading.size();
    }
    std::printf(
        "{\"kind\": \"load_beside_lookups\", \"tiers\": \"%s\", \"loaded_rows\": %llu, \"width\": %u, \"batch\": %zu, "
        "\"calls_per_second\": 1000, \"rounds\": %d, \"quiet_p50_us\": %.1f, \"quiet_p99_us\": %.1f, "
        "\"loading_p50_us\": %.1f, \"loading_p99_us\": %.1f, \"p99_ratio\": %.2f, \"p99_ratio_quartiles\": [%.2f, "
        "%.2f], "
        "\"calls_while_loading\": %zu, \"load_rows_per_second\": %.0f}\n",
        database ? "hash_map + rocks_db" : "hash_map", static_cast<unsigned long long>(loaded_rows), kWidth, kBatch,
        kRounds, Quantile(quiet_p50, 0.5), Quantile(quiet_p99, 0.5), Quantile(loading_p50, 0.5),
        Quantile(loading_p99, 0.5), Quantile(p99_ratio, 0.5), Quantile(p99_ratio, 0.25), Quantile(p99_ratio, 0.75),
        calls, kRounds * static_cast<double>(loaded_rows) / load_seconds);
    std::fflush(stdout);
    Check(server->Close());
  }
}

// ---- flights
// ----------------------------------------------------------------------------------------------------------

#ifndef HPS_STACK_BENCHMARK_PUBLIC
// Answers as the table below does, but later: a disk or a network.
class LateTable final : public Table {
 public:
  LateTable(std::shared_ptr<Table> table, std::chrono::microseconds delay) : table_(std::move(table)), delay_(delay) {}
  const TableSpec& spec() const override { return table_->spec(); }
  Status Fetch(const FetchRequest& request, std::vector<uint32_t>* misses) const override {
    std::lock_guard lock(one_at_a_time_);  // a disk with one arm
    std::this_thread::sleep_for(delay_);
    return table_->Fetch(request, misses);
  }
  Status Locate(std::span<const Key> k, std::span<const std::byte*> r) const override { return table_->Locate(k, r); }
  Status Upsert(std::span<const Key>, ConstRowBuffer, const UpsertOptions&) override { return Unimplemented("late"); }
  Status Erase(std::span<const Key>, uint64_t*) override { return Unimplemented("late"); }
  Status Scan(const ScanVisitor&) const override { return Unimplemented("late"); }
  Result<TableStats> Stats() const override { return table_->Stats(); }

 private:
  const std::shared_ptr<Table> table_;
  const std::chrono::microseconds delay_;
  mutable std::mutex one_at_a_time_;
};

struct Rate {
  double per_second = 0.0;
  double p99_us = 0.0;
};

Rate RunThreads(const Table& table, size_t keys_per_fetch, bool hot, double seconds) {
  constexpr int kThreads = 16;
  std::vector<std::vector<double>> times(kThreads);
  std::vector<std::thread> threads;
  const Clock::time_point end = Clock::now() + std::chrono::milliseconds(static_cast<int>(seconds * 1000));
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(static_cast<uint64_t>(t));
      std::vector<Key> keys(keys_per_fetch, 7);
      std::vector<std::byte> rows(keys.size() * table.spec().row_bytes);
      std::vector<uint32_t> misses;
      while (Clock::now() < end) {
        for (Key& key : keys) key = hot ? 7 : static_cast<Key>(random() % 100'000);
        const Clock::time_point start = Clock::now();
        Check(table.Fetch({.keys = keys, .rows = {rows.data(), table.spec().row_bytes}}, &misses));
        times[static_cast<size_t>(t)].push_back(
            std::chrono::duration<double, std::micro>(Clock::now() - start).count());
        if (!misses.empty()) Check(Internal("a miss"));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<double> all;
  for (const auto& each : times) all.insert(all.end(), each.begin(), each.end());
  return {static_cast<double>(all.size()) / seconds, Quantile(all, 0.99)};
}

void MeasureFlights() {
  constexpr uint32_t kWidth = 32;
  constexpr size_t kRows = 100'000;
  Folder folder;
  auto store = Value(OpenRocksDbStore({.path = (folder / "database").string(), .num_threads = 2}));
  std::shared_ptr<Table> disk = Value(store->CreateTable({.name = "hps_et.m.t", .row_bytes = kWidth * sizeof(float)}));
  std::vector<Key> keys(kRows);
  std::vector<float> values(kRows * kWidth, 1.0f);
  for (size_t i = 0; i < kRows; ++i) keys[i] = static_cast<Key>(i);
  Check(
      disk->Upsert(keys, {reinterpret_cast<const std::byte*>(values.data()), kWidth * sizeof(float)}, {.bulk = true}));
  Check(store->Flush());
  struct Kind {
    const char* name;
    std::shared_ptr<Table> table;
  };
  for (const Kind& below : {Kind{"rocks_db", disk},
                            Kind{"late 1 ms", std::make_shared<LateTable>(disk, std::chrono::microseconds(1000))}}) {
    const Kind kinds[] = {
        {"alone", below.table},
        {"shared", std::make_shared<SingleFlightTable>(below.table, nullptr, std::chrono::nanoseconds(0))},
        {"as configured", std::make_shared<SingleFlightTable>(below.table)}};
    for (const bool hot : {true, false}) {
      for (const size_t count : {1, 64}) {
        if (hot && count > 1) continue;
        std::vector<double> rates[3], tails[3];
        for (int round = 0; round < 7; ++round) {
          for (size_t k = 0; k < 3; ++k) {
            const Rate rate = RunThreads(*kinds[k].table, count, hot, 0.3);
            rates[k].push_back(rate.per_second);
            tails[k].push_back(rate.p99_us);
          }
        }
        for (size_t k = 0; k < 3; ++k) {
          std::printf(
              "{\"kind\": \"flights\", \"below\": \"%s\", \"keys\": \"%s\", \"keys_per_fetch\": %zu, \"threads\": 16, "
              "\"fetches\": \"%s\", \"fetches_per_second\": %.0f, \"p99_us\": %.1f, \"times_alone\": %.2f}\n",
              below.name, hot ? "one hot key" : "random", count, kinds[k].name, Quantile(rates[k], 0.5),
              Quantile(tails[k], 0.5), Quantile(rates[k], 0.5) / Quantile(rates[0], 0.5));
          std::fflush(stdout);
        }
      }
    }
  }
  Check(store->Close());
}
#endif

}  // namespace
}  // namespace hps

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "hits") {
    hps::MeasureHits();
  } else if (what == "load") {
    hps::MeasureLoad(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 3'000'000);
#ifndef HPS_STACK_BENCHMARK_PUBLIC
  } else if (what == "flights") {
    hps::MeasureFlights();
#endif
  } else {
    std::fprintf(stderr, "usage: stack_benchmark hits | load [ROWS] | flights\n");
    return 2;
  }
  return 0;
}
