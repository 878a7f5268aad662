"""Instructions, bytes and registers of the hot loops of the GPU kernels, from their disassembly. Needs no GPU.

    python -m bench.instructions  # writes bench/results/sass/sm_90.json

A small model of the machine says what share of a copy's speed to expect: a loop takes the time of its bytes and that of
its instructions, which overlap in part.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import display, triton_kernels
from .sass import CUDA, Kernel, built, compile_cuda, loops, shortest_path

DTYPES = {"f": "float32", "d": "float64", "N8bfloat16": "bfloat16", "N7float16": "float16"}
BODIES = {"RademacherBody": "rademacher", "PerturbBody": "perturb"}
BODIES |= {"HessianDiagBody": "hessian_diag", "StepBody": "adahessian_step", "ConstantsBody": "constants"}
SOURCES = ("rademacher", "perturb", "hessian_diag", "adahessian_step", "adahessian_step_float32", "adahessian_step_16")
ORDERS = {"0": "flat", "1": "logical", "2": "any", None: "any"}
ROUNDED = " rounded"  # behind the dtype of parameters whose states are in bfloat16
RESULTS = Path(__file__).parent / "results" / "sass" / "sm_90.json"


class Loop(NamedTuple):
    """What is done for each element, for as many elements as there are.

    Attributes:
        kernel: its name.
        bytes: that are read and written for an element.
        elements: of a thread on the way through ``required``, or in one round of the kernel's loops.
        required: what the way has to execute, see :func:`.sass.shortest_path`; None: the kernel's loops are added up.
        drawing: the share of the warps that draw the probe for all.
    """

    kernel: str
    bytes: int
    elements: int
    required: dict[str, int] | None
    drawing: float = 0.0


def _way(loads: int, stores: int, **others: int) -> dict[str, int]:
    wide = {r"LDG\.E\.(\w+\.)*128": loads, r"STG\.E\.(\w+\.)*128": stores}
    return {pattern: n for pattern, n in {**wide, **others}.items() if n}


# Hz, g, m, v, p; m, v, p; a square, a square root and a reciprocal for each of 8 elements.
SQUARE = r"[FD]MUL R\d+, (R\d+)(\.reuse)?, \1\b"
EACH = {"MUFU": 16, SQUARE: 8}
STEP, STEP_16 = _way(10, 6, **EACH), _way(5, 3, **EACH)
# Four barriers: Hz and the probe, D in its place, and the blocks' means; a thread sums a block and reads two means for
# each of its two vectors.
MEANS = {"BAR": 4, "STS": 8, r"LDS R\d+, \[R\d+\+0x27[0-9a-f]\]": 9 + 2 * 2}
PHILOX = {r"IMAD\.(WIDE|HI)\.U32": 18}  # ten rounds, of which the first or last may do with one
WARP = 1 / 8  # a Philox call is 128 signs: 16 threads draw for 2,048 elements, 64 for 8,192
LOOPS = {
    "step fp32 b=1, CUDA": Loop("adahessian_step-float32-flat", 32, 8, STEP),
    "step fp32 b=9, CUDA": Loop("adahessian_step-float32-logical", 32, 8, {**STEP, **MEANS}),
    "step bf16 everything b=1, CUDA": Loop("adahessian_step rounded-bfloat16-flat", 16, 8, STEP_16),
    "rademacher fp32, CUDA": Loop("rademacher-float32-flat", 4, 32, _way(0, 8), 2 * WARP),
    "rademacher bf16, CUDA": Loop("rademacher-bfloat16-flat", 2, 32, _way(0, 4), 2 * WARP),
    "perturb fp32, CUDA": Loop("perturb-float32-flat", 12, 8, _way(2, 4), WARP),
    "step fp32 b=1, Triton": Loop("step-hessian-fp32", 32, 8, STEP),
    "step bf16 everything b=1, Triton": Loop("step-hessian-bf16-rounded", 16, 8, STEP_16),
    "rademacher fp32, Triton": Loop("rademacher-fp32", 4, 16, {**_way(0, 4), **PHILOX}),
    "rademacher bf16, Triton": Loop("rademacher-bf16", 2, 16, {**_way(0, 2), **PHILOX}),
    "perturb fp32, Triton": Loop("perturb-fp32", 12, 8, {**_way(2, 4), **PHILOX}),
    "hessian_diag fp32 b=1, Triton": Loop("diag-fp32", 8, 16, {**_way(4, 4), **PHILOX}),
    "batch norm sums fp32, Triton": Loop("batch-sums-fp32", 12, 8, None),
    "batch norm sums bf16 channels_last, Triton": Loop("batch-sums-channels-last-bf16", 6, 8, None),
    "batch norm gradients fp32, Triton": Loop("batch-gradients-fp32", 20, 8, None),
    "batch norm gradients bf16 channels_last, Triton": Loop("batch-gradients-channels-last-bf16", 10, 8, None),
    # v, g and x, three vectors of weights, two of them once more; a row of 1,024.
    "layer norm fp32, Triton": Loop("row-gradients-fp32", 20, 32, _way(64, 16)),
    "layer norm bf16, Triton": Loop("row-gradients-bf16", 10, 32, _way(52, 8)),
}

# ---- the machine -----------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """A GPU in five numbers; those of an H200, from its data sheet but for what a copy reaches and the two times."""

    bandwidth: float = 0.9 * 4.8e12  # bytes a second, of a copy
    slots: float = 132 * 128 * 1.755e9  # instructions of threads a second
    used: float = 0.75  # of the slots, with dependences and barriers
    launch: float = 2.5e-6  # seconds from one kernel to the next
    call: float = 30e-6  # seconds of host time of a step, for one bucket

    def seconds(self, instructions: float, size: float) -> float:
        """Time of an element: partly one behind the other, partly at once."""
        return math.hypot(size / self.bandwidth, instructions / (self.used * self.slots))

    def share_of_copy(self, instructions: float, size: float) -> float:
        """Speed over that of a copy of the same bytes."""
        return size / self.bandwidth / self.seconds(instructions, size)


H200 = Machine()


def predicted(result: Mapping[str, Any], backend: str, table: Mapping[str, Any], machine: Machine = H200) -> float:
    """Seconds of a step in one of the cases of the suites, by the table of instructions.

    Args:
        result: what ``bench.run`` says of the case.
        backend: "native" or "triton".
        table: by loop, as :func:`measure` makes it.
        machine: the GPU.
    """
    size = result["bytes"] / result["numel"]
    kind = "bf16 everything b=1" if size <= 16 and result["curvature"] else "fp32 b=1"
    where = {"native": "CUDA", "triton": "Triton"}[backend]
    if backend == "native" and kind == "fp32 b=1" and result["block"] not in (1, "row", "tensor"):
        kind = "fp32 b=9"
    instructions = table[f"step {kind}, {where}"]["instructions"] * (1 if result["curvature"] else 0.75)
    launches = next((t["launches"] for t in result["seconds"].values() if t.get("launches")), 1)
    on_device = launches * machine.launch + result["numel"] * machine.seconds(instructions, size)
    # A step is prepared while the one before it runs: addresses and strides of each tensor are looked at.
    return max(on_device, machine.call * launches + 1.5e-6 * result["tensors"])


# ---- measuring -------------------------------------------------------------------------------------------------------


def kernel_name(mangled: str) -> str:
    """Return a body's op, dtype and order, like ``adahessian_step-float32-flat``; other kernels keep their name."""
    names, types = "|".join(BODIES), "f|d|NS_8bfloat16E|NS_7float16E"
    body = re.search(rf"({names})I({types})({types}|S\d*_)?(?:LNS0_5OrderE(\d))?", mangled)
    if body is None:
        return mangled
    dtype = DTYPES[body[2].replace("S_", "").removesuffix("E")]
    # The states' type: spelled out, or, where the parameters are bfloat16 too, a reference back to them.
    rounded = ROUNDED if body[3] and body[3] not in ("f", "d") else ""
    return f"{BODIES[body[1]]}{rounded}-{dtype}-{ORDERS[body[4]]}"


