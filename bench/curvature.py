"""A loss whose gradient and Hessian-vector product are given tensors, so that only the update is left to time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .problem import Problem


class _Gradient(torch.autograd.Function):
    """The given gradients, whose derivative is the given Hz whatever the probe."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *_params: Tensor) -> tuple[Tensor, ...]:
        ctx.problem = problem
        return tuple(g.detach() for g in problem.grads)

    @staticmethod
    def backward(ctx: Any, *_probe: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[h.detach() for h in ctx.problem.hessians]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, *params: Tensor) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(*params)
        return torch.zeros((), device=problem.device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Gradient.apply(ctx.problem, *ctx.saved_tensors)


def loss_of(problem: Problem, params: list[Tensor]) -> Tensor:
    """Zero, with the problem's gradients and Hessian-vector products behind it."""
    return _Loss.apply(problem, *params)
