// The suite of pooled lookups on a device, at the session: over the host device everywhere (sparse_device_test.cc),
// over a GPU where there is one (cuda_cache_test.cc). What LookupSparse says in host memory is right.

#ifndef HPS_TESTS_SPARSE_DEVICE_SUITE_H_
#define HPS_TESTS_SPARSE_DEVICE_SUITE_H_

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "cc/core/devices.h"
#include "cc/tests/cache_fixture.h"

namespace hps::testing {

// Keys of one table for some output rows, in host memory.
struct Bags {
  uint32_t table = 0;
  std::vector<Key> keys;
  std::vector<int64_t> splits{0};
  std::vector<float> weights;  // used where `weighted`
  Combiner combiner = Combiner::kMean;
  bool weighted = false;

  uint32_t rows() const { return static_cast<uint32_t>(splits.size() - 1); }
  // A SparseTensor's indices of so many columns.
  std::vector<int64_t> Indices(uint32_t rank) const {
    std::vector<int64_t> indices;
    for (size_t r = 0; r + 1 < splits.size(); ++r) {
      for (int64_t i = splits[r]; i < splits[r + 1]; ++i) {
        indices.push_back(static_cast<int64_t>(r));
        for (uint32_t j = 1; j < rank; ++j) indices.push_back(j == 1 ? i - splits[r] : 0);
      }
    }
    return indices;
  }
  std::vector<int64_t> DenseShape(uint32_t rank) const {
    std::vector<int64_t> shape(rank, 1);
    if (rank > 0) shape[0] = rows();
    for (size_t r = 0; rank > 1 && r + 1 < splits.size(); ++r) shape[1] = std::max(shape[1], splits[r + 1] - splits[r]);
    return shape;
  }
};

// How they are handed over.
struct Form {
  uint32_t rank = 0;  // 0: row_splits
  uint32_t key_bytes = 8;
  uint32_t offset = 0;  // floats by which the output is out of place
};

inline constexpr float kUntouched = 12345.0f;

// The same in memory of a device.
class BagsOnDevice {
 public:
  BagsOnDevice(cuda::Device& device, const Bags& bags, uint32_t width, Form form = {})
      : keys_(device, bags.keys),
        short_keys_(device, std::vector<int32_t>(bags.keys.begin(), bags.keys.end())),
        wide_keys_(device, bags.keys.size()),
        segments_(device, form.rank == 0 ? bags.splits : bags.Indices(form.rank)),
        shape_(bags.DenseShape(form.rank)),
        weights_(device, bags.weights),
        output_(device, std::vector<float>(form.offset + size_t{bags.rows()} * width + 8, kUntouched)),
        offset_(form.offset) {
    part = {.table = bags.table,
            .width = width,
            .key_bytes = form.key_bytes,
            .keys = form.key_bytes == 4 ? static_cast<const void*>(short_keys_.get()) : keys_.get(),
            .wide_keys = form.key_bytes == 4 ? wide_keys_.get() : nullptr,
            .count = static_cast<uint32_t>(bags.keys.size()),
            .rows = bags.rows(),
            .row_splits = form.rank == 0 ? segments_.get() : nullptr,
            .indices = form.rank == 0 ? nullptr : segments_.get(),
            .rank = form.rank,
            .dense_shape = form.rank == 0 ? nullptr : shape_.data(),
            .weights = bags.weighted ? weights_.get() : nullptr,
            .combiner = bags.combiner,
            .output = output_.get() + form.offset};
  }
  // The output; what lies around it must be as it was.
  std::vector<float> Get(DeviceStream stream = nullptr) const {
    const std::vector<float> all = output_.Get(stream);
    const size_t size = size_t{part.rows} * part.width;
    for (size_t i = 0; i < all.size(); ++i) {
      if (i >= offset_ && i < offset_ + size) continue;
      EXPECT_EQ(all[i], kUntouched) << "written outside of the output, at " << static_cast<int64_t>(i - offset_);
    }
    return {all.begin() + offset_, all.begin() + static_cast<ptrdiff_t>(offset_ + size)};
  }
  void SetSegments(const std::vector<int64_t>& values) { segments_.Set(values); }

  DeviceSparsePart part;

 private:
  DeviceArray<Key> keys_;
  DeviceArray<int32_t> short_keys_;
  DeviceArray<Key> wide_keys_;
  DeviceArray<int64_t> segments_;
  std::vector<int64_t> shape_;
  DeviceArray<float> weights_;
  DeviceArray<float> output_;
  const uint32_t offset_;
};

// A server with one model "m" of a table for each width, on one device.
template <typename DeviceType>
class SparseDeviceFixture {
 protected:
  static constexpr Key kRows = 2000;  // keys 0 .. of each table
  static constexpr Key kWarm = 400;   // so few keys push none of each other out of the cache
  inline static const std::vector<uint32_t> kWidths = {1, 3, 4, 7, 16, 20, 32, 64, 128, 130, 300};

