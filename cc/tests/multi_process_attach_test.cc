// Coming and going of processes that share memory: creations that fail, members that are known to be gone, and what
// they held.

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>
#include <map>
#include <random>
#include <thread>

#include "cc/core/shared_tier.h"
#include "cc/storage/shared_inspection.h"
#include "cc/tests/multi_process_fixture.h"

namespace hps::testing {
namespace {

// A limit of this process (setrlimit) while it lives.
class Limit {
 public:
  Limit(__rlimit_resource resource, rlim_t value) : resource_(resource) {
    ::getrlimit(resource, &before_);
    const rlimit limit = {value, before_.rlim_max};
    ::setrlimit(resource, &limit);
  }
  ~Limit() { ::setrlimit(resource_, &before_); }

 private:
  const __rlimit_resource resource_;
  rlimit before_;
};

// Each step of the creation fails once. Sanitizers have more address space than that, and look at memory through files.
TEST_F(MultiProcessTest, ACreationThatFailsLeavesNoFile) {
  if (!kSanitized) {
    const int next_file = ::open("/dev/null", O_RDONLY);
    ::close(next_file);
    const Limit one_more(RLIMIT_NOFILE, static_cast<rlim_t>(next_file) + 1);
    ExpectError(OpenMultiProcessStore(Options(name)).status(), StatusCode::kResourceExhausted,
                {"cannot be opened again", "RLIMIT_NOFILE"});
  }
  EXPECT_FALSE(Exists(name));
  const auto before = ::signal(SIGXFSZ, SIG_IGN);
  {
    const Limit small(RLIMIT_FSIZE, 1 << 20);
    ExpectError(OpenMultiProcessStore(Options(name)).status(), StatusCode::kResourceExhausted,
                {"lower shared_memory_size"});
  }
  EXPECT_FALSE(Exists(name));
  if (!kSanitized) {
    const Limit narrow(RLIMIT_AS, rlim_t{1} << 40);
    MultiProcessOptions options = Options(name);
    options.bytes = uint64_t{1} << 41;
    ExpectError(OpenMultiProcessStore(options).status(), StatusCode::kResourceExhausted, {"no address space"});
  }
  EXPECT_FALSE(Exists(name));
  // What somebody uses stays, with its rows.
  const auto store = Open(name);
  ASSERT_OK(Put(*Create(*store), Keys(0, 10, false), 1));
  if (!kSanitized) {
    const int next_file = ::open("/dev/null", O_RDONLY);
    ::close(next_file);
    const Limit one_more(RLIMIT_NOFILE, static_cast<rlim_t>(next_file) + 1);
    ExpectError(OpenMultiProcessStore(Options(name)).status(), StatusCode::kResourceExhausted,
                {"cannot be opened again", "RLIMIT_NOFILE"});
  }
  EXPECT_TRUE(Exists(name));
  ExpectVersion(*OpenTable(*Open(name)), Keys(0, 10, false), 1);
  ::signal(SIGXFSZ, before);
}

TEST_F(MultiProcessTest, MembersThatAreGoneAreKnownByName) {
  const auto store = Open(name);
  auto other = Open(name);
  const std::string other_name = other->MemberName();
  EXPECT_NE(other_name, store->MemberName());
  for (const auto& member : {store->MemberName(), other_name}) EXPECT_FALSE(store->MemberIsGone(member)) << member;
  other.reset();
  EXPECT_TRUE(store->MemberIsGone(other_name));
  other = Open(name);  // has the same number
  EXPECT_TRUE(store->MemberIsGone(other_name));
  EXPECT_FALSE(store->MemberIsGone(other->MemberName()));
  for (const char* text : {"", "0", "0.", ".1", "0.0", "x.1", "0.1x", "999.1", "-1.1", "0.99999999999"}) {
    EXPECT_FALSE(store->MemberIsGone(text)) << text;
  }
}

// tests/test_multi_process.py looks at the report; this is for the sanitizers.
TEST_F(MultiProcessTest, AnInspectionTrustsNothing) {
  const fs::path path = "/dev/shm/" + name;
  EXPECT_EQ(InspectSharedMemory(path).status().code(), StatusCode::kNotFound);
  std::vector<char> whole(1 << 20);
  {
    const auto store = Open(name);
    const auto table = Create(*store, 100);
    ASSERT_OK(Put(*table, Keys(0, 100, true), 1));
    ASSERT_OK(store->WriteRecord("r", "value"));
    const SharedMemoryFound found = Value(InspectSharedMemory(path));
    EXPECT_EQ(found.damage, "");
    EXPECT_EQ(found.processes, (std::vector<uint32_t>{static_cast<uint32_t>(::getpid())}));
    ASSERT_EQ(found.tables.size(), 1u);
    EXPECT_EQ(found.tables[0].name, kTableName);
    EXPECT_EQ(found.tables[0].rows, 100u);
    EXPECT_EQ(found.tables[0].row_bytes, kRowBytes);
    EXPECT_EQ(found.records, (std::vector<std::pair<std::string, std::string>>{{"r", "value"}}));
    ASSERT_OK(store->DropTable(kTableName));
    EXPECT_TRUE(Value(InspectSharedMemory(path)).tables.empty());
    const auto kept = Create(*store, 100);
    ASSERT_OK(Put(*kept, Keys(0, 100, true), 1));
    std::ifstream(path, std::ios::binary).read(whole.data(), static_cast<std::streamsize>(whole.size()));
  }
  EXPECT_FALSE(Exists(name));
  std::mt19937_64 random(7);
  for (int round = 0; round < 500; ++round) {
    std::vector<char> garbled = whole;
    for (uint64_t n = random() % 40; n > 0; --n) garbled[64 + random() % (64 << 10)] = static_cast<char>(random());
    const uint64_t value = random() % 4 == 0 ? random() : random() % (2 << 20) / 8 * 8;
    std::memcpy(garbled.data() + 56 + random() % 512 * 8, &value, sizeof(value));
    std::ofstream(path, std::ios::binary).write(garbled.data(), static_cast<std::streamsize>(garbled.size()));
    fs::resize_file(path, 16 << 20);
    EXPECT_TRUE(InspectSharedMemory(path).ok());
  }
}

TEST_F(MultiProcessTest, ReadinessRemarksThatTheSharedMemoryIsGone) {
  WriteTable(folder / "t", KeyRange(0, 100), 4, 1);
  ServerConfig config = MakeServer(Tiers::kVolatile, "", {MakeModel("m", {MakeTable("t", folder / "t", 4)})});
  config.volatile_db.type = VolatileType::kMultiProcessHashMap;
  config.volatile_db.shared_memory_name = name;
  config.volatile_db.shared_memory_bytes = 16 << 20;
  const auto server = Value(ParameterServer::Open(config, {.show_progress = false}));
  EXPECT_EQ(server->CheckReadiness().reason, "ready");
  const auto expect_remark = [&] {
    const Readiness readiness = server->CheckReadiness();
    EXPECT_TRUE(readiness.ready) << readiness.reason;  // lookups are answered
    for (const std::string& part : {std::string("the volatile tier"), "/dev/shm/" + name, std::string("restart")}) {
      EXPECT_NE(readiness.reason.find(part), std::string::npos) << readiness.reason;
    }
  };
  fs::remove("/dev/shm/" + name);
  expect_remark();
  const auto other = Value(ParameterServer::Open(config, {.show_progress = false}));  // makes memory of its own
  expect_remark();
  EXPECT_EQ(other->CheckReadiness().reason, "ready");
  ExpectRows(Lookup(*server, "m", 0, 4, KeyRange(0, 100)), KeyRange(0, 100), 1);
}

const TableSpec kLoaded = {.row_bytes = kRowBytes, .expected_rows = 120'000};  // more than half of the memory
const std::map<std::string, SharedTier::Wanted> kWanted = {{"t", {"a folder", {.row_bytes = kRowBytes}}}};

// Loads half of a table that takes most of the memory, until it is killed.
int RunLoader(const fs::path& folder) {
  const auto store = Open(folder.filename().string());
  SharedTier tier(*store, "m", {});
  EXPECT_TRUE(tier.Prepare(kWanted, {}).ok());
  bool fill = false;
  const auto table = Value(tier.Open("t", kLoaded, "a folder", /*load=*/true, &fill));
  EXPECT_TRUE(Put(*table, Keys(0, kLoaded.expected_rows / 2, false), 1).ok());
  std::puts("loading");
  std::fflush(stdout);
  while (true) ::pause();
}

TEST_F(MultiProcessTest, TheLoadOfAProcessThatDiedIsTakenOverAtOnce) {
  const auto store = Open(name);
  for (const bool replacement : {false, true}) {
    if (replacement) {  // beside a version that must stay
      ASSERT_OK(Put(*Create(*store), Keys(0, 10, false), 1));
      ModelRecord record;
      record.tables["t"] = {0, "another folder", 10};
      ASSERT_OK(WriteModelRecord(*store, "m", record));
    }
    ChildProcess loader("loader", folder / "");
    loader.WaitForLine("loading");
    const std::string claim = Value(store->ReadRecord("hps.load.m")).value_or("");
    const size_t slash = claim.find('/');
    ASSERT_NE(slash, std::string::npos) << claim;
    EXPECT_FALSE(store->MemberIsGone(claim.substr(slash + 1, claim.find(' ') - slash - 1)));
    std::atomic<bool> done{false};
    std::thread waiting([&] {
      SharedTier tier(*store, "m", {.stale_after = std::chrono::hours(1)});
      EXPECT_TRUE(tier.Prepare(kWanted, {}).ok());
      bool fill = false;  // there is room for one only
      const auto table = tier.Open("t", kLoaded, "a folder", /*load=*/true, &fill);
      EXPECT_TRUE(table.ok()) << table.status().ToString();
      EXPECT_TRUE(fill);
      tier.Undo();
      done = true;
    });
    loader.Kill();
    [&] { WaitUntil([&] { return done.load(); }, "the claim of a process that has died"); }();
    if (!done) (void)store->EraseRecord("hps.load.m");
    waiting.join();
  }
  ExpectVersion(*OpenTable(*store), Keys(0, 10, false), 1);
  EXPECT_EQ(Value(store->ListTables()), std::vector<std::string>{kTableName});
  ASSERT_OK(CheckMultiProcessStore(*store));
}

int RunRole(const std::string& role, const fs::path& given) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  return role == "loader" ? RunLoader(given.parent_path()) : 1;
}

}  // namespace
}  // namespace hps::testing

int main(int argc, char** argv) { return hps::testing::RunTests(argc, argv, hps::testing::RunRole); }
