"""The double backward of the norms on the best kernels there are: fused ones, or the formulas in plain PyTorch.

Kernels have no derivative, so what is to be differentiated once more is computed by the formulas.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import backends, norm_operators
from . import formulas

Gradients = tuple[Tensor | None, ...]
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Elements of a tensor, or of a head of attention's, that Triton kernels count: in 32 bits, and a little past the end.
MOST = 2**31 - 2**20


def batch_norm(
    v: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor,
    *,
    fixed: bool,
) -> Gradients:
    """Return the gradients of ``grad``, x and weight, as :func:`.formulas.batch_norm_double_backward`.

    Cotangents may be None, which is zero, and the tensors of any dtype and memory format.
    """
    last = CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    layout = last if x.is_contiguous(memory_format=last) else torch.contiguous_format
    like_x = (t.contiguous(memory_format=layout) for t in (_or_zeros(v, x), grad.to(x.dtype), x))
    found = _run("batch_norm_double_backward", *like_x, v_weight, v_bias, weight, mean, invstd, fixed)
    return tuple(map(_like, found, (grad, x, weight)))


def row_norm(
    v: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor,
    *,
    shape: tuple[int, int, int],
    groups: int = 1,
) -> Gradients:
    """Do the same for :func:`.formulas.row_norm_double_backward`; ``shape`` is (rows, channels, pixels) of x."""
    like_x = (t.reshape(shape).contiguous() for t in (_or_zeros(v, x), grad.to(x.dtype), x))
    found = _run("row_norm_double_backward", *like_x, v_weight, v_bias, weight, mean, invstd, groups)
    return tuple(map(_like, found, (grad, x, weight)))


def _run(name: str, v: Tensor, grad: Tensor, x: Tensor, *others: Any) -> Gradients:
    """Call one of the kernels: the numbers of channels and rows flat and in the dtype of arithmetic."""
    *numbers, option = others
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    v_weight, v_bias, weight, mean, invstd = (t if t is None else t.reshape(-1).to(dtype).contiguous() for t in numbers)
    batched = any(torch._C._functorch.is_batchedtensor(t) for t in (v, v_weight, v_bias) if t is not None)
    fused = x.dtype in DTYPES and x.numel() <= MOST and not batched and not torch.is_grad_enabled()
    kernels = _kernels(x.device.type) if fused else formulas
    return getattr(kernels, name)(v, v_weight, v_bias, grad, x, weight, mean, invstd, option)


@functools.cache
def _kernels(device_type: str) -> Any:
    """Return what has the two functions for a kind of device: operators, which can be traced, or the formulas."""
    native = backends.unavailable_reason("native") is None
    if device_type == "cuda" and backends.unavailable_reason("triton", device_type) is None:
        norm_operators.register_triton(native)
    elif device_type != "cpu" or not native:
        return formulas
    ops = getattr(torch.ops, norm_operators.NAMESPACE)
    return SimpleNamespace(**{name: getattr(ops, name).default for name in norm_operators.SCHEMAS})


def _or_zeros(v: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if v is None else v.to(x.dtype)


def _like(result: Tensor, tensor: Tensor | None) -> Tensor | None:
    """Return a result in the shape and dtype of the tensor it is the gradient of."""
    return None if tensor is None else result.reshape(tensor.shape).to(tensor.dtype)
