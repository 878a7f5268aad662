"""The formulae and figures of docs/scale.md against what PyTorch counts in steps of a small GPT."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_problem import bytes_reduced
from published import AdaHessian
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.overhead.problems import SIZES, problem

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()


def written(row: str) -> list[float]:
    """The numbers of a row of the page."""
    [cells] = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", PAGE, re.MULTILINE)
    return [float(cell.replace(",", "")) for cell in cells.split("|")]


# Cost of a step with curvature in first-order steps: a product by double backward is two more passes, by a finite
# difference one more, from a quarter of the batch a quarter of that.
@pytest.mark.parametrize(
    ("way", "cost"), [("first order", 1), ("autograd", 3), ("finite_difference", 2), ("quarter", 1.5)]
)
def test_flops(way, cost):
    """Three matrix products a layer, two FLOPs a multiplication; attention has 2 L s d multiplications a token."""
    task = problem("GPT", batch=4)
    options = {"hvp": way} if way == "finite_difference" else {}
    opt = AdaHessian(task.model.parameters(), hessian_fraction=0.25 if way == "quarter" else 1.0, **options)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if way == "first order":
            task.loss(task.model, *task.batch).backward()
        elif way == "quarter":
            opt.backward_split(lambda x, y: task.loss(task.model, x, y), *task.batch)
        else:
            opt.backward(lambda: task.loss(task.model, *task.batch))
    layers, width, _, length, _ = SIZES["GPT"]
    matrices = sum(m.weight.numel() for m in task.model.modules() if isinstance(m, torch.nn.Linear))
    expected = cost * 6 * (matrices + 2 * layers * length * width) * task.batch[0].numel()
    assert counter.get_total_flops() == expected
    assert written(f"FLOPs, {way}") == [expected, expected, 1]


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_bytes_in_all_reduces():
    """Gradients, and on Hessian steps block means; beside each tensor travels the number of ranks that have it."""
    task = problem("GPT", batch=1)
    params = list(task.model.parameters())
    opt = AdaHessian(params, process_group=dist.group.WORLD, update_each=2, block_size="row")

    def step():
        opt.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            opt.backward(task.loss(task.model, *task.batch))
        opt.step()

    for _ in range(2):  # with the first curvature ranks compare checksums of their parameters
        step()
    d, blocks = sum(p.numel() for p in params), sum(p.numel() // p.shape[-1] for p in params)
    off_step = 4 * (d + len(params))
    for name, expected in (("Hessian step", off_step + 4 * (blocks + len(params))), ("off-step", off_step)):
        assert bytes_reduced(step) == expected + 2 * 8  # a checksum of the gradients
        assert written(f"bytes in all-reduces, {name}") == [expected, expected, 1]


def test_the_average_step():
    """1 + (cost - 1) r / f first-order steps."""
    for row, extra in (("", 2), (", a quarter of the batch", 0.5)):
        assert written(("exact" + row) if row else "exact (double backward)") == [1 + extra / f for f in (1, 2, 5, 10)]
    assert written("finite difference") == [1 + 1 / f for f in (1, 2, 5, 10)]
