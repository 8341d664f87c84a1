// A table folder with files of any size and content: all rows as they stand in the files, or a message. The first eight
// bytes of an input say the width (4), how many of the others are `key` (2), and to which size `key` and `emb_vector`
// are cut while they are read (1 each, in eighths; 8 and more: not at all). The rest of the input is both files.

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "cc/tests/fuzz/fuzz_target.h"
#include "cc/tests/temp_folder.h"
#include "hps/model_reader.h"

namespace hps::fuzz {
namespace {

std::string Input(uint32_t width, uint16_t key_bytes, uint8_t cut_keys, uint8_t cut_rows, const std::string& files) {
  std::string input(8, '\0');
  std::memcpy(input.data(), &width, 4);
  std::memcpy(input.data() + 4, &key_bytes, 2);
  input[6] = static_cast<char>(cut_keys);
  input[7] = static_cast<char>(cut_rows);
  return input + files;
}

void Write(const std::filesystem::path& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

void Cut(const std::filesystem::path& path, size_t bytes, uint8_t eighths) {
  std::error_code failed;
  if (eighths < 8) std::filesystem::resize_file(path, bytes * eighths / 8, failed);
}

}  // namespace

std::vector<std::string> Seeds() {
  const std::string three_rows = std::string(24, 'k') + std::string(3 * 8, 'r');
  return {Input(2, 24, 9, 9, three_rows),
          Input(2, 24, 9, 4, three_rows),
          Input(2, 24, 0, 9, three_rows),
          Input(3, 24, 9, 9, three_rows),
          Input(0, 24, 9, 9, three_rows),
          Input(0xffffffff, 24, 9, 9, three_rows),
          Input(0x80000000, 16, 9, 9, std::string(16, 'k')),
          Input(1, 4096, 9, 9, std::string(4096 + 2048, 'x')),
          Input(1, 0, 9, 9, ""),
          ""};
}
std::vector<std::string> Words() {
  return {std::string(8, '\0'), std::string(8, '\xff'), std::string("\x00\x00\x00\x40", 4), "k", "12345678"};
}

void RunTarget(std::string_view input) {
  // In memory where that can be had: a file system on disk writes a file out when it is emptied and filled again.
  if (::access("/dev/shm", W_OK) == 0) ::setenv("TMPDIR", "/dev/shm", 0);
  static const testing::TempFolder folder("hps_fuzz");
  if (input.size() < 8) return;
  uint32_t width = 0;
  uint16_t key_bytes = 0;
  std::memcpy(&width, input.data(), 4);
  std::memcpy(&key_bytes, input.data() + 4, 2);
  const auto cut_keys = static_cast<uint8_t>(input[6]);
  const auto cut_rows = static_cast<uint8_t>(input[7]);
  const std::string_view keys = input.substr(8, std::min<size_t>(key_bytes, input.size() - 8));
  const std::string_view rows = input.substr(8 + keys.size());
  Write(folder / "key", keys);
  Write(folder / "emb_vector", rows);

  (void)FingerprintTableFolder(folder.path().string(), width);
  Result<std::unique_ptr<ModelReader>> reader = OpenTableFolder(folder.path().string(), width);
  if (!reader.ok()) {
    FUZZ_CHECK(
        reader.status().code() == StatusCode::kInvalidArgument || reader.status().code() == StatusCode::kDataLoss,
        reader.status().ToString());
    return;
  }
  FUZZ_CHECK(reader.value()->rows() * 8 == keys.size(), "rows()");
  FUZZ_CHECK(reader.value()->rows() * reader.value()->row_bytes() == rows.size(), "row_bytes()");
  Cut(folder / "key", keys.size(), cut_keys);
  Cut(folder / "emb_vector", rows.size(), cut_rows);
  const bool cut = cut_keys < 8 || cut_rows < 8;
  for (int pass = 0; pass < 2; ++pass) {
    size_t row = 0;
    for (;;) {
      const Result<RowChunk> chunk = reader.value()->Next();
      if (!chunk.ok()) {
        FUZZ_CHECK(cut && chunk.status().code() == StatusCode::kDataLoss, chunk.status().ToString());
        return;
      }
      if (chunk.value().keys.empty()) break;
      for (size_t i = 0; i < chunk.value().keys.size(); ++i, ++row) {
        FUZZ_CHECK(std::memcmp(&chunk.value().keys[i], keys.data() + 8 * row, 8) == 0, "another key");
        const std::byte* got = chunk.value().rows.data + i * chunk.value().rows.stride_bytes;
        const size_t bytes = reader.value()->row_bytes();
        FUZZ_CHECK(std::memcmp(got, rows.data() + bytes * row, bytes) == 0, "another row");
      }
    }
    FUZZ_CHECK(row == reader.value()->rows(), "rows are missing");
    FUZZ_CHECK(!cut, "a file was cut and nobody noticed");
    FUZZ_CHECK(reader.value()->Rewind().ok(), "Rewind");
  }
}

}  // namespace hps::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  hps::fuzz::RunTarget(std::string_view(reinterpret_cast<const char*>(data), size));
  return 0;
}
