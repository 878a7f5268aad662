"""A result counts only if it is right: one step against the float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adahessian_fused.reference import block_mean, rademacher_signs

from .contestants import LR, Contestant, ours
from .problem import Problem

CHECKED = 1_000_000  # elements of a single tensor that are compared; the reference is slow
EPS = 1e-4  # AdaHessian's default


class Expected:
    """What the first step of a problem leads to.

    Averaging blocks that fit into the first million elements of a single tensor are compared there; a block that is
    longer is compared on all of it, as are lists.
    """

    def __init__(self, problem: Problem) -> None:
        small = _shortened(problem)
        contestant = ours(small, "reference")
        contestant.prepare()
        contestant.step()
        self._dtype = problem.case.dtype
        self._want = [p.detach().flatten() for p in contestant.params]
        self._slope = [_slope(small, i) for i in range(len(small.start))]

    def largest_error(self, params: Sequence[Tensor]) -> float:
        """Return the largest error of parameters after one step, in units of its tolerance."""
        single, worst = torch.finfo(torch.float32).eps, 0.0
        for p, want, slope in zip(params, self._want, self._slope, strict=True):
            got = p.detach().flatten()[: want.numel()].double()
            # Some ten float32 roundings of numbers of the result's size and the storage's half ulp; and the rounding of
            # the block mean, a few float32 roundings of numbers of the size of |D|, as the denominator passes it on.
            unit = (16 * single + torch.finfo(self._dtype).eps) * (1 + want.abs()) + 8 * single * slope
            error = ((got - want).abs() / unit).max().item() if got.numel() else 0.0
            worst = max(worst, error if error == error else float("inf"))  # a NaN is wrong too
        return worst


def first_step(contestant: Contestant, expected: Expected) -> float:
    """Take the first step; how far off it is, 0 for a contestant that does not claim to compute AdaHessian."""
    contestant.prepare()
    contestant.step()
    return 0.0 if contestant.params is None else expected.largest_error(contestant.params)


def _shortened(problem: Problem) -> Problem:
    """Return the problem in float64, of a single large tensor the first blocks only."""
    case, tensors = problem.case, (problem.start, problem.grads, problem.hessians)
    small = Problem.__new__(Problem)
    small.device = problem.device
    if len(case.shapes) > 1 or case.block in ("auto", "tensor"):
        small.case = replace(case, dtype=torch.float64, state_dtype=None, shift=0)
        small.start, small.grads, small.hessians = ([x.double() for x in each] for each in tensors)
        return small
    block = case.block_length(case.shapes[0])
    length = min(case.numel, max(CHECKED // block, 1) * block)
    small.case = replace(case, dtype=torch.float64, state_dtype=None, shift=0, shapes=((length,),), block=block)
    small.start, small.grads, small.hessians = ([x[0].flatten()[:length].double()] for x in tensors)
    return small


def _slope(problem: Problem, number: int) -> Tensor:
    """How far a parameter moves if Ds moves by the block mean of |Hz|: lr |m| / denom^2 of it, at the first step."""
    shape = problem.case.shapes[number]
    block = problem.case.block_length(shape)
    if block == 1 or not problem.start[number].numel():
        return torch.zeros((), device=problem.device)
    hessian, grad = problem.hessians[number].flatten(), problem.grads[number].flatten()

    def spread(means: Tensor) -> Tensor:
        return means.repeat_interleave(block)[: hessian.numel()]

    zero = torch.zeros((), dtype=torch.int64, device=problem.device)
    signs = rademacher_signs(hessian.numel(), number, zero, 0, 0)
    denom = spread(block_mean(hessian * signs, block)).abs() + EPS
    return LR * grad.abs() / denom**2 * spread(block_mean(hessian.abs(), block))
