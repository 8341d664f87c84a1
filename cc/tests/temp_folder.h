// A folder that exists as long as the object.

#ifndef HPS_TESTS_TEMP_FOLDER_H_
#define HPS_TESTS_TEMP_FOLDER_H_

#include <stdlib.h>

#include <filesystem>
#include <string>

namespace hps::testing {

class TempFolder {
 public:
  explicit TempFolder(const std::string& name = "hps_core") {
    std::string pattern = (std::filesystem::temp_directory_path() / (name + "_XXXXXX")).string();
    path_ = ::mkdtemp(pattern.data());
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_TEMP_FOLDER_H_
