"""Closures: run as they are on off-steps, and made to give curvature where it is due."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import zip_longest
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import hvp, sharing
from .evaluation import evaluate_repeatedly
from .friendly.mode import Mode
from .hessian_step import Differentiate
from .looks import note_gradients

if TYPE_CHECKING:
    from .optimizer import AdaHessian


def run(opt: AdaHessian, closure: Callable[[], Any]) -> Any:
    """Call a closure; gradients, and curvature if it is due, are there afterwards.

    Args:
        opt: the optimizer.
        closure: returns the loss, after ``backward()`` or without it.

    Returns:
        What it returned, detached where it was not differentiated.
    """
    if not callable(closure):
        raise TypeError(
            f"closure is of type {type(closure).__name__}; expected a function that returns the loss. For a loss that "
            "is computed already write opt.backward(loss), then opt.step()"
        )
    due, step = opt.needs_hessian, opt.coming_step
    if due and opt.param_groups[0]["hvp"] != "autograd":
        return _evaluate(opt, closure)
    noted = step.before_closure = note_gradients(list(step.layout.params()))
    try:
        with torch.enable_grad():
            if due or sharing.expecting(step):
                with _Friendly(opt.backward) as mode:
                    loss = closure()
                differentiated = mode.called
            else:
                loss, differentiated = closure(), False
        before = step.before_closure
    finally:
        step.before_closure = None
    if differentiated or _are_new(note_gradients(list(step.layout.params())), before):
        return loss
    if loss is None and any(p.grad is not None for p in step.layout.trained()):
        return loss  # Lightning passes a closure that does nothing after manual_backward()
    _check_returned(loss)
    if before is noted:  # no zero_grad() of this optimizer was called by the closure
        opt.zero_grad()
    opt.backward(loss)
    return loss.detach()


class _Friendly(Mode, hvp.InterceptBackward):
    """The mode of cheap second derivatives with backward passes taken over: one mode for both costs half of two."""

    replaced: frozenset[Callable] = Mode.replaced.union((Tensor.backward,))

    def replace(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run what is in the place of one of the functions in ``replaced``."""
        if func is Tensor.backward:
            return self.take(*args, **kwargs)
        return super().replace(func, *args, **kwargs)


def _evaluate(opt: AdaHessian, closure: Callable[[], Any]) -> Any:
    """Have a strategy evaluate the closure, as often as it needs, from gradients that are reset."""
    step, strategy = opt.coming_step, opt.param_groups[0]["hvp"]
    # Finite differences need nothing but the gradients that the closure leaves, so it runs as it is.
    intercepted = strategy == "forward_over_reverse"

    def evaluate(differentiate: Differentiate) -> Any:
        step.evaluation = differentiate
        try:
            with hvp.InterceptBackward(differentiate, always=True) if intercepted else contextlib.nullcontext():
                loss = closure()
        finally:
            step.evaluation = None
        step.check_whole_batch()
        if all(p.grad is None for p in step.layout.trained()):
            _check_returned(loss)
            differentiate(loss)
        return loss.detach() if isinstance(loss, Tensor) else loss

    opt.zero_grad()
    return evaluate_repeatedly(step, evaluate)


def _are_new(now: Any, before: Any) -> bool:
    """Tell whether any gradient is another one than before, or was written to, by what was noted of them."""
    if now[1] == before[1] and all(map(is_, now[0], before[0])):
        return False
    looks = zip_longest(*now, *before)  # the closure may have added a group
    return any(grad is not None and (grad is not old or n != m) for grad, n, old, m in looks)


def _check_returned(loss: Any) -> None:
    """Raise unless a closure that left the gradients alone has returned a loss to differentiate."""
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise RuntimeError(hvp.NO_LOSS.format(type(loss).__name__))
