// Hands out the kernels whose additions are fused into multiplications, of the best instruction set.
#include "../attention.h"
#include "../gelu.h"
#include "../recurrence.h"
#include "instruction_set.h"

namespace adahessian::cpu {

#define ADAHESSIAN_DECLARE(isa)                                            \
  namespace isa {                                                          \
  void attention(const AttentionArgs& args, const Context& context);       \
  void gelu_double_backward(const GeluArgs& args, const Context& context); \
  extern const RecurrenceKernels recurrence_table;                         \
  }
ADAHESSIAN_FOR_EACH_ISA(ADAHESSIAN_DECLARE)

static std::string best() {
#ifdef ADAHESSIAN_X86
  if (!__builtin_cpu_supports("fma")) return "baseline";  // its AVX2 has it
#endif
  return best_instruction_set();
}

AttentionKernel attention() {
#define ADAHESSIAN_USE(isa) \
  if (best() == #isa) return isa::attention;
  ADAHESSIAN_FOR_EACH_ISA(ADAHESSIAN_USE)
  return baseline::attention;
}

GeluKernel gelu_double_backward() {
#undef ADAHESSIAN_USE
#define ADAHESSIAN_USE(isa) \
  if (best() == #isa) return isa::gelu_double_backward;
  ADAHESSIAN_FOR_EACH_ISA(ADAHESSIAN_USE)
  return baseline::gelu_double_backward;
}

const RecurrenceKernels& recurrence_kernels() {
#undef ADAHESSIAN_USE
#define ADAHESSIAN_USE(isa) \
  if (best() == #isa) return isa::recurrence_table;
  ADAHESSIAN_FOR_EACH_ISA(ADAHESSIAN_USE)
  return baseline::recurrence_table;
}

}  // namespace adahessian::cpu
