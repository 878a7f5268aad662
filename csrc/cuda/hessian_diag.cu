#include "launch.cuh"
#include "reduction.h"

namespace adahessian::gpu {

// For adahessian_step.cu, which averages long blocks with these kernels.
template void CudaDevice::launch<HessianDiagBody<float>>(const HessianDiagArguments&, uint32_t);
template void CudaDevice::launch<HessianDiagBody<double>>(const HessianDiagArguments&, uint32_t);
template void CudaDevice::launch<HessianDiagBody<bfloat16>>(const HessianDiagArguments&, uint32_t);
template void CudaDevice::launch<HessianDiagBody<float16>>(const HessianDiagArguments&, uint32_t);

}  // namespace adahessian::gpu

namespace adahessian::cuda {

void hessian_diag(const HessianDiagArgs& args, const Context& context) {
  gpu::CudaDevice device("hessian_diag", context);
  dispatch(args.dtype, [&](auto type) { gpu::hessian_diag<decltype(type)>(args, device); });
}

}  // namespace adahessian::cuda
