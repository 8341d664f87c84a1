// What the tests of lookups over caches share: tiers in a map with hooks, and a fixture over the host device.

#ifndef HPS_TESTS_CACHE_FIXTURE_H_
#define HPS_TESTS_CACHE_FIXTURE_H_

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cc/cache/device_lookup.h"
#include "cc/cache/host_device.h"
#include "cc/tests/cache_conformance.h"

namespace hps::testing {

// A framework's allocator over so many bytes of a host device's memory.
class HostAllocator final : public DeviceAllocator {
 public:
  explicit HostAllocator(size_t bytes, bool tells = false) : left_(bytes), tells_(tells) {}

  void* Allocate(size_t bytes) override {
    std::lock_guard lock(mutex_);
    if (bytes > left_) return nullptr;
    void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    sizes_[memory] = bytes;
    left_ -= bytes;
    return memory;
  }
  void Free(void* memory) override {
    std::lock_guard lock(mutex_);
    left_ += sizes_.at(memory);
    sizes_.erase(memory);
    std::free(memory);
  }
  std::optional<uint64_t> FreeBytes() const override { return tells_ ? std::optional<uint64_t>(left()) : std::nullopt; }
  size_t left() const {
    std::lock_guard lock(mutex_);
    return left_;
  }

 private:
  mutable std::mutex mutex_;  // guards the following members
  size_t left_;
  std::map<void*, size_t> sizes_;
  const bool tells_;
};

// The tiers of several tables: which version each key has. Rows are Row(key, version, width).
class MapSource final : public RowSource {
 public:
  explicit MapSource(std::vector<uint32_t> widths) : widths_(std::move(widths)), tables_(widths_.size()) {}

  Status Fetch(std::span<const RowRequest> requests, const FetchLimits& limits, const RowsArrived& arrived,
               LookupReport* report) override {
    {
      std::lock_guard lock(mutex_);
      ++fetches_;
      if (!failure_.ok()) return failure_;
    }
    if (piece_ == 0 || !arrived) {
      for (const RowRequest& request : requests) Read(request, 0, request.keys.size(), report);
    } else {
      HPS_RETURN_IF_ERROR(FetchPieces(requests, arrived, report));
    }
    // Rows have been read, but are not where they are going.
    if (after_read_) after_read_(limits);
    if (limits.cancelled != nullptr && limits.cancelled->load()) return Cancelled("map: given up");
    return OkStatus();
  }

  void Put(uint32_t table, const std::vector<Key>& keys, uint32_t version) {
    std::lock_guard lock(mutex_);
    for (const Key key : keys) tables_[table][key] = version;
  }
  void Erase(uint32_t table, Key key) {
    std::lock_guard lock(mutex_);
    tables_[table].erase(key);
  }
  uint32_t VersionOf(uint32_t table, Key key) const {
    std::lock_guard lock(mutex_);
    const auto held = tables_[table].find(key);
    return held == tables_[table].end() ? 0 : held->second;
  }
  void Fail(Status status) {
    std::lock_guard lock(mutex_);
    failure_ = std::move(status);
  }
  // Missing keys count as not to be had, because a tier is down.
  void SetUnavailable(bool unavailable) {
    std::lock_guard lock(mutex_);
    unavailable_ = unavailable;
  }
  // Rows arrive in pieces of so many, by so many threads, each second piece before the first one; of every fifth piece
  // of the second half nothing is told. After each `after_piece` is called with the number of pieces so far, and its
  // error ends the fetch. Before threads use the source.
  void ArriveInPieces(size_t piece, int threads, std::function<Status(int)> after_piece = {}) {
    piece_ = piece;
    threads_ = threads;
    after_piece_ = std::move(after_piece);
  }
  // Before threads use the source.
  void AfterRead(std::function<void(const FetchLimits&)> hook) { after_read_ = std::move(hook); }
  std::vector<Key> TakeAsked() {
    std::lock_guard lock(mutex_);
    return std::exchange(asked_, {});
  }
  int fetches() const {
    std::lock_guard lock(mutex_);
    return fetches_;
  }

