// The test service itself: what the tests of the Redis store rely on.

#include "cc/tests/redis_service.h"

#include <gtest/gtest.h>
#include <signal.h>

#include <fstream>
#include <thread>

#include "cc/tests/core_fixture.h"
#include "cc/tests/subprocess.h"

namespace hps::testing {
namespace {

std::string Ask(const RedisService& redis, int node, const std::vector<std::string>& words) {
  Result<std::string> reply = redis.Command(node, words);
  return reply.ok() ? reply.value() : reply.status().ToString();
}

TEST(RedisService, SingleServerKeepsWhatItWasToldToKeep) {
  RedisOptions options;
  options.appendonly = true;
  options.directives = {"appendfsync always"};
  auto redis = Value(RedisService::Start(options));
  EXPECT_EQ(redis->size(), 1);
  EXPECT_EQ(Ask(*redis, 0, {"SET", "a", "two words"}), "OK");
  EXPECT_EQ(Ask(*redis, 0, {"GET", "a"}), "two words");
  EXPECT_EQ(Ask(*redis, 0, {"GET", "none"}), "");
  ExpectError(redis->Command(0, {"GET", "a", "b"}).status(), StatusCode::kInternal, {"wrong number of arguments"});

  redis->Kill(0);
  EXPECT_EQ(redis->pid(0), 0);
  ExpectError(redis->Command(0, {"PING"}).status(), StatusCode::kUnavailable, {"Could not connect"});
  ASSERT_OK(redis->Restart(0));
  EXPECT_EQ(Ask(*redis, 0, {"GET", "a"}), "two words");
}

TEST(RedisService, SnapshotIsWrittenOnShutDown) {
  RedisOptions options;
  options.save = "3600 1000000";
  options.maxmemory_bytes = 64 << 20;
  auto redis = Value(RedisService::Start(options));
  EXPECT_EQ(Ask(*redis, 0, {"SET", "a", "1"}), "OK");
  EXPECT_EQ(Ask(*redis, 0, {"CONFIG", "GET", "maxmemory"}), "maxmemory\n67108864");
  ASSERT_OK(redis->ShutDown(0));
  ASSERT_OK(redis->Restart(0));
  EXPECT_EQ(Ask(*redis, 0, {"GET", "a"}), "1");
}

TEST(RedisService, StoppedServerIsSilentUntilItContinues) {
  auto redis = Value(RedisService::Start());
  redis->Stop(0);
  EXPECT_EQ(redis->Command(0, {"PING"}, std::chrono::milliseconds(200)).status().code(), StatusCode::kDeadlineExceeded);
  redis->Continue(0);
  EXPECT_EQ(Ask(*redis, 0, {"PING"}), "PONG");
}

TEST(RedisService, OnlyTlsWithUser) {
  RedisOptions options;
  options.masters = 3;
  options.replicas_per_master = 1;
  options.tls = true;
  options.user = "trainer";
  options.password = "s3cret";
  options.acl_lines = {"user reader on >other ~* +@read"};
  auto redis = Value(RedisService::Start(options));
  EXPECT_EQ(Ask(*redis, 4, {"ACL", "WHOAMI"}), "trainer");
  EXPECT_NE(Ask(*redis, 0, {"ACL", "LIST"}).find("user reader"), std::string::npos);
  const auto foreign = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"-p", std::to_string(redis->port(0))});
    more.push_back("PING");
    return Value(RunProgram({.path = "redis-cli", .arguments = more})).output;
  };
  const std::string cert = redis->tls().client_certificate.string(), key = redis->tls().client_key.string();
  const std::string authority = redis->tls().ca_certificate.string();
  EXPECT_NE(foreign({"--tls", "--cacert", authority, "--cert", cert, "--key", key}).find("NOAUTH"), std::string::npos);
  EXPECT_NE(foreign({"--tls", "--cacert", redis->tls().other_ca_certificate.string(), "--cert", cert, "--key", key})
                .find("certificate verify failed"),
            std::string::npos);
  EXPECT_EQ(foreign({"--tls", "--cacert", authority}).find("PONG"), std::string::npos);
  EXPECT_EQ(foreign({}).find("PONG"), std::string::npos);
}

