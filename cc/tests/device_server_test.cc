// Servers with caches on devices: the suite over the processor in the place of two devices, and what only it can do:
// standing still, failing, lending a framework's memory.

#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>

#include "cc/cache/host_device.h"
#include "cc/tests/device_server_suite.h"

namespace hps::testing {
namespace {

ServerFixture HostDevices() {
  ServerFixture fixture;
  fixture.name = "Host";
  fixture.open = [](int ordinal) { return std::make_shared<HostDevice>(HostDeviceOptions{.ordinal = ordinal}); };
  fixture.begin_capture = [](cuda::Device& device, cudaStream_t stream) {
    return dynamic_cast<HostDevice&>(device).BeginCapture(stream);
  };
  fixture.end_capture = [](cuda::Device& device, cudaStream_t stream) -> ServerFixture::Graph {
    auto& host = dynamic_cast<HostDevice&>(device);
    HostGraph graph;
    if (host.EndCapture(stream, &graph) != 0) return nullptr;
    return [&host, graph](cudaStream_t on) { return host.Replay(graph, on); };
  };
  return fixture;
}

INSTANTIATE_TEST_SUITE_P(All, DeviceServerSuite, ::testing::Values(HostDevices()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(All, DeviceRowsSuite, ::testing::Values(HostDevices()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(All, SharedTablesSuite, ::testing::Values(HostDevices()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(All, ManyModelsSuite, ::testing::Values(HostDevices()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(All, SharingScenarios, ::testing::Values(HostDevices()),
                         [](const auto& info) { return info.param.name; });

class DeviceServerTest : public ::testing::Test, public DeviceServers {
 protected:
  DeviceServerTest() : DeviceServers(HostDevices()) {}
  HostDevice& Host(size_t i) { return dynamic_cast<HostDevice&>(devices_[i]->inner()); }
};

TEST_F(DeviceServerTest, AFrameworkSaysWhichDevicesAreItsOwnAndLendsTheirMemory) {
  constexpr size_t kLent = size_t{256} << 20;
  const auto allocator = std::make_shared<HostAllocator>(kLent, /*tells=*/true);
  ServerOptions options = Options();
  options.devices = std::make_shared<DeviceSource>(OnlyDevices(*Source(), {{0, allocator}}));
  ExpectError(ParameterServer::Open(Config({Model("m", 1, {0, 1})}), options).status(), StatusCode::kInvalidArgument,
              {"model 'm'", "GPU 1", "deployed_device_list", "only 0"});
  EXPECT_EQ(allocator->left(), kLent);
  auto server = Value(ParameterServer::Open(Config({Model("m", 1, {0})}), options));
  EXPECT_LT(allocator->left(), kLent);
  EXPECT_EQ(devices_[0]->allocated_bytes(), 0u);
  EXPECT_TRUE(Look(*server, "m", 0, kKeys).AllOf(1));
  server.reset();
  EXPECT_EQ(allocator->left(), kLent);

  // What the allocator can lend is what counts, not what the device has.
  options.devices =
      std::make_shared<DeviceSource>(OnlyDevices(*Source(), {{0, std::make_shared<HostAllocator>(1 << 20, true)}}));
  ExpectError(ParameterServer::Open(Config({Model("m", 1, {0})}), options).status(), StatusCode::kResourceExhausted,
              {"device 0", "model 'm'", "1048576"});
  options.devices = std::make_shared<DeviceSource>(OnlyDevices(*Source(), {}));
  server = Value(ParameterServer::Open(Config({Model("m", 1, {0})}), options));
  EXPECT_FALSE(Value(Value(server->NewSession("m")).IsServedOnDevice(0)));
}

TEST_F(DeviceServerTest, DeadlineAndCancellationEndALookupThatWaits) {
  auto server = Open({Model("m", 1, {0})});
  const LookupSession session = Value(server->NewSession("m"));
  const DeviceArray<Key> keys(*devices_[0], kSome);
  const DeviceArray<float> rows(*devices_[0], kSome.size() * kWidth);
  const DeviceLookupPart part{.width = kWidth, .keys = keys.get(), .count = 50, .rows = rows.get()};
  const auto look = [&](const LookupOptions& options) {
    return session.LookupOnDevice(0, std::span(&part, 1), nullptr, options);
  };
  Host(0).Hold(true);
  ExpectError(look({.deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(20)}),
              StatusCode::kDeadlineExceeded, {"model 'm'"});
  std::atomic<bool> cancelled{false};
  std::thread cancel([&] { cancelled = true; });
  ExpectError(look({.cancelled = &cancelled}), StatusCode::kCancelled);
  cancel.join();
  Host(0).Hold(false);
  ASSERT_OK(look({}));
  // One that waits for a tier.
  faults_->Hang();
  ASSERT_OK(server->EraseRows("m", 0, {}));
  const DeviceAnswer hanging = Look(session, 0, KeyRange(500, 10), 0,
                                    {.deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(20)});
  EXPECT_EQ(hanging.status.code(), StatusCode::kDeadlineExceeded) << hanging.status.ToString();
  faults_->Heal();
  EXPECT_TRUE(Look(session, 0, KeyRange(500, 10)).AllOf(1));
}

TEST_F(DeviceServerTest, AnUpdateIsThereWhenItsCallHasReturned) {
  auto server = Open({Model("m", 1, {0, 1})});
  for (int device : {0, 1}) ASSERT_TRUE(Look(*server, "m", device, kSome).AllOf(1));
  Host(1).Hold(true);
  std::atomic<bool> returned{false};
  std::thread update([&] {
    EXPECT_EQ(Update(*server, "m", kSome, 2).code(), StatusCode::kOk);
    returned = true;
  });
  WaitUntil([&] { return Look(*server, "m", 0, kSome).AllOf(2); }, "the update on the other device");
  // Time enough for a call that does not wait; one that does has not returned.
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
  while (!returned && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  EXPECT_FALSE(returned);
  Host(1).Hold(false);
  update.join();
  EXPECT_TRUE(Look(*server, "m", 1, kSome).AllOf(2));
}

TEST_F(DeviceServerTest, AnUpdateIsNotLostWhileANewVersionIsBuilt) {
  ModelConfig model = Model("m", 1, {0});
  model.init_ec = true;
  model.gpucacheper = 1.0;
  auto server = Open({model}, Tiers::kBoth);
  const uint64_t bytes = Bytes(0);
  Host(0).Hold(true);
  std::thread replace([&] { EXPECT_EQ(server->ReplaceModel(model).code(), StatusCode::kOk); });
  WaitUntil([&] { return Bytes(0) > bytes + 1000 * kWidth * 4; }, "the new caches");
  std::thread update([&] { EXPECT_EQ(Update(*server, "m", {5, 5000}, 2).code(), StatusCode::kOk); });
  WaitUntil([&] { return VersionOf(5, Lookup(*server, "m", 0, kWidth, {5}).row(0).data()) == 2; }, "the update");
  Host(0).Hold(false);
  replace.join();
  update.join();
  EXPECT_EQ(Json::parse(server->StatsJson())["models"][0]["version"], 2);
  ExpectRows(Lookup(*server, "m", 0, kWidth, {5, 5000}), {5, 5000}, 2);
  EXPECT_EQ(Look(*server, "m", 0, {4, 5, 5000}).versions, (std::vector<int>{1, 2, 2}));
}

TEST_F(DeviceServerTest, TheLastLookupsOfAVersionThatGoesAreCounted) {
  auto server = Open({Model("m", 1, {0})});
  const auto text_has = [&](const std::string& line) {
    return server->PrometheusText().find(line + "\n") != std::string::npos;
  };
  const std::string labels = "{model=\"m\",table=\"t0\",device=\"0\"} ";
  const LookupSession session = Value(server->NewSession("m"));
  const DeviceArray<Key> keys(*devices_[0], kSome);
  const DeviceArray<float> rows(*devices_[0], kSome.size() * kWidth);
  const DeviceLookupPart part{.width = kWidth, .keys = keys.get(), .count = 50, .rows = rows.get()};
  const uint64_t launches = Host(0).launches(HostDevice::kQuery);
  Host(0).Hold(true);
  std::thread lookup([&] { EXPECT_TRUE(session.LookupOnDevice(0, std::span(&part, 1), nullptr).ok()); });
  WaitUntil([&] { return Host(0).launches(HostDevice::kQuery) > launches; }, "the query");
  std::thread unload([&] { EXPECT_TRUE(server->UnloadModel("m").ok()); });
  WaitUntil([&] { return text_has("hps_cache_memory_bytes" + labels + "0"); }, "the unloading");
  EXPECT_TRUE(text_has("hps_cache_keys_asked_total" + labels + "0"));
  Host(0).Hold(false);
  lookup.join();
  unload.join();
  EXPECT_TRUE(text_has("hps_cache_keys_asked_total" + labels + "50"));
  EXPECT_TRUE(text_has("hps_cache_rows_missed_total" + labels + "50"));
}

TEST_F(DeviceServerTest, ALostDeviceLeavesTheHostAndOtherDevicesServing) {
  auto server = Open({Model("m", 1, {0, 1}), Model("n", 1, {1})});
  for (int device : {0, 1}) ASSERT_TRUE(Look(*server, "m", device, kSome).AllOf(1));
  EXPECT_TRUE(server->CheckReadiness().ready);
  const LookupSession session = Value(server->NewSession("m"));
  const DeviceArray<Key> keys(*devices_[1], kSome);
  const DeviceArray<float> rows(*devices_[1], kSome.size() * kWidth);
  const DeviceLookupPart part{.width = kWidth, .keys = keys.get(), .count = 50, .rows = rows.get()};
  Host(1).Lose(cuda::kErrorLaunchFailure);
  for (int turn = 0; turn < 2; ++turn) {
    ExpectError(session.LookupOnDevice(1, std::span(&part, 1), nullptr), StatusCode::kInternal,
                {"model 'm'", "device 1", "failed", "start the process anew"});
    ExpectRows(Lookup(session, 0, kWidth, kKeys), kKeys, 1);
    EXPECT_TRUE(Look(session, 0, kSome).AllOf(1));
  }
  ASSERT_OK(Update(*server, "m", {105}, 2));
  EXPECT_EQ(Look(session, 0, {104, 105}).versions, (std::vector<int>{1, 2}));
  const Readiness readiness = server->CheckReadiness();
  EXPECT_FALSE(readiness.ready);
  EXPECT_NE(readiness.reason.find("device 1"), std::string::npos);
  EXPECT_NE(server->PrometheusText().find("hps_device_alive_state{device=\"1\"} 0\n"), std::string::npos);
  EXPECT_NE(server->StatsJson().find("device 1 (host processor) failed"), std::string::npos);
  ExpectError(server->RefreshCaches("m"), StatusCode::kInternal, {"device 1"});
  ExpectError(server->LoadModel(Model("new", 1, {1})), StatusCode::kInternal, {"device 1"});
  ASSERT_OK(server->LoadModel(Model("new", 1, {0})));
  ASSERT_OK(server->UnloadModel("n"));
  ASSERT_OK(server->ReplaceModel(Model("m", 3, {0})));
  EXPECT_TRUE(Look(*server, "m", 0, kSome).AllOf(3));
}

}  // namespace
}  // namespace hps::testing
