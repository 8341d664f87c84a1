// Invariant: in_use_ is true from the first work on a stream until an event behind all of it has been seen done, or,
// where a query is all of it, until the query has told that nothing is missing: it touches the workspace no more then
// (device_cache.h), and hits need neither record the event nor ask for it.
// Memory that the device may use is freed, and pinned memory that it may read is written, only while in_use_ is false;
// staging also when the query of this use is done, which ran behind all of the last use.

#include "cc/cache/lookup_workspace.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hps {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSpin = std::chrono::microseconds(20);
constexpr auto kYield = std::chrono::milliseconds(1);
constexpr auto kSleep = std::chrono::microseconds(50);

size_t Aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

size_t LookupWorkspace::StagingBytes(size_t keys, size_t row_bytes) {
  return Aligned(keys * sizeof(uint64_t)) + Aligned(row_bytes) + Aligned(keys * sizeof(Key));
}

size_t LookupWorkspace::DeviceBytes(const WorkspaceSize& size) {
  const size_t positions = std::max(size.positions, 1u);
  return 256 + std::bit_ceil(2 * positions) * sizeof(uint64_t) + 3 * Aligned(positions * sizeof(uint32_t)) +
         size.staging_bytes;
}

size_t LookupWorkspace::PinnedBytes(const WorkspaceSize& size) {
  return 256 + std::max(size.positions, 1u) * sizeof(cuda::MissingKey) + size.staging_bytes;
}

Result<std::unique_ptr<LookupWorkspace>> LookupWorkspace::Make(std::shared_ptr<DeviceContext> context,
                                                               const WorkspaceSize& size) {
  std::unique_ptr<LookupWorkspace> workspace(new LookupWorkspace(std::move(context)));
  HPS_ASSIGN_OR_RETURN(workspace->done_, OwnedEvent::Create(*workspace->context_));
  HPS_RETURN_IF_ERROR(workspace->AllocateQuery(std::max(size.positions, 1u)));
  if (size.staging_bytes > 0) HPS_RETURN_IF_ERROR(workspace->AllocateStaging(size.staging_bytes));
  return workspace;
}

LookupWorkspace::~LookupWorkspace() {
  if (done_.get() == nullptr) return;
  (void)WaitForLastUse();
  UpdateGate& gate = context_->gate();
  std::lock_guard lock(gate.mutex());
  gate.ForgetFill(done_.get());
}

bool LookupWorkspace::idle() {
  if (in_use_ && context_->device().QueryEvent(done_.get()) == 0) in_use_ = false;
  return !in_use_;
}

Status LookupWorkspace::WaitForLastUse() {
  if (!in_use_) return OkStatus();
  HPS_RETURN_IF_ERROR(context_->Check(context_->device().SynchronizeEvent(done_.get()), "waiting for a lookup"));
  in_use_ = false;
  return OkStatus();
}

