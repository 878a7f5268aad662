"""The block-averaged Hutchinson diagonal of every backend against the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import CASES, NOT_FINITE, Case, Spec, any_case, examples, specs
from hypothesis import given, settings
from problem import Problem, bits, build
from tolerances import assert_within, diag_bound, unit

from adahessian_fused import reference
from adahessian_fused.reference import to_logical

MIXED = Case(
    "mixed", (Spec((300,), 7), Spec((0,)), Spec((7, 40), "row", True), Spec((6, 5, 3, 3), 9, order="channels_last"))
)
ODD = dataclasses.replace(MIXED, name="mixed_gaussian", gaussian=True)


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
    @settings(max_examples=examples(backend), deadline=None, derandomize=True, database=None)
    @given(any_case())
    def check(case: Case) -> None:
        check_diag(backend, build(case, device))

    check()


@pytest.mark.parametrize("is_hvp", [True, False], ids=["Hz", "D"])
@pytest.mark.parametrize("accumulate", [True, False], ids=["add", "write"])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_options(backend, scale, accumulate, is_hvp, device):
    check_diag(backend, build(MIXED, device), scale=scale, accumulate=accumulate, is_hvp=is_hvp, sample=3)


def test_without_drawing_it_is_the_mean_of_the_input(backend, device):
    problem = build(Case("draw_off", specs((4, 6), block="row")), device)
    problem.run_hessian_diag(backend, is_hvp=False)
    wanted = problem.tensors("hessian")[0].double().mean(1)
    assert_within(problem.window("diag", 0), wanted, diag_bound(problem, wanted, 0), "mean", counted=True)


def test_the_mean_of_several_samples(backend, device):
    problem, expected = build(ODD, device), build(ODD, device).copy(torch.float64)
    for sample in range(3):
        for ops, tensors in ((backend, problem), (reference, expected)):
            tensors.run_hessian_diag(ops, scale=1 / 3, sample=sample, accumulate=sample > 0)
    for i, wanted in enumerate(expected.windows("diag")):
        largest = problem.window("hessian", i).double().abs().max() if wanted.numel() else 0.0
        bound = diag_bound(problem, torch.full_like(wanted, largest), i) + 3 * unit(torch.float32) * largest
        assert_within(problem.window("diag", i), wanted, bound, f"parameter {i}", counted=True)


def test_a_diagonal_hessian_gives_its_diagonal_bit_for_bit(backend, device):
    shapes = (Spec((300,)), Spec((0, 2)), Spec((7, 40), order="transposed"), Spec((6, 5, 3, 3), order="channels_last"))
    problem = build(Case("diagonal", shapes, gaussian=True), device)
    diagonals = [w.clone() for w in problem.windows("hessian")]
    problem.run_rademacher(backend, sample=4)
    for hz, z in zip(problem.windows("hessian"), problem.windows("z"), strict=True):
        hz.mul_(z)
    problem.run_hessian_diag(backend, sample=4)
    for i, (spec, diagonal) in enumerate(zip(shapes, diagonals, strict=True)):
        assert torch.equal(problem.window("diag", i), to_logical(diagonal, *spec.period_and_stride())), spec


@pytest.mark.parametrize(("block", "place", "value"), NOT_FINITE)
def test_what_is_not_finite_stays_in_its_block(backend, block, place, value, device):
    clean = build(Case("contained", specs((300,), (300,), (300,), block=block)), device)
    dirty = clean.copy()
    dirty.window("hessian", 1)[place] = value
    clean.run_hessian_diag(backend), dirty.run_hessian_diag(backend)
    differs = bits(dirty.arenas["diag"]) != bits(clean.arenas["diag"])
    assert differs.nonzero().tolist() == [[clean.begins["diag"][1] + place // block]]
    assert not dirty.window("diag", 1)[place // block].isfinite()
