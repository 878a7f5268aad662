#include "launch.cuh"
#include "perturb.h"

namespace adahessian::cuda {

void perturb(const PerturbArgs& args, const Context& context) {
  gpu::CudaDevice device("perturb", context);
  dispatch(args.dtype, [&](auto type) { gpu::perturb<decltype(type)>(args, device); });
}

}  // namespace adahessian::cuda
