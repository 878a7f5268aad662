"""m and v in bfloat16: rounded up or down by chance, without bias, by the same random bits in every backend.

That a step stays within an ulp of the reference in float64, whatever the layout, is in test_adahessian_step.py.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cases import MIXED_STEPS, PLAIN, ROUNDED_CASES, Case, specs
from fuzz.oracle import philox
from problem import bits, build

from adahessian_fused import reference
from adahessian_fused.segments import Hyper

MOMENTS = ("exp_avg", "exp_hessian_diag_sq")
# With these betas nothing is rounded before the states are.
EXACT_GROUPS = ((0.15, 0.5, 0.75, 1e-4, 0.0, 1.0, 0, *PLAIN),)
LARGEST = torch.finfo(torch.bfloat16).max
INF, NAN = torch.inf, torch.nan


def exact(case: Case, device: str):
    """Tensors whose m and v float32 holds exactly: every backend has the same numbers to round, with 16 more bits."""
    problem = build(dataclasses.replace(case, groups=EXACT_GROUPS, steps=MIXED_STEPS), device)
    random = torch.Generator().manual_seed(len(case.name))

    def fill(kind: str, low: int, high: int, unit: float) -> None:
        for window in problem.windows(kind):
            window.copy_(torch.randint(low, high, window.shape, generator=random) * unit)

    fill("grad", -255, 256, 2.0**-19)
    fill("diag", -511, 512, 2.0**-6)
    fill("exp_avg", -128, 129, 2.0**-3)
    fill("exp_hessian_diag_sq", 0, 129, 2.0**-3)
    return problem


@pytest.mark.cases(ROUNDED_CASES)
@pytest.mark.parametrize("curvature", ["diag", "none"])
def test_every_backend_rounds_by_the_same_bits(backend, case, curvature, device):
    problem, expected = exact(case, device), exact(case, device)
    problem.run_step(backend, curvature), expected.run_step(reference, curvature)
    for kind in MOMENTS:
        assert torch.equal(bits(problem.arenas[kind]), bits(expected.arenas[kind])), kind


# ---- the bits --------------------------------------------------------------------------------------------------------


def drawn(n=2**16, param_id=3, step=5, seed=11):
    return reference.rounding_bits(n, param_id, torch.tensor(step), seed)


def test_the_known_answer():
    """The authors' own (kat_vectors of Random123)."""
    assert philox((0,) * 4, 0, rounds=7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize(("param_id", "step", "seed"), [(0, 1, 0), (3, 2**33 + 5, 0x1234_5678_9ABC_DEF0), (7, 9, -1)])
def test_which_bits_an_element_gets(param_id, step, seed):
    found = drawn(29, param_id, step, seed).tolist()
    for element, b in enumerate(found):
        counter = element // 8, param_id, step & 0xFFFFFFFF, 0xFFFFFFFF
        words = philox(counter, seed, rounds=7)
        assert b == words[element % 8 // 2] >> 16 * (element % 2) & 0xFFFF


def correlation(a, b) -> float:
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item() * a.numel() ** 0.5  # in deviations


@pytest.mark.parametrize("other", [{"step": 6}, {"param_id": 4}, {"seed": 12}, {"seed": 11 + 2**32}], ids=str)
def test_the_bits_of_other_steps_parameters_and_seeds_are_others(other):
    assert abs(correlation(drawn(), drawn(**other))) < 5


def test_the_bits_are_independent_of_the_probe():
    """The probe of the same parameter, step and seed; against each of the 16 bits."""
    z = reference.rademacher_signs(2**16, 3, torch.tensor(5), 11, 0)
    assert all(abs(correlation(drawn() >> bit & 1, z)) < 5 for bit in range(16))


@pytest.mark.parametrize("chances", [*itertools.product((0.1, 0.5, 0.8), repeat=2)], ids=str)
def test_m_and_v_round_nearly_independently(chances):
    """The chance that both are rounded up is the product of their chances, but for ties of a byte."""
    b = drawn()
    up = [bits_ / 2**16 < chance for bits_, chance in zip((b, reference.swap_bytes(b)), chances, strict=True)]
    both, expected = (up[0] & up[1]).double().mean().item(), chances[0] * chances[1]
    assert abs(both - expected) < 2**-8 + 5 * (expected * (1 - expected) / b.numel()) ** 0.5


# ---- the rounding ----------------------------------------------------------------------------------------------------


def test_the_mean_over_all_bits_is_exact():
    random = torch.Generator().manual_seed(1)
    scale = 2.0 ** torch.randint(-140, 127, (200, 1), generator=random)
    x = (torch.randn(200, 1, generator=random).clamp(-1.9, 1.9) * scale).float()
    every = torch.arange(2**16)
    for order in (every, reference.swap_bytes(every)):
        rounded = reference.round_stochastically(x.expand(-1, 2**16).contiguous(), order)
        assert torch.equal(rounded.double().mean(1, keepdim=True), x.double())


def test_the_mean_over_elements_and_seeds_is_exact(backend, device):
    """In deviations of what chance allows, for numbers in each eighth of the way between two bfloat16."""
    case, seeds = Case("mean", specs((4096,)), stored=torch.bfloat16, steps=((9, 3),)), 4
    start = exact(case, device)
    for kind in MOMENTS:  # of one sign: a bias towards zero must not cancel
        start.window(kind, 0).abs_().clamp_min_(1)
    start.window("diag", 0).mul_(0.5)
    expected = start.copy(torch.float64)
    expected.run_step(reference, "diag")
    for kind in MOMENTS:
        x = expected.window(kind, 0)
        ulp = 2.0 ** (x.log2().floor() - 7)
        fraction, errors = x / ulp % 1, torch.zeros_like(x)
        for seed in range(seeds):
            problem = start.copy()
            problem.run_step(backend, "diag", rounding_seed=seed)
            errors += (problem.window(kind, 0).double() - x) / ulp
        for eighth in range(8):
            chosen = (fraction * 8).long() == eighth
            deviation = (seeds * fraction * (1 - fraction))[chosen].sum().sqrt()
            assert errors[chosen].sum().abs() < 5 * deviation + 1e-9, f"{kind}, {eighth} eighths"


NOT_FINITE = ((INF, INF), (-INF, -INF), (NAN, NAN), (3.4e38, LARGEST), (-3.4e38, -LARGEST), (LARGEST, LARGEST), (0, 0))


def test_infinities_and_nans_stay_and_large_numbers_stay_finite(backend, device):
    case = Case("not_finite", specs((len(NOT_FINITE) + 30,)), stored=torch.bfloat16)
    found, (m, v) = build(case, device), MOMENTS
    found.groups[:, [Hyper.BETA1, Hyper.BETA2]] = 0.0
    given, expected = (torch.tensor(values) for values in zip(*NOT_FINITE, strict=True))
    found.window("grad", 0)[: len(given)] = given
    found.window("diag", 0)[: len(given)] = given.abs().sqrt()  # up to rounding: 3.4e38 is far from both ends
    found.window(v, 0)[: len(given)] = torch.where(given.isfinite(), 1.0, given.abs())  # D that is not finite keeps v
    found.run_step(backend, "diag")
    for kind, wanted in ((m, expected), (v, expected.abs())):
        torch.testing.assert_close(
            found.window(kind, 0)[: len(given)].cpu().float(), wanted, rtol=0, atol=0, equal_nan=True
        )
        assert found.window(kind, 0)[len(given) :].isfinite().all()
