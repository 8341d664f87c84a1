// HierarchicalParameterServer>LookupSparse: probe, gather, weight and combine in one op, several tables in one call.
// Inputs of one kind are all tables' one after another: server, keys, segments, dense shapes, weights.

#include <algorithm>
#include <limits>

#include "cc/ops/lookup_kernel.h"
#include "tensorflow/core/common_runtime/input_colocation_exemption_registry.h"
#include "tensorflow/core/framework/op.h"

namespace hps {
namespace {

namespace tf = tensorflow;
using tf::shape_inference::DimensionHandle;
using tf::shape_inference::InferenceContext;
using tf::shape_inference::ShapeHandle;

// Rows of one output: known when the shape tensor is a constant, or from the number of splits.
DimensionHandle RowDimension(InferenceContext* context, bool row_splits, int segments_input, int shape_input) {
  if (row_splits) {
    DimensionHandle rows;
    ShapeHandle splits = context->input(segments_input);
    if (context->RankKnown(splits) && context->Rank(splits) == 1 &&
        context->Subtract(context->Dim(splits, 0), 1, &rows).ok()) {
      return rows;
    }
    return context->UnknownDim();
  }
  ShapeHandle shape;
  if (context->MakeShapeFromShapeTensor(shape_input, &shape).ok() && context->RankKnown(shape) &&
      context->Rank(shape) >= 1) {
    return context->Dim(shape, 0);
  }
  return context->UnknownDim();
}

REGISTER_OP("HierarchicalParameterServer>LookupSparse")
    .Input("server: resource")
    .Input("keys: N * Tkeys")
    .Input("segments: N * int64")
    .Input("dense_shapes: N * int64")
    .Input("weights: W * float")
    .Output("combined: N * float")
    .Attr("N: int >= 1")
    .Attr("W: int >= 0")
    .Attr("Tkeys: {int32, int64}")
    .Attr("tables: string")
    .Attr("combiners: list({'sum', 'mean', 'sqrtn'})")
    .Attr("segment_format: {'indices', 'row_splits'}")
    .SetShapeFn([](InferenceContext* context) {
      LookupAttributes attributes;
      TF_RETURN_IF_ERROR(attributes.ReadEach(context));
      std::string format;
      TF_RETURN_IF_ERROR(context->GetAttr("segment_format", &format));
      const int tables = static_cast<int>(attributes.tables.size());
      for (int i = 0; i < tables; ++i) {
        DimensionHandle rows = RowDimension(context, format == "row_splits", 1 + tables + i, 1 + 2 * tables + i);
        context->set_output(i, context->Matrix(rows, attributes.tables[i].width));
      }
      return absl::OkStatus();
    })
    .Doc(R"doc(
Looks up rows and combines them per output row, for several tables of one model in one call.

server: handle of the parameter server.
keys: per table, the ids of all output rows one after another, shape [n].
segments: per table; segment_format "indices": a SparseTensor's indices [n, rank], whose first column is the output row
  and must not descend; "row_splits": a RaggedTensor's offsets [rows + 1].
dense_shapes: per table, the SparseTensor's dense shape [rank], which bounds the indices; not read for row_splits.
weights: per table, one weight per key, shape [n]; empty list when W is 0.
combined: per table, float32 [rows, width]; an output row without keys is zero.
tables: as of Lookup.
combiners: per table.
)doc");

// Shapes of ids and segments; *output is set to that of the combined rows.
absl::Status CheckShapes(bool row_splits, const tf::Tensor& keys, const tf::Tensor& segments,
                         const tf::Tensor& dense_shape, int32_t width, tf::TensorShape* output) {
  if (keys.dims() != 1) {
    return absl::InvalidArgumentError("sparse ids: values must have rank 1, but have the shape " +
                                      keys.shape().DebugString());
  }
  if (row_splits) {
    if (segments.dims() != 1 || segments.NumElements() < 1) {
      return absl::InvalidArgumentError("ragged ids: row_splits must have the shape [rows + 1], but have " +
                                        segments.shape().DebugString());
    }
    return tf::TensorShape::BuildTensorShape({segments.NumElements() - 1, width}, output);
  }
  if (segments.dims() != 2 || segments.dim_size(0) != keys.NumElements()) {
    return absl::InvalidArgumentError("sparse ids: indices must have the shape [" + std::to_string(keys.NumElements()) +
                                      ", rank], one line per id, but have " + segments.shape().DebugString());
  }
  const int64_t rank = segments.dim_size(1);
  if (dense_shape.dims() != 1 || dense_shape.dim_size(0) != rank || rank < 1) {
    return absl::InvalidArgumentError("sparse ids: dense_shape must have " + std::to_string(rank) +
                                      " entries to match the indices, but has the shape " +
                                      dense_shape.shape().DebugString());
  }
  const int64_t rows = dense_shape.flat<int64_t>()(0);
  if (rows < 0) return absl::InvalidArgumentError("sparse ids: dense_shape[0] is negative: " + std::to_string(rows));
  tf::TensorShape splits;
  if (rows == std::numeric_limits<int64_t>::max() || !tf::TensorShape::BuildTensorShape({rows + 1}, &splits).ok() ||
      !tf::TensorShape::BuildTensorShape({rows, width}, output).ok()) {
    return absl::InvalidArgumentError("sparse ids: dense_shape[0] is too large: " + std::to_string(rows));
  }
  return absl::OkStatus();
}

// Output row of each key -> offsets [rows + 1]. Checks every index against the shape. The number of rows is whatever
// the caller says, so the memory is TensorFlow's, which refuses what is too much.
absl::Status SplitsFromIndices(const HostTensors& tensors, const tf::Tensor& indices, const tf::Tensor& dense_shape,
                               int64_t keys, tf::Tensor* splits_tensor) {
  const int64_t rank = indices.dim_size(1);
  const int64_t* index = indices.flat<int64_t>().data();
  const int64_t* bound = dense_shape.flat<int64_t>().data();
  const int64_t rows = bound[0];
  TF_RETURN_IF_ERROR(tensors.AllocateTemp(tf::DT_INT64, {rows + 1}, splits_tensor));
  int64_t* splits = reinterpret_cast<int64_t*>(splits_tensor->flat<int64_t>().data());
  int64_t row = -1;  // the output row whose keys are being counted
  for (int64_t i = 0; i < keys; ++i, index += rank) {
    for (int64_t j = 0; j < rank; ++j) {
      if (index[j] >= 0 && index[j] < bound[j]) continue;
      return absl::InvalidArgumentError(
          "sparse ids: indices[" + std::to_string(i) + ", " + std::to_string(j) + "] = " + std::to_string(index[j]) +
          " lies outside the dense shape, whose dimension " + std::to_string(j) + " is " + std::to_string(bound[j]));
    }
    if (index[0] < row) {
      return absl::InvalidArgumentError("sparse ids: rows must not descend, but indices[" + std::to_string(i) +
                                        ", 0] = " + std::to_string(index[0]) + " follows " + std::to_string(row) +
                                        "; use tf.sparse.reorder");
    }
    while (row < index[0]) splits[++row] = i;
  }
  std::fill(splits + row + 1, splits + rows + 1, keys);
  return absl::OkStatus();
}

// What a lookup in host memory points to.
struct HeldTensors {
  tf::Tensor keys, segments, weights, wide_keys, splits;
};

template <typename T>
class LookupSparseOp : public LookupKernel {
 public:
  explicit LookupSparseOp(tf::OpKernelConstruction* context) : LookupKernel(context) {
    OP_REQUIRES_OK(context, attributes_.ReadEach(context));
    std::string format;
    OP_REQUIRES_OK(context, context->GetAttr("segment_format", &format));
    row_splits_ = format == "row_splits";
    OP_REQUIRES_OK(context, context->GetAttr("W", &weight_count_));
    std::vector<std::string> combiners;
    OP_REQUIRES_OK(context, context->GetAttr("combiners", &combiners));
    const size_t tables = attributes_.tables.size();
    OP_REQUIRES(context, combiners.size() == tables,
                absl::InvalidArgumentError("combiners must name one combiner for each of the " +
                                           std::to_string(tables) + " tables"));
    OP_REQUIRES(context, weight_count_ == 0 || weight_count_ == static_cast<int>(tables),
                absl::InvalidArgumentError("give weights for all tables of the call or for none"));
    for (const std::string& combiner : combiners) {
      combiners_.push_back(combiner == "sum"    ? Combiner::kSum
                           : combiner == "mean" ? Combiner::kMean
                                                : Combiner::kSqrtn);
    }
  }

