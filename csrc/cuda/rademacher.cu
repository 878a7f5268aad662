#include "launch.cuh"
#include "rademacher.h"

namespace adahessian::cuda {

void rademacher(const RademacherArgs& args, const Context& context) {
  gpu::CudaDevice device("rademacher", context);
  dispatch(args.dtype, [&](auto type) { gpu::rademacher<decltype(type)>(args, device); });
}

}  // namespace adahessian::cuda
