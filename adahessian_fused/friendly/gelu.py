"""GELU. PyTorch's double backward of it takes two dozen passes and five tensors of its size; ours half of both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Operator, Tensors, by_autograd, call

aten = torch.ops.aten
SMALL = 2**16  # elements, up to which calls of Python cost more than passes over them


class Gelu(Operator):
    r"""y = x Phi(x) with the normal distribution's Phi.

    For a cotangent v of the gradient :math:`g y'(x)` the gradients are :math:`v y'(x)` and :math:`v g y''(x)`, with
    :math:`y''(x) = (2 - x^2) e^{-x^2 / 2} / \sqrt{2 \pi}`.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensors]:
        return aten.gelu.default(x), (x,)

    def backward(self, grad: Tensor, x: Tensor, *, mask: Sequence[bool]) -> Tensors:
        return (aten.gelu_backward.default(grad, x),)

    def double_backward(self, cotangents: Tensors, grad: Tensor, x: Tensor, *, mask: Sequence[bool]) -> Tensors:
        if torch.is_grad_enabled():
            return by_autograd(aten.gelu.default, cotangents, (grad,), (x,), mask)
        (v,) = cotangents
        d_grad = d_x = None
        if mask[1]:
            square = x.square()
            second = torch.mul(square, -0.5).exp_()
            second.mul_(square.sub_(2).mul_(-1 / math.sqrt(2 * math.pi)))
            del square
            d_x = v * second.mul_(grad)
            del second
        if mask[0]:
            d_grad = aten.gelu_backward.default(v, x)
        return d_grad, d_x


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Stand in for torch.nn.functional.gelu; the approximation by tanh is PyTorch's."""
    if approximate != "none" or input.numel() <= SMALL:
        return F.gelu(input, approximate=approximate)
    return call(Gelu(), input)
