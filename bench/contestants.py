"""Ours and the peers, each as a function that takes one optimizer step on its own copy of a case's tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from adahessian_fused import AdaHessian
from adahessian_fused.curvature import Curvature

from .cases import Case

LR = 1e-3


class Problem:
    """Parameters, gradients and Hessian-vector products of a case. Gradients and Hz are shared by all contestants."""

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(case.dtype)

        self.case, self.device = case, device
        self.start = [normal(shape) for shape in case.shapes]
        self.grads = [normal(shape) for shape in case.shapes]
        self.hessians = [normal(shape) for shape in case.shapes]

    def params(self) -> list[Parameter]:
        """Fresh parameters with their gradients."""
        params = [Parameter(p.clone()) for p in self.start]
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g
        return params


def ours(problem: Problem, backend: str) -> tuple[Callable[[], None], AdaHessian]:
    """A whole optimizer.step() with Hz at hand: what is left of a training step after autograd."""
    case, params = problem.case, problem.params()
    every = 1 if case.curvature else 2**40  # after the first step off-steps only
    opt = AdaHessian(params, lr=LR, weight_decay=0.01, block_size=case.block, backend=backend, update_each=every)

    def prepare() -> None:
        """What opt.backward() leaves. The peers are given theirs too."""
        if opt.needs_hessian:
            entries = opt._ensure([(0, p) for p in params])
            opt._curvature = Curvature(opt._tools, seed=0)
            opt._curvature.add(dict(zip(entries, problem.hessians, strict=True)), sample=0, draw=True)

    def step() -> None:
        opt.step()

    step.prepare = prepare
    return step, opt


def floor(problem: Problem) -> Callable[[], None]:
    """The same bytes without arithmetic: in-place streaming on a CPU, a device copy on a GPU."""
    case = problem.case
    if problem.device == "cuda":
        source = torch.empty(case.bytes // 2, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    p, g, h = problem.start[0].clone(), problem.grads[0], problem.hessians[0]
    state = torch.float64 if case.dtype == torch.float64 else torch.float32
    m, v = torch.zeros_like(p, dtype=state), torch.zeros_like(p, dtype=state)

    def stream() -> None:
        p.add_(g)
        if case.curvature:
            m.add_(h)  # reads m and Hz
            v.add_(1.0)
        else:
            torch.add(m, v, out=m)

    return stream


def adamw(problem: Problem, **how: bool) -> Callable[[], None]:
    """torch.optim.AdamW."""
    return torch.optim.AdamW(problem.params(), lr=LR, weight_decay=0.01, **how).step


def pytorch_optimizer(problem: Problem) -> Callable[[], None]:
    """pytorch-optimizer's AdaHessian with its foreach update, the Hessian diagonal given."""
    from pytorch_optimizer import AdaHessian as Theirs

    opt = Theirs(problem.params(), lr=LR, weight_decay=0.01, foreach=True)
    return lambda: opt.step(hessian=problem.hessians)


def torch_optimizer(problem: Problem) -> Callable[[], None]:
    """torch-optimizer's Adahessian, its Hessian-vector product replaced by the averaging it does afterwards."""
    from torch_optimizer import Adahessian as Theirs

    def averaged(_params: list[Tensor], _grads: list[Tensor]) -> list[Tensor]:
        return [h.abs().mean((2, 3), keepdim=True) if h.dim() == 4 else h.abs() for h in problem.hessians]

    opt = Theirs(problem.params(), lr=LR, weight_decay=0.01)
    opt.get_trace = averaged
    return opt.step


PEERS: dict[str, Callable[[Problem], Callable[[], None]]] = {
    "floor": floor,
    "AdamW fused": lambda problem: adamw(problem, fused=True),
    "AdamW foreach": lambda problem: adamw(problem, foreach=True),
    "pytorch-optimizer foreach": pytorch_optimizer,
    "torch-optimizer": torch_optimizer,
}