Status LookupWorkspace::AllocateQuery(uint32_t positions) {
  const size_t first_wins = std::bit_ceil(size_t{2} * positions);
  const size_t words = Aligned(size_t{positions} * sizeof(uint32_t));
  HPS_ASSIGN_OR_RETURN(DeviceMemory device,
                       DeviceMemory::Allocate(*context_, DeviceBytes({positions, 0}),
                                              "lookups of " + std::to_string(positions) + " keys"));
  HPS_ASSIGN_OR_RETURN(PinnedMemory mapped,
                       PinnedMemory::Allocate(*context_, PinnedBytes({positions, 0}),
                                              "lookups of " + std::to_string(positions) + " keys"));
  HPS_RETURN_IF_ERROR(WaitForLastUse());
  device_ = std::move(device);
  mapped_ = std::move(mapped);
  std::byte* next = device_.get();
  workspace_.counters = reinterpret_cast<uint32_t*>(next);
  workspace_.launched = &launched_;
  workspace_.first_wins = reinterpret_cast<uint64_t*>(next += 256);
  workspace_.positions = reinterpret_cast<uint32_t*>(next += first_wins * sizeof(uint64_t));
  workspace_.leaders = reinterpret_cast<uint32_t*>(next += words);
  workspace_.unique_of = reinterpret_cast<uint32_t*>(next += words);
  workspace_.first_wins_size = static_cast<uint32_t>(first_wins);
  workspace_.max_positions = positions;
  workspace_.result = reinterpret_cast<cuda::QueryResult*>(mapped_.device());
  pooled_workspace_.counters = workspace_.counters + 16;
  pooled_workspace_.words = reinterpret_cast<uint64_t*>(workspace_.counters + 32);
  pooled_workspace_.result = reinterpret_cast<cuda::PooledResult*>(mapped_.device() + 64);
  workspace_.missing = reinterpret_cast<cuda::MissingKey*>(mapped_.device() + 256);
  result_ = reinterpret_cast<cuda::QueryResult*>(mapped_.get());
  missing_ = reinterpret_cast<cuda::MissingKey*>(mapped_.get() + 256);
  pooled_result_ = reinterpret_cast<cuda::PooledResult*>(mapped_.get() + 64);
  std::memset(mapped_.get(), 0, 256);
  size_.positions = positions;
  zeroed_ = false;
  stamp_ = 0;
  return OkStatus();
}

Status LookupWorkspace::AllocateStaging(size_t bytes) {
  HPS_ASSIGN_OR_RETURN(PinnedMemory pinned, PinnedMemory::Allocate(*context_, bytes, "missing rows of a lookup"));
  HPS_ASSIGN_OR_RETURN(DeviceMemory device, DeviceMemory::Allocate(*context_, bytes, "missing rows of a lookup"));
  staging_ = std::move(pinned);
  staging_device_ = std::move(device);
  size_.staging_bytes = bytes;
  return OkStatus();
}

Status LookupWorkspace::Reserve(uint32_t positions) {
  if (positions <= size_.positions) return OkStatus();
  if (positions > kMostPositions) {
    return InvalidArgument(std::to_string(positions) +
                           " keys in one lookup on a device; split it, 1073741824 is the most");
  }
  return AllocateQuery(positions);
}

Status LookupWorkspace::ShrinkTo(const WorkspaceSize& size) {
  HPS_RETURN_IF_ERROR(WaitForLastUse());
  if (size_.pooling_bytes > size.pooling_bytes) {
    splits_ = {};
    pooled_rows_ = {};
    size_.pooling_bytes = 0;
  }
  scratch_ = {};
  if (size_.positions > size.positions) HPS_RETURN_IF_ERROR(AllocateQuery(std::max(size.positions, 1u)));
  if (size_.staging_bytes <= size.staging_bytes) return OkStatus();
  if (size.staging_bytes > 0) return AllocateStaging(size.staging_bytes);
  staging_ = {};
  staging_device_ = {};
  size_.staging_bytes = 0;
  return OkStatus();
}

Status LookupWorkspace::Begin(DeviceStream stream) {
  HPS_RETURN_IF_ERROR(context_->CheckAlive());
  cuda::Device& device = context_->device();
  if (!idle()) HPS_RETURN_IF_ERROR(context_->Check(device.WaitEvent(stream, done_.get()), "ordering lookups"));
  in_use_ = true;
  recorded_ = false;
  // The dedup table tells queries apart by their stamps, which must not come again.
  if (!zeroed_ || stamp_ == ~uint32_t{0}) {
    int error = device.Zero(workspace_.counters, 256, stream);
    if (error == 0) error = device.Zero(workspace_.first_wins, workspace_.first_wins_size * sizeof(uint64_t), stream);
    HPS_RETURN_IF_ERROR(context_->Check(error, "preparing a lookup"));
    zeroed_ = true;
    launched_ = 0;
    if (stamp_ == ~uint32_t{0}) stamp_ = 0;
  }
  ++stamp_;
  return OkStatus();
}

