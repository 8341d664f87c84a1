// SharedTables: the tables of one server that several models share (share_tables).
//
// A shared table is one folder's rows: one table in each tier and one cache on each device, for all models that share
// tables and name the folder. It is built, recorded, claimed, updated and let go of as a model of its own with the
// single table "rows", which no session can reach: a model's table borrows its tiers and caches when it is built
// (ModelTable::shared), so a lookup takes the same way as over tables of the model's own. In stores and metrics that
// model has a name made of the folder's canonical path (SharedTableName), whichever model comes first.
//
// The rows of a folder have versions, as models have. A model that is loaded or replaced joins the rows that are held
// where a load would give just those; where the folder has changed since, it gets new ones, and models that are not
// replaced keep theirs, unshared with it. A version goes with its last model.
//
// Its caches are on the devices of all its models together. They come with the first model of a device and go with the
// last one.
//
// Thread safety: held() and Clear() may be called from any thread, the others by one thread at a time.
// Lock order: mutex_ is a leaf. Ownership: models keep their shared tables, and sessions what they need, alive.

#ifndef HPS_CORE_SHARED_TABLES_H_
#define HPS_CORE_SHARED_TABLES_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "cc/core/model.h"
#include "cc/core/model_builder.h"
#include "hps/config.h"
#include "hps/status.h"

namespace hps {

struct SharedTable {
  SharedTable(std::string name, std::string folder, std::string version, std::shared_ptr<ServerResources> resources)
      : folder(std::move(folder)), version(std::move(version)), slot(std::move(name), std::move(resources)) {}

  const std::string folder;   // canonical
  const std::string version;  // of its rows: what a load would give is compared with it
  ModelSlot slot;             // the model of one table; its versions differ by their devices only
  bool outdated = false;      // the folder's rows were loaded again, for others; of SharedTables
};

class SharedTables {
 public:
  using LetGo = std::function<void(std::shared_ptr<const Model>)>;

  // let_go: what is done with a version that nobody uses any more.
  SharedTables(std::shared_ptr<ServerResources> resources, LetGo let_go)
      : resources_(std::move(resources)), let_go_(std::move(let_go)) {}

  // The caches that loading these models will make. kInvalidArgument: two of them share a folder and differ in what
  // must be the same.
  Result<std::vector<ModelCaches::Planned>> Plan(std::span<const ModelConfig> models) const;

  // The shared tables of a model's tables, in their order; loads what is not there. kInvalidArgument: as Plan, with a
  // model that is loaded; the other errors are BuildModel's. On error nothing is left.
  Result<std::vector<std::shared_ptr<SharedTable>>> Acquire(const ModelConfig& model, const BuildOptions& options);
  // When the version of the model that they were acquired for does not serve (any more).
  void Release(const ModelConfig& model, std::span<const std::shared_ptr<SharedTable>> tables);

  struct Held {
    std::shared_ptr<SharedTable> table;
    std::vector<std::string> models;
  };
  std::vector<Held> held() const;
  // At the end: withdraws all. What is returned holds the last references.
  std::vector<Held> Clear(const Status& reason);

 private:
  struct Use {
    std::string model;
    std::vector<int32_t> devices;
  };
  struct Entry {
    std::shared_ptr<SharedTable> table;
    std::vector<Use> uses;
  };

  std::vector<int32_t> DevicesOf(const ModelConfig& model) const;
  Result<std::string> StoredVersion(const std::string& name, const TableStore& store) const;
  Result<std::shared_ptr<SharedTable>> AcquireOne(const ModelConfig& model, const TableConfig& table,
                                                  const BuildOptions& options);
  Result<std::shared_ptr<SharedTable>> Join(const Entry& entry, const ModelConfig& model, const TableConfig& table,
                                            const BuildOptions& options);
  Result<std::shared_ptr<SharedTable>> Build(const ModelConfig& hidden, const std::string& loaded, bool ask_volatile,
                                             const BuildOptions& options);
  Status SetDevices(SharedTable& table, ModelConfig config, const std::vector<int32_t>& devices,
                    const std::atomic<bool>* cancelled);
  void ReleaseOne(const std::string& model, const std::vector<int32_t>& devices, const SharedTable& table);
  void LetGoOf(SharedTable& table);
  std::vector<Entry> entries() const;

  const std::shared_ptr<ServerResources> resources_;
  const LetGo let_go_;
  mutable std::mutex mutex_;  // guards entries_
  std::vector<Entry> entries_;
};

}  // namespace hps

#endif  // HPS_CORE_SHARED_TABLES_H_
