"""The Triton kernels compiled as they are launched, for GPUs that are not here: a process of its own prints JSON.

python -m bench.triton_kernels                       # the CASES, for sm_90
python -m bench.triton_kernels --every --archs 80,90 --jobs 8 # every variant that tests and optimizer launch; minutes

What Triton has compiled before comes from its cache, so that a run which was ended goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .sass import kernels

ROOT = Path(__file__).resolve().parent.parent
STEP, DIAG, RADEMACHER, PERTURB = "adahessian_step", "hessian_diag", "rademacher", "perturb"
NORMS = BATCH, ROW = "batch_norm_double_backward", "row_norm_double_backward"
ATTENTION = "attention_double_backward"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
LANGUAGE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
POINTERS = {
    **dict.fromkeys(["table", "rows", "pairs", "steps", "missed"], "*i64"),
    **dict.fromkeys(["tiles", "parts", "blocks"], "*i32"),
    **dict.fromkeys(["scale", "partials", "groups", "means"], "*fp64"),
    **dict.fromkeys(["master", "grad_scale", "found_inf"], "*fp32"),
}
# In the dtype of arithmetic, and in that of the parameters.
WIDE = ("diag", "exp_avg", "exp_hessian_diag_sq", "coefficients")
NORM_WIDE = ("v_weight", "v_bias", "weight", "mean", "invstd", "partials", "means", "d_weight")
NARROW = ("z", "saved", "v", "grad", "x", "d_grad", "d_x")
SIZES = ("size", "value_size")  # of attention's heads
OPTIONAL = ("master", "grad_scale", "found_inf", "means", "missed")

PLANES = {"LAST": False, "WIDE": True, "BLOCK_I": 128, "BLOCK_C": 8}
ROWS = {"LAST": True, "WIDE": True, "BLOCK_I": 32, "BLOCK_C": 32}
NARROW_PLANES, NARROW_ROWS = {**PLANES, "WIDE": False, "BLOCK_I": 1024, "BLOCK_C": 1}, {**ROWS, "WIDE": False}
ROUNDED = dict.fromkeys(["exp_avg", "exp_hessian_diag_sq"], "*bf16")
HESSIAN, NONE = {"CURVATURE": "hessian", "missed": "*i64"}, {"CURVATURE": "none", "diag": None}
MOVE = {"SAVE": True, "RESTORE": False}
# A row in registers (short, of three and four blocks), and one that is read twice.
ROW_BLOCKS = [{"HELD": n, "BLOCK": 256 * warps, "num_warps": warps} for n, warps in ((1, 1), (3, 2), (4, 4))]
ROW_BLOCKS += [{"HELD": 0, "BLOCK": 1024, "num_warps": 4}]
LAYER = {"ONE": True, "WIDE": True, "HELD": 4, "BLOCK": 256, "num_warps": 1}  # 1,024
GRADIENTS = {"SPLITS": 32, "FIXED": False}
# name: module, kernel, dtype of the parameters, and what differs: constants (None: no such tensor) or types of others
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    **{f"step-hessian-{t}": (STEP, "adahessian_step_kernel", t, HESSIAN) for t in BYTES},
    **{f"step-none-{t}": (STEP, "adahessian_step_kernel", t, NONE) for t in ("fp32", "bf16")},
    **{
        f"step-hessian-{t}-rounded": (STEP, "adahessian_step_kernel", t, {**HESSIAN, **ROUNDED})
        for t in ("fp32", "bf16", "fp16")
    },
    "step-none-bf16-rounded": (STEP, "adahessian_step_kernel", "bf16", {**NONE, **ROUNDED}),
    "step-shrink-fp32": (STEP, "adahessian_step_kernel", "fp32", {**HESSIAN, "means": "*fp64"}),
    **{f"diag-{t}": (DIAG, "hessian_diag_kernel", t, {}) for t in ("fp32", "bf16", "fp64")},
    **{f"partial-sums-{t}": (DIAG, "partial_sums_kernel", t, {}) for t in ("fp32", "bf16")},
    "combine": (DIAG, "combine_kernel", "fp32", {"WIDTH": 256}),
    "coefficients": ("coefficients", "coefficients_kernel", "fp32", {}),
    **{f"rademacher-{t}": (RADEMACHER, "rademacher_kernel", t, {}) for t in ("fp32", "bf16")},
    **{f"perturb-{t}": (PERTURB, "perturb_kernel", t, MOVE) for t in ("fp32", "bf16", "fp64")},
    "batch-sums-fp32": (BATCH, "batch_norm_sums_kernel", "fp32", PLANES),
    "batch-sums-channels-last-bf16": (BATCH, "batch_norm_sums_kernel", "bf16", ROWS),
    "batch-gradients-fp32": (BATCH, "batch_norm_gradients_kernel", "fp32", {**PLANES, **GRADIENTS}),
    "batch-gradients-channels-last-bf16": (BATCH, "batch_norm_gradients_kernel", "bf16", {**ROWS, **GRADIENTS}),
    "row-gradients-fp32": (ROW, "row_norm_gradients_kernel", "fp32", LAYER),
    "row-gradients-bf16": (ROW, "row_norm_gradients_kernel", "bf16", LAYER),
    "row-gradients-rms-bf16": (ROW, "row_norm_gradients_kernel", "bf16", {**LAYER, "mean": None}),
    "row-gradients-4096-bf16": (
        ROW,
        "row_norm_gradients_kernel",
        "bf16",
        {"ONE": True, "WIDE": True, **ROW_BLOCKS[2]},
    ),
    "row-gradients-group-bf16": (
        ROW,
        "row_norm_gradients_kernel",
        "bf16",
        {"ONE": False, "WIDE": True, **ROW_BLOCKS[3]},
    ),
    "row-weight-fp32": (ROW, "row_norm_weight_kernel", "fp32", {**ROWS, "ONE": True}),
    **{
        f"attention-{part}{'-dropout' * drops}": (ATTENTION, f"attention_{part}_kernel", "bf16", {"DROPS": drops})
        for part in ("queries", "keys")
        for drops in (False, True)
    },
}


def every() -> dict[str, tuple[str, str, str, dict[str, Any]]]:
    """Every variant that the optimizer and the tests launch."""
    found = {}

    def add(module: str, kernel: str, dtype: str, **given: Any) -> None:
        named = ",".join(f"{k}={v}" for k, v in given.items())
        found[f"{kernel.removesuffix('_kernel')}-{dtype}-{named}"] = (module, kernel, dtype, given)

    for dtype in BYTES:
        states = [{}, *([] if dtype == "fp64" else [ROUNDED])]
        masters = [{}] if dtype in ("fp32", "fp64") else [{}, {"master": "*fp32"}]
        scalers = [{}, {"grad_scale": "*fp32", "found_inf": "*fp32"}, {"found_inf": "*fp32"}]
        counts = [{"missed": "*i64"}, {"missed": "*i64", "means": "*fp64"}]
        kinds = [{"CURVATURE": "hessian"}, {"CURVATURE": "hessian", "IS_HVP": False}, {"CURVATURE": "compact"}, NONE]
        for kind, state, master, scaler, count in itertools.product(kinds, states, masters, scalers, counts):
            add(STEP, "adahessian_step_kernel", dtype, **kind, **state, **master, **scaler, **count)
        for draw in (True, False):
            add(DIAG, "hessian_diag_kernel", dtype, IS_HVP=draw)
            add(DIAG, "partial_sums_kernel", dtype, IS_HVP=draw)
        add(DIAG, "combine_kernel", dtype, WIDTH=256)
        add("coefficients", "coefficients_kernel", dtype)
        add(RADEMACHER, "rademacher_kernel", dtype)
        for save, restore in itertools.product((True, False), repeat=2):
            add(PERTURB, "perturb_kernel", dtype, SAVE=save, RESTORE=restore)
        for given in (PLANES, ROWS, NARROW_PLANES, NARROW_ROWS):
            add(BATCH, "batch_norm_sums_kernel", dtype, **given)
            add(BATCH, "batch_norm_gradients_kernel", dtype, **given, **GRADIENTS)
            add(BATCH, "batch_norm_gradients_kernel", dtype, **given, SPLITS=1, FIXED=True, weight=None)
            for one, without in itertools.product((True, False), ({}, {"mean": None})):
                add(ROW, "row_norm_weight_kernel", dtype, **given, ONE=one, **without)
        for without in ({}, {"mean": None, "v_bias": None}, {"v_weight": None, "v_bias": None, "weight": None}):
            for one, wide, blocks in itertools.product((True, False), (True, False), ROW_BLOCKS):
                if not blocks["HELD"] or (one and dtype != "fp64"):
                    add(ROW, "row_norm_gradients_kernel", dtype, ONE=one, WIDE=wide, **blocks, **without)
    return found


def attention(drops: bool) -> tuple[dict[str, Any], dict[str, str], dict[str, int]]:
    """Constants, types and options of attention's kernels: causal, for aligned heads of 64 in bfloat16."""
    import torch

    from adahessian_fused.kernels.attention_double_backward import launch_options

    given = launch_options(64, 64, torch.bfloat16, drops)
    options = {option: given.pop(option) for option in ("num_warps", "num_stages")}
    constants = {"CAUSAL": True, "ALIGNED": True, "PRECISION": "ieee", "bias": None, **given}
    tensors = ["a", "b", "c", "grad", "query", "key", "value", "d_grad", "d_query", "d_key", "d_value"]
    types = {"logsumexp": "*fp32", "sums": "*fp32", "scale": "fp32", "kept": "fp32", "random": "*i64"}
    return constants | ({} if drops else {"random": None}), types | dict.fromkeys(tensors, "*bf16"), options