Status LookupWorkspace::Query(std::span<const cuda::QueryPart> parts, DeviceStream stream) {
  HPS_RETURN_IF_ERROR(Begin(stream));
  return context_->Check(
      context_->device().Query(parts.data(), static_cast<int>(parts.size()), workspace_, stamp_, stream),
      "a query of the cache");
}

Status LookupWorkspace::PooledQuery(std::span<const cuda::PooledPart> parts, std::span<const cuda::IndexPart> indices,
                                    DeviceStream stream) {
  HPS_RETURN_IF_ERROR(Begin(stream));
  cuda::Device& device = context_->device();
  if (!indices.empty()) {
    HPS_RETURN_IF_ERROR(
        context_->Check(device.Splits(indices.data(), static_cast<int>(indices.size()), pooled_workspace_, stream),
                        "sorting keys by output rows"));
  }
  return context_->Check(
      device.PooledQuery(parts.data(), static_cast<int>(parts.size()), pooled_workspace_, stamp_, stream),
      "a pooled query of the cache");
}

Status LookupWorkspace::WaitFor(const uint64_t* done, DeviceStream stream, Deadline deadline,
                                const std::atomic<bool>* cancelled) {
  const std::atomic_ref<uint64_t> word(*const_cast<uint64_t*>(done));
  const auto arrived = [&] { return word.load(std::memory_order_acquire) >> 32 == stamp_; };
  const auto begin = Clock::now();
  auto now = begin;
  for (uint32_t turn = 1; !arrived(); ++turn) {
    if (now - begin < kSpin) {
      for (int i = 0; i < 32 && !arrived(); ++i) Pause();
      now = Clock::now();
      continue;
    }
    if (cancelled != nullptr && cancelled->load(std::memory_order_relaxed)) {
      return Cancelled("the caller gave the lookup up while it waited for the device");
    }
    now = Clock::now();
    if (now >= deadline) {
      return DeadlineExceeded("the lookup's deadline has passed while it waited for the device's stream");
    }
    // A kernel that died never says so in that word.
    if (turn % 16 == 0) {
      const int error = context_->device().QueryStream(stream);
      if (error == 0 && !arrived()) {
        return context_->Check(cuda::kErrorLaunchFailure, "a query of the cache has ended without a result");
      }
      if (error != 0 && error != cuda::kErrorNotReady) return context_->Check(error, "a query of the cache");
    }
    if (now - begin < kYield) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kSleep);
    }
  }
  return OkStatus();
}

Status LookupWorkspace::Wait(DeviceStream stream, Deadline deadline, const std::atomic<bool>* cancelled) {
  HPS_RETURN_IF_ERROR(WaitFor(&result_->done, stream, deadline, cancelled));
  missing_positions_ = static_cast<uint32_t>(result_->done);
  missing_keys_ = missing_positions_ == 0 ? 0 : result_->missing_keys;
  if (missing_positions_ > size_.positions || missing_keys_ > missing_positions_) {
    return context_->Check(cuda::kErrorLaunchFailure, "a query of the cache has given an impossible result");
  }
  in_use_ = missing_positions_ != 0;
  return OkStatus();
}

Status LookupWorkspace::WaitPooled(DeviceStream stream, Deadline deadline, const std::atomic<bool>* cancelled) {
  HPS_RETURN_IF_ERROR(WaitFor(&pooled_result_->done, stream, deadline, cancelled));
  const bool all_well = static_cast<uint32_t>(pooled_result_->done) == 0;
  missing_parts_ = all_well ? 0 : pooled_result_->missing_parts;
  mistake_ = cuda::UnpackMistake(all_well ? 0 : pooled_result_->mistake);
  in_use_ = !all_well;
  return OkStatus();
}

Status LookupWorkspace::Grow(DeviceMemory* memory, size_t bytes, std::string_view purpose) {
  if (bytes <= memory->bytes()) return OkStatus();
  HPS_ASSIGN_OR_RETURN(DeviceMemory larger, DeviceMemory::Allocate(*context_, bytes + bytes / 8, purpose));
  *memory = std::move(larger);
  size_.pooling_bytes = std::max(splits_.bytes(), pooled_rows_.bytes());
  return OkStatus();
}

