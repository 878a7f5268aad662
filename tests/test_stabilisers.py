"""What makes steps other than Algorithm 1's: clip, shrink, warmup, dense_steps, nesterov and cautious."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from models import fresh, mlp, train
from published import AdaHessian
from torch import nn

import adahessian_fused
from adahessian_fused import recipes

BETAS = (0.9, 0.99)
LR, EPS = 0.1, 1e-3


class Plain:
    """One parameter by hand, straight from the docstring, in float64."""

    def __init__(
        self, p: torch.Tensor, clip: float | None = None, shrink: float = 0.0, warmup: int = 0, dense_steps: int = 0,
        nesterov: bool = False, cautious: bool = False, maximize: bool = False,
    ) -> None:  # fmt: skip
        self.nesterov, self.cautious, self.sign = nesterov, cautious, -1 if maximize else 1
        self.p, self.clip, self.shrink, self.warmup = p.detach().double().clone(), clip or math.inf, shrink, warmup
        self.m = self.v = torch.zeros_like(self.p)
        self.t = self.h = 0
        self.mean = None

    def step(self, g: torch.Tensor, d: torch.Tensor | None) -> None:
        b1, b2 = BETAS
        self.t += 1
        g = self.sign * torch.as_tensor(g, dtype=torch.float64).expand_as(self.p)
        self.m = b1 * self.m + (1 - b1) * g
        if d is not None:
            self.h += 1
            self.v = b2 * self.v + (1 - b2) * d**2
        v_hat = self.v / (1 - b2**self.h)
        n = (1 - b2**self.h) / (1 - b2)
        mean = v_hat.mean() if self.mean is None else self.mean
        shrunk = (n * v_hat + self.shrink * mean) / (n + self.shrink)
        numerator = self.m / (1 - b1**self.t)
        if self.nesterov:
            numerator = (b1 * self.m + (1 - b1) * g) / (1 - b1 ** (self.t + 1))
        if self.cautious:
            numerator = numerator * (numerator * g > 0)
        self.q = numerator / (shrunk.sqrt() + EPS)
        self.bound = self.clip
        if self.t <= self.warmup:
            self.bound = min(self.clip, 0.2 * max(self.p.abs().mean().item(), 0.1) / LR)
        moved = self.p - LR * self.q.clamp(-self.bound, self.bound)
        self.p = torch.where(self.v == 0, self.p, moved)
        if d is not None:
            self.mean = v_hat.mean()


def numbers(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STABILISERS = {
    "clip": {"clip": 0.5},
    "shrink": {"shrink": 5.0},
    "both": {"clip": 0.3, "shrink": 2.0},
    "warmup": {"warmup": 3, "dense_steps": 0},  # of which the last has no effect
    "warmup_and_clip": {"warmup": 2, "dense_steps": 0, "clip": 0.5},
    "everything_borrowed": {"shrink": 1e9},
    "nothing": {"clip": math.inf, "shrink": 0},
    "nesterov": {"nesterov": True},
    "nesterov_and_clip": {"nesterov": True, "clip": 0.5, "maximize": True},
    "cautious": {"cautious": True},
    "cautious_uphill": {"cautious": True, "maximize": True, "clip": 0.5},
    "all": {"nesterov": True, "cautious": True, "shrink": 2.0, "warmup": 2, "dense_steps": 0, "clip": 0.5},
}


@pytest.mark.parametrize("options", STABILISERS.values(), ids=STABILISERS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_follows_the_formula(engine, device, options, channels_last):
    p = nn.Parameter(numbers((4, 3, 2, 5), 0).to(device))
    if channels_last:
        p = nn.Parameter(p.detach().to(memory_format=torch.channels_last))
    other = nn.Parameter(torch.ones(3, dtype=torch.float64, device=device))
    opt = AdaHessian(
        [{"params": [p], **options}, {"params": [other]}],
        lr=LR, betas=BETAS, eps=EPS, update_each=3, block_size=1, backend=engine,
    )  # fmt: skip
    by_hand, plain = Plain(p, **options), Plain(other)
    for i in range(8):
        g, d = (numbers((4, 3, 2, 5), k).to(device) for k in (2 * i + 1, 2 * i + 2))
        d, g = d * (d > -0.5), g * (g > -1)  # some have none
        p.grad, other.grad = g.clone(memory_format=torch.preserve_format), torch.ones_like(other)
        opt.step(hessian=[d, torch.full_like(other, 2.0)]) if i % 3 == 0 else opt.step()
        for hand, gradient, diagonal in ((by_hand, g, d), (plain, 1.0, torch.full_like(other, 2.0))):
            hand.step(gradient, diagonal if i % 3 == 0 else None)
        torch.testing.assert_close(p.detach(), by_hand.p, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(other.detach(), plain.p, rtol=1e-11, atol=1e-11)
        clipped = ((by_hand.q.abs() > by_hand.bound) & (by_hand.v > 0)).double().mean().item()
        found = opt.statistics().groups[0]
        moved = (by_hand.q.clamp(-by_hand.bound, by_hand.bound) * (by_hand.v > 0)).norm().item() * LR
        assert found.update_norm.item() == pytest.approx(moved, rel=1e-9)
        assert float(found.clipped or 0.0) == pytest.approx(clipped)


@pytest.mark.parametrize("scaled", [False, True])
def test_what_follows_the_gradient_is_told_while_there_is_one(device, scaled):
    """With a loss scale in it or without."""
    p = nn.Parameter(numbers((50,), 0).float().to(device))
    opt = AdaHessian([p], lr=LR, nesterov=True, cautious=True, clip=0.1)
    scale = 8.0 if scaled else 1.0
    for i in range(2):
        p.grad = scale * numbers((50,), i + 1).float().to(device)
        if scaled:
            opt.grad_scale, opt.found_inf = torch.tensor(scale, device=device), torch.zeros((), device=device)
        before = p.detach().clone()
        opt.step(hessian=[torch.full_like(p, scale)])
    found = opt.statistics()
    assert found.update_norm.item() == pytest.approx((p - before).norm().item(), rel=1e-5)
    assert 0 < found.clipped.item() < 1
    opt.zero_grad()
    assert opt.statistics().update_norm is opt.statistics().clipped is None


GRADIENTS_GONE = {
    "zeros": lambda opt, p: opt.zero_grad(set_to_none=False),
    "zeroed by others": lambda opt, p: p.grad.zero_(),
    "the next one": lambda opt, p: setattr(p, "grad", torch.ones_like(p)),
    "added to": lambda opt, p: p.sum().backward(),
}


@pytest.mark.parametrize("change", GRADIENTS_GONE.values(), ids=GRADIENTS_GONE)
@pytest.mark.parametrize("options", [{"nesterov": True}, {"cautious": True}, {}], ids=str)
def test_another_gradient_is_not_taken_for_that_of_the_last_step(device, change, options):
    p = nn.Parameter(numbers((50,), 0).float().to(device))
    opt = AdaHessian([p], lr=LR, clip=0.1, **options)
    for i in range(2):
        p.grad = numbers((50,), i + 1).float().to(device)
        opt.step(hessian=[torch.ones_like(p)])
    before = opt.statistics().as_dict()
    change(opt, p)
    after = opt.statistics().as_dict()
    assert {"update_norm", "clipped"} <= before.keys()
    if options:
        assert not {"update_norm", "clipped"} & after.keys()
    else:
        assert all(before[name] == after[name] for name in ("update_norm", "clipped"))


def test_groups_of_which_one_is_not_known_have_no_update_together(device):
    p, q = (nn.Parameter(numbers((50,), seed).float().to(device)) for seed in (0, 1))
    opt = AdaHessian([{"params": [p]}, {"params": [q], "cautious": True}], lr=LR, clip=0.1)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt.step(hessian=[torch.ones_like(p), torch.ones_like(q)])
    opt.zero_grad()
    whole = opt.statistics()
    first, second = whole.groups
    assert first.update_norm > 0
    assert first.clipped == 1
    assert whole.update_norm is second.update_norm is whole.clipped is second.clipped is None


@pytest.mark.parametrize("options", [{"nesterov": True}, {"cautious": True}, {}], ids=str)
def test_a_step_that_only_the_device_knows_to_be_skipped(device, options):
    p = nn.Parameter(numbers((50,), 0).float().to(device))
    opt = AdaHessian([p], lr=LR, clip=0.1, capturable=True, **options)
    opt.grad_scale = torch.ones((), device=device)
    found = []
    for i, skipped in enumerate((0.0, 1.0)):
        p.grad = numbers((50,), 1 - i).float().to(device)
        opt.found_inf = torch.tensor(skipped, device=device)
        opt.step(hessian=[torch.ones_like(p)])
        found.append(opt.statistics())
    for name in ("update_norm", "clipped"):
        taken, then = (getattr(one, name) for one in found)
        assert taken > 0
        assert then.isnan() if options else then == taken


def test_a_gradient_that_is_no_number_is_not_hidden(engine, device):
    p = nn.Parameter(torch.ones(3, device=device))
    opt = AdaHessian([p], cautious=True, nesterov=True, backend=engine)
    p.grad = torch.tensor([1.0, math.nan, 0.0], device=device)
    opt.step(hessian=[torch.ones_like(p)])
    assert p.isnan().tolist() == [False, True, False]
    assert p[2] == 1


@pytest.mark.parametrize("g", [-1.0, 1.0])
def test_momentum_that_is_no_number_is_not_hidden(engine, device, g):
    p = nn.Parameter(torch.ones(1, device=device))
    opt = AdaHessian([p], cautious=True, backend=engine)
    for x in (math.nan, g):
        p.grad = torch.full_like(p, x)
        opt.step(hessian=[torch.ones_like(p)])
        with torch.no_grad():
            p.fill_(1.0)
    p.grad = torch.full_like(p, g)
    opt.step(hessian=[torch.ones_like(p)])
    assert p.isnan()
    assert opt.statistics().update_norm.isnan()


@pytest.mark.parametrize("late", [0, 2])
def test_each_parameter_warms_up_in_its_own_first_steps(engine, device, late):
    p, q = (nn.Parameter(numbers((3, 5), seed).to(device)) for seed in (0, 1))
    opt = AdaHessian([p, q], lr=LR, betas=BETAS, eps=EPS, warmup=2, backend=engine)
    by_hand = {p: Plain(p, warmup=2), q: Plain(q, warmup=2)}
    for i in range(6):
        for x, hand in by_hand.items():
            x.grad = torch.full_like(x, 3.0) if x is p or i >= late else None
            if x.grad is not None:
                hand.step(x.grad, torch.ones_like(x))
        opt.step(hessian=[torch.ones_like(p), torch.ones_like(q)])
        for x, hand in by_hand.items():
            torch.testing.assert_close(x.detach(), hand.p, rtol=1e-11, atol=1e-11)


def test_the_share_of_cut_elements_is_that_of_groups_that_cut(device):
    p, q = (nn.Parameter(torch.ones(4, device=device)) for _ in range(2))
    opt = AdaHessian([{"params": [p], "clip": 0.5}, {"params": [q]}])
    assert opt.statistics().clipped is None
    p.grad = torch.tensor([0.4, 0.6, -0.6, 100.0], device=device)
    q.grad = torch.ones_like(q)
    opt.step(hessian=[torch.ones_like(p), torch.ones_like(q)])
    found = opt.statistics()
    assert [g.clipped if g.clipped is None else g.clipped.item() for g in found.groups] == [0.75, None]
    assert found.as_dict()["clipped"] == pytest.approx(3 / 8)


def test_the_mean_does_not_depend_on_the_threads(native, set_threads):
    means = []
    for threads in (1, 2):
        set_threads(threads)
        p = nn.Parameter(numbers(300_001, 0).float())
        opt = AdaHessian([p], shrink=1.0, backend="native")
        p.grad = torch.ones_like(p)
        opt.step(hessian=[numbers(300_001, 1).float()])
        means.append(opt.state[p]["hessian_diag_sq_mean"].item())
    assert means[0] == means[1] != 0


def test_switched_on_later_and_loaded_without_a_mean(engine, device):
    model, opt = fresh(mlp(device=device), backend=engine, update_each=2, lr=0.01)
    train(opt, model, range(3))
    p = next(model.parameters())
    opt.param_groups[0]["shrink"] = 2.0
    train(opt, model, [3])
    v_hat = opt.state[p]["exp_hessian_diag_sq"] / (1 - 0.999**2)
    assert opt.state[p]["hessian_diag_sq_mean"].item() == pytest.approx(v_hat.mean().item(), rel=1e-12)
    opt.param_groups[0]["shrink"] = 0.0
    train(opt, model, [4])
    assert "hessian_diag_sq_mean" not in opt.state[p]


DENSE = [
    (0, 0, "x..x..x."),
    (1, 0, "x..x..x."),
    (2, 0, "xx.x..x."),
    (5, 0, "xxxxx.x."),
    (None, 2, "xx.x..x."),
    (0, 2, "x..x..x."),
]


@pytest.mark.parametrize(("dense", "warmup", "expected"), DENSE)
def test_dense_steps(device, dense, warmup, expected):
    model, opt = fresh(mlp(device=device), update_each=3, dense_steps=dense, warmup=warmup)
    found = ""
    for i in range(8):
        found += "x" if opt.needs_hessian else "."
        h = opt.statistics().hessian_step
        train(opt, model, [i])
        assert int(opt.statistics().hessian_step) - int(h or 0) == (found[-1] == "x")
    assert found == expected


FIRST = {  # options, curvature of the loss, whether a first step is longer than its parameter
    "long": ({"warmup": 0, "clip": None}, 0.01, True),
    "of_float16": ({"warmup": 0, "clip": None, "dtype": torch.float16}, 0.01, True),
    "without_curvature": ({"warmup": 0, "clip": None, "unmeasured": "move"}, 0.0, True),
    "uphill": ({"warmup": 0, "clip": None, "maximize": True}, 0.01, True),
    "short": ({"warmup": 0, "clip": None}, 10.0, False),
    "cut": ({"warmup": 0, "clip": 1.0}, 0.01, False),
    "by_default": ({}, 0.01, False),
    "capturable": ({"warmup": 0, "clip": None, "capturable": True}, 0.01, False),
}


@pytest.mark.parametrize(("options", "curvature", "is_long"), FIRST.values(), ids=FIRST)
def test_first_steps_longer_than_their_parameter_are_told_once(device, options, curvature, is_long):
    options = {"lr": LR, **options}
    p = torch.full((4,), 0.5, device=device, dtype=options.pop("dtype", torch.float32)).requires_grad_()
    opt = adahessian_fused.AdaHessian([p], **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            opt.step(lambda: (p + curvature / 2 * (p.float() - 0.5).square()).float().sum())
    assert [w.category for w in told] == [adahessian_fused.LongStepWarning] * is_long


def test_parameters_of_zeros_count_as_a_tenth(device):
    p, short = (torch.zeros(4, device=device, requires_grad=True) for _ in range(2))
    opt = adahessian_fused.AdaHessian([p, short], lr=LR, **recipes.published)
    with pytest.warns(adahessian_fused.LongStepWarning, match=r"itself: parameter 0 of group 0\. Little"):
        opt.step(lambda: (p + 0.49 * p.square()).sum() + (short + 0.51 * short.square()).sum())


@pytest.mark.parametrize(("clip", "largest"), [(None, 5.0), (1.0, 1.0)])
def test_power_0_is_averaged_momentum_to_which_the_bounds_apply(device, clip, largest):
    """Curvature, here 1 and 9, makes no difference."""
    p = torch.zeros(2, device=device, requires_grad=True)
    options = {"warmup": 0, "clip": clip, "nesterov": False, "cautious": False, "hessian_power": 0.0}
    opt = adahessian_fused.AdaHessian([p], lr=LR, betas=BETAS, eps=0.0, **options)
    opt.step(lambda: 5 * p[0] + 0.5 * p[1] + (p.square() * p.new_tensor([1.0, 9.0])).sum() / 2)
    torch.testing.assert_close(p.detach().cpu(), -LR * torch.tensor([largest, 0.5]))
