#include "step_launch.cuh"

namespace adahessian::cuda {

// The other types are compiled in files of their own: this one would take as long as all the others together.
void adahessian_step(const AdaHessianStepArgs& args, const Context& context) {
  gpu::CudaDevice device("adahessian_step", context);
  dispatch(args.dtype, args.state_dtype, [&](auto type, auto state_type) {
    gpu::adahessian_step<decltype(type), decltype(state_type)>(args, device);
  });
}

}  // namespace adahessian::cuda
