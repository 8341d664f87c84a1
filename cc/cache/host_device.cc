// A stream is a queue and the thread that empties it. Locks: each for itself, none is held while another is taken.

#include "cc/cache/host_device.h"

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <thread>
#include <utility>

#include "cc/cache/host_pooling.h"

namespace hps {

// What holds streams back.
struct HostDevice::Gate {
  std::mutex mutex;
  std::condition_variable changed;
  bool hold = false;

  void Pass(const bool& held_stream) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return !hold && !held_stream; });
  }
};

struct HostDevice::Stream {
  Stream(std::shared_ptr<Gate> the_gate, const std::atomic<int>& the_lost)
      : gate(std::move(the_gate)), lost(the_lost), thread([this] { Run(); }) {}
  ~Stream() {
    {
      std::lock_guard lock(mutex);
      stopping = true;
    }
    changed.notify_all();
    thread.join();
  }
  void Run() {
    std::unique_lock lock(mutex);
    for (;;) {
      changed.wait(lock, [this] { return stopping || !queue.empty(); });
      if (queue.empty()) return;
      auto [work, always] = std::move(queue.front());
      queue.pop_front();
      lock.unlock();
      gate->Pass(held);
      if (always || lost.load() == 0) work();
      work = nullptr;
      lock.lock();
      ++done;
      changed.notify_all();
    }
  }
  void Push(std::function<void()> work, bool always) {
    {
      std::lock_guard lock(mutex);
      queue.emplace_back(std::move(work), always);
      ++queued;
    }
    changed.notify_all();
  }
  bool Idle() {
    std::lock_guard lock(mutex);
    return done == queued;
  }
  void Wait() {
    std::unique_lock lock(mutex);
    const uint64_t until = queued;
    changed.wait(lock, [&] { return done >= until; });
  }

  // 0 where the stream is not being captured.
  int SpoilCapture() {
    std::lock_guard lock(mutex);
    if (graph == nullptr) return 0;
    spoilt = true;
    return cuda::kErrorCaptureFirst;
  }
  bool Captures(std::function<void()>* work) {
    std::lock_guard lock(mutex);
    if (graph == nullptr) return false;
    graph->push_back(std::move(*work));
    return true;
  }

  const std::shared_ptr<Gate> gate;
  const std::atomic<int>& lost;
  bool held = false;  // guarded by the gate
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::pair<std::function<void()>, bool>> queue;
  uint64_t queued = 0;
  uint64_t done = 0;
  bool stopping = false;
  std::unique_ptr<HostGraph> graph;  // while being captured
  bool spoilt = false;
  std::thread thread;  // last: it uses the others
};

struct HostDevice::Event {
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    uint64_t recorded = 0;
    uint64_t done = 0;

    void Wait(uint64_t until) {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return done >= until; });
    }
  };
  std::shared_ptr<State> state = std::make_shared<State>();  // queued work outlives the event
};

HostDevice::HostDevice(const HostDeviceOptions& options) : gate_(std::make_shared<Gate>()) {
  info_.ordinal = options.ordinal;
  std::snprintf(info_.name, sizeof(info_.name), "host processor");
  info_.memory_bytes = options.memory_bytes;
}

HostDevice::~HostDevice() {
  Hold(false);
  default_stream_.reset();
  for (const auto& [memory, allocation] : memory_) std::free(memory);
}

void HostDevice::Hold(bool hold) {
  {
    std::lock_guard lock(gate_->mutex);
    gate_->hold = hold;
  }
  gate_->changed.notify_all();
}

void HostDevice::HoldStream(cudaStream_t stream, bool hold) {
  Stream* const held = StreamOf(stream);
  {
    std::lock_guard lock(gate_->mutex);
    held->held = hold;
  }
  gate_->changed.notify_all();
}

uint64_t HostDevice::allocations() const {
  std::lock_guard lock(mutex_);
  return memory_.size();
}

uint64_t HostDevice::allocated_bytes() const {
  std::lock_guard lock(mutex_);
  return device_bytes_;
}

uint64_t HostDevice::pinned_bytes() const {
  std::lock_guard lock(mutex_);
  return pinned_bytes_;
}

const char* HostDevice::ErrorText(int error) const {
  switch (error) {
    case 0: return "no error";
    case cuda::kErrorInvalidValue: return "invalid argument";
    case cuda::kErrorOutOfMemory: return "out of memory";
    case cuda::kErrorNotReady: return "device not ready";
    case cuda::kErrorUncorrectableMemory: return "uncorrectable ECC error encountered";
    case cuda::kErrorCaptureFirst: return "operation not permitted when stream is capturing";
    case cuda::kErrorLaunchFailure: return "unspecified launch failure";
    default: return "unknown error";
  }
}

