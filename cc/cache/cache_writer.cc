// A piece in a buffer: a word for the number of evictions, the keys, the rows, each begun at a multiple of 16. Buffers
// are used in turn, and are free again when their event is done.
// Lock order: mutex_, the gate's.

#include "cc/cache/cache_writer.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cc/base/hash.h"

namespace hps {
namespace {

constexpr size_t kKeysAt = 16;

size_t RowsAt(size_t count) { return kKeysAt + (count * sizeof(Key) + 15) / 16 * 16; }

}  // namespace

Result<std::shared_ptr<CacheWriter>> CacheWriter::Open(std::shared_ptr<DeviceContext> context, size_t piece_bytes) {
  std::shared_ptr<CacheWriter> writer(new CacheWriter(std::move(context)));
  writer->piece_bytes_ = std::max<size_t>(piece_bytes, 256);
  DeviceContext& device = *writer->context_;
  HPS_ASSIGN_OR_RETURN(writer->stream_, OwnedStream::Create(device));
  HPS_ASSIGN_OR_RETURN(writer->written_, OwnedEvent::Create(device));
  for (Buffer& buffer : writer->buffers_) {
    HPS_ASSIGN_OR_RETURN(buffer.pinned, PinnedMemory::Allocate(device, writer->piece_bytes_, "writes to caches"));
    HPS_ASSIGN_OR_RETURN(buffer.device, DeviceMemory::Allocate(device, writer->piece_bytes_, "writes to caches"));
    HPS_ASSIGN_OR_RETURN(buffer.done, OwnedEvent::Create(device));
  }
  return writer;
}

CacheWriter::~CacheWriter() {
  if (stream_.get() != nullptr) (void)context_->device().SynchronizeStream(stream_.get());
}

void CacheWriter::CountEvictions(Buffer& buffer) {
  if (buffer.evicted_of == nullptr) return;
  uint32_t evicted = 0;
  std::memcpy(&evicted, buffer.pinned.get(), sizeof(evicted));
  buffer.evicted_of->evicted.fetch_add(evicted, std::memory_order_relaxed);
  buffer.evicted_of = nullptr;
}

Result<CacheWriter::Buffer*> CacheWriter::NextBuffer(size_t bytes) {
  HPS_RETURN_IF_ERROR(context_->CheckAlive());
  Buffer& buffer = buffers_[next_];
  HPS_RETURN_IF_ERROR(
      context_->Check(context_->device().SynchronizeEvent(buffer.done.get()), "an earlier write to a cache"));
  CountEvictions(buffer);
  if (buffer.pinned.bytes() < bytes) {  // a row that is larger than a piece
    HPS_ASSIGN_OR_RETURN(PinnedMemory pinned, PinnedMemory::Allocate(*context_, bytes, "writes to caches"));
    HPS_ASSIGN_OR_RETURN(DeviceMemory device, DeviceMemory::Allocate(*context_, bytes, "writes to caches"));
    buffer.pinned = std::move(pinned);
    buffer.device = std::move(device);
  }
  next_ = (next_ + 1) % buffers_.size();
  return &buffer;
}

// Of a key that occurs twice among [first, first + count) the later row counts: a launch serves keys in no order.
void CacheWriter::FindRepeated(std::span<const Key> keys) {
  repeated_.assign(keys.size(), false);
  const size_t places = std::bit_ceil(2 * keys.size());
  last_seen_.assign(places, 0);
  for (size_t i = keys.size(); i-- > 0;) {
    size_t place = SlotHash(static_cast<uint64_t>(keys[i])) & (places - 1);
    while (last_seen_[place] != 0 && keys[last_seen_[place] - 1] != keys[i]) place = (place + 1) & (places - 1);
    if (last_seen_[place] != 0) {
      repeated_[i] = true;
    } else {
      last_seen_[place] = static_cast<uint32_t>(i + 1);
    }
  }
}

size_t CacheWriter::Pack(const Write& write, size_t first, size_t count, std::byte* to) {
  std::memset(to, 0, kKeysAt);
  if (write.kind == Kind::kErase) {
    std::memcpy(to + kKeysAt, write.keys.data() + first, count * sizeof(Key));
    return count;
  }
  const bool overwrites = write.kind != Kind::kInsert;
  if (overwrites) FindRepeated(write.keys.subspan(first, count));
  const size_t row_bytes = write.cache->table.row_bytes;
  std::byte* const rows = to + RowsAt(count);
  size_t packed = 0;
  for (size_t i = 0; i < count; ++i) {
    if (overwrites && repeated_[i]) continue;
    std::memcpy(to + kKeysAt + packed * sizeof(Key), &write.keys[first + i], sizeof(Key));
    std::memcpy(rows + packed * row_bytes, write.rows.data + (first + i) * write.rows.stride_bytes, row_bytes);
    ++packed;
  }
  return packed;
}

size_t CacheWriter::LeaveOutUpdated(const Write& write, size_t count, std::byte* packed, std::byte* rows) const {
  const UpdateGate& gate = context_->gate();
  const size_t row_bytes = write.cache->table.row_bytes;
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    Key key = 0;
    std::memcpy(&key, packed + kKeysAt + i * sizeof(Key), sizeof(Key));
    if (gate.UpdatedSince(write.cache->number, key, write.read_at)) continue;
    if (kept != i) {
      std::memcpy(packed + kKeysAt + kept * sizeof(Key), &key, sizeof(Key));
      std::memcpy(rows + kept * row_bytes, rows + i * row_bytes, row_bytes);
    }
    ++kept;
  }
  write.counters->outdated.fetch_add(count - kept, std::memory_order_relaxed);
  return kept;
}

