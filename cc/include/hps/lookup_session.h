// LookupSession: keys in, rows out, with a report of where each row came from.
//
// A call may ask several tables of one model; all of them are answered from the same version of the model, also while
// it is being replaced. Results are complete or the call fails: on error the output buffers hold nothing of value.
//
// Thread safety: one session may be used from any number of threads at once; sessions are cheap to copy.

#ifndef HPS_LOOKUP_SESSION_H_
#define HPS_LOOKUP_SESSION_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hps/embedding_cache.h"
#include "hps/executor.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

enum class Combiner { kSum, kMean, kSqrtn };

// Every field is per call. The row of a key that no tier holds is the table's default value in every element.
struct DenseLookup {
  uint32_t table = 0;         // index of the table in its model
  uint32_t width = 0;         // must be the table's
  std::span<const Key> keys;  // (n)
  float* rows = nullptr;      // (n, width), written
  bool* found = nullptr;      // (n), written unless nullptr: true where a tier held the key
};

// Output row r combines the rows of keys[row_splits[r]] .. keys[row_splits[r + 1] - 1]; no keys give zeros.
// Without weights the additions are made in the order of TensorFlow 2.21's CPU kernel, so the result is bit-equal to
// tf.nn.embedding_lookup_sparse. With weights: sum(w x), sum(w x) / sum(w), sum(w x) / sqrt(sum(w^2)), accumulated in
// double; a denominator of zero gives zeros.
struct SparseLookup {
  uint32_t table = 0;
  uint32_t width = 0;
  std::span<const Key> keys;            // (n)
  std::span<const int64_t> row_splits;  // (rows + 1); ascending, first 0, last n
  std::span<const float> weights;       // (n), or empty
  Combiner combiner = Combiner::kMean;
  float* output = nullptr;  // (rows, width), written
};

// One table's part of a lookup on a device, over the model's caches there. Both arrays are memory of that device.
struct DeviceLookupPart {
  uint32_t table = 0;
  uint32_t width = 0;          // must be the table's
  uint32_t key_bytes = 8;      // 8: int64 keys, 4: int32 keys
  const void* keys = nullptr;  // (count)
  uint32_t count = 0;
  float* rows = nullptr;     // (count, width), written
  Key* wide_keys = nullptr;  // (count), overwritten; where key_bytes is 4
  // Keys and rows of several tables may lie side by side, as [samples, tables] and [samples, tables, width].
  uint32_t key_stride = 1;  // from one key to the next, in keys
  uint32_t row_stride = 0;  // from one row to the next, in values, at least width; 0: width
};

// SparseLookup on a device. All arrays are memory of that device, but for dense_shape. Output rows are told either by
// row_splits or by a SparseTensor's indices. Nothing outside the arrays is read or written, whatever these hold.
struct DeviceSparsePart {
  uint32_t table = 0;
  uint32_t width = 0;          // must be the table's
  uint32_t key_bytes = 8;      // 8: int64 keys, 4: int32 keys
  const void* keys = nullptr;  // (count)
  Key* wide_keys = nullptr;    // (count), overwritten; where key_bytes is 4
  uint32_t count = 0;
  uint32_t rows = 0;                     // output rows
  const int64_t* row_splits = nullptr;   // (rows + 1); ascending, first 0, last count; or:
  const int64_t* indices = nullptr;      // (count, rank); column 0 is the output row and does not descend
  uint32_t rank = 0;                     // at most 254
  const int64_t* dense_shape = nullptr;  // (rank), memory of the host: bounds of the indices; the first one is `rows`
  const float* weights = nullptr;        // (count), or nullptr
  Combiner combiner = Combiner::kMean;
  float* output = nullptr;  // (rows, width), written
};

// Where the rows of a call came from; keys are counted with repetitions.
struct LookupReport {
  uint64_t keys = 0;
  uint64_t rows_from_volatile = 0;
  uint64_t rows_from_persistent = 0;
  uint64_t rows_from_default = 0;
  // Of rows_from_default: a tier that may hold the row could not be asked (when_unavailable is "default").
  uint64_t rows_unavailable = 0;
  // Rows that were not asked of a tier, or not obtained, because it could not be asked.
  uint64_t rows_skipped_volatile = 0;
  uint64_t rows_skipped_persistent = 0;
  uint64_t volatile_nanoseconds = 0;
  uint64_t persistent_nanoseconds = 0;
  // Lookups over a device cache. There `keys` is the sum of these four and the first three rows_from_ above, which
  // count each key that the cache missed once.
  uint64_t rows_from_cache = 0;
  uint64_t rows_deferred = 0;  // keys that got the default value and are inserted later (hit_rate_threshold)
  uint64_t rows_repeated = 0;  // further positions of keys that the cache missed
  uint64_t rows_unwaited = 0;  // of static caches: nobody waited to know which of them were there
};

