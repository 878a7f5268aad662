// adahessian_step on a GPU, compiled for each pair of types in one of the files adahessian_step*.cu.
#pragma once

#include "launch.cuh"
#include "step_plan.h"

namespace adahessian::gpu {

// Compiled in hessian_diag.cu.
extern template void CudaDevice::launch<HessianDiagBody<float>>(const HessianDiagArguments&, uint32_t);
extern template void CudaDevice::launch<HessianDiagBody<double>>(const HessianDiagArguments&, uint32_t);
extern template void CudaDevice::launch<HessianDiagBody<bfloat16>>(const HessianDiagArguments&, uint32_t);
extern template void CudaDevice::launch<HessianDiagBody<float16>>(const HessianDiagArguments&, uint32_t);

#ifndef ADAHESSIAN_STEP_FLOAT32
extern template void adahessian_step<float, float>(const AdaHessianStepArgs&, CudaDevice&);
extern template void adahessian_step<float, bfloat16>(const AdaHessianStepArgs&, CudaDevice&);
#endif
#ifndef ADAHESSIAN_STEP_16
extern template void adahessian_step<bfloat16, float>(const AdaHessianStepArgs&, CudaDevice&);
extern template void adahessian_step<bfloat16, bfloat16>(const AdaHessianStepArgs&, CudaDevice&);
extern template void adahessian_step<float16, float>(const AdaHessianStepArgs&, CudaDevice&);
extern template void adahessian_step<float16, bfloat16>(const AdaHessianStepArgs&, CudaDevice&);
#endif

}  // namespace adahessian::gpu
