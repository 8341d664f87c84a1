// The bare op names `Init` and `Lookup` of the predecessor (hps_tf v24.06), so that SavedModels which it exported load
// and run. A library of its own, loaded on request: other custom-op libraries use these names too.

#include "cc/ops/lookup_kernel.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"

namespace hps {
namespace {

namespace tf = tensorflow;
using tf::shape_inference::InferenceContext;
using tf::shape_inference::ShapeHandle;

REGISTER_OP("Init")
    .Input("global_replica_id: int32")
    .Input("num_replicas_in_sync: int32")
    .Input("visible_devices: int32")
    .Output("status: string")
    .Attr("ps_config_file: string")
    .Attr("global_batch_size: int >= 1")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::ScalarShape);

REGISTER_OP("Lookup")
    .Input("values: Tvalues")
    .Input("global_replica_id: int32")
    .Input("init_status: string")
    .Output("emb_vector: dtype")
    .Attr("model_name: string")
    .Attr("table_id: int")
    .Attr("emb_vec_size: int")
    .Attr("Tvalues: {int32, int64}")
    .Attr("dtype: {float32}")
    .SetShapeFn([](InferenceContext* context) {
      int width = 0;
      TF_RETURN_IF_ERROR(context->GetAttr("emb_vec_size", &width));
      if (width <= 0) {
        return absl::InvalidArgumentError("emb_vec_size must be positive, got " + std::to_string(width));
      }
      ShapeHandle rows;
      TF_RETURN_IF_ERROR(context->Concatenate(context->input(0), context->Vector(width), &rows));
      context->set_output(0, rows);
      return absl::OkStatus();
    });

// Its rule: the first initialisation of the process wins, so a graph's own Init after hps.Init does nothing.
class InitOp : public tf::OpKernel {
 public:
  explicit InitOp(tf::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("ps_config_file", &config_path_));
  }

  void Compute(tf::OpKernelContext* context) override {
    AddTensorFlowDevices(context);
    if (!DefaultServer().ok()) {
      OP_REQUIRES(context, !config_path_.empty(), ToTensorFlow(DefaultServer().status()));
      OP_REQUIRES_OK(context, ToTensorFlow(InitDefaultServer(config_path_)));
    }
    tf::Tensor* status = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &status));
    status->scalar<tf::tstring>()() = "OK";
  }
  bool IsExpensive() override { return true; }

 private:
  std::string config_path_;
};

template <typename T>
class LookupOp : public tf::OpKernel {
 public:
  explicit LookupOp(tf::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("model_name", &model_));
    int table = 0;
    int width = 0;
    OP_REQUIRES_OK(context, context->GetAttr("table_id", &table));
    OP_REQUIRES_OK(context, context->GetAttr("emb_vec_size", &width));
    table_ = static_cast<uint32_t>(table);
    width_ = static_cast<uint32_t>(width);
  }

  void Compute(tf::OpKernelContext* context) override {
    auto session = SessionOf(context, kDefaultHandle, model_);
    OP_REQUIRES_OK(context, ToTensorFlow(session.status()));
    auto gpu = ServingGpu(context, *session);
    OP_REQUIRES_OK(context, ToTensorFlow(gpu.status()));
    const tf::Tensor& values = context->input(0);
    tf::TensorShape shape = values.shape();
    OP_REQUIRES_OK(context, shape.AddDimWithStatus(width_));
    OP_REQUIRES_OK(context, *gpu >= 0 ? LookupOnGpu(context, *session, *gpu, values, shape)
                                      : LookupOnHost(context, *session, shape));
  }
  bool IsExpensive() override { return true; }

 private:
  absl::Status LookupOnHost(tf::OpKernelContext* context, const LookupSession& session,
                            const tf::TensorShape& shape) const {
    HostTensors tensors(context);
    tf::Tensor keys, wide_keys, rows;
    TF_RETURN_IF_ERROR(tensors.Input(0, &keys));
    TF_RETURN_IF_ERROR(tensors.AllocateOutput(0, shape, &rows));
    DenseLookup lookup;
    lookup.table = table_;
    lookup.width = width_;
    lookup.rows = rows.flat<float>().data();
    TF_RETURN_IF_ERROR(KeysOf<T>(tensors, keys, &wide_keys, &lookup.keys));
    TensorFlowExecutor executor(context);
    TF_RETURN_IF_ERROR(ToTensorFlow(session.Lookup(std::span(&lookup, 1), {.executor = &executor})));
    return tensors.Finish();
  }

  absl::Status LookupOnGpu(tf::OpKernelContext* context, const LookupSession& session, int gpu, const tf::Tensor& keys,
                           const tf::TensorShape& shape) const {
    tf::Tensor wide_keys;
    tf::Tensor* rows = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(0, shape, &rows));
    DeviceLookupPart lookup;
    lookup.table = table_;
    lookup.width = width_;
    lookup.rows = rows->flat<float>().data();
    TF_RETURN_IF_ERROR(SetDeviceKeys<T>(context, keys, &wide_keys, &lookup));
    return ToTensorFlow(session.LookupOnDevice(gpu, std::span(&lookup, 1), StreamOf(context)));
  }

  std::string model_;
  uint32_t table_ = 0;
  uint32_t width_ = 0;
};

REGISTER_KERNEL_BUILDER(Name("Init").Device(tf::DEVICE_CPU), InitOp);
HPS_REGISTER_LOOKUP("Lookup", LookupOp, "Tvalues", .HostMemory("global_replica_id").HostMemory("init_status"));

}  // namespace
}  // namespace hps
