// The kernels of one instruction set, ADAHESSIAN_ISA, as a table; each has a file of its own.
#include "kernels.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

template <typename T>
void rademacher(const Tile& tile, const ProbeKey& key, T* z);
template <typename T>
void perturb(const Tile& tile, const PerturbWork<T>& work);
template <typename T>
double sum_tile(const Tile& tile, const Probe& probe, const ProbeKey& key);
template <typename T>
void hessian_diag(const Tile& tile, const AverageWork<T>& work);
template <typename T, typename M>
void adahessian_step(const Run& run, const StepWork<T, M>& work);

// Doubles are not rounded to bfloat16.
template <typename T>
constexpr auto step_bfloat16 = adahessian_step<T, bfloat16>;
template <>
constexpr auto step_bfloat16<double> = nullptr;

template <typename T>
constexpr Kernels<T> of_type = {
    rademacher<T>, perturb<T>, sum_tile<T>, hessian_diag<T>, adahessian_step<T, StateOf<T>>, step_bfloat16<T>};

extern const KernelTable table = {of_type<float>, of_type<double>, of_type<bfloat16>, of_type<float16>};

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
