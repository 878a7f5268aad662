"""The update as a good engineer would write it without kernels: plain operators in one graph under torch.compile."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from adahessian_fused.reference import rademacher_signs

from .problem import Problem

BETA1, BETA2, EPS = 0.9, 0.999, 1e-4  # AdaHessian's defaults
COMPILE_SECONDS = 90
MOST_TENSORS = 200  # the compiler takes minutes for longer lists


class SkippedError(Exception):
    """A contestant that cannot take part; the message says why."""


def _spread_mean(d: Tensor, block: int) -> Tensor:
    """Block means (Eq. 7) at every element; the last block may be shorter."""
    if block == 1:
        return d
    flat, whole = d.flatten(), d.numel() // block * block
    parts = [flat[:whole].view(-1, block).mean(1, keepdim=True).expand(-1, block).reshape(-1)]
    if whole < flat.numel():
        parts.append(flat[whole:].mean().expand(flat.numel() - whole))
    return torch.cat(parts).view_as(d) if len(parts) > 1 else parts[0].view_as(d)


def _update(
    p: Tensor,
    g: Tensor,
    hessian: Tensor | None,
    z: Tensor | None,
    m: Tensor,
    v: Tensor,
    block: int,
    step_size: Tensor,
    inv_sqrt_bias2: Tensor,
    decay: float,
) -> None:
    """Eq. 7-9, in place."""
    m.lerp_(g.float(), 1 - BETA1)
    if hessian is not None:
        d = _spread_mean(hessian.float() if z is None else hessian.float() * z, block)
        v.mul_(BETA2).addcmul_(d, d, value=1 - BETA2)
    denom = v.sqrt() * inv_sqrt_bias2 + EPS
    p.copy_(p.float() * decay - step_size * (m / denom))


def _update_all(*lists: Sequence[object], **scalars: object) -> None:
    """All tensors in one graph."""
    for tensors in zip(*lists, strict=True):
        _update(*tensors, **scalars)


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise :class:`SkippedError` in the main thread after some seconds, where the system has alarms."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise SkippedError(f"compiling took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make_step(problem: Problem, params: list[Tensor], *, lr: float, weight_decay: float) -> Callable[[], None]:
    """Return the compiled step on the problem's tensors.

    The probe is at hand, as autograd's user has it. The first call takes a step like every other; it compiles, and is
    what the time limit is for.

    Raises:
        SkippedError: it cannot be compiled here, or not in time.
    """
    case = problem.case
    if len(params) > MOST_TENSORS:
        raise SkippedError(f"{len(params)} tensors; compiled up to {MOST_TENSORS}")
    blocks = [case.block_length(p.shape) for p in params]
    zero = torch.zeros((), dtype=torch.int64, device=problem.device)
    probes = [
        rademacher_signs(p.numel(), i, zero, 0, 0).view_as(p).to(p.dtype) if block > 1 else None
        for i, (p, block) in enumerate(zip(params, blocks, strict=True))
    ]
    m, v = ([torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in params] for _ in range(2))
    step_size, inv_sqrt_bias2 = (torch.zeros((), device=problem.device) for _ in range(2))
    nothing = [None] * len(params)
    update, t, h = torch.compile(_update_all, fullgraph=True), 0, 0

    @torch.no_grad()
    def step() -> None:
        nonlocal t, h
        fresh = case.curvature or t == 0
        t, h = t + 1, h + fresh
        step_size.fill_(lr / (1 - BETA1**t))
        inv_sqrt_bias2.fill_((1 - BETA2**h) ** -0.5)
        second = (problem.hessians, probes) if fresh else (nothing, nothing)
        scalars = {"step_size": step_size, "inv_sqrt_bias2": inv_sqrt_bias2, "decay": 1 - lr * weight_decay}
        update(params, problem.grads, *second, m, v, blocks, **scalars)

    def limited() -> None:
        if t >= 2:
            return step()
        try:
            with _time_limit(COMPILE_SECONDS):
                step()
        except torch._dynamo.exc.TorchDynamoException as error:
            raise SkippedError(f"torch.compile failed: {str(error).splitlines()[0]}") from error

    return limited
