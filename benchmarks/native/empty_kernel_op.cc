// HpsBenchmark>EmptyKernel: an op that launches one kernel which does nothing but write a word into mapped memory, and
// waits for that word. What gpu_ops.py compares lookups with.

#include <atomic>

#include "benchmarks/native/empty_kernel.h"
#include "cc/ops/gpu_devices.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace hps {
namespace {

namespace tf = tensorflow;

REGISTER_OP("HpsBenchmark>EmptyKernel")
    .Input("keys: int64")
    .Output("rows: float")
    .Attr("width: int >= 1")
    .SetShapeFn(tf::shape_inference::UnknownShape);

class EmptyKernelOp : public tf::OpKernel {
 public:
  explicit EmptyKernelOp(tf::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("width", &width_));
    word_ = MappedWord(&on_device_);
    OP_REQUIRES(context, word_ != nullptr, absl::InternalError("no mapped memory"));
  }
  bool IsExpensive() override { return true; }

  void Compute(tf::OpKernelContext* context) override {
    tf::TensorShape shape = context->input(0).shape();
    OP_REQUIRES_OK(context, shape.AddDimWithStatus(width_));
    tf::Tensor* rows = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, shape, &rows));
    const uint32_t stamp = ++stamp_;
    OP_REQUIRES(context, LaunchEmptyKernel(on_device_, stamp, StreamOf(context)) == 0, absl::InternalError("launch"));
    while (std::atomic_ref<uint32_t>(*word_).load(std::memory_order_acquire) != stamp) {
    }
  }

 private:
  int width_ = 0;
  uint32_t* word_ = nullptr;
  uint32_t* on_device_ = nullptr;
  uint32_t stamp_ = 0;  // the benchmark calls from one thread
};

REGISTER_KERNEL_BUILDER(Name("HpsBenchmark>EmptyKernel").Device(tf::DEVICE_GPU), EmptyKernelOp);

}  // namespace
}  // namespace hps
