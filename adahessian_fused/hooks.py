"""Training loops that call ``loss.backward()`` themselves: optimizers that gather their curvature there."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.hooks import RemovableHandle

from . import hvp
from .gathering import GathersCurvature

_plain_backward = Tensor.backward
_hooked: OrderedDict[int, weakref.ref[HooksBackward]] = OrderedDict()


class HooksBackward(GathersCurvature):
    """Optimizer that can have every ``loss.backward()`` gather its curvature."""

    def hook_backward(self) -> BackwardHook:
        """From now on ``loss.backward()`` gathers this optimizer's curvature when it is due, wherever it is called.

        For trainers that call ``loss.backward()`` and ``opt.step()`` themselves. One call is enough, before or after
        the trainer wraps the optimizer::

            opt = AdaHessian(model.parameters(), lr=0.15)
            opt.hook_backward()

        On steps with curvature, a loss that depends on parameters of this optimizer is differentiated as by
        ``opt.backward(loss)``; other leaves of its graph get their gradient as ever. Off-steps, other losses and calls
        with ``create_graph=True`` or ``inputs=...`` stay PyTorch's. What is hooked is ``Tensor.backward``;
        ``torch.autograd.backward`` is not.

        Returns:
            A handle like those of PyTorch's hooks: ``handle.remove()``, or ``with opt.hook_backward(): ...``. The hook
            ends with the optimizer, and when another optimizer of any of its parameters is hooked. Copies of the
            optimizer have none.

        Raises:
            ValueError: ``hvp`` is a strategy that evaluates the loss itself.
        """
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
        super().__init__(_hooked)
        _hooked[self.id] = weakref.ref(optimizer, lambda _: self.remove())
        Tensor.backward = _backward

    def remove(self) -> None:
        """End the hook; the last one gives ``Tensor.backward`` back."""
        super().remove()
        if not _hooked and Tensor.backward is _backward:
            Tensor.backward = _plain_backward


@functools.wraps(_plain_backward)
def _backward(
    self: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    rest, takers = {}, []
    if not create_graph and inputs is None:
        due = [opt for ref in list(_hooked.values()) if (opt := ref()) is not None and opt.needs_hessian]
        rest = {id(leaf): leaf for leaf in hvp.leaves(self)} if due else {}
        takers = [opt for opt in due if [rest.pop(id(p)) for _, p in opt._trained() if id(p) in rest]]
    if not takers:
        _plain_backward(self, gradient, retain_graph, create_graph, inputs)
        return
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"opt.hook_backward() in one of {distributed.get_world_size()} processes; expected a single one, since the "
            "curvature, and the gradient that comes with it, would be this process's alone"
        )
    if rest:
        torch.autograd.backward(self, gradient, retain_graph=True, inputs=list(rest.values()))
    for opt in takers:
        opt.backward(self, gradient=gradient, retain_graph=bool(retain_graph) or opt is not takers[-1])
