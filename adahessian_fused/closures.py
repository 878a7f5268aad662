"""Closures: ordinary ones, and what they become when curvature is due."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import hvp
from .evaluation import Differentiate
from .friendly import curvature_friendly
from .hooks import HooksBackward


class TakesClosures(HooksBackward):
    """Optimizer whose step may be given a closure that returns the loss, with or without ``backward()``."""

    def _reset(self) -> None:
        super()._reset()
        self._grads_before: list[tuple[Tensor | None, int]] | None = None

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """Call the closure and make sure gradients, and curvature if it is due, are there afterwards."""
        if self.needs_hessian and self.param_groups[0]["hvp"] != "autograd":
            return self._evaluate_closure(closure)
        before = self._grads_before = self._grad_versions()
        try:
            with torch.enable_grad():
                if self.needs_hessian:
                    with curvature_friendly(), hvp.InterceptBackward(self.backward) as mode:
                        loss = closure()
                    differentiated = mode.called
                else:
                    loss, differentiated = closure(), False
            before = self._grads_before
        finally:
            self._grads_before = None
        changed = any(
            grad is not None and (grad is not old or version != old_version)
            for (grad, version), (old, old_version) in zip(self._grad_versions(), before, strict=True)
        )
        if differentiated or changed:
            return loss
        if loss is None and any(p.grad is not None for _, p in self._trained()):
            return loss  # Lightning passes a closure that does nothing after manual_backward()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise RuntimeError(hvp.NO_LOSS.format(type(loss).__name__))
        del before
        self.zero_grad()
        self.backward(loss)
        return loss.detach()

    def _evaluate_closure(self, closure: Callable[[], Any]) -> Any:
        """The same by a strategy that evaluates the closure itself, from gradients that are reset."""

        def evaluate(differentiate: Differentiate) -> Any:
            self._inside = differentiate
            try:
                with hvp.InterceptBackward(differentiate, always=True) if intercepted else contextlib.nullcontext():
                    loss = closure()
            finally:
                self._inside = None
            self._check_whole_batch()
            if all(p.grad is None for _, p in self._trained()):
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    raise RuntimeError(hvp.NO_LOSS.format(type(loss).__name__))
                differentiate(loss)
            return loss.detach() if isinstance(loss, Tensor) else loss

        # Finite differences need nothing but the gradients that the closure leaves, so it runs as it is.
        intercepted = self.param_groups[0]["hvp"] == "forward_over_reverse"
        self.zero_grad()
        return self._repeat(evaluate, dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and drop curvature that was gathered with them."""
        self._forget()
        if self._ranks is not None:
            self._ranks.reset()
        super().zero_grad(set_to_none)
        if not set_to_none:
            self._leave()
        if self._grads_before is not None:  # called by a closure: zeros are not what its backward() leaves
            self._grads_before = self._grad_versions()

    def _grad_versions(self) -> list[tuple[Tensor | None, int]]:
        """All gradients and how often each has been written to."""
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        return [(grad, -1 if grad is None else grad._version) for grad in grads]
