// adahessian_fused._C: what this build is and what the machine offers. The operators live in the library of ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// Instruction sets the CPU kernels are compiled for, best first, and the one the loader picks here.
std::vector<std::string> instruction_sets() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__)
  return {"avx512", "avx2", "sse2"};
#else
  return {"baseline"};
#endif
}

std::string instruction_set_in_use() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
    return "avx512";
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "avx2" : "sse2";
#else
  return "baseline";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = ADAHESSIAN_VERSION;
  info["compiler"] = compiler();
  info["torch_headers"] = ADAHESSIAN_TORCH_VERSION;
  info["cuda"] = ADAHESSIAN_CUDA_VERSION;  // "" without CUDA
  info["cuda_architectures"] = ADAHESSIAN_CUDA_ARCHITECTURES;
  info["cuda_decision"] = ADAHESSIAN_CUDA_DECISION;  // why CUDA is in or out
  info["instruction_sets"] = instruction_sets();
  info["instruction_set_in_use"] = instruction_set_in_use();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information of adahessian_fused's native library.";
  module.def("build_info", &build_info, "How the native library was built and what it uses on this machine.");
}
