// Sums against LookupSparse in every form, where keys are missing, deferred or updated meanwhile; refusals.

#include "cc/tests/sparse_device_suite.h"

#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>

namespace hps::testing {
namespace {

constexpr Combiner kCombiners[] = {Combiner::kSum, Combiner::kMean, Combiner::kSqrtn};
// Row_splits, indices of several ranks, keys of either size, an output that is not aligned.
constexpr Form kForms[] = {{0, 8, 0}, {0, 4, 1}, {2, 8, 2}, {1, 4, 0}, {3, 8, 0}};

uint64_t Sum(const LookupReport& report) {
  return report.rows_from_cache + report.rows_from_volatile + report.rows_from_persistent + report.rows_from_default +
         report.rows_deferred + report.rows_repeated + report.rows_unwaited;
}

}  // namespace

TEST_P(SparseDeviceSuite, EqualToTheHostToTheBit) {
  enum Start { kEmpty, kFull, kStaticTable };
  for (const Start start : {kEmpty, kFull, kStaticTable}) {
    ModelConfig model = Model(start == kStaticTable ? CacheType::kStatic : CacheType::kDynamic);
    model.init_ec = start == kFull;
    Open(model);
    std::vector<LookupReport> sums(kWidths.size());
    for (uint32_t table = 0; table < kWidths.size(); ++table) {
      int turn = 0;
      for (const Combiner combiner : kCombiners) {
        for (const bool weighted : {false, true}) {
          for (const Form& form : kForms) {
            SCOPED_TRACE("width " + std::to_string(kWidths[table]) + " combiner " +
                         std::to_string(static_cast<int>(combiner)) + " weighted " + std::to_string(weighted) +
                         " rank " + std::to_string(form.rank));
            const bool all_there = ++turn % 3 != 0;  // else some keys are in no tier
            Bags bags = RandomBags(table, all_there ? kRows : kRows + 200, 7 + static_cast<uint64_t>(turn % 7));
            bags.combiner = combiner;
            bags.weighted = weighted;
            LookupReport report;
            ExpectEqualToTheHost(bags, form, &report);
            if (HasFatalFailure()) return;
            EXPECT_EQ(report.keys, bags.keys.size());
            EXPECT_EQ(Sum(report), report.keys);
            sums[table].keys += report.keys;
            sums[table].rows_from_cache += report.rows_from_cache;
            sums[table].rows_repeated += report.rows_repeated;
            if (start == kStaticTable) EXPECT_EQ(report.rows_unwaited, report.keys);
            if (start == kFull && all_there) EXPECT_EQ(report.rows_from_cache, report.keys);
            if (start != kStaticTable && !all_there) EXPECT_GT(report.rows_from_default, 0u);
            if (start == kEmpty && turn == 1) EXPECT_GT(report.rows_from_volatile, 0u);
          }
        }
      }
    }
    const nlohmann::json stats = nlohmann::json::parse(server_->StatsJson());
    for (uint32_t table = 0; table < kWidths.size(); ++table) {
      const nlohmann::json& counts = stats["models"][0]["devices"][0]["caches"][table];
      const auto count = [&](const char* name) { return counts[name].get<uint64_t>(); };
      EXPECT_EQ(count("keys_asked"), sums[table].keys);
      EXPECT_EQ(count("rows_repeated"), sums[table].rows_repeated);
      EXPECT_EQ(count("rows_served") + count("rows_missed") + count("rows_defaulted") + count("rows_repeated"),
                sums[table].keys);
      if (start == kStaticTable) {
        EXPECT_GT(count("rows_defaulted"), 0u);
        EXPECT_EQ(count("rows_missed"), 0u);
      } else {
        EXPECT_EQ(count("rows_served"), sums[table].rows_from_cache);
        EXPECT_GT(count("rows_missed"), 0u);
      }
    }
    session_.reset();
    ASSERT_OK(server_->Close());
  }
}

TEST_P(SparseDeviceSuite, AllKeysInOneRowAndOneKeyInEach) {
  Open(Model(CacheType::kDynamic));
  for (uint32_t table = 0; table < kWidths.size(); ++table) {
    Bags one{.table = table, .keys = KeyRange(0, kRows), .splits = {0, kRows}};
    for (Key key = 0; key < kRows; ++key) one.weights.push_back(static_cast<float>(key % 5) - 2.0f);
    Bags each{.table = table, .keys = KeyRange(0, kRows)};
    for (Key key = 1; key <= kRows; ++key) each.splits.push_back(key);
    each.weights = one.weights;  // a weight of zero: zeros
    for (const bool weighted : {false, true}) {
      one.weighted = each.weighted = weighted;
      for (int turn = 0; turn < 2; ++turn) {
        ExpectEqualToTheHost(one, {});
        ExpectEqualToTheHost(each, {.rank = 2});
      }
    }
    if (HasFatalFailure()) return;
  }
}

TEST_P(SparseDeviceSuite, ManyTablesInOneCall) {
  Open(Model(CacheType::kDynamic));
  for (const size_t parts : {size_t{3}, kWidths.size(), size_t{48}, size_t{120}}) {
    for (int turn = 0; turn < 3; ++turn) {  // the first time most is missing, later only keys of every third part
      std::vector<Bags> bags;
      std::vector<std::unique_ptr<BagsOnDevice>> asked;
      std::vector<DeviceSparsePart> lookups;
      for (size_t i = 0; i < parts; ++i) {
        const auto table = static_cast<uint32_t>((i * 5) % kWidths.size());
        bags.push_back(i % 7 == 3 ? Bags{.table = table} : RandomBags(table, i % 3 == 0 ? kRows + 50 : kWarm, i, 20));
        bags.back().combiner = kCombiners[i % 3];
        bags.back().weighted = i % 4 == 1;
        const Form form{.rank = i % 2 == 0 ? 0u : 2u, .key_bytes = i % 5 == 0 ? 4u : 8u};
        asked.push_back(std::make_unique<BagsOnDevice>(*device_, bags.back(), kWidths[table], form));
        lookups.push_back(asked.back()->part);
      }
      LookupReport report;
      ASSERT_OK(session_->LookupSparseOnDevice(ordinal_, lookups, nullptr, {}, &report));
      EXPECT_EQ(Sum(report), report.keys);
      if (turn > 0) EXPECT_GT(report.rows_from_cache, report.keys / 2);
      for (size_t i = 0; i < parts; ++i) {
        SCOPED_TRACE("part " + std::to_string(i));
        ExpectBits(asked[i]->Get(), Expected(bags[i]), kWidths[bags[i].table]);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(SparseDeviceSuite, NothingToAdd) {
  Open(Model(CacheType::kDynamic));
  LookupReport report;
  ASSERT_OK(session_->LookupSparseOnDevice(ordinal_, {}, nullptr, {}, &report));
  EXPECT_EQ(report.keys, 0u);
  for (const uint32_t rank : {0u, 2u}) {
    ExpectEqualToTheHost({.table = 4}, {.rank = rank}, &report);
    EXPECT_EQ(report.keys, 0u);
    Bags empty{.table = 4};
    empty.splits.assign(100, 0);
    ExpectEqualToTheHost(empty, {.rank = rank}, &report);
    // As an empty tensor of TensorFlow: no memory at all.
    BagsOnDevice none(*device_, empty, 16, {.rank = rank});
    none.part.keys = nullptr;
    none.part.indices = nullptr;
    ASSERT_OK(Look(none));
    EXPECT_EQ(none.Get(), std::vector<float>(99 * 16, 0.0f));
  }
}

// Above the threshold missing keys count with the default value, and are there later.
TEST_P(SparseDeviceSuite, DeferredKeysCountWithTheDefaultValue) {
  Open(Model(CacheType::kDynamic, 0.5));
  Bags warm{.table = 4, .keys = KeyRange(0, 100)};
  for (Key key = 1; key <= 100; ++key) warm.splits.push_back(key);
  ExpectEqualToTheHost(warm, {});  // below the threshold: exact
  Bags bags = warm;
  bags.keys = KeyRange(20, 100);
  const BagsOnDevice asked(*device_, bags, 16);
  LookupReport report;
  ASSERT_OK(Look(asked, &report));
  EXPECT_EQ(report.rows_from_cache, 80u);
  EXPECT_EQ(report.rows_deferred, 20u);
  std::vector<float> expected = Expected(bags);
  std::fill(expected.begin() + 80 * 16, expected.end(), kDefault);
  ExpectBits(asked.Get(), expected, 16);
  WaitUntil(
      [&] {
        EXPECT_EQ(Look(asked, &report).ToString(), "OK");
        (void)asked.Get();
        return report.rows_from_cache == 100;
      },
      "the inserts");
  ExpectEqualToTheHost(bags, {});
}

TEST_P(SparseDeviceSuite, BadSegmentsAreRefusedAndNothingElseIsTouched) {
  for (const CacheType type : {CacheType::kDynamic, CacheType::kStatic}) {
    Open(Model(type));
    const auto refuse = [&](Form form, const std::vector<int64_t>& segments, const std::vector<std::string>& parts) {
      Bags bags{.table = 4, .keys = KeyRange(0, 6), .splits = {0, 2, 2, 6}};
      BagsOnDevice asked(*device_, bags, 16, form);
      asked.SetSegments(segments);
      ExpectError(Look(asked), StatusCode::kInvalidArgument, parts);
      (void)asked.Get();
    };
    const std::string name = "model 'm', table 't16': ";
    const std::string ends = name + "row_splits must begin with 0 and end with the number of keys, 6";
    refuse({}, {1, 2, 2, 6}, {ends, "begin with 1 and end with 6"});
    refuse({}, {0, 2, 2, 5}, {ends, "begin with 0 and end with 5"});
    refuse({}, {0, 2, 2, 7}, {ends});
    refuse({}, {0, 2, 7, 7}, {ends});
    refuse({}, {-1, 2, 1, -6}, {ends});
    refuse({}, {0, 4, 3, 6}, {name + "row_splits must not descend, but splits[2] is 3 after 4"});
    refuse({}, {0, int64_t{1} << 62, -(int64_t{1} << 62), 6}, {"splits[2] is -4611686018427387904 after 4611"});
    const auto outside = [&](const std::string& where, const std::string& bound) {
      return name + "indices[" + where + " lies outside the dense shape, whose dimension " + bound;
    };
    refuse({.rank = 2}, {0, 0, 0, 1, 2, 0, 2, 1, 2, 2, 3, 0}, {outside("5, 0] = 3", "0 is 3")});
    refuse({.rank = 2}, {0, 0, 0, 1, 2, 0, 2, 1, 2, 4, 2, 3}, {outside("4, 1] = 4", "1 is 4")});
    refuse({.rank = 2}, {-1, 0, 0, 1, 2, 0, 2, 1, 2, 2, 2, 3}, {outside("0, 0] = -1", "0 is 3")});
    refuse({.rank = 2}, {0, 0, 0, 1, 2, 0, 2, 1, 1, 2, 2, 3},
           {name + "rows must not descend, but indices[4, 0] = 1 follows 2; use tf.sparse.reorder"});
    refuse({.rank = 1}, {2, 1, 0, int64_t{1} << 40, 0, 1}, {"indices[1, 0] = 1 follows 2"});  // the first mistake
    // A table of the model that is all right before it, and other mistakes behind it.
    Bags good = RandomBags(7, kRows, 3), bad{.table = 4, .keys = KeyRange(0, 6), .splits = {0, 2, 2, 6}};
    const BagsOnDevice first(*device_, good, 64);
    BagsOnDevice second(*device_, bad, 16), third(*device_, bad, 16, {.rank = 1});
    second.SetSegments({0, 3, 2, 6});
    third.SetSegments({9, 9, 9, 9, 9, 9});
    const DeviceSparsePart lookups[] = {first.part, second.part, third.part};
    ExpectError(session_->LookupSparseOnDevice(ordinal_, lookups, nullptr), StatusCode::kInvalidArgument,
                {"splits[2] is 2 after 3"});
    (void)first.Get();
    (void)second.Get();
    (void)third.Get();
    ExpectEqualToTheHost(good, {});  // the workspace is as good as new
    ExpectEqualToTheHost(bad, {.rank = 2});
    session_.reset();
    ASSERT_OK(server_->Close());
  }
}

// Splits that go up and down: no row may be added up over and over again.
TEST_P(SparseDeviceSuite, WildSegmentsEndSoon) {
  Open(Model(CacheType::kStatic));
  Bags bags{.table = 8};
  const int64_t n = 1 << 16;
  for (int64_t i = 0; i < n; ++i) bags.keys.push_back(i % kRows);
  bags.splits.assign(20'001, 0);
  for (size_t r = 1; r < bags.splits.size(); r += 2) bags.splits[r] = n;
  bags.splits.back() = n;
  const BagsOnDevice asked(*device_, bags, 128);
  ExpectError(Look(asked), StatusCode::kInvalidArgument, {"splits[2] is 0 after 65536"});
  (void)asked.Get();
}

TEST_P(SparseDeviceSuite, RefusalsSayWhatToDo) {
  Open(Model(CacheType::kDynamic));
  Bags bags{.table = 4, .keys = KeyRange(0, 6), .splits = {0, 2, 2, 6}};
  const auto refuse = [&](const std::function<void(DeviceSparsePart*)>& change, const std::vector<std::string>& parts,
                          Form form = {}) {
    BagsOnDevice asked(*device_, bags, 16, form);
    change(&asked.part);
    ExpectError(Look(asked), StatusCode::kInvalidArgument, parts);
  };
  refuse([](DeviceSparsePart* part) { part->table = 40; }, {"no table 40"});
  refuse([](DeviceSparsePart* part) { part->width = 17; }, {"table 't16'", "16 values", "17"});
  refuse([](DeviceSparsePart* part) { part->key_bytes = 2; }, {"table 't16'", "keys of 2 bytes", "int32"});
  refuse([](DeviceSparsePart* part) { part->wide_keys = nullptr; }, {"table 't16'", "wide_keys", "6 int64"}, {0, 4});
  refuse([](DeviceSparsePart* part) { part->keys = nullptr; }, {"table 't16'", "6 keys", "null pointer"});
  refuse([](DeviceSparsePart* part) { part->output = nullptr; }, {"table 't16'", "3 output rows", "null pointer"});
  refuse([](DeviceSparsePart* part) { part->row_splits = nullptr; }, {"table 't16'", "neither row_splits nor indices"});
  refuse([](DeviceSparsePart* part) { part->indices = part->row_splits; }, {"table 't16'", "both row_splits and"});
  refuse([](DeviceSparsePart* part) { part->dense_shape = nullptr; }, {"neither row_splits nor indices"}, {2});
  refuse([](DeviceSparsePart* part) { part->rank = 0; }, {"neither row_splits nor indices"}, {2});
  refuse([](DeviceSparsePart* part) { part->rank = 255; }, {"rank 255", "254 is the most"}, {2});
  refuse([](DeviceSparsePart* part) { part->rows = 4; }, {"dense_shape[0] is 3", "4 output rows"}, {2});
  const BagsOnDevice asked(*device_, bags, 16);
  ExpectError(session_->LookupSparseOnDevice(ordinal_ + 1, std::span(&asked.part, 1), nullptr),
              StatusCode::kInvalidArgument, {"device " + std::to_string(ordinal_ + 1), "deployed_device_list"});
  const std::atomic<bool> cancelled{true};
  ExpectError(Look(asked, nullptr, nullptr, {.cancelled = &cancelled}), StatusCode::kCancelled);
  ExpectError(Look(asked, nullptr, nullptr, {.deadline = std::chrono::steady_clock::now()}),
              StatusCode::kDeadlineExceeded);
  ASSERT_OK(server_->UnloadModel("m"));
  ExpectError(Look(asked), StatusCode::kNotFound, {"'m'"});
}

TEST_P(SparseDeviceSuite, DenseLookupsTakeInt32Keys) {
  Open(Model(CacheType::kDynamic));
  const std::vector<int32_t> keys = {5, -1, 1999, std::numeric_limits<int32_t>::min(), 7};
  const DeviceArray<int32_t> short_keys(*device_, keys);
  const DeviceArray<Key> wide(*device_, keys.size());
  std::vector<std::unique_ptr<DeviceArray<float>>> rows;
  std::vector<DeviceLookupPart> parts;
  for (uint32_t table = 0; table < kWidths.size(); ++table) {
    rows.push_back(std::make_unique<DeviceArray<float>>(*device_, keys.size() * kWidths[table]));
    parts.push_back({.table = table,
                     .width = kWidths[table],
                     .key_bytes = 4,
                     .keys = short_keys.get(),
                     .count = static_cast<uint32_t>(keys.size()),
                     .rows = rows.back()->get(),
                     .wide_keys = wide.get()});
  }
  for (int turn = 0; turn < 2; ++turn) {
    ASSERT_OK(session_->LookupOnDevice(ordinal_, parts, nullptr));
    for (uint32_t table = 0; table < kWidths.size(); ++table) {
      const Rows expected = Lookup(*session_, table, kWidths[table], std::vector<Key>(keys.begin(), keys.end()));
      ExpectBits(rows[table]->Get(), expected.values, kWidths[table]);
    }
  }
  EXPECT_EQ(wide.Get(), std::vector<Key>(keys.begin(), keys.end()));
  parts[4].wide_keys = nullptr;
  ExpectError(session_->LookupOnDevice(ordinal_, parts, nullptr), StatusCode::kInvalidArgument,
              {"table 't16'", "wide_keys"});
  parts[4].key_bytes = 16;
  ExpectError(session_->LookupOnDevice(ordinal_, parts, nullptr), StatusCode::kInvalidArgument,
              {"table 't16'", "keys of 16 bytes", "int64"});
}

// Ids as [samples, tables] and rows as [samples, all widths]: a launch finds and leaves them there, and touches no
// more.
TEST_P(SparseDeviceSuite, KeysAndRowsOfSeveralTablesLieSideBySide) {
  constexpr uint32_t kSamples = 700, kGap = 3;
  constexpr float kUntouched = 12345.0f;
  const auto tables = static_cast<uint32_t>(kWidths.size());
  uint32_t across = kGap;
  for (const uint32_t width : kWidths) across += width;
  std::mt19937_64 random(7);
  std::vector<Key> keys;
  for (uint32_t i = 0; i < kSamples * tables; ++i) keys.push_back(static_cast<Key>(random() % 2100) - 50);
  const DeviceArray<Key> on_device(*device_, keys);
  const DeviceArray<int32_t> short_keys(*device_, std::vector<int32_t>(keys.begin(), keys.end()));
  const DeviceArray<Key> wide(*device_, keys.size());
  for (const CacheType type : {CacheType::kDynamic, CacheType::kStatic}) {
    Open(Model(type));
    for (const uint32_t key_bytes : {8u, 4u}) {
      for (int turn = 0; turn < 2; ++turn) {
        const DeviceArray<float> rows(*device_, std::vector<float>(size_t{kSamples} * across, kUntouched));
        std::vector<DeviceLookupPart> parts;
        uint32_t from = 0;
        for (uint32_t t = 0; t < tables; from += kWidths[t++]) {
          DeviceLookupPart part;
          part.table = t;
          part.width = kWidths[t];
          part.key_bytes = key_bytes;
          part.keys = key_bytes == 8 ? static_cast<const void*>(on_device.get() + t) : short_keys.get() + t;
          part.count = kSamples;
          part.rows = rows.get() + from;
          part.wide_keys = wide.get() + size_t{t} * kSamples;
          part.key_stride = tables;
          part.row_stride = across;
          parts.push_back(part);
        }
        ASSERT_OK(session_->LookupOnDevice(ordinal_, parts, nullptr));
        const std::vector<float> got = rows.Get();
        from = 0;
        for (uint32_t t = 0; t < tables; from += kWidths[t++]) {
          std::vector<Key> asked;
          std::vector<float> values;
          for (uint32_t i = 0; i < kSamples; ++i) {
            asked.push_back(keys[i * tables + t]);
            values.insert(values.end(), got.begin() + i * across + from, got.begin() + i * across + from + kWidths[t]);
          }
          ExpectBits(values, Lookup(*session_, t, kWidths[t], asked).values, kWidths[t]);
        }
        for (uint32_t i = 0; i < kSamples; ++i) {
          for (uint32_t gap = from; gap < across; ++gap) ASSERT_EQ(got[i * across + gap], kUntouched);
        }
      }
      // One table alone, not packed.
      const DeviceArray<float> rows(*device_, std::vector<float>(size_t{kSamples} * across, kUntouched));
      DeviceLookupPart part{.table = 4, .width = kWidths[4], .keys = on_device.get() + 4, .count = kSamples};
      part.rows = rows.get();
      part.key_stride = tables;
      part.row_stride = across;
      ASSERT_OK(session_->LookupOnDevice(ordinal_, std::span(&part, 1), nullptr));
      const std::vector<float> got = rows.Get();
      for (uint32_t i = 0; i < kSamples; ++i) {
        const Rows expected = Lookup(*session_, 4, kWidths[4], {keys[i * tables + 4]});
        ExpectBits({got.begin() + i * across, got.begin() + i * across + kWidths[4]}, expected.values, kWidths[4]);
        ASSERT_EQ(got[i * across + kWidths[4]], kUntouched);
      }
      part.key_stride = 0;
      ExpectError(session_->LookupOnDevice(ordinal_, std::span(&part, 1), nullptr), StatusCode::kInvalidArgument,
                  {"table 't16'", "key_stride"});
      part.key_stride = 1;
      part.row_stride = kWidths[4] - 1;
      ExpectError(session_->LookupOnDevice(ordinal_, std::span(&part, 1), nullptr), StatusCode::kInvalidArgument,
                  {"table 't16'", "rows of 16 values 15 apart", "row_stride"});
    }
  }
}

// Bags of one key beside updates: each pooled row is a whole row of one version. In a cache that holds a part of the
// keys, and in one that holds all.
TEST_P(SparseDeviceSuite, RowsAreWholeBesideUpdates) {
  for (const CacheType type : {CacheType::kDynamic, CacheType::kStatic}) {
    ModelConfig model = Model(type);
    if (type == CacheType::kDynamic) model.gpucacheper = 0.2;
    Open(model);
    const std::vector<uint32_t> tables = {4, 8, 9, 10};
    const std::vector<Key> keys = KeyRange(0, 600);
    const auto update = [&](uint32_t version, const std::vector<Key>& some) {
      for (const uint32_t table : tables) {
        std::vector<float> rows;
        for (const Key key : some) {
          const std::vector<float> row = Row(key, version, kWidths[table]);
          rows.insert(rows.end(), row.begin(), row.end());
        }
        ASSERT_OK(server_->UpdateRows("m", table, some,
                                      {reinterpret_cast<const std::byte*>(rows.data()), kWidths[table] * 4}));
      }
    };
    update(1, keys);
    std::atomic<bool> done{false};
    std::atomic<int> written{1}, lookups{0};
    const auto look = [&](uint64_t seed) {
      std::mt19937_64 random(seed);
      const TestStream stream(*device_);
      while (!done) {
        Bags bags{.table = tables[random() % tables.size()]};
        for (int64_t i = 1; i <= 200; ++i) {
          bags.keys.push_back(static_cast<Key>(random() % keys.size()));
          bags.splits.push_back(i);
        }
        const uint32_t width = kWidths[bags.table];
        const BagsOnDevice asked(*device_, bags, width);
        const int before = written;
        ASSERT_OK(Look(asked, nullptr, stream.get()));
        const std::vector<float> rows = asked.Get(stream.get());
        for (size_t i = 0; i < bags.keys.size(); ++i) {
          const float* const row = rows.data() + i * width;
          const std::vector<float> expected = Row(bags.keys[i], static_cast<uint32_t>(row[0]), width);
          ASSERT_TRUE(std::equal(expected.begin(), expected.end(), row)) << "key " << bags.keys[i];
          ASSERT_GE(static_cast<int>(row[0]), before) << "an old row";
        }
        ++lookups;
      }
    };
    std::vector<std::thread> threads;
    for (uint64_t seed = 1; seed <= 2; ++seed) threads.emplace_back(look, seed);
    for (int version = 2; version <= 20 && !HasFatalFailure(); ++version) {
      update(static_cast<uint32_t>(version), keys);
      written = version;
    }
    WaitUntil([&] { return lookups > 4 || HasFailure(); }, "lookups");
    done = true;
    for (std::thread& thread : threads) thread.join();
    session_.reset();
    ASSERT_OK(server_->Close());
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(SparseDeviceSuite);

}  // namespace hps::testing
