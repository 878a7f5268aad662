// Hands out the kernels of the best instruction set.
#include "instruction_set.h"

#include "kernels.h"

namespace adahessian::cpu {

#define ADAHESSIAN_DECLARE(isa)   \
  namespace isa {                 \
  extern const KernelTable table; \
  }
ADAHESSIAN_FOR_EACH_ISA(ADAHESSIAN_DECLARE)

static const KernelTable& best_table() {
#define ADAHESSIAN_USE(isa) \
  if (best == #isa) return isa::table;
  const std::string best = best_instruction_set();
  ADAHESSIAN_FOR_EACH_ISA(ADAHESSIAN_USE)
  return baseline::table;
}

const KernelTable& kernel_table() {
  static const KernelTable& table = best_table();
  return table;
}

}  // namespace adahessian::cpu
