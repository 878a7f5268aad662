"""The probe: bit-identical on every backend; a function of seed, step, sample, parameter and element alone."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, DTYPES, MIXED, Case, Spec, for_any_case
from problem import Problem, bits, build

from adahessian_fused import reference
from adahessian_fused.segments import Segment, Steps

EDGE_WORDS = {"zero": 0, "one": 1, "top_bit": 2**31, "all_bits": 2**32 - 1}
EDGE_SEEDS = {"zero": 0, "high_word_only": 1 << 32, "largest": 2**63 - 1, "smallest": -(2**63), "all_bits": -1}


def check_z(backend, problem: Problem, **options) -> None:
    """Equal to the reference's, and nothing written beside it."""
    expected = problem.copy(torch.float64)
    before = problem.outside("z")
    problem.run_rademacher(backend, **options)
    expected.run_rademacher(reference, **options)
    for i, (z, wanted) in enumerate(zip(problem.windows("z"), expected.windows("z"), strict=True)):
        assert torch.equal(z.double(), wanted), f"{problem.case} parameter {i}"
    assert torch.equal(problem.outside("z"), before), f"{problem.case}: wrote outside the segments"


@pytest.mark.cases(CASES)
def test_z_is_the_reference_s(backend, case, device):
    check_z(backend, build(case, device))


@pytest.mark.parametrize("row", [4097, 5000, 8191, 8193])
def test_stored_transposed_with_rows_about_as_long_as_a_tile(backend, row, device):
    check_z(backend, build(Case("rows", (Spec((7, row), order="transposed"),)), device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_z_in_every_dtype(backend, dtype, device):
    problem = build(MIXED, device)
    problem.arenas["z"] = problem.arenas["z"].to(dtype)
    check_z(backend, problem)


@pytest.mark.parametrize("seed", EDGE_SEEDS.values(), ids=EDGE_SEEDS)
def test_all_64_bits_of_the_seed(backend, seed, device):
    check_z(backend, build(MIXED, device), seed=seed)


@pytest.mark.parametrize("word", EDGE_WORDS.values(), ids=EDGE_WORDS)
@pytest.mark.parametrize("place", ["param_id", "hessian_step", "sample"])
def test_all_32_bits_of_the_counter_s_words(backend, place, word, device):
    problem = build(MIXED, device)
    if place == "param_id":
        problem.segments[:, Segment.PARAM_ID] = word
    if place == "hessian_step":
        problem.steps[:, Steps.HESSIAN_STEP] = word
    check_z(backend, problem, sample=word if place == "sample" else 0)


def test_hessian_step_beyond_32_bits_wraps(backend, device):
    problem, small = build(MIXED, device), build(MIXED, device)
    small.steps[:, Steps.HESSIAN_STEP] = 5
    problem.steps[:, Steps.HESSIAN_STEP] = 2**32 + 5
    problem.run_rademacher(backend), small.run_rademacher(backend)
    assert torch.equal(bits(problem.arenas["z"]), bits(small.arenas["z"]))


def test_any_layout(backend, device):
    for_any_case(backend, lambda case: check_z(backend, build(case, device)))
