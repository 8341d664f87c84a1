// The process's servers: sharing, the default server, handles, shutdown, and the two ends that a process can come to
// with servers open: fork and exit. Processes that exit are this program again, with a role.

#include "hps/server_registry.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "cc/tests/core_fixture.h"
#include "cc/tests/rocksdb_races.h"

namespace hps::testing {
namespace {

constexpr uint32_t kWidth = 4;
const std::vector<Key> kKeys = KeyRange(0, 200);

void WriteConfig(const fs::path& path, const std::string& model, const fs::path& table, const fs::path& database,
                 double default_value = kDefault) {
  std::ofstream(path) << "{\"supportlonglong\": true, \"models\": [{\"model\": \"" << model
                      << "\", \"sparse_files\": [\"" << table.string()
                      << "\"], \"embedding_table_names\": [\"t\"], \"embedding_vecsize_per_table\": [" << kWidth
                      << "], \"maxnum_catfeature_query_per_table_per_sample\": [1], "
                      << "\"default_value_for_each_table\": [" << default_value
                      << "], \"gpucache\": false, \"deployed_device_list\": [], \"max_batch_size\": 64}], "
                      << "\"volatile_db\": {\"type\": \"hash_map\"}"
                      << (database.empty() ? std::string()
                                           : ", \"persistent_db\": {\"type\": \"rocks_db\", \"path\": \"" +
                                                 database.string() + "\"}")
                      << "}";
}

class ServerRegistryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    WriteTable(folder_ / "a", kKeys, kWidth, 1);
    WriteTable(folder_ / "b", kKeys, kWidth, 2);
    WriteConfig(first_, "m", folder_ / "a", "");
    WriteConfig(second_, "m", folder_ / "b", "");
  }
  void TearDown() override { ASSERT_OK(ShutdownServers()); }
  ServerConfig Load(const std::string& path) { return Value(LoadConfig(path)); }

  TempFolder folder_;
  const std::string first_ = folder_ / "first.json";
  const std::string second_ = folder_ / "second.json";
};

TEST_F(ServerRegistryTest, EqualConfigurationsShareAServerWhileItIsUsed) {
  auto a = Value(OpenSharedServer(Load(first_)));
  EXPECT_EQ(Value(OpenSharedServer(Load(first_))), a);
  auto b = Value(OpenSharedServer(Load(second_)));
  EXPECT_NE(a, b);
  ExpectRows(Lookup(*a, "m", 0, kWidth, kKeys), kKeys, 1);
  ExpectRows(Lookup(*b, "m", 0, kWidth, kKeys), kKeys, 2);
  EXPECT_EQ(OpenServers().size(), 2u);
  const std::weak_ptr<ParameterServer> seen = a;
  a.reset();
  EXPECT_TRUE(seen.expired());
  EXPECT_EQ(OpenServers().size(), 1u);
}

TEST_F(ServerRegistryTest, AClosedServerIsNotShared) {
  auto a = Value(OpenSharedServer(Load(first_)));
  ASSERT_OK(a->Close());
  auto again = Value(OpenSharedServer(Load(first_)));
  EXPECT_NE(a, again);
  ExpectRows(Lookup(*again, "m", 0, kWidth, kKeys), kKeys, 1);
}

TEST_F(ServerRegistryTest, ThreadsThatOpenTheSameConfigurationGetOneServer) {
  std::vector<std::shared_ptr<ParameterServer>> servers(8);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < servers.size(); ++i) {
    threads.emplace_back([&, i] { servers[i] = Value(OpenSharedServer(Load(i % 2 ? first_ : second_))); });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 2; i < servers.size(); ++i) EXPECT_EQ(servers[i], servers[i % 2]);
  EXPECT_NE(servers[0], servers[1]);
}

TEST_F(ServerRegistryTest, AServerThatDoesNotOpenIsAnErrorEachTime) {
  fs::remove_all(folder_ / "a");
  for (int i = 0; i < 2; ++i) EXPECT_FALSE(InitDefaultServer(first_).ok());
  ExpectError(DefaultServer().status(), StatusCode::kFailedPrecondition, {"hps.Init"});
  WriteTable(folder_ / "a", kKeys, kWidth, 1);
  ASSERT_OK(InitDefaultServer(first_));
}

