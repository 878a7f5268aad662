"""Evaluating a function again as if for the first time: the same random numbers, and module buffers updated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def mean_of(values: list[Any]) -> Any:
    """The mean of what several evaluations returned: tensors and numbers; of anything else the first."""
    if all(isinstance(value, (Tensor, float)) for value in values):
        return sum(values[1:], start=values[0]) / len(values)
    return values[0]


class _Buffer(NamedTuple):
    """A buffer of a module, and a copy of what it held."""

    module: nn.Module
    name: str
    tensor: Tensor
    value: Tensor

    @classmethod
    def of(cls, module: nn.Module, name: str) -> _Buffer:
        tensor = module._buffers[name]
        return cls(module, name, tensor, tensor.detach().clone())


def _put_back(buffers: list[_Buffer]) -> None:
    for buffer in buffers:
        if buffer.module._buffers.get(buffer.name) is not buffer.tensor:
            buffer.module._buffers[buffer.name] = buffer.tensor
    if buffers:
        with torch.no_grad():
            torch._foreach_copy_([buffer.tensor for buffer in buffers], [buffer.value for buffer in buffers])


class _Watch:
    """Takes down the buffers of all modules that are called inside it, before they are."""

    def __init__(self) -> None:
        self.buffers: list[_Buffer] = []
        self.autocast: torch.dtype | None = None
        self._seen: set[nn.Module] = set()

    def __enter__(self) -> _Watch:
        self._handle = nn.modules.module.register_module_forward_pre_hook(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or module in self._seen:
            return
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                self.autocast = torch.get_autocast_dtype(kind)
        for child in module.modules():
            if child not in self._seen:
                self._seen.add(child)
                self.buffers += [_Buffer.of(child, name) for name, _ in child.named_buffers(recurse=False)]
        if hasattr(module, "_orig_mod"):  # a compiled module would be compiled again for the hook's sake
            self._handle.remove()


class Replay:
    """Calls functions that draw random numbers and update buffers, all after the first as if it were the first.

    Generators of the CPU and of every CUDA device begin each call in the same state, so dropout masks are the same. So
    do buffers (running statistics of batch normalisation, power iterations of spectral normalisation), which are then
    updated once. They are those of the modules that the function calls; a module compiled in place
    (``module.compile()``) is not seen, and its running statistics are updated by every call. All of them are copied:
    autograd does not count what batch normalisation writes.

    Attributes:
        autocast: the dtype that modules ran in under autocast, if any.
    """

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._buffers: list[_Buffer] | None = None
        self.autocast: torch.dtype | None = None

    def __call__(self, function: Callable[[], T]) -> T:
        """What the function returns."""
        if self._buffers is None:
            with _Watch() as watch:
                result = function()
            self.autocast, self._buffers = watch.autocast, watch.buffers
            return result
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        _put_back(self._buffers)
        return function()
