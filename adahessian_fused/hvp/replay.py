"""Evaluating a function again as if for the first time: the same random numbers, and module buffers updated once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ..distributed.sharded import gathering, param_dtype

T = TypeVar("T")


def mean_of(values: list[Any]) -> Any:
    """Average what several evaluations returned: tensors and numbers; of anything else return the first."""
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


def _autocast() -> list[torch.dtype]:
    return [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]


def _put_back(buffers: list[_Buffer]) -> None:
    for buffer in buffers:
        if buffer.module._buffers.get(buffer.name) is not buffer.tensor:
            buffer.module._buffers[buffer.name] = buffer.tensor
    if buffers:
        with torch.no_grad():
            # By way of .data, since a graph may hold them, and autograd does not count what batch normalisation writes.
            torch._foreach_copy_([buffer.tensor.data for buffer in buffers], [buffer.value for buffer in buffers])


class _Draws(TorchDispatchMode):
    """Notices random numbers that this thread draws from the generators that all share."""

    drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.drawn |= torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        return func(*args, **kwargs)


class Replay:
    """Calls functions that draw random numbers and update buffers, all after the first as if it were the first.

    Generators of the CPU and of every CUDA device begin each call in the same state, so dropout masks are the same;
    they are left alone if no numbers are drawn. Buffers (running statistics of batch normalisation, power iterations of
    spectral normalisation) do so, too, and are then updated once. They are those of the modules that the function calls
    in this thread; a module compiled in place (``module.compile()``) is not seen, and its running statistics are
    updated by every call. All of them are copied: autograd does not count what batch normalisation writes.

    Weights that FSDP2 still has gathered from an earlier pass are dropped before a call, so that it sees what has been
    written to its parts since.

    Args:
        watch: where there are other threads, tell this one's random numbers from theirs. Not under forward-mode
            differentiation: PyTorch crashes where a mode passes on an operator without a derivative.

    Attributes:
        precision: the 16-bit dtype that modules computed in, under autocast or FSDP2's policy; None if there was none.
    """

    def __init__(self, *, watch: bool = True) -> None:
        self._watch = watch
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._buffers: list[_Buffer] = []
        self._seen: set[nn.Module] = set()
        self._sharded: list[Any] = []
        self._called = self._drawn = False
        self.precision: torch.dtype | None = None

    def __call__(self, function: Callable[[], T]) -> T:
        """Return what the function returns."""
        if self._called:
            self.rewind()
        self._called, self.precision = True, None
        self._computes_in(_autocast())
        self.forget_gathered()
        # Only where other threads may draw from the same generators does it matter who has; looking takes time.
        others = any(not t.daemon for t in threading.enumerate() if t is not threading.current_thread())
        draws = _Draws() if self._watch and others else None
        thread = threading.get_ident()
        handle = nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: self._see(module, handle) if threading.get_ident() == thread else None
        )
        try:
            with draws or contextlib.nullcontext():
                return function()
        finally:
            handle.remove()
            self._drawn |= self._moved() if draws is None else draws.drawn

    def rewind(self) -> None:
        """Put random numbers and buffers back to what the first call found."""
        if self._drawn:
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state_all(self._cuda)
        _put_back(self._buffers)

    def forget_gathered(self) -> None:
        """Let FSDP2 gather its weights anew."""
        for module in self._sharded:
            module.reshard()

    def _moved(self) -> bool:
        """Tell whether a generator has moved on."""
        now = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        before = [self._cpu, *(self._cuda or now)]
        return not all(map(torch.equal, before, [torch.get_rng_state(), *now]))

    def _see(self, module: nn.Module, handle: RemovableHandle) -> None:
        """Take down the buffers of a module that is about to be called, and of all in it."""
        if torch.compiler.is_compiling():
            return
        self._computes_in(_autocast())
        if module not in self._seen:
            children = [child for child in module.modules() if child not in self._seen]
            self._seen.update(children)
            self._buffers += [
                _Buffer.of(child, name) for child in children for name, b in child._buffers.items() if b is not None
            ]
            sharded = gathering(children)
            for child in sharded:
                child.reshard()
            self._sharded += sharded
        self._computes_in(map(param_dtype, self._sharded))
        if hasattr(module, "_orig_mod"):  # a compiled module would be compiled again for the hook's sake
            handle.remove()

    def _computes_in(self, dtypes: Iterable[torch.dtype | None]) -> None:
        found = [dtype for dtype in (self.precision, *dtypes) if dtype is not None]
        self.precision = max(found, key=lambda dtype: torch.finfo(dtype).eps, default=None)
