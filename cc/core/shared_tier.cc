// Order: tables are made and filled, the store is flushed, the record is read once more and switched in one write, then
// old generations are dropped. Two nodes that switch at the same moment both keep what they serve: a generation is
// dropped only when it is older than the one that was current before the switch, and generations count upwards.

#include "cc/core/shared_tier.h"

#include <unistd.h>

#include <algorithm>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "hps/log.h"

namespace hps {
namespace {

// "<host>:<process>:<random number>", with "/<member>" where the store has a name for this opening of it.
std::string NewOwner(const TableStore& store) {
  char host[65] = "";
  (void)::gethostname(host, sizeof(host) - 1);
  std::random_device random;
  const std::string member = store.MemberName();
  return std::string(host) + ":" + std::to_string(::getpid()) + ":" + std::to_string(random()) +
         (member.empty() ? "" : "/" + member);
}

bool Owns(const std::optional<std::string>& claim, const std::string& owner) {
  return claim && claim->starts_with(owner + " ");
}

// Whether the store knows that nobody is there any more to renew the claim.
bool OwnerIsGone(const TableStore& store, const std::string& claim) {
  const size_t end = std::min(claim.find(' '), claim.size());
  const size_t slash = claim.rfind('/', end);
  return slash != std::string::npos && store.MemberIsGone(std::string_view(claim).substr(slash + 1, end - slash - 1));
}

}  // namespace

SharedTier::SharedTier(TableStore& store, std::string model, const ClaimOptions& options)
    : store_(store),
      model_(std::move(model)),
      options_(options),
      claim_name_("hps.load." + model_),
      owner_(NewOwner(store)) {}

SharedTier::~SharedTier() {
  if (!claimed_) return;
  const auto current = store_.ReadRecord(claim_name_);
  if (!current.ok() || !Owns(*current, owner_)) return;  // closed, or taken over
  if (Status erased = store_.EraseRecord(claim_name_); !erased.ok()) Log(LogLevel::kWarning, erased.ToString());
}

bool SharedTier::Holds(const std::string& table, const std::string& fingerprint) const {
  const auto found = record_.tables.find(table);
  return found != record_.tables.end() && !short_.contains(table) &&
         (fingerprint.empty() || found->second.fingerprint == fingerprint);
}

Status SharedTier::Prepare(const std::map<std::string, Wanted>& wanted, const SharedTierUse& use) {
  HPS_RETURN_IF_ERROR(ReadState(wanted, use));
  if (!use.load) {
    if (short_.empty()) return OkStatus();
    const auto& [table, shortage] = *short_.begin();
    const std::string what = "table '" + table + "': in the volatile tier (" + std::string(store_.kind()) + ") " +
                             shortage.text +
                             "; the others would be answered with the default value; load it anew (start once with "
                             "volatile_db.initialize_after_startup true), ";
    if (!shortage.lost) return FailedPrecondition(what + "or give this node a persistent_db with all rows");
    return DataLoss(what + "and see that the store loses no rows");
  }
  if (std::all_of(wanted.begin(), wanted.end(),
                  [&](const auto& entry) { return Holds(entry.first, entry.second.fingerprint); })) {
    return OkStatus();
  }
  bool owner_died = false;
  HPS_RETURN_IF_ERROR(AcquireClaim(&owner_died));
  HPS_RETURN_IF_ERROR(ReadState(wanted, use));  // another node may have loaded meanwhile
  if (owner_died) DropLeftovers(wanted);
  for (const auto& [table, shortage] : short_) {
    Log(LogLevel::kWarning, "model '" + model_ + "', table '" + table + "': in the volatile tier (" +
                                std::string(store_.kind()) + ") " + shortage.text + "; it is loaded anew");
  }
  return OkStatus();
}

Status SharedTier::ReadState(const std::map<std::string, Wanted>& wanted, const SharedTierUse& use) {
  short_.clear();
  HPS_ASSIGN_OR_RETURN(record_, ReadModelRecord(store_, model_));
  for (const auto& [table, want] : wanted) {
    if (!Holds(table, want.fingerprint)) continue;
    const TableRecord& recorded = record_.tables.at(table);
    TableSpec spec = want.spec;
    spec.name = StoredTableName(model_, table, recorded.generation);
    if (use.alone && recorded.all_rows > 0) {
      short_[table].text = spec.name + " was loaded for nodes that have a persistent_db: it was given " +
                           std::to_string(recorded.rows) + " of " + std::to_string(recorded.all_rows) + " rows";
      continue;
    }
    uint64_t expected = use.whole ? recorded.rows : 0;
    if (use.alone && recorded.rows == 0) expected = want.rows;  // written before records told what was left out
    if (expected == 0) continue;                                // not known
    const auto opened = store_.OpenTable(spec);
    // Open deals with both: it makes what is not there, and refuses what does not fit.
    if (opened.status().code() == StatusCode::kNotFound) continue;
    if (opened.status().code() == StatusCode::kFailedPrecondition) continue;
    if (!opened.ok()) return opened.status();
    const auto stats = (*opened)->Stats();
    if (stats.status().code() == StatusCode::kNotFound) continue;  // dropped meanwhile
    if (!stats.ok()) return stats.status();
    if (stats->rows_estimated || stats->rows >= expected) continue;
    const std::string held = std::to_string(stats->rows);
    const std::string all = std::to_string(expected);
    if (recorded.rows == 0) {
      short_[table].text = spec.name + " holds " + held + " rows, its folder has " + all +
                           ", and its record does not say how many were loaded";
    } else {
      short_[table] = {true, spec.name + " has lost rows: it holds " + held + " of the " + all +
                                 " that were loaded into it (" + std::to_string(expected - stats->rows) +
                                 " are missing)"};
    }
  }
  return OkStatus();
}

Status SharedTier::AcquireClaim(bool* owner_died) {
  std::optional<std::string> seen;
  Clock::time_point seen_since = Clock::now();
  bool told = false;
  for (;;) {
    HPS_ASSIGN_OR_RETURN(std::optional<std::string> claim, store_.ReadRecord(claim_name_));
    if (Owns(claim, owner_)) {
      claimed_ = true;
      renewed_ = Clock::now();
      return OkStatus();
    }
    const Clock::time_point now = Clock::now();
    if (claim != seen) {
      seen = claim;
      seen_since = now;
    }
    const bool gone = claim && OwnerIsGone(store_, *claim);
    *owner_died = gone;  // of the claim that was seen last before this one
    if (!claim || gone || now - seen_since >= options_.stale_after) {
      HPS_RETURN_IF_ERROR(store_.WriteRecord(claim_name_, owner_ + " " + std::to_string(++renewals_)));
      // Whoever wrote last has it; the others see that when they read it again.
    } else if (!told) {
      told = true;
      Log(LogLevel::kInfo,
          "model '" + model_ + "' is being loaded by another node (" + claim->substr(0, 100) + "); waiting for it");
    }
    std::this_thread::sleep_for(options_.poll);
  }
}

void SharedTier::DropLeftovers(const std::map<std::string, Wanted>& wanted) {
  const Result<std::vector<std::string>> stored = store_.ListTables();
  Status status = stored.status();
  for (const auto& [table, want] : wanted) {
    const auto recorded = record_.tables.find(table);
    for (size_t i = 0; status.ok() && i < stored->size(); ++i) {
      const std::optional<uint64_t> generation = GenerationOf((*stored)[i], model_, table);
      if (!generation || (recorded != record_.tables.end() && *generation <= recorded->second.generation)) continue;
      status = store_.DropTable((*stored)[i]);
      if (status.code() == StatusCode::kNotFound) status = OkStatus();
    }
  }
  if (!status.ok())
    Log(LogLevel::kWarning, "a load of model '" + model_ + "' that was cut short: " + status.ToString());
}

void SharedTier::KeepClaim() {
  if (!claimed_ || Clock::now() - renewed_ < options_.renew) return;
  renewed_ = Clock::now();
  // A claim that was taken over, or cannot be renewed, only means that another node may do the same work.
  const auto current = store_.ReadRecord(claim_name_);
  if (!current.ok() || !Owns(*current, owner_)) return;
  (void)store_.WriteRecord(claim_name_, owner_ + " " + std::to_string(++renewals_)).ok();
}

Result<std::shared_ptr<Table>> SharedTier::Open(const std::string& table, const TableSpec& wanted_spec,
                                                const std::string& fingerprint, bool load, bool* fill) {
  TableSpec spec = wanted_spec;
  *fill = false;
  const auto found = record_.tables.find(table);
  const bool recorded = found != record_.tables.end();
  if (recorded ? Holds(table, fingerprint) : !load) {
    spec.name = StoredTableName(model_, table, recorded ? found->second.generation : 0);
    auto opened = store_.OpenTable(spec);
    if (opened.ok() || opened.status().code() != StatusCode::kNotFound) return opened;
    absent_[table] = opened.status().message();
    // The record outlived its table (the store was emptied), or there is none yet: make it.
  }
  for (uint64_t generation = recorded ? found->second.generation + 1 : 0;; ++generation) {
    spec.name = StoredTableName(model_, table, generation);
    auto created = store_.CreateTable(spec);
    if (created.ok()) {
      made_[table] = {spec.name, generation, fingerprint.empty() ? "not loaded from a folder" : fingerprint};
      *fill = load;
      return created;
    }
    if (created.status().code() != StatusCode::kAlreadyExists) return created;
  }
}

std::string SharedTier::WhyAbsent(const std::string& table) const {
  const auto found = absent_.find(table);
  return found == absent_.end() ? "" : found->second;
}

Status SharedTier::Publish(const std::map<std::string, Contents>& contents) {
  if (made_.empty()) return OkStatus();
  HPS_RETURN_IF_ERROR(store_.Flush());
  HPS_ASSIGN_OR_RETURN(ModelRecord record, ReadModelRecord(store_, model_));
  std::map<std::string, uint64_t> oldest_kept;
  for (const auto& [table, made] : made_) {
    const auto before = record.tables.find(table);
    // The one before may be the higher one, where two nodes have loaded at once.
    oldest_kept[table] = before == record.tables.end() ? 0 : std::min(made.generation, before->second.generation);
    const auto found = contents.find(table);
    const Contents held = found == contents.end() ? Contents() : found->second;
    record.tables[table] = {made.generation, made.fingerprint, held.rows, held.all_rows};
  }
  HPS_RETURN_IF_ERROR(WriteModelRecord(store_, model_, record));
  made_.clear();
  for (const auto& [table, generation] : oldest_kept) DropOlder(table, generation);
  return OkStatus();
}

void SharedTier::DropOlder(const std::string& table, uint64_t oldest_kept) {
  const Result<std::vector<std::string>> stored = store_.ListTables();
  Status status = stored.status();
  for (size_t i = 0; status.ok() && i < stored->size(); ++i) {
    const std::optional<uint64_t> generation = GenerationOf((*stored)[i], model_, table);
    if (!generation || *generation >= oldest_kept) continue;
    status = store_.DropTable((*stored)[i]);
    if (status.code() == StatusCode::kNotFound) status = OkStatus();  // another node was quicker
  }
  if (!status.ok()) Log(LogLevel::kWarning, "old versions of model '" + model_ + "': " + status.ToString());
}

void SharedTier::Undo() {
  for (const auto& [table, made] : made_) {
    Status dropped = store_.DropTable(made.stored_name);
    if (!dropped.ok() && dropped.code() != StatusCode::kFailedPrecondition) {
      Log(LogLevel::kWarning, "after a failed load: " + dropped.ToString());
    }
  }
  made_.clear();
}

}  // namespace hps
