// ModelReader: the rows of one table as they come from a trained model, in chunks.
//
// Format of a table folder (the predecessor's): `key`, int64 little-endian, always 8 bytes a key; `emb_vector`, float32
// little-endian, row-major [rows, width]; row i belongs to key i. Other files are ignored.
//
// Thread safety: one thread at a time.

#ifndef HPS_MODEL_READER_H_
#define HPS_MODEL_READER_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

struct RowChunk {
  std::span<const Key> keys;  // (n); empty at the end of the table
  ConstRowBuffer rows;        // (n)
};

class ModelReader {
 public:
  virtual ~ModelReader() = default;
  virtual uint64_t rows() const = 0;
  virtual size_t row_bytes() const = 0;
  // The next chunk, valid until the next call. kDataLoss where a file shrank meanwhile.
  virtual Result<RowChunk> Next() = 0;
  // Begins again at the first row.
  virtual Status Rewind() = 0;
};

// Opens a key / emb_vector folder and checks the sizes of both files against each other and against `width`.
// kNotFound: no such folder or file; kInvalidArgument: rows of another width; kDataLoss: empty or truncated files.
Result<std::unique_ptr<ModelReader>> OpenTableFolder(const std::string& path, uint32_t width);

// Identifies the version of a table folder without reading all of it: sizes, modification times and a hash of blocks
// spread over both files. Equal text means the same version.
Result<std::string> FingerprintTableFolder(const std::string& path, uint32_t width);

// How many of the keys of the first `rows` rows of a folder are in 0 .. rows - 1, in any order: what decides about the
// size of an index. Reads up to `whole_rows` keys; of more it reads blocks that are spread over them, and estimates.
struct DenseKeys {
  uint64_t rows = 0;
  bool sampled = false;
  bool others_early = false;  // among the first 1/16 of the rows are other keys
};
Result<DenseKeys> CountDenseKeys(const std::string& path, uint64_t rows, uint64_t whole_rows = uint64_t{8} << 20);

// How many different keys the first `rows` rows of a folder have, exactly. Reads the key file once for about every
// `keys_at_once` rows, of which it keeps the keys in memory: for rare cases.
Result<uint64_t> CountDistinctKeys(const std::string& path, uint64_t rows, uint64_t keys_at_once = uint64_t{16} << 20);

}  // namespace hps

#endif  // HPS_MODEL_READER_H_