Result<int64_t*> LookupWorkspace::Splits(size_t count) {
  if (count * sizeof(int64_t) > splits_.bytes()) HPS_RETURN_IF_ERROR(WaitForLastUse());
  HPS_RETURN_IF_ERROR(Grow(&splits_, count * sizeof(int64_t), "row_splits of pooled lookups"));
  return reinterpret_cast<int64_t*>(splits_.get());
}

Result<std::byte*> LookupWorkspace::PooledRows(size_t bytes) {
  // The query is done, and so is all that came before it.
  HPS_RETURN_IF_ERROR(Grow(&pooled_rows_, bytes, "rows of pooled lookups"));
  return pooled_rows_.get();
}

Status LookupWorkspace::Pool(std::span<const cuda::PooledPart> parts, DeviceStream stream) {
  in_use_ = true;
  recorded_ = false;
  return context_->Check(context_->device().Pool(parts.data(), static_cast<int>(parts.size()), stream),
                         "adding up rows");
}

Status LookupWorkspace::PrepareFill(size_t keys, size_t row_bytes, DeviceStream stream) {
  offsets_at_ = Aligned(row_bytes);
  outdated_at_ = offsets_at_ + Aligned(keys * sizeof(uint64_t));
  const size_t needed = StagingBytes(keys, row_bytes);
  // The query of this use is done, and what the last use left was in the stream before it: Query saw to that.
  if (needed > size_.staging_bytes) {
    HPS_RETURN_IF_ERROR(AllocateStaging(std::max(needed, std::min(2 * size_.staging_bytes, needed * 2))));
  }
  copies_ = needed > kReadInPlaceBytes;
  if (copies_) copier_.Begin(staging_.get(), staging_device_.get(), stream);
  return OkStatus();
}

Status LookupWorkspace::Fill(std::span<const cuda::QueryPart> parts, bool all_in_order,
                             std::span<const Outdated> outdated, DeviceStream stream) {
  cuda::Device& device = context_->device();
  auto* const keys = reinterpret_cast<Key*>(staging_.get() + outdated_at_);
  for (size_t i = 0; i < outdated.size(); ++i) keys[i] = outdated[i].key;
  if (copies_) HPS_RETURN_IF_ERROR(copier_.Finish(outdated_at_ + outdated.size() * sizeof(Key)));
  const std::byte* const staging = copies_ ? staging_device_.get() : staging_.device();
  cuda::FillRequest request;
  if (!all_in_order) request.row_offsets = reinterpret_cast<const uint64_t*>(staging + offsets_at_);
  request.staging = staging;
  request.missing_positions = missing_positions_;
  request.missing_keys = missing_keys_;
  HPS_RETURN_IF_ERROR(context_->Check(
      device.Fill(parts.data(), static_cast<int>(parts.size()), workspace_, request, stream), "filling a cache"));
  const auto* const device_keys = reinterpret_cast<const int64_t*>(staging + outdated_at_);
  for (size_t first = 0, last = 0; first < outdated.size(); first = last) {
    while (last < outdated.size() && outdated[last].table.buckets == outdated[first].table.buckets) ++last;
    HPS_RETURN_IF_ERROR(context_->Check(
        device.Erase(outdated[first].table, device_keys + first, static_cast<uint32_t>(last - first), stream),
        "taking outdated rows out of a cache"));
  }
  HPS_RETURN_IF_ERROR(context_->Check(device.RecordEvent(done_.get(), stream), "filling a cache"));
  recorded_ = true;
  context_->gate().NoteFill(done_.get());
  return OkStatus();
}

Status LookupWorkspace::End(DeviceStream stream) {
  if (!in_use_ || recorded_) return OkStatus();
  recorded_ = true;
  return context_->Check(context_->device().RecordEvent(done_.get(), stream), "ending a lookup");
}

}  // namespace hps
