// The instruction sets the CPU kernels are compiled for, best first, and which of them is used. CMakeLists.txt has the
// compiler flags of each and defines ADAHESSIAN_X86 where they apply.
#pragma once

#include <cstdlib>
#include <string>

#ifdef ADAHESSIAN_X86
#define ADAHESSIAN_FOR_EACH_ISA(f) f(avx512) f(avx2) f(baseline)
#else
#define ADAHESSIAN_FOR_EACH_ISA(f) f(baseline)
#endif

namespace adahessian::cpu {

// The best one this machine has, or the one that ADAHESSIAN_CPU_CAPABILITY names if the machine has it.
inline std::string best_instruction_set() {
  [[maybe_unused]] const char* wanted = std::getenv("ADAHESSIAN_CPU_CAPABILITY");
#ifdef ADAHESSIAN_X86
  const auto allowed = [&](const char* name) { return wanted == nullptr || std::string(wanted) == name; };
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return "avx512";
  }
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "baseline";
}

}  // namespace adahessian::cpu
