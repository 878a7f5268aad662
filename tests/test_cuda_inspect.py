"""What nvcc makes of the CUDA kernels for sm_90: registers, spills, access widths, instructions. Needs no GPU.

The kernels' arithmetic and indexing are tested by running their bodies on the host (the backend "emulated"), their
planning by cpp/launches.cpp (make cpp-test).
"""

from __future__ import annotations

import json
import shutil

import pytest

from bench import instructions
from bench.instructions import DTYPES, ROUNDED
from bench.sass import Kernel, compile_cuda, tool

# 128-bit accesses of one thread when everything is aligned, over all sources of curvature. A thread has 32 bytes of a
# 16-bit dtype's states and 16 of its parameters, otherwise two times 16 bytes of each; 16 of states in bfloat16.
#   step loads: Hz, diag, g, m, v, master, p; stores: m, v, master, p.  hessian_diag loads: Hz, diag; stores: diag.
#   perturb loads: p or saved; stores: saved, p.
WIDE = {
    ("rademacher", 4): (0, 8),  # a thread has four times as much
    ("rademacher", 2): (0, 4),
    ("perturb", 4): (2, 2 * 2),
    ("perturb", 2): (1, 2),
    ("hessian_diag", 4): (2 + 2, 2),
    ("hessian_diag", 2): (1 + 2, 2),
    # Twice: where all arrays are aligned, and where some are.
    ("adahessian_step", 4): (2 * 7 * 2, 2 * 4 * 2),
    ("adahessian_step", 2): (2 * (1 + 2 + 1 + 2 + 2 + 2 + 1), 2 * (2 + 2 + 2 + 1)),
    ("adahessian_step" + ROUNDED, 4): (2 * (2 + 2 + 2 + 1 + 1 + 2 + 2), 2 * (1 + 1 + 2 + 2)),
    ("adahessian_step" + ROUNDED, 2): (2 * (1 + 2 + 1 + 1 + 1 + 2 + 1), 2 * (1 + 1 + 2 + 1)),
}
STATES = [(dtype, "") for dtype in DTYPES.values()]
STATES += [(dtype, ROUNDED) for dtype in DTYPES.values() if dtype != "float64"]
KERNELS = [
    *(f"rademacher-{dtype}-{order}" for dtype in DTYPES.values() for order in ("flat", "any")),
    *(f"perturb-{dtype}-{order}" for dtype in DTYPES.values() for order in ("flat", "any")),
    *(f"hessian_diag-{dtype}-any" for dtype in DTYPES.values()),
    *(f"adahessian_step{s}-{dtype}-{order}" for dtype, s in STATES for order in ("flat", "logical", "any")),
]
CONSTANTS = ["constants-float32-any", f"constants{ROUNDED}-float32-any", "constants-float64-any"]


def assert_lean(kernel: Kernel, registers: int) -> None:
    assert (kernel.stack, kernel.local) == (0, 0), f"spills or has a stack frame: {kernel}"
    assert kernel.generic == 0, f"accesses memory whose kind the compiler does not know: {kernel}"
    assert 0 < kernel.registers <= registers, f"expected at most {registers} registers: {kernel}"


def assert_wide(kernel: Kernel, loads: int, stores: int) -> None:
    assert (kernel.wide_loads, kernel.wide_stores) == (loads, stores), f"expected {loads} and {stores}: {kernel}"


@pytest.fixture(scope="module")
def tools() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on the PATH")
    if tool("cuobjdump") is None:
        pytest.skip("needs cuobjdump on the PATH, or triton, whose package has it")


@pytest.fixture(scope="module")
def kernels(tools, tmp_path_factory) -> dict[str, Kernel]:
    return instructions.cuda_kernels(tmp_path_factory.mktemp("cubins"))


def test_every_kernel_is_inspected(kernels):
    assert sorted(kernels) == sorted(KERNELS + CONSTANTS)


@pytest.mark.parametrize("name", CONSTANTS)
def test_no_spills_and_no_stack(kernels, name):
    assert_lean(kernels[name], 96)


@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_no_stack_and_wide_accesses(kernels, name):
    op, dtype, order = name.split("-")
    # 64 registers are 4 thread blocks of 256 on a multiprocessor; double and computed places may take more.
    assert_lean(kernels[name], 64 if dtype != "float64" and order != "any" else 96)
    loads, stores = WIDE[op, 2 if dtype in ("bfloat16", "float16") else 4]
    # Whole tiles of the probe have code of their own.
    assert_wide(kernels[name], loads, stores * (2 if (op, order) == ("rademacher", "flat") else 1))


BAD_KERNELS = """
#include "step_plan.h"
#include "launch.cuh"
using namespace adahessian::gpu;
using Body = StepBody<float, float, Order::kLogical>;
// The step with half of the registers it needs.
extern "C" __global__ void __launch_bounds__(kThreads, 8) squeezed(const __grid_constant__ Body::Arguments arguments) {
  __shared__ Body::Shared shared;
  ThreadExecutor<Body::Thread> executor;
  run(Body{}, executor, arguments, shared, blockIdx.x);
}
extern "C" __global__ void indexed(int* target) {
  int values[64];
  for (int i = 0; i < 64; ++i) values[target[i]] = i;
  target[0] = values[target[1]];
}
extern "C" __global__ void generic(float** targets) {
  __shared__ float shared[32];
  float* either = threadIdx.x & 1 ? shared : targets[0];
  *either = 1;
  __syncthreads();
  targets[1][threadIdx.x] = shared[threadIdx.x];
}
extern "C" __global__ void narrow(const float* source, float* target) { target[threadIdx.x] = source[threadIdx.x]; }
"""


@pytest.fixture(scope="module")
def bad_kernels(tools, tmp_path_factory) -> dict[str, Kernel]:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad.cu").write_text(BAD_KERNELS)
    return compile_cuda(folder / "bad.cu", folder)


@pytest.mark.parametrize("name", ["squeezed", "indexed", "generic"])
def test_the_checks_notice_spills_stack_frames_and_generic_accesses(bad_kernels, name):
    with pytest.raises(AssertionError, match="spills" if name != "generic" else "accesses memory"):
        assert_lean(bad_kernels[name], 64)


def test_the_checks_notice_narrow_accesses(bad_kernels):
    assert_lean(bad_kernels["narrow"], 64)
    with pytest.raises(AssertionError, match="expected 1 and 1"):
        assert_wide(bad_kernels["narrow"], 1, 1)


# ---- instructions ----------------------------------------------------------------------------------------------------


def assert_no_more(table: dict[str, dict], compiler: str, allowed: float = 1.05) -> None:
    """No more instructions an element than the committed table has."""
    committed = json.loads(instructions.RESULTS.read_text())
    version, before = instructions.compilers()[compiler], committed["compilers"][compiler]
    if version != before:
        pytest.skip(f"the table was made with {compiler} {before}, this is {version}")
    assert table
    for name, row in table.items():
        found, known = row["instructions"], committed["loops"][name]["instructions"]
        assert found <= allowed * known, (
            f"{name}: {found} instructions an element; expected {known}, or `python -m bench.instructions` and a reason"
        )


def test_no_loop_has_more_instructions_than_it_had(kernels):
    table = instructions.measure(kernels)
    assert_no_more(table, "CUDA")
    with pytest.raises(AssertionError, match="instructions an element; expected"):
        assert_no_more(table, "CUDA", 0.9)
