// Invariant: of one folder's rows no two versions have a table in common, in any tier: an update of one would not reach
// the other's faster tiers and caches. So a version is told by what decides which tables a load would open or make:
// the folder's fingerprint, or the record of a store that is not loaded.

#include "cc/core/shared_tables.h"

#include <algorithm>
#include <map>
#include <optional>

#include "cc/config/sharing.h"
#include "cc/core/model_record.h"
#include "hps/log.h"
#include "hps/model_reader.h"

namespace hps {
namespace {

bool Contains(const std::vector<int32_t>& devices, int32_t device) {
  return std::find(devices.begin(), devices.end(), device) != devices.end();
}
std::vector<int32_t> Union(std::vector<int32_t> devices, const std::vector<int32_t>& others) {
  for (const int32_t device : others) {
    if (!Contains(devices, device)) devices.push_back(device);
  }
  return devices;
}

bool Writable(const TableStore* store) { return store != nullptr && store->capabilities().writable; }

std::string PersistentTableOf(const Model& model) {
  const auto& table = model.tables[0].stack.persistent_tier.table;
  return table ? table->spec().name : "";
}

}  // namespace

std::vector<int32_t> SharedTables::DevicesOf(const ModelConfig& model) const {
  return ModelCaches::Wanted(model, resources_->devices.get()) ? model.deployed_devices : std::vector<int32_t>();
}

std::vector<SharedTables::Entry> SharedTables::entries() const {
  std::lock_guard lock(mutex_);
  return entries_;
}

Result<std::vector<ModelCaches::Planned>> SharedTables::Plan(std::span<const ModelConfig> models) const {
  HPS_RETURN_IF_ERROR(CheckSharing(models));
  std::vector<ModelCaches::Planned> planned;
  std::map<std::string, ModelConfig> shared;  // by name
  for (const ModelConfig& model : models) {
    planned.push_back({model, model.share_tables ? CacheParts::kWorkspaces : CacheParts::kAll});
    if (!model.share_tables) continue;
    for (const TableConfig& table : model.tables) {
      const ModelConfig hidden = SharedTableModel(model, table, DevicesOf(model));
      const auto [found, added] = shared.try_emplace(hidden.name, hidden);
      if (added) continue;
      ModelConfig& first = found->second;
      std::vector<int32_t> devices = Union(first.deployed_devices, hidden.deployed_devices);
      if (first.deployed_devices.empty() && !devices.empty()) first = hidden;
      first.deployed_devices = std::move(devices);
    }
  }
  for (const Entry& entry : entries()) {
    const auto found = shared.find(entry.table->slot.name());
    const auto current = entry.table->slot.Current();
    if (found == shared.end() || !current.ok()) continue;
    std::erase_if(found->second.deployed_devices,
                  [&](int32_t device) { return Contains((*current)->config.deployed_devices, device); });
  }
  for (auto& [name, first] : shared) planned.push_back({std::move(first), CacheParts::kTables});
  return planned;
}

Result<std::string> SharedTables::StoredVersion(const std::string& name, const TableStore& store) const {
  HPS_ASSIGN_OR_RETURN(const ModelRecord record, ReadModelRecord(store, name));
  const auto found = record.tables.find(kSharedRows);
  if (found == record.tables.end()) return std::string("without a record");
  return std::to_string(found->second.generation) + " " + found->second.fingerprint;
}

Result<std::vector<std::shared_ptr<SharedTable>>> SharedTables::Acquire(const ModelConfig& model,
                                                                        const BuildOptions& options) {
  std::vector<std::shared_ptr<SharedTable>> tables;
  for (const TableConfig& table : model.tables) {
    auto acquired = AcquireOne(model, table, options);
    if (!acquired.ok()) {
      Release(model, tables);
      return acquired.status().WithContext("model '" + model.name + "', table '" + table.name + "'");
    }
    tables.push_back(*std::move(acquired));
    std::lock_guard lock(mutex_);
    for (Entry& entry : entries_) {
      if (entry.table == tables.back()) entry.uses.push_back({model.name, DevicesOf(model)});
    }
  }
  return tables;
}

Result<std::shared_ptr<SharedTable>> SharedTables::AcquireOne(const ModelConfig& model, const TableConfig& table,
                                                              const BuildOptions& options) {
  const ModelConfig hidden = SharedTableModel(model, table, DevicesOf(model));
  const TableStore* const persistent = resources_->persistent_store.get();
  const TableStore* const volatile_store = resources_->volatile_store.get();
  std::string loaded;
  bool ask_volatile = false;
  if (persistent != nullptr && (!Writable(persistent) || !options.load_persistent)) {
    HPS_ASSIGN_OR_RETURN(loaded, StoredVersion(hidden.name, *persistent));
  } else {
    if (persistent != nullptr || options.load_volatile) {
      HPS_ASSIGN_OR_RETURN(loaded, FingerprintTableFolder(hidden.tables[0].path, table.width));
    }
    ask_volatile = persistent == nullptr && volatile_store->capabilities().shared;
  }
  std::string version = loaded;
  if (ask_volatile) {
    HPS_ASSIGN_OR_RETURN(const std::string stored, StoredVersion(hidden.name, *volatile_store));
    version += "\n" + stored;
  }
  for (const Entry& entry : entries()) {
    if (entry.table->slot.name() != hidden.name || entry.table->version != version) continue;
    return Join(entry, model, table, options);
  }
  return Build(hidden, loaded, ask_volatile, options);
}

Result<std::shared_ptr<SharedTable>> SharedTables::Join(const Entry& entry, const ModelConfig& model,
                                                        const TableConfig& table, const BuildOptions& options) {
  const ModelConfig hidden = SharedTableModel(model, table, DevicesOf(model));
  HPS_ASSIGN_OR_RETURN(const std::shared_ptr<const Model> current, entry.table->slot.Current());
  const std::vector<int32_t>& devices = current->config.deployed_devices;
  const bool caches = !devices.empty() && !hidden.deployed_devices.empty();
  if (const auto difference = FirstDifference(current->config, hidden, caches)) {
    // Of caches the first model that has some says how they are.
    const auto first = std::find_if(entry.uses.begin(), entry.uses.end(),
                                    [&](const Use& use) { return !caches || !use.devices.empty(); });
    return RefuseSharing(*difference, entry.table->folder, first == entry.uses.end() ? model.name : first->model,
                         model.name);
  }
  std::vector<int32_t> all = Union(devices, hidden.deployed_devices);
  if (all.size() > devices.size()) {
    HPS_RETURN_IF_ERROR(
        SetDevices(*entry.table, devices.empty() ? hidden : current->config, std::move(all), options.cancelled));
  }
  return entry.table;
}

Result<std::shared_ptr<SharedTable>> SharedTables::Build(const ModelConfig& hidden, const std::string& loaded,
                                                         bool ask_volatile, const BuildOptions& options) {
  BuildOptions build = options;
  build.cache_parts = CacheParts::kTables;
  for (const Entry& entry : entries()) {
    const auto current = entry.table->slot.Current();
    if (current.ok() && entry.table->slot.name() == hidden.name) {
      build.tables_in_use.push_back(PersistentTableOf(**current));
    }
  }
  HPS_ASSIGN_OR_RETURN(const std::shared_ptr<Model> model, BuildModel(hidden, *resources_, build));
  std::string version = loaded;
  if (ask_volatile) {
    auto stored = StoredVersion(hidden.name, *resources_->volatile_store);
    version += "\n" + (stored.ok() ? *stored : "not known");  // then the next model loads its own
  }
  auto table = std::make_shared<SharedTable>(hidden.name, hidden.tables[0].path, std::move(version), resources_);
  table->slot.Publish(model);
  for (const Entry& entry : entries()) entry.table->outdated |= entry.table->slot.name() == hidden.name;
  if (model->caches) model->caches->Start(*resources_->devices);
  std::lock_guard lock(mutex_);
  entries_.push_back({table, {}});
  return table;
}

// A version with the same tiers and the caches that stay. What is updated while those that come are filled is applied
// to them before updates find them.
Status SharedTables::SetDevices(SharedTable& table, ModelConfig config, const std::vector<int32_t>& devices,
                                const std::atomic<bool>* cancelled) {
  HPS_ASSIGN_OR_RETURN(const std::shared_ptr<const Model> before, table.slot.Current());
  const auto model = std::make_shared<Model>();
  config.deployed_devices = devices;
  model->config = std::move(config);
  model->version = before->version + 1;
  model->tables = before->tables;
  table.slot.updates().BeginVersion();
  if (ModelCaches::Wanted(model->config, resources_->devices.get())) {
    const CachedTable cached{&model->tables[0].stack,
                             resources_->volatile_store && resources_->volatile_store->capabilities().shared};
    CacheBuildOptions options;
    options.long_keys = resources_->long_keys;
    options.executor = options.io_executor = resources_->executor.get();
    options.cancelled = cancelled;
    options.parts = CacheParts::kTables;
    options.kept = before->caches.get();
    auto caches =
        ModelCaches::Build(model->config, std::span(&cached, 1), options, *resources_->devices, resources_->metrics);
    if (!caches.ok()) {
      table.slot.updates().AbandonVersion();
      return caches.status();
    }
    model->caches = std::move(caches).value();
  }
  HPS_RETURN_IF_ERROR(table.slot.updates().EndVersion(*model, [&] {
    if (model->caches && before->caches) model->caches->CountOnFrom(*before->caches);
    table.slot.Publish(model);
    return OkStatus();
  }));
  if (model->caches) model->caches->Start(*resources_->devices, before->caches.get());
  if (before->caches) before->caches->Stop(*resources_->devices, model->caches.get());
  return OkStatus();
}

void SharedTables::Release(const ModelConfig& model, std::span<const std::shared_ptr<SharedTable>> tables) {
  for (const auto& table : tables) ReleaseOne(model.name, DevicesOf(model), *table);
}

void SharedTables::ReleaseOne(const std::string& model, const std::vector<int32_t>& devices, const SharedTable& table) {
  std::shared_ptr<SharedTable> unused, used;
  std::vector<int32_t> wanted;
  {
    std::lock_guard lock(mutex_);
    const auto found =
        std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) { return entry.table.get() == &table; });
    if (found == entries_.end()) return;  // the server was closed
    const auto use = std::find_if(found->uses.begin(), found->uses.end(),
                                  [&](const Use& each) { return each.model == model && each.devices == devices; });
    if (use != found->uses.end()) found->uses.erase(use);
    for (const Use& each : found->uses) wanted = Union(std::move(wanted), each.devices);
    (found->uses.empty() ? unused : used) = found->table;
    if (unused) entries_.erase(found);
  }
  if (unused) return LetGoOf(*unused);
  const auto current = used->slot.Current();
  if (!current.ok() || wanted.size() == (*current)->config.deployed_devices.size()) return;
  const Status set = SetDevices(*used, (*current)->config, wanted, nullptr);
  if (!set.ok())
    Log(LogLevel::kWarning, "shared table folder " + used->folder + ": its caches stay: " + set.ToString());
}

