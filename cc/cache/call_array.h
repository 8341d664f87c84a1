// CallArray: room on the stack for what one launch takes of each table. Nothing is written to the places that a call
// does not use: for a call of one table the others would take longer than all the rest.

#ifndef HPS_CACHE_CALL_ARRAY_H_
#define HPS_CACHE_CALL_ARRAY_H_

#include <cstddef>
#include <new>
#include <span>
#include <type_traits>

#include "cuda_kernels/device_cache.h"

namespace hps {

template <typename T>
class CallArray {
  static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_destructible_v<T>);

 public:
  // At most kMaxQueryParts times.
  T& Add(const T& value) { return *new (storage_ + sizeof(T) * count_++) T(value); }
  std::span<T> all() { return {std::launder(reinterpret_cast<T*>(storage_)), count_}; }

 private:
  alignas(T) std::byte storage_[sizeof(T) * cuda::kMaxQueryParts];
  size_t count_ = 0;
};

}  // namespace hps

#endif  // HPS_CACHE_CALL_ARRAY_H_
