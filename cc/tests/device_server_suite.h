// The suite of servers with caches on devices, at the session, over two devices: over the processor everywhere
// (device_server_test.cc), over the GPUs of the machine where there are any (cuda_server_test.cc), one of which stands
// for both where there is no second.

#ifndef HPS_TESTS_DEVICE_SERVER_SUITE_H_
#define HPS_TESTS_DEVICE_SERVER_SUITE_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cc/cache/cache_writer.h"
#include "cc/core/devices.h"
#include "cc/tests/cache_fixture.h"
#include "cc/tests/faulty_store.h"
#include "cc/tests/tracked_device.h"

namespace hps::testing {

using Json = nlohmann::json;

inline constexpr uint32_t kWidth = 4;
inline constexpr int kNumDevices = 2;
inline constexpr uint64_t kWriterBytes = CacheWriter::kBufferBytes;
inline const std::vector<Key> kKeys = KeyRange(0, 1000);  // of most tables
inline const std::vector<Key> kSome = KeyRange(100, 50);  // of them

// A lookup's answer: the version of each row, 0 for the default value, -1 for a row that is neither.
struct DeviceAnswer {
  Status status;
  LookupReport report;
  std::vector<int> versions;

  bool AllOf(int version) const {
    return status.ok() && std::all_of(versions.begin(), versions.end(), [&](int each) { return each == version; });
  }
};

// Where the devices of a suite come from.
struct ServerFixture {
  std::string name;  // letters and digits; becomes part of the test's name
  std::function<std::shared_ptr<cuda::Device>(int ordinal)> open;
  // Capture of a stream of such a device into a graph, beside which other threads use the device. The captured work can
  // be queued on a stream again and again; nullptr where the capture has failed.
  using Graph = std::function<int(cudaStream_t)>;
  std::function<int(cuda::Device&, cudaStream_t)> begin_capture;
  std::function<Graph(cuda::Device&, cudaStream_t)> end_capture;
};

// A server over two devices, and lookups there.
class DeviceServers {
 protected:
  explicit DeviceServers(ServerFixture fixture) : fixture_(std::move(fixture)) { OpenDevices(); }

  void OpenDevices(uint64_t memory_bytes = uint64_t{1} << 40) {
    devices_.clear();
    for (int i = 0; i < kNumDevices; ++i) {
      devices_.push_back(std::make_shared<TrackedDevice>(fixture_.open(i), i, memory_bytes));
    }
  }
  std::shared_ptr<DeviceSource> Source(int count = kNumDevices) const {
    DeviceSource source;
    source.count = [count] { return count; };
    source.open = [devices = devices_](int ordinal) -> Result<std::shared_ptr<cuda::Device>> {
      return std::shared_ptr<cuda::Device>(devices.at(static_cast<size_t>(ordinal)));
    };
    return std::make_shared<DeviceSource>(std::move(source));
  }

  // A model with tables "t0", "t1", ... of so many rows each, all of one version, and caches on the devices.
  ModelConfig Model(const std::string& name, uint32_t version, std::vector<int32_t> devices,
                    std::vector<size_t> rows = {1000}) {
    std::vector<TableConfig> tables;
    for (size_t i = 0; i < rows.size(); ++i) {
      const std::string folder = name + "_" + std::to_string(version) + "_" + std::to_string(i);
      WriteTable(folder_ / folder, KeyRange(0, rows[i]), kWidth, version);
      tables.push_back(MakeTable("t" + std::to_string(i), folder_ / folder, kWidth));
    }
    ModelConfig model = MakeModel(name, std::move(tables));
    model.gpucache = true;
    model.gpucacheper = 0.5;
    model.init_ec = false;
    model.deployed_devices = std::move(devices);
    return model;
  }
  ServerConfig Config(std::vector<ModelConfig> models, Tiers tiers = Tiers::kVolatile) {
    return MakeServer(tiers, folder_ / "database", std::move(models));
  }
  ServerOptions Options(int count = kNumDevices) {
    ServerOptions options{.show_progress = false, .devices = Source(count)};
    options.adapt_store = [this](std::string_view tier, std::shared_ptr<TableStore> store) {
      const std::optional<bool> shared = tier == "volatile" && shared_volatile_ ? std::optional(true) : std::nullopt;
      store = std::make_shared<FaultyStore>(std::move(store), faults_, FaultyOptions{.shared = shared});
      stores_[std::string(tier)] = store;
      return store;
    };
    return options;
  }
  std::shared_ptr<ParameterServer> Open(std::vector<ModelConfig> models, Tiers tiers = Tiers::kVolatile) {
    return Value(ParameterServer::Open(Config(std::move(models), tiers), Options()));
  }

