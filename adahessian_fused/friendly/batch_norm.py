"""Batch norm in training and in eval mode, for any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import double_backward
from .operator import Operator, Tensors, call

aten = torch.ops.aten


@dataclass
class BatchNorm(Operator):
    """PyTorch's own forward and backward kernels, cuDNN's included; the double backward is :mod:`.formulas`."""

    training: bool
    momentum: float
    eps: float
    implementation: int = 0  # which of PyTorch's backends has run the forward

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
    ) -> tuple[Tensor, Tensors]:
        y, mean, invstd, reserve, self.implementation = aten._batch_norm_impl_index.default(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            self.training,
            self.momentum,
            self.eps,
            torch.backends.cudnn.enabled,
        )
        running = (None, None) if self.training else (running_mean, running_var)
        return y, (x, weight, mean, invstd, reserve, *running)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        invstd: Tensor,
        reserve: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *,
        mask: Sequence[bool],
    ) -> Tensors:
        return aten._batch_norm_impl_index_backward.default(
            self.implementation,
            x,
            grad,
            weight,
            running_mean,
            running_var,
            mean,
            invstd,
            self.training,
            self.eps,
            list(mask[:3]),
            reserve,
        )

    def double_backward(
        self,
        cotangents: Tensors,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        invstd: Tensor,
        reserve: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *,
        mask: Sequence[bool],
    ) -> Tensors:
        if not self.training:
            mean, invstd = running_mean, (running_var + self.eps).rsqrt()
        v, v_weight, v_bias = cotangents
        return double_backward.batch_norm(v, v_weight, v_bias, grad, x, weight, mean, invstd, fixed=not self.training)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Stand in for torch.nn.functional.batch_norm."""
    if training:
        F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    return call(BatchNorm(training, momentum, eps), input, weight, bias, running_mean, running_var)


def torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Stand in for torch.batch_norm, which orders its arguments in another way."""
    return call(BatchNorm(training, momentum, eps), input, weight, bias, running_mean, running_var)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Stand in for torch.nn.functional.instance_norm."""
    if use_input_stats:
        F._verify_spatial_size(input.size())  # type: ignore[attr-defined]
    return torch_instance_norm(
        input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, torch.backends.cudnn.enabled
    )


def torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Stand in for torch.instance_norm: batch norm of one example with as many channels as all examples have."""
    examples, channels = input.shape[:2]
    weight, bias, mean, var = (
        None if t is None else t.repeat(examples) for t in (weight, bias, running_mean, running_var)
    )
    flat = input.contiguous().view(1, examples * channels, *input.shape[2:])
    y = call(BatchNorm(use_input_stats, momentum, eps), flat, weight, bias, mean, var)
    for running, found in ((running_mean, mean), (running_var, var)):
        if running is not None and use_input_stats:
            running.copy_(found.view(examples, channels).mean(0))
    return y.view(input.shape)
