// adahessian_fused._C: what this build is, and lists of tensors in Python. The operators are in the library of ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/instruction_set.h"
#include "looks.h"

namespace py = pybind11;
namespace cpu = adahessian::cpu;

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

#define ADAHESSIAN_NAME(isa) #isa,

// Instruction sets the CPU kernels are compiled for, best first.
std::vector<std::string> instruction_sets() { return {ADAHESSIAN_FOR_EACH_ISA(ADAHESSIAN_NAME)}; }

py::dict build_info() {
  py::dict info;
  info["version"] = ADAHESSIAN_VERSION;
  info["compiler"] = compiler();
  info["torch_headers"] = ADAHESSIAN_TORCH_VERSION;
  info["cuda"] = ADAHESSIAN_CUDA_VERSION;  // "" without CUDA
  info["cuda_architectures"] = ADAHESSIAN_CUDA_ARCHITECTURES;
  info["cuda_decision"] = ADAHESSIAN_CUDA_DECISION;  // why CUDA is in or out
  info["instruction_sets"] = instruction_sets();
  info["instruction_set_in_use"] = cpu::best_instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information of adahessian_fused's native library, and quick looks at lists of tensors.";
  module.def("build_info", &build_info, "How the native library was built and what it uses on this machine.");
  py::class_<adahessian::Looks>(module, "Looks", "The looks of a list of tensors, as they are now.")
      .def(py::init<py::list>())
      .def("same", &adahessian::Looks::same, "Whether tensors look like these, addresses and all.")
      .def("addresses", &adahessian::Looks::addresses, "Write addresses of tensors like these into a table.")
      .def("gradients", &adahessian::Looks::gradients, "Gradients of the same tensors, if they look like these.");
  module.def("requires_grad", &adahessian::requires_grad, "Whether autograd follows any of some tensors.");
  module.def("holds", &adahessian::holds, "Whether a dict of dicts has these dicts, and they these objects.");
  module.def("count", &adahessian::count, "Add one to the first numbers of every row of a table.");
  module.def("any", &adahessian::any, "Whether any of some numbers is not zero.");
  module.def("note_gradients", &adahessian::note_gradients, "Weak references to gradients, and their versions.");
}
