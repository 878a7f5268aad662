"""Small models, ways of stepping and Algorithm 1 by hand, for the tests of the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from fuzz import oracle
from fuzz.layouts import length
from published import AdaHessian
from tolerances import assert_trajectory
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


def assert_follows_paper(opt: AdaHessian, model: nn.Module, steps: int = 4) -> None:
    """Each step on a batch is Algorithm 1's from where the optimizer is, with D by plain double backward."""
    params, last = [(group, p) for group in opt.param_groups for p in group["params"]], {}
    leaves = [p for _, p in params]
    for i in range(steps):
        due = [
            on
            for group, on in zip(opt.param_groups, opt.coming_step.schedule.due(), strict=True)
            for _ in group["params"]
        ]
        before = [(p.detach().clone(), {k: v.clone() for k, v in opt.state.get(p, {}).items()}) for _, p in params]
        counts = [(int(state.get("step", 0)), int(state.get("hessian_step", 0))) for _, state in before]
        grads = torch.autograd.grad(loss_of(model, i), leaves, create_graph=True)
        ds = list(map(torch.zeros_like, leaves))
        for sample in range(params[0][0]["n_samples"]):
            z = [probe(p, n, counts[n][1], group["seed"], sample) * due[n] for n, (group, p) in enumerate(params)]
            for d, a, h in zip(
                ds, z, torch.autograd.grad(grads, [p for _, p in params], z, retain_graph=True), strict=True
            ):
                d += a * h / params[0][0]["n_samples"]
        opt.zero_grad()
        opt.backward(loss_of(model, i))
        opt.step()
        for n, (group, p) in enumerate(params):
            if due[n]:
                d = ds[n].abs() if group["averaging"] == "abs" else ds[n]
                last[p] = oracle.block_means(d, length(p, group["block_size"]))
            d = last[p] if due[n] or group["off_step"] == "stale" else None
            zeros, (value, state) = torch.zeros_like(p), before[n]
            m, v = (state.get(name, zeros) for name in ("exp_avg", "exp_hessian_diag_sq"))
            m, v = oracle.averages(m, v, -grads[n] if group["maximize"] else grads[n], d, group["betas"])
            t, h = counts[n][0] + 1, counts[n][1] + (d is not None)
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "hessian_power")}
            found = opt.state[p]
            assert (int(found["step"]), int(found["hessian_step"])) == (t, h)
            expected = [m, v, oracle.moved(value, m, v, t, h, **options)]
            assert_trajectory([found["exp_avg"], found["exp_hessian_diag_sq"], p], expected, 1)