  DeviceAnswer Look(const LookupSession& session, int device, const std::vector<Key>& keys, uint32_t table = 0,
                    const LookupOptions& options = {}) const {
    cuda::Device& memory = *devices_[static_cast<size_t>(device)];
    const TestStream stream(memory);
    const DeviceArray<Key> asked(memory, keys);
    const DeviceArray<float> rows(memory, keys.size() * kWidth);
    const DeviceLookupPart part{.table = table,
                                .width = kWidth,
                                .keys = asked.get(),
                                .count = static_cast<uint32_t>(keys.size()),
                                .rows = rows.get()};
    DeviceAnswer answer;
    answer.status = session.LookupOnDevice(device, std::span(&part, 1), stream.get(), options, &answer.report);
    if (!answer.status.ok()) return answer;
    const std::vector<float> values = rows.Get(stream.get());
    for (size_t i = 0; i < keys.size(); ++i) answer.versions.push_back(VersionOf(keys[i], values.data() + i * kWidth));
    return answer;
  }
  DeviceAnswer Look(const ParameterServer& server, const std::string& model, int device, const std::vector<Key>& keys,
                    uint32_t table = 0) const {
    return Look(Value(server.NewSession(model)), device, keys, table);
  }
  static int VersionOf(Key key, const float* row) {
    if (std::all_of(row, row + kWidth, [](float x) { return x == kDefault; })) return 0;
    const std::vector<float> expected = Row(key, static_cast<uint32_t>(row[0]), kWidth);
    return std::equal(expected.begin(), expected.end(), row) ? static_cast<int>(row[0]) : -1;
  }

  static Status Update(ParameterServer& server, const std::string& model, const std::vector<Key>& keys,
                       uint32_t version, uint32_t table = 0) {
    const std::vector<float> rows = RowsOf(keys, version);
    return server.UpdateRows(model, table, keys, {reinterpret_cast<const std::byte*>(rows.data()), kWidth * 4});
  }
  // As another process does: the tier changes, nobody is told.
  void WriteTier(const std::string& tier, const std::string& table, const std::vector<Key>& keys, uint32_t version) {
    const auto opened = Value(stores_.at(tier)->OpenTable({.name = table, .row_bytes = kWidth * 4}));
    const std::vector<float> rows = RowsOf(keys, version);
    ASSERT_OK(opened->Upsert(keys, {reinterpret_cast<const std::byte*>(rows.data()), kWidth * 4}));
  }
  static std::vector<float> RowsOf(const std::vector<Key>& keys, uint32_t version) {
    std::vector<float> rows;
    for (const Key key : keys) {
      const std::vector<float> row = Row(key, version, kWidth);
      rows.insert(rows.end(), row.begin(), row.end());
    }
    return rows;
  }
  uint64_t Bytes(int device) const { return devices_[static_cast<size_t>(device)]->allocated_bytes(); }

  const ServerFixture fixture_;
  TempFolder folder_;
  std::vector<std::shared_ptr<TrackedDevice>> devices_;
  const std::shared_ptr<Faults> faults_ = std::make_shared<Faults>();
  std::map<std::string, std::shared_ptr<TableStore>> stores_;  // of the last server, by tier
  bool shared_volatile_ = false;                               // other nodes share it
};

class DeviceServerSuite : public ::testing::TestWithParam<ServerFixture>, public DeviceServers {
 protected:
  DeviceServerSuite() : DeviceServers(GetParam()) {}
};

// Caches of whole tables in the ways that their rows may lie.
class DeviceRowsSuite : public DeviceServerSuite {};

// Models that share tables: their rows and their caches.
class SharedTablesSuite : public DeviceServerSuite {};

// Many models with tables of several widths.
class ManyModelsSuite : public DeviceServerSuite {
 protected:
  // Of both devices as they tell themselves, of one that stands for both once.
  uint64_t FreeOfDevices() const;
  void ExpectRowsOn(const ParameterServer& server, const ModelConfig& model, const std::vector<uint64_t>& rows,
                    uint32_t version, int device) const;
};

// Those of the predecessor's serving backend: one or several models on one or several devices of a node, each with
// several instances (sessions).
class SharingScenarios : public DeviceServerSuite {
 protected:
  struct Placed {
    std::string model;
    int device;
    int version;
  };
  // Several instances of each, at once, with several sessions and threads: every row is its model's, one cache answers
  // all instances, and nobody takes more caches for it.
  void RunInstances(const ParameterServer& server, const std::vector<Placed>& placed, int instances);
  // By model and device.
  static std::vector<uint64_t> CacheBytes(const ParameterServer& server);
  // What the cache of the model's table on the device has counted.
  static nlohmann::json CountsOf(const ParameterServer& server, const Placed& placed);
};

}  // namespace hps::testing

#endif  // HPS_TESTS_DEVICE_SERVER_SUITE_H_
