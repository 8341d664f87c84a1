// Lookups of a session on a GPU, from the call until the rows are there, with everything that a server does around the
// kernels: exact answers, missing rows from the hash map in host memory. Each line of output is one measurement in
// JSON; rows are checked.
//
//   hits     all keys are in the cache; "call_us" until LookupOnDevice has returned and so knows that nothing is
//   missing,
//            "rows_us" until the stream is done. "static": the same for a cache that nobody waits for
//   misses   a tenth of the keys is asked for the first time; beside it what as many rows alone take: "fetch_us" from
//   the
//            tiers into pinned memory, "copy_us" from there to the device
//
// Times are of one caller, in microseconds of wall time. Usage: device_lookup_benchmark [COMMIT]

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "benchmarks/native/run_record.h"
#include "cuda_kernels/device.h"
#include "hps/parameter_server.h"

namespace hps {
namespace {

namespace fs = std::filesystem;

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
void CheckDevice(int error) {
  if (error != 0) Check(Internal("error " + std::to_string(error) + " of the device"));
}

double Now() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
double Quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<size_t>(q * static_cast<double>(values.size())))];
}

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

class Benchmark {
 public:
  Benchmark(cuda::Device& device, uint32_t width, uint64_t rows) : device_(device), width_(width), rows_(rows) {
    std::string pattern = (fs::temp_directory_path() / "hps_device_XXXXXX").string();
    folder_ = ::mkdtemp(pattern.data());
    WriteTable(folder_ / "t", rows, width);
    ServerConfig config;
    config.volatile_db.num_partitions = 16;
    for (const bool fixed : {false, true}) {
      ModelConfig model;
      model.name = fixed ? "static" : "dynamic";
      model.tables = {{.name = "t", .path = (folder_ / "t").string(), .width = width}};
      model.gpucache = true;
      model.gpucacheper = 0.5;
      model.init_ec = false;
      model.deployed_devices = {0};
      model.cache_type = fixed ? CacheType::kStatic : CacheType::kDynamic;
      model.max_batch_size = kMostKeys;
      config.models.push_back(std::move(model));
    }
    server_ = Value(ParameterServer::Open(config, {.show_progress = false}));
    void* address = nullptr;
    CheckDevice(device.CreateStream(&stream_));
    CheckDevice(device.Allocate(kMostKeys * sizeof(Key), reinterpret_cast<void**>(&device_keys_)));
    CheckDevice(device.Allocate(kMostKeys * width * sizeof(float), reinterpret_cast<void**>(&device_rows_)));
    CheckDevice(device.AllocateHost(kMostKeys * sizeof(Key), reinterpret_cast<void**>(&keys_), &address));
    CheckDevice(device.AllocateHost(kMostKeys * width * sizeof(float), reinterpret_cast<void**>(&output_), &address));
  }
  ~Benchmark() {
    Check(server_->Close());
    device_.Free(device_keys_);
    device_.Free(device_rows_);
    device_.FreeHost(keys_);
    device_.FreeHost(output_);
    device_.DestroyStream(stream_);
    fs::remove_all(folder_);
  }

  void Hits(const char* model, uint32_t count) {
    const LookupSession session = Value(server_->NewSession(model));
    std::vector<double> calls, rows;
    Draw(count, 0);
    for (int i = 0; i < 2200; ++i) {
      if (i == 100) Draw(count, 0);  // other keys, that are there as well
      const auto [call, row] = Time(session, count);
      if (i < 200) continue;
      calls.push_back(call);
      rows.push_back(row);
    }
    CheckRows(count);
    std::printf(
        "{\"kind\": \"device_lookup_hits\", \"cache\": \"%s\", \"width\": %u, \"keys\": %u, \"call_us\": %.1f, "
        "\"call_p99_us\": %.1f, \"rows_us\": %.1f, \"rows_p99_us\": %.1f}\n",
        model, width_, count, Quantile(calls, 0.5), Quantile(calls, 0.99), Quantile(rows, 0.5), Quantile(rows, 0.99));
  }

