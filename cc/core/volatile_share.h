// Which part of a table a load puts into the volatile tier.
//
// The share is initial_cache_rate of the rows, but no more than the tier takes without evicting (CapacityRows in
// cc/storage/overflow.h): what a load evicts it has read for nothing, and without a persistent tier nobody could serve
// it. So without one a table that does not fit is refused: its rows would be answered with the default value, and no
// lookup could tell.
//
// Thread safety: plain functions.

#ifndef HPS_CORE_VOLATILE_SHARE_H_
#define HPS_CORE_VOLATILE_SHARE_H_

#include <cstdint>
#include <string>

#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

// Rows of `rows` that go into `store`. kResourceExhausted: they would not all fit, and there is no persistent tier.
Result<uint64_t> VolatileShare(uint64_t rows, double initial_cache_rate, const TableStore& store, bool persistent);

// After a load into a table without a persistent tier below: kResourceExhausted if chance has filled a partition beyond
// its margin, so that rows are gone.
Status CheckNothingEvicted(const Table& table);

// After a load of the first `rows` rows of a folder into an empty table that never gives up a row by itself, without a
// persistent tier below: how many rows it holds. kDataLoss: fewer than the folder has different keys.
Result<uint64_t> CheckNothingLost(const Table& table, const std::string& folder, uint64_t rows,
                                  const TableStore& store);

}  // namespace hps

#endif  // HPS_CORE_VOLATILE_SHARE_H_
