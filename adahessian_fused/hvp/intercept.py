"""Second-order information from ordinary closures."""

from __future__ import annotations

from collections.abc import Callable
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
        return self._take(*args, **kwargs)

    def _take(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        self.called = True
        if inputs is not None or (create_graph and not self._always):
            torch.Tensor.backward(loss, gradient, retain_graph, create_graph, inputs)
        else:
            self._backward(loss, gradient=gradient, retain_graph=bool(retain_graph))
