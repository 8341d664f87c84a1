// SharedHeap: one process's attachment to a shared memory: its blocks, its list of tables and records, and who uses
// what.
//
// All processes with the same layout see the same tables. A table that was dropped keeps its blocks while a member that
// lives has it open (a pin); what dead members had open is let go of when memory is wanted, when somebody comes or goes
// and when a table is dropped. The last member to go removes the memory if it was told to.
//
// Thread safety: any thread. Methods marked "locked" need the caller to hold Lock(); a lock is held for short work only
// and is a leaf: nothing else is locked under it.

#ifndef HPS_STORAGE_SHARED_HEAP_H_
#define HPS_STORAGE_SHARED_HEAP_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "cc/storage/robust_mutex.h"
#include "cc/storage/shared_file.h"
#include "cc/storage/shared_layout.h"
#include "hps/status.h"

namespace hps {

struct SharedHeapOptions {
  std::string name;
  SharedLayout layout;
  bool auto_remove = true;
  uint64_t step_bytes = 0;  // memory is asked of the system in steps of at most so much
};

class SharedHeap {
 public:
  // Attaches, making the memory if there is none, or one that was never finished, or one of another layout that nobody
  // uses and that was to be removed. kFailedPrecondition names what differs.
  static Result<std::shared_ptr<SharedHeap>> Attach(const SharedHeapOptions& options);
  // Detaches; in a forked child nothing is done.
  ~SharedHeap();
  SharedHeap(const SharedHeap&) = delete;
  SharedHeap& operator=(const SharedHeap&) = delete;

  std::byte* base() const { return file_->data(); }
  const SharedLayout& layout() const { return header().layout; }
  const std::string& path() const { return file_->path(); }
  template <typename T>
  T* At(uint64_t offset) const {
    return reinterpret_cast<T*>(base() + offset);
  }

  auto Lock() {
    return RobustLock(header().mutex, [this] { FindUsedUnits(); });
  }

  // As SharedFile::CheckNamed.
  Status CheckNamed() const { return file_->CheckNamed(); }

  // Locked from here on -------------------------------------------------------------------------------------------

  // A block of at least so many bytes, with any contents; REQUIRES that it is linked to something before the lock is
  // given up. kResourceExhausted: this memory, or that of the system, is used up.
  Result<uint64_t> Allocate(uint64_t bytes);
  void Free(uint64_t offset, uint64_t bytes);
  // kResourceExhausted unless so many bytes could be allocated now (if they need not lie together).
  Status CheckFree(uint64_t bytes);

  // Offset of the table of that name that was not dropped, 0: there is none.
  uint64_t FindTable(std::string_view name) const;
  // Links a block made by Allocate that is a complete table without blocks of its own; opens it.
  void AddTable(uint64_t table);
  void DropTable(uint64_t table);
  // This process has the table open, or has it no longer.
  void Pin(uint64_t table);
  void Unpin(uint64_t table);
  void ForEachTable(const std::function<void(uint64_t offset, const SharedTable&)>& visit) const;

  // Offset of the record of that name, 0: there is none.
  uint64_t FindRecord(std::string_view name) const;
  Status WriteRecord(std::string_view name, std::string_view value);
  void EraseRecord(std::string_view name);

  // This attachment, by a name that no other one has had; and whether the one of that name has gone or died.
  std::string MemberName() const;
  bool MemberIsGone(std::string_view name) const;

  // Lets go of what dead members had open, and frees the dropped tables that nobody has open.
  void Collect();
  // kInternal where the bits do not agree with what is in use: for tests.
  Status CheckUnits();

 private:
  explicit SharedHeap(const SharedHeapOptions& options);

  SharedHeader& header() const { return *At<SharedHeader>(0); }
  Status Initialise();
  Status CheckLayout(const SharedLayout& found) const;
  void Detach();

  uint64_t* bits() const { return At<uint64_t>(BitsOffset()); }
  static constexpr uint64_t BitsOffset() { return (sizeof(SharedHeader) + 63) / 64 * 64; }
  void SetBits(uint64_t* bits, uint64_t unit, uint64_t count, bool used) const;
  // The first of `count` units in a row that are free; num_units: there are none.
  uint64_t FindFree(uint64_t count) const;
  Result<uint64_t> TryAllocate(uint64_t bytes);
  template <typename Visit>
  void ForEachUsedBlock(Visit visit) const;
  // After the death of somebody who held the lock: makes the bits anew from what is in use.
  void FindUsedUnits();
  void FreeDroppedTables();

  const SharedHeapOptions options_;
  const uint64_t fork_generation_;
  std::unique_ptr<SharedFile> file_;
  uint32_t member_ = 0;
};

}  // namespace hps

#endif  // HPS_STORAGE_SHARED_HEAP_H_
