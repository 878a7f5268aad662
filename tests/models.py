"""Small models, ways of stepping and Algorithm 1 by hand, for the tests of the optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
from cases import PLAIN
from fuzz import oracle
from published import AdaHessian
from tolerances import assert_within, mean_bound, unit, update_bounds
from torch import Tensor, nn
from ways import WAYS

from adahessian_fused.reference import rademacher_signs

# ---- models and data ------------------------------------------------------------------------------------------------


def mlp(dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Sequential:
    """A smooth network of three layers."""
    torch.manual_seed(1)
    layers = nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)
    return nn.Sequential(*layers).to(device, dtype)


def conv_net(dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Sequential:
    """Convolutions, batch normalisation and a head; takes 3 numbers a sample, like :func:`mlp`."""
    torch.manual_seed(2)
    layers = nn.Linear(3, 50), nn.Unflatten(1, (2, 5, 5)), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh()
    return nn.Sequential(*layers, nn.Conv2d(3, 2, 3), nn.Flatten()).to(device, dtype)


def batch(i: int, like: nn.Module, size: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and targets of step i, in the dtype and on the device of a model."""
    p = next(like.parameters())
    generator = torch.Generator().manual_seed(100 + i)
    x, y = (torch.randn(size, n, dtype=torch.float64, generator=generator) for n in (3, 2))
    return x.to(p), y.to(p)


def loss_of(model: nn.Module, i: int = 0, size: int = 8) -> Tensor:
    """Mean squared error on batch i."""
    x, y = batch(i, model, size)
    return (model(x) - y).square().mean()


# ---- training -------------------------------------------------------------------------------------------------------


def train(opt: AdaHessian, model: nn.Module, steps: Sequence[int] | int = 5, style: str = "backward") -> list[Tensor]:
    """Step on batches 0, 1, ... or those listed; the weights afterwards."""
    for i in range(steps) if isinstance(steps, int) else steps:
        WAYS[style](opt, partial(loss_of, model, i))
    return weights(model)


def fresh(model: nn.Module, **options) -> tuple[nn.Module, AdaHessian]:
    """A copy of the model and an optimizer for it."""
    model = copy.deepcopy(model)
    return model, AdaHessian(model.parameters(), **options)


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bit for bit, and not because nothing has moved: the tensors have to be finite."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.isfinite().all(), f"tensor {i} is not finite"
        assert torch.equal(a, b), f"tensor {i} differs by up to {(a - b).abs().max():.3g}"


# ---- Algorithm 1 by hand --------------------------------------------------------------------------------------------


def probe(p: Tensor, param_id: int, h: int, seed: int = 0, sample: int = 0) -> Tensor:
    """Z of parameter ``param_id`` after h Hessian steps."""
    return rademacher_signs(p.numel(), param_id, torch.tensor(h), seed, sample).to(p).reshape(p.shape)


HYPER = {"lr": 0.15, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.0, "hessian_power": 1.0}