Status CacheWriter::RunPiece(const Write& write, size_t first, size_t count) {
  const WrittenCache& cache = *write.cache;
  const size_t rows_at = RowsAt(count);
  const size_t bytes = rows_at + (write.kind == Kind::kErase ? 0 : count * cache.table.row_bytes);
  HPS_ASSIGN_OR_RETURN(Buffer * buffer, NextBuffer(bytes));
  std::byte* const packed = buffer->pinned.get();
  cuda::Device& device = context_->device();
  const cudaStream_t stream = stream_.get();
  const auto* keys = reinterpret_cast<const int64_t*>(buffer->device.get() + kKeysAt);
  const std::byte* const rows = buffer->device.get() + rows_at;
  size_t kept = Pack(write, first, count, packed);

  UpdateGate& gate = context_->gate();
  std::lock_guard gate_lock(gate.mutex());
  if (write.kind == Kind::kInsert || write.kind == Kind::kRefresh) {
    kept = LeaveOutUpdated(write, kept, packed, packed + rows_at);
    if (kept == 0) return OkStatus();
  } else {
    gate.NoteUpdates(cache.number, write.keys.subspan(first, count));
    HPS_RETURN_IF_ERROR(context_->Check(gate.WaitForFills(device, stream), "waiting for lookups"));
  }
  HPS_RETURN_IF_ERROR(
      context_->Check(device.Copy(buffer->device.get(), packed, bytes, stream), "copying rows to the device"));
  const auto number = static_cast<uint32_t>(kept);
  int error = 0;
  switch (write.kind) {
    case Kind::kInsert:
      error = device.Insert(cache.table, keys, rows, number, cache.spill,
                            reinterpret_cast<uint32_t*>(buffer->device.get()), stream);
      if (error == 0) error = device.Copy(packed, buffer->device.get(), sizeof(uint32_t), stream);
      buffer->evicted_of = write.counters;
      write.counters->inserted.fetch_add(kept, std::memory_order_relaxed);
      break;
    case Kind::kUpdate:
      error = device.Update(cache.table, keys, rows, number, stream);
      write.counters->updated.fetch_add(kept, std::memory_order_relaxed);
      break;
    case Kind::kRefresh:
      error = device.Update(cache.table, keys, rows, number, stream);
      write.counters->refreshed.fetch_add(kept, std::memory_order_relaxed);
      break;
    case Kind::kErase:
      error = device.Erase(cache.table, keys, number, stream);
      write.counters->erased.fetch_add(kept, std::memory_order_relaxed);
  }
  // Recorded also behind a failure: what was queued before it may still read the buffer.
  const int recorded = device.RecordEvent(buffer->done.get(), stream);
  return context_->Check(error != 0 ? error : recorded, "a write to a cache");
}

Status CacheWriter::Run(const Write& write) {
  if (write.keys.empty()) return OkStatus();
  const size_t row_bytes = write.kind == Kind::kErase ? 0 : write.cache->table.row_bytes;
  const size_t space = piece_bytes_ - std::min(piece_bytes_, kKeysAt + 16);
  const size_t most = std::max<size_t>(space / (sizeof(Key) + row_bytes), 1);
  std::lock_guard lock(mutex_);
  for (size_t first = 0; first < write.keys.size(); first += most) {
    HPS_RETURN_IF_ERROR(RunPiece(write, first, std::min(most, write.keys.size() - first)));
  }
  return OkStatus();
}

Status CacheWriter::Insert(const WrittenCache& cache, std::span<const Key> keys, ConstRowBuffer rows, uint64_t read_at,
                           WriteCounters* counters) {
  return Run({Kind::kInsert, &cache, keys, rows, read_at, counters});
}
Status CacheWriter::Update(const WrittenCache& cache, std::span<const Key> keys, ConstRowBuffer rows,
                           WriteCounters* counters) {
  return Run({Kind::kUpdate, &cache, keys, rows, 0, counters});
}
Status CacheWriter::Refresh(const WrittenCache& cache, std::span<const Key> keys, ConstRowBuffer rows, uint64_t read_at,
                            WriteCounters* counters) {
  return Run({Kind::kRefresh, &cache, keys, rows, read_at, counters});
}
Status CacheWriter::Erase(const WrittenCache& cache, std::span<const Key> keys, WriteCounters* counters) {
  return Run({Kind::kErase, &cache, keys, {}, 0, counters});
}