 private:
  void Read(const RowRequest& request, size_t first, size_t last, LookupReport* report) {
    std::lock_guard lock(mutex_);
    const size_t row_bytes = widths_[request.table] * sizeof(float);
    for (size_t i = first; i < last; ++i) {
      asked_.push_back(request.keys[i]);
      const auto held = tables_[request.table].find(request.keys[i]);
      request.found[i] = held != tables_[request.table].end();
      std::memset(request.rows + i * row_bytes, 0x77, row_bytes);  // what a tier may leave there
      if (!request.found[i]) {
        ++report->rows_from_default;
        report->rows_unavailable += unavailable_;
        continue;
      }
      ++report->rows_from_volatile;
      const std::vector<float> row = Row(request.keys[i], held->second, widths_[request.table]);
      std::memcpy(request.rows + i * row_bytes, row.data(), row_bytes);
    }
  }

  Status FetchPieces(std::span<const RowRequest> requests, const RowsArrived& arrived, LookupReport* report) {
    struct Piece {
      size_t request, first, last;
    };
    std::vector<Piece> pieces;
    for (size_t r = 0; r < requests.size(); ++r) {
      for (size_t first = 0; first < requests[r].keys.size(); first += piece_) {
        pieces.push_back({r, first, std::min(requests[r].keys.size(), first + piece_)});
      }
    }
    for (size_t i = 0; i + 1 < pieces.size(); i += 2) std::swap(pieces[i], pieces[i + 1]);
    std::atomic<int> done{0};
    std::atomic<size_t> next{0};
    Status status;  // guarded by mutex_, as is *report
    const auto work = [&] {
      for (size_t i = next++; i < pieces.size(); i = next++) {
        const auto [request, first, last] = pieces[i];
        {
          std::lock_guard lock(mutex_);
          if (!status.ok()) return;
        }
        Read(requests[request], first, last, report);
        if (i < pieces.size() / 2 || i % 5 != 4) arrived(request, first, last);
        Status after = after_piece_ ? after_piece_(++done) : OkStatus();
        std::lock_guard lock(mutex_);
        if (status.ok()) status = std::move(after);
      }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads_; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    return status;
  }

  const std::vector<uint32_t> widths_;
  size_t piece_ = 0;
  int threads_ = 1;
  std::function<Status(int)> after_piece_;
  std::function<void(const FetchLimits&)> after_read_;
  mutable std::mutex mutex_;
  std::vector<std::map<Key, uint32_t>> tables_;
  std::vector<Key> asked_;
  Status failure_;
  bool unavailable_ = false;
  int fetches_ = 0;
};

inline CacheSpec SpecOf(uint32_t width, uint64_t capacity_rows, const std::string& name = "table 't'") {
  return {.name = name, .row_bytes = width * 4, .capacity_rows = capacity_rows, .default_value = kCacheDefault};
}

// The version of a row, 0 for the default row, -1 for anything else.
inline int VersionOfRow(Key key, const float* row, uint32_t width) {
  if (std::all_of(row, row + width, [](float x) { return x == kCacheDefault; })) return 0;
  const std::vector<float> expected = Row(key, static_cast<uint32_t>(row[0]), width);
  return std::equal(expected.begin(), expected.end(), row) ? static_cast<int>(row[0]) : -1;
}

inline Status UpdateTo(DeviceCache& cache, const std::vector<Key>& keys, uint32_t version) {
  const uint32_t width = cache.spec().row_bytes / 4;
  std::vector<float> rows;
  for (const Key key : keys) {
    const std::vector<float> row = Row(key, version, width);
    rows.insert(rows.end(), row.begin(), row.end());
  }
  return cache.Update(keys, {reinterpret_cast<const std::byte*>(rows.data()), width * 4});
}

// One call's keys for one table, and its answer on the device.
struct Asked {
  Asked(cuda::Device& device, std::shared_ptr<DeviceCache> the_cache, uint32_t the_table, std::vector<Key> the_keys)
      : cache(std::move(the_cache)),
        table(the_table),
        keys(std::move(the_keys)),
        width(cache->spec().row_bytes / 4),
        device_keys(device, keys),
        rows(device, keys.size() * width) {}
  CachedLookup lookup() const {
    return {cache, table, device_keys.get(), static_cast<uint32_t>(keys.size()), rows.get()};
  }
  std::vector<int> Versions(DeviceStream stream = nullptr) const {
    const std::vector<float> answer = rows.Get(stream);
    std::vector<int> versions;
    for (size_t i = 0; i < keys.size(); ++i)
      versions.push_back(VersionOfRow(keys[i], answer.data() + i * width, width));
    return versions;
  }

  const std::shared_ptr<DeviceCache> cache;
  const uint32_t table;
  const std::vector<Key> keys;
  const uint32_t width;
  const DeviceArray<Key> device_keys;
  const DeviceArray<float> rows;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_CACHE_FIXTURE_H_
