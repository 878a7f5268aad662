"""Moving the parameters along the probe: bit-identical on every backend, and exactly undone."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, MIXED, SMALL_CASES, Case, for_any_case, specs
from problem import bits, build

from adahessian_fused import reference

SCALES = {"up": 2.0**-5, "down": -0.1, "back": 0.0}


def check(backend, case: Case, device: str, **options) -> None:
    """There, to the other side and back: the reference's bits each time, and nothing written beside it."""
    found, expected = build(case, device), build(case, device)
    start = bits(found.arenas["param"]).clone()
    for name, scale in SCALES.items():
        found.run_perturb(backend, scale=scale, save=name == "up", **options)
        expected.run_perturb(reference, scale=scale, save=name == "up", **options)
        for arena in ("param", "saved"):
            same = torch.equal(bits(found.arenas[arena]), bits(expected.arenas[arena]))
            assert same, f"{case}: {arena} differs after the move {name}"
    assert torch.equal(bits(found.arenas["param"]), start), f"{case}: not put back"


@pytest.mark.cases(SMALL_CASES)
def test_moves_and_returns_like_the_reference(backend, case, device):
    check(backend, case, device)


def test_moves_by_the_probe(backend, device):
    problem = build(MIXED, device)
    before = [p.clone() for p in problem.windows("param")]
    problem.run_rademacher(reference)
    problem.run_perturb(backend)
    for p, old, z in zip(problem.windows("param"), before, problem.windows("z"), strict=True):
        assert torch.equal(p, old + 0.25 * z)


@pytest.mark.parametrize("word", [1, 2**32 - 1])
@pytest.mark.parametrize("seed", [0, 1 << 32, -1])
def test_every_bit_of_seed_and_sample(backend, seed, word, device):
    check(backend, MIXED, device, seed=seed, sample=word)


SPECIAL = (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_return_bit_for_bit(backend, dtype, device):
    problem = build(Case("special", specs((len(SPECIAL),), (129,)), dtype), device)
    problem.window("param", 0).copy_(torch.tensor(SPECIAL))
    start = bits(problem.arenas["param"]).clone()
    problem.run_perturb(backend, scale=2.0**-8)
    assert not torch.equal(bits(problem.arenas["param"]), start)
    problem.run_perturb(backend, scale=0.0, save=False)
    assert torch.equal(bits(problem.arenas["param"]), start)


def test_any_layout(backend, device):
    for_any_case(backend, lambda case: check(backend, case, device))
