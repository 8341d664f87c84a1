// A Redis cluster behind a bad network: a proxy in front of each node, readers and writers that never rest, and one
// fault after another. No wrong row, no call far beyond its time, and after healing everything works again without
// reopening. What happened is printed, and printed again at the end as one table.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <functional>
#include <iostream>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include "cc/storage/redis_layout.h"
#include "cc/tests/redis_fixture.h"
#include "cc/tests/tcp_proxy.h"

namespace hps::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

constexpr milliseconds kDeadline(300);  // of each Fetch
constexpr milliseconds kPatience(800);  // of each Upsert: it ends when nothing has moved for so long
constexpr seconds kMargin(20);          // a call may outlast its time so far on a busy machine; a hang lasts for ever
constexpr seconds kRecovery(60);        // likewise for recovery
constexpr size_t kStill = 600;          // keys from 0 on that stay in version 1
constexpr size_t kWritten = 200;        // keys of each writer
constexpr int kReaders = 2;
constexpr int kWriters = 2;

double Milliseconds(steady_clock::duration time) { return std::chrono::duration<double, std::milli>(time).count(); }

// What the threads saw since the last Take.
struct Tally {
  uint64_t reads = 0, writes = 0, rows = 0;
  std::map<std::string, uint64_t> errors;
  steady_clock::duration longest_read{0}, longest_write{0};
};

// Readers and writers of one table. A writer owns its keys and writes them in rising versions.
class Load {
 public:
  explicit Load(Table* table, uint64_t seed) : table_(table) {
    for (int i = 0; i < kReaders; ++i) threads_.emplace_back([this, i, seed] { Read(i, seed + i); });
    for (int i = 0; i < kWriters; ++i) threads_.emplace_back([this, i] { Write(i); });
  }
  ~Load() { Stop(); }
  void Stop() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  // Whether acknowledged versions must be seen by every later read. Not so where bytes of a call that was given up may
  // still be on their way (latency, drip, stall), nor across a fail-over.
  void ExpectNewest(bool on) { expect_newest_ = on; }

  Tally Take() {
    std::lock_guard lock(mutex_);
    return std::exchange(tally_, {});
  }
  // Until each thread has succeeded three more times. Infinite (and a failure) when it never does.
  milliseconds TimeToRecover() {
    const auto start = steady_clock::now();
    std::array<uint64_t, kReaders + kWriters> before;
    for (size_t i = 0; i < before.size(); ++i) before[i] = succeeded_[i];
    for (size_t i = 0; i < before.size();) {
      if (succeeded_[i] >= before[i] + 3) {
        ++i;
      } else if (steady_clock::now() > start + kRecovery || ::testing::Test::HasFailure()) {
        ADD_FAILURE() << "thread " << i << " did not recover";
        break;
      } else {
        std::this_thread::sleep_for(milliseconds(1));
      }
    }
    return std::chrono::duration_cast<milliseconds>(steady_clock::now() - start);
  }
  uint32_t last_version() const { return std::max(attempted_[0].load(), attempted_[1].load()); }

  static std::vector<Key> KeysOf(int writer) {
    return KeyRange(static_cast<Key>(kStill + kWritten * writer), kWritten);
  }

 private:
  void Read(int reader, uint64_t seed) {
    std::mt19937_64 random(seed);
    while (!stop_ && !::testing::Test::HasFailure()) {
      std::vector<Key> keys(1 + random() % 128);
      for (Key& key : keys) key = static_cast<Key>(random() % (kStill + kWriters * kWritten));
      const std::array<uint32_t, kWriters> acknowledged = {acknowledged_[0], acknowledged_[1]};
      const bool expect_newest = expect_newest_;
      const auto start = steady_clock::now();
      const Fetched fetched = Get(*table_, keys, start + kDeadline);
      const auto time = steady_clock::now() - start;
      EXPECT_LT(time, kDeadline + kMargin) << fetched.status.ToString();
      Count(reader, fetched.status, true, keys.size(), time);
      if (!fetched.status.ok()) continue;
      for (size_t i = 0; i < keys.size(); ++i) {
        const auto key = static_cast<size_t>(keys[i]);
        if (key < kStill) {
          EXPECT_EQ(fetched.versions[i], 1u) << "key " << key << " never changes and is never absent";
          continue;
        }
        const size_t writer = (key - kStill) / kWritten;
        EXPECT_GE(fetched.versions[i], expect_newest ? acknowledged[writer] : 1u) << "key " << key;
        EXPECT_LE(fetched.versions[i], attempted_[writer]) << "key " << key;
      }
    }
  }

  void Write(int writer) {
    const std::vector<Key> keys = KeysOf(writer);
    for (uint32_t version = 2; !stop_ && !::testing::Test::HasFailure(); ++version) {
      attempted_[writer] = version;
      const auto start = steady_clock::now();
      const Status status = Put(*table_, keys, version);
      const auto time = steady_clock::now() - start;
      EXPECT_LT(time, kPatience + kMargin) << status.ToString();
      if (status.ok()) acknowledged_[writer] = version;
      Count(kReaders + writer, status, false, keys.size(), time);
    }
  }

