"""What surrounds the optimizer's methods: names in torch.profiler's traces, compiled code and autograd kept out.

A small step is mostly calls: each of these is one where PyTorch's own are up to nine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._compile import _disable_dynamo  # as torch.compiler.disable, which imports Dynamo
from torch.autograd import profiler
from torch.optim import Optimizer, optimizer

_EVERYBODYS = [getattr(optimizer, f"_global_optimizer_{when}_hooks", {}) for when in ("pre", "post")]


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have compiled code call a function as it is."""
    disabled = _disable_dynamo(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_dynamo_compiling() or get_eval_frame_callback() is not None
        return (disabled if compiling else function)(*args, **kwargs)

    return wrapper


def without_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have autograd record nothing, as ``torch.no_grad``; for what no compiler looks at."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return wrapper


def profiled(name: str | Callable[[Any], str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make calls appear as a range in torch.profiler, NVTX and ITT traces; free while none of them runs.

    Args:
        name: the range's name, or a function from the call's first argument to it.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not profiler._is_profiler_enabled:  # record_function would take microseconds to find that out
                return function(*args, **kwargs)
            with profiler.record_function(name if isinstance(name, str) else name(args[0])):
                return function(*args, **kwargs)

        return wrapper

    return decorate


def hooked_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an optimizer's ``step`` for hooks and profilers as PyTorch does, and not at all where there are none."""
    watched = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = (*_EVERYBODYS, self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks)
        alone = not any(hooks) and not profiler._is_profiler_enabled
        return (step if alone else watched)(self, *args, **kwargs)

    return wrapper
