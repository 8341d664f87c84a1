// Sources: row_slab.*, row_slots.*, hash_map_index.*, dense_index.h (hash map); shared_layout.h, shared_heap.* and
// multi_process_partition.cc (shared memory); bulk_rows.* (RocksDB). docs/design/0011-operator-tools.md has what was
// measured.

#include "cc/storage/table_memory.h"

#include <algorithm>
#include <cmath>

#include "cc/storage/dense_index.h"
#include "cc/storage/hash_buckets.h"
#include "cc/storage/row_marks.h"
#include "cc/storage/shared_layout.h"
#include "cc/storage/stored_order.h"

namespace hps {
namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kHugePageBytes = 2 << 20;
constexpr uint64_t kHugeRegionBytes = 32 << 20;  // regions of rows from this size on ask for huge pages
constexpr uint64_t kRunBytes = 64 << 10;         // of slots that a partition sets aside

uint64_t Up(double count, uint64_t unit) {
  return static_cast<uint64_t>(std::ceil(count / static_cast<double>(unit))) * unit;
}

// Bytes in memory of an area of `total` bytes into which `pieces` small writes fall at random.
uint64_t Touched(uint64_t pieces, uint64_t total) {
  if (pieces == 0) return 0;
  const uint64_t page = total >= kHugePageBytes ? kHugePageBytes : kPageBytes;
  const double pages = std::ceil(static_cast<double>(total) / static_cast<double>(page));
  if (pages <= 1) return total;
  const double hit = pages * -std::expm1(static_cast<double>(pieces) * std::log1p(-1 / pages));
  return std::min(total, static_cast<uint64_t>(std::llround(hit)) * page);
}

// Buckets of a shared index that is made small, because the first rows of the table are dense, and grows until it takes
// so many rows (MultiProcessPartition::ReplaceIndex). Of the memory of the array before about half stays unused.
uint64_t GrownBuckets(uint64_t rows) {
  uint64_t buckets = HashBuckets::BucketsFor(64);
  while (HashBuckets::ClaimLimit(buckets) < rows) {
    const uint64_t claimed = HashBuckets::ClaimLimit(buckets);
    buckets = HashBuckets::BucketsFor(claimed + claimed / 2 + 8);
  }
  return buckets * 4 / 3;
}

}  // namespace

uint64_t HashMapBuckets(uint64_t rows, uint32_t num_partitions, const OverflowOptions& overflow) {
  const double mean = static_cast<double>(rows) / num_partitions;
  // An index that is planned at a load of 0.8 takes 0.875.
  const auto planned = static_cast<uint64_t>(std::max(mean, (mean + 5 * std::sqrt(mean)) * 0.8 / 0.875)) + 1;
  return HashBuckets::BucketsFor(std::min(planned, overflow.margin));
}

uint64_t HashMapCapacityRows(const OverflowOptions& overflow, uint32_t num_partitions) {
  return CapacityRows(overflow, num_partitions, uint64_t{1} << DenseIndex::kSmallBlockBits);
}

uint64_t SharedCapacityRows(const OverflowOptions& overflow, uint32_t num_partitions) {
  return CapacityRows(overflow, num_partitions, DenseLine::kKeys);
}

uint64_t HashMapTableBytes(const TableShape& shape) {
  if (shape.rows == 0) return 0;
  const uint64_t area = shape.rows * shape.row_bytes;
  const bool huge = area >= kHugeRegionBytes;
  // Of a partition's last run half is unused on average; a run is at most 1/32 of its rows.
  const double partitions = shape.num_partitions;
  const double unused = std::min<double>(kRunBytes, static_cast<double>(area) / partitions / 32) * partitions / 2;
  const uint64_t rows = Up(static_cast<double>(area) + (huge ? 0 : unused), huge ? kHugePageBytes : kPageBytes);
  // Marks lie in an array beside the rows.
  const uint64_t marks = Up(static_cast<double>(shape.rows * MarkBytes(KeptMark(shape.overflow))), kPageBytes);
  const uint64_t hashed = HashMapBuckets(shape.rows, shape.num_partitions, shape.overflow) *
                          sizeof(HashBuckets::Bucket) * shape.num_partitions;
  return rows + marks + Touched(shape.dense_rows, shape.rows * 4) + Touched(shape.rows - shape.dense_rows, hashed);
}

uint64_t HashMapLimitBytes(const TableShape& shape) {
  const double row = static_cast<double>(shape.row_bytes + MarkBytes(KeptMark(shape.overflow))) + (8 + 8) / 0.8;
  return static_cast<uint64_t>(static_cast<double>(shape.rows) * row * 1.1);
}

uint64_t SharedTableBytes(const TableShape& shape) {
  if (shape.rows == 0) return 0;
  SharedTable table = {};
  ShapeTable(shape.rows, shape.row_bytes, 32, shape.num_partitions, shape.overflow, &table);
  const auto block = [](uint64_t bytes) { return UnitsFor(bytes) * kUnitBytes; };
  uint64_t bytes = block(table.bytes) + shape.num_partitions * block(table.RegionBytes(0));
  if (shape.dense_rows > 0) bytes += block(DenseLine::LinesFor(shape.rows) * sizeof(DenseLine));
  if (shape.dense_rows < shape.rows) {
    const uint64_t hashed = (shape.rows - shape.dense_rows) / shape.num_partitions;
    const uint64_t index = shape.hashed_early ? HashBuckets::BucketsFor(table.planned_rows) : GrownBuckets(hashed);
    bytes += shape.num_partitions * block(index * sizeof(HashBuckets::Bucket));
  }
  return bytes;
}

uint64_t SharedMemoryOwnBytes(uint64_t bytes) {
  return UnitsFor((sizeof(SharedHeader) + 63) / 64 * 64 + bytes / kUnitBytes / 8) * kUnitBytes;
}

uint64_t RocksDbLoadBytes(uint64_t rows, uint64_t row_bytes) {
  const uint64_t each = row_bytes + 2 * sizeof(KeyIndex);  // sorting needs another place for the keys
  return rows < kRocksDbBulkBytes / each ? rows * each : kRocksDbBulkBytes;
}

uint64_t LoadedBytes(std::span<const TableLoad> loads, uint32_t num_partitions, const OverflowOptions& overflow,
                     uint64_t (*table_bytes)(const TableShape&)) {
  uint64_t bytes = 0;
  for (const TableLoad& load : loads) {
    bytes += table_bytes({load.spec.expected_rows, load.dense_rows, load.spec.row_bytes, num_partitions, overflow});
  }
  return bytes;
}

}  // namespace hps
