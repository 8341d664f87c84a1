// TensorFlow's GPUs as the core knows them: their numbers, their streams, and their memory, which TensorFlow takes
// whole when it starts and lends through its own allocators.

#ifndef HPS_OPS_GPU_DEVICES_H_
#define HPS_OPS_GPU_DEVICES_H_

#include "hps/embedding_cache.h"

namespace tensorflow {
class OpKernelContext;
}  // namespace tensorflow

namespace hps {

// Tells the core of every GPU that TensorFlow has in this process or session, whatever device the op runs on. Servers
// that are opened later place their caches there.
void AddTensorFlowDevices(tensorflow::OpKernelContext* context);
// The same once a process, for what is called often.
void AddTensorFlowDevicesOnce(tensorflow::OpKernelContext* context);

// CUDA's number, in this process, of the GPU that the op runs on; -1 on a CPU. Logical GPUs of one GPU share it.
int GpuOrdinal(tensorflow::OpKernelContext* context);
// TensorFlow's stream there. REQUIRES: GpuOrdinal(context) >= 0.
DeviceStream StreamOf(tensorflow::OpKernelContext* context);

}  // namespace hps

#endif  // HPS_OPS_GPU_DEVICES_H_
