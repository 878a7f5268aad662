"""Convolutions of one to three dimensions, transposed or not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Operator, Tensors, call, gradients
from .precision import lower

aten = torch.ops.aten


@dataclass(frozen=True)
class Convolution(Operator):
    r"""y = x * w + b, bilinear in x and w.

    The gradients are :math:`g_x = A(g, w)` and :math:`g_w = B(g, x)`, again bilinear, and the sum of g for b. Since
    :math:`\langle v, A(g, w) \rangle = \langle v * w, g \rangle = \langle w, B(g, v) \rangle`, the gradients of

    .. math:: \langle v_x, A(g, w) \rangle + \langle v_w, B(g, x) \rangle + \langle v_b, \textstyle\sum g \rangle

    are :math:`v_x * w + x * v_w + v_b` for g, :math:`A(g, v_w)` for x and :math:`B(g, v_x)` for w: a convolution of
    the channels of :math:`v_x` and x with those of w and :math:`v_w`, and one backward pass of a convolution of
    :math:`v_x` with :math:`v_w`. (PyTorch computes :math:`B(g, v_x)` as a convolution with a kernel of the size of the
    feature map.)
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            return call(self, x, weight, bias)
        return aten.convolution.default(x, weight, bias, *self._geometry())

    def _geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensors]:
        return self._run(x, weight, bias), (x, weight)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, *, mask: Sequence[bool]) -> Tensors:
        bias_sizes = [grad.shape[1]] if mask[2] else None
        return aten.convolution_backward.default(grad, x, weight, bias_sizes, *self._geometry(), list(mask))

    def double_backward(
        self, cotangents: Tensors, grad: Tensor, x: Tensor, weight: Tensor, *, mask: Sequence[bool]
    ) -> Tensors:
        v_x, v_w, v_b = cotangents
        d_grad = d_x = d_weight = None
        if mask[0] and v_x is not None and v_w is not None and self.groups == 1 and not torch.is_grad_enabled():
            # One convolution of twice as many channels takes less than two, and what adds their results.
            weights = torch.cat((weight, v_w), 0 if self.transposed else 1)
            d_grad = self._run(torch.cat((v_x, x), 1), weights, v_b)
        elif mask[0]:
            if v_x is not None:
                d_grad = self._run(v_x, weight, v_b)
            if v_w is not None:
                term = self._run(x, v_w, v_b if v_x is None else None)
                d_grad = term if d_grad is None else d_grad.add_(term)
            if d_grad is None:
                d_grad = v_b.view(-1, *[1] * (grad.dim() - 2)).expand_as(grad)
        needed = [mask[1] and v_w is not None, mask[2] and v_x is not None, False]
        if any(needed):
            like_x, like_w = (x if v_x is None else v_x), (weight if v_w is None else v_w)
            d_x, d_weight, _ = gradients(self, needed, grad, like_x, like_w)
        return d_grad, d_x, d_weight


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """Return one number for each dimension, from one number or a sequence."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _run(dims: int, x: Tensor, weight: Tensor, bias: Tensor | None, operator: Convolution) -> Tensor:
    x, weight, bias = lower(x, weight, bias)
    if x.dim() == dims + 1:  # no batch
        return call(operator, x.unsqueeze(0), weight, bias).squeeze(0)
    return call(operator, x, weight, bias)


def _convolution(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Stand in for torch.nn.functional.conv1d, conv2d, conv3d."""
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    if padding == "valid":
        padding = 0
    elif isinstance(padding, str):
        if padding != "same" or max(stride) > 1:
            return getattr(F, f"conv{dims}d")(input, weight, bias, stride, padding, dilation, groups)  # raises
        # Zeros that do not divide evenly between the two sides: as PyTorch does it, the odd one is padded first.
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(n % 2 for n in total):
            input = F.pad(input, [side for n in reversed(total) for side in (0, n % 2)])
        padding = [n // 2 for n in total]
    operator = Convolution(stride, _each(padding, dims), dilation, False, (0,) * dims, groups)
    return _run(dims, input, weight, bias, operator)


def _transposed(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Stand in for torch.nn.functional.conv_transpose1d, conv_transpose2d, conv_transpose3d."""
    stride, padding, dilation = (_each(value, dims) for value in (stride, padding, dilation))
    return _run(
        dims, input, weight, bias, Convolution(stride, padding, dilation, True, _each(output_padding, dims), groups)
    )


def convolution(dims: int, transposed: bool = False) -> Callable[..., Tensor]:
    """Return the convolution of this many dimensions, with the signature of torch.nn.functional's."""
    return functools.partial(_transposed if transposed else _convolution, dims)
