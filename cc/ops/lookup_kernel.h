// What the lookup kernels have in common: attributes, the session behind the handle, keys of either width, and where a
// lookup of an op on a GPU is made: in the model's caches there, or through host memory where the model has none.

#ifndef HPS_OPS_LOOKUP_KERNEL_H_
#define HPS_OPS_LOOKUP_KERNEL_H_

#include <limits>
#include <span>
#include <string>
#include <vector>

#include "cc/ops/gpu_devices.h"
#include "cc/ops/host_tensors.h"
#include "cc/ops/table_list.h"
#include "cc/ops/tf_bridge.h"
#include "hps/lookup_session.h"
#include "hps/server_registry.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace hps {

// Attributes of a lookup op.
struct LookupAttributes : TableList {
  template <typename Context>  // OpKernelConstruction or InferenceContext
  absl::Status Read(Context* context) {
    std::string text;
    TF_RETURN_IF_ERROR(context->GetAttr("tables", &text));
    return Parse(text);
  }

  // Of an op with as many tensors of keys.
  template <typename Context>
  absl::Status ReadEach(Context* context) {
    TF_RETURN_IF_ERROR(Read(context));
    int count = 0;
    TF_RETURN_IF_ERROR(context->GetAttr("N", &count));
    if (tables.size() == static_cast<size_t>(count)) return absl::OkStatus();
    return absl::InvalidArgumentError("tables has " + std::to_string(tables.size()) + " entries for " +
                                      std::to_string(count) + " key tensors");
  }

  // Of an op with one tensor of keys for all tables.
  template <typename Context>
  absl::Status ReadStacked(Context* context) {
    TF_RETURN_IF_ERROR(Read(context));
    for (const ListedTable& table : tables) {
      if (table.width == tables[0].width) continue;
      return absl::InvalidArgumentError("tables that are looked up stacked must be equally wide, but there are " +
                                        std::to_string(tables[0].width) + " and " + std::to_string(table.width));
    }
    return absl::OkStatus();
  }

  // Table and width of the i-th table's part of a lookup.
  template <typename Lookup>
  absl::Status SetTable(const LookupSession& session, size_t i, Lookup* lookup) const {
    const ListedTable& table = tables[i];
    lookup->width = static_cast<uint32_t>(table.width);
    if (table.name.empty()) {
      if (table.number < 0) {
        return absl::InvalidArgumentError("table_id must not be negative, got " + std::to_string(table.number));
      }
      lookup->table = static_cast<uint32_t>(table.number);  // the session checks the upper end
      return absl::OkStatus();
    }
    const Result<uint32_t> found = session.FindTable(table.name);
    if (!found.ok()) return ToTensorFlow(found.status());
    lookup->table = *found;
    return absl::OkStatus();
  }
};

// Sessions are cheap: one is made per call, so that a server that was closed or a model that was replaced is noticed.
inline Result<LookupSession> SessionOf(tensorflow::OpKernelContext* context, const std::string& handle,
                                       const std::string& model) {
  AddTensorFlowDevicesOnce(context);  // the server may be opened just now
  HPS_ASSIGN_OR_RETURN(std::shared_ptr<ParameterServer> server, ServerOfHandle(handle));
  return server->NewSession(model);
}

// The GPU whose caches serve the op; -1: its lookup is made in host memory.
inline Result<int> ServingGpu(tensorflow::OpKernelContext* context, const LookupSession& session) {
  const int gpu = GpuOrdinal(context);
  if (gpu < 0) return gpu;
  HPS_ASSIGN_OR_RETURN(const bool served, session.IsServedOnDevice(gpu));
  return served ? gpu : -1;
}

