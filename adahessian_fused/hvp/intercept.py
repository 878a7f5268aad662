"""Backward passes of others: taken over in closures, and looked at everywhere else."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InterceptBackward(TorchFunctionMode):
    """Inside it, ``loss.backward()`` calls ``backward(loss, gradient, retain_graph)`` instead.

    It is what lets an ordinary closure (zero_grad, backward, return loss) give second-order information. A call with
    ``inputs=...`` goes through unchanged, and one with ``create_graph=True`` too, unless ``always``.
    """

    def __init__(self, backward: Callable[..., Any], *, always: bool = False) -> None:
        super().__init__()
        self._backward, self._always = backward, always
        self.called = False

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.Tensor.backward:
            return func(*args, **kwargs)
        return self.take(*args, **kwargs)

    def take(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Do what ``Tensor.backward`` is asked for."""
        self.called = True
        if inputs is not None or (create_graph and not self._always):
            torch.Tensor.backward(loss, gradient, retain_graph, create_graph, inputs)
        else:
            self._backward(loss, gradient=gradient, retain_graph=bool(retain_graph))


class BackwardObserver:
    """Told about every call of ``torch.autograd.backward``, which ``Tensor.backward`` ends in, while it watches.

    That function is replaced as long as somebody watches.

    Attributes:
        of_graphs: whether it looks at passes with ``create_graph=True`` only.
    """

    of_graphs = False

    def watch(self) -> None:
        """Begin."""
        global _original, _installed
        key = id(self)
        _observers[key] = weakref.ref(self, lambda _, pop=_observers.pop: pop(key, None))  # type: ignore[misc]
        if not _installed or torch.autograd.backward is _pytorchs:
            _original, torch.autograd.backward, _installed = torch.autograd.backward, _backward, True

    def close(self) -> None:
        """End the interception; the last one gives the function back, unless somebody else has wrapped it since."""
        _observers.pop(id(self), None)
        if not _observers:
            _give_back()

    @contextlib.contextmanager
    def around(self, tensors: Any, create_graph: bool) -> Iterator[None]:
        """Surround a pass from these tensors."""
        before = self.before(tensors)
        yield
        self.after(before)

    def before(self, tensors: Any) -> Any:
        """Look before a pass from these tensors; what is returned goes to :meth:`after`."""

    def after(self, before: Any) -> None:
        """Look after a pass that has not failed."""


_observers: dict[int, weakref.ref[BackwardObserver]] = {}  # weakref's own dicts take several times the time
_original = _pytorchs = torch.autograd.backward
_installed = False


def _give_back() -> None:
    global _installed
    if torch.autograd.backward is _backward:
        torch.autograd.backward, _installed = _original, False


@functools.wraps(torch.autograd.backward)
def _backward(
    tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, create_graph: bool = False, *args: Any,
    **kwargs: Any,
) -> None:  # fmt: skip
    if not _observers:  # they are all gone, without a word
        _give_back()
    watching = []
    for ref in list(_observers.values()):  # a copy: other threads begin to watch, too
        observer = ref()
        if observer is not None and (create_graph or not observer.of_graphs):
            watching.append(observer)
    if not watching:
        _original(tensors, grad_tensors, retain_graph, create_graph, *args, **kwargs)
        return
    with contextlib.ExitStack() as stack:
        for observer in watching:
            stack.enter_context(observer.around(tensors, create_graph))
        _original(tensors, grad_tensors, retain_graph, create_graph, *args, **kwargs)
