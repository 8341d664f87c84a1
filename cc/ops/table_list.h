// The attribute `tables` of the lookup ops: which tables of which model an op asks, and how wide their rows must be.
//
//   MODEL/TABLE:WIDTH,TABLE:WIDTH,...     as in  wdl/user:16,item:16
//
// TABLE is a table's name, or # and its number in the model. One attribute and not one for each of these, because
// every attribute costs time in each eager call.

#ifndef HPS_OPS_TABLE_LIST_H_
#define HPS_OPS_TABLE_LIST_H_

#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/status.h"

namespace hps {

struct ListedTable {
  std::string name;    // empty: by number
  int32_t number = 0;  // may be negative, which a lookup refuses
  int32_t width = 0;   // at least 1
};

struct TableList {
  std::string model;
  std::vector<ListedTable> tables;  // at least one

  absl::Status Parse(std::string_view text) {
    const auto wrong = [text] {
      return absl::InvalidArgumentError(
          "tables must be like model/table:width,table:width, a table by its name or by # "
          "and its number, but are \"" +
          std::string(text) + "\"");
    };
    const auto number = [](std::string_view digits, int32_t* value) {
      const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), *value);
      return error == std::errc() && end == digits.data() + digits.size();
    };
    const size_t slash = text.find('/');
    if (slash == 0 || slash == std::string_view::npos) return wrong();
    model = text.substr(0, slash);
    tables.clear();
    for (size_t begin = slash + 1; begin <= text.size();) {
      const size_t end = std::min(text.find(',', begin), text.size());
      const std::string_view entry = text.substr(begin, end - begin);
      const size_t colon = entry.rfind(':');
      ListedTable table;
      if (colon == 0 || colon == std::string_view::npos || !number(entry.substr(colon + 1), &table.width)) {
        return wrong();
      }
      if (entry[0] != '#') {
        table.name = entry.substr(0, colon);
      } else if (!number(entry.substr(1, colon - 1), &table.number)) {
        return wrong();
      }
      if (table.width <= 0) {
        return absl::InvalidArgumentError("emb_vec_size must be positive, got " + std::to_string(table.width));
      }
      tables.push_back(std::move(table));
      begin = end + 1;
    }
    return absl::OkStatus();
  }
};

}  // namespace hps

#endif  // HPS_OPS_TABLE_LIST_H_