 private:
  absl::Status LookupOnHost(tf::OpKernelContext* context, const LookupSession& session,
                            const LookupOptions& options) override {
    const int tables = num_tables();
    HostTensors tensors(context);
    std::vector<SparseLookup> lookups(tables);
    std::vector<HeldTensors> held(tables);
    for (int i = 0; i < tables; ++i) {
      SparseLookup& lookup = lookups[i];
      HeldTensors& of = held[i];
      TF_RETURN_IF_ERROR(attributes_.SetTable(session, i, &lookup));
      TF_RETURN_IF_ERROR(tensors.Input(1 + i, &of.keys));
      TF_RETURN_IF_ERROR(tensors.Input(1 + tables + i, &of.segments));
      const tf::Tensor& dense_shape = context->input(1 + 2 * tables + i);
      tf::TensorShape shape;
      TF_RETURN_IF_ERROR(
          CheckShapes(row_splits_, of.keys, of.segments, dense_shape, attributes_.tables[i].width, &shape));
      lookup.combiner = combiners_[i];
      TF_RETURN_IF_ERROR(KeysOf<T>(tensors, of.keys, &of.wide_keys, &lookup.keys));
      if (!row_splits_) {
        TF_RETURN_IF_ERROR(SplitsFromIndices(tensors, of.segments, dense_shape, of.keys.NumElements(), &of.splits));
      }
      lookup.row_splits =
          std::span(Int64s(row_splits_ ? of.segments : of.splits), static_cast<size_t>(shape.dim_size(0)) + 1);
      if (weight_count_ > 0) {
        TF_RETURN_IF_ERROR(CheckWeights(context->input(1 + 3 * tables + i), of.keys));
        TF_RETURN_IF_ERROR(tensors.Input(1 + 3 * tables + i, &of.weights));
        lookup.weights = std::span(of.weights.flat<float>().data(), lookup.keys.size());
      }
      tf::Tensor output;
      TF_RETURN_IF_ERROR(tensors.AllocateOutput(i, shape, &output));
      lookup.output = output.flat<float>().data();
    }
    TF_RETURN_IF_ERROR(ToTensorFlow(session.LookupSparse(lookups, options)));
    return tensors.Finish();
  }

