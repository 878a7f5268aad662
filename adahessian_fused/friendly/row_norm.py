"""Layer, RMS and group norm: statistics of rows of neighbouring numbers of one sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import double_backward
from .operator import Operator, Tensors, call
from .precision import full

aten = torch.ops.aten


@dataclass(frozen=True)
class LayerNorm(Operator):
    """Rows are all of ``shape``, the trailing dimensions."""

    shape: Sequence[int]
    eps: float

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensors]:
        y, mean, invstd = aten.native_layer_norm.default(x, self.shape, weight, bias, self.eps)
        return y, (x, weight, bias, mean, invstd)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        invstd: Tensor,
        *,
        mask: Sequence[bool],
    ) -> Tensors:
        return aten.native_layer_norm_backward.default(grad, x, self.shape, mean, invstd, weight, bias, list(mask))

    def double_backward(
        self,
        cotangents: Tensors,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        invstd: Tensor,
        *,
        mask: Sequence[bool],
    ) -> Tensors:
        v, v_weight, v_bias = cotangents
        shape = _rows(x, self.shape)
        return double_backward.row_norm(v, v_weight, v_bias, grad, x, weight, mean, invstd, shape=shape)


@dataclass(frozen=True)
class RmsNorm(Operator):
    """Layer norm without mean and bias. Where PyTorch has no kernels for it, its backward pass is ours."""

    shape: Sequence[int]
    eps: float

    @staticmethod
    def _is_fused(x: Tensor, weight: Tensor | None) -> bool:
        """Tell whether PyTorch has kernels: on a GPU, for a weight of the dtype of x."""
        return x.is_cuda and (weight is None or weight.dtype == x.dtype)

    def forward(self, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensors]:
        if self._is_fused(x, weight):
            y, invstd = aten._fused_rms_norm.default(x, self.shape, weight, self.eps)
        else:
            y = torch.rms_norm(x, self.shape, weight, self.eps)
            dims = tuple(range(x.dim() - len(self.shape), x.dim()))
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            invstd = wide.square().mean(dims, keepdim=True).add_(self.eps).rsqrt_()
        return y, (x, weight, invstd)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, invstd: Tensor, *, mask: Sequence[bool]
    ) -> Tensors:
        if self._is_fused(x, weight):
            return aten._fused_rms_norm_backward.default(grad, x, self.shape, invstd, weight, list(mask))
        g, x_hat = grad.to(invstd.dtype), x * invstd
        u = g if weight is None else g * weight
        dims = tuple(range(x.dim() - len(self.shape), x.dim()))
        d_x = invstd * torch.addcmul(u, x_hat, (u * x_hat).mean(dims, keepdim=True), value=-1)
        d_weight = (g * x_hat).sum_to_size(self.shape).to(weight.dtype) if mask[1] else None
        return d_x.to(x.dtype), d_weight

    def double_backward(
        self,
        cotangents: Tensors,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        invstd: Tensor,
        *,
        mask: Sequence[bool],
    ) -> Tensors:
        v, v_weight = cotangents
        return double_backward.row_norm(v, v_weight, None, grad, x, weight, None, invstd, shape=_rows(x, self.shape))


@dataclass(frozen=True)
class GroupNorm(Operator):
    """Rows are the channels of a group with all their pixels."""

    groups: int
    eps: float

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        return x.shape[0], x.shape[1], x[0, 0].numel(), self.groups

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensors]:
        y, mean, invstd = aten.native_group_norm.default(x, weight, bias, *self._sizes(x), self.eps)
        return y, (x, weight, mean, invstd)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        invstd: Tensor,
        *,
        mask: Sequence[bool],
    ) -> Tensors:
        # The kernel takes both in the memory format of x.
        grad = grad.contiguous(memory_format=_format(x))
        # In channels_last it crashes if it has no gradient of x to write to.
        mask = [True, *mask[1:]]
        return aten.native_group_norm_backward.default(grad, x, mean, invstd, weight, *self._sizes(x), mask)

    def double_backward(
        self,
        cotangents: Tensors,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        invstd: Tensor,
        *,
        mask: Sequence[bool],
    ) -> Tensors:
        n, channels, pixels, groups = self._sizes(x)
        shape = n * groups, channels // groups, pixels
        v, v_weight, v_bias = cotangents
        return double_backward.row_norm(v, v_weight, v_bias, grad, x, weight, mean, invstd, shape=shape, groups=groups)


def _rows(x: Tensor, shape: Sequence[int]) -> tuple[int, int, int]:
    """Return x as rows of ``shape``, one weight an element."""
    length = math.prod(shape)
    return x.numel() // length, length, 1


def _format(x: Tensor) -> torch.memory_format:
    """Return the memory format that PyTorch's kernels work in: that of x on a CPU."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]) and not x.is_contiguous()
    return formats[x.dim()] if dense and not x.is_cuda else torch.contiguous_format


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Stand in for torch.nn.functional.layer_norm."""
    return call(LayerNorm(normalized_shape, eps), *full(input, weight, bias))


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Stand in for torch.nn.functional.rms_norm."""
    input, weight = full(input, weight)
    if eps is None:
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    return call(RmsNorm(normalized_shape, eps), input, weight)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Stand in for torch.nn.functional.group_norm."""
    if input.dim() < 2 or input.shape[1] % num_groups or input[0].numel() == num_groups:
        return F.group_norm(input, num_groups, weight, bias, eps)  # raises
    input, weight, bias = full(input, weight, bias)
    return call(GroupNorm(num_groups, eps), input.contiguous(memory_format=_format(input)), weight, bias)
