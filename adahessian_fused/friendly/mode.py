"""The context manager that puts operators with a cheap double backward in the place of PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .batch_norm import batch_norm, torch_batch_norm
from .convolution import convolution
from .embedding_bag import embedding_bag
from .relu import relu, relu_
from .row_norm import group_norm, layer_norm, rms_norm

OPERATORS: dict[Callable, Callable[..., Tensor]] = {
    F.batch_norm: batch_norm,
    torch.batch_norm: torch_batch_norm,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    torch.conv1d: convolution(1),
    torch.conv2d: convolution(2),
    torch.conv3d: convolution(3),
    torch.conv_transpose1d: convolution(1, transposed=True),
    torch.conv_transpose2d: convolution(2, transposed=True),
    torch.conv_transpose3d: convolution(3, transposed=True),
    F.relu: relu,
    F.relu_: relu_,
    torch.relu: relu,
    torch.relu_: relu_,
    Tensor.relu: relu,
    Tensor.relu_: relu_,
    F.embedding_bag: embedding_bag,
}
DEVICES = ("cpu", "cuda")
PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)  # fake ones stand for plain ones while a graph is traced


class curvature_friendly(TorchFunctionMode):  # noqa: N801 - used like a function
    """Inside it, operators have a double backward of a few kernels: what a Hessian-vector product needs.

    Around the forward pass of a step that uses curvature::

        with curvature_friendly():
            loss = loss_fn(model(inputs), targets)
        opt.backward(loss)

    ``opt.step(closure)``, if the closure returns the loss, ``opt.backward(function)`` and ``opt.backward_split`` enter
    it by themselves on such steps.

    * Batch, layer, group and RMS norm, convolutions (also transposed) and ReLU: PyTorch composes their double backward
      of dozens of small operators; here it is one fused kernel for a norm (:mod:`.formulas` has the formula) and three
      convolutions' for a convolution. Forward and first backward are PyTorch's own kernels, with the same results and
      the same running statistics.
    * ``embedding_bag`` gets a double backward, for dense gradients.
    * ``scaled_dot_product_attention`` runs on its math backend; the fused ones cannot be differentiated twice.

    Neither the model nor its state dict changes. Everything else stays PyTorch's: operators without a gradient,
    functorch transforms and forward-mode AD, tensor subclasses, nested, sparse and complex tensors, SyncBatchNorm in a
    process group, and code under ``torch.compile``. Derivatives of every order are right, so a loss may hold gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self._attention = ExitStack()

    def __enter__(self) -> Any:
        self._attention.enter_context(sdpa_kernel(SDPBackend.MATH))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._attention.close()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours = OPERATORS.get(func)
        if ours is None or not _differentiable([*args, *kwargs.values()]):
            return func(*args, **kwargs)
        return ours(*args, **kwargs)


def _differentiable(arguments: list) -> bool:
    """Whether these are ordinary tensors whose operator autograd is about to record."""
    if not torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    return any(t.requires_grad for t in tensors) and all(map(_ordinary, tensors))


def _ordinary(t: Tensor) -> bool:
    plain = type(t) in PLAIN and t.layout is torch.strided and not t.is_nested
    return plain and t.device.type in DEVICES and not t.is_complex() and t.numel() > 0
