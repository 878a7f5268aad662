"""ReLU. PyTorch's double backward of it adds a tensor of zeros for the second derivative; ours adds nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .operator import Operator, Tensors, call

aten = torch.ops.aten
SMALL = 2**17  # elements, up to which zeros cost less than calls of Python do


class Relu(Operator):
    r"""y = max(x, 0): the gradient :math:`g \cdot [y > 0]`, and :math:`v \cdot [y > 0]` for its cotangent v."""

    def __init__(self, inplace: bool) -> None:
        self._relu = aten.relu_.default if inplace else aten.relu.default

    def forward(self, x: Tensor) -> tuple[Tensor, Tensors]:
        y = self._relu(x)
        return y, (y,)

    def backward(self, grad: Tensor, y: Tensor, *, mask: Sequence[bool]) -> Tensors:
        return (aten.threshold_backward.default(grad, y, 0),)

    def double_backward(self, cotangents: Tensors, grad: Tensor, y: Tensor, *, mask: Sequence[bool]) -> Tensors:
        return (aten.threshold_backward.default(cotangents[0], y, 0),)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Stand in for torch.nn.functional.relu."""
    if input.numel() <= SMALL and type(input) in (Tensor, torch.nn.Parameter):
        return torch.relu_(input) if inplace else torch.relu(input)
    return call(Relu(inplace), input, inplace=inplace)


def relu_(input: Tensor) -> Tensor:
    """Stand in for torch.relu_."""
    return relu(input, inplace=True)
