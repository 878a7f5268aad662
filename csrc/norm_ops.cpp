// The operators behind the double backward of normalisations: schemas and argument checks. Functional, CPU only; on
// CUDA the Triton kernels do the same.
#include <tuple>

#include "norms.h"
#include "ops.h"

namespace adahessian {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Whether the tensor is dense with its second dimension innermost: (N, C, ...) stored as (N, ..., C).
bool channels_innermost(const Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    const int64_t d = i == 0 ? 1 : i + 1 < tensor.dim() ? tensor.dim() - i : 0;
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

// A tensor of the shape, strides and dtype of x.
void check_like(const char* op, const char* argument, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() && tensor.dim() == x.dim(), op, ": ", argument, " is ",
                  name_of(tensor.scalar_type()), " of shape ", shape_of(tensor), "; expected ",
                  name_of(x.scalar_type()), " of shape ", shape_of(x), " like x");
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(tensor.size(d) == x.size(d) && (x.size(d) == 1 || tensor.stride(d) == x.stride(d)), op, ": ",
                    argument, " of shape ", shape_of(tensor), " differs from x of shape ", shape_of(x),
                    " in shape or strides");
  }
}

// Address of a contiguous tensor of `numel` numbers of the state's type, or null.
const void* numbers(const char* op, const char* argument, const OptionalTensor& tensor, const Tensor& x,
                    int64_t numel) {
  if (!tensor.has_value()) return nullptr;
  const ScalarType type = state_type(dtype_of(op, "x", x));
  STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->numel() == numel && tensor->is_contiguous(), op, ": ",
                  argument, " is ", name_of(tensor->scalar_type()), " of shape ", shape_of(*tensor),
                  "; expected contiguous ", name_of(type), " with ", numel, " elements");
  return tensor->const_data_ptr();
}

// What both operators are given, checked, and room for the results.
struct Call {
  Tensor d_grad, d_x, d_weight;
  NormTensors tensors;

  Call(const char* op, const Tensor& v, const OptionalTensor& v_weight, const OptionalTensor& v_bias,
       const Tensor& grad, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& mean,
       const Tensor& invstd, int64_t n_weights, int64_t n_statistics)
      : d_grad(torch::stable::empty_like(x)),
        d_x(torch::stable::empty_like(x)),
        d_weight(torch::stable::new_empty(x, {n_weights}, state_type(dtype_of(op, "x", x)))) {
    check_like(op, "v", v, x);
    check_like(op, "grad", grad, x);
    tensors = {v.const_data_ptr(),
               grad.const_data_ptr(),
               x.const_data_ptr(),
               numbers(op, "v_weight", v_weight, x, n_weights),
               numbers(op, "v_bias", v_bias, x, n_weights),
               numbers(op, "weight", weight, x, n_weights),
               numbers(op, "mean", mean, x, n_statistics),
               numbers(op, "invstd", invstd, x, n_statistics),
               d_grad.data_ptr(),
               d_x.data_ptr(),
               d_weight.data_ptr()};
  }
  Gradients results() const { return {d_grad, d_x, d_weight}; }
};

Gradients batch_norm_double_backward(Tensor v, OptionalTensor v_weight, OptionalTensor v_bias, Tensor grad, Tensor x,
                                     OptionalTensor weight, Tensor mean, Tensor invstd, bool fixed) {
  const char* op = "batch_norm_double_backward";
  STD_TORCH_CHECK(x.dim() >= 2 && x.numel() > 0, op, ": x has shape ", shape_of(x), "; expected (N, C, ...)");
  const bool last = channels_innermost(x);
  STD_TORCH_CHECK(last || x.is_contiguous(), op, ": x of shape ", shape_of(x),
                  " is neither contiguous nor channels_last");
  const int64_t channels = x.size(1), pixels = x.numel() / x.size(0) / channels;
  const Call call(op, v, v_weight, v_bias, grad, x, weight, mean, invstd, channels, channels);
  const Scope scope(x);
  cpu::batch_norm_double_backward(
      {dtype_of(op, "x", x), call.tensors, last ? x.size(0) * pixels : x.size(0), channels, last ? 1 : pixels, fixed},
      scope.context());
  return call.results();
}

Gradients row_norm_double_backward(Tensor v, OptionalTensor v_weight, OptionalTensor v_bias, Tensor grad, Tensor x,
                                   OptionalTensor weight, OptionalTensor mean, Tensor invstd, int64_t groups) {
  const char* op = "row_norm_double_backward";
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0 && x.is_contiguous(), op, ": x has shape ", shape_of(x),
                  "; expected contiguous (rows, channels, pixels)");
  STD_TORCH_CHECK(groups > 0 && x.size(0) % groups == 0, op, ": groups is ", groups, "; expected a divisor of ",
                  x.size(0), " rows");
  const int64_t rows = x.size(0), channels = x.size(1);
  const Call call(op, v, v_weight, v_bias, grad, x, weight, mean, invstd, groups * channels, rows);
  const Scope scope(x);
  cpu::row_norm_double_backward({dtype_of(op, "x", x), call.tensors, rows, channels, x.size(2), groups},
                                scope.context());
  return call.results();
}

}  // namespace
}  // namespace adahessian

STABLE_TORCH_LIBRARY_FRAGMENT(adahessian_fused, library) {
  library.def(
      "batch_norm_double_backward(Tensor v, Tensor? v_weight, Tensor? v_bias, Tensor grad, Tensor x, Tensor? weight, "
      "Tensor mean, Tensor invstd, bool fixed) -> (Tensor, Tensor, Tensor)");
  library.def(
      "row_norm_double_backward(Tensor v, Tensor? v_weight, Tensor? v_bias, Tensor grad, Tensor x, Tensor? weight, "
      "Tensor? mean, Tensor invstd, int groups) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(adahessian_fused, CPU, library) {
  library.impl("batch_norm_double_backward", TORCH_BOX(&adahessian::batch_norm_double_backward));
  library.impl("row_norm_double_backward", TORCH_BOX(&adahessian::row_norm_double_backward));
}
