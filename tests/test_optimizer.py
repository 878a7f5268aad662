"""The optimizer's promises: known answers, off-steps at first-order price, parameters that come and go, conventions."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from models import assert_same, fresh, loss_of, mlp
from published import AdaHessian
from torch import nn
from ways import STYLES, WAYS

# ---- known answers ---------------------------------------------------------------------------------------------------

DIAGONAL = torch.tensor([[1.0, 2.0, 0.25], [8.0, 0.5, 4.0]])  # powers of two: every product below is exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_diagonal_hessian_is_found_bit_for_bit(every_engine, device, dtype):
    p, diagonal = nn.Parameter(torch.ones(2, 3, dtype=dtype, device=device)), DIAGONAL.to(device, dtype)
    opt = AdaHessian([p], betas=(0.9, 0.0), backend=every_engine)  # beta2 = 0: v = D^2, nothing to debias
    opt.backward((diagonal * p**2).sum() / 2)
    opt.step()
    assert torch.equal(opt.hessian_diag(p), diagonal.to(opt.hessian_diag(p)))


def test_three_steps_of_algorithm_1_with_numbers_worked_out_by_hand(engine, device):
    # Loss p^2 / 2: g = p, D = 1, so v / (1 - beta2^t) = 1 and p <- p - lr m / (1 - beta1^t), beta1 = lr = 1/2:
    # m = 1/2, p = 1 - 1/2 = 1/2;  m = 1/4 + 1/4 = 1/2, p = 1/2 - 1/2 (1/2) / (3/4) = 1/6;  m = 1/4 + 1/12 = 1/3,
    # p = 1/6 - 1/2 (1/3) / (7/8) = -1/42
    p, found = nn.Parameter(torch.ones(1, dtype=torch.float64, device=device)), []
    opt = AdaHessian([p], lr=0.5, betas=(0.5, 0.5), eps=0.0, backend=engine)
    for _ in range(3):
        opt.zero_grad()
        opt.backward(p.square().sum() / 2)
        opt.step()
        found.append(p.item())
    assert found == pytest.approx([1 / 2, 1 / 6, -1 / 42], rel=0, abs=16 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("style", [s for s in STYLES if s.startswith("closure") and s != "closure_returns_nothing"])
def test_step_returns_what_the_closure_returned(device, style):
    model, opt = fresh(mlp(device=device))
    expected = loss_of(model).item()
    assert WAYS[style](opt, lambda: loss_of(model)).item() == expected


# ---- off-steps -------------------------------------------------------------------------------------------------------


class Counted(torch.autograd.Function):
    """x^3 that counts its differentiations."""

    twice_differentiable = True  # its backward is not called once more to find out

    calls: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        Counted.calls.append("graph" if torch.is_grad_enabled() else "first order")
        return CountedAgain.apply(g, *ctx.saved_tensors)


class CountedAgain(torch.autograd.Function):
    """g times the derivative of x^3."""

    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g, x)
        return 3 * g * x**2

    @staticmethod
    def backward(ctx, h):
        Counted.calls.append("second order")
        g, x = ctx.saved_tensors
        return 3 * h * x**2, 6 * h * g * x


@pytest.mark.parametrize("off_step", ["hold", "stale"])
@pytest.mark.parametrize("step", ["backward", "closure_standard", "closure_returns_loss"])
def test_off_steps_cost_a_first_order_step(device, step, off_step):
    p = nn.Parameter(torch.rand(4, device=device) + 1)
    opt, calls = AdaHessian([p], lr=0.01, update_each=3, off_step=off_step, n_samples=2), []
    for _ in range(4):
        Counted.calls.clear()
        WAYS[step](opt, lambda: Counted.apply(p).sum())
        calls.append(list(Counted.calls))
    hessian_step, off_step = ["graph", "second order", "second order"], ["first order"]
    assert calls == [hessian_step, off_step, off_step, hessian_step]


# ---- parameters that come and go -------------------------------------------------------------------------------------


START = torch.tensor([1.0, 1.25, 1.5, 2.0], dtype=torch.float64)


def three(device, **options):
    """Three parameters and an optimizer for them."""
    params = [nn.Parameter(START.to(device).clone()) for _ in range(3)]
    return params, AdaHessian(params, **options)


@pytest.mark.parametrize("off_step", ["hold", "stale"])
def test_a_parameter_that_appears_on_an_off_step_waits_for_curvature(engine, device, off_step):
    (a, b, _), opt = three(device, backend=engine, update_each=2, off_step=off_step)
    counts, before = [], b.detach().clone()
    for losses in ([a], [a, b], [a, b]):
        opt.zero_grad()
        opt.backward(sum((p**3).sum() for p in losses))
        opt.step()
        state = opt.state.get(b, {"step": 0, "hessian_step": 0})
        counts.append((int(state["step"]), int(state["hessian_step"]), torch.equal(b, before)))
    assert counts == [(0, 0, True), (1, 0, True), (2, 1, False)]


def test_a_schedule_outlives_the_parameters_that_began_it(device):
    (a, b, _), opt = three(device, update_each=3)
    due = []
    for p in (a, a, a, a, b, b, b, b):
        due.append(opt.needs_hessian)
        opt.zero_grad()
        opt.backward((p**3).sum())
        opt.step()
    assert due == [True, False, False, True, False, False, True, False]


def test_backward_with_everything_frozen_leaves_others_their_gradients(device):
    params, opt = three(device)
    other = nn.Parameter(torch.ones(4, device=device))
    for p in params:
        p.requires_grad_(False)
    opt.backward((other * sum(params)).sum())
    opt.step()
    assert not opt.state


def test_external_curvature_in_several_dtypes(engine, device):
    params = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16, device=device)) for _ in range(2)]
    opt = AdaHessian(params, betas=(0.0, 0.0), backend=engine)
    for p in params:
        p.grad = torch.ones_like(p)
    d = torch.tensor([1.0, 2.0, 4.0, 0.5], device=device)
    opt.step(hessian=[d, d.bfloat16()])
    assert_same([opt.hessian_diag(p) for p in params], [d, d])
