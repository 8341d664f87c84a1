// Status, log, metrics, the thread pool and the background worker.

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <condition_variable>
#include <fstream>
#include <functional>
#include <mutex>
#include <new>
#include <random>
#include <set>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "cc/base/background_worker.h"
#include "cc/base/queued_keys.h"
#include "cc/base/system_limits.h"
#include "hps/executor.h"
#include "hps/log.h"
#include "hps/metrics.h"
#include "hps/status.h"

namespace hps {
namespace {

constexpr StatusCode kErrors[] = {
    StatusCode::kInvalidArgument,    StatusCode::kNotFound,         StatusCode::kAlreadyExists,
    StatusCode::kFailedPrecondition, StatusCode::kOutOfRange,       StatusCode::kResourceExhausted,
    StatusCode::kUnavailable,        StatusCode::kDeadlineExceeded, StatusCode::kCancelled,
    StatusCode::kDataLoss,           StatusCode::kUnimplemented,    StatusCode::kInternal};

TEST(StatusTest, OkIsOkAndStaysOkUnderContext) {
  EXPECT_TRUE(OkStatus().ok());
  EXPECT_EQ(OkStatus().ToString(), "OK");
  EXPECT_TRUE(OkStatus().WithContext("somewhere").ok());
}

TEST(StatusTest, EveryCodeHasANameOfItsOwn) {
  std::set<std::string_view> names = {StatusCodeName(StatusCode::kOk)};
  for (StatusCode code : kErrors) EXPECT_TRUE(names.insert(StatusCodeName(code)).second);
  EXPECT_FALSE(names.contains("Unknown"));
}

TEST(StatusTest, ContextKeepsTheCode) {
  for (StatusCode code : kErrors) {
    const Status status = Status(code, "what").WithContext("where");
    EXPECT_EQ(status.code(), code);
    EXPECT_EQ(status.ToString(), std::string(StatusCodeName(code)) + ": where: what");
  }
}

TEST(StatusTest, OnlyWhatMayPassByItselfIsRetryable) {
  for (StatusCode code : kErrors) {
    EXPECT_EQ(IsRetryable(code), code == StatusCode::kUnavailable || code == StatusCode::kDeadlineExceeded);
  }
}

TEST(StatusTest, ResultHoldsTheValueOrTheError) {
  const auto half = [](int number) -> Result<std::unique_ptr<int>> {
    if (number % 2 != 0) return InvalidArgument("odd");
    return std::make_unique<int>(number / 2);
  };
  const auto quarter = [&](int number) -> Result<int> {
    HPS_ASSIGN_OR_RETURN(const std::unique_ptr<int> once, half(number));
    HPS_ASSIGN_OR_RETURN(const std::unique_ptr<int> twice, half(*once));
    return *twice;
  };
  EXPECT_EQ(*quarter(12), 3);
  EXPECT_EQ(quarter(6).status().code(), StatusCode::kInvalidArgument);
}

TEST(LogTest, TheSinkGetsLinesUntilItIsReplaced) {
  std::vector<std::string> lines;
  SetLogSink([&](LogLevel level, std::string_view line) {
    lines.push_back((level == LogLevel::kWarning ? "W " : "I ") + std::string(line));
  });
  Log(LogLevel::kInfo, "one");
  Log(LogLevel::kWarning, "two");
  SetLogSink(nullptr);
  EXPECT_EQ(lines, (std::vector<std::string>{"I one", "W two"}));
}

// ---- metrics ----------------------------------------------------------------------------------------------------

TEST(MetricsTest, TheSameNameAndLabelsAreOneCounter) {
  MetricsRegistry registry;
  Counter* a = registry.FindCounter("hps_keys_asked_total", {{"model", "a"}});
  EXPECT_EQ(a, registry.FindCounter("hps_keys_asked_total", {{"model", "a"}}));
  EXPECT_NE(a, registry.FindCounter("hps_keys_asked_total", {{"model", "b"}}));
}

TEST(MetricsTest, ConcurrentAdditionsAreNotLost) {
  MetricsRegistry registry;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 10'000; ++i) {
        registry.FindCounter("count", {})->Add(2);
        registry.FindHistogram("time", {})->Record(static_cast<uint64_t>(i));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(registry.FindCounter("count", {})->value(), 80'000u);
  EXPECT_EQ(registry.FindHistogram("time", {})->count(), 40'000u);
  EXPECT_EQ(registry.FindHistogram("time", {})->sum_nanoseconds(), 4ull * 9999 * 10'000 / 2);
}

TEST(MetricsTest, AnEmptyHistogramHasNoQuantile) {
  EXPECT_EQ(Histogram().Quantile(0.5), 0.0);
  EXPECT_EQ(Histogram().count(), 0u);
}

TEST(MetricsTest, QuantilesAreWithinTheirBucket) {
  constexpr uint64_t kSeed = 20240607;
  std::mt19937_64 random(kSeed);
  Histogram histogram;
  std::vector<double> values;
  for (int i = 0; i < 10'000; ++i) {
    const auto value = static_cast<uint64_t>(std::exp2(std::uniform_real_distribution<>(0, 30)(random)));
    histogram.Record(value);
    values.push_back(static_cast<double>(value));
  }
  std::sort(values.begin(), values.end());
  for (double q : {0.01, 0.1, 0.5, 0.9, 0.99, 0.999}) {
    const double exact = values[static_cast<size_t>(q * static_cast<double>(values.size()))];
    EXPECT_GE(histogram.Quantile(q), exact / 2.01) << "q " << q << ", seed " << kSeed;
    EXPECT_LE(histogram.Quantile(q), exact * 2.01) << "q " << q << ", seed " << kSeed;
  }
}

TEST(MetricsTest, ExtremeDurationsAreCounted) {
  Histogram histogram;
  histogram.Record(0);
  histogram.Record(UINT64_MAX);
  EXPECT_EQ(histogram.count(), 2u);
  EXPECT_EQ(histogram.bucket(0), 1u);
  EXPECT_EQ(histogram.bucket(Histogram::kBuckets - 1), 1u);
}

TEST(MetricsTest, GaugesGoUpAndDown) {
  MetricsRegistry registry;
  Gauge* gauge = registry.FindGauge("hps_tier_reachable_state", {{"tier", "volatile"}});
  EXPECT_EQ(gauge, registry.FindGauge("hps_tier_reachable_state", {{"tier", "volatile"}}));
  gauge->Set(3);
  gauge->Set(-1);
  EXPECT_EQ(registry.PrometheusText(),
            "# HELP hps_tier_reachable_state 1: the tier answers; 0: it is left out until it does.\n"
            "# TYPE hps_tier_reachable_state gauge\nhps_tier_reachable_state{tier=\"volatile\"} -1\n");
}

TEST(MetricsTest, SumsAreOverAllLabels) {
  MetricsRegistry registry;
  EXPECT_EQ(registry.SumOfCounters("rows"), 0u);
  registry.FindCounter("rows", {{"model", "a"}})->Add(2);
  registry.FindCounter("rows", {{"model", "b"}, {"table", "t"}})->Add(3);
  registry.FindCounter("rows_too", {})->Add(100);
  registry.FindCounter("row", {})->Add(100);
  EXPECT_EQ(registry.SumOfCounters("rows"), 5u);
}

TEST(MetricsTest, PrometheusTextIsCumulativeAndComplete) {
  MetricsRegistry registry;
  registry.FindCounter("hps_rows_served_total", {{"model", "m"}, {"tier", "volatile"}})->Add(7);
  registry.FindCounter("hps_rows_served_total", {{"model", "m"}, {"tier", "default"}})->Add(1);
  Histogram* histogram = registry.FindHistogram("hps_lookup_duration_seconds", {{"model", "m"}});
  histogram->Record(3);           // below the first bucket that is shown
  histogram->Record(1500);        // within 2048 ns
  histogram->Record(1ull << 40);  // above the last
  const std::string text = registry.PrometheusText();
  const auto count = [&](const std::string& part) {
    size_t found = 0;
    for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
    return found;
  };
  EXPECT_EQ(count("# TYPE hps_rows_served_total counter\n"), 1u) << text;
  EXPECT_EQ(count("hps_rows_served_total{model=\"m\",tier=\"volatile\"} 7\n"), 1u) << text;
  EXPECT_EQ(count("hps_rows_served_total{model=\"m\",tier=\"default\"} 1\n"), 1u) << text;
  EXPECT_EQ(count("# TYPE hps_lookup_duration_seconds histogram\n"), 1u) << text;
  EXPECT_EQ(count("hps_lookup_duration_seconds_bucket{model=\"m\",le=\"1.024e-06\"} 1\n"), 1u) << text;
  EXPECT_EQ(count("hps_lookup_duration_seconds_bucket{model=\"m\",le=\"2.048e-06\"} 2\n"), 1u) << text;
  EXPECT_EQ(count("hps_lookup_duration_seconds_bucket{model=\"m\",le=\"+Inf\"} 3\n"), 1u) << text;
  EXPECT_EQ(count("hps_lookup_duration_seconds_count{model=\"m\"} 3\n"), 1u) << text;
}

// ---- thread pool ------------------------------------------------------------------------------------------------

TEST(ThreadPoolTest, EveryIndexIsVisitedOnceInRangesOfTheGrain) {
  for (int threads : {1, 2, 5}) {
    auto pool = NewThreadPool(threads);
    EXPECT_EQ(pool->parallelism(), threads);
    for (size_t count : {0, 1, 3, 9, 10, 100, 4097, 100'000}) {
      for (size_t grain : {0, 1, 4, 7, 2048, 1'000'000}) {
        std::vector<std::atomic<int>> visits(count);
        std::mutex mutex;
        std::vector<std::pair<size_t, size_t>> ranges;
        pool->ParallelFor(count, grain, [&](size_t first, size_t last) {
          for (size_t i = first; i < last; ++i) visits[i].fetch_add(1);
          std::lock_guard lock(mutex);
          ranges.emplace_back(first, last);
        });
        for (const auto& visit : visits) ASSERT_EQ(visit.load(), 1) << count << " in grains of " << grain;
        for (const auto& [first, last] : ranges) {
          EXPECT_TRUE(last == count || last - first >= grain) << first << ".." << last << " of " << count;
        }
      }
    }
  }
}

TEST(ThreadPoolTest, BackgroundThreadsLeaveProcessorsAndTheCallerItsOwn) {
  cpu_set_t before;
  ASSERT_EQ(::sched_getaffinity(0, sizeof(before), &before), 0);
  const int nice_before = ::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()));
  auto pool = NewBackgroundPool(2);
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int> helped{0};
  // Each of the two pieces waits for the other, so one of them is the helper's.
  std::atomic<int> begun{0};
  pool->ParallelFor(2, 1, [&](size_t, size_t) {
    ++begun;
    while (begun < 2) std::this_thread::yield();
    cpu_set_t now;
    ASSERT_EQ(::sched_getaffinity(0, sizeof(now), &now), 0);
    const int nice_now = ::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()));
    if (std::this_thread::get_id() == caller) {
      EXPECT_EQ(CPU_COUNT(&now), CPU_COUNT(&before));
      EXPECT_EQ(nice_now, nice_before);
      return;
    }
    ++helped;
    EXPECT_EQ(CPU_COUNT(&now), std::max(1, CPU_COUNT(&before) / 2));
    EXPECT_EQ(nice_now, std::min(19, nice_before + 10));
    EXPECT_EQ(::sched_getscheduler(0), SCHED_BATCH);
  });
  EXPECT_EQ(helped, 1);
}

TEST(ThreadPoolTest, WhatAPieceThrowsReachesTheCallerWhenAllPiecesHaveRun) {
  auto pool = NewThreadPool(3);
  for (size_t thrower : {0, 7, 11}) {
    std::vector<std::atomic<int>> visits(12);
    const auto body = [&](size_t first, size_t last) {
      for (size_t i = first; i < last; ++i) visits[i].fetch_add(1);
      if (first <= thrower && thrower < last) throw std::bad_alloc();
    };
    EXPECT_THROW(pool->ParallelFor(visits.size(), 1, body), std::bad_alloc);
    for (const auto& visit : visits) EXPECT_EQ(visit, 1);
  }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they take address space as they like
// body() in a child process, whose address space is limited to what it has and `bytes`.
bool InLittleAddressSpace(size_t bytes, const std::function<bool()>& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlimit limit = {pages * static_cast<size_t>(::sysconf(_SC_PAGESIZE)) + bytes, RLIM_INFINITY};
    ::_exit(::setrlimit(RLIMIT_AS, &limit) == 0 && body() ? 0 : 1);
  }
  int state = -1;
  return child > 0 && ::waitpid(child, &state, 0) == child && state == 0;
}

TEST(ThreadPoolTest, ThreadsThatTheSystemRefusesAreAnException) {
  EXPECT_TRUE(InLittleAddressSpace(size_t{60} << 20, [] {
    const Status status = WithinLimits("the pool", [] {
      NewThreadPool(1000);
      return OkStatus();
    });
    return status.code() == StatusCode::kResourceExhausted &&
           status.message().starts_with("the pool: the system refuses to start a thread; in force: ") &&
           status.message().find("RLIMIT_AS") != std::string::npos;
  }));
}

TEST(SystemLimitsTest, ThreadsAreCountedBeforeTheyAreNeeded) {
  EXPECT_TRUE(CheckThreads(8, "here").ok());
  EXPECT_TRUE(InLittleAddressSpace(size_t{60} << 20, [] {
    return CheckThreads(0, "here").code() == StatusCode::kResourceExhausted &&  // no room for what they allocate
           CheckThreads(1000, "here").code() == StatusCode::kResourceExhausted;
  }));
}
#endif

TEST(SystemLimitsTest, EachLimitIsNamedWithItsRemedy) {
  EXPECT_NE(LimitAdvice(EMFILE).find("RLIMIT_NOFILE"), std::string::npos);
  EXPECT_NE(LimitAdvice(ENFILE).find("fs.file-max"), std::string::npos);
  EXPECT_NE(LimitAdvice(EFBIG).find("file"), std::string::npos);
  EXPECT_NE(LimitAdvice(ENOMEM).find("raise the limit"), std::string::npos);
  EXPECT_EQ(LimitAdvice(EACCES), "");
  EXPECT_FALSE(LimitReached(EACCES, "x").has_value());
  EXPECT_EQ(LimitReached(EMFILE, "x")->code(), StatusCode::kResourceExhausted);
}

TEST(SystemLimitsTest, ExceptionsBecomeStatuses) {
  const auto thrown = [](const auto& exception) { return WithinLimits("here", [&]() -> Status { throw exception; }); };
  EXPECT_EQ(thrown(std::bad_alloc()).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(thrown(std::system_error(EAGAIN, std::generic_category())).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(thrown(std::system_error(EMFILE, std::generic_category())).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(thrown(std::system_error(EINVAL, std::generic_category())).code(), StatusCode::kInternal);
  EXPECT_EQ(thrown(std::runtime_error("why")).message(), "here: why");
  EXPECT_TRUE(WithinLimits("here", [] { return OkStatus(); }).ok());
}

TEST(ThreadPoolTest, SmallWorkRunsOnTheCallersThread) {
  auto pool = NewThreadPool(4);
  std::thread::id ran_on;
  pool->ParallelFor(100, 100, [&](size_t, size_t) { ran_on = std::this_thread::get_id(); });
  EXPECT_EQ(ran_on, std::this_thread::get_id());
}

TEST(ThreadPoolTest, SeveralThreadsReallyWorkAtOnce) {
  auto pool = NewThreadPool(2);
  std::mutex mutex;
  std::condition_variable arrived;
  int here = 0;
  // Neither piece ends before two threads are inside.
  pool->ParallelFor(2, 1, [&](size_t, size_t) {
    std::unique_lock lock(mutex);
    ++here;
    arrived.notify_all();
    EXPECT_TRUE(arrived.wait_for(lock, std::chrono::minutes(1), [&] { return here == 2; }));
  });
}

TEST(ThreadPoolTest, NestedCallsAreBorne) {
  auto pool = NewThreadPool(3);
  std::atomic<int> total{0};
  pool->ParallelFor(8, 1, [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      pool->ParallelFor(8, 1, [&](size_t a, size_t b) {
        for (size_t j = a; j < b; ++j)
          pool->ParallelFor(8, 1, [&](size_t x, size_t y) { total += static_cast<int>(y - x); });
      });
    }
  });
  EXPECT_EQ(total, 512);
}

TEST(ThreadPoolTest, ABusyPoolDoesNotHoldUpACaller) {
  auto pool = NewThreadPool(2);
  std::mutex mutex;
  std::condition_variable changed;
  int inside = 0;
  bool release = false;
  std::thread other([&] {
    pool->ParallelFor(2, 1, [&](size_t, size_t) {
      std::unique_lock lock(mutex);
      ++inside;
      changed.notify_all();
      changed.wait(lock, [&] { return release; });
    });
  });
  {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return inside == 2; });
  }
  size_t done = 0;  // all threads of the pool are held, so this one does all the work
  for (int i = 0; i < 1000; ++i) pool->ParallelFor(16, 1, [&](size_t first, size_t last) { done += last - first; });
  EXPECT_EQ(done, 16'000u);
  {
    std::lock_guard lock(mutex);
    release = true;
  }
  changed.notify_all();
  other.join();
}

TEST(ThreadPoolTest, ManyCallersShareOnePool) {
  auto pool = NewThreadPool(4);
  std::vector<std::thread> callers;
  std::atomic<size_t> total{0};
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        size_t mine = 0;
        std::mutex mutex;
        pool->ParallelFor(50, 3, [&](size_t first, size_t last) {
          std::lock_guard lock(mutex);
          mine += last - first;
        });
        total += mine;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total, 4u * 500 * 50);
}

TEST(InlineExecutorTest, RunsOnePiece) {
  int calls = 0;
  InlineExecutor().ParallelFor(5, 1, [&](size_t first, size_t last) {
    ++calls;
    EXPECT_EQ(last - first, 5u);
  });
  InlineExecutor().ParallelFor(0, 1, [&](size_t, size_t) { ++calls; });
  EXPECT_EQ(calls, 1);
}

// ---- work that nobody waits for -----------------------------------------------------------------------------------

TEST(BackgroundWorkerTest, TakesWhatFitsAndStopDropsWhatWasOnlyOffered) {
  BackgroundWorker worker(10);
  std::mutex gate;
  std::unique_lock closed(gate);
  std::mutex done_mutex;
  std::vector<std::string> done;
  const auto job = [&](const char* name) {
    return [&, name](bool dropped) {
      std::lock_guard lock(done_mutex);
      done.push_back(std::string(name) + (dropped ? " dropped" : ""));
    };
  };
  std::atomic<bool> begun{false};
  ASSERT_TRUE(worker.Offer(4, [&](bool dropped) {
    begun = true;
    std::lock_guard wait(gate);
    job("first")(dropped);
  }));
  while (!begun) std::this_thread::yield();
  EXPECT_FALSE(worker.Offer(7, job("too much")));  // what runs takes room as well
  EXPECT_TRUE(worker.Offer(6, job("second")));
  EXPECT_TRUE(worker.Post(job("posted")));
  EXPECT_FALSE(worker.Drain(5, std::chrono::steady_clock::time_point::max()));
  EXPECT_FALSE(worker.Drain(10, std::chrono::steady_clock::now()));
  EXPECT_FALSE(worker.stopped());
  std::thread stopping([&] { worker.Stop(); });
  while (!worker.stopped()) std::this_thread::yield();
  EXPECT_FALSE(worker.Offer(1, job("too late")));
  EXPECT_FALSE(worker.Post(job("too late")));
  closed.unlock();
  stopping.join();
  worker.Stop();
  worker.Drain();
  std::sort(done.begin(), done.end());
  EXPECT_EQ(done, (std::vector<std::string>{"first", "posted", "second dropped"}));
}

TEST(QueuedKeysTest, KnowsKeysByTableUntilTheyAreRemoved) {
  QueuedKeys queued;
  const int tables[2] = {};
  std::vector<size_t> fresh;
  const auto add = [&](const int* table, std::vector<Key> keys) {
    fresh.clear();
    return queued.Add(table, keys, [&](size_t i) { fresh.push_back(i); });
  };
  EXPECT_EQ(add(&tables[0], {0, -1, 5, 5}), 1u);
  EXPECT_EQ(fresh, (std::vector<size_t>{0, 1, 2}));
  EXPECT_EQ(add(&tables[0], {7, 5}), 1u);
  EXPECT_EQ(fresh, (std::vector<size_t>{0}));
  EXPECT_EQ(add(&tables[1], {5}), 0u);
  queued.Remove(&tables[0], std::vector<Key>{5});
  EXPECT_EQ(add(&tables[0], {5}), 0u);
  EXPECT_EQ(add(&tables[1], {5}), 1u);
}

}  // namespace
}  // namespace hps