TEST(RedisService, ClusterFailsOverAndMovesSlots) {
  RedisOptions options;
  options.masters = 3;
  options.replicas_per_master = 1;
  auto redis = Value(RedisService::Start(options));
  ASSERT_EQ(redis->size(), 6);
  EXPECT_EQ(redis->MasterOf(0), 0);
  EXPECT_EQ(redis->MasterOf(16383), 2);

  // "foo" lies in slot 12182 of node 2.
  EXPECT_EQ(Ask(*redis, 2, {"SET", "foo", "bar"}), "OK");
  EXPECT_NE(Ask(*redis, 0, {"GET", "foo"}).find("MOVED 12182 127.0.0.1:" + std::to_string(redis->port(2))),
            std::string::npos);
  ASSERT_OK(redis->MigrateSlots(12180, 12184, 2, 0));
  EXPECT_EQ(redis->MasterOf(12182, 1), 0);
  EXPECT_EQ(Ask(*redis, 0, {"GET", "foo"}), "bar");
  ASSERT_OK(redis->WaitUntilReplicated());
  EXPECT_EQ(Ask(*redis, 3, {"DBSIZE"}), "1");

  redis->Kill(0);
  WaitUntil([&] { return redis->MasterOf(12182, 1) == 3; }, "the replica of node 0 to take over");
  ASSERT_OK(redis->WaitUntilHealthy());
  EXPECT_EQ(Ask(*redis, 3, {"GET", "foo"}), "bar");
  ASSERT_OK(redis->Restart(0));
  ASSERT_OK(redis->WaitUntilHealthy());
  WaitUntil(
      [&] {
        return Ask(*redis, 0, {"INFO", "replication"}).find("role:slave") != std::string::npos;
      },
      "node 0 to come back as a replica");
}

TEST(RedisService, AnnouncedPortsAreToldToClients) {
  const FreePort announced = Value(FreePort::Choose());
  RedisOptions options;
  options.masters = 2;
  options.announced_port = [&](int node, uint16_t port) { return node == 0 ? announced.number() : port; };
  auto redis = Value(RedisService::Start(options));
  EXPECT_EQ(redis->port(0), announced.number());
  EXPECT_NE(Ask(*redis, 1, {"CLUSTER", "SLOTS"}).find(std::to_string(announced.number())), std::string::npos);
  EXPECT_EQ(redis->address_list(), redis->address(0) + "," + redis->address(1));
}

TEST(RedisService, StartingFromAThreadThatEndsIsNoProblem) {
  std::unique_ptr<RedisService> redis;
  std::thread([&] { redis = Value(RedisService::Start()); }).join();
  EXPECT_EQ(Ask(*redis, 0, {"PING"}), "PONG");
}

TEST(RedisService, BadConfigurationIsReportedWithTheLog) {
  RedisOptions options;
  options.directives = {"no-such-directive 1"};
  const auto redis = RedisService::Start(options);
  ASSERT_FALSE(redis.ok());
  EXPECT_NE(redis.status().message().find("no-such-directive"), std::string::npos) << redis.status().ToString();
}

// In a process of its own: starts a server, says its id and waits to be killed.
int StartAndWait(const std::string&, const fs::path&) {
  const auto redis = Value(RedisService::Start());
  std::printf("%d\n", static_cast<int>(redis->pid(0)));
  std::fflush(stdout);
  ::pause();
  return 0;
}

TEST(RedisService, ServersDieWithAProcessThatIsKilled) {
  TempFolder folder;
  ChildProcess child("start", folder.path());
  const pid_t server = std::stoi(child.ReadLine());
  ASSERT_EQ(::kill(server, 0), 0);
  child.Kill();
  // Nobody may have collected it yet: a zombie is dead.
  WaitUntil(
      [&] {
        std::ifstream file("/proc/" + std::to_string(server) + "/stat");
        std::string line;
        return !std::getline(file, line) || line.find(") Z ") != std::string::npos;
      },
      "the end of the server");
}

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunTests(argc, argv, hps::testing::StartAndWait); }
