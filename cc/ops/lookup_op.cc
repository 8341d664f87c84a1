// HierarchicalParameterServer>Lookup: rows for keys, several tables in one call. Not stateful, with a resource input:
// lookups of one function run side by side, and none is folded into a constant.

#include "cc/ops/lookup_kernel.h"
#include "tensorflow/core/framework/op.h"

namespace hps {
namespace {

namespace tf = tensorflow;
using tf::shape_inference::InferenceContext;
using tf::shape_inference::ShapeHandle;

REGISTER_OP("HierarchicalParameterServer>Lookup")
    .Input("server: resource")
    .Input("keys: N * Tkeys")
    .Output("rows: N * float")
    .Output("found: M * bool")
    .Attr("N: int >= 1")
    .Attr("M: int >= 0")
    .Attr("Tkeys: {int32, int64}")
    .Attr("model: string")
    .Attr("table_names: list(string) = []")
    .Attr("table_ids: list(int) = []")
    .Attr("widths: list(int)")
    .SetShapeFn([](InferenceContext* context) {
      LookupAttributes attributes;
      TF_RETURN_IF_ERROR(attributes.Read(context));
      int found = 0;
      TF_RETURN_IF_ERROR(context->GetAttr("M", &found));
      const int tables = static_cast<int>(attributes.widths.size());
      if (found != 0 && found != tables) {
        return absl::InvalidArgumentError("M must be 0 (no found masks) or N, got " + std::to_string(found));
      }
      for (int i = 0; i < tables; ++i) {
        ShapeHandle rows;
        ShapeHandle keys = context->input(1 + i);
        TF_RETURN_IF_ERROR(context->Concatenate(keys, context->Vector(attributes.widths[i]), &rows));
        context->set_output(i, rows);
        if (found != 0) context->set_output(tables + i, keys);
      }
      return absl::OkStatus();
    })
    .Doc(R"doc(
Looks up the rows of keys, for several tables of one model in one call.

server: handle of the parameter server.
keys: per table, of any shape S.
rows: per table, float32 of shape S + [width]; the row of a key that no tier holds is the table's default value.
found: per table, of shape S: true where a tier held the key. Empty list when M is 0.
table_names: the tables by name; or
table_ids: by their number in the model.
widths: float32 values in a row of each table; another width than the table's is an error.
)doc");

template <typename T>
class LookupOp : public tf::OpKernel {
 public:
  explicit LookupOp(tf::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
    OP_REQUIRES_OK(context, context->GetAttr("M", &found_count_));
  }

  bool IsExpensive() override { return true; }

  void Compute(tf::OpKernelContext* context) override {
    auto session = SessionOf(tf::HandleFromInput(context, 0).name(), attributes_.model);
    OP_REQUIRES_OK(context, ToTensorFlow(session.status()));
    const int tables = static_cast<int>(attributes_.widths.size());
    std::vector<DenseLookup> lookups(tables);
    std::vector<tf::Tensor> wide_keys(tables);
    for (int i = 0; i < tables; ++i) {
      const tf::Tensor& keys = context->input(1 + i);
      DenseLookup& lookup = lookups[i];
      auto table = attributes_.Table(*session, i);
      OP_REQUIRES_OK(context, ToTensorFlow(table.status()));
      lookup.table = *table;
      lookup.width = static_cast<uint32_t>(attributes_.widths[i]);
      OP_REQUIRES_OK(context, KeysOf<T>(context, keys, &wide_keys[i], &lookup.keys));
      tf::TensorShape shape = keys.shape();
      OP_REQUIRES_OK(context, shape.AddDimWithStatus(attributes_.widths[i]));
      tf::Tensor* rows = nullptr;
      OP_REQUIRES_OK(context, context->allocate_output(i, shape, &rows));
      lookup.rows = rows->flat<float>().data();
      if (found_count_ == 0) continue;
      tf::Tensor* found = nullptr;
      OP_REQUIRES_OK(context, context->allocate_output(tables + i, keys.shape(), &found));
      lookup.found = found->flat<bool>().data();
    }
    TensorFlowExecutor executor(context);
    LookupOptions options;
    options.executor = &executor;
    const OpCancellation cancellation(context);
    options.cancelled = cancellation.flag();
    OP_REQUIRES_OK(context, ToTensorFlow(session->Lookup(lookups, options)));
  }

 private:
  LookupAttributes attributes_;
  int found_count_ = 0;
};

REGISTER_KERNEL_BUILDER(
    Name("HierarchicalParameterServer>Lookup").Device(tf::DEVICE_CPU).TypeConstraint<int32_t>("Tkeys"),
    LookupOp<int32_t>);
REGISTER_KERNEL_BUILDER(
    Name("HierarchicalParameterServer>Lookup").Device(tf::DEVICE_CPU).TypeConstraint<int64_t>("Tkeys"),
    LookupOp<int64_t>);

}  // namespace
}  // namespace hps
