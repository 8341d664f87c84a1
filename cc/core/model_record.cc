#include "cc/core/model_record.h"

#include <algorithm>
#include <charconv>
#include <utility>
#include <vector>

namespace hps {
namespace {

constexpr std::string_view kFirstLine = "hps model record 1";
constexpr std::string_view kFirstLineOfSome = "hps model record 2";  // tables have all_rows

std::string RecordName(std::string_view model) { return "hps.model." + std::string(model); }

// The parts of `text` between separators; the last one takes the rest.
std::vector<std::string_view> Split(std::string_view text, char separator, size_t most_parts) {
  std::vector<std::string_view> parts;
  while (parts.size() + 1 < most_parts) {
    const size_t end = text.find(separator);
    if (end == std::string_view::npos) break;
    parts.push_back(text.substr(0, end));
    text.remove_prefix(end + 1);
  }
  parts.push_back(text);
  return parts;
}

bool ParseNumber(std::string_view text, uint64_t* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size();
}

std::optional<ModelRecord> ParseRecord(std::string_view text) {
  const std::vector<std::string_view> lines = Split(text, '\n', text.size() + 2);
  const bool some = lines.front() == kFirstLineOfSome;
  if ((!some && lines.front() != kFirstLine) || !lines.back().empty()) return std::nullopt;
  const size_t numbers = some ? 3 : 2;
  ModelRecord record;
  for (size_t i = 1; i + 1 < lines.size(); ++i) {
    const std::vector<std::string_view> parts = Split(lines[i], '\t', numbers + 2);
    TableRecord table;
    if (parts.size() != numbers + 2 || !ParseNumber(parts[0], &table.generation) ||
        !ParseNumber(parts[1], &table.rows) || (some && !ParseNumber(parts[2], &table.all_rows))) {
      return std::nullopt;
    }
    table.fingerprint = parts[numbers + 1];
    record.tables.emplace(parts[numbers], std::move(table));
  }
  return record;
}

}  // namespace

std::string StoredTableName(std::string_view model, std::string_view table, uint64_t generation) {
  std::string name = "hps_et." + std::string(model) + "." + std::string(table);
  if (generation > 0) name += "@" + std::to_string(generation);
  return name;
}

std::optional<uint64_t> GenerationOf(std::string_view stored, std::string_view model, std::string_view table) {
  const std::string first = StoredTableName(model, table, 0);
  if (!stored.starts_with(first)) return std::nullopt;
  stored.remove_prefix(first.size());
  uint64_t generation = 0;
  if (stored.empty()) return generation;
  if (stored.front() != '@' || !ParseNumber(stored.substr(1), &generation)) return std::nullopt;
  return generation;
}

Result<ModelRecord> ReadModelRecord(const TableStore& store, std::string_view model) {
  HPS_ASSIGN_OR_RETURN(const std::optional<std::string> text, store.ReadRecord(RecordName(model)));
  if (!text) return ModelRecord();
  std::optional<ModelRecord> record = ParseRecord(*text);
  if (record) return *std::move(record);
  return DataLoss("the record \"" + RecordName(model) + "\" in the " + std::string(store.kind()) +
                  " store cannot be understood; restore the database, or delete it and load the model anew");
}

Status WriteModelRecord(TableStore& store, std::string_view model, const ModelRecord& record) {
  if (record.tables.empty()) return store.EraseRecord(RecordName(model));
  const bool some = std::any_of(record.tables.begin(), record.tables.end(),
                                [](const auto& entry) { return entry.second.all_rows > 0; });
  std::string text = std::string(some ? kFirstLineOfSome : kFirstLine) + "\n";
  for (const auto& [name, table] : record.tables) {
    text += std::to_string(table.generation) + "\t" + std::to_string(table.rows) + "\t" +
            (some ? std::to_string(table.all_rows) + "\t" : "") + name + "\t" + table.fingerprint + "\n";
  }
  return store.WriteRecord(RecordName(model), text);
}

}  // namespace hps
