"""Embedding bags, for which PyTorch has no double backward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Operator, Tensors, call, gradients

aten = torch.ops.aten
SUM, MEAN, MAX = 0, 1, 2
MODES = {"sum": SUM, "mean": MEAN, "max": MAX}


@dataclass
class EmbeddingBag(Operator):
    r"""Output b is the sum, mean or maximum of the rows W[i] of bag b, in a sum each times its weight p.

    A sum is bilinear in p and W: :math:`g_W[i] = \sum p g_b` and :math:`g_p = \langle g_b, W[i] \rangle`. With
    cotangents :math:`v_W, v_p` the gradients are bags again: :math:`\sum (p v_W[i] + v_p W[i])` for :math:`g_b`,
    :math:`g_W` with weights :math:`v_p` for W and :math:`g_p` with rows :math:`v_W` for p. A mean has no p and is
    linear: the mean of :math:`v_W` for :math:`g_b`. A maximum picks from :math:`v_W` the rows it picked from W.
    """

    mode: int
    indices: Tensor
    offsets: Tensor
    include_last_offset: bool
    padding_idx: int

    def _bags(self, weight: Tensor, per_sample_weights: Tensor | None) -> Tensors:
        return aten._embedding_bag.default(
            weight,
            self.indices,
            self.offsets,
            False,
            self.mode,
            False,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )

    def _output(self, weight: Tensor, per_sample_weights: Tensor | None) -> Tensor:
        """Compute the bags alone, under autograd where gradients are enabled."""
        if torch.is_grad_enabled():
            return call(self, weight, per_sample_weights)
        return self._bags(weight, per_sample_weights)[0]

    def forward(self, weight: Tensor, per_sample_weights: Tensor | None) -> tuple[Tensor, Tensors]:
        y, offset2bag, bag_size, maximum_indices = self._bags(weight, per_sample_weights)
        return y, (weight, per_sample_weights, offset2bag, bag_size, maximum_indices)

    def _weight_gradient(
        self,
        grad: Tensor,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        offset2bag: Tensor,
        bag_size: Tensor,
        maximum_indices: Tensor,
    ) -> Tensor:
        return aten._embedding_bag_backward.default(
            grad,
            self.indices,
            self.offsets,
            offset2bag,
            bag_size,
            maximum_indices,
            weight.shape[0],
            False,
            self.mode,
            False,
            per_sample_weights,
            self.padding_idx,
        )

    def _sample_gradient(self, grad: Tensor, weight: Tensor, offset2bag: Tensor) -> Tensor:
        return aten._embedding_bag_per_sample_weights_backward.default(
            grad, weight, self.indices, self.offsets, offset2bag, self.mode, self.padding_idx
        )

    def backward(
        self, grad: Tensor, weight: Tensor, per_sample_weights: Tensor | None, *bags: Tensor, mask: Sequence[bool]
    ) -> Tensors:
        d_weight = self._weight_gradient(grad, weight, per_sample_weights, *bags) if mask[0] else None
        d_samples = self._sample_gradient(grad, weight, bags[0]) if mask[1] else None
        return d_weight, d_samples

    def double_backward(
        self,
        cotangents: Tensors,
        grad: Tensor,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        *bags: Tensor,
        mask: Sequence[bool],
    ) -> Tensors:
        v, v_samples = cotangents
        d_grad = d_weight = d_samples = None
        if v is not None:
            if self.mode == MAX:
                _, bag_size, maximum_indices = bags
                picked = v.gather(0, maximum_indices.clamp_min(0))
                # On CUDA the last offset has a size too.
                d_grad = picked.masked_fill_((bag_size[: len(picked)] == 0).unsqueeze(1), 0)
            else:
                d_grad = self._output(v, per_sample_weights)
            if mask[2]:
                _, d_samples = gradients(self, (False, True), grad, v, per_sample_weights, *bags)
        if v_samples is not None:
            term = self._output(weight, v_samples)
            d_grad = term if d_grad is None else d_grad.add_(term)
            if mask[1]:
                d_weight, _ = gradients(self, (True, False), grad, weight, v_samples, *bags)
        return d_grad, d_weight, d_samples


def embedding_bag(input: Tensor, weight: Tensor, offsets: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Stand in for torch.nn.functional.embedding_bag; what has no dense gradient, or is wrong, goes to it."""
    bound = _SIGNATURE.bind(input, weight, offsets, *args, **kwargs)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    if not _is_ours(given):
        return F.embedding_bag(*bound.args, **bound.kwargs)
    samples, include_last_offset = given.per_sample_weights, given.include_last_offset
    if input.dim() == 2:
        offsets = torch.arange(0, input.numel(), input.shape[1], dtype=input.dtype, device=input.device)
        include_last_offset = False
        input = input.reshape(-1)
        samples = None if samples is None else samples.reshape(-1)
    if given.max_norm is not None:
        F._no_grad_embedding_renorm_(weight, input, given.max_norm, given.norm_type)  # type: ignore[attr-defined]
    padding = -1 if given.padding_idx is None else given.padding_idx % weight.shape[0]
    return call(EmbeddingBag(MODES[given.mode], input, offsets, include_last_offset, padding), weight, samples)


_SIGNATURE = inspect.signature(F.embedding_bag)


def _is_ours(given: SimpleNamespace) -> bool:
    """Tell whether the arguments are right, and the gradient dense and a derivative (not scaled by frequencies)."""
    bags = given.input.dim() == 2 if given.offsets is None else given.input.dim() == given.offsets.dim() == 1
    samples = given.per_sample_weights
    return (
        bags
        and given.weight.dim() == 2
        and given.mode in MODES
        and (samples is None or (given.mode == "sum" and samples.shape == given.input.shape))
        and (given.padding_idx is None or -given.weight.shape[0] <= given.padding_idx < given.weight.shape[0])
        and not (given.sparse or given.scale_grad_by_freq or given.input.is_nested)
        and not given.input.is_floating_point()
    )
