"""Ours and the peers: each takes one optimizer step after another on its own copy of a case's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adahessian_fused import AdaHessian, recipes

from . import cases, compiled
from .curvature import loss_of
from .problem import Problem

LR, WEIGHT_DECAY = 1e-3, 0.01


class Contestant:
    """Something that steps.

    Args:
        step: what is timed.
        prepare: what has to happen before each step, and is not timed.
        params: what it updates, if it claims to compute AdaHessian; compared with the float64 reference.
        watched: whether its operators can be watched by a dispatch mode; compiled code refuses that.
    """

    def __init__(
        self,
        step: Callable[[], Any],
        prepare: Callable[[], None] | None = None,
        params: list[Tensor] | None = None,
        *,
        watched: bool = True,
    ) -> None:
        self.step, self.params, self.watched = step, params, watched
        self.prepare = prepare or (lambda: None)


def ours(problem: Problem, backend: str) -> Contestant:
    """Return a whole optimizer.step() after opt.backward()."""
    case = problem.case
    every = 1 if case.curvature else 2**40  # after the first step off-steps only
    options = {"block_size": case.block, "update_each": every, "state_dtype": case.state_dtype, "seed": 0}
    options |= recipes.published  # of the peers
    return stepping(problem, AdaHessian, backend=backend, **options)


def stepping(problem: Problem, make: type[AdaHessian], **options: Any) -> Contestant:
    """Return the same with any AdaHessian of ours."""
    params = problem.params()
    opt = make(problem.grouped(params), lr=LR, weight_decay=WEIGHT_DECAY, **options)

    def prepare() -> None:
        if not opt.needs_hessian:
            return
        opt.zero_grad()
        opt.backward(loss_of(problem, params))
        for p, g in zip(params, problem.grads, strict=True):
            p.grad = g  # the very tensor that the peers use

    return Contestant(opt.step, prepare, params)


def floor(problem: Problem) -> Contestant:
    """Return the same bytes without arithmetic: a device copy on a GPU, in-place streaming on a CPU.

    Streaming reads p, g, Hz, m, v and writes p, m, v back (off-steps: without Hz and v's way back), as float32 words
    whatever the dtype, so that no conversion slows it down.
    """
    case = problem.case
    if problem.device == "cuda":
        source = torch.empty(case.bytes // 2, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        return Contestant(lambda: target.copy_(source))
    words = max(case.numel * case.dtype.itemsize // 4, 1)
    states = case.numel * case.state_bytes // 4 or 1
    p, g, h = (torch.randn(words) for _ in range(3))
    m, v = torch.randn(states), torch.randn(states)

    def stream() -> None:
        p.add_(g)
        if case.curvature and words <= states:
            m[:words].add_(h)
            m[words:].add_(1.0)
            v.add_(1.0)
        elif case.curvature:  # states of half the parameters' size
            m.add_(h[:states])
            v.add_(h[-states:])
        else:
            torch.add(m, v, out=m)

    return Contestant(stream)


def _torch_optim(name: str, **options: Any) -> Callable[[Problem], Contestant]:
    def make(problem: Problem) -> Contestant:
        optimizer = getattr(torch.optim, name)
        return Contestant(
            optimizer(problem.grouped(problem.params()), lr=LR, weight_decay=WEIGHT_DECAY, **options).step
        )

    return make


def pytorch_optimizer(problem: Problem) -> Contestant:
    """pytorch-optimizer's AdaHessian with its foreach update, the Hessian diagonal given."""
    from pytorch_optimizer import AdaHessian as Theirs

    params = problem.params()
    opt = Theirs(problem.grouped(params), lr=LR, weight_decay=WEIGHT_DECAY, foreach=True)
    hessian_of = dict(zip(params, problem.hessians, strict=True))
    hessians = [hessian_of[p] for group in opt.param_groups for p in group["params"]]
    return Contestant(lambda: opt.step(hessian=hessians))


def torch_optimizer(problem: Problem) -> Contestant:
    """torch-optimizer's Adahessian, its Hessian-vector product replaced by the averaging it does afterwards."""
    from torch_optimizer import Adahessian as Theirs

    def averaged(params: list[Tensor], _grads: list[Tensor]) -> list[Tensor]:
        found = [hessian_of[p] for p in params]
        return [h.abs().mean((2, 3), keepdim=True) if h.dim() == 4 else h.abs() for h in found]

    params = problem.params()
    hessian_of = dict(zip(params, problem.hessians, strict=True))
    opt = Theirs(problem.grouped(params), lr=LR, weight_decay=WEIGHT_DECAY)
    opt.get_trace = averaged
    return Contestant(opt.step)


def reference_compiled(problem: Problem) -> Contestant:
    """Our reference's formulas as one function under torch.compile."""
    params = problem.params()
    step = compiled.make_step(problem, params, lr=LR, weight_decay=WEIGHT_DECAY)
    return Contestant(step, params=params, watched=False)


PEERS: dict[str, Callable[[Problem], Contestant]] = {
    "floor": floor,
    cases.ADAMW: _torch_optim("AdamW", fused=True),
    cases.FOREACH: _torch_optim("AdamW", foreach=True),
    cases.SGD: _torch_optim("SGD", momentum=0.9, fused=True),
    cases.TORCH_OPTIMIZER: torch_optimizer,
    cases.PYTORCH_OPTIMIZER: pytorch_optimizer,
    cases.REFERENCE: lambda problem: ours(problem, "reference"),
    cases.COMPILED: reference_compiled,
}