void CacheWriter::TryExchange(const WrittenCache& cache, uint64_t num_buckets, uint64_t* next) {
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || !context_->CheckAlive().ok()) return;
  uint64_t left = std::min(num_buckets, cache.table.num_buckets);
  while (left > 0) {
    const uint64_t last = std::min(*next + left, cache.table.num_buckets);
    (void)context_->Check(context_->device().Exchange(cache.table, *next, last, stream_.get()), "exchanging rows");
    left -= last - *next;
    *next = last == cache.table.num_buckets ? 0 : last;
  }
}

Status CacheWriter::Dump(const cuda::CacheTable& table, uint64_t first, uint64_t last, std::vector<Key>* keys) {
  constexpr size_t kBucketBytes = cuda::kCacheWays * sizeof(Key);
  const uint64_t most = std::max<uint64_t>((piece_bytes_ - kKeysAt) / kBucketBytes, 1);
  cuda::Device& device = context_->device();
  std::lock_guard lock(mutex_);
  for (uint64_t begin = first; begin < last; begin += most) {
    const uint64_t end = std::min(last, begin + most);
    const size_t bytes = kKeysAt + (end - begin) * kBucketBytes;
    HPS_ASSIGN_OR_RETURN(Buffer * buffer, NextBuffer(bytes));
    auto* const count = reinterpret_cast<uint32_t*>(buffer->device.get());
    int error = device.Zero(count, bytes, stream_.get());  // all of it is copied, however many keys there are
    if (error == 0) {
      error = device.Dump(table, begin, end, reinterpret_cast<int64_t*>(buffer->device.get() + kKeysAt), count,
                          stream_.get());
    }
    if (error == 0) error = device.Copy(buffer->pinned.get(), buffer->device.get(), bytes, stream_.get());
    if (error == 0) error = device.SynchronizeStream(stream_.get());
    HPS_RETURN_IF_ERROR(context_->Check(error, "listing the keys of a cache"));
    uint32_t found = 0;
    std::memcpy(&found, buffer->pinned.get(), sizeof(found));
    const auto* dumped = reinterpret_cast<const Key*>(buffer->pinned.get() + kKeysAt);
    keys->insert(keys->end(), dumped, dumped + found);
  }
  return OkStatus();
}

Status CacheWriter::Clear(const cuda::CacheTable& table) {
  std::lock_guard lock(mutex_);
  HPS_RETURN_IF_ERROR(context_->CheckAlive());
  return context_->Check(context_->device().Clear(table, stream_.get()), "emptying a cache");
}

Status CacheWriter::Upload(std::byte* to, std::span<const std::byte> from) {
  cuda::Device& device = context_->device();
  std::lock_guard lock(mutex_);
  for (size_t first = 0; first < from.size(); first += piece_bytes_) {
    const size_t bytes = std::min(piece_bytes_, from.size() - first);
    HPS_ASSIGN_OR_RETURN(Buffer * buffer, NextBuffer(bytes));
    std::memcpy(buffer->pinned.get(), from.data() + first, bytes);
    int error = device.Copy(to + first, buffer->pinned.get(), bytes, stream_.get());
    const int recorded = device.RecordEvent(buffer->done.get(), stream_.get());
    HPS_RETURN_IF_ERROR(context_->Check(error != 0 ? error : recorded, "copying a table to the device"));
  }
  return OkStatus();
}

Status CacheWriter::Download(void* to, const void* from, size_t bytes) {
  cuda::Device& device = context_->device();
  std::lock_guard lock(mutex_);
  HPS_RETURN_IF_ERROR(context_->CheckAlive());
  HPS_ASSIGN_OR_RETURN(Buffer * buffer, NextBuffer(bytes));
  int error = device.Copy(buffer->pinned.get(), from, bytes, stream_.get());
  if (error == 0) error = device.SynchronizeStream(stream_.get());
  HPS_RETURN_IF_ERROR(context_->Check(error, "reading from the device"));
  std::memcpy(to, buffer->pinned.get(), bytes);
  return OkStatus();
}

Status CacheWriter::Flush() {
  std::lock_guard lock(mutex_);
  // Also where the device has failed: nothing may use the memory that is freed next.
  HPS_RETURN_IF_ERROR(
      context_->Check(context_->device().SynchronizeStream(stream_.get()), "waiting for writes to caches"));
  for (Buffer& buffer : buffers_) CountEvictions(buffer);
  return OkStatus();
}

Status CacheWriter::OrderAfterWrites(DeviceStream stream) {
  std::lock_guard lock(mutex_);
  HPS_RETURN_IF_ERROR(context_->CheckAlive());
  HPS_RETURN_IF_ERROR(
      context_->Check(context_->device().RecordEvent(written_.get(), stream_.get()), "ordering after writes"));
  return context_->Check(context_->device().WaitEvent(stream, written_.get()), "ordering after writes");
}

}  // namespace hps