def compile_case(module: str, name: str, dtype: str, given: dict[str, Any], arch: int = 90) -> dict[str, Any]:
    """Return a kernel's :class:`.sass.Kernel`, and how many multiplications its PTX has, as a dictionary."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from adahessian_fused.kernels.hessian_diag import diag_tile
    from adahessian_fused.kernels.table import FUSION, LAUNCH, TILES, double_tile

    kernel = getattr(importlib.import_module(f"adahessian_fused.kernels.{module}"), name)
    tile, num_warps = TILES[BYTES[dtype]]
    num_warps = 1 if name in ("combine_kernel", "coefficients_kernel") else given.get("num_warps", num_warps)
    options = {"num_warps": num_warps, **(FUSION if module in NORMS else LAUNCH)}
    if name == "hessian_diag_kernel":
        tile, options = diag_tile(BYTES[dtype])
    elif module == RADEMACHER:
        tile, options = double_tile(BYTES[dtype])
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    numbers = NORM_WIDE if module in NORMS else WIDE
    types = ({} if module in NORMS else POINTERS) | dict.fromkeys(numbers, wide) | dict.fromkeys(NARROW, f"*{dtype}")
    pointers = {n: kind for n, kind in given.items() if isinstance(kind, str) and kind.startswith("*")}
    types |= pointers
    constants = {"DTYPE": getattr(tl, LANGUAGE[dtype]), "STATE": tl.float64 if dtype == "fp64" else tl.float32}
    constants |= {"IS_HVP": True, "TILE": tile} | ({} if module in NORMS else dict.fromkeys(OPTIONAL)) | given
    if module == ATTENTION:
        constants, types, options = attention(given["DROPS"])
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names and n not in pointers}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = [
        i for i, n in enumerate(kernel.arg_names) if module == ATTENTION and (types.get(n, "")[:1] == "*" or n in SIZES)
    ]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, GPUTarget("cuda", arch, 32), options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        (found,) = kernels(binary, f"sm_{arch}").values()
    ptx = compiled.asm["ptx"]
    return asdict(found) | {
        "mul_hi": len(re.findall(r"mul\.(?:hi|wide)\.u32", ptx)),
        "elements_per_thread": tile // (32 * options["num_warps"]),
        "shared": compiled.metadata.shared,
    }


def compiled(*arguments: str) -> dict[str, dict[str, Any]]:
    """Return what this module prints, run as a program of its own: this process may interpret Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # From another folder than the sources', where an installed package would not be found before them.
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, sys.path), str(ROOT)])
    command, elsewhere = [sys.executable, "-m", __spec__.name, *arguments], tempfile.gettempdir()
    run = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout)


