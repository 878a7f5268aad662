"""Scaled dot-product attention: PyTorch's fused kernels, with the double backward that they lack."""

from __future__ import annotations

import math
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import warn
from . import attention_double_backward, attention_dropout
from .operator import Operator, Tensors, by_autograd, call
from .precision import lower

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

aten = torch.ops.aten
FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
ALIGNMENT = 8  # of heads in the flash kernel, and of a mask's rows in the other


def is_causal_bias(mask: object) -> TypeGuard[CausalBias]:
    """Tell whether this is PyTorch's CausalBias: by name, since who imports its module imports all of torch._dynamo."""
    return type(mask).__module__ == "torch.nn.attention.bias"


@dataclass
class Attention(Operator):
    """softmax(scale Q K^T + bias) V, forward and backward by one of PyTorch's fused kernels or, as None, by ours.

    ``diagonal``: query i sees the keys up to i + diagonal; None: all. ``dropout``: of the weights, not for FLASH.
    """

    backend: SDPBackend | None
    is_causal: bool
    scale: float
    diagonal: int | None
    dropout: float = 0.0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensors]:
        qkv = query, key, value
        if self.backend is None:
            attention_double_backward.prepare(query.device.type)
            random = 4 * torch.randint(2**60, (2,), device=query.device)
            y, logsumexp = attention_dropout.forward(*qkv, *self._of_all(query, bias, random))
            return y, (*qkv, bias, None, logsumexp, random)
        if not query.is_cuda:
            y, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu.default(
                *qkv, 0.0, self.is_causal, attn_mask=bias, scale=self.scale
            )
            return y, (*qkv, bias, y, logsumexp)
        if self.backend is FLASH:
            y, logsumexp, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention.default(
                *qkv, 0.0, self.is_causal, scale=self.scale
            )
        else:
            y, logsumexp, seed, offset = aten._scaled_dot_product_efficient_attention.default(
                *qkv, bias, True, self.dropout, self.is_causal, scale=self.scale
            )
        return y, (*qkv, bias, y, logsumexp, seed, offset)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        y: Tensor | None,
        logsumexp: Tensor,
        *random: Tensor,
        mask: Sequence[bool],
    ) -> Tensors:
        qkv = query, key, value
        if self.backend is None:
            return attention_dropout.backward(grad, *qkv, logsumexp, *self._of_all(query, bias, *random))
        if not query.is_cuda:
            return aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
                grad, *qkv, y, logsumexp, 0.0, self.is_causal, attn_mask=bias, scale=self.scale
            )
        if self.backend is FLASH:
            lengths = None, None, query.shape[2], key.shape[2]
            return aten._scaled_dot_product_flash_attention_backward.default(
                grad, *qkv, y, logsumexp, *lengths, 0.0, self.is_causal, *random, scale=self.scale
            )
        needed = [*mask[:3], False]
        return aten._scaled_dot_product_efficient_attention_backward.default(
            grad, *qkv, bias, y, logsumexp, *random, self.dropout, needed, self.is_causal, scale=self.scale
        )

    def double_backward(
        self,
        cotangents: Tensors,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        y: Tensor | None,
        logsumexp: Tensor,
        *random: Tensor,
        mask: Sequence[bool],
    ) -> Tensors:
        qkv = query, key, value
        if self.backend is EFFICIENT:
            random = (torch.stack([t.to(query.device, non_blocking=True).view(()) for t in random]),)
        of_all = self._of_all(query, bias, *random[:1])
        if torch.is_grad_enabled():
            return by_autograd(partial(self._math, bias, of_all[3]), cotangents[:3], (grad,), qkv, mask)
        v = [torch.zeros_like(x) if v is None else v.to(x.dtype) for v, x in zip(cotangents[:3], qkv, strict=True)]
        logsumexp = logsumexp[..., : query.shape[2]].to(torch.promote_types(query.dtype, torch.float32))
        attention_double_backward.prepare(query.device.type)
        return attention_double_backward.run(*v, grad.to(query.dtype), *qkv, logsumexp, *of_all)

    def _of_all(self, query: Tensor, bias: Tensor | None, random: Tensor | None = None) -> tuple[Any, ...]:
        """Return what all passes of ours are given."""
        bias = None if bias is None else bias.to(torch.promote_types(query.dtype, torch.float32))
        if not self.dropout:
            return bias, self.scale, self.diagonal, None, 0, 1.0
        least, kept = attention_dropout.threshold(self.dropout), 1 / (1 - self.dropout)
        return bias, self.scale, self.diagonal, random, least, kept

    def _math(self, bias: Tensor | None, random: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        (batch, heads, length, _), keys = query.shape, key.shape[2]
        if self.diagonal is not None:
            seen = query.new_ones(length, keys, dtype=torch.bool).tril(self.diagonal)
            bias = _additive(seen, query.dtype) if bias is None else bias.masked_fill(~seen, -math.inf)
        kept = None
        if random is not None:
            of_all = random, (batch, heads, length, keys), slice(0, length), keys
            kept = attention_dropout.is_kept(*of_all, attention_dropout.threshold(self.dropout))
        kernel = aten._scaled_dot_product_attention_math.default
        return kernel(query, key, value, bias, self.dropout, False, kept, scale=self.scale, enable_gqa=True)[0]


def math_kernel(*args: Any, **kwargs: Any) -> Tensor:
    """Compute scaled_dot_product_attention of operators that have derivatives of every order."""
    if any(isinstance(t, Tensor) and t.is_nested for t in (*args, *kwargs.values())):
        raise RuntimeError(
            "scaled_dot_product_attention of nested tensors cannot be differentiated twice; expected padded tensors "
            'and attn_mask, or hvp="finite_difference"'
        )
    with _switches, sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


_switches = threading.RLock()  # sdpa_kernel's are the process's


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for torch.nn.functional.scaled_dot_product_attention.

    Ours is what PyTorch would run one of its fused kernels for; with dropout, of a mask that all passes can draw again,
    which on CUDA is that of its memory-efficient kernel. What is not for them is the math kernel's.
    """
    if not dropout_p >= 0:  # as of NaN, too, which the math kernel takes for 0; it refuses what is above 1
        raise ValueError(f"dropout_p={dropout_p!r}; expected 0 <= dropout_p <= 1")
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    query, key, value = qkv = lower(query, key, value)
    if any(t.dim() != 4 for t in qkv):
        return math_kernel(*arguments, **options)
    diagonal, bias = (0 if is_causal else None), attn_mask
    if is_causal_bias(attn_mask):
        from torch.nn.attention.bias import CausalVariant

        square = attn_mask.seq_len_q == attn_mask.seq_len_kv
        is_causal = square or attn_mask.variant == CausalVariant.UPPER_LEFT
        diagonal = 0 if is_causal else attn_mask.seq_len_kv - attn_mask.seq_len_q
        bias = None if is_causal else attn_mask._materialize(query.device)
    drops = 0 < dropout_p < 1
    choice = _chosen(*qkv, bias, 0.0 if drops else dropout_p, is_causal, **options)
    refused = bias is not None and lower(bias)[0].dtype not in (torch.bool, query.dtype)  # by PyTorch
    learned = bias is not None and bias.requires_grad
    if learned:
        warn(
            "attn_mask of scaled_dot_product_attention needs a gradient: on steps with curvature PyTorch's math kernel "
            "runs, whose memory grows with the square of the length. Expected a mask without one, or short sequences"
        )
    if choice is None or refused or learned or not (drops or dropout_p == 0):
        return math_kernel(*arguments, **options)
    backend: SDPBackend | None = choice
    if drops:
        backend = None
        if query.is_cuda:  # the kernel has no heads that share keys
            query, key, value = qkv = (
                query,
                *(t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value)),
            )
            backend = EFFICIENT if _efficient(*qkv, bias, dropout_p, is_causal) else None
    if bias is not None:
        bias = lower(bias)[0] if bias.is_floating_point() else _additive(bias, query.dtype)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    operator = Attention(backend, is_causal, scale, diagonal, dropout_p)
    if backend is EFFICIENT and bias is not None:
        bias = F.pad(bias, (0, -bias.shape[-1] % ALIGNMENT))[..., : bias.shape[-1]]
        bias = bias.expand(*query.shape[:3], key.shape[2])
    if backend is not FLASH or not query.is_cuda:
        return call(operator, *qkv, bias)
    padded = [F.pad(t, (0, -t.shape[3] % ALIGNMENT)) if t.shape[3] % ALIGNMENT else t for t in qkv]
    return call(operator, *padded, None)[..., : value.shape[3]]


def _chosen(*arguments: Any, scale: float | None, enable_gqa: bool) -> SDPBackend | None:
    """Return the fused kernel that PyTorch would take; None for its math kernel, or one ours does not stand for."""
    if any(isinstance(t, FakeTensor) for t in arguments):  # for which it gives the answer of another device
        with unset_fake_temporarily():
            return _chosen(*map(_real, arguments), scale=scale, enable_gqa=enable_gqa)
    choice = SDPBackend(torch._fused_sdp_choice(*arguments, scale=scale, enable_gqa=enable_gqa))
    if choice is SDPBackend.CUDNN_ATTENTION:
        parameters = SDPAParams(*arguments, enable_gqa)  # type: ignore[call-arg]
        choice = next((b for b, can in _CAN.items() if can(parameters)), SDPBackend.MATH)
    return choice if choice in _CAN else None


def _efficient(*arguments: Any) -> bool:
    """Tell whether PyTorch's memory-efficient kernel takes these, and can number the weights in its 32 bits."""
    query, key = arguments[:2]
    with unset_fake_temporarily():
        takes = can_use_efficient_attention(SDPAParams(*map(_real, arguments), False))  # type: ignore[call-arg]
    return takes and query.shape[:3].numel() * key.shape[2] < 2**31


_CAN = {FLASH: can_use_flash_attention, EFFICIENT: can_use_efficient_attention}


def _real(value: Any) -> Any:
    """Return a tensor of the same geometry for a fake one."""
    if not isinstance(value, FakeTensor):
        return value
    real = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return real.requires_grad_(value.requires_grad)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask of those that may be seen adds to the scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


def with_attention(run: Callable[..., Tensor], function: Any) -> Callable[..., Any]:
    """Return a function of torch.nn.functional with this attention in it, where modes would not see PyTorch's."""
    names = {**function.__globals__, "scaled_dot_product_attention": run}
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    names[function.__name__] = twin  # what it hands to other modes
    return twin
