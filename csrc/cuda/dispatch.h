// From a dtype that is known when the op is called to a type that is known when it is compiled.
#pragma once

#include "../dtypes.h"

namespace adahessian::gpu {

template <class F>
void with_type_of(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(float{});
    case Dtype::kBFloat16: return f(bfloat16{});
    case Dtype::kFloat16: return f(float16{});
    case Dtype::kFloat64: return f(double{});
  }
}

}  // namespace adahessian::gpu
