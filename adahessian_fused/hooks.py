"""Training loops that call ``loss.backward()`` themselves: optimizers that gather their curvature there."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from typing import Any

from torch import Tensor, distributed
from torch.utils.hooks import RemovableHandle

from . import hvp
from .gathering import GathersCurvature, differentiate

_hooked: OrderedDict[int, weakref.ref[HooksBackward]] = OrderedDict()
_original = Tensor.backward  # what _backward stands in front of: PyTorch's, or what another library has put there
_installed = False


class HooksBackward(GathersCurvature):
    """Optimizer that can have every ``loss.backward()`` gather its curvature."""

    def hook_backward(self) -> BackwardHook:
        """From now on ``loss.backward()`` gathers this optimizer's curvature when it is due, wherever it is called.

        For trainers that call ``loss.backward()`` and ``opt.step()`` themselves. One call is enough, before or after
        the trainer wraps the optimizer::

            opt = AdaHessian(model.parameters(), lr=0.15)
            opt.hook_backward()
            curvature_friendly(model, opt)  # optional: cheap second derivatives, and those of attention

        On steps with curvature, a loss that depends on parameters of this optimizer is differentiated as by
        ``opt.backward(loss)``, once for all optimizers that are hooked. Off-steps, other losses and calls
        with ``create_graph=True`` or ``inputs=...`` stay PyTorch's. What is hooked is ``Tensor.backward``;
        ``torch.autograd.backward`` is not.

        Returns:
            A handle like those of PyTorch's hooks: ``handle.remove()``, or ``with opt.hook_backward(): ...``. The hook
            ends with the optimizer, and when another optimizer of any of its parameters is hooked. Copies of the
            optimizer have none.

        Raises:
            ValueError: ``hvp`` is a strategy that evaluates the loss itself.
        """
        if (wrapped := vars(self).get("_optimizer")) is not None:  # Lightning's wrapper
            return wrapped.hook_backward()
        way = self.param_groups[0]["hvp"]
        if way != "autograd":
            raise ValueError(
                f'hvp="{way}" evaluates the loss itself, which loss.backward() cannot; expected hvp="autograd", or '
                "opt.step(closure) instead of opt.hook_backward()"
            )
        params = {p for group in self.param_groups for p in group["params"]}
        for number in list(_hooked):
            other = _hooked[number]()
            if other is None or any(p in params for group in other.param_groups for p in group["params"]):
                _hooked.pop(number, None)
        return BackwardHook(self)


class BackwardHook(RemovableHandle):
    """The hook of one optimizer, until ``remove()`` or the end of a ``with``."""

    def __init__(self, optimizer: HooksBackward) -> None:
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
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several and any(opt._ranks is None for opt in takers):
        raise RuntimeError(
            f"opt.hook_backward() in one of {distributed.get_world_size()} processes; expected AdaHessian(..., "
            "process_group=...), since curvature, and the gradient that comes with it, would be this process's alone"
        )
    for opt in takers:
        opt._check_whole_batch()
    differentiate(self, takers, gradient=gradient, retain_graph=bool(retain_graph))


def _takers(loss: Tensor) -> list[HooksBackward]:
    """The hooked optimizers that need this loss's curvature."""
    optimizers = [ref() for ref in list(_hooked.values())]
    due = [opt for opt in optimizers if opt is not None and opt.needs_hessian]
    leaves = set(map(id, hvp.explore([loss]).leaves)) if due else set()
    return [opt for opt in due if any(id(p) in leaves for _, p in opt._trained())]