// A lookup op: where its lookup is made, with what threads, and when it is given up.
class LookupKernel : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;

  // It may wait for tiers; TensorFlow then runs others beside it.
  bool IsExpensive() override { return true; }

  void Compute(tensorflow::OpKernelContext* context) override {
    auto session = SessionOf(context, Handle(context), attributes_.model);
    OP_REQUIRES_OK(context, ToTensorFlow(session.status()));
    auto gpu = MayUseCaches() ? ServingGpu(context, *session) : -1;
    OP_REQUIRES_OK(context, ToTensorFlow(gpu.status()));
    TensorFlowExecutor executor(context);
    const OpCancellation cancellation(context);
    const LookupOptions options{.executor = &executor, .cancelled = cancellation.flag()};
    OP_REQUIRES_OK(
        context, *gpu >= 0 ? LookupOnGpu(context, *session, *gpu, options) : LookupOnHost(context, *session, options));
  }

 protected:
  // Of the server: input 0.
  virtual std::string Handle(tensorflow::OpKernelContext* context) const {
    return tensorflow::HandleFromInput(context, 0).name();
  }
  virtual bool MayUseCaches() const { return true; }
  virtual absl::Status LookupOnHost(tensorflow::OpKernelContext* context, const LookupSession& session,
                                    const LookupOptions& options) = 0;
  virtual absl::Status LookupOnGpu(tensorflow::OpKernelContext* context, const LookupSession& session, int gpu,
                                   const LookupOptions& options) = 0;

  int num_tables() const { return static_cast<int>(attributes_.tables.size()); }

  LookupAttributes attributes_;
};

// The keys of a tensor in host memory as 64-bit; int32 ones are widened into *buffer, which must outlive the span.
template <typename T>
absl::Status KeysOf(const HostTensors& tensors, const tensorflow::Tensor& tensor, tensorflow::Tensor* buffer,
                    std::span<const Key>* keys) {
  const auto flat = tensor.flat<T>();
  const size_t count = static_cast<size_t>(flat.size());
  if constexpr (sizeof(T) == sizeof(Key)) {
    *keys = std::span(reinterpret_cast<const Key*>(flat.data()), count);
  } else {
    TF_RETURN_IF_ERROR(tensors.AllocateTemp(tensorflow::DT_INT64, tensor.shape(), buffer));
    Key* wide = reinterpret_cast<Key*>(buffer->flat<int64_t>().data());
    for (size_t i = 0; i < count; ++i) wide[i] = flat.data()[i];
    *keys = std::span(wide, count);
  }
  return absl::OkStatus();
}

// The same of a tensor on a GPU, for a part of a lookup there.
template <typename T, typename Part>
absl::Status SetDeviceKeys(tensorflow::OpKernelContext* context, const tensorflow::Tensor& tensor,
                           tensorflow::Tensor* buffer, Part* part) {
  if (tensor.NumElements() > std::numeric_limits<uint32_t>::max()) {
    return absl::InvalidArgumentError(std::to_string(tensor.NumElements()) +
                                      " keys of one table in one lookup on a GPU; split it");
  }
  part->keys = tensor.flat<T>().data();
  part->key_bytes = sizeof(T);
  part->count = static_cast<uint32_t>(tensor.NumElements());
  if constexpr (sizeof(T) < sizeof(Key)) {
    TF_RETURN_IF_ERROR(context->allocate_temp(tensorflow::DT_INT64, tensor.shape(), buffer));
    part->wide_keys = reinterpret_cast<Key*>(buffer->flat<int64_t>().data());
  }
  return absl::OkStatus();
}

}  // namespace hps

// Registers the kernels of a lookup op, on CPUs and, where the core is built with CUDA, on GPUs. `Tkeys`: the attribute
// of the keys' type. The rest: which inputs are in host memory there, as .HostMemory("server").
#define HPS_REGISTER_LOOKUP_ON(device, op, Kernel, Tkeys, ...)                                                  \
  REGISTER_KERNEL_BUILDER(Name(op).Device(device).TypeConstraint<int32_t>(Tkeys) __VA_ARGS__, Kernel<int32_t>); \
  REGISTER_KERNEL_BUILDER(Name(op).Device(device).TypeConstraint<int64_t>(Tkeys) __VA_ARGS__, Kernel<int64_t>)
#ifdef HPS_WITH_CUDA
#define HPS_REGISTER_LOOKUP(...)                               \
  HPS_REGISTER_LOOKUP_ON(tensorflow::DEVICE_CPU, __VA_ARGS__); \
  HPS_REGISTER_LOOKUP_ON(tensorflow::DEVICE_GPU, __VA_ARGS__)
#else
#define HPS_REGISTER_LOOKUP(...) HPS_REGISTER_LOOKUP_ON(tensorflow::DEVICE_CPU, __VA_ARGS__)
#endif

#endif  // HPS_OPS_LOOKUP_KERNEL_H_
