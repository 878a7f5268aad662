"""What the Triton compiler makes of the kernels for sm_90: access widths, Philox's cost, spills. Needs no GPU.

The suite interprets Triton, so the kernels are compiled in a process of their own: this file, run as a program.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ARGUMENTS = {
    **dict.fromkeys(["table", "rows", "pairs", "steps", "missed"], "*i64"),
    **dict.fromkeys(["tiles", "parts", "blocks"], "*i32"),
    **dict.fromkeys(["diag", "exp_avg", "exp_hessian_diag_sq", "coefficients"], "*fp32"),
    **dict.fromkeys(["scale", "partials", "groups"], "*fp64"),
    **dict.fromkeys(["stride", "column", "accumulate", "curvature", "has_means", "sample"], "i32"),
    **dict.fromkeys(["seed_low", "seed_high", "rounding_seed_low", "rounding_seed_high"], "i32"),
}
NORM_ARGUMENTS = {
    **dict.fromkeys(["v_weight", "v_bias", "weight", "mean", "invstd", "partials", "means", "d_weight"], "*fp32"),
    **dict.fromkeys(["count", "channels", "inner", "length", "splits", "rows", "groups", "weights"], "i32"),
}
STEP, DIAG, RADEMACHER, PERTURB = "adahessian_step", "hessian_diag", "rademacher", "perturb"
NORM = "norm_double_backward"
PLANES, ROWS = {"LAST": False, "BLOCK_I": 1024, "BLOCK_C": 1}, {"LAST": True, "BLOCK_I": 32, "BLOCK_C": 32}
ROUNDED = dict.fromkeys(["exp_avg", "exp_hessian_diag_sq"], "*bf16")
# name: (module, kernel, dtype of the parameters, constexpr arguments or types of others)
CASES = {
    "step-hessian-fp32": (STEP, "adahessian_step_kernel", "fp32", {"CURVATURE": "hessian"}),
    "step-hessian-bf16": (STEP, "adahessian_step_kernel", "bf16", {"CURVATURE": "hessian"}),
    "step-shrink-fp32": (STEP, "adahessian_step_kernel", "fp32", {"CURVATURE": "hessian", "means": "*fp32"}),
    "step-none-fp32": (STEP, "adahessian_step_kernel", "fp32", {"CURVATURE": "none", "diag": None}),
    "step-hessian-fp32-rounded": (STEP, "adahessian_step_kernel", "fp32", {"CURVATURE": "hessian", **ROUNDED}),
    "step-hessian-bf16-rounded": (STEP, "adahessian_step_kernel", "bf16", {"CURVATURE": "hessian", **ROUNDED}),
    "step-none-bf16-rounded": (STEP, "adahessian_step_kernel", "bf16", {"CURVATURE": "none", "diag": None, **ROUNDED}),
    "step-none-bf16": (STEP, "adahessian_step_kernel", "bf16", {"CURVATURE": "none", "diag": None}),
    "diag-fp32": (DIAG, "hessian_diag_kernel", "fp32", {}),
    "diag-bf16": (DIAG, "hessian_diag_kernel", "bf16", {}),
    "partial-sums-fp32": (DIAG, "partial_sums_kernel", "fp32", {}),
    "partial-sums-bf16": (DIAG, "partial_sums_kernel", "bf16", {}),
    "combine": (DIAG, "combine_kernel", "fp32", {"WIDTH": 256}),
    "coefficients": ("coefficients", "coefficients_kernel", "fp32", {}),
    "rademacher-fp32": (RADEMACHER, "rademacher_kernel", "fp32", {}),
    "rademacher-bf16": (RADEMACHER, "rademacher_kernel", "bf16", {}),
    "perturb-fp32": (PERTURB, "perturb_kernel", "fp32", {"SAVE": True, "RESTORE": False}),
    "perturb-bf16": (PERTURB, "perturb_kernel", "bf16", {"SAVE": True, "RESTORE": False}),
    "batch-sums-fp32": (NORM, "batch_norm_sums_kernel", "fp32", PLANES),
    "batch-sums-channels-last-bf16": (NORM, "batch_norm_sums_kernel", "bf16", ROWS),
    "batch-gradients-fp32": (NORM, "batch_norm_gradients_kernel", "fp32", {**PLANES, "SPLITS": 32, "FIXED": False}),
    "batch-gradients-channels-last-bf16": (
        NORM,
        "batch_norm_gradients_kernel",
        "bf16",
        {**ROWS, "SPLITS": 32, "FIXED": False},
    ),
    "row-gradients-fp32": (NORM, "row_norm_gradients_kernel", "fp32", {"BLOCK": 1024}),
    "row-gradients-rms-bf16": (NORM, "row_norm_gradients_kernel", "bf16", {"BLOCK": 1024, "mean": None}),
    "row-weight-fp32": (NORM, "row_norm_weight_kernel", "fp32", ROWS),
}


def inspect_kernel(module: str, name: str, dtype: str, given: dict) -> dict:
    """Compile one kernel for sm_90 and count what the tests ask about."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from adahessian_fused.kernels.table import LAUNCH, TILES

    kernel = getattr(sys.modules[f"adahessian_fused.kernels.{module}"], name)
    tile, num_warps = TILES[{"fp32": 4, "bf16": 2}[dtype]]
    arguments = {**ARGUMENTS, "z": f"*{dtype}", "saved": f"*{dtype}"}
    if module == "norm_double_backward":
        arguments |= dict.fromkeys(["v", "grad", "x", "d_grad", "d_x"], f"*{dtype}") | NORM_ARGUMENTS
    constants = {"DTYPE": {"fp32": tl.float32, "bf16": tl.bfloat16}[dtype], "STATE": tl.float32, "DRAW": True}
    arguments |= {n: kind for n, kind in given.items() if isinstance(kind, str) and kind.startswith("*")}
    given = {n: value for n, value in given.items() if n not in arguments or value is None}
    constants |= {} if "means" in arguments else {"means": None}
    constants |= {"TILE": tile, "master": None, "grad_scale": None, "found_inf": None, **given}
    signature = {n: "constexpr" if n in constants else arguments[n] for n in kernel.arg_names}
    constants = {n: value for n, value in constants.items() if n in signature}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, **LAUNCH},
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    binary = Path(os.environ["INSPECT_DIR"]) / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    sass = subprocess.run([tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run(
        [tools / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
        "mul_hi": len(re.findall(r"mul\.(?:hi|wide)\.u32", ptx)),
        "elements_per_thread": tile // (32 * num_warps),
    }


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    pytest.importorskip("triton", reason="the package triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["INSPECT_DIR"] = str(tmp_path_factory.mktemp("cubin"))
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", CASES)
def test_nothing_spills_and_16_warps_fit(inspected: dict[str, dict], case: str) -> None:
    assert inspected[case]["spills"] == 0
    assert inspected[case]["registers"] <= 128


@pytest.mark.parametrize(
    ("case", "loads", "stores"),
    [
        # 8 elements a thread: two accesses for each fp32 stream, one for each bf16 stream
        ("step-hessian-fp32", 2 * 5, 2 * 3),  # p, g, Hz, m, v -> p, m, v
        ("step-shrink-fp32", 2 * 5, 2 * 3),
        ("step-hessian-bf16", 3 + 2 * 2, 1 + 2 * 2),
        ("step-hessian-fp32-rounded", 2 * 3 + 2, 2 + 2),
        ("step-hessian-bf16-rounded", 5, 3),
        ("step-none-bf16-rounded", 4, 2),
        ("step-none-fp32", 2 * 4, 2 * 2),  # p, g, m, v -> p, m
        ("step-none-bf16", 2 + 2 * 2, 1 + 2),
        ("diag-fp32", 2, 2),  # Hz -> Ds where b = 1
        ("diag-bf16", 1, 2),
        ("partial-sums-fp32", 2, 0),
        ("partial-sums-bf16", 1, 0),
        ("rademacher-fp32", 0, 2),
        ("rademacher-bf16", 0, 1),
        ("perturb-fp32", 2, 2 * 2),  # p -> saved, p
        ("perturb-bf16", 1, 2),
    ],
)
def test_accesses_are_128_bits_wide(inspected: dict[str, dict], case: str, loads: int, stores: int) -> None:
    assert inspected[case]["wide_loads"] >= loads
    assert inspected[case]["wide_stores"] >= stores


DRAWING = ["step-hessian-fp32", "step-hessian-bf16", "diag-fp32", "rademacher-fp32", "perturb-fp32"]


@pytest.mark.parametrize("case", DRAWING)
def test_philox_is_called_once_for_many_elements(inspected: dict[str, dict], case: str) -> None:
    # 20 multiplications a call; the code is there twice (vectors, any tile). A call an element would make it 20.
    assert inspected[case]["mul_hi"] / 2 / inspected[case]["elements_per_thread"] <= 3


if __name__ == "__main__":
    import adahessian_fused.kernels  # noqa: F401  (loads the modules that inspect_kernel looks up)

    print(json.dumps({case: inspect_kernel(*arguments) for case, arguments in CASES.items()}))
