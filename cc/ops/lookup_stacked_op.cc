// HierarchicalParameterServer>LookupStacked: one id of each table side by side, as models of categorical features have
// them; the rows side by side as well. On a GPU this is one launch without any copy of ids or rows.

#include <algorithm>

#include "cc/ops/lookup_kernel.h"
#include "tensorflow/core/common_runtime/input_colocation_exemption_registry.h"
#include "tensorflow/core/framework/op.h"

namespace hps {
namespace {

namespace tf = tensorflow;
using tf::shape_inference::DimensionHandle;
using tf::shape_inference::InferenceContext;
using tf::shape_inference::ShapeHandle;

REGISTER_OP("HierarchicalParameterServer>LookupStacked")
    .Input("server: resource")
    .Input("keys: Tkeys")
    .Output("rows: float")
    .Attr("Tkeys: {int32, int64}")
    .Attr("tables: string")
    .SetShapeFn([](InferenceContext* context) {
      LookupAttributes attributes;
      TF_RETURN_IF_ERROR(attributes.ReadStacked(context));
      ShapeHandle keys, rows;
      TF_RETURN_IF_ERROR(context->WithRankAtLeast(context->input(1), 1, &keys));
      DimensionHandle tables;
      TF_RETURN_IF_ERROR(
          context->WithValue(context->Dim(keys, -1), static_cast<int64_t>(attributes.tables.size()), &tables));
      TF_RETURN_IF_ERROR(context->Concatenate(keys, context->Vector(attributes.tables[0].width), &rows));
      context->set_output(0, rows);
      return absl::OkStatus();
    })
    .Doc(R"doc(
Looks up one row of each of several tables of equal width for each sample.

server: handle of the parameter server.
keys: of shape S + [tables]; the last dimension counts the tables.
rows: float32 of shape S + [tables, width]; the row of a key that no tier holds is the table's default value.
tables: as of Lookup, all of one width.
)doc");

template <typename T>
class LookupStackedOp : public LookupKernel {
 public:
  explicit LookupStackedOp(tf::OpKernelConstruction* context) : LookupKernel(context) {
    OP_REQUIRES_OK(context, attributes_.ReadStacked(context));
  }

 private:
  static constexpr size_t kGrain = 1024;  // samples of a table that are copied at a time

  int64_t tables() const { return num_tables(); }
  int64_t width() const { return attributes_.tables[0].width; }
  // Of the rows; the keys' last dimension must count the tables.
  absl::Status RowsShape(const tf::Tensor& keys, tf::TensorShape* shape) const {
    *shape = keys.shape();
    if (shape->dims() < 1 || shape->dim_size(shape->dims() - 1) != tables()) {
      return absl::InvalidArgumentError("stacked ids: the last dimension must count the " + std::to_string(tables()) +
                                        " tables, but the shape is " + shape->DebugString());
    }
    return shape->AddDimWithStatus(width());
  }

  // The tiers take keys and give rows of a table one after another.
  absl::Status LookupOnHost(tf::OpKernelContext* context, const LookupSession& session,
                            const LookupOptions& options) override {
    HostTensors tensors(context);
    tf::Tensor keys, sorted_keys, sorted_rows, rows;
    TF_RETURN_IF_ERROR(tensors.Input(1, &keys));
    tf::TensorShape shape;
    TF_RETURN_IF_ERROR(RowsShape(keys, &shape));
    const int64_t samples = keys.NumElements() / tables();
    TF_RETURN_IF_ERROR(tensors.AllocateTemp(tf::DT_INT64, {tables(), samples}, &sorted_keys));
    TF_RETURN_IF_ERROR(tensors.AllocateTemp(tf::DT_FLOAT, {tables(), samples, width()}, &sorted_rows));
    TF_RETURN_IF_ERROR(tensors.AllocateOutput(0, shape, &rows));
    const T* const from = keys.flat<T>().data();
    Key* const to = reinterpret_cast<Key*>(sorted_keys.flat<int64_t>().data());
    float* const found = sorted_rows.flat<float>().data();
    std::vector<DenseLookup> lookups(static_cast<size_t>(tables()));
    for (int64_t t = 0; t < tables(); ++t) {
      for (int64_t i = 0; i < samples; ++i) to[t * samples + i] = from[i * tables() + t];
      TF_RETURN_IF_ERROR(attributes_.SetTable(session, static_cast<size_t>(t), &lookups[t]));
      lookups[t].keys = std::span(to + t * samples, static_cast<size_t>(samples));
      lookups[t].rows = found + t * samples * width();
    }
    TF_RETURN_IF_ERROR(ToTensorFlow(session.Lookup(lookups, options)));
    float* const stacked = rows.flat<float>().data();
    options.executor->ParallelFor(static_cast<size_t>(samples), kGrain, [&](size_t first, size_t last) {
      for (size_t i = first; i < last; ++i) {
        for (int64_t t = 0; t < tables(); ++t) {
          std::copy_n(found + (t * samples + static_cast<int64_t>(i)) * width(), width(),
                      stacked + (static_cast<int64_t>(i) * tables() + t) * width());
        }
      }
    });
    return tensors.Finish();
  }

  absl::Status LookupOnGpu(tf::OpKernelContext* context, const LookupSession& session, int gpu,
                           const LookupOptions& options) override {
    const tf::Tensor& keys = context->input(1);
    tf::TensorShape shape;
    TF_RETURN_IF_ERROR(RowsShape(keys, &shape));
    const int64_t samples = keys.NumElements() / tables();
    if (samples > std::numeric_limits<uint32_t>::max()) {
      return absl::InvalidArgumentError(std::to_string(samples) + " samples in one lookup on a GPU; split it");
    }
    tf::Tensor* rows = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(0, shape, &rows));
    tf::Tensor wide_keys;
    if constexpr (sizeof(T) < sizeof(Key)) {
      TF_RETURN_IF_ERROR(context->allocate_temp(tf::DT_INT64, {tables(), samples}, &wide_keys));
    }
    std::vector<DeviceLookupPart> lookups(static_cast<size_t>(tables()));
    for (int64_t t = 0; t < tables(); ++t) {
      DeviceLookupPart& lookup = lookups[t];
      TF_RETURN_IF_ERROR(attributes_.SetTable(session, static_cast<size_t>(t), &lookup));
      lookup.key_bytes = sizeof(T);
      lookup.keys = keys.flat<T>().data() + t;
      lookup.count = static_cast<uint32_t>(samples);
      lookup.rows = rows->flat<float>().data() + t * width();
      lookup.key_stride = static_cast<uint32_t>(tables());
      lookup.row_stride = static_cast<uint32_t>(tables() * width());
      if constexpr (sizeof(T) < sizeof(Key)) {
        lookup.wide_keys = reinterpret_cast<Key*>(wide_keys.flat<int64_t>().data()) + t * samples;
      }
    }
    return ToTensorFlow(session.LookupOnDevice(gpu, lookups, StreamOf(context), options));
  }
};

HPS_REGISTER_LOOKUP("HierarchicalParameterServer>LookupStacked", LookupStackedOp, "Tkeys", .HostMemory("server"));

}  // namespace
}  // namespace hps

namespace tensorflow {
REGISTER_INPUT_COLOCATION_EXEMPTION("HierarchicalParameterServer>LookupStacked");
}
