"""The optimizers that are compared, with the settings of the paper's CIFAR-10 experiments."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from plain import PlainAdaHessian
from torch import Tensor, nn

from adahessian_fused import AdaHessian, TrainStep, curvature_friendly, recipes

# Cost of AdaHessian relative to SGD: the paper's Table 6 (RTX Titan, CIFAR-10), by Hutchinson frequency.
PAPER_COST = {
    "resnet20": {1: 2.42, 2: 1.71, 3: 1.47, 4: 1.36, 5: 1.28},
    "resnet32": {1: 3.23, 2: 2.12, 3: 1.74, 4: 1.56, 5: 1.45},
}


@dataclass(frozen=True)
class Settings:
    """Hyperparameters; the defaults are the published ones. ``weight_decay`` is that of SGD (see :func:`decoupled`)."""

    lr_sgd: float = 0.1
    lr_adamw: float = 0.01
    lr_adahessian: float = 0.15
    weight_decay: float = 5e-4
    seed: int = 0


@dataclass(frozen=True)
class Contestant:
    """One optimizer and how to use it.

    Attributes:
        name: as on the command line.
        label: as in tables and figures.
        frequency: Hutchinson frequency, steps per Hessian step; 0 for first-order optimizers.
        make: parameters and settings to an optimizer.
        differentiate: what stands in the place of ``loss.backward()``.
        told: whether the model is told that it will be differentiated twice.
        compiled: whether a TrainStep makes the steps.
        options: of AdaHessian, beside the published ones.
        start: steps before the cost repeats itself.
    """

    name: str
    label: str
    frequency: int
    make: Callable[[Iterable[Tensor], Settings], torch.optim.Optimizer]
    differentiate: Callable[[torch.optim.Optimizer, Tensor], None]
    told: bool = False
    compiled: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0

    @property
    def period(self) -> int:
        """Steps after which the cost repeats itself."""
        return max(self.frequency, 1)


def decoupled(weight_decay: float, lr: float) -> float:
    """Follow the official repository's rule: decoupled decay multiplies by lr, so divide by it to decay as SGD does."""
    return weight_decay / lr


def make_sgd(params: Iterable[Tensor], s: Settings) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(params, lr=s.lr_sgd, momentum=0.9, weight_decay=s.weight_decay)


def make_adamw(params: Iterable[Tensor], s: Settings) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(params, lr=s.lr_adamw, weight_decay=decoupled(s.weight_decay, s.lr_adamw))


def make_plain(params: Iterable[Tensor], s: Settings) -> torch.optim.Optimizer:
    """AdaHessian as in the published implementations."""
    decay = decoupled(s.weight_decay, s.lr_adahessian)
    return PlainAdaHessian(params, lr=s.lr_adahessian, betas=(0.9, 0.999), eps=1e-4, weight_decay=decay)


def make_ours(
    params: Iterable[Tensor], s: Settings, *, backend: str = "auto", frequency: int = 1, **options: Any
) -> AdaHessian:
    """Return this package's AdaHessian."""
    return AdaHessian(
        params,
        lr=s.lr_adahessian,
        betas=(0.9, 0.999),
        eps=1e-4,
        weight_decay=decoupled(s.weight_decay, s.lr_adahessian),
        hessian_power=1.0,
        block_size="auto",
        update_each=frequency,
        seed=s.seed,
        backend=backend,
        **{**recipes.published, **options},
    )


def first_order_backward(_: torch.optim.Optimizer, loss: Tensor) -> None:
    """Return what every first-order optimizer needs."""
    loss.backward()


def graph_backward(_: torch.optim.Optimizer, loss: Tensor) -> None:
    """Return what AdaHessian users write today; PyTorch warns about the reference cycle, which zero_grad() breaks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*create_graph=True.*")
        loss.backward(create_graph=True)


def our_backward(opt: AdaHessian, loss: Tensor) -> None:
    """Let the optimizer differentiate, to second order when it is time for that."""
    opt.backward(loss)


def fused(frequency: int) -> Contestant:
    """Ours on the best backend there is."""
    name = "fused" if frequency == 1 else f"fused{frequency}"
    label = "AdaHessian, fused" if frequency == 1 else f"AdaHessian, fused, Hessian every {frequency} steps"
    make = partial(make_ours, frequency=frequency)
    return Contestant(name, label, frequency, make, our_backward, told=True)


def compiled() -> Contestant:
    """Ours with forward pass and both differentiations as one compiled function; the first step compiles it."""
    return Contestant("compiled", "AdaHessian, TrainStep", 1, make_ours, our_backward, told=True, compiled=True)


def cheap() -> Contestant:
    """Ours at little more than the price of first order."""
    options = {name: value for name, value in recipes.cheap.items() if name != "update_each"}
    every, start, label = recipes.cheap["update_each"], options["dense_steps"], "AdaHessian, fused, cheap"
    make = partial(make_ours, frequency=every, **options)
    return Contestant("cheap", label, every, make, our_backward, told=True, options=options, start=start)


def reference(*, told: bool = False, compiled: bool = False, **options: Any) -> Contestant:
    """Ours in plain PyTorch, as the specification has it."""
    make = partial(make_ours, backend="reference", **options)
    return Contestant("reference", "AdaHessian, reference", 1, make, graph_backward, told=told, compiled=compiled)


CONTESTANTS = {
    c.name: c
    for c in (
        Contestant("sgd", "SGD, momentum 0.9", 0, make_sgd, first_order_backward),
        Contestant("adamw", "AdamW", 0, make_adamw, first_order_backward),
        Contestant("plain", "AdaHessian, plain PyTorch", 1, make_plain, graph_backward),
        reference(),
        *(fused(frequency) for frequency in range(1, 6)),
        compiled(),
        cheap(),
    )
}
DEFAULT = ("sgd", "adamw", "plain", "fused", "compiled", "cheap")


class Run:
    """A model of its own and the contestant that trains it; ``compile`` is TrainStep's."""

    def __init__(self, contestant: Contestant, model: nn.Module, settings: Settings, *, compile: bool = True) -> None:
        self.contestant = contestant
        self.model = copy.deepcopy(model)
        self.optimizer = contestant.make(self.model.parameters(), settings)
        if contestant.told:
            curvature_friendly(self.model, self.optimizer)
        self.train_step: TrainStep | None = None
        if contestant.compiled:
            self.train_step = TrainStep(self.model, F.cross_entropy, self.optimizer, compile=compile)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One training step; returns the loss before it."""
        if self.train_step is not None:
            return self.train_step(x, y)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        self.contestant.differentiate(self.optimizer, loss)
        self.optimizer.step()
        return loss.detach()
