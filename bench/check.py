"""A result counts only if it is right: one step against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adahessian_fused import AdaHessian
from adahessian_fused.reference import block_mean

from .contestants import LR, Problem, ours

_CHECKED = 1_000_000  # elements of the first tensor that are compared; the reference is slow


def largest_error(step: Callable[[], None], opt: AdaHessian, problem: Problem) -> float:
    """Take one step and compare it with the reference in float64: the largest error in units of its tolerance.

    Averaging blocks that fit into the checked part are compared there; a block that is longer than the checked part
    (the whole tensor) is compared on all of it.
    """
    expected = _expected(problem)
    step.prepare()
    step()
    single = torch.finfo(torch.float32).eps
    worst = 0.0
    for p, (want, slope) in zip(opt.param_groups[0]["params"], expected, strict=True):
        got = p.detach().flatten()[: want.numel()].double()
        # Some ten float32 roundings of numbers of the result's size and the storage's half ulp; and the rounding of the
        # block mean, a few float32 roundings of numbers of the size of |D|, as the denominator passes it on.
        unit = (16 * single + torch.finfo(problem.case.dtype).eps) * (1 + want.abs()) + 8 * single * slope
        worst = max(worst, ((got - want).abs() / unit).max().item())
    return worst


def _expected(problem: Problem) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parameters after one step of the reference in float64, and how much they would move if Ds moved by mean |D|."""
    shortened = Problem.__new__(Problem)
    shortened.case, shortened.device = problem.case, problem.device
    block = problem.case.block
    whole = block == "tensor" or len(problem.start) > 1

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if whole:
            return tensor.double()
        length = min(tensor.numel(), _CHECKED // block * block)
        return tensor[:length].double()

    for name in ("start", "grads", "hessians"):
        setattr(shortened, name, [cut(tensor) for tensor in getattr(problem, name)])
    step, opt = ours(shortened, "reference")
    step.prepare()
    step()
    pairs = zip(opt.param_groups[0]["params"], shortened.hessians, strict=True)
    return [(p.detach().flatten(), _slope(p, h, opt)) for p, h in pairs]


def _slope(p: torch.Tensor, hessian: torch.Tensor, opt: AdaHessian) -> torch.Tensor:
    """How far a parameter moves if Ds moves by the block mean of |Hz|: lr |m| / denom^2 of it."""
    block = opt._entries[id(p)].block
    magnitude = block_mean(hessian.flatten().abs(), block).repeat_interleave(block)[: p.numel()]
    denom = opt.hessian_diag(p).flatten() + opt.param_groups[0]["eps"]
    return LR * p.grad.flatten().abs() / denom**2 * magnitude
