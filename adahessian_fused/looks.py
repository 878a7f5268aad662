"""What tensors are like: whether they still are what they were, and where they are.

With the native library from C, which takes a tenth of the time; without it, or with a torch that does not tell C, in
Python, where nobody asks for addresses.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor

# map() over these is several times faster than a loop, and there are thousands of parameters.
_LOOKS: tuple[Callable[[Tensor], Any], ...] = (Tensor.data_ptr, Tensor.stride, Tensor.numel, attrgetter("dtype"))


class PythonLooks:
    """The looks of some tensors, as they are now.

    Args:
        tensors: the tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._then = tuple(list(map(look, tensors)) for look in _LOOKS)

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether tensors look like these; never of empty ones, whose address tells nothing."""
        if 0 in self._then[0]:
            return False
        return all(all(map(eq, map(look, tensors), then)) for look, then in zip(_LOOKS, self._then, strict=True))

    def addresses(self, tensors: Sequence[Tensor], table: int, columns: int, column: int) -> bool:
        """Tell that addresses are not to be had."""
        return False

    def gradients(self, tensors: Sequence[Tensor], known: Sequence[Tensor]) -> None:
        """Tell that they are to be looked for one by one."""


def _holds(states: Mapping[Any, dict[str, Any]], dicts: Sequence[Any], objects: Sequence[Any]) -> bool:
    now = states.values()
    return (
        len(now) == len(dicts)
        and sum(map(len, now)) == len(objects)
        and all(map(is_, now, dicts))
        and all(map(is_, chain.from_iterable(map(dict.values, now)), objects))
    )


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written to; -2 where torch does not count, in inference mode."""
    return -2 if tensor.is_inference() else tensor._version


def _note_gradients(params: Sequence[Tensor]) -> tuple[list[Any], list[int]]:
    grads = [p.grad for p in params]
    references = [None if grad is None else weakref.ref(grad) for grad in grads]
    return references, [-1 if grad is None else version_of(grad) for grad in grads]


@functools.cache
def _c() -> Any:
    """Return the module that does all this in C; None if there is none, or torch does not tell it."""
    try:
        from . import _native  # noqa: F401  looks whether what is there is whole
        from . import _C  # type: ignore[attr-defined]  # isort: skip

        _C.Looks([torch.zeros(1, device="cpu")])
        return _C
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None


def looks_of(tensors: Sequence[Tensor]) -> Any:
    """Return the looks of tensors, as they are now."""
    with contextlib.suppress(ValueError, AttributeError):  # subclasses of torch.Tensor; no module
        return _c().Looks(list(tensors))
    return PythonLooks(tensors)


def holds(states: dict[Any, dict[str, Any]], dicts: list[dict[str, Any]], objects: list[Any]) -> bool:
    """Tell whether a dict of dicts has these dicts as values, and they these objects, in this order."""
    return (_holds if _c() is None else _c().holds)(states, dicts, objects)


def requires_grad(tensors: Iterable[Tensor]) -> bool:
    """Tell whether autograd follows any of some tensors."""
    found = _c()
    return any(map(attrgetter("requires_grad"), tensors)) if found is None else found.requires_grad(list(tensors))


def note_gradients(params: Sequence[Tensor]) -> tuple[list[Callable[[], Tensor | None] | None], list[int]]:
    """Return weak references to the gradients of tensors, None where there is none, and their versions or -1."""
    return (_note_gradients if _c() is None else _c().note_gradients)(params)


def count(steps: Tensor, columns: int) -> None:
    """Add one to the first columns of a contiguous int64 table on a CPU."""
    if _c() is None:
        steps[:, :columns].add_(1)
    else:
        _c().count(steps.data_ptr(), *steps.shape, columns)


def any_counted(counts: Tensor) -> bool:
    """Tell whether any of contiguous int64 numbers is not zero; a GPU is waited for."""
    if _c() is None or counts.device.type != "cpu":
        return bool(counts.any())
    return _c().any(counts.data_ptr(), counts.numel())