void SharedTables::LetGoOf(SharedTable& table) {
  std::shared_ptr<const Model> model = table.slot.Withdraw(NotFound("no model uses these rows any more"));
  if (model == nullptr) return;
  const std::string stored = PersistentTableOf(*model);
  let_go_(std::move(model));
  TableStore* const persistent = resources_->persistent_store.get();
  if (!table.outdated || !Writable(persistent)) return;
  // A generation that was kept for a model, and that the record does not name any more.
  const auto record = ReadModelRecord(*persistent, table.slot.name());
  if (!record.ok()) return;
  const auto found = record->tables.find(kSharedRows);
  if (found == record->tables.end()) return;
  if (StoredTableName(table.slot.name(), kSharedRows, found->second.generation) == stored) return;
  const Status dropped = persistent->DropTable(stored);
  if (!dropped.ok() && dropped.code() != StatusCode::kNotFound) {
    Log(LogLevel::kWarning, "rows of " + table.folder + " that no model uses any more: " + dropped.ToString());
  }
}

std::vector<SharedTables::Held> SharedTables::held() const {
  std::vector<Held> all;
  for (const Entry& entry : entries()) {
    Held& held = all.emplace_back();
    held.table = entry.table;
    for (const Use& use : entry.uses) {
      if (std::find(held.models.begin(), held.models.end(), use.model) == held.models.end()) {
        held.models.push_back(use.model);
      }
    }
  }
  return all;
}

std::vector<SharedTables::Held> SharedTables::Clear(const Status& reason) {
  std::vector<Held> all = held();
  for (const Held& each : all) each.table->slot.Withdraw(reason);
  std::lock_guard lock(mutex_);
  entries_.clear();
  return all;
}

}  // namespace hps