  absl::Status LookupOnGpu(tf::OpKernelContext* context, const LookupSession& session, int gpu,
                           const LookupOptions& options) override {
    const int tables = num_tables();
    std::vector<DeviceSparsePart> lookups(tables);
    std::vector<tf::Tensor> wide_keys(tables);
    for (int i = 0; i < tables; ++i) {
      DeviceSparsePart& lookup = lookups[i];
      TF_RETURN_IF_ERROR(attributes_.SetTable(session, i, &lookup));
      const tf::Tensor& keys = context->input(1 + i);
      const tf::Tensor& segments = context->input(1 + tables + i);
      const tf::Tensor& dense_shape = context->input(1 + 2 * tables + i);
      tf::TensorShape shape;
      TF_RETURN_IF_ERROR(CheckShapes(row_splits_, keys, segments, dense_shape, attributes_.tables[i].width, &shape));
      const int64_t rows = shape.dim_size(0);
      if (rows > std::numeric_limits<uint32_t>::max()) {
        return absl::InvalidArgumentError(std::to_string(rows) + " output rows of one table in one lookup on a GPU");
      }
      TF_RETURN_IF_ERROR(SetDeviceKeys<T>(context, keys, &wide_keys[i], &lookup));
      lookup.rows = static_cast<uint32_t>(rows);
      lookup.combiner = combiners_[i];
      if (row_splits_) {
        lookup.row_splits = Int64s(segments);
      } else {
        lookup.indices = Int64s(segments);
        lookup.rank = static_cast<uint32_t>(segments.dim_size(1));
        lookup.dense_shape = Int64s(dense_shape);
      }
      if (weight_count_ > 0) {
        const tf::Tensor& weights = context->input(1 + 3 * tables + i);
        TF_RETURN_IF_ERROR(CheckWeights(weights, keys));
        lookup.weights = weights.flat<float>().data();
      }
      tf::Tensor* output = nullptr;
      TF_RETURN_IF_ERROR(context->allocate_output(i, shape, &output));
      lookup.output = output->flat<float>().data();
    }
    return ToTensorFlow(session.LookupSparseOnDevice(gpu, lookups, StreamOf(context), options));
  }

  static absl::Status CheckWeights(const tf::Tensor& weights, const tf::Tensor& keys) {
    if (weights.NumElements() == keys.NumElements()) return absl::OkStatus();
    return absl::InvalidArgumentError("sparse weights: there are " + std::to_string(weights.NumElements()) +
                                      " weights for " + std::to_string(keys.NumElements()) +
                                      " ids; each id needs one weight");
  }
  static const int64_t* Int64s(const tf::Tensor& tensor) {
    return reinterpret_cast<const int64_t*>(tensor.flat<int64_t>().data());
  }

  bool row_splits_ = false;
  int weight_count_ = 0;
  std::vector<Combiner> combiners_;
};

HPS_REGISTER_LOOKUP("HierarchicalParameterServer>LookupSparse", LookupSparseOp, "Tkeys",
                    .HostMemory("server").HostMemory("dense_shapes"));

}  // namespace
}  // namespace hps

namespace tensorflow {
REGISTER_INPUT_COLOCATION_EXEMPTION("HierarchicalParameterServer>LookupSparse");
}