def cuda_kernels(folder: Path, arch: str = "sm_90") -> dict[str, Kernel]:
    """Return the kernels of all CUDA files, by their names; compiled where the library has none of them."""
    found = built(arch)
    for op in SOURCES if not found else ():
        found |= compile_cuda(CUDA / f"{op}.cu", folder, arch)
    return {kernel_name(name): kernel for name, kernel in found.items()}


def of_triton(compiled: Mapping[str, Mapping[str, Any]]) -> dict[str, Kernel]:
    """Return the Triton kernels, from what :func:`.triton_kernels.compiled` returns."""
    fields = Kernel.__dataclass_fields__
    return {name: Kernel(**{k: v for k, v in facts.items() if k in fields}) for name, facts in compiled.items()}


def measure(kernels: Mapping[str, Kernel]) -> dict[str, dict[str, Any]]:
    """Return a row for each of the loops whose kernel is there."""
    table = {}
    for name, loop in LOOPS.items():
        if loop.kernel not in kernels:
            continue
        kernel = kernels[loop.kernel]
        if loop.required is None:
            count = sum(map(len, loops(kernel.code)))
        else:
            count = shortest_path(kernel.code, loop.required)
            if loop.drawing:
                count += loop.drawing * (shortest_path(kernel.code, {**loop.required, **PHILOX}) - count)
        instructions = count / loop.elements
        table[name] = {
            "instructions": round(instructions, 1),
            "bytes": loop.bytes,
            "registers": kernel.registers,
            "spills": kernel.local,
            "wide_loads": kernel.wide_loads,
            "wide_stores": kernel.wide_stores,
            "of_copy": round(H200.share_of_copy(instructions, loop.bytes), 2),
        }
    return table


def compilers() -> dict[str, str]:
    """Return what the instructions depend on: the versions of nvcc and Triton."""
    import triton

    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return {"CUDA": re.search(r"release (\d+\.\d+)", nvcc)[1], "Triton": triton.__version__}


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        table = measure(cuda_kernels(Path(folder)) | of_triton(triton_kernels.compiled()))
    args.out.write_text(json.dumps({"compilers": compilers(), "arch": "sm_90", "loops": table}, indent=1) + "\n")
    header = ["loop, sm_90", "instructions", "bytes", "registers", "spills", "128-bit loads, stores", "of a copy, H200"]
    rows = [
        [
            *(name, f"{row['instructions']:.1f}", str(row["bytes"]), str(row["registers"]), str(row["spills"])),
            *(f"{row['wide_loads']}, {row['wide_stores']}", f"{row['of_copy']:.0%}"),
        ]
        for name, row in table.items()
    ]
    display.table("Instructions and bytes an element", header, rows)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
