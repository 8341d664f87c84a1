// What must not be freed while a reader may see it, and what must be.

#include "hps/epoch.h"

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace hps {
namespace {

// Runs steps on a thread of its own, one at a time, so that guards of two threads can be interleaved at will.
class Stepper {
 public:
  Stepper() : thread_([this] { Loop(); }) {}
  ~Stepper() {
    Run([this] { stop_ = true; });
    thread_.join();
  }
  void Run(std::function<void()> step) {
    step_ = std::move(step);
    pending_.store(true, std::memory_order_release);
    pending_.notify_one();
    pending_.wait(true, std::memory_order_acquire);
  }

 private:
  void Loop() {
    while (!stop_) {
      pending_.wait(false, std::memory_order_acquire);
      step_();
      step_ = nullptr;
      pending_.store(false, std::memory_order_release);
      pending_.notify_one();
    }
  }

  std::function<void()> step_;
  std::atomic<bool> pending_{false};
  bool stop_ = false;
  std::thread thread_;
};

bool Safe(uint64_t tag) { return tag < SafeEpoch(); }

TEST(EpochTest, WithoutGuardsEverythingIsSafe) {
  const uint64_t first = RetireEpoch();
  const uint64_t second = RetireEpoch();
  EXPECT_LT(first, second);
  EXPECT_TRUE(Safe(first));
  EXPECT_TRUE(Safe(second));
}

TEST(EpochTest, NoTagOfTheFutureIsSafe) {
  const uint64_t safe = SafeEpoch();
  EXPECT_GE(RetireEpoch(), safe);
}

TEST(EpochTest, AnOlderGuardOfThisThreadProtects) {
  uint64_t tag;
  {
    const EpochGuard guard;
    tag = RetireEpoch();
    EXPECT_FALSE(Safe(tag));
  }
  EXPECT_TRUE(Safe(tag));
}

TEST(EpochTest, AnOlderGuardOfAnotherThreadProtects) {
  Stepper reader;
  std::unique_ptr<EpochGuard> guard;
  reader.Run([&] { guard = std::make_unique<EpochGuard>(); });
  const uint64_t tag = RetireEpoch();
  EXPECT_FALSE(Safe(tag));
  reader.Run([&] { guard.reset(); });
  EXPECT_TRUE(Safe(tag));
}

TEST(EpochTest, AYoungerGuardDoesNotProtect) {
  Stepper reader;
  const uint64_t tag = RetireEpoch();
  std::unique_ptr<EpochGuard> guard;
  reader.Run([&] { guard = std::make_unique<EpochGuard>(); });
  EXPECT_TRUE(Safe(tag));
  reader.Run([&] { guard.reset(); });
}

TEST(EpochTest, TheOldestGuardDecides) {
  Stepper old_reader, young_reader;
  std::unique_ptr<EpochGuard> old_guard, young_guard;
  old_reader.Run([&] { old_guard = std::make_unique<EpochGuard>(); });
  const uint64_t first = RetireEpoch();
  young_reader.Run([&] { young_guard = std::make_unique<EpochGuard>(); });
  const uint64_t second = RetireEpoch();
  EXPECT_FALSE(Safe(first));
  old_reader.Run([&] { old_guard.reset(); });
  EXPECT_TRUE(Safe(first));
  EXPECT_FALSE(Safe(second));
  young_reader.Run([&] { young_guard.reset(); });
  EXPECT_TRUE(Safe(second));
}

TEST(EpochTest, NestedGuardsProtectUntilTheOutermostEnds) {
  auto outer = std::make_unique<EpochGuard>();
  const uint64_t first = RetireEpoch();
  auto inner = std::make_unique<EpochGuard>();
  const uint64_t second = RetireEpoch();
  inner.reset();
  EXPECT_FALSE(Safe(first));
  EXPECT_FALSE(Safe(second));
  outer.reset();
  EXPECT_TRUE(Safe(second));
}

TEST(EpochTest, ThreadsComeAndGo) {
  for (int round = 0; round < 200; ++round) {
    std::thread([] { const EpochGuard guard; }).join();
  }
  EXPECT_TRUE(Safe(RetireEpoch())) << "a finished thread still counts as a reader";
  std::vector<std::unique_ptr<Stepper>> readers;
  std::vector<std::unique_ptr<EpochGuard>> guards(50);
  for (auto& guard : guards) {
    readers.push_back(std::make_unique<Stepper>());
    readers.back()->Run([&guard] { guard = std::make_unique<EpochGuard>(); });
  }
  const uint64_t tag = RetireEpoch();
  for (size_t i = 0; i < guards.size(); ++i) {
    EXPECT_FALSE(Safe(tag)) << "reader " << i << " was overlooked";
    readers[i]->Run([&] { guards[i].reset(); });
    readers[i].reset();
  }
  EXPECT_TRUE(Safe(tag));
}

struct Tracked {
  explicit Tracked(std::atomic<int>* destroyed) : destroyed(destroyed) {}
  ~Tracked() { ++*destroyed; }
  std::atomic<int>* destroyed;
};

TEST(RetireObjectTest, IsDestroyedAtOnceWithoutGuards) {
  std::atomic<int> destroyed{0};
  RetireObject(std::make_shared<Tracked>(&destroyed));
  EXPECT_EQ(destroyed, 1);
}

TEST(RetireObjectTest, IsDestroyedWhenItsLastReaderEnds) {
  std::atomic<int> destroyed{0};
  Stepper reader;
  std::unique_ptr<EpochGuard> guard;
  reader.Run([&] { guard = std::make_unique<EpochGuard>(); });
  RetireObject(std::make_shared<Tracked>(&destroyed));
  { const EpochGuard younger; }
  EXPECT_EQ(destroyed, 0);
  reader.Run([&] { guard.reset(); });
  EXPECT_EQ(destroyed, 1);
}

TEST(RetireObjectTest, AnObjectWhoseDestructorUsesEpochsIsNoDeadlock) {
  struct Nested {
    explicit Nested(std::atomic<int>* destroyed) : destroyed(destroyed) {}
    ~Nested() {
      const EpochGuard guard;
      RetireObject(std::make_shared<Tracked>(destroyed));
    }
    std::atomic<int>* destroyed;
  };
  std::atomic<int> destroyed{0};
  RetireObject(std::make_shared<Nested>(&destroyed));
  { const EpochGuard guard; }
  EXPECT_EQ(destroyed, 1);
}

// The use the domain is made for: readers follow a pointer that a writer keeps replacing. Under a sanitizer a node that
// is freed too early, or reused without a happens-before edge, is an error.
TEST(EpochTest, ReadersFollowAPointerThatIsReplaced) {
  struct Node {
    uint64_t value;
    uint64_t copy;
  };
  std::atomic<Node*> current{new Node{0, 0}};
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> reads{0};
  std::vector<std::thread> readers;
  for (int i = 0; i < 3; ++i) {
    readers.emplace_back([&] {
      while (!stop) {
        const EpochGuard guard;
        const Node* node = current.load(std::memory_order_acquire);
        if (node->value != node->copy) stop = true;
        reads.fetch_add(1, std::memory_order_relaxed);
      }
    });
  }
  std::vector<std::pair<uint64_t, Node*>> retired;
  std::vector<Node*> free_nodes;
  for (uint64_t value = 1; (value < 20'000 || reads < 10'000) && !stop; ++value) {
    Node* node = free_nodes.empty() ? new Node : free_nodes.back();
    if (!free_nodes.empty()) free_nodes.pop_back();
    node->value = value;
    node->copy = value;
    Node* old = current.exchange(node, std::memory_order_acq_rel);
    retired.emplace_back(RetireEpoch(), old);
    const uint64_t safe = SafeEpoch();
    std::erase_if(retired, [&](const auto& entry) {
      if (entry.first >= safe) return false;
      free_nodes.push_back(entry.second);
      return true;
    });
  }
  EXPECT_FALSE(stop) << "a reader saw a node that was being rewritten";
  stop = true;
  for (std::thread& reader : readers) reader.join();
  for (const auto& [tag, node] : retired) delete node;
  for (Node* node : free_nodes) delete node;
  delete current.load();
}

}  // namespace
}  // namespace hps
