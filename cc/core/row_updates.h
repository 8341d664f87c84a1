// RowUpdates: changes rows of one model where its lookups find them: the tiers first, from slow to fast, then the
// caches of every device. In this order a row that is on its way into a cache meanwhile is left out or overwritten
// (embedding_cache.h).
//
// A table that models share (shared_tables.h) has updates of its own, to which those of its models are passed on.
//
// While a new version of the model is being built, the keys that are written are remembered. They are applied to it
// before it is published: a copy of the tables may have passed them before they were written.
//
// Thread safety: all methods may be called from any thread; updates of one model are made one after another, which
// keeps the order of two updates of a key the same in tiers and caches.

#ifndef HPS_CORE_ROW_UPDATES_H_
#define HPS_CORE_ROW_UPDATES_H_

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <span>
#include <vector>

#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

struct Model;
class ModelSlot;

class RowUpdates {
 public:
  // Keys that are remembered at most.
  static constexpr size_t kMostKeys = size_t{1} << 24;

  // On the model's current version. Errors: ParameterServer::UpdateRows.
  Status Upsert(const ModelSlot& slot, uint32_t table, std::span<const Key> keys, ConstRowBuffer rows);
  Status Erase(const ModelSlot& slot, uint32_t table, std::span<const Key> keys);

  // A new version is going to be built.
  void BeginVersion();
  // It is built: applies the remembered keys to it, then calls `publish`, with no update between. On error, which may
  // be publish's own, updates go on as if no version had been built.
  Status EndVersion(const Model& version, const std::function<Status()>& publish);
  void AbandonVersion();

 private:
  Status Remember(uint32_t table, std::span<const Key> keys);  // REQUIRES: mutex_
  void Forget();                                               // REQUIRES: mutex_

  std::mutex mutex_;  // guards the following members; held while an update is made
  bool remembers_ = false;
  size_t remembered_ = 0;
  std::map<uint32_t, std::vector<Key>> keys_;  // by table
};

}  // namespace hps

#endif  // HPS_CORE_ROW_UPDATES_H_
