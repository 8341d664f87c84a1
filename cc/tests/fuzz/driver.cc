// Runs a fuzz target without libFuzzer: every seed as it is, then mutations of seeds and of each other for a while.
//
//   <target>                 HPS_FUZZ_SECONDS (default 1) seconds; prints HPS_TEST_SEED, which repeats a run
//   <target> FILE...         these inputs alone, such as the file that a failure leaves
//   <target> --seeds FOLDER  writes the seeds there, as a corpus for libFuzzer
//
// An input that breaks something is left in the working directory as crash-<target>-<seed>.

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

#include "cc/tests/fuzz/fuzz_target.h"

extern "C" {
// Of the sanitizers' run time, where there is one.
__attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());
}

namespace hps::fuzz {
namespace {

constexpr size_t kLongest = 16 << 10;

// What the crash handler needs; it may call little.
std::string* current = nullptr;
char crash_file[300];

void SaveInput() {
  const int fd = ::open(crash_file, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (fd < 0 || current == nullptr) return;
  (void)!::write(fd, current->data(), current->size());
  ::close(fd);
  constexpr char kText[] = "the input was written to ";
  (void)!::write(2, kText, sizeof(kText) - 1);
  (void)!::write(2, crash_file, std::strlen(crash_file));
  (void)!::write(2, "\n", 1);
}
void OnSignal(int number) {
  SaveInput();
  ::signal(number, SIG_DFL);
  ::raise(number);
}

void Run(std::string input) {
  current = &input;
  // A copy of exactly this size: a read beyond its end is seen by address sanitizer.
  const std::vector<uint8_t> bytes(input.begin(), input.end());
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  current = nullptr;
}

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed), words_(Words()) {}

  std::string Mutate(std::string text, const std::string& other) {
    for (size_t steps = 1 + Below(4); steps > 0; --steps) Step(&text, other);
    if (text.size() > kLongest) text.resize(kLongest);
    return text;
  }
  size_t Below(size_t bound) { return bound == 0 ? 0 : random_() % bound; }

 private:
  void Step(std::string* text, const std::string& other) {
    const size_t at = Below(text->size() + 1);
    const size_t count = Below(std::min<size_t>(text->size() - at, 32) + 1);
    switch (Below(9)) {
      case 0:
        if (at < text->size()) (*text)[at] ^= static_cast<char>(1u << Below(8));
        break;
      case 1:
        if (at < text->size()) (*text)[at] = static_cast<char>(random_());
        break;
      case 2: text->erase(at, count); break;
      case 3: text->insert(at, text->substr(Below(text->size() + 1), Below(64))); break;
      case 4: text->insert(at, 1 + Below(8), static_cast<char>(random_())); break;
      case 5: text->resize(at); break;
      case 6: *text = text->substr(0, at) + other.substr(Below(other.size() + 1)); break;
      case 7:
        if (!words_.empty()) text->replace(at, Below(2) * count, words_[Below(words_.size())]);
        break;
      default: {
        static const char* const kNumbers[] = {"0",
                                               "-1",
                                               "1",
                                               "2147483648",
                                               "4294967296",
                                               "9223372036854775807",
                                               "18446744073709551616",
                                               "-9223372036854775809",
                                               "1e999",
                                               "00",
                                               ""};
        size_t begin = text->find_first_of("0123456789", at);
        if (begin == std::string::npos) break;
        size_t end = text->find_first_not_of("0123456789", begin);
        text->replace(begin, std::min(end, text->size()) - begin, kNumbers[Below(std::size(kNumbers))]);
      }
    }
  }

  std::mt19937_64 random_;
  const std::vector<std::string> words_;
};

double SecondsToRun() {
  const char* text = std::getenv("HPS_FUZZ_SECONDS");
  return text != nullptr ? std::strtod(text, nullptr) : 1.0;
}

int Fuzz(const std::string& name) {
  const char* text = std::getenv("HPS_TEST_SEED");
  const uint64_t seed = text != nullptr ? std::strtoull(text, nullptr, 10) : std::random_device{}();
  std::snprintf(crash_file, sizeof(crash_file), "crash-%s-%llu", name.c_str(), static_cast<unsigned long long>(seed));
  std::printf("%s: HPS_TEST_SEED=%llu\n", name.c_str(), static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  std::vector<std::string> corpus = Seeds();
  const size_t seeds = corpus.size();
  for (const std::string& input : corpus) Run(input);

  Mutator mutator(seed);
  const auto start = std::chrono::steady_clock::now();
  const auto passed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  uint64_t runs = 0;
  for (const double seconds = SecondsToRun(); passed() < seconds; ++runs) {
    const std::string input =
        mutator.Mutate(corpus[mutator.Below(corpus.size())], corpus[mutator.Below(corpus.size())]);
    Run(input);
    // A few mutations join, so that several changes come together; the seeds stay.
    if (mutator.Below(16) != 0) continue;
    if (corpus.size() < seeds + 200) {
      corpus.push_back(input);
    } else {
      corpus[seeds + mutator.Below(200)] = input;
    }
  }
  std::printf("%s: %zu seeds and %llu mutations in %.1f s: %.0f a second\n", name.c_str(), seeds,
              static_cast<unsigned long long>(runs), passed(), static_cast<double>(runs) / passed());
  return 0;
}

int WriteSeeds(const std::filesystem::path& folder) {
  std::filesystem::create_directories(folder);
  size_t number = 0;
  for (const std::string& seed : Seeds()) {
    std::ofstream(folder / std::to_string(number++), std::ios::binary) << seed;
  }
  return 0;
}

int Main(int argc, char** argv) {
  const std::string name = std::filesystem::path(argv[0]).filename();
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(SaveInput);
  for (const int number : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) ::signal(number, OnSignal);
  if (argc == 3 && std::string(argv[1]) == "--seeds") return WriteSeeds(argv[2]);
  if (argc == 1) return Fuzz(name);
  std::snprintf(crash_file, sizeof(crash_file), "/dev/null");
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "there is no file %s\n", argv[i]);
      return 2;
    }
    Run(std::string(std::istreambuf_iterator<char>(file), {}));
  }
  return 0;
}

}  // namespace
}  // namespace hps::fuzz

int main(int argc, char** argv) { return hps::fuzz::Main(argc, argv); }
