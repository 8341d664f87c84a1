// The note is replaced by renaming, so a reader sees the old or the new one.

#include "cc/storage/rocksdb_manifest.h"

#include <cstdint>
#include <fstream>
#include <system_error>

namespace hps {
namespace {

namespace fs = std::filesystem;

constexpr const char* kNoteFile = "hps_manifest";

// What CURRENT names; empty where it cannot be read, which RocksDB will tell better.
std::string ManifestInUse(const fs::path& folder) {
  std::string name;
  std::ifstream(folder / "CURRENT") >> name;
  return name;
}

}  // namespace

std::string ManifestState(const fs::path& folder) {
  const std::string name = ManifestInUse(folder);
  std::error_code error;
  const uint64_t bytes = name.empty() ? 0 : fs::file_size(folder / name, error);
  return name.empty() || error ? "" : name + ' ' + std::to_string(bytes);
}

Status CheckManifest(const fs::path& folder, const std::string& where) {
  std::string noted_name;
  uint64_t noted_bytes = 0;
  if (!(std::ifstream(folder / kNoteFile) >> noted_name >> noted_bytes)) return OkStatus();
  if (noted_name != ManifestInUse(folder)) return OkStatus();
  std::error_code error;
  const uint64_t bytes = fs::file_size(folder / noted_name, error);
  if (error || bytes >= noted_bytes) return OkStatus();
  return DataLoss(where + ": \"" + (folder / noted_name).string() + "\" has " + std::to_string(bytes) +
                  " bytes and had " + std::to_string(noted_bytes) +
                  " when it was last flushed: its end is lost, and with it the names of table files; restore the "
                  "folder, or delete it and load the model again");
}

void NoteManifest(const fs::path& folder) {
  const std::string state = ManifestState(folder);
  if (state.empty()) return;
  const fs::path draft = folder / (std::string(kNoteFile) + ".draft");
  std::ofstream file(draft, std::ios::trunc);
  file << state << '\n';
  file.close();
  std::error_code error;
  if (file.good()) fs::rename(draft, folder / kNoteFile, error);
  if (!file.good() || error) fs::remove(draft, error);
}

}  // namespace hps
