// HierarchicalParameterServer>ServerHandle and >InitServer: the resource through which the lookup ops reach their
// parameter server. >UseDevices: where its caches may be.
//
// The handle is a name; the server behind it is found through the process-wide registry (hps/server_registry.h), not
// through a device's resource manager, so that a lookup may run on another device than the handle's. It is in host
// memory, but where there is a GPU it counts as being there: a function whose ops are all on one device costs less.
// The resource manager holds a ServerLease under the handle's name: when it is destroyed, by the Python owner of the
// resource or with the session, the registry lets go of the server.

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>

#include "cc/ops/gpu_devices.h"
#include "cc/ops/tf_bridge.h"
#include "hps/server_registry.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/resource_mgr.h"

namespace hps {
namespace {

namespace tf = tensorflow;

REGISTER_OP("HierarchicalParameterServer>ServerHandle")
    .Output("server: resource")
    .Attr("handle: string = ''")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::ScalarShape)
    .Doc(R"doc(
A handle to a parameter server.

handle: the name; "hps_default" is the server of hps.Init. Empty: a name of this node's own, so that two SavedModels
  loaded into one process never share a handle by accident. (An attribute called shared_name would be rewritten by
  tf.saved_model.load.)
)doc");

REGISTER_OP("HierarchicalParameterServer>InitServer")
    .Input("server: resource")
    .Input("config_path: string")
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* context) {
      tf::shape_inference::ShapeHandle scalar;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 0, &scalar));
      return context->WithRank(context->input(1), 0, &scalar);
    })
    .Doc(R"doc(
Binds a handle to a configuration file (ps.json) and opens its server. An empty path binds nothing.

With the environment variable HPS_INIT=off nothing is opened, for tools that only look at a SavedModel.
)doc");

REGISTER_OP("HierarchicalParameterServer>UseDevices")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::NoOutputs)
    .Doc(R"doc(
Makes TensorFlow's GPUs known to the servers that are opened later, so that they place caches there.
)doc");

class UseDevicesOp : public tf::OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(tf::OpKernelContext* context) override { AddTensorFlowDevices(context); }
};

class ServerLease : public tf::ResourceBase {
 public:
  explicit ServerLease(std::string handle) : handle_(std::move(handle)) {}
  ~ServerLease() override { ReleaseHandle(handle_); }
  std::string DebugString() const override { return "HPS server lease " + handle_; }

 private:
  const std::string handle_;
};

std::string UniqueHandle() {
  static std::atomic<uint64_t> next{0};
  static const uint64_t process = (uint64_t{std::random_device()()} << 32) | std::random_device()();
  return "hps_" + std::to_string(process) + "_" + std::to_string(next.fetch_add(1));
}

class ServerHandleOp : public tf::OpKernel {
 public:
  explicit ServerHandleOp(tf::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("handle", &name_));
    if (name_.empty()) name_ = UniqueHandle();
  }

  void Compute(tf::OpKernelContext* context) override {
    tf::Tensor* output = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &output));
    output->scalar<tf::ResourceHandle>()() =
        tf::MakeResourceHandle<ServerLease>(context, context->resource_manager()->default_container(), name_);
  }

 private:
  std::string name_;
};

class InitServerOp : public tf::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tf::OpKernelContext* context) override {
    const tf::Tensor& path_tensor = context->input(1);
    OP_REQUIRES(context, tf::TensorShapeUtils::IsScalar(path_tensor.shape()),
                absl::InvalidArgumentError("config_path must be a scalar string"));
    std::string path(path_tensor.scalar<tf::tstring>()());
    const char* init = std::getenv("HPS_INIT");
    if (path.empty() || (init != nullptr && std::string(init) == "off")) return;
    AddTensorFlowDevices(context);
    // The server may be opened again later, when the working directory is another one.
    std::error_code error;
    const std::filesystem::path absolute = std::filesystem::absolute(path, error);
    if (!error) path = absolute.string();
    const tf::ResourceHandle& handle = tf::HandleFromInput(context, 0);
    if (!BindHandle(handle.name(), path).ok()) {
      // Legacy Keras makes layers anew from their configs before it initialises them: then the handle is bound to the
      // file that they were built with, which need not exist here. The SavedModel's own copy counts.
      const auto kept_open = OpenServers();
      ReleaseHandle(handle.name());
      OP_REQUIRES_OK(context, ToTensorFlow(BindHandle(handle.name(), path)));
    }
    tf::core::RefCountPtr<ServerLease> lease;
    OP_REQUIRES_OK(context, tf::LookupOrCreateResource<ServerLease>(context, handle, &lease, [&](ServerLease** made) {
                     *made = new ServerLease(handle.name());
                     return absl::OkStatus();
                   }));
    OP_REQUIRES_OK(context, ToTensorFlow(OpenHandle(handle.name())));
  }
  bool IsExpensive() override { return true; }
};

REGISTER_KERNEL_BUILDER(Name("HierarchicalParameterServer>ServerHandle").Device(tf::DEVICE_CPU), ServerHandleOp);
REGISTER_KERNEL_BUILDER(Name("HierarchicalParameterServer>InitServer").Device(tf::DEVICE_CPU), InitServerOp);
REGISTER_KERNEL_BUILDER(Name("HierarchicalParameterServer>UseDevices").Device(tf::DEVICE_CPU), UseDevicesOp);
#ifdef HPS_WITH_CUDA
REGISTER_KERNEL_BUILDER(Name("HierarchicalParameterServer>ServerHandle").Device(tf::DEVICE_GPU).HostMemory("server"),
                        ServerHandleOp);
REGISTER_KERNEL_BUILDER(Name("HierarchicalParameterServer>InitServer")
                            .Device(tf::DEVICE_GPU)
                            .HostMemory("server")
                            .HostMemory("config_path"),
                        InitServerOp);
#endif

}  // namespace
}  // namespace hps
