"""What nvcc makes of the CUDA kernels for sm_90: registers, spills, access widths, instructions. Needs no GPU.

The kernels' arithmetic and indexing are tested by running their bodies on the host (the backend "emulated"), their
planning by cpp/launches.cpp (make cpp-test).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sass import shortest_path

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
FLAGS = ["-O3", "-std=c++20", "-arch=sm_90"]
DTYPES = {"f": "float32", "d": "float64", "N8bfloat16": "bfloat16", "N7float16": "float16"}
BODIES = {"RademacherBody": "rademacher", "PerturbBody": "perturb"}
BODIES |= {"HessianDiagBody": "hessian_diag", "StepBody": "adahessian_step"}
ORDERS = {"0": "flat", "1": "logical", "2": "any", None: "any"}
ROUNDED = " rounded"  # behind the dtype of parameters whose states are in bfloat16

# 128-bit accesses of one thread when everything is aligned, over all sources of curvature. A thread has 32 bytes of a
# 16-bit dtype's states and 16 of its parameters, otherwise two times 16 bytes of each; 16 of states in bfloat16.
#   step loads: Hz, diag, g, m, v, master, p; stores: m, v, master, p.  hessian_diag loads: Hz, diag; stores: diag.
#   perturb loads: p or saved; stores: saved, p.
WIDE = {
    ("rademacher", 4): (0, 2),
    ("rademacher", 2): (0, 1),
    ("perturb", 4): (2, 2 * 2),
    ("perturb", 2): (1, 2),
    ("hessian_diag", 4): (2 + 2, 2),
    ("hessian_diag", 2): (1 + 2, 2),
    ("adahessian_step", 4): (7 * 2, 4 * 2),
    ("adahessian_step", 2): (1 + 2 + 1 + 2 + 2 + 2 + 1, 2 + 2 + 2 + 1),
    ("adahessian_step" + ROUNDED, 4): (2 + 2 + 2 + 1 + 1 + 2 + 2, 1 + 1 + 2 + 2),
    ("adahessian_step" + ROUNDED, 2): (1 + 2 + 1 + 1 + 1 + 2 + 1, 1 + 1 + 2 + 1),
}
STATES = [(dtype, "") for dtype in DTYPES.values()]
STATES += [(dtype, ROUNDED) for dtype in DTYPES.values() if dtype != "float64"]
KERNELS = [
    *(f"rademacher-{dtype}-{order}" for dtype in DTYPES.values() for order in ("flat", "any")),
    *(f"perturb-{dtype}-{order}" for dtype in DTYPES.values() for order in ("flat", "any")),
    *(f"hessian_diag-{dtype}-any" for dtype in DTYPES.values()),
    *(f"adahessian_step{s}-{dtype}-{order}" for dtype, s in STATES for order in ("flat", "logical", "any")),
]


@dataclass
class Kernel:
    """What ptxas and the disassembly say about one kernel."""

    registers: int = 0
    stack: int = 0
    spills: int = 0
    wide_loads: int = 0
    wide_stores: int = 0
    local: int = 0  # accesses to local memory
    generic: int = 0  # accesses that look up at run time which memory an address is in
    code: str = field(default="", repr=False)

    def assert_lean(self, registers: int) -> None:
        assert (self.stack, self.spills, self.local) == (0, 0, 0), f"spills or has a stack frame: {self}"
        assert self.generic == 0, f"accesses memory whose kind the compiler does not know: {self}"
        assert 0 < self.registers <= registers, f"expected at most {registers} registers: {self}"

    def assert_wide(self, loads: int, stores: int) -> None:
        assert (self.wide_loads, self.wide_stores) == (loads, stores), f"expected {loads} and {stores}: {self}"


def kernel_name(mangled: str) -> str:
    """A body's op, dtype and order, like ``adahessian_step-float32-flat``; other kernels keep their name."""
    names, types = "|".join(BODIES), "f|d|NS_8bfloat16E|NS_7float16E"
    body = re.search(rf"({names})I({types})({types}|S\d*_)?(?:LNS0_5OrderE(\d))?", mangled)
    if body is None:
        return mangled
    dtype = DTYPES[body[2].replace("S_", "").removesuffix("E")]
    # The states' type: spelled out, or, where the parameters are bfloat16 too, a reference back to them.
    rounded = ROUNDED if body[3] and body[3] not in ("f", "d") else ""
    return f"{BODIES[body[1]]}{rounded}-{dtype}-{ORDERS[body[4]]}"


def find_cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None and (spec := importlib.util.find_spec("triton")) is not None:
        found = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(found) if found.exists() else None
    return found


