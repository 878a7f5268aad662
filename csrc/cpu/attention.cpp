// Hands out attention's kernel of the best instruction set.
#include "../attention.h"

#include "instruction_set.h"

namespace adahessian::cpu {

#define ADAHESSIAN_DECLARE(isa)                                                      \
  namespace isa {                                                                    \
  void attention_double_backward(const AttentionArgs& args, const Context& context); \
  }
ADAHESSIAN_FOR_EACH_ISA(ADAHESSIAN_DECLARE)

AttentionKernel attention_double_backward() {
  const std::string best = best_instruction_set();
#ifdef ADAHESSIAN_X86
  if (!__builtin_cpu_supports("fma")) return baseline::attention_double_backward;  // its AVX2 has it
#endif
#define ADAHESSIAN_USE(isa) \
  if (best == #isa) return isa::attention_double_backward;
  ADAHESSIAN_FOR_EACH_ISA(ADAHESSIAN_USE)
  return baseline::attention_double_backward;
}

}  // namespace adahessian::cpu
