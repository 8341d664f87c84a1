// Lock order: mutex_ of a model, that of a shared table, then that of the slot, then what tables and caches lock.

#include "cc/core/row_updates.h"

#include <algorithm>
#include <cstring>

#include "cc/core/model.h"
#include "cc/core/shared_tables.h"
#include "cc/core/tier_row_source.h"

namespace hps {
namespace {

constexpr size_t kKeysPerStep = size_t{1} << 16;

std::string TableContext(const Model& model, uint32_t table) {
  return "model '" + model.config.name + "', table '" + model.tables[table].name + "'";
}

Status CheckTable(const Model& model, uint32_t table) {
  if (table < model.tables.size()) return OkStatus();
  return InvalidArgument("model '" + model.config.name + "' has no table " + std::to_string(table) + "; it has " +
                         std::to_string(model.tables.size()) + " tables, numbered from 0");
}

// Reads the keys anew from the tier that has every row, and writes them to what was filled from it.
Status Reapply(const Model& version, uint32_t table, std::span<const Key> keys) {
  const TierStack& stack = version.tables[table].stack;
  const size_t row_bytes = stack.row_bytes();
  Table* const above = stack.volatile_tier.table.get();
  Table* const below = stack.persistent_tier.table.get();
  std::vector<std::byte> rows(keys.size() * row_bytes);
  std::vector<uint32_t> misses;
  HPS_RETURN_IF_ERROR((below ? below : above)->Fetch({.keys = keys, .rows = {rows.data(), row_bytes}}, &misses));
  std::vector<Key> held, gone;
  size_t missed = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (missed < misses.size() && misses[missed] == i) {
      gone.push_back(keys[i]);
      ++missed;
      continue;
    }
    if (held.size() != i) std::memcpy(rows.data() + held.size() * row_bytes, rows.data() + i * row_bytes, row_bytes);
    held.push_back(keys[i]);
  }
  const ConstRowBuffer buffer{rows.data(), row_bytes};
  if (below != nullptr && above != nullptr) {
    if (!held.empty()) HPS_RETURN_IF_ERROR(above->Upsert(held, buffer));
    if (!gone.empty()) HPS_RETURN_IF_ERROR(above->Erase(gone));
  }
  if (version.caches == nullptr) return OkStatus();
  HPS_RETURN_IF_ERROR(version.caches->Update(table, held, buffer));
  return version.caches->Erase(table, gone);
}

}  // namespace

Status RowUpdates::Upsert(const ModelSlot& slot, uint32_t table, std::span<const Key> keys, ConstRowBuffer rows) {
  std::lock_guard lock(mutex_);
  HPS_ASSIGN_OR_RETURN(const std::shared_ptr<const Model> model, slot.Current());
  HPS_RETURN_IF_ERROR(CheckTable(*model, table));
  const TierStack& stack = model->tables[table].stack;
  if (rows.stride_bytes < stack.row_bytes()) {
    return InvalidArgument(TableContext(*model, table) + ": rows of " + std::to_string(rows.stride_bytes) +
                           " bytes; the table's have " + std::to_string(stack.row_bytes()));
  }
  if (!slot.resources().long_keys) HPS_RETURN_IF_ERROR(CheckShortKeys(keys).WithContext(TableContext(*model, table)));
  if (keys.empty()) return OkStatus();
  if (rows.data == nullptr) {
    return InvalidArgument(TableContext(*model, table) + ": " + std::to_string(keys.size()) +
                           " keys, but no memory for their rows (a null pointer)");
  }
  if (const auto& shared = model->tables[table].shared) {
    return shared->slot.updates().Upsert(shared->slot, 0, keys, rows).WithContext(TableContext(*model, table));
  }
  HPS_RETURN_IF_ERROR(Remember(table, keys));
  const auto write = [&]() -> Status {
    for (const Tier* tier : {&stack.persistent_tier, &stack.volatile_tier}) {
      if (tier->table) HPS_RETURN_IF_ERROR(tier->table->Upsert(keys, rows));
    }
    return model->caches ? model->caches->Update(table, keys, rows) : OkStatus();
  };
  return write().WithContext(TableContext(*model, table));
}

Status RowUpdates::Erase(const ModelSlot& slot, uint32_t table, std::span<const Key> keys) {
  std::lock_guard lock(mutex_);
  HPS_ASSIGN_OR_RETURN(const std::shared_ptr<const Model> model, slot.Current());
  HPS_RETURN_IF_ERROR(CheckTable(*model, table));
  if (keys.empty()) return OkStatus();
  if (const auto& shared = model->tables[table].shared) {
    return shared->slot.updates().Erase(shared->slot, 0, keys).WithContext(TableContext(*model, table));
  }
  HPS_RETURN_IF_ERROR(Remember(table, keys));
  const TierStack& stack = model->tables[table].stack;
  const auto write = [&]() -> Status {
    for (const Tier* tier : {&stack.persistent_tier, &stack.volatile_tier}) {
      if (tier->table) HPS_RETURN_IF_ERROR(tier->table->Erase(keys));
    }
    return model->caches ? model->caches->Erase(table, keys) : OkStatus();
  };
  return write().WithContext(TableContext(*model, table));
}

Status RowUpdates::Remember(uint32_t table, std::span<const Key> keys) {
  if (!remembers_) return OkStatus();
  if (keys.size() > kMostKeys - remembered_) {
    return Unavailable("a new version of the model is being loaded, and " + std::to_string(remembered_) +
                       " keys were updated meanwhile; repeat this update when it is there");
  }
  remembered_ += keys.size();
  std::vector<Key>& of_table = keys_[table];
  of_table.insert(of_table.end(), keys.begin(), keys.end());
  return OkStatus();
}

void RowUpdates::Forget() {
  remembers_ = false;
  remembered_ = 0;
  keys_.clear();
}

void RowUpdates::BeginVersion() {
  std::lock_guard lock(mutex_);
  remembers_ = true;
}

void RowUpdates::AbandonVersion() {
  std::lock_guard lock(mutex_);
  Forget();
}

Status RowUpdates::EndVersion(const Model& version, const std::function<Status()>& publish) {
  std::lock_guard lock(mutex_);
  const auto keys = std::move(keys_);
  Forget();
  for (const auto& [table, written] : keys) {
    if (version.tables[table].shared) continue;  // loaded before, and updated by itself
    for (size_t first = 0; first < written.size(); first += kKeysPerStep) {
      const auto step = std::span(written).subspan(first, std::min(kKeysPerStep, written.size() - first));
      HPS_RETURN_IF_ERROR(Reapply(version, table, step).WithContext(TableContext(version, table)));
    }
  }
  return publish();
}

}  // namespace hps
