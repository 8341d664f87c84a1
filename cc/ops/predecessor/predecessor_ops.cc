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
class LookupOp : public LookupKernel {
 public:
  explicit LookupOp(tf::OpKernelConstruction* context) : LookupKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("model_name", &attributes_.model));
    attributes_.tables.resize(1);
    OP_REQUIRES_OK(context, context->GetAttr("table_id", &attributes_.tables[0].number));
    OP_REQUIRES_OK(context, context->GetAttr("emb_vec_size", &attributes_.tables[0].width));
  }

 private:
  std::string Handle(tf::OpKernelContext* context) const override { return kDefaultHandle; }

  absl::Status LookupOnHost(tf::OpKernelContext* context, const LookupSession& session,
                            const LookupOptions& options) override {
    HostTensors tensors(context);
    tf::Tensor keys, wide_keys, rows;
    tf::TensorShape shape;
    DenseLookup lookup;
    TF_RETURN_IF_ERROR(attributes_.SetTable(session, 0, &lookup));
    TF_RETURN_IF_ERROR(RowsShape(context, &shape));
    TF_RETURN_IF_ERROR(tensors.Input(0, &keys));
    TF_RETURN_IF_ERROR(tensors.AllocateOutput(0, shape, &rows));
    lookup.rows = rows.flat<float>().data();
    TF_RETURN_IF_ERROR(KeysOf<T>(tensors, keys, &wide_keys, &lookup.keys));
    TF_RETURN_IF_ERROR(ToTensorFlow(session.Lookup(std::span(&lookup, 1), options)));
    return tensors.Finish();
  }

  absl::Status LookupOnGpu(tf::OpKernelContext* context, const LookupSession& session, int gpu,
                           const LookupOptions& options) override {
    tf::Tensor wide_keys;
    tf::Tensor* rows = nullptr;
    tf::TensorShape shape;
    DeviceLookupPart lookup;
    TF_RETURN_IF_ERROR(attributes_.SetTable(session, 0, &lookup));
    TF_RETURN_IF_ERROR(RowsShape(context, &shape));
    TF_RETURN_IF_ERROR(context->allocate_output(0, shape, &rows));
    lookup.rows = rows->flat<float>().data();
    TF_RETURN_IF_ERROR(SetDeviceKeys<T>(context, context->input(0), &wide_keys, &lookup));
    return ToTensorFlow(session.LookupOnDevice(gpu, std::span(&lookup, 1), StreamOf(context), options));
  }

  absl::Status RowsShape(tf::OpKernelContext* context, tf::TensorShape* shape) const {
    *shape = context->input(0).shape();
    return shape->AddDimWithStatus(attributes_.tables[0].width);
  }
};

REGISTER_KERNEL_BUILDER(Name("Init").Device(tf::DEVICE_CPU), InitOp);
HPS_REGISTER_LOOKUP("Lookup", LookupOp, "Tvalues", .HostMemory("global_replica_id").HostMemory("init_status"));

}  // namespace
}  // namespace hps
