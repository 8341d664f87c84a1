// Looks up keys in the tables of a ps.json, without Python and TensorFlow:  lookup ps.json MODEL TABLE KEY...
// Prints one line a key: the key and its row. The origin of the rows goes to standard error.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "hps/parameter_server.h"

int Fail(const hps::Status& status) {
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return EXIT_FAILURE;
}

int main(int argc, char** argv) {
  if (argc < 5) return Fail(hps::InvalidArgument("usage: lookup ps.json MODEL TABLE KEY..."));
  std::vector<hps::Key> keys;
  for (int i = 4; i < argc; ++i) keys.push_back(std::strtoll(argv[i], nullptr, 10));

  const auto server = hps::ParameterServer::Open(argv[1]);
  if (!server.ok()) return Fail(server.status());
  const auto session = server.value()->NewSession(argv[2]);
  if (!session.ok()) return Fail(session.status());
  const auto table = session->FindTable(argv[3]);
  if (!table.ok()) return Fail(table.status());

  const uint32_t width = session->Tables().value()[*table].width;
  std::vector<float> rows(keys.size() * width);
  hps::LookupReport report;
  const hps::DenseLookup lookup{.table = *table, .width = width, .keys = keys, .rows = rows.data()};
  if (const auto status = session->Lookup({&lookup, 1}, {}, &report); !status.ok()) return Fail(status);

  for (size_t i = 0; i < keys.size(); ++i) {
    std::printf("%lld", static_cast<long long>(keys[i]));
    for (uint32_t j = 0; j < width; ++j) std::printf(" %.9g", rows[i * width + j]);
    std::printf("\n");
  }
  std::fprintf(stderr, "rows from volatile %llu, persistent %llu, default %llu\n",
               static_cast<unsigned long long>(report.rows_from_volatile),
               static_cast<unsigned long long>(report.rows_from_persistent),
               static_cast<unsigned long long>(report.rows_from_default));
  return EXIT_SUCCESS;
}