  void Misses(uint32_t count, int rounds) {
    const LookupSession session = Value(server_->NewSession("dynamic"));
    const uint32_t cold = count / 10;
    std::vector<double> rows, copies, fetches;
    LookupReport report;
    uint64_t fetched = 0;
    for (int i = 0; i < rounds + 10; ++i) {
      Draw(cold, cold);
      const DenseLookup fetch{.table = 0, .width = width_, .keys = std::span(keys_, cold), .rows = output_};
      const double fetch_begin = Now();
      Check(session.Lookup(std::span(&fetch, 1)));
      if (i >= 10) fetches.push_back(Now() - fetch_begin);
      Draw(count, cold);
      const double time = Time(session, count, &report).second;
      CheckRows(count);
      const double begin = Now();
      CheckDevice(device_.Copy(device_rows_, output_, size_t{cold} * width_ * sizeof(float), stream_));
      CheckDevice(device_.SynchronizeStream(stream_));
      if (i < 10) continue;
      copies.push_back(Now() - begin);
      rows.push_back(time);
      fetched += report.rows_from_volatile;
    }
    std::printf(
        "{\"kind\": \"device_lookup_misses\", \"width\": %u, \"keys\": %u, \"missing_keys\": %.1f, "
        "\"rows_us\": %.1f, \"rows_p99_us\": %.1f, \"fetch_us\": %.1f, \"copy_us\": %.1f}\n",
        width_, count, static_cast<double>(fetched) / rounds, Quantile(rows, 0.5), Quantile(rows, 0.99),
        Quantile(fetches, 0.5), Quantile(copies, 0.5));
  }

  // Asks for the keys that Draw gives as warm ones.
  void Warm() {
    const LookupSession session = Value(server_->NewSession("dynamic"));
    for (uint64_t first = 0; first < Warm(rows_); first += kMostKeys) {
      const auto count = static_cast<uint32_t>(std::min<uint64_t>(kMostKeys, Warm(rows_) - first));
      for (uint32_t i = 0; i < count; ++i) keys_[i] = static_cast<Key>(first + i);
      Upload(count);
      (void)Time(session, count);
    }
  }

  static constexpr uint32_t kMostKeys = 1 << 16;

 private:
  static uint64_t Warm(uint64_t rows) { return rows / 10; }  // far less than the cache holds

  void Draw(uint32_t count, uint32_t cold) {
    for (uint32_t i = 0; i < count; ++i) {
      keys_[i] = static_cast<Key>(i < cold ? Warm(rows_) + next_cold_++ : random_() % Warm(rows_));
    }
    if (Warm(rows_) + next_cold_ > rows_) Check(Internal("the table has too few rows for so many rounds"));
    std::shuffle(keys_, keys_ + count, random_);
    Upload(count);
  }
  void Upload(uint32_t count) {
    CheckDevice(device_.Copy(device_keys_, keys_, count * sizeof(Key), stream_));
    CheckDevice(device_.SynchronizeStream(stream_));
  }
  std::pair<double, double> Time(const LookupSession& session, uint32_t count, LookupReport* report = nullptr) {
    const DeviceLookupPart part{
        .table = 0, .width = width_, .keys = device_keys_, .count = count, .rows = device_rows_};
    const double begin = Now();
    Check(session.LookupOnDevice(0, std::span(&part, 1), stream_, {}, report));
    const double called = Now();
    CheckDevice(device_.SynchronizeStream(stream_));
    return {called - begin, Now() - begin};
  }
  void CheckRows(uint32_t count) {
    CheckDevice(device_.Copy(output_, device_rows_, size_t{count} * width_ * sizeof(float), stream_));
    CheckDevice(device_.SynchronizeStream(stream_));
    for (size_t i = 0; i < size_t{count} * width_; ++i) {
      if (output_[i] != static_cast<float>(keys_[i / width_])) Check(Internal("a wrong row"));
    }
  }

  cuda::Device& device_;
  const uint32_t width_;
  const uint64_t rows_;
  fs::path folder_;
  std::shared_ptr<ParameterServer> server_;
  cudaStream_t stream_ = nullptr;
  Key* device_keys_ = nullptr;
  float* device_rows_ = nullptr;
  Key* keys_ = nullptr;
  float* output_ = nullptr;
  std::mt19937_64 random_{11};
  uint64_t next_cold_ = 0;
};

int Main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  int error = 0;
  const auto device = cuda::OpenCudaDevice(0, &error);
  CheckDevice(error);
  std::printf(
      "{\"kind\": \"run\", \"date\": \"%s\", \"command\": \"device_lookup_benchmark\", \"commit\": \"%s\", "
      "\"machine\": \"%s, %u cores\"}\n",
      UtcNow().c_str(), argc > 1 ? argv[1] : Commit().c_str(), device->info().name,
      std::thread::hardware_concurrency());
  const std::pair<uint32_t, uint64_t> tables[] = {{16, 4'000'000}, {128, 2'500'000}};
  for (const auto& [width, rows] : tables) {
    Benchmark benchmark(*device, width, rows);
    benchmark.Warm();
    for (const char* model : {"dynamic", "static"}) {
      for (const uint32_t count : {1u << 10, 1u << 14, 1u << 16}) benchmark.Hits(model, count);
    }
    benchmark.Misses(2'000, 1'500);
    benchmark.Misses(Benchmark::kMostKeys, 100);
  }
  return 0;
}

}  // namespace
}  // namespace hps

int main(int argc, char** argv) { return hps::Main(argc, argv); }
