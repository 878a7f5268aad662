#include "launch.cuh"
#include "step_plan.h"

namespace adahessian::gpu {

// Compiled in hessian_diag.cu.
extern template void CudaDevice::launch<HessianDiagBody<float>>(const HessianDiagArguments&, uint32_t);
extern template void CudaDevice::launch<HessianDiagBody<double>>(const HessianDiagArguments&, uint32_t);
extern template void CudaDevice::launch<HessianDiagBody<bfloat16>>(const HessianDiagArguments&, uint32_t);
extern template void CudaDevice::launch<HessianDiagBody<float16>>(const HessianDiagArguments&, uint32_t);

}  // namespace adahessian::gpu

namespace adahessian::cuda {

void adahessian_step(const AdaHessianStepArgs& args, const Context& context) {
  gpu::CudaDevice device("adahessian_step", context);
  dispatch(args.dtype, args.state_dtype, [&](auto type, auto state_type) {
    gpu::adahessian_step<decltype(type), decltype(state_type)>(args, device);
  });
}

}  // namespace adahessian::cuda