int HostDevice::TakeMemory(size_t bytes, bool on_device, void** memory) {
  if (const int lost = lost_.load()) return lost;
  if (bytes == 0) return cuda::kErrorInvalidValue;
  uint64_t left = fail_allocation_.load();
  while (left > 0 && !fail_allocation_.compare_exchange_weak(left, left - 1)) continue;
  if (left == 1) return cuda::kErrorOutOfMemory;
  std::lock_guard lock(mutex_);
  if (on_device && (bytes > info_.memory_bytes || device_bytes_ > info_.memory_bytes - bytes)) {
    return cuda::kErrorOutOfMemory;
  }
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (*memory == nullptr) return cuda::kErrorOutOfMemory;
  std::memset(*memory, 0xCB, bytes);
  memory_[*memory] = {bytes, on_device};
  (on_device ? device_bytes_ : pinned_bytes_) += bytes;
  return 0;
}

void HostDevice::GiveMemory(void* memory) {
  if (memory == nullptr) return;
  std::lock_guard lock(mutex_);
  const auto found = memory_.find(memory);
  if (found == memory_.end()) std::abort();  // a bug of ours: no memory of this device, or freed twice
  (found->second.second ? device_bytes_ : pinned_bytes_) -= found->second.first;
  memory_.erase(found);
  std::free(memory);
}

int HostDevice::Allocate(size_t bytes, void** memory) { return TakeMemory(bytes, true, memory); }
void HostDevice::Free(void* memory) { GiveMemory(memory); }
int HostDevice::FreeMemory(uint64_t* bytes) {
  std::lock_guard lock(mutex_);
  *bytes = info_.memory_bytes - device_bytes_;
  return lost_.load();
}
int HostDevice::AllocateHost(size_t bytes, void** memory, void** device_address) {
  const int error = TakeMemory(bytes, false, memory);
  if (error == 0) *device_address = *memory;
  return error;
}
void HostDevice::FreeHost(void* memory) { GiveMemory(memory); }

HostDevice::Stream* HostDevice::StreamOf(cudaStream_t stream) {
  if (stream != nullptr) return reinterpret_cast<Stream*>(stream);
  std::lock_guard lock(mutex_);
  if (default_stream_ == nullptr) default_stream_ = std::make_unique<Stream>(gate_, lost_);
  return default_stream_.get();
}

int HostDevice::Enqueue(cudaStream_t stream, std::function<void()> work) {
  if (const int lost = lost_.load()) return lost;
  Stream* const to = StreamOf(stream);
  if (!to->Captures(&work)) to->Push(std::move(work), false);
  return 0;
}

int HostDevice::BeginCapture(cudaStream_t stream) {
  if (stream == nullptr) return cuda::kErrorCaptureFirst;
  Stream* const captured = StreamOf(stream);
  std::lock_guard lock(captured->mutex);
  if (captured->graph != nullptr) return cuda::kErrorInvalidValue;
  captured->graph = std::make_unique<HostGraph>();
  captured->spoilt = false;
  return 0;
}

int HostDevice::EndCapture(cudaStream_t stream, HostGraph* graph) {
  Stream* const captured = StreamOf(stream);
  std::lock_guard lock(captured->mutex);
  if (captured->graph == nullptr) return cuda::kErrorInvalidValue;
  *graph = std::move(*captured->graph);
  captured->graph = nullptr;
  return captured->spoilt ? cuda::kErrorCaptureInvalidated : 0;
}

int HostDevice::Replay(const HostGraph& graph, cudaStream_t stream) {
  for (const std::function<void()>& node : graph) {
    if (const int error = Enqueue(stream, node)) return error;
  }
  return 0;
}

int HostDevice::IsCapturing(cudaStream_t stream, bool* capturing) {
  if (const int lost = lost_.load()) return lost;
  Stream* const asked = StreamOf(stream);
  std::lock_guard lock(asked->mutex);
  *capturing = asked->graph != nullptr;
  return 0;
}

int HostDevice::EnqueueLaunch(Launch kind, cudaStream_t stream, std::function<void()> work) {
  const int error = Enqueue(stream, std::move(work));
  if (error == 0) launches_[kind].fetch_add(1);
  return error;
}

