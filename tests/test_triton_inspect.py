"""What the Triton compiler makes of the kernels for sm_90, and of attention's for sm_80. Needs no GPU.

The suite interprets Triton, so the kernels are compiled in a process of their own: bench/triton_kernels.py.
"""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
from packaging.version import Version
from test_cuda_inspect import assert_no_more

from bench import instructions, triton_kernels
from bench.triton_kernels import CASES


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    pytest.importorskip("triton", reason="the package triton is not installed")
    return triton_kernels.compiled()


@pytest.mark.parametrize("case", [case for case in CASES if "attention" not in case])
def test_nothing_spills_and_16_warps_fit(compiled: dict[str, dict], case: str) -> None:
    spilled = 4 if case == "diag-fp32" and Version(version("triton")) < Version("3.7") else 0  # accesses
    assert compiled[case]["local"] <= spilled
    assert compiled[case]["stack"] <= 2 * spilled
    # 12 warps where a thread has 16 or, of a row, 32 elements: they have 24 and 73 KB in flight, and 26 are bandwidth
    # times latency, of which half are reads.
    several = case.startswith(("row-gradients", "diag"))
    assert compiled[case]["registers"] <= (168 if several else 128)


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
        ("diag-fp32", 4, 4),  # Hz -> Ds where b = 1; 16 elements a thread
        ("diag-bf16", 1, 2),
        ("partial-sums-fp32", 2, 0),
        ("partial-sums-bf16", 1, 0),
        ("rademacher-fp32", 0, 4),  # 16 elements a thread
        ("rademacher-bf16", 0, 2),
        ("perturb-fp32", 2, 2 * 2),  # p -> saved, p
        ("perturb-bf16", 1, 2),
        ("batch-sums-fp32", 2 * 3, 0),  # v, g, x
        ("batch-sums-channels-last-bf16", 3, 0),
        ("batch-gradients-fp32", 2 * 3, 2 * 2),
        ("row-weight-fp32", 2 * 3, 0),
        ("row-gradients-fp32", 8 * (3 + 5), 8 * 2),  # 32 elements: v, g, x, weights -> d_g, d_x
        ("row-gradients-bf16", 4 * 3 + 8 * 5, 4 * 2),
        ("row-gradients-rms-bf16", 4 * 3 + 8 * 5, 4 * 2),
    ],
)
def test_accesses_are_128_bits_wide(compiled: dict[str, dict], case: str, loads: int, stores: int) -> None:
    assert compiled[case]["wide_loads"] >= loads
    assert compiled[case]["wide_stores"] >= stores


@pytest.fixture(scope="module")
def attention(compiled: dict[str, dict]) -> dict[str, dict]:
    older = triton_kernels.compiled("--archs", "80", "--filter", "attention")
    newer = {f"sm_90 {case}": kernel for case, kernel in compiled.items()}
    return {case: kernel for case, kernel in (older | newer).items() if "attention" in case}


@pytest.mark.parametrize("case", [f"sm_{arch} {case}" for arch in (80, 90) for case in CASES if "attention" in case])
def test_products_of_attention_are_on_tensor_cores(attention: dict[str, dict], case: str) -> None:
    """And nothing is what other programs add to; some registers spill on sm_80, or with dropout."""
    found, sass = attention[case], attention[case]["code"]
    assert len(re.findall(r"\bHG?MMA", sass)) >= 30
    assert not re.findall(r"\b(?:ATOMG?|RED)\b", sass)
    on_sm_80, of_triton_36 = "sm_80" in case, Version(version("triton")) < Version("3.7")
    assert found["local"] <= 100 * on_sm_80 + (60 + 40 * (on_sm_80 and of_triton_36)) * ("dropout" in case)
    assert found["shared"] <= 96 * 1024


DRAWING = ["step-hessian-fp32", "step-hessian-bf16", "diag-fp32", "rademacher-fp32", "perturb-fp32"]


@pytest.mark.parametrize("case", DRAWING)
def test_philox_is_called_once_for_many_elements(compiled: dict[str, dict], case: str) -> None:
    # 20 multiplications a call; the code is there twice (vectors, any tile). A call an element would make it 20.
    assert compiled[case]["mul_hi"] / 2 / compiled[case]["elements_per_thread"] <= 3


def test_no_loop_has_more_instructions_than_it_had(compiled):
    assert_no_more(instructions.measure(instructions.of_triton(compiled)), "Triton")
