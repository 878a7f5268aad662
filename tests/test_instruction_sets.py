"""The CPU kernels of every instruction set pass the op tests, not just those this machine would choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("adahessian_fused._C", reason="the native library is not built")
from adahessian_fused import _native

OP_TESTS = [
    Path(__file__).with_name(f"test_{op}.py")
    for op in ("rademacher", "hessian_diag", "adahessian_step", "op_properties", "rounding")
]


def run(*command: object, capability: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ADAHESSIAN_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, text=True, capture_output=True)


@pytest.mark.parametrize("name", ["avx2"])  # the C++ tests run on the baseline, the others on the best there is
def test_every_instruction_set_passes_the_op_tests(name):
    if name not in _native.build_info()["instruction_sets"]:
        pytest.skip(f"the library was not compiled for {name}")
    script = "from adahessian_fused import _native; print(_native.build_info()['instruction_set_in_use'])"
    used = run("-c", script, capability=name).stdout.strip()
    if used != name:
        pytest.skip(f"this machine has no {name}")
    # Each loop once; hundreds of tensors take their time, and their widths are those of few.
    chosen = "native and (products or reference or off_step or every_backend or threads) and not tiny"
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *OP_TESTS, capability=name)
    assert result.returncode == 0, result.stdout[-5000:]
