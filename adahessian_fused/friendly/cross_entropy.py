"""Cross-entropy of class indices, which over a large vocabulary is most of what a language model does elementwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .operator import Operator, Tensors, by_autograd, call

aten = torch.ops.aten
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@dataclass
class CrossEntropy(Operator):
    r"""The negative logarithm of the softmax p of a row at its class y, summed with weights r (mean, sum, or each row).

    The gradient of a row is :math:`r (p - e_y)`. For a cotangent v the gradients of :math:`\langle v, r (p - e_y)
    \rangle` are :math:`\langle v, p - e_y \rangle` for r and :math:`r p (v - \langle p, v \rangle)` for the row: what
    one pass makes of p. PyTorch goes through log-softmax, a dozen passes over rows as long as the vocabulary.

    The row comes as its log-softmax, of which it is a function alone: like PyTorch, it keeps nothing else.
    """

    reduction: str
    ignore_index: int

    def _options(self, target: Tensor) -> tuple[Any, ...]:
        return target, None, REDUCTIONS[self.reduction], self.ignore_index

    def forward(self, logarithms: Tensor, target: Tensor) -> tuple[Tensor, Tensors]:
        y, count = aten.nll_loss_forward.default(logarithms, *self._options(target))
        return y, (logarithms, target, count)

    def backward(
        self, grad: Tensor, logarithms: Tensor, target: Tensor, count: Tensor, *, mask: Sequence[bool]
    ) -> Tensors:
        g = aten.nll_loss_backward.default(grad, logarithms, *self._options(target), count)
        return (aten._log_softmax_backward_data.default(g, logarithms, 1, g.dtype),)

    def double_backward(
        self,
        cotangents: Tensors,
        grad: Tensor,
        logarithms: Tensor,
        target: Tensor,
        count: Tensor,
        *,
        mask: Sequence[bool],
    ) -> Tensors:
        if torch.is_grad_enabled():
            plain = aten.cross_entropy_loss.default
            function = lambda x: plain(x, *self._options(target))  # noqa: E731
            return by_autograd(function, cotangents[:1], (grad,), (logarithms,), mask)
        wide = torch.promote_types(logarithms.dtype, torch.float32)
        v, p = cotangents[0].to(wide), logarithms.to(wide).exp()
        seen = target != self.ignore_index
        rows = seen / count.clamp(min=1) if self.reduction == "mean" else seen.to(wide)
        d_grad = d_x = None
        if mask[0]:
            of_class = v.gather(1, target.where(seen, 0).unsqueeze(1)).squeeze(1)
            d_grad = (rows * (torch.linalg.vecdot(p, v) - of_class)).to(grad.dtype)
            d_grad = d_grad if self.reduction == "none" else d_grad.sum()
        if mask[1]:
            d_x = aten._softmax_backward_data.default(v, p, 1, wide).mul_((rows * grad).to(wide).unsqueeze(1))
            d_x = d_x.to(logarithms.dtype)
        return d_grad, d_x


class _LogSoftmax(Function):
    """Log-softmax of rows for functions that see no more of a row: the gradient is the row's, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return aten._log_softmax.default(x, 1, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Stand in for torch.nn.functional.cross_entropy; other than of rows and their classes it is PyTorch's."""
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0
    rows = input.dim() == 2 and target.shape == input.shape[:1] and target.dtype == torch.int64
    # Autocast would compute it in float32.
    cast = input.dtype.itemsize == 2 and torch.is_autocast_enabled(input.device.type)
    if cast or not (plain and rows and reduction in REDUCTIONS):
        options = (size_average, ignore_index, reduce, reduction, label_smoothing)
        return F.cross_entropy(input, target, weight, *options)
    return call(CrossEntropy(reduction, ignore_index), _LogSoftmax.apply(input), target)