int HostDevice::CreateStream(cudaStream_t* stream) {
  if (const int lost = lost_.load()) return lost;
  auto made = std::make_shared<Stream>(gate_, lost_);
  *stream = reinterpret_cast<cudaStream_t>(made.get());
  std::lock_guard lock(mutex_);
  Stream* const raw = made.get();
  streams_.emplace(raw, std::move(made));
  return 0;
}
void HostDevice::DestroyStream(cudaStream_t stream) {
  std::shared_ptr<Stream> gone;  // ends when the lock has been given back
  std::lock_guard lock(mutex_);
  const auto place = streams_.find(reinterpret_cast<Stream*>(stream));
  if (place == streams_.end()) return;
  gone = std::move(place->second);
  streams_.erase(place);
}
int HostDevice::QueryStream(cudaStream_t stream) {
  if (const int lost = lost_.load()) return lost;
  if (const int error = StreamOf(stream)->SpoilCapture()) return error;
  return StreamOf(stream)->Idle() ? 0 : cuda::kErrorNotReady;
}
int HostDevice::SynchronizeStream(cudaStream_t stream) {
  if (const int error = StreamOf(stream)->SpoilCapture()) return error;
  StreamOf(stream)->Wait();
  return lost_.load();
}

int HostDevice::Synchronize() {
  std::vector<std::shared_ptr<Stream>> streams;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [raw, stream] : streams_) streams.push_back(stream);
  }
  StreamOf(nullptr)->Wait();
  for (const auto& stream : streams) stream->Wait();
  return lost_.load();
}

int HostDevice::CreateEvent(cudaEvent_t* event) {
  if (const int lost = lost_.load()) return lost;
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return 0;
}
void HostDevice::DestroyEvent(cudaEvent_t event) { delete reinterpret_cast<Event*>(event); }
int HostDevice::RecordEvent(cudaEvent_t event, cudaStream_t stream) {
  if (const int lost = lost_.load()) return lost;
  if (const int error = StreamOf(stream)->SpoilCapture()) return error;
  const auto state = reinterpret_cast<Event*>(event)->state;
  events_recorded_.fetch_add(1);
  uint64_t number = 0;
  {
    std::lock_guard lock(state->mutex);
    number = ++state->recorded;
  }
  StreamOf(stream)->Push(
      [state, number] {
        {
          std::lock_guard lock(state->mutex);
          if (state->done < number) state->done = number;
        }
        state->changed.notify_all();
      },
      true);
  return 0;
}
int HostDevice::QueryEvent(cudaEvent_t event) {
  if (const int lost = lost_.load()) return lost;
  const auto state = reinterpret_cast<Event*>(event)->state;
  std::lock_guard lock(state->mutex);
  return state->done == state->recorded ? 0 : cuda::kErrorNotReady;
}
int HostDevice::SynchronizeEvent(cudaEvent_t event) {
  const auto state = reinterpret_cast<Event*>(event)->state;
  uint64_t until = 0;
  {
    std::lock_guard lock(state->mutex);
    until = state->recorded;
  }
  state->Wait(until);
  return lost_.load();
}
int HostDevice::WaitEvent(cudaStream_t stream, cudaEvent_t event) {
  if (const int error = StreamOf(stream)->SpoilCapture()) return error;
  const auto state = reinterpret_cast<Event*>(event)->state;
  uint64_t until = 0;
  {
    std::lock_guard lock(state->mutex);
    until = state->recorded;
  }
  return Enqueue(stream, [state, until] { state->Wait(until); });
}

int HostDevice::Copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  copies_.fetch_add(1);
  return Enqueue(stream, [=] { std::memcpy(to, from, bytes); });
}
int HostDevice::Zero(void* memory, size_t bytes, cudaStream_t stream) {
  return Enqueue(stream, [=] { std::memset(memory, 0, bytes); });
}

