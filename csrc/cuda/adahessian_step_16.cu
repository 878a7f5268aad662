#define ADAHESSIAN_STEP_16
#include "step_launch.cuh"

namespace adahessian::gpu {

template void adahessian_step<bfloat16, float>(const AdaHessianStepArgs&, CudaDevice&);
template void adahessian_step<bfloat16, bfloat16>(const AdaHessianStepArgs&, CudaDevice&);
template void adahessian_step<float16, float>(const AdaHessianStepArgs&, CudaDevice&);
template void adahessian_step<float16, bfloat16>(const AdaHessianStepArgs&, CudaDevice&);

}  // namespace adahessian::gpu
