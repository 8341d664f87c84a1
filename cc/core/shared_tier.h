// SharedTier: one load of a model into a volatile store that other nodes use too (Redis, shared memory).
//
// The store's record of the model (model_record.h) says which generation of each table is current and which folder it
// came from. A table that is there with the wanted fingerprint is opened and not loaded again. Everything else is
// loaded into a generation of its own, which nobody serves before the record has been switched to it:
// - CreateTable gives a name to one node only, so two nodes never write into one table: never a mixture.
// - The generation that was current before stays, because other nodes may still serve it; older ones are dropped.
// - Unloading and closing drop nothing.
//
// So that nodes which start together do not all load the same rows, the one that loads keeps a claim in the store
// ("hps.load.<model>") and the others wait for it: until it is gone, or is not renewed any more, or the store knows
// that its owner has died. The claim saves work only; if two nodes both believe to hold it, or its owner dies, rows
// stay right.
//
// The record also says how many rows a table held when its load ended, and whether the load left some out for a
// persistent tier to serve. Where none may be missing (SharedTierUse) a table that holds fewer, or was given only some,
// is loaded into a new generation like one that is not there. More rows are fine: updates add some.
//
// Thread safety: one thread at a time. Ownership: the store outlives it.

#ifndef HPS_CORE_SHARED_TIER_H_
#define HPS_CORE_SHARED_TIER_H_

#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cc/core/model_record.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

struct ClaimOptions {
  std::chrono::milliseconds poll{100};
  std::chrono::milliseconds renew{1000};
  std::chrono::milliseconds stale_after{30'000};  // a claim that is not renewed for so long is taken over
};

struct SharedTierUse {
  bool load = true;    // what is missing is loaded
  bool alone = false;  // no tier below has the rows that a load left out
  bool whole = false;  // no table may hold fewer rows than its record says: the store gives up none by itself
};

class SharedTier {
 public:
  SharedTier(TableStore& store, std::string model, const ClaimOptions& options);
  ~SharedTier();  // gives the claim back
  SharedTier(const SharedTier&) = delete;
  SharedTier& operator=(const SharedTier&) = delete;

  struct Wanted {
    std::string fingerprint;  // empty: any
    TableSpec spec;           // without a name
    uint64_t rows = 0;        // of the folder, 0: not known; asked for where the record does not know
  };
  struct Contents {
    uint64_t rows = 0;      // held after the load, 0: not known
    uint64_t all_rows = 0;  // where only some were put in: of so many, about
  };
  // Reads the record; where a table is to be loaded and is not there with the wanted fingerprint, or not whole, waits
  // for the claim and reads again. `wanted`: by table name.
  // A table is not whole, and nothing is to be loaded: kDataLoss if it has lost rows, kFailedPrecondition if it was
  // given only some.
  Status Prepare(const std::map<std::string, Wanted>& wanted, const SharedTierUse& use);

  // Whether, after Prepare, the table is recorded with the fingerprint, with any if that is empty, and not damaged.
  bool Holds(const std::string& table, const std::string& fingerprint) const;

  // The table for this version. *fill: it was made new and rows may be put in.
  // An empty `fingerprint` takes whatever version is recorded. Without `load` a table that another program wrote (no
  // record) is opened as it is.
  Result<std::shared_ptr<Table>> Open(const std::string& table, const TableSpec& spec, const std::string& fingerprint,
                                      bool load, bool* fill);

  // Of a table that Open made: what the store said of the one that was not there, such as a name that nearly fits.
  std::string WhyAbsent(const std::string& table) const;

  // Says that the load goes on; call it now and then.
  void KeepClaim();

  // Switches the record to the tables that Open made, then drops what is older than the generation before. Call it
  // when all rows are in. `contents`: by table name.
  Status Publish(const std::map<std::string, Contents>& contents);

  // Drops the tables that Open made and that were not published.
  void Undo();

 private:
  using Clock = std::chrono::steady_clock;

  struct Shortage {
    bool lost = false;  // otherwise the load has left them out
    std::string text;   // which table of the store lacks how many rows
  };

  Status ReadState(const std::map<std::string, Wanted>& wanted, const SharedTierUse& use);
  // *owner_died: the claim was taken from an owner of whom the store knows that it is gone.
  Status AcquireClaim(bool* owner_died);
  // What a load that nobody goes on with has left: in memory of a fixed size it takes the room of the next one.
  void DropLeftovers(const std::map<std::string, Wanted>& wanted);
  void DropOlder(const std::string& table, uint64_t oldest_kept);

  struct Made {
    std::string stored_name;
    uint64_t generation = 0;
    std::string fingerprint;
  };

  TableStore& store_;
  const std::string model_;
  const ClaimOptions options_;
  const std::string claim_name_;
  const std::string owner_;
  bool claimed_ = false;
  uint64_t renewals_ = 0;
  Clock::time_point renewed_{};
  ModelRecord record_;
  std::map<std::string, Shortage> short_;  // recorded tables without rows that they must have, by table name
  std::map<std::string, Made> made_;       // by table name
  std::map<std::string, std::string> absent_;
};

}  // namespace hps

#endif  // HPS_CORE_SHARED_TIER_H_
