// LookupWorkspace: what one lookup needs on a device from its query to its fill. WorkspacePool lends them.
//
// A query's part has a size for so many positions (keys of a call, repetitions counted), the fill's part (staging) for
// so many missing keys and bytes of rows. Both grow on demand; a growth that fails leaves what was there.
//
// Thread safety: one user at a time. The work of one use may still be on its stream when the next one begins on
// another; Begin and PrepareFill wait for what they must.

#ifndef HPS_CACHE_LOOKUP_WORKSPACE_H_
#define HPS_CACHE_LOOKUP_WORKSPACE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cc/cache/device_context.h"
#include "cc/cache/row_source.h"
#include "cc/cache/staging_copier.h"

namespace hps {

struct WorkspaceSize {
  uint32_t positions = 0;
  size_t staging_bytes = 0;
  size_t pooling_bytes = 0;  // of either kind of memory for pooled lookups
};

class LookupWorkspace {
 public:
  static constexpr uint64_t kMostPositions = uint64_t{1} << 30;
  // Staging for so many missing keys and bytes of rows.
  static size_t StagingBytes(size_t keys, size_t row_bytes);
  // Memory of the device that a workspace of the size takes.
  static size_t DeviceBytes(const WorkspaceSize& size);
  // Pinned memory of the host, likewise.
  static size_t PinnedBytes(const WorkspaceSize& size);

  static Result<std::unique_ptr<LookupWorkspace>> Make(std::shared_ptr<DeviceContext> context,
                                                       const WorkspaceSize& size);
  // Waits for the work of the last use.
  ~LookupWorkspace();

  const WorkspaceSize& size() const { return size_; }
  size_t device_bytes() const {
    return device_.bytes() + staging_device_.bytes() + splits_.bytes() + pooled_rows_.bytes();
  }
  // Whether the work of the last use is done.
  bool idle();
  Status WaitForLastUse();

  // Makes room for a query of so many positions.
  Status Reserve(uint32_t positions);
  // Back to `size` where it is larger; waits for the last use.
  Status ShrinkTo(const WorkspaceSize& size);

  // Begins a use on the stream, launches the query.
  Status Query(std::span<const cuda::QueryPart> parts, DeviceStream stream);
  // Waits for the query's word in mapped memory and for nothing else. An error of the device ends the wait, as do
  // deadline and cancellation; then the stream may still be writing.
  Status Wait(DeviceStream stream, Deadline deadline, const std::atomic<bool>* cancelled);
  // After Wait.
  uint32_t missing_positions() const { return missing_positions_; }
  std::span<const cuda::MissingKey> missing() const { return {missing_, missing_keys_}; }

  // Memory for row_splits that pooled lookups make of indices; before PooledQuery. May wait for the last use.
  Result<int64_t*> Splits(size_t count);
  // Begins a use on the stream: makes row_splits where `indices` has parts, and launches the pooled query.
  Status PooledQuery(std::span<const cuda::PooledPart> parts, std::span<const cuda::IndexPart> indices,
                     DeviceStream stream);
  // As Wait.
  Status WaitPooled(DeviceStream stream, Deadline deadline, const std::atomic<bool>* cancelled);
  // After WaitPooled: a bit for each part with missing keys, and what is wrong with the segments.
  uint64_t missing_parts() const { return missing_parts_; }
  const cuda::FirstMistake& mistake() const { return mistake_; }
  // Memory for rows of keys, after WaitPooled; and adding them up, behind what has brought them there.
  Result<std::byte*> PooledRows(size_t bytes);
  Status Pool(std::span<const cuda::PooledPart> parts, DeviceStream stream);