int HostDevice::Clear(const cuda::CacheTable& table, cudaStream_t stream) {
  if (const int error = CheckTable(table)) return error;
  return EnqueueLaunch(kClear, stream, [=, this] { HostClear(table, locks_); });
}
int HostDevice::Query(const cuda::QueryPart* parts, int num_parts, const cuda::QueryWorkspace& workspace,
                      uint32_t stamp, cudaStream_t stream) {
  if (num_parts < 0) return cuda::kErrorInvalidValue;
  std::vector<cuda::QueryPart> copy(parts, parts + num_parts);
  if (const int error = CheckQuery(copy, workspace, stamp)) return error;
  return EnqueueLaunch(kQuery, stream,
                       [=, this, copy = std::move(copy)] { HostQuery(copy, workspace, stamp, locks_); });
}
int HostDevice::UntoldQuery(const cuda::QueryPart* parts, int num_parts, cudaStream_t stream) {
  if (num_parts < 0 || num_parts > cuda::kMaxQueryParts) return cuda::kErrorInvalidValue;
  std::vector<cuda::QueryPart> copy(parts, parts + num_parts);
  for (const cuda::QueryPart& part : copy) {
    if (const int error = CheckTable(part.table)) return error;
  }
  return EnqueueLaunch(kQuery, stream, [=, this, copy = std::move(copy)] { HostUntoldQuery(copy, locks_); });
}
int HostDevice::Fill(const cuda::QueryPart* parts, int num_parts, const cuda::QueryWorkspace& workspace,
                     const cuda::FillRequest& request, cudaStream_t stream) {
  if (num_parts < 0 || num_parts > cuda::kMaxQueryParts) return cuda::kErrorInvalidValue;
  if (request.missing_positions == 0) return 0;
  const auto asks = [](const cuda::QueryPart& part) { return part.count > 0; };
  if (request.row_offsets == nullptr && std::count_if(parts, parts + num_parts, asks) != 1) {
    return cuda::kErrorInvalidValue;
  }
  std::vector<cuda::QueryPart> copy(parts, parts + num_parts);
  return EnqueueLaunch(kFill, stream,
                       [=, this, copy = std::move(copy)] { HostFill(copy, workspace, request, locks_); });
}
int HostDevice::Insert(const cuda::CacheTable& table, const int64_t* keys, const void* rows, uint32_t count, bool spill,
                       uint32_t* evicted, cudaStream_t stream) {
  if (const int error = CheckTable(table)) return error;
  if (count == 0) return 0;
  return EnqueueLaunch(kInsert, stream, [=, this] { HostInsert(table, keys, rows, count, spill, evicted, locks_); });
}
int HostDevice::Update(const cuda::CacheTable& table, const int64_t* keys, const void* rows, uint32_t count,
                       cudaStream_t stream) {
  if (const int error = CheckTable(table)) return error;
  if (count == 0) return 0;
  return EnqueueLaunch(kUpdate, stream, [=, this] { HostUpdate(table, keys, rows, count, locks_); });
}
int HostDevice::Erase(const cuda::CacheTable& table, const int64_t* keys, uint32_t count, cudaStream_t stream) {
  if (const int error = CheckTable(table)) return error;
  if (count == 0) return 0;
  return EnqueueLaunch(kErase, stream, [=, this] { HostErase(table, keys, count, locks_); });
}
int HostDevice::Exchange(const cuda::CacheTable& table, uint64_t first, uint64_t last, cudaStream_t stream) {
  if (CheckTable(table) != 0 || first > last || last > table.num_buckets) return cuda::kErrorInvalidValue;
  if (first == last || table.device_ways == cuda::kCacheWays) return 0;
  return EnqueueLaunch(kExchange, stream, [=, this] { HostExchange(table, first, last, locks_); });
}
int HostDevice::Dump(const cuda::CacheTable& table, uint64_t first, uint64_t last, int64_t* keys, uint32_t* count,
                     cudaStream_t stream) {
  if (CheckTable(table) != 0 || first > last || last > table.num_buckets) return cuda::kErrorInvalidValue;
  if (first == last) return 0;
  return EnqueueLaunch(kDump, stream, [=, this] { HostDump(table, first, last, keys, count, locks_); });
}

int HostDevice::Widen(const cuda::WidenPart* parts, int num_parts, cudaStream_t stream) {
  if (num_parts < 0 || num_parts > cuda::kMaxQueryParts) return cuda::kErrorInvalidValue;
  std::vector<cuda::WidenPart> copy(parts, parts + num_parts);
  return EnqueueLaunch(kWiden, stream, [copy = std::move(copy)] { HostWiden(copy); });
}
int HostDevice::Splits(const cuda::IndexPart* parts, int num_parts, const cuda::PooledWorkspace& workspace,
                       cudaStream_t stream) {
  if (const int error = CheckSplits(parts, num_parts)) return error;
  std::vector<HostIndexPart> copy;
  for (int i = 0; i < num_parts; ++i) {
    copy.push_back({parts[i], {parts[i].dense_shape, parts[i].dense_shape + parts[i].rank}});
  }
  return EnqueueLaunch(kSplits, stream, [workspace, copy = std::move(copy)] { HostSplits(copy, workspace); });
}
int HostDevice::PooledQuery(const cuda::PooledPart* parts, int num_parts, const cuda::PooledWorkspace& workspace,
                            uint32_t stamp, cudaStream_t stream) {
  if (num_parts < 0) return cuda::kErrorInvalidValue;
  std::vector<cuda::PooledPart> copy(parts, parts + num_parts);
  if (const int error = CheckPooled(copy, stamp)) return error;
  return EnqueueLaunch(kPooledQuery, stream,
                       [=, this, copy = std::move(copy)] { HostPooledQuery(copy, workspace, stamp, locks_); });
}
int HostDevice::Pool(const cuda::PooledPart* parts, int num_parts, cudaStream_t stream) {
  if (num_parts < 0 || num_parts > cuda::kMaxQueryParts) return cuda::kErrorInvalidValue;
  std::vector<cuda::PooledPart> copy(parts, parts + num_parts);
  return EnqueueLaunch(kPool, stream, [copy = std::move(copy)] { HostPool(copy); });
}

}  // namespace hps