def attempt(task: tuple[int, str]) -> dict[str, Any]:
    """One of :func:`every` for an architecture, without its disassembly; or why it does not compile."""
    arch, case = task
    try:
        return {key: value for key, value in compile_case(*every()[case], arch).items() if key != "code"}
    except Exception as error:  # whatever a compiler says
        return {"failed": f"{type(error).__name__}: {str(error)[-500:]}"}


def all_variants(archs: list[int], jobs: int, having: str = "") -> dict[str, dict[str, Any]]:
    """Compile every variant with ``having`` in its name; each is told on stderr when it is done."""
    tasks = [(arch, case) for arch in archs for case in every() if having in case]
    found = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for (arch, case), kernel in zip(tasks, pool.map(attempt, tasks), strict=True):
            found[f"sm_{arch} {case}"] = kernel
            what = kernel.get("failed") or f"{kernel['registers']} registers, {kernel['local']} spilling accesses"
            print(f"{len(found)} of {len(tasks)}, sm_{arch} {case}: {what}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Compile and print; 1 if anything does not compile."""
    parser = argparse.ArgumentParser(prog="python -m bench.triton_kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--every", action="store_true", help="every variant; numbers without the disassembly")
    parser.add_argument("--archs", default="90", metavar="80,90")
    parser.add_argument("--jobs", type=int, default=1, help="processes, with --every")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases or variants with this in their names")
    args = parser.parse_args()
    archs = [*map(int, args.archs.split(","))]
    if args.every:
        found = all_variants(archs, args.jobs, args.filter)
    else:
        found = {
            case if args.archs == "90" else f"sm_{arch} {case}": compile_case(*variant, arch)
            for arch in archs
            for case, variant in CASES.items()
            if args.filter in case
        }
    print(json.dumps(found))
    return int(any("failed" in kernel for kernel in found.values()))


if __name__ == "__main__":
    sys.exit(main())
