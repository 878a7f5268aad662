"""What the Triton compiler makes of attention's kernels, for sm_80 and sm_90. Needs no GPU.

The suite interprets Triton, so they are compiled in a process of their own: this file, run as a program.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

CASES = {
    f"{kernel}{'-dropout' * drops}-sm_{arch}": (f"attention_{kernel}_kernel", arch, drops)
    for kernel in ("queries", "keys")
    for drops in (False, True)
    for arch in (80, 90)
}


def inspect(name: str, arch: int, drops: bool) -> dict:
    """Compile one of attention's kernels, causal and for heads of 64 in bfloat16."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module("adahessian_fused.kernels.attention_double_backward")
    kernel, options = getattr(module, name), module.launch_options(64, 64, torch.bfloat16, drops)
    launch = {option: options.pop(option) for option in ("num_warps", "num_stages")}
    constants = {"CAUSAL": True, "ALIGNED": True, "PRECISION": "ieee", "bias": None, **options}
    constants |= {} if drops else {"random": None}
    tensors = ("a", "b", "c", "grad", "query", "key", "value", "d_grad", "d_query", "d_key", "d_value")
    kinds = {
        "logsumexp": "*fp32",
        "sums": "*fp32",
        "scale": "fp32",
        "kept": "fp32",
        "random": "*i64",
        **dict.fromkeys(tensors, "*bf16"),
    }
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names}
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned += [kernel.arg_names.index(argument) for argument in ("size", "value_size")]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}),
        target=GPUTarget("cuda", arch, 32),
        options=launch,
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    binary = Path(os.environ["INSPECT_DIR"]) / "attention.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    sass = subprocess.run([tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    return {
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "tensor_cores": len(re.findall(r"\bHG?MMA", sass)),
        "atomics": len(re.findall(r"\b(?:ATOMG?|RED)\b", sass)),
        "shared": compiled.metadata.shared,
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
def test_products_are_on_tensor_cores(inspected: dict[str, dict], case: str) -> None:
    """And nothing is what other programs add to; some registers spill on sm_80, or with dropout."""
    found = inspected[case]
    assert found["tensor_cores"] >= 30
    assert found["atomics"] == 0
    on_sm_80, of_triton_36 = case.endswith("sm_80"), Version(version("triton")) < Version("3.7")
    assert found["spills"] <= 100 * on_sm_80 + (60 + 40 * (on_sm_80 and of_triton_36)) * ("dropout" in case)
    assert found["shared"] <= 96 * 1024


if __name__ == "__main__":
    print(json.dumps({case: inspect(*arguments) for case, arguments in CASES.items()}))
