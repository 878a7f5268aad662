#define ADAHESSIAN_STEP_FLOAT32
#include "step_launch.cuh"

namespace adahessian::gpu {

template void adahessian_step<float, float>(const AdaHessianStepArgs&, CudaDevice&);
template void adahessian_step<float, bfloat16>(const AdaHessianStepArgs&, CudaDevice&);

}  // namespace adahessian::gpu
