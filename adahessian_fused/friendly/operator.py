"""Operators with a double backward of their own: what autograd has to be told about one, once for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Tensors = tuple[Tensor | None, ...]


class Operator(ABC):
    """An operator, its gradient and the gradient of its gradient, as plain functions of tensors.

    With y = f(inputs) and a gradient g of y, ``backward`` is the linear map from g to the gradients of the inputs.
    ``double_backward`` is given cotangents v of these, and differentiates the inner product of v and ``backward(g)``.

    Where gradients are enabled in it, its result is to be differentiated once more (a loss that holds a gradient, say):
    then it has to be made of operators that autograd records, among them :func:`call` and :func:`gradients`.
    """

    @abstractmethod
    def forward(self, *inputs: Tensor | None) -> tuple[Tensor | tuple[Tensor, ...], Tensors]:
        """Return the output, and what the backward passes need: inputs, the output, or numbers computed on the way.

        With several outputs, ``backward`` is given a gradient of each, None for zero, in the place of one.
        """

    @abstractmethod
    def backward(self, grad: Tensor, *saved: Tensor | None, mask: Sequence[bool]) -> Tensors:
        """Return the gradients of the leading inputs; None, or anything, where ``mask`` is false.

        What comes after one for each input is saved for ``double_backward``, after all that ``forward`` saved.
        """

    @abstractmethod
    def double_backward(
        self, cotangents: Tensors, grad: Tensor, *saved: Tensor | None, mask: Sequence[bool]
    ) -> Tensors:
        """Return the gradients of ``grad`` and of the leading saved tensors.

        Args:
            cotangents: one for each gradient that ``backward`` returned; None is zero.
            grad: gradient of the output.
            saved: what ``forward`` saved. Numbers computed on the way have no gradient of their own: whatever depends
                on an input through them is part of that input's gradient.
            mask: whether the gradients of ``grad`` and of each saved tensor are needed.
        """


def call(operator: Operator, *inputs: Tensor | None, inplace: bool = False) -> Any:
    """Run an operator under autograd; ``inplace``: it overwrites its first input."""
    return _Forward.apply(operator, inplace, *inputs)


def gradients(operator: Operator, mask: Sequence[bool], *tensors: Tensor | None) -> Tensors:
    """Run the backward pass of an operator under autograd; None for the inputs that are not in the mask.

    ``tensors``: a gradient for each output, and what its forward pass saved.
    """
    if torch.is_grad_enabled():
        return _Backward.apply(operator, mask, *tensors)
    return _wanted(operator.backward(*tensors, mask=mask), mask)


def by_autograd(
    function: Callable[..., Any], cotangents: Tensors, grads: Tensors, inputs: Tensors, mask: Sequence[bool]
) -> Tensors:
    """Compute the double backward of a function by autograd, which can go on from there.

    Args:
        function: of the inputs, of operators that have derivatives of every order.
        cotangents: as in :meth:`Operator.double_backward`, which this is for.
        grads: likewise, one for each output.
        inputs: likewise, the leading saved tensors.
        mask: likewise.
    """
    # What a tensor was made of is not to be followed: it may have been made of another one of them.
    tensors = [t if t is None else t.view_as(t) for t in (*grads, *inputs)]
    own = tensors[len(grads) :]
    given = [(x, v) for x, v in zip(own, cotangents, strict=True) if v is not None]
    outputs = function(*own)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [(y, g) for y, g in zip(outputs, tensors, strict=False) if g is not None]
    ys, gs = zip(*used, strict=True)
    first = torch.autograd.grad(ys, [x for x, _ in given], gs, create_graph=True)
    needed = [t for t, wanted in zip(tensors, mask, strict=False) if wanted]
    v = [v for _, v in given]
    found = iter(torch.autograd.grad(first, needed, v, create_graph=True, allow_unused=True))
    return tuple(next(found) if wanted else None for _, wanted in zip(tensors, mask, strict=False))


class _Forward(Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, inplace: bool, *inputs: Tensor | None) -> Any:
        output, saved = operator.forward(*inputs)
        if inplace:
            ctx.mark_dirty(inputs[0])
        ctx.operator = operator
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:
        mask = ctx.needs_input_grad[2:]
        none = (None,) * len(mask)
        if all(grad is None for grad in grads):
            return None, None, *none
        grads = gradients(ctx.operator, mask, *map(_in_memory, grads), *ctx.saved_tensors)
        return None, None, *(*grads, *none)[: len(mask)]


class _Backward(Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, mask: Sequence[bool], *tensors: Tensor | None) -> Tensors:
        ctx.operator = operator
        ctx.set_materialize_grads(False)
        grads = operator.backward(*tensors, mask=mask)
        ctx.save_for_backward(*tensors, *grads[len(mask) :])
        return _wanted(grads, mask)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Tensors:
        mask = ctx.needs_input_grad[2:]
        none = (None,) * len(mask)
        if all(v is None for v in cotangents):
            return None, None, *none
        cotangents = tuple(map(_in_memory, cotangents))
        grads = ctx.operator.double_backward(cotangents, *ctx.saved_tensors, mask=mask)
        return None, None, *_wanted((*grads, *none), mask)


def _in_memory(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor that kernels can read: autograd's zeros (of abs and sign, twice) have no memory."""
    return tensor.clone() if tensor is not None and tensor._is_zerotensor() else tensor


def _wanted(grads: Tensors, mask: Sequence[bool]) -> Tensors:
    return tuple(g if wanted else None for g, wanted in zip(grads, mask, strict=False))
