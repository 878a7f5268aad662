"""Training loops that call ``loss.backward()`` themselves: optimizers that gather their curvature there."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from . import hvp, sharing
from .backward import differentiate_once, differentiate_twice

if TYPE_CHECKING:
    from .hessian_step import HessianStep
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
    ours = not create_graph and inputs is None
    hooked = [opt for opt in (ref() for ref in list(_hooked.values() if ours else ())) if opt is not None]
    steps, others = _takers(self, [opt.coming_step for opt in hooked])
    options: dict[str, Any] = {"gradient": gradient, "retain_graph": bool(retain_graph)}
    due = [step for step in steps if step.is_due]
    if due or others:
        for step in due:
            step.check_whole_batch()
        differentiate_twice(self, steps, [*due, *others], **options)
    elif any(step.averages_itself for step in steps):
        differentiate_once(self, steps, **options, by_ddp=True)
    else:
        _original(self, gradient, retain_graph, create_graph, inputs)


def _takers(loss: Tensor, hooked: Sequence[HessianStep]) -> tuple[list[HessianStep], list[HessianStep]]:
    """Return the steps of hooked optimizers that this loss concerns, and those of others that it gives curvature to.

    None where PyTorch's own backward pass does all there is to do.
    """
    if not hooked or not (any(step.is_due or step.averages_itself for step in hooked) or sharing.awaiting(hooked)):
        return [], []
    leaves = hvp.explore([loss]).leaves
    reached = set(map(id, leaves))
    return [step for step in hooked if step.concerns(reached)], sharing.joining(hooked, leaves)
