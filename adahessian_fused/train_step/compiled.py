"""A function of tensors, traced and compiled by TorchInductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Compiled:
    """Forward pass, backward pass and double backward as one graph of operators.

    The function is traced below autograd, with tensors that have no data, and so runs once only, without effect on
    buffers or random numbers. torch.compile of the function itself would have to capture the calls of autograd, and
    cannot differentiate twice through a model it has compiled.

    Args:
        function: what to compile; it may write to its inputs.
        tensors: its inputs.

    Raises:
        Exception: whatever the model, make_fx or TorchInductor object to.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        with torch.no_grad():
            self._function = torch._inductor.compile(graph, list(tensors))

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Run with other inputs of the same shapes and strides."""
        with torch.no_grad():
            return self._function(*tensors)
