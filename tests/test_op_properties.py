"""What no op depends on, bit for bit: which parameters share a launch, where tensors lie, and the number of threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cases
import pytest
import torch
from cases import GROUPS, Case, Place, specs
from problem import Problem, bits, build

MIXED = dataclasses.replace(cases.MIXED, gaussian=True)
STATES = ("param", "exp_avg", "exp_hessian_diag_sq")
OPS = {  # how it runs, what it writes, and what m and v are stored in
    "rademacher": (Problem.run_rademacher, ("z",), None),
    "perturb": (Problem.run_perturb, ("param", "saved"), None),
    "hessian_diag": (Problem.run_hessian_diag, ("diag",), None),
    "adahessian_step": (Problem.run_step, STATES, None),
    "rounded_step": (Problem.run_step, STATES, torch.bfloat16),
}


def results(
    op: str, backend, case: Case, device: str, split: Sequence[list[int] | None] = (None,)
) -> list[torch.Tensor]:
    """The bits of what an op writes into the parameters' windows, in launches of these parameters."""
    run, kinds, stored = OPS[op]
    problem = build(dataclasses.replace(case, stored=stored), device)
    for only in split:
        run(problem, backend, only=only)
    return [bits(window) for kind in kinds for window in problem.windows(kind)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(map(torch.equal, found, expected))


SPLITS = {"one_by_one": [[i] for i in range(6)], "halves_unsorted": [[3, 0, 5], [4, 1, 2]]}
PLACES = {
    "padded": {"state_at": Place(64, 0, 1)},
    "states_misaligned": {"state_at": Place(64, 3, 1)},
    "far_apart": {"state_at": Place(128, 127)},
    "all_misaligned": {f"{kind}_at": Place(64, 1, 1) for kind in ("param", "grad", "hessian", "state")},
}
THREADED = [(op, block) for op in OPS for block in (1, 9, 4095, "tensor") if block == 1 or op not in [*OPS][:2]]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("op", OPS)
def test_the_grouping_does_not_matter(backend, op, split, device):
    assert_same(results(op, backend, MIXED, device, split), results(op, backend, MIXED, device))


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("op", OPS)
def test_the_places_do_not_matter(backend, op, places, device):
    placed = dataclasses.replace(MIXED, **places)
    assert_same(results(op, backend, placed, device), results(op, backend, MIXED, device))


@pytest.mark.parametrize(("op", "block"), THREADED)
def test_the_threads_do_not_matter(native, op, block, set_threads, device):
    case = Case("threads", specs((300_001,), (3,), (65_537,), block=block), groups=GROUPS, gaussian=True)
    found = []
    for threads in (1, 2):
        set_threads(threads)
        found.append(results(op, native, case, device))
    assert_same(*found)
