// HierarchicalParameterServer>Lookup and >LookupWithFound: rows for keys, several tables in one call. Not stateful,
// with a resource input: lookups of one function run side by side, and none is folded into a constant.

#include "cc/ops/lookup_kernel.h"
#include "tensorflow/core/common_runtime/input_colocation_exemption_registry.h"
#include "tensorflow/core/framework/op.h"

namespace hps {
namespace {

namespace tf = tensorflow;
using tf::shape_inference::InferenceContext;
using tf::shape_inference::ShapeHandle;

absl::Status SetShapes(InferenceContext* context, bool found) {
  LookupAttributes attributes;
  TF_RETURN_IF_ERROR(attributes.ReadEach(context));
  const int tables = static_cast<int>(attributes.tables.size());
  for (int i = 0; i < tables; ++i) {
    ShapeHandle rows;
    ShapeHandle keys = context->input(1 + i);
    TF_RETURN_IF_ERROR(context->Concatenate(keys, context->Vector(attributes.tables[i].width), &rows));
    context->set_output(i, rows);
    if (found) context->set_output(tables + i, keys);
  }
  return absl::OkStatus();
}

REGISTER_OP("HierarchicalParameterServer>Lookup")
    .Input("server: resource")
    .Input("keys: N * Tkeys")
    .Output("rows: N * float")
    .Attr("N: int >= 1")
    .Attr("Tkeys: {int32, int64}")
    .Attr("tables: string")
    .SetShapeFn([](InferenceContext* context) { return SetShapes(context, /*found=*/false); })
    .Doc(R"doc(
Looks up the rows of keys, for several tables of one model in one call.

server: handle of the parameter server.
keys: per table, of any shape S.
rows: per table, float32 of shape S + [width]; the row of a key that no tier holds is the table's default value.
tables: model/table:width,table:width,... with one table for each of the keys, by its name or by # and its number in the
  model; another width than the table's is an error.
)doc");

REGISTER_OP("HierarchicalParameterServer>LookupWithFound")
    .Input("server: resource")
    .Input("keys: N * Tkeys")
    .Output("rows: N * float")
    .Output("found: N * bool")
    .Attr("N: int >= 1")
    .Attr("Tkeys: {int32, int64}")
    .Attr("tables: string")
    .SetShapeFn([](InferenceContext* context) { return SetShapes(context, /*found=*/true); })
    .Doc(R"doc(
As Lookup, in host memory, and says of each key whether a tier holds it.

found: per table, of shape S: true where a tier held the key.
)doc");

template <typename T, bool kFound>
class LookupOp : public LookupKernel {
 public:
  explicit LookupOp(tf::OpKernelConstruction* context) : LookupKernel(context) {
    OP_REQUIRES_OK(context, attributes_.ReadEach(context));
  }

 private:
  // Caches do not tell whether a tier holds a key.
  bool MayUseCaches() const override { return !kFound; }

  absl::Status LookupOnHost(tf::OpKernelContext* context, const LookupSession& session,
                            const LookupOptions& options) override {
    const int tables = num_tables();
    HostTensors tensors(context);
    std::vector<DenseLookup> lookups(tables);
    std::vector<tf::Tensor> keys(tables);
    std::vector<tf::Tensor> wide_keys(tables);
    for (int i = 0; i < tables; ++i) {
      DenseLookup& lookup = lookups[i];
      TF_RETURN_IF_ERROR(attributes_.SetTable(session, i, &lookup));
      TF_RETURN_IF_ERROR(tensors.Input(1 + i, &keys[i]));
      TF_RETURN_IF_ERROR(KeysOf<T>(tensors, keys[i], &wide_keys[i], &lookup.keys));
      tf::TensorShape shape = keys[i].shape();
      TF_RETURN_IF_ERROR(shape.AddDimWithStatus(attributes_.tables[i].width));
      tf::Tensor rows;
      TF_RETURN_IF_ERROR(tensors.AllocateOutput(i, shape, &rows));
      lookup.rows = rows.flat<float>().data();
      if (!kFound) continue;
      tf::Tensor found;
      TF_RETURN_IF_ERROR(tensors.AllocateOutput(tables + i, keys[i].shape(), &found));
      lookup.found = found.flat<bool>().data();
    }
    TF_RETURN_IF_ERROR(ToTensorFlow(session.Lookup(lookups, options)));
    return tensors.Finish();
  }

  absl::Status LookupOnGpu(tf::OpKernelContext* context, const LookupSession& session, int gpu,
                           const LookupOptions& options) override {
    const int tables = num_tables();
    std::vector<DeviceLookupPart> lookups(tables);
    std::vector<tf::Tensor> wide_keys(tables);
    for (int i = 0; i < tables; ++i) {
      DeviceLookupPart& lookup = lookups[i];
      const tf::Tensor& keys = context->input(1 + i);
      TF_RETURN_IF_ERROR(attributes_.SetTable(session, i, &lookup));
      TF_RETURN_IF_ERROR(SetDeviceKeys<T>(context, keys, &wide_keys[i], &lookup));
      tf::TensorShape shape = keys.shape();
      TF_RETURN_IF_ERROR(shape.AddDimWithStatus(attributes_.tables[i].width));
      tf::Tensor* rows = nullptr;
      TF_RETURN_IF_ERROR(context->allocate_output(i, shape, &rows));
      lookup.rows = rows->flat<float>().data();
    }
    return ToTensorFlow(session.LookupOnDevice(gpu, lookups, StreamOf(context), options));
  }
};

template <typename T>
using RowsOp = LookupOp<T, false>;
template <typename T>
using RowsAndFoundOp = LookupOp<T, true>;
HPS_REGISTER_LOOKUP("HierarchicalParameterServer>Lookup", RowsOp, "Tkeys", .HostMemory("server"));
HPS_REGISTER_LOOKUP("HierarchicalParameterServer>LookupWithFound", RowsAndFoundOp, "Tkeys", .HostMemory("server"));

}  // namespace
}  // namespace hps

namespace tensorflow {
// Lookups run where their caller says, not where the handle is.
REGISTER_INPUT_COLOCATION_EXEMPTION("HierarchicalParameterServer>Lookup");
REGISTER_INPUT_COLOCATION_EXEMPTION("HierarchicalParameterServer>LookupWithFound");
}  // namespace tensorflow