struct LookupOptions {
  Executor* executor = nullptr;                  // absent: the server's own pool
  Deadline deadline = kNoDeadline;               // absent: the configuration's lookup_timeout_ms from now on
  const std::atomic<bool>* cancelled = nullptr;  // becomes true when the caller gives up: kCancelled
};

class ModelSlot;

class LookupSession {
 public:
  // Errors of all four: kInvalidArgument (no such table, another width, bad row_splits, weights of another length),
  // kOutOfRange (a key beyond 32 bits where supportlonglong is false), kNotFound (the model was unloaded),
  // kFailedPrecondition (the server was closed), kDeadlineExceeded, kCancelled, and what the tiers report, where
  // `when_unavailable` does not let the lookup go on without a tier that is down or too slow.
  Status Lookup(std::span<const DenseLookup> lookups, const LookupOptions& options = {},
                LookupReport* report = nullptr) const;
  Status LookupSparse(std::span<const SparseLookup> lookups, const LookupOptions& options = {},
                      LookupReport* report = nullptr) const;

  // Whether the model's lookups on the device are served there: false where the model has no caches at all ("gpucache"
  // is false, no devices), so that lookups have to go through host memory. kInvalidArgument where it has caches on
  // other devices only.
  Result<bool> IsServedOnDevice(int device) const;

  // The same on a device of the model's deployed_device_list, on the caller's stream. The call returns when all its
  // work is on the stream; the rows are complete when the stream has passed it, and until then keys and rows must stay.
  // Answers are exact unless the model has a hit_rate_threshold (embedding_cache.h, rows_deferred of the report).
  // options.executor has no effect: rows that the cache misses are fetched by the server's own threads.
  //
  // While the stream is being captured into a CUDA graph: a call whose tables all have static caches is captured (one
  // launch for each 48 tables, and one that widens int32 keys). Each replay looks up the keys that then lie at `keys`,
  // writes `rows`, and sees all updates made before it. Capture in mode 'thread local' or 'relaxed', since the server's
  // own threads use the device. A graph is bound to the version of the model that it was captured from: destroy it
  // before that version is replaced, unloaded or closed, and load no model during a capture. What replays look up is in
  // no counter but rows_defaulted of the cache.
  // Any other call is refused with kFailedPrecondition before it has touched the stream, and the capture stays good.
  //
  // Further errors: kInvalidArgument (no cache on the device, keys of another size, int32 keys without wide_keys),
  // kResourceExhausted (no memory on the device for a batch of this size), and for ever after a device has failed its
  // failure, kInternal or kDataLoss; lookups in host memory and on other devices go on. Where supportlonglong is false
  // a key beyond 32 bits is kOutOfRange only if the lookup waits for it, and has the default value otherwise.
  Status LookupOnDevice(int device, std::span<const DeviceLookupPart> lookups, DeviceStream stream,
                        const LookupOptions& options = {}, LookupReport* report = nullptr) const;

  // The sums are those of LookupSparse to the bit, also where rows come from different places. The call waits until the
  // device has found and added up the rows (or knows what is missing), for static caches too: bad row_splits and
  // indices are kInvalidArgument, with the first bad position. Where keys of a table are missing, the rows of that
  // table's keys are brought together in memory of the device and added up from there. Because it waits it is refused
  // while the stream is being captured into a CUDA graph (kFailedPrecondition).
  Status LookupSparseOnDevice(int device, std::span<const DeviceSparsePart> lookups, DeviceStream stream,
                              const LookupOptions& options = {}, LookupReport* report = nullptr) const;

  // Index of a table by name; kNotFound lists the names there are.
  Result<uint32_t> FindTable(std::string_view name) const;
  // Names and widths of the model's tables, in order.
  struct TableInfo {
    std::string name;
    uint32_t width = 0;
  };
  Result<std::vector<TableInfo>> Tables() const;

 private:
  friend class ParameterServer;
  explicit LookupSession(std::shared_ptr<const ModelSlot> slot) : slot_(std::move(slot)) {}
  std::shared_ptr<const ModelSlot> slot_;
};

}  // namespace hps

#endif  // HPS_LOOKUP_SESSION_H_
