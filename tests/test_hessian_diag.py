"""The block-averaged Hutchinson diagonal of every backend against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, MIXED, NOT_FINITE, Case, for_any_case, specs
from problem import Problem, bits, build
from tolerances import assert_within, diag_bound, unit

from adahessian_fused import reference


def check_diag(backend, problem: Problem, scale: float = 1.0, accumulate: bool = False, **options) -> None:
    """Within the rounding bounds of the float64 reference, and nothing else changed."""
    before, expected = problem.copy(), problem.copy(torch.float64)
    for ops, tensors in ((backend, problem), (reference, expected)):
        tensors.run_hessian_diag(ops, scale=scale, accumulate=accumulate, **options)
    for i, wanted in enumerate(expected.windows("diag")):
        old = accumulate * before.window("diag", i).double()
        bound = scale * diag_bound(problem, (wanted - old) / scale, i)
        bound += accumulate * unit(problem.case.state_dtype) * (wanted.abs() + bound)
        assert_within(problem.window("diag", i), wanted, bound, f"{problem.case}: diag of parameter {i}", counted=True)
    assert torch.equal(problem.outside("diag"), before.outside("diag")), f"{problem.case}: wrote outside the segments"
    assert torch.equal(bits(problem.arenas["hessian"]), bits(before.arenas["hessian"]))


@pytest.mark.cases(CASES)
def test_against_the_reference_in_float64(backend, case, device):
    check_diag(backend, build(case, device))


def test_any_layout(backend, device):
    for_any_case(backend, lambda case: check_diag(backend, build(case, device)))


@pytest.mark.parametrize("is_hvp", [True, False], ids=["Hz", "D"])
@pytest.mark.parametrize("accumulate", [True, False], ids=["add", "write"])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_options(backend, scale, accumulate, is_hvp, device):
    check_diag(backend, build(MIXED, device), scale=scale, accumulate=accumulate, is_hvp=is_hvp, sample=3)


@pytest.mark.parametrize(("block", "place", "value"), NOT_FINITE)
def test_what_is_not_finite_stays_in_its_block(backend, block, place, value, device):
    clean = build(Case("contained", specs((300,), (300,), (300,), block=block)), device)
    dirty = clean.copy()
    dirty.window("hessian", 1)[place] = value
    clean.run_hessian_diag(backend), dirty.run_hessian_diag(backend)
    differs = bits(dirty.arenas["diag"]) != bits(clean.arenas["diag"])
    assert differs.nonzero().tolist() == [[clean.begins["diag"][1] + place // block]]
    assert not dirty.window("diag", 1)[place // block].isfinite()
