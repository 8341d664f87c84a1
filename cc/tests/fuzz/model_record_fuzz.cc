// The record of a model as a store holds it: understood and written back to the same, or DataLoss.

#include <memory>

#include "cc/core/model_record.h"
#include "cc/storage/hash_map_store.h"
#include "cc/tests/fuzz/fuzz_target.h"

namespace hps::fuzz {

std::vector<std::string> Seeds() {
  return {"hps model record 1\n0\t1000\tusers\twidth 16, 8000 bytes of 1 ns 2, 64000 bytes of 3 ns 4\n",
          "hps model record 1\n18446744073709551615\t0\tfilms\t\n1\t2\tusers\tx\ty\n", "hps model record 1\n",
          "hps model record 2\n", ""};
}
std::vector<std::string> Words() { return {"hps model record 1\n", "\t", "\n", "0", "\t\t\t\n", std::string(1, '\0')}; }

}  // namespace hps::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static hps::TableStore& store = *hps::OpenHashMapStore({.num_partitions = 1}).value().release();
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  FUZZ_CHECK(store.WriteRecord("hps.model.m", text).ok(), "");
  const hps::Result<hps::ModelRecord> record = hps::ReadModelRecord(store, "m");
  if (record.ok()) {
    FUZZ_CHECK(hps::WriteModelRecord(store, "m", record.value()).ok(), "");
    const hps::Result<hps::ModelRecord> again = hps::ReadModelRecord(store, "m");
    FUZZ_CHECK(again.ok(), again.status().ToString());
    FUZZ_CHECK(again.value().tables.size() == record.value().tables.size(), "tables were lost");
    for (const auto& [name, table] : record.value().tables) {
      const auto found = again.value().tables.find(name);
      FUZZ_CHECK(found != again.value().tables.end(), name);
      FUZZ_CHECK(found->second.generation == table.generation && found->second.rows == table.rows &&
                     found->second.fingerprint == table.fingerprint,
                 name);
    }
  } else {
    FUZZ_CHECK(record.status().code() == hps::StatusCode::kDataLoss, record.status().ToString());
  }
  (void)hps::GenerationOf(text, "m", "t");
  return 0;
}
