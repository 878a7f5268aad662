"""The AdaHessians the drop-ins stand in for: the installed packages, and the published rules of those that are none.

Every original here takes its probes from ``self.z(p, sample)``, so that it can be given ours.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from models import fresh, loss_of, mlp, train, weights
from models import probe as draw_probe
from published import AdaHessian
from tolerances import assert_trajectory, growth, nudge
from torch import Tensor, nn

from adahessian_fused import compat

SAME = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.05}


@cache
def probe(shape: torch.Size, param_id: int, h: int, seed: int, sample: int) -> Tensor:
    """Our z in float64; the reference takes its time to draw it."""
    return draw_probe(torch.empty(shape, dtype=torch.float64), param_id, h, seed, sample)


class Published(torch.optim.Optimizer):
    """What the published rules share: m and v from g and a diagonal D, and the step."""

    def z(self, p: Tensor, sample: int) -> Tensor:
        """The probe; tests put ours in its place."""
        return 2 * torch.randint_like(p, 2) - 1

    def products(self, params: list[Tensor], z: list[Tensor], *, last: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad([p.grad for p in params], params, z, retain_graph=not last)

    @torch.no_grad()
    def update(self, p: Tensor, d: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        t = state["step"] = state.get("step", 0) + 1
        for key in ("exp_avg", "exp_hessian_diag_sq"):
            state.setdefault(key, torch.zeros_like(p))
        m, v = state["exp_avg"], state["exp_hessian_diag_sq"]
        m.copy_(beta1 * m + (1 - beta1) * p.grad)
        v.copy_(beta2 * v + (1 - beta2) * d**2)
        denominator = (v / (1 - beta2**t)).sqrt() ** group["hessian_power"] + group["eps"]
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m / (1 - beta1**t) / denominator)


class Official(Published):
    """Curvature at every step; the magnitude of Hz, averaged over the last two axes of 4-D parameters."""

    def __init__(self, params, lr=0.15, betas=(0.9, 0.999), eps=1e-4, weight_decay=0, hessian_power=1, single_gpu=True):
        self.single_gpu = single_gpu
        super().__init__(params, {k: v for k, v in locals().items() if k in GROUP_KEYS})

    def step(self):
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        params = [p for p, _ in pairs]
        products = self.products(params, [self.z(p, 0) for p in params], last=True)
        for (p, group), h in zip(pairs, products, strict=True):
            self.update(p, h.abs().mean([2, 3], keepdim=True) if p.dim() == 4 else h.abs(), group)


class Davda54(Published):
    """D is the mean of the samples, kept in ``p.hess`` and used again until the next Hessian step."""

    def __init__(
        self, params, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, hessian_power=1.0,
        update_each=1, n_samples=1, average_conv_kernel=False,
    ):  # fmt: skip
        self.update_each, self.n_samples, self.average_conv_kernel = update_each, n_samples, average_conv_kernel
        super().__init__(params, {k: v for k, v in locals().items() if k in GROUP_KEYS})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["hessian step"] = 0

    def step(self):
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        params = [p for p, _ in pairs]
        if self.state[params[0]]["hessian step"] % self.update_each == 0:
            d = [torch.zeros_like(p) for p in params]
            for sample in range(self.n_samples):
                z = [self.z(p, sample) for p in params]
                for total, a, b in zip(d, z, self.products(params, z, last=sample + 1 == self.n_samples), strict=True):
                    total += a * b / self.n_samples
            for p, diagonal in zip(params, d, strict=True):
                p.hess = diagonal
                if self.average_conv_kernel and p.dim() == 4:
                    p.hess = diagonal.abs().mean([2, 3], keepdim=True).expand_as(p).clone()
        for p, group in pairs:
            self.state[p]["hessian step"] += 1
            self.update(p, p.hess, group)


class Timm(Davda54):
    is_second_order = True

    def __init__(
        self, params, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, hessian_power=1.0,
        update_each=1, n_samples=1, avg_conv_kernel=False,
    ):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, hessian_power, update_each, n_samples, avg_conv_kernel)
        self.avg_conv_kernel = avg_conv_kernel


GROUP_KEYS = ("lr", "betas", "eps", "weight_decay", "hessian_power")
for cls, module, name in (
    (Official, "optim_adahessian", "Adahessian"),
    (Davda54, "ada_hessian", "AdaHessian"),
    (Timm, "timm.optim.adahessian", "Adahessian"),
):
    cls.__module__, cls.__qualname__, cls.__name__ = module, name, name


@dataclass
class Origin:
    """One original with options, its drop-in, and the probe's number at step i."""

    module: str
    options: dict[str, Any] = field(default_factory=dict)
    ours_only: dict[str, Any] = field(default_factory=dict)
    h: Callable[[int], int] = lambda i: i

    @property
    def drop_in(self) -> type[AdaHessian]:
        module = getattr(compat, self.module)
        return getattr(module, "Adahessian", None) or module.AdaHessian

    @property
    def original(self) -> type[torch.optim.Optimizer]:
        published = {"official": Official, "davda54": Davda54, "timm": Timm}
        if self.module in published:
            return published[self.module]
        package = pytest.importorskip(self.module)
        return getattr(package, self.drop_in.__name__)

    def ours(self, model: nn.Module, **options: Any) -> AdaHessian:
        return self.drop_in(model.parameters(), **{**SAME, **self.options, **self.ours_only, **options})

    def theirs(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.original(model.parameters(), **{**SAME, **self.options})

    def train_theirs(self, opt: torch.optim.Optimizer, model: nn.Module, steps: range) -> list[Tensor]:
        """Step the original on batches, with the probes of the drop-in; the weights afterwards."""
        seed = self.drop_in([nn.Parameter(torch.ones(1))]).param_groups[0]["seed"]
        ids = {p: i for i, p in enumerate(model.parameters())}
        for i in steps:
            z = lambda p, sample, i=i: probe(p.shape, ids[p], self.h(i), seed, sample)  # noqa: E731
            opt.zero_grad()
            loss_of(model, i).backward(create_graph=True)
            with probes(opt, z, len(ids)):
                opt.step()
            opt.zero_grad()
        return weights(model)


@contextmanager
def probes(opt: torch.optim.Optimizer, z: Callable[[Tensor, int], Tensor], n_params: int) -> Iterator[None]:
    """Let an original draw z(p, sample): the packages call randint_like for one parameter after the other."""
    opt.z, drawn = z, []

    def bits(p: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        drawn.append(p)
        return (z(p, (len(drawn) - 1) // n_params) + 1) / 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint_like", bits)
        yield


# ---- every origin, with options that matter --------------------------------------------------------------------------

STATE_KEYS = {
    "torch_optimizer": {"step", "exp_avg", "exp_hessian_diag_sq"},
    "pytorch_optimizer": {"exp_avg", "exp_hessian_diag_sq"},
    "official": {"step", "exp_avg", "exp_hessian_diag_sq"},
    "davda54": {"step", "hessian step", "exp_avg", "exp_hessian_diag_sq"},
    "timm": {"step", "hessian step", "exp_avg", "exp_hessian_diag_sq"},
}

DROP_INS = {module: Origin(module).drop_in for module in STATE_KEYS}
N = 8  # steps
ORIGINS = {
    "torch_optimizer": Origin("torch_optimizer"),
    "torch_optimizer-k": Origin("torch_optimizer", {"hessian_power": 1.0, "seed": 7}),
    "pytorch_optimizer": Origin("pytorch_optimizer"),
    "pytorch_optimizer-L2": Origin("pytorch_optimizer", {"weight_decouple": False, "hessian_power": 0.5}),
    "pytorch_optimizer-fixed": Origin("pytorch_optimizer", {"fixed_decay": True, "foreach": False}),
    "pytorch_optimizer-up": Origin("pytorch_optimizer", {"maximize": True, "weight_decouple": False, "lr": 1e-3}),
    "pytorch_optimizer-samples": Origin("pytorch_optimizer", {"num_samples": 2}),
    "pytorch_optimizer-period": Origin("pytorch_optimizer", {"update_period": 3}, {"faithful": True}),
    "official": Origin("official"),
    "davda54": Origin("davda54", {"n_samples": 2}),
    "davda54-stale": Origin("davda54", {"update_each": 3}),
    "timm": Origin("timm", {"avg_conv_kernel": True}),
    "timm-stale": Origin("timm", {"update_each": 3, "avg_conv_kernel": True, "n_samples": 2}),
}
every_origin = pytest.mark.parametrize("origin", ORIGINS.values(), ids=ORIGINS)


def conv_net() -> nn.Sequential:
    """Without batch normalisation: a bias before it has g = Hz = 0 but for rounding, and its steps are noise."""
    torch.manual_seed(2)
    layers = nn.Linear(3, 50), nn.Unflatten(1, (2, 5, 5)), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3)
    return nn.Sequential(*layers, nn.Flatten()).double()


def pairs(
    origin: Origin, make: Callable[[], nn.Module] = conv_net
) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
    """A model with the original, and a copy with nothing yet."""
    model = make()
    return model, origin.theirs(model), copy.deepcopy(model)


STEPS = 10  # of a trajectory, or a few less or more


@cache
def grows() -> float:
    """What the optimizer makes of a nudge, for the models here with the options SAME; at most."""
    found = []
    for make, averaging in itertools.product((mlp, conv_net), ("abs", "signed")):
        (a, opt_a), (b, opt_b) = (fresh(make(), **SAME, averaging=averaging) for _ in range(2))
        nudge(a)
        found.append(growth(train(opt_a, a, STEPS), train(opt_b, b, STEPS)))
    assert max(found) < 1e6, "a bound that would allow anything"
    return max(found)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """The same trajectory, up to roundings."""
    assert_trajectory(found, expected, STEPS, grows())


# ---- the originals under the names that scripts import them by ------------------------------------------------------


def stand_in_modules() -> dict[str, ModuleType]:
    """Modules by the names under which scripts import the originals that are not installed."""
    names = {
        "timm": {},
        "timm.optim": {"Adahessian": Timm},
        "optim_adahessian": {"Adahessian": Official},
        "ada_hessian": {"AdaHessian": Davda54},
    }
    modules = {}
    for name, contents in names.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(contents)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
    return modules


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the stand-ins importable."""
    for name, module in stand_in_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
