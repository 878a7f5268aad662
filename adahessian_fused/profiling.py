"""Names in torch.profiler's traces for what is not a torch operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.autograd import profiler
from torch.optim import Optimizer, optimizer

_EVERYBODYS = [getattr(optimizer, f"_global_optimizer_{when}_hooks", {}) for when in ("pre", "post")]


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
