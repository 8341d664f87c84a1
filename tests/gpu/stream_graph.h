// A stream's work captured into a CUDA graph, for tests that know no header of CUDA. All calls return 0 or CUDA's
// error.

#ifndef HPS_TESTS_GPU_STREAM_GRAPH_H_
#define HPS_TESTS_GPU_STREAM_GRAPH_H_

#include <memory>

#include "cuda_kernels/device.h"

namespace hps::testing {

// In mode 'thread local': other threads use the device meanwhile.
int BeginCapture(cudaStream_t stream);

class StreamGraph {
 public:
  // Ends the capture. nullptr and *error where it has failed.
  static std::unique_ptr<StreamGraph> EndCapture(cudaStream_t stream, int* error);
  ~StreamGraph();
  StreamGraph(const StreamGraph&) = delete;
  StreamGraph& operator=(const StreamGraph&) = delete;
  int Replay(cudaStream_t stream) const;

 private:
  StreamGraph() = default;
  void* executable_ = nullptr;
};

}  // namespace hps::testing

#endif  // HPS_TESTS_GPU_STREAM_GRAPH_H_