TEST_F(ServerRegistryTest, TheDefaultServerIsSetOnce) {
  ExpectError(DefaultServer().status(), StatusCode::kFailedPrecondition, {"hps.Init", "ps_config_file"});
  ExpectError(ServerOfHandle(kDefaultHandle).status(), StatusCode::kFailedPrecondition, {"hps.Init"});
  ASSERT_OK(InitDefaultServer(first_));
  const auto server = Value(DefaultServer());
  ASSERT_OK(InitDefaultServer(first_));
  EXPECT_EQ(Value(DefaultServer()), server);
  EXPECT_EQ(Value(ServerOfHandle(kDefaultHandle)), server);
  ExpectError(InitDefaultServer(second_), StatusCode::kFailedPrecondition, {first_, second_, "hps.shutdown()"});
  EXPECT_EQ(Value(DefaultServer()), server);
  // The same file with other content is another configuration.
  WriteConfig(first_, "m", folder_ / "a", "", 5.0);
  ExpectError(InitDefaultServer(first_), StatusCode::kFailedPrecondition, {first_});
  ASSERT_OK(ShutdownServers());
  EXPECT_TRUE(server->closed());
  ASSERT_OK(InitDefaultServer(second_));
  ExpectRows(Lookup(*Value(DefaultServer()), "m", 0, kWidth, kKeys), kKeys, 2);
}

TEST_F(ServerRegistryTest, HandlesOpenTheirServerAndLetItGo) {
  ExpectError(ServerOfHandle("h").status(), StatusCode::kFailedPrecondition, {"'h'", "HPS_INIT"});
  ASSERT_OK(BindHandle("h", first_));
  ASSERT_OK(BindHandle("h", first_));
  ExpectError(BindHandle("h", second_), StatusCode::kFailedPrecondition, {"'h'", first_, second_});
  EXPECT_TRUE(OpenServers().empty());  // bound is not opened
  ASSERT_OK(OpenHandle("h"));
  const std::weak_ptr<ParameterServer> server = Value(ServerOfHandle("h"));
  EXPECT_FALSE(server.expired());
  ASSERT_OK(BindHandle("h2", first_));
  EXPECT_EQ(Value(ServerOfHandle("h2")), server.lock());  // opened by its first lookup, and shared
  ReleaseHandle("h");
  EXPECT_FALSE(server.expired());
  ReleaseHandle("h2");
  ReleaseHandle("h2");
  EXPECT_TRUE(server.expired());
  ExpectError(ServerOfHandle("h").status(), StatusCode::kFailedPrecondition, {"'h'"});
}

TEST_F(ServerRegistryTest, HandlesOpenAgainAfterAShutdown) {
  ASSERT_OK(BindHandle("h", first_));
  const auto server = Value(ServerOfHandle("h"));
  ASSERT_OK(ShutdownServers());
  EXPECT_TRUE(server->closed());
  EXPECT_TRUE(OpenServers().empty());
  const auto again = Value(ServerOfHandle("h"));
  EXPECT_NE(again, server);
  ExpectRows(Lookup(*again, "m", 0, kWidth, kKeys), kKeys, 1);
  ReleaseHandle("h");
}

TEST_F(ServerRegistryTest, TheDefaultServerAndAHandleOfTheSameConfigurationAreOne) {
  ASSERT_OK(InitDefaultServer(first_));
  ASSERT_OK(BindHandle("h", first_));
  EXPECT_EQ(Value(ServerOfHandle("h")), Value(DefaultServer()));
  EXPECT_EQ(OpenServers().size(), 1u);
  ReleaseHandle("h");
  EXPECT_FALSE(Value(DefaultServer())->closed());
}

TEST_F(ServerRegistryTest, TwoServersOverOneDatabase) {
  WriteConfig(first_, "m", folder_ / "a", folder_ / "database");
  WriteConfig(second_, "n", folder_ / "b", folder_ / "database");
  auto a = Value(OpenSharedServer(Load(first_)));
  auto b = Value(OpenSharedServer(Load(second_)));
  ExpectRows(Lookup(*a, "m", 0, kWidth, kKeys), kKeys, 1);
  ExpectRows(Lookup(*b, "n", 0, kWidth, kKeys), kKeys, 2);
  ASSERT_OK(a->Close());
  ExpectRows(Lookup(*b, "n", 0, kWidth, kKeys), kKeys, 2);
  ASSERT_OK(b->Close());
}

TEST_F(ServerRegistryTest, AServerKeepsServingWhenAnotherReplacesItsTablesInTheirDatabase) {
  WriteConfig(first_, "m", folder_ / "a", folder_ / "database");
  WriteConfig(second_, "m", folder_ / "b", folder_ / "database");
  auto a = Value(OpenSharedServer(Load(first_)));
  auto b = Value(OpenSharedServer(Load(second_)));
  ExpectRows(Lookup(*a, "m", 0, kWidth, kKeys), kKeys, 1);
  ExpectRows(Lookup(*b, "m", 0, kWidth, kKeys), kKeys, 2);
}

TEST_F(ServerRegistryTest, CloseAllReachesServersOfOnesOwn) {
  auto own = Value(ParameterServer::Open(Load(first_)));
  ASSERT_OK(InitDefaultServer(second_));
  const auto shared = Value(DefaultServer());
  ASSERT_OK(ParameterServer::CloseAll());
  EXPECT_TRUE(own->closed());
  EXPECT_TRUE(shared->closed());
}

// ---- fork -------------------------------------------------------------------------------------------------------