  void Count(int thread, const Status& status, bool is_read, size_t rows, steady_clock::duration time) {
    if (status.ok()) ++succeeded_[thread];
    EXPECT_TRUE(status.ok() || IsRetryable(status.code()) || status.code() == StatusCode::kDeadlineExceeded)
        << "no error of a network: " << status.ToString();
    std::lock_guard lock(mutex_);
    ++(is_read ? tally_.reads : tally_.writes);
    auto& longest = is_read ? tally_.longest_read : tally_.longest_write;
    longest = std::max(longest, time);
    if (status.ok()) {
      tally_.rows += rows;
    } else {
      ++tally_.errors[std::string(StatusCodeName(status.code()))];
      if (errors_shown_.insert(std::string(StatusCodeName(status.code())) + status.message().substr(0, 30)).second) {
        std::cout << "    such as " << status.ToString() << std::endl;
      }
    }
  }

  Table* const table_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> expect_newest_{true};
  std::array<std::atomic<uint32_t>, kWriters> attempted_{1, 1}, acknowledged_{1, 1};
  std::array<std::atomic<uint64_t>, kReaders + kWriters> succeeded_{};
  std::mutex mutex_;
  Tally tally_;
  std::set<std::string> errors_shown_;
  std::vector<std::thread> threads_;
};

class RedisNetworkFaults : public ::testing::Test {
 protected:
  void Serve(RedisOptions options) {
    const char* text = std::getenv("HPS_TEST_SEED");
    seed_ = text != nullptr ? std::strtoull(text, nullptr, 10) : std::random_device{}();
    std::cout << "HPS_TEST_SEED=" << seed_ << std::endl;
    options.announced_port = [&](int, uint16_t port) {
      proxies_.push_back(Value(TcpProxy::Start(port, seed_)));
      return proxies_.back()->port();
    };
    redis_ = Value(RedisService::Start(std::move(options)));
    RedisStoreOptions store = OptionsFor(*redis_);
    store.patience = kPatience;
    store_ = Value(OpenRedisStore(store));
    table_ = Value(store_->CreateTable(kTable));
    ASSERT_OK(Put(*table_, KeyRange(0, kStill + kWriters * kWritten), 1));
    load_ = std::make_unique<Load>(table_.get(), seed_);
    (void)load_->TimeToRecover();
    Report("quiet", load_->Take(), milliseconds(0));
  }

  // Applies a fault for a while, heals and waits until everything works again.
  void During(const std::string& name, bool expect_newest, const std::function<void()>& fault,
              const std::function<void()>& again = {}, milliseconds time = milliseconds(450)) {
    if (HasFailure()) return;
    SCOPED_TRACE(name);
    (void)load_->Take();
    load_->ExpectNewest(expect_newest);
    const auto end = steady_clock::now() + time;
    fault();
    while (steady_clock::now() < end) {
      if (again) again();
      std::this_thread::sleep_for(milliseconds(10));
    }
    for (const auto& proxy : proxies_) proxy->Heal();
    const milliseconds recovered = load_->TimeToRecover();
    Report(name, load_->Take(), recovered);
  }

  void Everywhere(const Faults& faults) {
    for (const auto& proxy : proxies_) proxy->Set(faults);
  }

  // No thread is at work any more: everything that is written now must be there.
  void ExpectWhole() {
    load_->Stop();
    const uint32_t version = load_->last_version() + 1;
    std::vector<Key> written = KeyRange(kStill, kWriters * kWritten);
    // Bytes of a call that was given up long ago may arrive once more; then it is written again.
    WaitUntil(
        [&] {
          const Status put = Put(*table_, written, version);
          const Fetched fetched = Get(*table_, written);
          return HasFailure() ||
                 (put.ok() && fetched.status.ok() && fetched.versions == std::vector(written.size(), version));
        },
        "the last version of all rows");
    ExpectAll(*table_, KeyRange(0, kStill), 1);
    EXPECT_EQ(RowsOf(*table_), kStill + kWriters * kWritten);
    std::cout << table_text_;
  }

  void Report(const std::string& name, const Tally& tally, milliseconds recovered) {
    char line[300];
    std::string errors;
    for (const auto& [code, count] : tally.errors) errors += " " + std::to_string(count) + " " + code;
    std::snprintf(line, sizeof(line),
                  "%-34s %6lu reads %6lu writes %8lu rows; longest %6.0f / %6.0f ms; recovered in %5ld ms;%s\n",
                  name.c_str(), tally.reads, tally.writes, tally.rows, Milliseconds(tally.longest_read),
                  Milliseconds(tally.longest_write), static_cast<long>(recovered.count()),
                  errors.empty() ? " no errors" : errors.c_str());
    std::cout << line << std::flush;
    table_text_ += line;
  }

