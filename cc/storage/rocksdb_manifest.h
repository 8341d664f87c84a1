// A note of how long a database's MANIFEST is, beside it in the folder.
//
// RocksDB takes a MANIFEST that lost its end for an older one: it opens without the tables that the end named, and an
// open for writing deletes their files. So a file `hps_manifest` holds name and size of the MANIFEST as of the last
// flush or orderly close, and opening compares. Databases of other programs have no note, and one that such a program
// opened for writing has a MANIFEST of another name: neither is compared.

#ifndef HPS_STORAGE_ROCKSDB_MANIFEST_H_
#define HPS_STORAGE_ROCKSDB_MANIFEST_H_

#include <filesystem>
#include <string>

#include "hps/status.h"

namespace hps {

// Name and size of the MANIFEST in use; empty where they cannot be read.
std::string ManifestState(const std::filesystem::path& folder);
// kDataLoss, with `where` in front, if the MANIFEST in use is shorter than the note says.
Status CheckManifest(const std::filesystem::path& folder, const std::string& where);
// Writes the note anew. A note that cannot be written (a full disk) is left as it was: it only knows less. To be called
// when the MANIFEST has been synced, by one thread at a time.
void NoteManifest(const std::filesystem::path& folder);

}  // namespace hps

#endif  // HPS_STORAGE_ROCKSDB_MANIFEST_H_