class ByHand:
    """Algorithm 1 for one parameter in float64: what it is given at which step, and how far off a result may be."""

    def __init__(
        self, p: Tensor, param_id: int, *, block_size: int | str = "auto", averaging: str = "signed",
        update_each: int = 1, off_step: str = "hold", n_samples: int = 1, seed: int = 0, maximize: bool = False,
        **hyper: object,
    ) -> None:  # fmt: skip
        self.param_id, self.hyper = param_id, {**HYPER, **hyper}
        auto = math.prod(p.shape[2:]) if p.dim() in (4, 5) else 1
        self.block = {"auto": auto, "row": p.shape[-1], "tensor": p.numel()}.get(block_size, block_size)
        self.absolute, self.update_each, self.stale = averaging == "abs", update_each, off_step == "stale"
        self.n_samples, self.seed, self.sign = n_samples, seed, -1 if maximize else 1
        self.p, self.m, self.v, self.d = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p), None
        self.t = self.h = 0

    def z(self, sample: int = 0) -> Tensor:
        return probe(self.p, self.param_id, self.h, self.seed, sample)

    def average(self, d: Tensor) -> Tensor:
        return oracle.block_means(d, self.block)

    def step(self, g: Tensor, ds: Sequence[Tensor]) -> None:
        """One step with the gradient and the samples' D, which are used on Hessian steps only; all of them exact."""
        fresh, betas, g = self.t % self.update_each == 0, self.hyper["betas"], self.sign * g
        if fresh:
            d = sum(ds) / self.n_samples
            self.d = self.average(d.abs() if self.absolute else d)
            self.d_error = mean_bound(self.average(sum(d.abs() for d in ds)), self.n_samples, self.block)
        d, before = (self.d if fresh or self.stale else None), (self.p, self.m, g)
        self.t, self.h = self.t + 1, self.h + (d is not None)
        self.m, self.v = oracle.averages(self.m, self.v, g, d, betas)
        self.p = oracle.moved(self.p, self.m, self.v, self.t, self.h, **self.hyper)
        numbers = [self.hyper[name] for name in HYPER if name != "betas"]
        row = (numbers[0], *betas, *numbers[1:], 0, *PLAIN)
        d_and_error = None if d is None else (d, self.d_error)
        self.bounds = update_bounds(unit(g.dtype), row, self.t, self.h, before, (self.m, self.v), d_and_error)

    def check(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """The optimizer has found the same; go on from its numbers, so that roundings do not add up over the steps."""
        assert (int(state["step"]), int(state["hessian_step"])) == (self.t, self.h)
        found = {"m": state["exp_avg"], "v": state["exp_hessian_diag_sq"], "p": p.detach()}
        for (name, value), bound in zip(found.items(), self.bounds, strict=True):
            assert_within(value, getattr(self, name), bound, f"{name} of parameter {self.param_id}")
            setattr(self, name, value.clone())


class Square(nn.Module):
    """A curved function of numbers of few bits that has few bits itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


def exact_mlp(device: str = "cpu") -> nn.Sequential:
    """Like :func:`mlp`; for numbers of few bits it and its derivatives have no rounding error, in any order of sums."""
    return nn.Sequential(nn.Linear(3, 5), Square(), nn.Linear(5, 4), nn.Identity(), nn.Linear(4, 2)).to(device).double()


def exact_conv_net(device: str = "cpu") -> nn.Sequential:
    """Like :func:`conv_net`, and exact."""
    layers = nn.Linear(3, 50), nn.Unflatten(1, (2, 5, 5)), nn.Conv2d(2, 3, 3), Square(), nn.Conv2d(3, 2, 3)
    return nn.Sequential(*layers, nn.Flatten()).to(device).double()


def exact_loss(model: nn.Module, i: int) -> Tensor:
    """Loss on batch i of numbers of few bits, at weights of few bits in place of the model's own."""
    random, p = torch.Generator().manual_seed(100 + i), next(model.parameters())
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randint(-2, 3, weight.shape, generator=random) / 2)
    x, y = (torch.randint(-1, 2, (8, n), generator=random).to(p) for n in (3, 2))
    return (model(x) - y).square().mean()


def exact_derivatives(model: nn.Module, hands: Sequence[ByHand], i: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """G and each sample's D = z * Hz of batch i for every parameter; z is 0 for parameters that are not due."""
    model = copy.deepcopy(model)
    params = list(model.parameters())
    grads = torch.autograd.grad(exact_loss(model, i), params, create_graph=True)
    ds = [[] for _ in params]
    for sample in range(hands[0].n_samples):
        z = [hand.z(sample) * (hand.t % hand.update_each == 0) for hand in hands]
        products = torch.autograd.grad(grads, params, z, retain_graph=True)
        for found, a, b in zip(ds, z, products, strict=True):
            found.append(a * b)
    for x in (*grads, *(d for found in ds for d in found)):  # 40 bits, with room for the sums in between
        assert x.abs().max() < 2**24
        assert torch.equal(x, (x * 2**16).round() / 2**16), "not exact"
    return [g.detach() for g in grads], ds


def assert_follows_paper(opt: AdaHessian, model: nn.Module, hands: Sequence[ByHand], steps: int = 4) -> None:
    """Train an exact model, each step from other weights, and compare it with Algorithm 1 by hand."""
    for i in range(steps):
        g, ds = exact_derivatives(model, hands, i)
        opt.zero_grad()
        opt.backward(exact_loss(model, i))
        for hand, p in zip(hands, model.parameters(), strict=True):
            hand.p = p.detach().clone()
        opt.step()
        for hand, p, gradient, diagonals in zip(hands, model.parameters(), g, ds, strict=True):
            hand.step(gradient, diagonals)
            hand.check(p, opt.state[p])