TEST_F(ServerRegistryTest, AForkedChildIsToldHowToDoBetter) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "threads in a forked child are not for the thread sanitizer";
#endif
  WriteConfig(first_, "m", folder_ / "a", folder_ / "database");
  ASSERT_OK(InitDefaultServer(first_));
  ASSERT_OK(BindHandle("h", first_));
  auto server = Value(ServerOfHandle("h"));
  auto session = std::make_unique<LookupSession>(Value(server->NewSession("m")));
  // Lookups run while the process forks, so that locks are held and threads are busy.
  std::atomic<bool> stop{false};
  // (Not under address sanitizer: its allocator stays locked in the child where another thread was inside it.)
#if defined(__SANITIZE_ADDRESS__)
  stop = true;
#endif
  std::thread busy([&] {
    while (!stop) ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 1);
  });
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(InChild([&] {
                if (!Refused(Lookup(*session, 0, kWidth, {1}).status)) return 1;
                if (!Refused(server->NewSession("m").status())) return 2;
                if (!Refused(server->LoadModel(MakeModel("n", {})))) return 3;
                if (!Refused(server->UnloadModel("m"))) return 4;
                if (!Refused(DefaultServer().status())) return 5;
                if (!Refused(ServerOfHandle("h").status())) return 6;
                if (!OpenServers().empty()) return 7;
                if (server->StatsJson().find("error") == std::string::npos || !server->PrometheusText().empty())
                  return 8;
                if (!server->ModelNames().empty() || !server->Close().ok()) return 9;
                // Databases cannot be opened here any more, servers without can.
                if (!Refused(OpenSharedServer(Value(LoadConfig(first_))).status())) return 10;
                auto own = OpenSharedServer(Value(LoadConfig(second_)));
                if (!own.ok()) return 11;
                if (Lookup(**own, "m", 0, kWidth, kKeys).row(5) != Row(5, 2, kWidth)) return 12;
                if (!ShutdownServers().ok() || !(*own)->closed()) return 13;
                // Letting go of what the parent made must not wait for its threads.
                server.reset();
                session.reset();
                return 0;
              }),
              0);
  }
  stop = true;
  busy.join();
  ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 1);
  ReleaseHandle("h");
}

TEST_F(ServerRegistryTest, AChildMayDropASessionWhoseServerIsGone) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "threads in a forked child are not for the thread sanitizer";
#endif
  auto server = Value(ParameterServer::Open(Load(first_)));
  auto session = std::make_unique<LookupSession>(Value(server->NewSession("m")));
  server.reset();
  EXPECT_EQ(InChild([&] {
              session.reset();
              return 0;
            }),
            0);
}

// ---- exit -------------------------------------------------------------------------------------------------------

// Leaves main with a server open and threads at work in it.
int RunRole(const std::string& role, const fs::path& folder) {
  static std::atomic<int> lookups{0};
  const auto server = Value(ParameterServer::Open((folder / "ps.json").string()));
  // As a host does that never lets go. Volatile, so that the pointer is really kept, where the leak checker sees it.
  static std::shared_ptr<ParameterServer>* volatile held;
  held = new std::shared_ptr<ParameterServer>(server);
  for (int t = 0; t < 3; ++t) {
    std::thread([session = Value(server->NewSession("m")), t] {
      for (;;) {
        if (!Lookup(session, 0, kWidth, KeyRange(t, 5000)).status.ok()) return;
        lookups.fetch_add(1);
      }
    }).detach();
  }
  WaitUntil([&] { return lookups > 10; }, "lookups");
  if (role == "exit_while_loading") {
    static std::atomic<bool> begun{false};
    std::thread([server, folder] {
      begun = true;
      (void)server->LoadModel(MakeModel("large", {MakeTable("t", folder / "large", kWidth)}));
    }).detach();
    std::thread([folder] { (void)ParameterServer::Open((folder / "other.json").string()); }).detach();
    WaitUntil([&] { return begun.load(); }, "the loader");
  }
  return 0;
}

TEST(ExitTest, AProcessEndsWellWithServersOpenAndLookupsRunning) {
  TempFolder folder;
  WriteTable(folder / "a", KeyRange(0, 5000), kWidth, 1);
  WriteTable(folder / "large", KeyRange(0, 300'000), kWidth, 1);
  WriteConfig(folder / "ps.json", "m", folder / "a", folder / "database");
  WriteConfig(folder / "other.json", "m", folder / "large", folder / "other");
  for (int i = 0; i < 3; ++i) {
    for (const char* role : {"exit_while_looking_up", "exit_while_loading"}) {
      ChildProcess child(role, folder / "");
      const int status = child.Wait();
      EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << role << ": wait status " << status;
    }
  }
  // And the database is in order.
  const auto server = Value(ParameterServer::Open((folder / "ps.json").string()));
  ExpectRows(Lookup(*server, "m", 0, kWidth, kKeys), kKeys, 1);
}

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunTests(argc, argv, hps::testing::RunRole); }
