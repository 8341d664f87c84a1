// HostTensors: the tensors of an op in host memory, wherever the op runs. For ops on a GPU whose rows come from the
// tiers alone: inputs are copied from the GPU, outputs to it; TensorFlow's copies, each waited for.

#ifndef HPS_OPS_HOST_TENSORS_H_
#define HPS_OPS_HOST_TENSORS_H_

#include <utility>
#include <vector>

#include "cc/ops/gpu_devices.h"
#include "tensorflow/core/common_runtime/device.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace hps {

class HostTensors {
 public:
  explicit HostTensors(tensorflow::OpKernelContext* context) : context_(context), on_host_(GpuOrdinal(context) < 0) {}

  absl::Status Input(int index, tensorflow::Tensor* tensor) const {
    const tensorflow::Tensor& input = context_->input(index);
    if (on_host_ || context_->input_memory_type(index) == tensorflow::HOST_MEMORY) {
      *tensor = input;
      return absl::OkStatus();
    }
    TF_RETURN_IF_ERROR(context_->allocate_temp(input.dtype(), input.shape(), tensor, Pinned()));
    return context_->op_device_context()->CopyDeviceTensorToCPUSync(&input, "", device(), tensor);
  }

  absl::Status AllocateTemp(tensorflow::DataType type, const tensorflow::TensorShape& shape,
                            tensorflow::Tensor* tensor) const {
    return context_->allocate_temp(type, shape, tensor, Pinned());
  }

  // *tensor is to be written, then Finish called.
  absl::Status AllocateOutput(int index, const tensorflow::TensorShape& shape, tensorflow::Tensor* tensor) {
    if (on_host_) {
      tensorflow::Tensor* output = nullptr;
      TF_RETURN_IF_ERROR(context_->allocate_output(index, shape, &output));
      *tensor = *output;
      return absl::OkStatus();
    }
    TF_RETURN_IF_ERROR(AllocateTemp(context_->expected_output_dtype(index), shape, tensor));
    outputs_.emplace_back(index, *tensor);
    return absl::OkStatus();
  }

  absl::Status Finish() const {
    for (const auto& [index, tensor] : outputs_) {
      tensorflow::Tensor* output = nullptr;
      TF_RETURN_IF_ERROR(context_->allocate_output(index, tensor.shape(), &output));
      TF_RETURN_IF_ERROR(context_->op_device_context()->CopyCPUTensorToDeviceSync(&tensor, device(), output));
    }
    return absl::OkStatus();
  }

 private:
  tensorflow::AllocatorAttributes Pinned() const {
    tensorflow::AllocatorAttributes attributes;
    attributes.set_on_host(true);
    attributes.set_gpu_compatible(!on_host_);
    return attributes;
  }
  tensorflow::Device* device() const { return static_cast<tensorflow::Device*>(context_->device()); }

  tensorflow::OpKernelContext* const context_;
  const bool on_host_;
  std::vector<std::pair<int, tensorflow::Tensor>> outputs_;
};

}  // namespace hps

#endif  // HPS_OPS_HOST_TENSORS_H_
