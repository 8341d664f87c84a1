// BulkRows against a map: order, last row of a key, memory limits that make many runs, ranges.

#include "cc/storage/bulk_rows.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <random>
#include <thread>

#include "cc/tests/row_pattern.h"

namespace hps::testing {
namespace {

namespace fs = std::filesystem;

class BulkRowsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "hps_bulk_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  static void Add(BulkRows* rows, const std::vector<Key>& keys, uint32_t version, size_t stride = 0) {
    const Status status = rows->Add(keys, RowBlock::Of(keys, version, rows->row_bytes(), stride).source());
    ASSERT_TRUE(status.ok()) << status.ToString();
  }
  // Visits all parts on threads of their own; checks order and bytes.
  static std::map<Key, uint32_t> Collect(BulkRows* rows, size_t parts) {
    rows->Sort();
    const auto ranges = rows->Cut(parts);
    EXPECT_TRUE(ranges.ok()) << ranges.status().ToString();
    EXPECT_LE(ranges->size(), parts);
    std::vector<std::map<Key, uint32_t>> found(ranges->size());
    std::vector<std::thread> threads;
    for (size_t part = 0; part < ranges->size(); ++part) {
      threads.emplace_back([&, part] {
        std::optional<uint64_t> previous;
        const Status status = rows->Visit((*ranges)[part], [&](const Key& key, const std::byte* row) {
          const uint64_t order = StoredOrder(key);
          EXPECT_TRUE(!previous || *previous < order);
          EXPECT_TRUE((*ranges)[part].first <= order && order <= (*ranges)[part].last);
          previous = order;
          const auto version = RowVersion(key, {row, rows->row_bytes()});
          EXPECT_TRUE(version.has_value());
          found[part][key] = version.value_or(0);
          return OkStatus();
        });
        EXPECT_TRUE(status.ok()) << status.ToString();
      });
    }
    for (std::thread& thread : threads) thread.join();
    std::map<Key, uint32_t> all;
    size_t total = 0;
    for (const auto& part : found) {
      total += part.size();
      all.insert(part.begin(), part.end());
    }
    EXPECT_EQ(total, all.size()) << "ranges are disjoint";
    return all;
  }

  fs::path folder_;
};

TEST_F(BulkRowsTest, NothingAdded) {
  BulkMemory memory{.limit_bytes = 1 << 20};
  BulkRows rows("t", folder_, 8, &memory, 2);
  EXPECT_TRUE(Collect(&rows, 4).empty());
}

TEST_F(BulkRowsTest, StoredOrderIsTheOrderOfBytes) {
  BulkMemory memory{.limit_bytes = 1 << 20};
  BulkRows rows("t", folder_, 4, &memory, 2);
  Add(&rows, {-1, 256, 1, 0, 255, INT64_MIN, INT64_MAX}, 1);
  rows.Sort();
  std::vector<Key> order;
  const Status status = rows.Visit({0, UINT64_MAX}, [&](const Key& key, const std::byte*) {
    order.push_back(key);
    return OkStatus();
  });
  ASSERT_TRUE(status.ok());
  EXPECT_EQ(order, (std::vector<Key>{0, INT64_MIN, 256, 1, 255, INT64_MAX, -1}));
}

TEST_F(BulkRowsTest, AgreesWithAMapWhateverFitsInMemory) {
  const char* text = std::getenv("HPS_TEST_SEED");
  const uint64_t seed = text != nullptr ? std::strtoull(text, nullptr, 10) : std::random_device{}();
  std::cout << "HPS_TEST_SEED=" << seed << std::endl;
  SCOPED_TRACE("HPS_TEST_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (const size_t row_bytes : {4, 28, 64, 132}) {
    for (const size_t limit : {size_t{64} << 10, size_t{700} << 10, size_t{64} << 20}) {
      for (const int pattern : {0, 1, 2}) {
        BulkMemory memory{.limit_bytes = limit};
        std::map<Key, uint32_t> model;
        {
          BulkRows rows("t", folder_, row_bytes, &memory, 2);
          for (uint32_t version = 1; version <= 8; ++version) {
            std::vector<Key> keys(random() % 4'000);
            for (Key& key : keys) {
              key = pattern == 0   ? static_cast<Key>(random() % 5'000) * 256  // one first byte for all
                    : pattern == 1 ? static_cast<Key>(random())
                                   : static_cast<Key>(random() % 3'000) - 1'500;
              model[key] = version;
            }
            Add(&rows, keys, version, row_bytes + version % 2 * 12);
          }
          if (limit < (1 << 20) && rows.bytes() > 2 * limit) EXPECT_GT(rows.runs(), 0u);
          if (limit > (1 << 20)) EXPECT_EQ(rows.runs(), 0u);
          EXPECT_EQ(Collect(&rows, 1), model);
          EXPECT_EQ(Collect(&rows, 7), model) << "a second visit";
          Add(&rows, {5, 6, 5}, 9);  // after a visit that has failed, say
          model[5] = model[6] = 9;
          EXPECT_EQ(Collect(&rows, 3), model);
          EXPECT_TRUE(fs::is_empty(folder_)) << "runs have no names that a crash could leave";
        }
        EXPECT_EQ(memory.used_bytes, 0u);
      }
    }
  }
}

TEST_F(BulkRowsTest, SeveralShareTheMemory) {
  BulkMemory memory{.limit_bytes = 16 << 20};
  std::vector<std::unique_ptr<BulkRows>> all;
  std::vector<Key> keys(20'000);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<Key>(i);
  for (int i = 0; i < 5; ++i) {
    all.push_back(std::make_unique<BulkRows>("t", folder_, 1024, &memory, 2));
    Add(all.back().get(), keys, 1);
  }
  EXPECT_EQ(all[0]->runs(), 1u);
  EXPECT_GT(all[4]->runs(), all[0]->runs()) << "less was left for it";
  EXPECT_LE(memory.used_bytes, memory.limit_bytes + 5 * BulkMemory::kLeastBytes);
  for (const auto& rows : all) EXPECT_EQ(Collect(rows.get(), 2).size(), keys.size());
}

TEST_F(BulkRowsTest, AFolderThatCannotBeWrittenIsAnErrorAndNoRowIsLost) {
  BulkMemory memory{.limit_bytes = 64 << 10};
  std::ofstream(folder_ / "file") << "text";
  BulkRows rows("table t", folder_ / "file", 64, &memory, 2);
  std::vector<Key> keys(5'000);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<Key>(i);
  const Status status = rows.Add(keys, RowBlock::Of(keys, 1, 64).source());
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.message().find("table t"), std::string::npos) << status.ToString();
  EXPECT_NE(status.message().find(folder_.string()), std::string::npos) << status.ToString();
  fs::remove(folder_ / "file");
  Add(&rows, keys, 2);
  EXPECT_EQ(Collect(&rows, 2).size(), keys.size());
}

}  // namespace
}  // namespace hps::testing