  // Room for the rows of `keys` missing keys, free for the processor to write.
  Status PrepareFill(size_t keys, size_t row_bytes, DeviceStream stream);
  std::byte* staging_rows() { return staging_.get(); }
  // Where the row of missing key i begins, from staging_rows(); cuda::kNoRow: no row.
  uint64_t* row_offsets() { return reinterpret_cast<uint64_t*>(staging_.get() + offsets_at_); }
  // Bytes [first, last) of the rows will not change any more: their way to the device may begin. By any number of
  // threads, between PrepareFill and Fill.
  void RowsArrived(size_t first, size_t last) {
    if (copies_) copier_.Arrived(first, last);
  }
  // Brings to the device what is not there yet and launches the fill. Then of `outdated`, each a cache and a key, the
  // rows are taken out again. all_in_order: of one part alone keys were asked, and every missing key's row is there, in
  // the order of missing(); row_offsets() are not looked at. REQUIRES: the gate is held; it is told of the fill.
  struct Outdated {
    cuda::CacheTable table;
    Key key;
  };
  Status Fill(std::span<const cuda::QueryPart> parts, bool all_in_order, std::span<const Outdated> outdated,
              DeviceStream stream);

  // Working space of who has the workspace: it keeps its memory, so that lookups need none of the heap's.
  struct Scratch {
    std::vector<Key> keys;          // that are missing, by part of the call
    std::vector<uint32_t> index;    // of each in missing(); empty where that is their order
    std::vector<uint8_t> parts;     // of each in missing()
    std::unique_ptr<bool[]> found;  // of each of found_size keys, once fetched
    size_t found_size = 0;
    std::vector<RowRequest> requests;
    std::vector<Outdated> outdated;
  };
  Scratch& scratch() { return scratch_; }

  // Ends the use: what is on the stream now is the work of it. Does nothing once more, and where a query was the only
  // work and has told that nothing is missing.
  Status End(DeviceStream stream);

  // For tests: the next query's stamp is the one after this.
  void set_stamp(uint32_t stamp) { stamp_ = stamp; }

 private:
  // Staging of at most so many bytes is not copied: the fill reads it where it is, which takes longer than reading a
  // copy, but no longer than copying.
  static constexpr size_t kReadInPlaceBytes = size_t{1} << 20;

  explicit LookupWorkspace(std::shared_ptr<DeviceContext> context)
      : context_(std::move(context)), copier_(context_.get()) {}
  Status AllocateQuery(uint32_t positions);
  Status AllocateStaging(size_t bytes);
  Status Begin(DeviceStream stream);
  Status WaitFor(const uint64_t* word, DeviceStream stream, Deadline deadline, const std::atomic<bool>* cancelled);
  Status Grow(DeviceMemory* memory, size_t bytes, std::string_view purpose);

  const std::shared_ptr<DeviceContext> context_;
  WorkspaceSize size_;
  OwnedEvent done_;
  bool in_use_ = false;    // the device may be using the workspace
  bool recorded_ = false;  // done_, behind all of this use
  bool zeroed_ = false;
  uint32_t stamp_ = 0;
  DeviceMemory device_;
  PinnedMemory mapped_;
  PinnedMemory staging_;  // rows, offsets, outdated keys
  DeviceMemory staging_device_;
  DeviceMemory splits_;
  DeviceMemory pooled_rows_;
  uint32_t launched_ = 0;
  cuda::QueryWorkspace workspace_;
  cuda::PooledWorkspace pooled_workspace_;
  cuda::MissingKey* missing_ = nullptr;
  cuda::QueryResult* result_ = nullptr;
  cuda::PooledResult* pooled_result_ = nullptr;
  uint32_t missing_positions_ = 0;
  uint32_t missing_keys_ = 0;
  uint64_t missing_parts_ = 0;
  cuda::FirstMistake mistake_;
  size_t offsets_at_ = 0;
  size_t outdated_at_ = 0;
  bool copies_ = false;  // staging to the device, in this use
  StagingCopier copier_;
  Scratch scratch_;
};

// Ends a use where nothing else has: the next one must know what this one has put on the stream, also where an
// exception ended it.
class EndOfUse {
 public:
  EndOfUse(LookupWorkspace& workspace, DeviceStream stream) : workspace_(workspace), stream_(stream) {}
  ~EndOfUse() { (void)workspace_.End(stream_); }
  EndOfUse(const EndOfUse&) = delete;
  EndOfUse& operator=(const EndOfUse&) = delete;

 private:
  LookupWorkspace& workspace_;
  const DeviceStream stream_;
};

}  // namespace hps

#endif  // HPS_CACHE_LOOKUP_WORKSPACE_H_
