#include "emulate.h"

#include "perturb.h"
#include "rademacher.h"
#include "step_plan.h"

namespace adahessian::emulated {

void rademacher(const RademacherArgs& args, const Context& context) {
  gpu::EmulatedDevice device(context);
  dispatch(args.dtype, [&](auto type) { gpu::rademacher<decltype(type)>(args, device); });
}

void perturb(const PerturbArgs& args, const Context& context) {
  gpu::EmulatedDevice device(context);
  dispatch(args.dtype, [&](auto type) { gpu::perturb<decltype(type)>(args, device); });
}

void hessian_diag(const HessianDiagArgs& args, const Context& context) {
  gpu::EmulatedDevice device(context);
  dispatch(args.dtype, [&](auto type) { gpu::hessian_diag<decltype(type)>(args, device); });
}

void adahessian_step(const AdaHessianStepArgs& args, const Context& context) {
  gpu::EmulatedDevice device(context);
  dispatch(args.dtype, args.state_dtype, [&](auto type, auto state_type) {
    gpu::adahessian_step<decltype(type), decltype(state_type)>(args, device);
  });
}

}  // namespace adahessian::emulated
