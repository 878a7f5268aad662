"""Ways to train a model: first order, other AdaHessians, and ours with every strategy.

Each takes whole steps: zero_grad, forward, backward, Hessian-vector product and update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adahessian_fused import AdaHessian, TrainStep, recipes

from .problems import Problem

LR, BETAS, EPS = 1e-4, (0.9, 0.999), 1e-4
LOW = torch.bfloat16
EACH = 2  # steps with and without curvature take turns


@dataclass(frozen=True)
class Way:
    """One row of the table.

    Attributes:
        name: in the table.
        floor: matrix products of a step with curvature, in first-order steps (HVP by double backward: 3).
        make: from a problem and a fresh model to a function that takes a step, and its optimizer. Ours use curvature
            at every second step.
        fraction: of the batch that curvature comes from.
        exact: False for finite differences and for products in bfloat16.
        package: that has to be installed.
        compiled: takes minutes to start.
        captured: in a CUDA graph.
        second_order: False for the rows everything is compared with.
    """

    name: str
    floor: float
    make: Callable[[Problem, nn.Module], tuple[Callable[[], Any], torch.optim.Optimizer]]
    fraction: float = 1.0
    exact: bool = True
    package: str | None = None
    compiled: bool = False
    captured: bool = False
    second_order: bool = True

    @property
    def alternates(self) -> bool:
        """Whether every second step is one without curvature."""
        return self.name.startswith(("ours", "TrainStep"))

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.package is None or find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed"


def _first_order(optimizer: type, *, compiled: bool = False, **options: Any) -> Callable[..., Any]:
    def make(problem: Problem, model: nn.Module) -> tuple[Callable[[], None], Any]:
        opt = optimizer(model.parameters(), lr=LR, fused=True, **options)
        loss_of = torch.compile(problem.loss) if compiled else problem.loss

        def step() -> None:
            opt.zero_grad()
            loss_of(model, *problem.batch).backward()
            opt.step()

        return step, opt

    return make


def _captured(optimizer: type, **options: Any) -> Callable[..., Any]:
    """Return a whole first-order step as one CUDA graph: what ours, captured, has to be compared with."""

    def make(problem: Problem, model: nn.Module) -> tuple[Callable[[], None], Any]:
        opt = optimizer(model.parameters(), lr=LR, fused=True, **options)
        before = [p.detach().clone() for p in model.parameters()]

        def whole() -> None:
            opt.zero_grad()  # in the capture, gradients get their places in the graph's memory
            problem.loss(model, *problem.batch).backward()
            opt.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                whole()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            whole()
        with torch.no_grad():  # the first replay is checked: from the weights it started with
            torch._foreach_copy_(list(model.parameters()), before)
        return graph.replay, opt

    return make


def _create_graph(optimizer: Callable[[Iterable[Tensor]], Any]) -> Callable[..., Any]:
    """Return what users of the published code write."""

    def make(problem: Problem, model: nn.Module) -> tuple[Callable[[], None], Any]:
        opt = optimizer(model.parameters())

        def step() -> None:
            opt.zero_grad()
            with sdpa_kernel(SDPBackend.MATH):
                loss = problem.loss(model, *problem.batch)
            loss.backward(create_graph=True)
            opt.step()
            opt.zero_grad()

        return step, opt

    return make


def _torch_optimizer(params: Iterable[Tensor]) -> Any:
    from torch_optimizer import Adahessian

    return Adahessian(params, lr=LR, betas=BETAS, eps=EPS)


def _pytorch_optimizer(params: Iterable[Tensor]) -> Any:
    from pytorch_optimizer import AdaHessian as Theirs

    return Theirs(params, lr=LR, betas=BETAS, eps=EPS, foreach=True)


def _plain(params: Iterable[Tensor]) -> Any:
    from examples.plain import PlainAdaHessian

    return PlainAdaHessian(params, lr=LR, betas=BETAS, eps=EPS)


def _ours(model: nn.Module, **options: Any) -> AdaHessian:
    return AdaHessian(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, update_each=EACH, seed=0, **recipes.published, **options
    )


def _closure(*, attention: SDPBackend | None = None, **options: Any) -> Callable[..., Any]:
    def make(problem: Problem, model: nn.Module) -> tuple[Callable[[], Any], AdaHessian]:
        opt = _ours(model, **options)

        def loss() -> Tensor:
            with sdpa_kernel(attention) if attention is not None and opt.needs_hessian else nullcontext():
                return problem.loss(model, *problem.batch)

        return lambda: opt.step(loss), opt

    return make


def _plain_backward(problem: Problem, model: nn.Module) -> tuple[Callable[[], Any], AdaHessian]:
    opt = _ours(model)

    def step() -> None:
        opt.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss = problem.loss(model, *problem.batch)
        opt.backward(loss)
        opt.step()

    return step, opt


def _split(fraction: float, **options: Any) -> Callable[..., Any]:
    def make(problem: Problem, model: nn.Module) -> tuple[Callable[[], Any], AdaHessian]:
        opt = _ours(model, hessian_fraction=fraction, **options)

        def step() -> None:
            opt.zero_grad()
            opt.backward_split(lambda *batch: problem.loss(model, *batch), *problem.batch)
            opt.step()

        return step, opt

    return make


def _train_step(fraction: float = 1.0, hvp_dtype: torch.dtype | None = None, **options: Any) -> Callable[..., Any]:
    def make(problem: Problem, model: nn.Module) -> tuple[Callable[[], Any], AdaHessian]:
        opt = _ours(model, hessian_fraction=fraction, hvp_dtype=hvp_dtype)
        train_step = TrainStep(model, problem.loss_fn, opt, **options)

        def step() -> None:
            with problem.autocast():
                train_step(*problem.batch)

        return step, opt

    return make


SGD, ADAMW = "SGD", "AdamW fused"
WAYS = (
    Way(SGD, 1, _first_order(torch.optim.SGD, momentum=0.9), second_order=False),
    Way(ADAMW, 1, _first_order(torch.optim.AdamW), second_order=False),
    Way(
        "SGD compiled", 1, _first_order(torch.optim.SGD, momentum=0.9, compiled=True), compiled=True, second_order=False
    ),
    Way("AdamW compiled", 1, _first_order(torch.optim.AdamW, compiled=True), compiled=True, second_order=False),
    Way("SGD captured", 1, _captured(torch.optim.SGD, momentum=0.9), captured=True, second_order=False),
    Way("AdamW captured", 1, _captured(torch.optim.AdamW, capturable=True), captured=True, second_order=False),
    Way("torch-optimizer", 3, _create_graph(_torch_optimizer), package="torch_optimizer"),
    Way("pytorch-optimizer", 3, _create_graph(_pytorch_optimizer), package="pytorch_optimizer"),
    Way("plain PyTorch", 3, _create_graph(_plain)),
    Way("ours, backward()", 3, _plain_backward),
    Way("ours, closure", 3, _closure()),
    Way("ours, forward over reverse", 3, _closure(hvp="forward_over_reverse", attention=SDPBackend.MATH)),
    Way("ours, finite difference", 2, _closure(hvp="finite_difference"), exact=False),
    Way("ours, 1/2 of the batch", 2, _split(0.5), fraction=0.5),
    Way("ours, 1/4 of the batch", 1.5, _split(0.25), fraction=0.25),
    Way("TrainStep captured", 3, _train_step(compile=False, cuda_graph=True), captured=True),
    Way(
        "TrainStep captured, 1/4 of the batch",
        1.5,
        _train_step(0.25, compile=False, cuda_graph=True),
        fraction=0.25,
        captured=True,
    ),
    Way("TrainStep", 3, _train_step(), compiled=True),
    Way("TrainStep, 1/4 of the batch", 1.5, _train_step(0.25), fraction=0.25, compiled=True),
    Way("ours, closure, Hz bfloat16", 3, _closure(hvp_dtype=LOW), exact=False),
    Way("ours, 1/4, Hz bfloat16", 1.5, _split(0.25, hvp_dtype=LOW), fraction=0.25, exact=False),
    Way("TrainStep, Hz bfloat16", 3, _train_step(hvp_dtype=LOW), exact=False, compiled=True),
    Way("TrainStep, 1/4, Hz bfloat16", 1.5, _train_step(0.25, LOW), fraction=0.25, exact=False, compiled=True),
)
