// Invariants: those of hash_buckets.h; the array without room is never written.

#include "cc/storage/hash_map_index.h"

namespace hps {
namespace {

HashBuckets::Bucket no_rows{};  // never written

}  // namespace

HashMapIndex::HashMapIndex() : HashBuckets(&no_rows, 1) {}

Result<std::vector<std::shared_ptr<HashMapIndex>>> HashMapIndex::Create(uint64_t num_buckets, size_t count) {
  const size_t bytes = num_buckets * sizeof(Bucket) * count;
  HPS_ASSIGN_OR_RETURN(AnonymousMemory block,
                       AnonymousMemory::Allocate(bytes, bytes >= AnonymousMemory::kHugePageBytes));
  const auto memory = std::make_shared<const AnonymousMemory>(std::move(block));
  auto* buckets = reinterpret_cast<Bucket*>(memory->data());
  std::vector<std::shared_ptr<HashMapIndex>> arrays;
  for (size_t i = 0; i < count; ++i) {
    arrays.push_back(std::make_shared<HashMapIndex>(memory, buckets + i * num_buckets, num_buckets));
  }
  return arrays;
}

}  // namespace hps