  void OpenDevice(std::shared_ptr<DeviceType> device) {
    device_ = std::move(device);
    ASSERT_NE(device_, nullptr);
    ordinal_ = device_->info().ordinal;
  }
  ModelConfig Model(CacheType type, std::optional<double> threshold = std::nullopt) {
    std::vector<TableConfig> tables;
    for (const uint32_t width : kWidths) {
      const std::string name = "t" + std::to_string(width);
      if (!fs::exists(folder_ / name)) Write(folder_ / name, width);
      tables.push_back(MakeTable(name, folder_ / name, width));
    }
    ModelConfig model = MakeModel("m", std::move(tables));
    model.gpucache = true;
    model.gpucacheper = 1.0;
    model.init_ec = false;
    model.cache_type = type;
    model.hit_rate_threshold = threshold;
    model.deployed_devices = {ordinal_};
    return model;
  }
  void Open(const ModelConfig& model, bool long_keys = true) {
    DeviceSource source;
    source.count = [n = ordinal_ + 1] { return n; };
    source.open = [device = device_](int) -> Result<std::shared_ptr<cuda::Device>> {
      return std::shared_ptr<cuda::Device>(device);
    };
    ServerOptions options{.show_progress = false, .devices = std::make_shared<DeviceSource>(std::move(source))};
    ServerConfig config = MakeServer(Tiers::kVolatile, folder_ / "database", {model});
    config.long_keys = long_keys;
    server_ = Value(ParameterServer::Open(config, options));
    session_.emplace(Value(server_->NewSession("m")));
  }
  // Magnitudes far apart, so that each order of additions rounds differently.
  static void Write(const fs::path& folder, uint32_t width) {
    fs::create_directories(folder);
    const std::vector<Key> keys = KeyRange(0, kRows);
    std::ofstream key_file(folder / "key", std::ios::binary);
    key_file.write(reinterpret_cast<const char*>(keys.data()), static_cast<std::streamsize>(keys.size() * sizeof(Key)));
    std::mt19937_64 random(width);
    std::normal_distribution<float> normal;
    std::vector<float> rows(keys.size() * width);
    for (float& x : rows) x = normal(random) * std::exp2(normal(random) * 4);
    std::ofstream row_file(folder / "emb_vector", std::ios::binary);
    row_file.write(reinterpret_cast<const char*>(rows.data()), static_cast<std::streamsize>(rows.size() * 4));
  }
  // Bags of 0 to 40 keys each once, in random order, and a long one; of keys below `end`.
  static Bags RandomBags(uint32_t table, Key end, uint64_t seed, int64_t longest = 700) {
    std::mt19937_64 random(seed);
    std::vector<int64_t> sizes = {longest, 0, 0};
    for (int64_t n = 0; n <= 40; ++n) sizes.push_back(n);
    std::shuffle(sizes.begin(), sizes.end(), random);
    Bags bags{.table = table};
    std::normal_distribution<float> normal;
    for (const int64_t n : sizes) {
      for (int64_t i = 0; i < n; ++i) {
        bags.keys.push_back(static_cast<Key>(random() % static_cast<uint64_t>(end)));
        bags.weights.push_back(normal(random));
      }
      bags.splits.push_back(bags.splits.back() + n);
    }
    // A denominator of zero for mean.
    if (bags.splits[1] == 2) bags.weights[0] = -bags.weights[1];
    return bags;
  }
  std::vector<float> Expected(const Bags& bags) const {
    const uint32_t width = kWidths[bags.table];
    std::vector<float> output(size_t{bags.rows()} * width, kUntouched);
    SparseLookup lookup{bags.table, width, bags.keys, bags.splits, {}, bags.combiner, output.data()};
    if (bags.weighted) lookup.weights = bags.weights;
    EXPECT_EQ(session_->LookupSparse(std::span(&lookup, 1)).ToString(), "OK");
    return output;
  }
  Status Look(const BagsOnDevice& bags, LookupReport* report = nullptr, DeviceStream stream = nullptr,
              const LookupOptions& options = {}) const {
    return session_->LookupSparseOnDevice(ordinal_, std::span(&bags.part, 1), stream, options, report);
  }
  void ExpectEqualToTheHost(const Bags& bags, Form form, LookupReport* report = nullptr) const {
    const BagsOnDevice asked(*device_, bags, kWidths[bags.table], form);
    ASSERT_OK(Look(asked, report));
    ExpectBits(asked.Get(), Expected(bags), kWidths[bags.table]);
  }
  static void ExpectBits(const std::vector<float>& got, const std::vector<float>& expected, uint32_t width) {
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(got[i], expected[i]) << "row " << i / width << ", column " << i % width << " of width " << width;
    }
  }

  TempFolder folder_;
  std::shared_ptr<DeviceType> device_;
  int ordinal_ = 0;
  std::shared_ptr<ParameterServer> server_;
  std::optional<LookupSession> session_;
};

class SparseDeviceSuite : public ::testing::TestWithParam<CacheFixture>, public SparseDeviceFixture<cuda::Device> {
 protected:
  void SetUp() override { OpenDevice(GetParam().open()); }
};

}  // namespace hps::testing

#endif  // HPS_TESTS_SPARSE_DEVICE_SUITE_H_
