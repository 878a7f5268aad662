"""GELU. PyTorch's double backward of it takes two dozen passes and five tensors of its size; ours half of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
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
            d_x = (
                run(*(t.contiguous() for t in (v, grad, x)))
                if x.device.type == "cpu"
                else gelu_double_backward(v, grad, x)
            )
        if mask[0]:
            d_grad = aten.gelu_backward.default(v, x)
        return d_grad, d_x


def gelu_double_backward(v: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Compute :math:`v g y''(x)` in place of its factors; tensors of one shape and dtype."""
    square = x.square()
    second = torch.mul(square, -0.5).exp_()
    second.mul_(square.sub_(2).mul_(-1 / math.sqrt(2 * math.pi)))
    del square
    return v * second.mul_(grad)


# One pass in the native library. It is an operator, so that compiled graphs on a CPU have its result in the place of v
# and the gradient until the last pass uses it: an eighth of the tensors of a transformer's step. On a GPU the compiler
# merges more.
_library = torch.library.Library("adahessian_fused", "FRAGMENT")
_library.define("gelu_double_backward(Tensor v, Tensor grad, Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("gelu_double_backward", gelu_double_backward, "CompositeExplicitAutograd")
run = torch.ops.adahessian_fused.gelu_double_backward.default


@torch.library.register_fake("adahessian_fused::gelu_double_backward", lib=_library)
def _shape(v: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_vmap("adahessian_fused::gelu_double_backward", lib=_library)
def _batched(info: Any, dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
    several = [
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, dims, strict=True)
    ]
    return run(*(t.contiguous() for t in several)), 0


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Stand in for torch.nn.functional.gelu; the approximation by tanh is PyTorch's."""
    if approximate != "none" or input.numel() <= SMALL:
        return F.gelu(input, approximate=approximate)
    backends.unavailable_reason("native")  # loads the library that has the kernel
    return call(Gelu(), input)
