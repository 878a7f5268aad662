"""Training loops that call ``loss.backward()`` themselves: optimizers that gather their curvature there."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from . import hvp
from .backward import differentiate_twice

if TYPE_CHECKING:
    from .optimizer import AdaHessian

_hooked: OrderedDict[int, weakref.ref[AdaHessian]] = OrderedDict()
_original = Tensor.backward  # what _backward stands in front of: PyTorch's, or what another library has put there
_installed = False


def hook_backward(opt: AdaHessian) -> BackwardHook:
    """Have every ``loss.backward()`` gather an optimizer's curvature, see :meth:`AdaHessian.hook_backward`."""
    strategy = opt.param_groups[0]["hvp"]
    if strategy != "autograd":
        raise ValueError(
            f'hvp="{strategy}" evaluates the loss itself, which loss.backward() cannot; expected hvp="autograd", or '
            "opt.step(closure) instead of opt.hook_backward()"
        )
    params = {p for group in opt.param_groups for p in group["params"]}
    for number in list(_hooked):
        other = _hooked[number]()
        if other is None or any(p in params for group in other.param_groups for p in group["params"]):
            _hooked.pop(number, None)
    return BackwardHook(opt)


class BackwardHook(RemovableHandle):
    """The hook of one optimizer, until ``remove()`` or the end of a ``with``."""

    def __init__(self, optimizer: AdaHessian) -> None:
        global _original, _installed
        super().__init__(_hooked)
        _hooked[self.id] = weakref.ref(optimizer, lambda _: self.remove())
        if not _installed:
            _original, Tensor.backward, _installed = Tensor.backward, _backward, True  # type: ignore[method-assign]

    def remove(self) -> None:
        """End the hook; the last one gives ``Tensor.backward`` back, unless somebody else has wrapped it since."""
        global _installed
        super().remove()
        if not _hooked and Tensor.backward is _backward:
            Tensor.backward, _installed = _original, False  # type: ignore[method-assign]


@functools.wraps(Tensor.backward)
def _backward(
    self: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    takers = [] if create_graph or inputs is not None else _takers(self)
    if not takers:
        _original(self, gradient, retain_graph, create_graph, inputs)
        return
    for opt in takers:
        opt.coming_step.check_whole_batch()
    differentiate_twice(self, [opt.coming_step for opt in takers], gradient=gradient, retain_graph=bool(retain_graph))


def _takers(loss: Tensor) -> list[AdaHessian]:
    """Return the hooked optimizers that need this loss's curvature."""
    optimizers = [ref() for ref in list(_hooked.values())]
    due = [opt for opt in optimizers if opt is not None and opt.needs_hessian]
    leaves = set(map(id, hvp.explore([loss]).leaves)) if due else set()
    return [opt for opt in due if any(id(p) in leaves for _, p in opt.coming_step.layout.trained())]
