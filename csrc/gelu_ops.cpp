// The CPU's kernel of gelu_double_backward: argument checks. adahessian_fused/friendly/gelu.py has its schema.
#include "gelu.h"
#include "ops.h"

namespace adahessian {
namespace {

constexpr const char* kOp = "gelu_double_backward";

const void* contiguous_like(const char* argument, const Tensor& tensor, const Tensor& x) {
  bool alike = tensor.scalar_type() == x.scalar_type() && tensor.dim() == x.dim() && tensor.is_contiguous();
  for (int64_t d = 0; alike && d < x.dim(); ++d) alike = tensor.size(d) == x.size(d);
  STD_TORCH_CHECK(alike, kOp, ": ", argument, " is ", name_of(tensor.scalar_type()), " of shape ", shape_of(tensor),
                  "; expected contiguous ", name_of(x.scalar_type()), " of shape ", shape_of(x));
  return tensor.const_data_ptr();
}

Tensor gelu_double_backward(Tensor v, Tensor grad, Tensor x) {
  const Tensor d_x = torch::stable::empty_like(x);
  const GeluArgs args{dtype_of(kOp, "x", x),      x.numel(),
                      contiguous_like("v", v, x), contiguous_like("grad", grad, x),
                      contiguous_like("x", x, x), d_x.data_ptr()};
  const Scope scope(x);
  static const cpu::GeluKernel kernel = cpu::gelu_double_backward();
  kernel(args, scope.context());
  return d_x;
}

}  // namespace
}  // namespace adahessian

STABLE_TORCH_LIBRARY_IMPL(adahessian_fused, CPU, library) {
  library.impl("gelu_double_backward", TORCH_BOX(&adahessian::gelu_double_backward));
}
