// Checks LaunchGather on a GPU against a loop on the host, for row sizes of every alignment and indices out of range.
// Exit code: 0 all equal, 1 a difference or no GPU.

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cuda_kernels/gather.h"

namespace {

constexpr float kDefault = -7.5f;

// Returns whether all rows are right. `offset` floats are put before the table, which misaligns it.
bool Check(int64_t table_rows, int64_t width, int64_t count, int64_t offset, std::mt19937_64& random) {
  std::vector<float> table(offset + table_rows * width);
  for (float& value : table) value = static_cast<float>(random() % 100000);
  std::vector<int64_t> indices(count);
  for (int64_t& index : indices) index = static_cast<int64_t>(random() % (table_rows + 4)) - 2;
  if (count > 1) indices[0] = std::numeric_limits<int64_t>::min(), indices[1] = std::numeric_limits<int64_t>::max();

  float *device_table, *device_output;
  int64_t* device_indices;
  cudaMalloc(&device_table, table.size() * sizeof(float) + 16);
  cudaMalloc(&device_indices, count * sizeof(int64_t) + 16);
  cudaMalloc(&device_output, count * width * sizeof(float) + 16);
  cudaMemcpy(device_table, table.data(), table.size() * sizeof(float), cudaMemcpyHostToDevice);
  cudaMemcpy(device_indices, indices.data(), count * sizeof(int64_t), cudaMemcpyHostToDevice);
  const int error = hps::cuda::LaunchGather(device_table + offset, table_rows, width * sizeof(float), device_indices,
                                            count, kDefault, device_output, nullptr);
  std::vector<float> output(count * width);
  cudaMemcpy(output.data(), device_output, output.size() * sizeof(float), cudaMemcpyDeviceToHost);
  const cudaError_t late = cudaDeviceSynchronize();
  cudaFree(device_table), cudaFree(device_indices), cudaFree(device_output);

  std::vector<float> expected(count * width, kDefault);
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= table_rows) continue;
    std::memcpy(&expected[i * width], &table[offset + indices[i] * width], width * sizeof(float));
  }
  const bool equal = error == 0 && late == cudaSuccess && output == expected;
  if (!equal) {
    std::printf("rows %lld width %lld count %lld offset %lld: %s\n", (long long)table_rows, (long long)width,
                (long long)count, (long long)offset,
                error || late ? hps::cuda::ErrorText(error ? error : late) : "wrong");
  }
  return equal;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("gather_check needs a GPU, and CUDA finds none here");
    return 1;
  }
  const uint64_t seed = std::random_device()();
  std::printf("seed %llu\n", (unsigned long long)seed);
  std::mt19937_64 random(seed);
  int checks = 0, failures = 0;
  for (int64_t width : {1, 2, 3, 4, 16, 17, 18, 64, 128, 1031}) {
    for (int64_t count : {0, 1, 33, 4096, 100003}) {
      for (int64_t offset : {0, 1, 2}) {
        ++checks;
        failures += !Check(1 + static_cast<int64_t>(random() % 5000), width, count, offset, random);
      }
    }
  }
  ++checks;
  failures += hps::cuda::LaunchGather(nullptr, 0, 6, nullptr, 1, 0.0f, nullptr, nullptr) == 0;  // 6 bytes: no floats
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures ? 1 : 0;
}
