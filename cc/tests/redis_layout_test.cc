// Names and hashes against values that other programs computed: redis-py's slots, the xxhash package's XXH3.

#include "cc/storage/redis_layout.h"

#include <gtest/gtest.h>

#include "cc/storage/redis_cluster.h"

namespace hps {
namespace {

TEST(RedisLayout, SlotsAreThoseOfOtherClients) {
  EXPECT_EQ(RedisSlot("123456789"), 12739);
  EXPECT_EQ(RedisSlot("hps_et{hps_et.dlrm.sparse_embedding0/p3}v"), 2484);
  EXPECT_EQ(RedisSlot("hps_et{hps_et.dlrm.sparse_embedding0/p3}t"), 2484);
  EXPECT_EQ(RedisSlot("hps_et.dlrm.sparse_embedding0/p3"), 2484);
  EXPECT_EQ(RedisSlot("{}a"), 10875) << "empty braces do not count";
  EXPECT_EQ(RedisSlot("a{b}c{d}"), 3300) << "the first pair of braces counts";
  EXPECT_EQ(RedisSlot("{a"), 10276);
  EXPECT_EQ(RedisSlot(""), 0);
}

TEST(RedisLayout, Xxh3IsThatOfTheReference) {
  const std::pair<int64_t, uint64_t> eight[] = {{0, 0xc77b3abb6f87acd9},
                                                {1, 0x2fbc593564db792e},
                                                {-1, 0x5111c7e47d784413},
                                                {12345678901, 0x8658bc3311ef0ee1},
                                                {std::numeric_limits<int64_t>::max(), 0xa233cf376558df46},
                                                {std::numeric_limits<int64_t>::min(), 0x828f2476789a0e5f}};
  for (const auto& [key, hash] : eight) EXPECT_EQ(Xxh3OfKey(static_cast<uint64_t>(key), 8), hash) << key;
  const std::pair<int64_t, uint64_t> four[] = {
      {0, 0x48b2c92616fc193d}, {1, 0xdb02334e96d65708}, {-1, 0xcd6b1c920d3f662c}, {2147483647, 0x55506669e60fb0ff}};
  for (const auto& [key, hash] : four) EXPECT_EQ(Xxh3OfKey(static_cast<uint64_t>(key), 4), hash) << key;
}

TEST(RedisLayout, Names) {
  const RedisLayout current(RedisLayout::Version::kCurrent, "hps_et.m.t", 8, 8);
  EXPECT_EQ(current.ValuesKey(3), "hps_et{hps_et.m.t/p3}v");
  EXPECT_EQ(current.MetadataKey(3), "hps_et{hps_et.m.t/p3}t");
  const RedisLayout old(RedisLayout::Version::kOld, "hps_et.m.t", 8, 8);
  EXPECT_EQ(old.ValuesKey(3), "hps_et.m.t/p3/v");
  EXPECT_EQ(old.MetadataKey(3), "hps_et.m.t/p3/t");
  for (const RedisLayout& layout : {current, old}) {
    EXPECT_EQ(RedisSlot(layout.DroppedKey(3, "17")), RedisSlot(layout.ValuesKey(3)));
    EXPECT_EQ(RedisTableOfKey(layout.ValuesKey(11)), "hps_et.m.t");
    EXPECT_EQ(RedisTableOfKey(layout.MetadataKey(11)), std::nullopt);
    EXPECT_EQ(RedisTableOfKey(layout.DroppedKey(11, "17")), std::nullopt);
  }
  EXPECT_EQ(RedisTableOfKey(RedisDescriptionKey("hps_et.m.t")), "hps_et.m.t");
  EXPECT_EQ(RedisTableOfKey(RedisRecordKey("r")), std::nullopt);
  EXPECT_EQ(RedisTableOfKey("hps_et{x/p}v"), std::nullopt);
  EXPECT_EQ(RedisTableOfKey("hps_et{x/p1a}v"), std::nullopt);
}

TEST(RedisLayout, KeysOfFourBytes) {
  const RedisLayout layout(RedisLayout::Version::kCurrent, "t", 7, 4);
  EXPECT_TRUE(layout.Holds(-1));
  EXPECT_TRUE(layout.Holds(2147483647));
  EXPECT_FALSE(layout.Holds(2147483648));
  EXPECT_FALSE(layout.Holds(-2147483649));
  EXPECT_EQ(layout.PartitionOf(-1), PartitionHash(0xffffffffull) % 7) << "hashed as an unsigned number";
  const char raw[] = {-2, -1, -1, -1};
  EXPECT_EQ(RedisLayout::FromRaw(raw, 4), -2);
}

TEST(RedisEndpoint, Forms) {
  RedisEndpoint endpoint;
  const auto parsed = [&](std::string_view text) {
    return ParseRedisEndpoint(text, 7000, "asked", &endpoint) ? endpoint.ToString() : "refused";
  };
  EXPECT_EQ(parsed("host"), "host:7000");
  EXPECT_EQ(parsed("host:1"), "host:1");
  EXPECT_EQ(parsed(":6381"), "asked:6381");
  EXPECT_EQ(parsed("[::1]:5"), "[::1]:5");
  EXPECT_EQ(parsed("[::1]"), "[::1]:7000");
  EXPECT_EQ(parsed("::1"), "[::1]:7000");
  EXPECT_EQ(parsed("host:"), "refused");
  EXPECT_EQ(parsed("host:x"), "refused");
  EXPECT_EQ(parsed("host:70000"), "refused");
  // As Redis writes a redirection: always with a port, an IPv6 address without brackets.
  EXPECT_TRUE(ParseRedisEndpoint("::1:6381", 0, "", &endpoint));
  EXPECT_EQ(endpoint.host, "::1");
  EXPECT_EQ(endpoint.port, 6381);
}

}  // namespace
}  // namespace hps
