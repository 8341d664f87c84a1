#include <cuda_runtime.h>

#include "tests/gpu/stream_graph.h"

namespace hps::testing {

int BeginCapture(cudaStream_t stream) { return cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal); }

std::unique_ptr<StreamGraph> StreamGraph::EndCapture(cudaStream_t stream, int* error) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  *error = cudaStreamEndCapture(stream, &graph);
  if (*error == 0) *error = cudaGraphInstantiate(&executable, graph, 0);
  if (graph != nullptr) (void)cudaGraphDestroy(graph);
  if (*error != 0) {
    (void)cudaGetLastError();
    return nullptr;
  }
  std::unique_ptr<StreamGraph> result(new StreamGraph);
  result->executable_ = executable;
  return result;
}

StreamGraph::~StreamGraph() { (void)cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_)); }

int StreamGraph::Replay(cudaStream_t stream) const {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), stream);
}

}  // namespace hps::testing
