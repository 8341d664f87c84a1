// A fuzz target: bytes of any kind go in, and nothing may break. The same source links with libFuzzer (clang,
// HPS_LIBFUZZER=ON) and with the driver of ours beside this file (any compiler; see driver.cc for its use).

#ifndef HPS_TESTS_FUZZ_FUZZ_TARGET_H_
#define HPS_TESTS_FUZZ_FUZZ_TARGET_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

// Returns 0. A broken promise ends in FUZZ_CHECK, a broken program in a signal or a sanitizer's report.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace hps::fuzz {

// Inputs to begin with: at least one that is valid, and every input that has once broken something.
std::vector<std::string> Seeds();
// Words of the format, for mutations.
std::vector<std::string> Words();

}  // namespace hps::fuzz

#define FUZZ_CHECK(condition, text)                                                                         \
  do {                                                                                                      \
    if (!(condition)) {                                                                                     \
      std::fprintf(stderr, "%s:%d: %s\n  %s\n", __FILE__, __LINE__, #condition, std::string(text).c_str()); \
      std::abort();                                                                                         \
    }                                                                                                       \
  } while (false)

#endif  // HPS_TESTS_FUZZ_FUZZ_TARGET_H_
