// ModelRecord: what a store remembers about the version of a model it holds.
//
// Kept as the store's record "hps.model.<model>" and written only after all rows of the version are in, so that a load
// that was cut short is not taken for a version. One record covers all tables of a model: switching a model to a new
// version is one write. Text, one line a table: generation, rows, table name and fingerprint, parted by tabs. Format 2,
// with all_rows behind rows, is written where a table has them, so that older programs refuse what they would take for
// whole.

#ifndef HPS_CORE_MODEL_RECORD_H_
#define HPS_CORE_MODEL_RECORD_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

struct TableRecord {
  uint64_t generation = 0;  // 0 has the predecessor's bare table name
  std::string fingerprint;  // of the folder its rows were loaded from; empty while a first load is running
  // Held after the load (an estimate where the store only estimates). 0: none; in a shared volatile store: not known.
  uint64_t rows = 0;
  uint64_t all_rows = 0;  // in a shared volatile store that was given only some of them: how many there are, about
};

struct ModelRecord {
  std::map<std::string, TableRecord> tables;  // by table name
};

// "hps_et.<model>.<table>", with "@<generation>" when that is not 0.
std::string StoredTableName(std::string_view model, std::string_view table, uint64_t generation);
// Which generation of the table `stored` names; nothing where it names something else.
std::optional<uint64_t> GenerationOf(std::string_view stored, std::string_view model, std::string_view table);

// An empty record where the store has none. kDataLoss where it cannot be understood.
Result<ModelRecord> ReadModelRecord(const TableStore& store, std::string_view model);
// An empty record is erased.
Status WriteModelRecord(TableStore& store, std::string_view model, const ModelRecord& record);

}  // namespace hps

#endif  // HPS_CORE_MODEL_RECORD_H_