def inspect(source: Path, folder: Path) -> dict[str, Kernel]:
    """Compile a file and read what became of its kernels."""
    cubin = folder / f"{source.stem}.cubin"
    command = ["nvcc", *FLAGS, "-Xptxas", "-v", f"-I{CUDA}", "-cubin", "-o", cubin, source]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    assert "warning" not in compiled.stderr, compiled.stderr
    kernels: dict[str, Kernel] = {}
    for report in compiled.stderr.split("Compiling entry function ")[1:]:
        kernel = kernels[kernel_name(report.split("'")[1])] = Kernel()
        kernel.stack = sum(map(int, re.findall(r"(\d+) bytes stack frame", report)))
        kernel.spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
        kernel.registers = int(re.search(r"Used (\d+) registers", report)[1])
    dump = subprocess.run([find_cuobjdump(), "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    for code in dump.split("Function : ")[1:]:
        kernel = kernels[kernel_name(code.split()[0])]
        kernel.code = code
        kernel.wide_loads = len(re.findall(r"\bLDG\.E\.128\b", code))
        kernel.wide_stores = len(re.findall(r"\bSTG\.E\.128\b", code))
        kernel.local = len(re.findall(r"\b(?:LDL|STL)\b", code))
        kernel.generic = len(re.findall(r"\b(?:LD|ST)\.E\b", code))
    return kernels


@pytest.fixture(scope="module")
def tools() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on the PATH")
    if find_cuobjdump() is None:
        pytest.skip("needs cuobjdump on the PATH, or triton, whose package has it")


@pytest.fixture(scope="module")
def kernels(tools, tmp_path_factory) -> dict[str, Kernel]:
    folder = tmp_path_factory.mktemp("cubins")
    return {name: kernel for op in BODIES.values() for name, kernel in inspect(CUDA / f"{op}.cu", folder).items()}


def test_every_kernel_is_inspected(kernels):
    assert sorted(kernels) == sorted(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_no_stack_and_wide_accesses(kernels, name):
    op, dtype, order = name.split("-")
    # 64 registers are 4 thread blocks of 256 on a multiprocessor; double and computed places may take more.
    kernels[name].assert_lean(64 if dtype != "float64" and order != "any" else 96)
    kernels[name].assert_wide(*WIDE[op, 2 if dtype in ("bfloat16", "float16") else 4])


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
    return inspect(folder / "bad.cu", folder)


@pytest.mark.parametrize("name", ["squeezed", "indexed", "generic"])
def test_the_checks_notice_spills_stack_frames_and_generic_accesses(bad_kernels, name):
    with pytest.raises(AssertionError, match="spills" if name != "generic" else "accesses memory"):
        bad_kernels[name].assert_lean(64)


def test_the_checks_notice_narrow_accesses(bad_kernels):
    bad_kernels["narrow"].assert_lean(64)
    with pytest.raises(AssertionError, match="expected 1 and 1"):
        bad_kernels["narrow"].assert_wide(1, 1)


# ---- instructions ----------------------------------------------------------------------------------------------------

# Most instructions a parameter in a Hessian step with b = 1, everything aligned: the shortest way through the kernel on
# which a thread makes its 128-bit accesses (loads of Hz, g, m, v, p; stores of m, v, p) and takes a square root and a
# reciprocal for each of its parameters. A tenth above what nvcc 13.0 makes of it.
# States in bfloat16 take 7 / 8 of a round of Philox a parameter, and some ten instructions to round both.
MOST_INSTRUCTIONS = {"float32": 88, "bfloat16": 70, "float16": 70, "float64": 160}
MOST_INSTRUCTIONS |= {dtype + ROUNDED: 100 for dtype in ("float32", "bfloat16", "float16")}
WIDE_ACCESSES = {"float32": (10, 6), "float64": (10, 6), "bfloat16": (7, 5), "float16": (7, 5)}
WIDE_ACCESSES |= {"float32" + ROUNDED: (8, 4), "bfloat16" + ROUNDED: (5, 3), "float16" + ROUNDED: (5, 3)}


@pytest.mark.parametrize("order", ["flat", "logical"])
@pytest.mark.parametrize("dtype", MOST_INSTRUCTIONS)
def test_instructions_per_parameter(kernels, dtype, order):
    parameters = 4 if dtype == "float64" else 8  # of a thread
    loads, stores = WIDE_ACCESSES[dtype]
    accesses = {r"LDG\.E\.128": loads, r"STG\.E\.128": stores, "MUFU": 2 * parameters}
    kernel = f"adahessian_step{ROUNDED * dtype.endswith(ROUNDED)}-{dtype.removesuffix(ROUNDED)}-{order}"
    path = shortest_path(kernels[kernel].code, accesses)
    most = MOST_INSTRUCTIONS[dtype] + (order == "logical") * 8
    assert 0.5 * most < path / parameters <= most, f"{path} instructions of a thread for {parameters} parameters"


CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;    /* 0x00 */
        /*0010*/               @P0 BRA 0x0050 ;          /* 0x00 */
        /*0020*/                   LDG.E.128 R4, R2 ;    /* 0x00 */
        /*0030*/                   IADD3 R2, R2, R3, RZ ;
        /*0040*/               @P1 BRA 0x0020 ;
        /*0050*/               @P2 EXIT ;
        /*0060*/                   CALL.REL.NOINC 0x0090 ;
        /*0070*/                   MUFU.RCP R1, R2 ;
        /*0080*/                   EXIT ;
        /*0090*/                   MUFU.RSQ R1, R2 ;
        /*00a0*/                   RET.REL.NODEC R2 0x0 ;
"""


@pytest.mark.parametrize(("loads", "length"), [(0, 3), (1, 6), (2, 9)])
def test_the_shortest_path_takes_branches_and_loops(loads, length):
    assert shortest_path(CODE, {r"LDG\.E\.128": loads}) == length


def test_the_shortest_path_does_not_enter_subroutines():
    with pytest.raises(ValueError, match="no way"):
        shortest_path(CODE, {"MUFU": 1})
