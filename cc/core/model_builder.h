// Model builder: loads one version of a model into the stores, beside whatever they hold already.

#ifndef HPS_CORE_MODEL_BUILDER_H_
#define HPS_CORE_MODEL_BUILDER_H_

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cc/core/model.h"
#include "cc/core/shared_tier.h"
#include "hps/config.h"
#include "hps/status.h"

namespace hps {

struct BuildOptions {
  double initial_cache_rate = 1.0;
  bool load_volatile = true;    // initialize_after_startup of the tiers: false leaves what is there, makes what is not,
  bool load_persistent = true;  // and puts no rows in
  bool cache_missed_embeddings = false;
  bool show_progress = true;
  const std::atomic<bool>* cancelled = nullptr;                   // as in LoadOptions
  ClaimOptions claim;                                             // of loads into shared volatile stores
  std::optional<uint64_t> available_memory_bytes = std::nullopt;  // absent: what the host has; for tests
  // By table, instead of tables of the model's own (share_tables); nothing is loaded then.
  std::span<const std::shared_ptr<SharedTable>> shared = {};
  CacheParts cache_parts = CacheParts::kAll;
  std::vector<std::string> tables_in_use = {};  // of the persistent store: other generations that stay
};

// A persistent store that holds this very version (fingerprint of the folder) is not written. Otherwise the rows go
// into a new generation of the table, the store's record is switched to it when all are in, and the old generation is
// dropped (whoever has it open may go on reading). The volatile table is filled from the persistent one where that was
// there before, because its rows may be newer than the folder's.
// A volatile store that other nodes share is treated alike, see shared_tier.h.
// On error everything that was made for the version is dropped again.
Result<std::shared_ptr<Model>> BuildModel(const ModelConfig& config, const ServerResources& resources,
                                          const BuildOptions& options);

// Drops the volatile tables of a version that is no longer published, unless other nodes share the store. Shared tables
// (ModelTable::shared) stay.
void DropVolatileTables(const Model& model, const ServerResources& resources);

}  // namespace hps

#endif  // HPS_CORE_MODEL_BUILDER_H_