  uint64_t seed_ = 0;
  std::vector<std::unique_ptr<TcpProxy>> proxies_;
  std::unique_ptr<RedisService> redis_;
  std::unique_ptr<TableStore> store_;
  std::shared_ptr<Table> table_;
  std::unique_ptr<Load> load_;
  std::string table_text_;
};

TEST_F(RedisNetworkFaults, EveryFaultOfTheNetworkPasses) {
  Serve({.masters = 3});
  During("latency of 40 ms", true,
         [&] { Everywhere({.requests = {.latency = milliseconds(20)}, .replies = {.latency = milliseconds(20)}}); });
  During("latency beyond the deadline", false, [&] { proxies_[0]->Set({.replies = {.latency = milliseconds(500)}}); });
  During("drip of 3,000 B/s from one node", false, [&] { proxies_[1]->Set({.replies = {.bytes_per_second = 3000}}); });
  During("drip of 3,000 B/s to one node", false, [&] { proxies_[1]->Set({.requests = {.bytes_per_second = 3000}}); });
  During(
      "cut again and again", true, [] {},
      [&] {
        for (const auto& proxy : proxies_) proxy->Cut();
      });
  During(
      "reset again and again", true, [] {},
      [&] {
        for (const auto& proxy : proxies_) proxy->Reset();
      });
  During("replies truncated", true, [&] { Everywhere({.replies = {.cut_within = 3000}}); });
  During("requests truncated", true, [&] { Everywhere({.requests = {.cut_within = 6000}}); });
  During("garbage from one node", true, [&] { proxies_[2]->Set({.replies = {.garbage_within = 3000}}); });
  During("garbage from all nodes", true, [&] { Everywhere({.replies = {.garbage_within = 3000}}); });
  During("one node half-open", true, [&] { proxies_[0]->Set({.half_open = true}); });
  During("all nodes half-open", true, [&] { Everywhere({.half_open = true}); });
  During("one node silent, nothing lost", false, [&] { proxies_[1]->Set({.stall = true}); });
  During("all nodes silent, nothing lost", false, [&] { Everywhere({.stall = true}); });
  During("all nodes refuse", true, [&] {
    Everywhere({.refuse = true});
    for (const auto& proxy : proxies_) proxy->Reset();
  });
  std::mt19937_64 random(seed_);
  During(
      "all of it at random", false, [] {},
      [&] {
        TcpProxy& proxy = *proxies_[random() % proxies_.size()];
        switch (random() % 8) {
          case 0: return proxy.Cut();
          case 1: return proxy.Reset();
          case 2: return proxy.Set({.half_open = true});
          case 3: return proxy.Set({.stall = true});
          case 4: return proxy.Set({.replies = {.garbage_within = 5000}});
          case 5: return proxy.Set({.replies = {.latency = milliseconds(50), .cut_within = 5000}});
          default: return proxy.Heal();
        }
      },
      seconds(2));
  ExpectWhole();
}

// Redis, too, skips the two bytes behind the last word of a command unseen: garbage on the way to a server can become a
// row, and no client can help it. TLS can.
TEST_F(RedisNetworkFaults, TlsKeepsGarbageFromTheServersToo) {
  Serve({.masters = 2, .tls = true});
  During("TLS, garbage to all nodes", true, [&] { Everywhere({.requests = {.garbage_within = 6000}}); });
  During("TLS, garbage from all nodes", true, [&] { Everywhere({.replies = {.garbage_within = 6000}}); });
  During("TLS, cut in the middle", true, [&] { Everywhere({.replies = {.cut_within = 6000}}); });
  During(
      "TLS, reset again and again", true, [] {},
      [&] {
        for (const auto& proxy : proxies_) proxy->Reset();
      });
  During("TLS, all nodes half-open", true, [&] { Everywhere({.half_open = true}); });
  ExpectWhole();
}

TEST_F(RedisNetworkFaults, MasterDiesAndSlotsMoveBehindABadNetwork) {
  Serve({.masters = 3, .replicas_per_master = 1, .cluster_node_timeout_ms = 800});
  // Rows that never change must be with the replicas before a master dies: Redis acknowledges first.
  ASSERT_OK(redis_->WaitUntilReplicated());
  During("a master dies", false, [&] { redis_->Kill(0); });
  ASSERT_OK(redis_->Restart(0));
  ASSERT_OK(redis_->WaitUntilHealthy());
  During("all partitions move, with resets", true, [&] {
    for (uint32_t partition = 0; partition < 8; ++partition) {
      const RedisLayout layout(RedisLayout::Version::kCurrent, kTable.name, 8, 8);
      const int slot = RedisSlot(layout.ValuesKey(partition));
      const int owner = redis_->MasterOf(slot, 1);
      const int to = owner == 1 ? 2 : 1;
      if (partition % 2 == 0) proxies_[static_cast<size_t>(to)]->Reset();
      const Status moved = redis_->MigrateSlots(slot, slot, owner, to);
      EXPECT_TRUE(moved.ok()) << moved.ToString();
    }
  });
  ExpectWhole();
}

}  // namespace
}  // namespace hps::testing
