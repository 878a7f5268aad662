// What the operators' files share: checks of arguments, and where a launcher runs.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"
#include "upload_cache.h"

#ifdef ADAHESSIAN_WITH_CUDA
// Weak: a torch without CUDA does not have it, and never gets as far as calling it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace adahessian {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

inline Dtype dtype_of(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::Double: return Dtype::kFloat64;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", argument, " is ", name_of(tensor.scalar_type()),
                  "; expected float32, bfloat16, float16 or float64");
}

// Of all arithmetic for parameters of this dtype.
inline ScalarType state_type(Dtype dtype) { return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float; }

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

inline void check_same_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& other) {
  STD_TORCH_CHECK(tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(), op,
                  ": ", argument, " is on ", tensor.is_cuda() ? "cuda:" : "cpu:", int(tensor.get_device_index()),
                  "; expected ", other.is_cuda() ? "cuda:" : "cpu:", int(other.get_device_index()));
}

// Bytes on a GPU, for work on the given stream of it: from pinned memory without waiting, or those of an earlier call.
inline const void* upload(const Tensor& on, void* stream, const void* bytes, size_t size) {
  using Caches = std::map<std::pair<int32_t, void*>, UploadCache<Tensor>>;
  static std::mutex mutex;
  static Caches& caches = *new Caches;  // never destroyed: CUDA may have gone before
  const std::lock_guard lock(mutex);
  const auto send = [&] {
    const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
    const Tensor pinned = torch::stable::empty({int64_t(size)}, ScalarType::Byte, std::nullopt, host, true);
    std::memcpy(pinned.data_ptr(), bytes, size);
    Tensor target = torch::stable::new_empty(on, {int64_t(size)}, ScalarType::Byte);
    return torch::stable::copy_(target, pinned, true);
  };
  return caches[{on.get_device_index(), stream}].find(bytes, size, send).data_ptr();
}

// Threads of torch, memory for the duration of the call; on a GPU the current stream of the tensors' device.
class Scope {
 public:
  explicit Scope(const Tensor& on) {
    if (on.is_cuda()) enter_cuda(on.get_device_index());
    context_.parallel_for = [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
      torch::stable::parallel_for(begin, end, grain, body);
    };
    context_.allocate = [this, on](size_t bytes) {
      workspaces_.push_back(torch::stable::new_empty(on, {int64_t(bytes)}, ScalarType::Byte));
      return workspaces_.back().data_ptr();
    };
    context_.upload = [this, on](const void* bytes, size_t size) -> const void* {
      if (on.is_cuda()) return upload(on, context_.stream, bytes, size);
      return std::memcpy(context_.allocate(size), bytes, size);
    };
  }
  const Context& context() const { return context_; }

 private:
  void enter_cuda([[maybe_unused]] int32_t device) {
#ifdef ADAHESSIAN_WITH_CUDA
    guard_.emplace(device);
    context_.device = device;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                        aoti_torch_get_current_cuda_stream(device, &context_.stream) == 0,
                    "cannot get the current CUDA stream from torch");
#endif
  }

  Context context_;
  TensorList workspaces_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace adahessian
