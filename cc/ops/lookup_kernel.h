// What the lookup kernels have in common: attributes, the session behind the handle, keys of either width.

#ifndef HPS_OPS_LOOKUP_KERNEL_H_
#define HPS_OPS_LOOKUP_KERNEL_H_

#include <span>
#include <string>
#include <vector>

#include "cc/ops/tf_bridge.h"
#include "hps/lookup_session.h"
#include "hps/server_registry.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace hps {

// Attributes of a lookup op: which tables of which model, and how wide their rows must be.
struct LookupAttributes {
  std::string model;
  std::vector<std::string> table_names;  // either names
  std::vector<int32_t> table_ids;        // or numbers, one per list entry
  std::vector<int32_t> widths;

  template <typename Context>  // OpKernelConstruction or InferenceContext
  absl::Status Read(Context* context) {
    TF_RETURN_IF_ERROR(context->GetAttr("model", &model));
    TF_RETURN_IF_ERROR(context->GetAttr("table_names", &table_names));
    TF_RETURN_IF_ERROR(context->GetAttr("table_ids", &table_ids));
    TF_RETURN_IF_ERROR(context->GetAttr("widths", &widths));
    int count = 0;
    TF_RETURN_IF_ERROR(context->GetAttr("N", &count));
    const size_t tables = static_cast<size_t>(count);
    if (widths.size() != tables) {
      return absl::InvalidArgumentError("widths has " + std::to_string(widths.size()) + " entries for " +
                                        std::to_string(tables) + " key tensors");
    }
    if (!(table_names.size() == tables && table_ids.empty()) && !(table_ids.size() == tables && table_names.empty())) {
      return absl::InvalidArgumentError("give one table name or one table id for each of the " +
                                        std::to_string(tables) + " key tensors, not both");
    }
    for (int32_t width : widths) {
      if (width <= 0) {
        return absl::InvalidArgumentError("emb_vec_size must be positive, got " + std::to_string(width));
      }
    }
    return absl::OkStatus();
  }

  // Index in its model of the i-th table of the op.
  Result<uint32_t> Table(const LookupSession& session, size_t i) const {
    if (!table_names.empty()) return session.FindTable(table_names[i]);
    if (table_ids[i] < 0) return InvalidArgument("table_id must not be negative, got " + std::to_string(table_ids[i]));
    return static_cast<uint32_t>(table_ids[i]);  // the session checks the upper end
  }
};

// Sessions are cheap: one is made per call, so that a server that was closed or a model that was replaced is noticed.
inline Result<LookupSession> SessionOf(const std::string& handle, const std::string& model) {
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<ParameterServer> server, ServerOfHandle(handle));
  return server->NewSession(model);
}

// The keys of a tensor as 64-bit; int32 ones are widened into *buffer, which must outlive the span.
template <typename T>
absl::Status KeysOf(tensorflow::OpKernelContext* context, const tensorflow::Tensor& tensor, tensorflow::Tensor* buffer,
                    std::span<const Key>* keys) {
  const auto flat = tensor.flat<T>();
  const size_t count = static_cast<size_t>(flat.size());
  if constexpr (sizeof(T) == sizeof(Key)) {
    *keys = std::span(reinterpret_cast<const Key*>(flat.data()), count);
  } else {
    TF_RETURN_IF_ERROR(context->allocate_temp(tensorflow::DT_INT64, tensor.shape(), buffer));
    Key* wide = reinterpret_cast<Key*>(buffer->flat<int64_t>().data());
    for (size_t i = 0; i < count; ++i) wide[i] = flat.data()[i];
    *keys = std::span(wide, count);
  }
  return absl::OkStatus();
}

}  // namespace hps

#endif  // HPS_OPS_LOOKUP_KERNEL_H_
