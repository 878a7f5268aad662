"""One fused step of every backend against the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import CASES, MIXED, NOT_FINITE, ROUNDED_CASES, SMALL_CASES, Case, for_any_case, specs
from problem import Problem, bits, build
from tolerances import assert_within, step_bounds

from adahessian_fused import reference
from adahessian_fused.segments import Hyper

STATES = ("exp_avg", "exp_hessian_diag_sq", "master", "param")
STORED = (None, torch.bfloat16)
INF, NAN = torch.inf, torch.nan


def check_step(backend, problem: Problem, curvature: str = "hessian", grad_scale: float = 1.0, **options) -> None:
    """Within the rounding bounds of the float64 reference, and nothing but the four outputs changed."""
    before, expected = problem.copy(), problem.copy(torch.float64)
    if grad_scale != 1.0:
        options["grad_scale"] = torch.tensor(grad_scale, device=problem.arenas["param"].device)
    if curvature == "hessian":
        diag_options = {name: options[name] for name in ("seed", "sample", "is_hvp") if name in options}
        expected.run_hessian_diag(reference, **diag_options)
    ds = None if curvature == "none" else expected.windows("diag")
    for ops, tensors in ((backend, problem), (reference, expected)):
        tensors.run_step(ops, curvature, **options)
    for kind, bounds in step_bounds(before, expected, ds, 1 / grad_scale).items():
        for i, bound in enumerate(bounds if kind in problem.arenas else []):
            assert_within(
                problem.window(kind, i), expected.window(kind, i), bound, f"{problem.case}: {kind} {i}", counted=True
            )
    assert torch.equal(problem.missed, expected.missed)
    check_untouched(before, problem)
    if problem.case.master:
        for p, master in zip(problem.windows("param"), problem.windows("master"), strict=True):
            assert torch.equal(p, master.to(p.dtype)), "the parameter is not its master weight, rounded"


def check_untouched(before: Problem, after: Problem, changing: tuple[str, ...] = STATES) -> None:
    """Bit for bit the same, but for the windows of what a step changes."""
    for kind in before.arenas:
        assert torch.equal(before.outside(kind), after.outside(kind)), f"{before.case}: wrote outside, in {kind}"
        if kind not in changing:
            assert torch.equal(bits(before.arenas[kind]), bits(after.arenas[kind])), f"{before.case}: changed {kind}"
    assert torch.equal(before.steps, after.steps)
    assert torch.equal(before.groups, after.groups)
    assert torch.equal(before.means, after.means)


@pytest.mark.cases(CASES)
def test_with_hessian_vector_products(backend, case, device):
    check_step(backend, build(case, device))


@pytest.mark.cases(SMALL_CASES)
def test_with_the_compact_diagonal(backend, case, device):
    check_step(backend, build(case, device), "diag")


@pytest.mark.cases(SMALL_CASES)
def test_off_step(backend, case, device):
    problem = build(case, device)
    v = bits(problem.arenas["exp_hessian_diag_sq"]).clone()
    check_step(backend, problem, "none")
    assert torch.equal(bits(problem.arenas["exp_hessian_diag_sq"]), v)


@pytest.mark.cases(ROUNDED_CASES)
@pytest.mark.parametrize("curvature", ["hessian", "diag", "none"])
def test_states_in_bfloat16(backend, case, curvature, device):
    check_step(backend, build(case, device), curvature)


def test_any_layout(backend, device):
    def check(case: Case) -> None:
        for curvature in ("hessian", "diag", "none"):
            check_step(backend, build(case, device), curvature)

    for_any_case(backend, check)


@pytest.mark.parametrize("curvature", ["hessian", "diag", "none"])
@pytest.mark.parametrize(("dtype", "stored"), [(torch.bfloat16, None), (torch.float16, torch.bfloat16)], ids=str)
def test_master_weights(backend, dtype, stored, curvature, device):
    check_step(backend, build(dataclasses.replace(MIXED, dtype=dtype, stored=stored, master=True), device), curvature)


@pytest.mark.parametrize("options", [{"is_hvp": False}, {"sample": 5}, {"seed": -1}, {"sample": 2**32 - 1}], ids=str)
def test_options(backend, options, device):
    check_step(backend, build(MIXED, device), **options)


@pytest.mark.parametrize("holds", [0, 1])
@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_no_curvature_at_all_anywhere(backend, power, holds, device):
    problem = build(dataclasses.replace(MIXED, steps=((0, 0), (0, 0))), device)  # v = 0
    problem.groups[:, [Hyper.HESSIAN_POWER, Hyper.HOLDS]] = torch.tensor([power, holds], dtype=torch.float64)
    problem.arenas["hessian"].zero_()
    before = problem.copy()
    check_step(backend, problem)
    moved = not torch.equal(bits(before.arenas["param"]), bits(problem.arenas["param"]))
    assert moved == (not holds or power == 0)


@pytest.mark.parametrize(("stored", "master"), [(None, False), (torch.bfloat16, True)], ids=["", "rounded_master"])
@pytest.mark.parametrize("curvature", ["hessian", "diag", "none"])
def test_elements_without_curvature_do_not_move(backend, curvature, stored, master, device):
    """Others of the same parameter do; all of them collect momentum."""
    case = dataclasses.replace(MIXED, steps=((9, 3),), stored=stored, master=master)
    problem = build(dataclasses.replace(case, dtype=torch.bfloat16 if master else torch.float32), device)
    problem.groups[:, Hyper.HOLDS] = 1
    unseen = [i % 3 == 0 for i in range(300)]
    for kind in ("hessian", "diag", "exp_hessian_diag_sq"):
        problem.window(kind, 0)[: 300 if kind != "diag" else None] = 1
    problem.window("exp_hessian_diag_sq", 0)[unseen] = 0
    if curvature != "none":  # blocks of seven
        problem.window("hessian", 0)[140:147] = 0
        problem.window("diag", 0)[20] = 0
    before = problem.copy()
    check_step(backend, problem, curvature)
    still = torch.tensor(unseen, device=device)
    if curvature != "none":
        still &= torch.tensor([140 <= i < 147 for i in range(300)], device=device)
    for kind in ("param", "master") if master else ("param",):
        same = before.window(kind, 0) == problem.window(kind, 0)
        assert same[still].all(), kind
        assert kind == "param" or not same[~still].any(), kind
    assert (before.window("exp_avg", 0) != problem.window("exp_avg", 0)).float().mean() > 0.9


def test_without_means_nothing_is_drawn_to_them(backend, device):
    given, none = build(MIXED, device), build(MIXED, device)
    given.groups[:, Hyper.SHRINK] = 0
    given.run_step(backend), none.run_step(backend, means=None)
    for kind in STATES:
        assert kind not in none.arenas or torch.equal(bits(given.arenas[kind]), bits(none.arenas[kind])), kind


@pytest.mark.parametrize("block", [2**31, 2**40, 2**63 - 1])
def test_a_block_longer_than_the_parameter_is_the_whole_parameter(backend, block, device):
    problem, whole = (build(Case("long", specs((300,), (7, 40), block=b)), device) for b in (block, "tensor"))
    for tensors in (problem, whole):
        tensors.run_hessian_diag(backend), tensors.run_step(backend)
    for kind in ("diag", *STATES):
        assert kind not in whole.arenas or torch.equal(bits(problem.arenas[kind]), bits(whole.arenas[kind])), kind


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_counts_and_groups_on_the_device(backend, stored, device):
    problem = build(dataclasses.replace(MIXED, stored=stored), device)
    problem.steps, problem.groups = problem.steps.to(device), problem.groups.to(device)
    check_step(backend, problem)


# ---- GradScaler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["hessian", "diag", "none"])
@pytest.mark.parametrize("grad_scale", [65536.0, 3.0])
def test_grad_scale_divides_gradient_and_curvature(backend, grad_scale, curvature, device):
    check_step(backend, build(MIXED, device), curvature, grad_scale)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("found_inf", [1.0, 1e-30, INF, NAN])
def test_found_inf_that_is_not_zero_changes_nothing(backend, found_inf, shape, device):
    problem = build(MIXED, device)
    problem.window("grad", 0)[150] = problem.window("hessian", 0)[299] = NAN
    before = problem.copy()
    problem.run_step(backend, found_inf=torch.full(shape, found_inf, device=device))
    check_untouched(before, problem, changing=())


def test_found_inf_of_zero_changes_nothing_about_the_step(backend, device):
    problem, plain = build(MIXED, device), build(MIXED, device)
    zero, one = torch.zeros((), device=device), torch.ones((), device=device)
    problem.run_step(backend, found_inf=zero, grad_scale=one), plain.run_step(backend)
    for kind in plain.arenas:
        assert torch.equal(bits(problem.arenas[kind]), bits(plain.arenas[kind])), kind


# ---- properties -----------------------------------------------------------------------------------------------------


def outputs_that_differ(clean: Problem, dirty: Problem, kind: str) -> list[int]:
    """Elements of the second parameter that differ; the others must not."""
    differs = (bits(clean.arenas[kind]) != bits(dirty.arenas[kind])).nonzero().reshape(-1)
    return (differs - clean.begins[kind][1]).tolist()


@pytest.mark.parametrize(("curvature", "stored"), [("hessian", None), ("diag", torch.bfloat16)], ids=str)
@pytest.mark.parametrize(("block", "place", "value"), NOT_FINITE)
def test_curvature_that_is_not_finite_leaves_its_block_as_on_an_off_step(
    backend, block, place, value, curvature, stored, device
):
    case = Case("contained", specs((300,), (300,), (300,), block=block), steps=((9, 3), (8, 3), (7, 2)), stored=stored)
    clean = build(case, device)
    clean.run_hessian_diag(reference)
    dirty = clean.copy()
    dirty.window("hessian", 1)[place] = dirty.window("diag", 1)[place // block] = value
    before = dirty.copy()
    clean.run_step(backend, curvature), check_step(backend, dirty, curvature)
    whole_block = list(range(place // block * block, min(place // block * block + block, 300)))
    v = "exp_hessian_diag_sq"
    assert torch.equal(dirty.window(v, 1)[whole_block], before.window(v, 1)[whole_block])
    assert set(outputs_that_differ(clean, dirty, v)) <= set(whole_block)
    assert set(outputs_that_differ(clean, dirty, "param")) <= set(whole_block)
    assert outputs_that_differ(clean, dirty, "exp_avg") == []
    assert (dirty.missed - before.missed).tolist() == [0, len(whole_block), 0]
    assert all(dirty.window(kind, 1).isfinite().all() for kind in (v, "param"))


@pytest.mark.parametrize("value", [1e19, 3e38, -INF])
def test_curvature_whose_square_is_no_float32_is_not_finite_either(backend, value, device):
    problem = build(Case("too_large", specs((300,))), device)
    problem.window("hessian", 0)[7] = value
    before = problem.copy()
    problem.run_step(backend)
    taken = value**2 < torch.finfo(torch.float32).max
    assert (problem.missed - before.missed).tolist() == [not taken]
    assert problem.window("exp_hessian_diag_sq", 0).isfinite().all()


@pytest.mark.parametrize("curvature", ["hessian", "diag"])
@pytest.mark.parametrize("order", ["contiguous", "channels_last", "transposed"])
def test_every_missed_element_is_counted_once(backend, order, curvature, device):
    shapes = ((7, 5, 3, 3), (33, 40, 1, 3)) if order != "transposed" else ((7, 40), (33, 129))
    for block in (1, 9, 40, "tensor"):
        case = Case("counted", specs(*shapes, block=block, order=order), steps=((9, 3), (8, 3)))
        problem = build(case, device)
        problem.arenas["hessian"].fill_(NAN), problem.arenas["diag"].fill_(NAN)
        before = problem.copy()
        problem.run_step(backend, curvature)
        assert (problem.missed - before.missed).tolist() == [spec.numel for spec in case.specs]


@pytest.mark.parametrize(("place", "value"), [(0, INF), (150, NAN), (299, INF)])
def test_a_gradient_that_is_not_finite_stays_in_its_element(backend, place, value, device):
    clean = build(Case("contained", specs((300,), (300,), (300,), block=7)), device)
    dirty = clean.copy()
    dirty.window("grad", 1)[place] = value
    clean.run_step(backend), dirty.run_step(backend)
    assert outputs_that_differ(clean, dirty, "exp_hessian_diag_sq") == []
    for kind in ("exp_avg", "param"):
        assert outputs_that_differ(clean, dirty, kind) == [place], kind
