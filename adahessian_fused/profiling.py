"""Names in torch.profiler's traces for what is not a torch operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.autograd import profiler


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
