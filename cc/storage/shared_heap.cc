// Invariants
// - magic is written last; memory without it is made anew by the next one who attaches, under the file's lock.
// - With the header's mutex free, the bits say exactly which units are in use: those of the blocks that can be reached
//   from the header. A process that dies under the mutex leaves bits that may be wrong and lists that are right, since
//   each change of a list is one store; the next to lock makes the bits anew.
// - Memory below committed_bytes has been taken from the system and is never given back: readers may look at units
//   that are used for something else by now.
// Lock order: the file's lock, then the header's mutex.

#include "cc/storage/shared_heap.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <utility>
#include <vector>

#include "cc/base/fork_guard.h"
#include "hps/config.h"
#include "hps/log.h"

namespace hps {
namespace {

struct Prefix {  // what is needed of a SharedHeader to know whether it is ours
  uint64_t magic;
  SharedLayout layout;
  uint32_t auto_remove;
};
static_assert(offsetof(SharedHeader, layout) == offsetof(Prefix, layout));
static_assert(offsetof(SharedHeader, auto_remove) == offsetof(Prefix, auto_remove));

// As it is written in ps.json; a number that this version does not know as it is.
std::string PolicyName(uint32_t policy) {
  switch (static_cast<OverflowPolicy>(policy)) {
    case OverflowPolicy::kEvictOldest: return "evict_oldest";
    case OverflowPolicy::kEvictRandom: return "evict_random";
    case OverflowPolicy::kEvictLeastUsed: return "evict_least_used";
  }
  return std::to_string(policy);
}

// SharedLayout has 0 where ps.json has no margin.
std::string MarginText(uint64_t margin) { return margin == 0 ? "unlimited (not given)" : std::to_string(margin); }

bool ParseNumber(std::string_view text, uint32_t* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size();
}

std::string Differences(const SharedLayout& there, const SharedLayout& here) {
  std::string text;
  const auto compare_texts = [&](const char* name, const std::string& left, const std::string& right) {
    if (left == right) return;
    if (!text.empty()) text += ", ";
    text += std::string(name) + " is " + left + " there and " + right + " here";
  };
  const auto compare = [&](const char* name, uint64_t left, uint64_t right) {
    compare_texts(name, std::to_string(left), std::to_string(right));
  };
  compare("the format", there.format, here.format);
  if (text.empty()) {
    compare("the size of a mutex", there.mutex_bytes, here.mutex_bytes);
    compare("shared_memory_size", there.bytes, here.bytes);
    compare("num_partitions", there.num_partitions, here.num_partitions);
    compare("the bytes of a key (supportlonglong)", there.key_bytes, here.key_bytes);
    compare_texts("overflow_margin", MarginText(there.overflow_margin), MarginText(here.overflow_margin));
    if ((there.overflow_margin == 0) == (here.overflow_margin == 0)) {  // without a margin the others say nothing
      compare_texts("overflow_policy", PolicyName(there.overflow_policy), PolicyName(here.overflow_policy));
      compare("overflow_margin * overflow_resolution_target", there.overflow_target_rows, here.overflow_target_rows);
      compare_texts("refresh_time_after_fetch", there.refresh_time_after_fetch != 0 ? "true" : "false",
                    here.refresh_time_after_fetch != 0 ? "true" : "false");
    }
  }
  return text;
}

}  // namespace

SharedHeap::SharedHeap(const SharedHeapOptions& options) : options_(options), fork_generation_(ForkGeneration()) {}

Result<std::shared_ptr<SharedHeap>> SharedHeap::Attach(const SharedHeapOptions& options) {
  const SharedLayout& layout = options.layout;
  const uint64_t least = BitsOffset() + layout.bytes / kUnitBytes / 8 + (64 << 10);
  if (layout.bytes < least) {
    return InvalidArgument("shared_memory_size is " + std::to_string(layout.bytes) +
                           " bytes, which hold no tables; choose at least " + std::to_string(2 * least));
  }
  std::shared_ptr<SharedHeap> heap(new SharedHeap(options));
  HPS_ASSIGN_OR_RETURN(std::unique_ptr<SharedFile> file, SharedFile::OpenLocked(options.name));
  Prefix found;
  HPS_RETURN_IF_ERROR(file->Read(&found, sizeof(found)));
  HPS_ASSIGN_OR_RETURN(const uint64_t file_bytes, file->FileBytes());
  bool fresh = found.magic == 0;
  if (!fresh && found.magic != SharedHeader::kMagic) {
    return FailedPrecondition(file->path() +
                              " was not made by this library; choose another shared_memory_name, or remove the file");
  }
  if (!fresh && (found.layout != layout || file_bytes != layout.bytes)) {
    const bool used = file->AnyMemberLives();
    if (used || found.auto_remove == 0) {
      std::string differences = Differences(found.layout, layout);
      if (differences.empty()) differences = "the file has " + std::to_string(file_bytes) + " bytes";
      return FailedPrecondition(
          file->path() + " has another layout: " + differences +
          (used ? "; give all processes that share it the same configuration, or this one another shared_memory_name"
                : "; no process uses it: remove the file, or configure what it was made with"));
    }
    fresh = true;
  }
  Status ready = fresh ? file->Reset(layout.bytes) : OkStatus();
  if (ready.ok()) ready = file->Map(layout.bytes);
  heap->file_ = std::move(file);
  if (ready.ok() && fresh) ready = heap->Initialise();
  if (!ready.ok()) {
    if (fresh) (void)heap->file_->Remove();  // nobody can have come to use it: that takes the lock
    heap->file_ = nullptr;                   // never joined: nothing to leave
    return ready;
  }
  auto joined = heap->file_->Join();
  if (!joined.ok()) {
    heap->file_ = nullptr;  // never joined: nothing to leave
    return joined.status();
  }
  heap->member_ = *joined;
  {
    const auto lock = heap->Lock();
    SharedHeader& header = heap->header();
    header.members[heap->member_] = {0, 0};
    heap->ForEachTable([&](uint64_t offset, const SharedTable&) {  // what a dead member of this number had open
      heap->At<SharedTable>(offset)->pins[heap->member_ / 64] &= ~(uint64_t{1} << heap->member_ % 64);
    });
    if (++header.attachments == 0) header.attachments = 1;
    header.members[heap->member_] = {header.attachments, static_cast<uint32_t>(::getpid())};
    header.auto_remove = options.auto_remove ? 1 : 0;
    heap->Collect();
  }
  heap->file_->Unlock();
  return heap;
}

Status SharedHeap::Initialise() {
  const uint64_t num_units = options_.layout.bytes / kUnitBytes;
  const uint64_t bit_words = (num_units + 63) / 64;
  const uint64_t begin = BitsOffset() + bit_words * sizeof(uint64_t);
  HPS_RETURN_IF_ERROR(file_->Commit(0, begin, options_.step_bytes));
  SharedHeader& header = *new (base()) SharedHeader();  // the file is all zeros
  header.layout = options_.layout;
  header.mutex.Init();
  header.num_units = num_units;
  header.first_unit = UnitsFor(begin);
  header.committed_bytes = begin;
  header.next_table_id = 1;
  FindUsedUnits();
  header.magic.store(SharedHeader::kMagic, std::memory_order_release);
  return OkStatus();
}

SharedHeap::~SharedHeap() {
  if (file_ != nullptr && fork_generation_ == ForkGeneration()) Detach();
}

void SharedHeap::Detach() {
  const Status locked = file_->Lock();
  {
    const auto lock = Lock();
    ForEachTable([&](uint64_t offset, const SharedTable&) {
      At<SharedTable>(offset)->pins[member_ / 64] &= ~(uint64_t{1} << member_ % 64);
    });
    header().members[member_] = {0, 0};
    FreeDroppedTables();
  }
  Status removed = locked;
  if (locked.ok() && options_.auto_remove && !file_->AnyMemberLives()) removed = file_->Remove();
  if (!removed.ok()) Log(LogLevel::kWarning, "multi_process_hash_map: " + removed.ToString());
}

// Units --------------------------------------------------------------------------------------------------------------

void SharedHeap::SetBits(uint64_t* bits, uint64_t unit, uint64_t count, bool used) const {
  while (count > 0) {
    const uint64_t first = unit % 64;
    const uint64_t here = std::min<uint64_t>(count, 64 - first);
    const uint64_t mask = (here == 64 ? ~uint64_t{0} : (uint64_t{1} << here) - 1) << first;
    bits[unit / 64] = used ? bits[unit / 64] | mask : bits[unit / 64] & ~mask;
    unit += here;
    count -= here;
  }
}

uint64_t SharedHeap::FindFree(uint64_t count) const {
  const SharedHeader& header = this->header();
  uint64_t run = 0;
  for (uint64_t unit = header.search_unit; unit < header.num_units;) {
    const uint64_t word = bits()[unit / 64];
    if (unit % 64 == 0 && word == ~uint64_t{0}) {
      run = 0;
      unit += 64;
    } else if (unit % 64 == 0 && word == 0 && unit + 64 <= header.num_units) {
      run += 64;
      unit += 64;
    } else {
      run = (word >> unit % 64 & 1) != 0 ? 0 : run + 1;
      ++unit;
    }
    if (run >= count) return unit - run;
  }
  return header.num_units;
}

Result<uint64_t> SharedHeap::TryAllocate(uint64_t bytes) {
  SharedHeader& header = this->header();
  const uint64_t count = UnitsFor(bytes);
  const uint64_t first = FindFree(count);
  if (first == header.num_units) {
    return ResourceExhausted(path() + " has no room for " + std::to_string(bytes) +
                             " bytes: " + std::to_string((header.num_units - header.used_units) * kUnitBytes) + " of " +
                             std::to_string(layout().bytes) +
                             " are free; raise shared_memory_size, or keep fewer rows in memory");
  }
  const uint64_t end = (first + count) * kUnitBytes;
  if (end > header.committed_bytes) {
    HPS_RETURN_IF_ERROR(file_->Commit(header.committed_bytes, end, options_.step_bytes));
    header.committed_bytes = end;
  }
  SetBits(bits(), first, count, true);
  header.used_units += count;
  if (first == header.search_unit) header.search_unit = first + count;
  return first * kUnitBytes;
}

Result<uint64_t> SharedHeap::Allocate(uint64_t bytes) {
  auto offset = TryAllocate(bytes);
  if (offset.ok()) return offset;
  Collect();
  return TryAllocate(bytes);
}

void SharedHeap::Free(uint64_t offset, uint64_t bytes) {
  SharedHeader& header = this->header();
  SetBits(bits(), offset / kUnitBytes, UnitsFor(bytes), false);
  header.used_units -= UnitsFor(bytes);
  header.search_unit = std::min(header.search_unit, offset / kUnitBytes);
}

Status SharedHeap::CheckFree(uint64_t bytes) {
  SharedHeader& header = this->header();
  const auto free_bytes = [&] { return (header.num_units - header.used_units) * kUnitBytes; };
  if (free_bytes() < bytes) Collect();
  if (free_bytes() < bytes) {
    return ResourceExhausted(path() + " has no room for " + std::to_string(bytes) +
                             " bytes: " + std::to_string(free_bytes()) + " of " + std::to_string(layout().bytes) +
                             " are free; raise shared_memory_size, or keep fewer rows in memory");
  }
  const uint64_t taken_free = header.committed_bytes - std::min(header.committed_bytes, header.used_units * kUnitBytes);
  return bytes <= taken_free ? OkStatus() : file_->CheckFree(bytes - taken_free);
}

template <typename Visit>
void SharedHeap::ForEachUsedBlock(Visit visit) const {
  visit(0, header().first_unit * kUnitBytes);
  for (uint64_t offset = header().first_table; offset != 0; offset = At<SharedTable>(offset)->next) {
    ForEachBlock(offset, *At<SharedTable>(offset), visit);
  }
  for (uint64_t offset = header().first_record; offset != 0; offset = At<SharedRecord>(offset)->next) {
    visit(offset, At<SharedRecord>(offset)->bytes);
  }
}

void SharedHeap::FindUsedUnits() {
  SharedHeader& header = this->header();
  std::memset(bits(), 0, (header.num_units + 63) / 64 * sizeof(uint64_t));
  header.used_units = 0;
  header.search_unit = header.first_unit;
  ForEachUsedBlock([&](uint64_t offset, uint64_t bytes) {
    SetBits(bits(), offset / kUnitBytes, UnitsFor(bytes), true);
    header.used_units += UnitsFor(bytes);
  });
}

Status SharedHeap::CheckUnits() {
  const SharedHeader& header = this->header();
  std::vector<uint64_t> expected((header.num_units + 63) / 64, 0);
  Status status;
  uint64_t used = 0;
  ForEachUsedBlock([&](uint64_t offset, uint64_t bytes) {
    for (uint64_t unit = offset / kUnitBytes; unit < offset / kUnitBytes + UnitsFor(bytes); ++unit) {
      if (unit >= header.num_units || (expected[unit / 64] >> unit % 64 & 1) != 0) {
        status = Internal(path() + ": unit " + std::to_string(unit) + " has two owners or does not exist");
        return;
      }
      SetBits(expected.data(), unit, 1, true);
    }
    used += UnitsFor(bytes);
  });
  HPS_RETURN_IF_ERROR(status);
  if (used != header.used_units || !std::equal(expected.begin(), expected.end(), bits())) {
    return Internal(path() + ": " + std::to_string(used) + " units are in use and " +
                    std::to_string(header.used_units) + " are marked");
  }
  return OkStatus();
}

// Tables -------------------------------------------------------------------------------------------------------------

void SharedHeap::ForEachTable(const std::function<void(uint64_t, const SharedTable&)>& visit) const {
  for (uint64_t offset = header().first_table; offset != 0; offset = At<SharedTable>(offset)->next) {
    visit(offset, *At<SharedTable>(offset));
  }
}

uint64_t SharedHeap::FindTable(std::string_view name) const {
  for (uint64_t offset = header().first_table; offset != 0; offset = At<SharedTable>(offset)->next) {
    const SharedTable& table = *At<SharedTable>(offset);
    if (table.dropped == 0 && table.name() == name) return offset;
  }
  return 0;
}

void SharedHeap::AddTable(uint64_t table) {
  SharedTable& added = *At<SharedTable>(table);
  added.id = header().next_table_id++;
  added.next = header().first_table;
  Pin(table);
  std::atomic_ref(header().first_table).store(table, std::memory_order_release);
}

void SharedHeap::DropTable(uint64_t table) {
  At<SharedTable>(table)->dropped.store(1, std::memory_order_release);
  Collect();
}

void SharedHeap::Pin(uint64_t table) { At<SharedTable>(table)->pins[member_ / 64] |= uint64_t{1} << member_ % 64; }

void SharedHeap::Unpin(uint64_t table) {
  At<SharedTable>(table)->pins[member_ / 64] &= ~(uint64_t{1} << member_ % 64);
  FreeDroppedTables();
}

std::string SharedHeap::MemberName() const {
  return std::to_string(member_) + "." + std::to_string(header().members[member_].joined);
}

bool SharedHeap::MemberIsGone(std::string_view name) const {
  uint32_t member = 0;
  uint32_t joined = 0;
  const size_t point = name.find('.');
  if (point == std::string_view::npos || !ParseNumber(name.substr(0, point), &member) ||
      !ParseNumber(name.substr(point + 1), &joined) || member >= SharedFile::kMaxMembers || joined == 0) {
    return false;  // no name of ours
  }
  if (header().members[member].joined != joined) return true;
  return member != member_ && !file_->MemberLives(member);
}

void SharedHeap::Collect() {
  for (uint32_t member = 0; member < SharedFile::kMaxMembers; ++member) {
    SharedMember& entry = header().members[member];
    if (entry.joined == 0 || member == member_ || file_->MemberLives(member)) continue;
    ForEachTable([&](uint64_t offset, const SharedTable&) {
      At<SharedTable>(offset)->pins[member / 64] &= ~(uint64_t{1} << member % 64);
    });
    entry = {0, 0};
  }
  FreeDroppedTables();
}

void SharedHeap::FreeDroppedTables() {
  uint64_t* link = &header().first_table;
  while (*link != 0) {
    const uint64_t offset = *link;
    SharedTable& table = *At<SharedTable>(offset);
    const bool pinned = std::any_of(std::begin(table.pins), std::end(table.pins), [](uint64_t pins) { return pins; });
    if (table.dropped == 0 || pinned) {
      link = &table.next;
      continue;
    }
    std::atomic_ref(*link).store(table.next, std::memory_order_release);
    ForEachBlock(offset, table, [&](uint64_t block, uint64_t bytes) { Free(block, bytes); });
  }
}

// Records ------------------------------------------------------------------------------------------------------------

uint64_t SharedHeap::FindRecord(std::string_view name) const {
  for (uint64_t offset = header().first_record; offset != 0; offset = At<SharedRecord>(offset)->next) {
    if (At<SharedRecord>(offset)->name() == name) return offset;
  }
  return 0;
}

Status SharedHeap::WriteRecord(std::string_view name, std::string_view value) {
  const uint64_t bytes = sizeof(SharedRecord) + name.size() + value.size();
  HPS_ASSIGN_OR_RETURN(const uint64_t offset, Allocate(bytes));
  SharedRecord& record = *new (At<std::byte>(offset)) SharedRecord{0, bytes, name.size(), value.size()};
  std::copy(value.begin(), value.end(), std::copy(name.begin(), name.end(), record.text()));
  // In the place of the old one, so that one store exchanges them.
  uint64_t* link = &header().first_record;
  while (*link != 0 && At<SharedRecord>(*link)->name() != name) link = &At<SharedRecord>(*link)->next;
  const uint64_t old = *link;
  record.next = old == 0 ? 0 : At<SharedRecord>(old)->next;
  std::atomic_ref(*link).store(offset, std::memory_order_release);
  if (old != 0) Free(old, At<SharedRecord>(old)->bytes);
  return OkStatus();
}

void SharedHeap::EraseRecord(std::string_view name) {
  uint64_t* link = &header().first_record;
  while (*link != 0 && At<SharedRecord>(*link)->name() != name) link = &At<SharedRecord>(*link)->next;
  const uint64_t old = *link;
  if (old == 0) return;
  std::atomic_ref(*link).store(At<SharedRecord>(old)->next, std::memory_order_release);
  Free(old, At<SharedRecord>(old)->bytes);
}

}  // namespace hps
