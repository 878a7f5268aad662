// GELU: what gelu_ops.cpp asks of the CPU's kernel. adahessian_fused/friendly/gelu.py has the formula.
#pragma once

#include "launch.h"

namespace adahessian {

struct GeluArgs {
  Dtype dtype;
  int64_t numel;
  const void *v, *grad, *x;
  void* d_x;
};

namespace cpu {

// Compiled once for each instruction set; this is the best one's.
using GeluKernel = void (*)(const GeluArgs& args, const Context& context);
GeluKernel gelu_double_backward();

}  // namespace cpu
}  // namespace adahessian
