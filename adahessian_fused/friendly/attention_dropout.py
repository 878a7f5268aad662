r"""Attention with dropout, of a mask that every pass draws again: its forward and backward pass, in linear memory.

PyTorch has no kernel on a CPU that drops weights without a mask in memory. Here weight number n, in the order of
(batch, head, query, key), is kept if word ``offset`` + n of the Philox stream of ``seed`` (Salmon et al. 2011: four
words a counter) is at least ``least``. This is the mask of PyTorch's memory-efficient kernel on CUDA, so that its
passes and ours drop the same.

With P and S as in :mod:`.attention_double_backward`, which is for both, and M the mask, 0 or 1 / (1 - p): the output is
:math:`(M P) V` (products of matrices of the shape of S are elementwise), and a gradient O' of it gives, with
:math:`G = M (O' V^T)`,

.. math:: S' = P \big(G - \textstyle\sum_j P G\big), \qquad Q' = s S' K, \quad K' = s S'^T Q, \quad V' = (M P)^T O'.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import philox4x32

ROWS = 128  # queries at a time in the plain versions

# The native library has the CPU's kernels of them.
library = torch.library.Library("adahessian_fused", "FRAGMENT")
OF_ALL = "Tensor? bias, float scale, int? diagonal, Tensor? random=None, int least=0, float kept=1."
library.define(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {OF_ALL}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    f"attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor logsumexp, {OF_ALL})"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@functools.cache
def threshold(dropout: float) -> int:
    """Return the least word of 32 bits whose number in (0, 1] is above ``dropout``, in float32 as curand has it."""
    low, high = 0, 2**32 - 1
    while low < high:
        word = (low + high) // 2
        low, high = (low, word) if _single(_single(word) * 2**-32 + 2**-33) > _single(dropout) else (word + 1, high)
    return low


def _single(number: float) -> float:
    """Round to float32."""
    return struct.unpack("f", struct.pack("f", number))[0]


class Block(NamedTuple):
    """Some rows of the scores, with the heads that share keys in a dimension of their own: (N, Hk, H / Hk, rows, n)."""

    rows: slice
    seen: int  # n, the number of keys that a row of them sees
    scores: Tensor
    mask: Tensor | float  # M


def blocks(
    query: Tensor,
    key: Tensor,
    wide: torch.dtype,
    bias: Tensor | None,
    scale: float,
    diagonal: int | None,
    random: Tensor | None,
    least: int,
    kept: float,
) -> Iterator[Block]:
    """Go through the rows of attention's scores; in all passes these arguments are the same."""
    (batch, heads, length, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    shared = kv_heads, heads // max(kv_heads, 1)
    query, key = query.unflatten(1, shared), key.to(wide).unsqueeze(2)
    if bias is not None:
        bias = bias.expand(batch, heads, length, keys).unflatten(1, shared)
    for first in range(0, length, ROWS):
        rows = slice(first, min(first + ROWS, length))
        n = keys if diagonal is None else min(keys, max(0, rows.stop + diagonal))
        s = scale * query[..., rows, :].to(wide) @ key[..., :n, :].mT
        if bias is not None:
            s = s + bias[..., rows, :n]
        if diagonal is not None:
            i, j = (torch.arange(*ends, device=s.device) for ends in ((first, rows.stop), (0, n)))
            s = s.masked_fill(j > i[:, None] + diagonal, -math.inf)
        mask: Tensor | float = 1.0
        if random is not None:
            mask = kept * is_kept(random, (batch, heads, length, keys), rows, n, least).to(wide).unflatten(1, shared)
        yield Block(rows, n, s, mask)


def is_kept(random: Tensor, shape: tuple[int, ...], rows: slice, n: int, least: int) -> Tensor:
    """Tell which of the first ``n`` weights of some rows of (batch, head, query, key) are kept: (N, H, rows, n)."""
    batch, heads, length, keys = shape
    seed, offset = random.unbind()
    of_head = torch.arange(batch * heads, device=random.device).view(batch, heads, 1, 1)
    row = of_head * length + torch.arange(rows.start, rows.stop, device=random.device)[:, None]
    first = offset + row * keys
    call = (first >> 2) + torch.arange((n + 6) // 4, device=random.device)  # of which the first may begin before
    zero = torch.zeros_like(call)
    words = torch.stack(philox4x32((call & 0xFFFFFFFF, call >> 32, zero, zero), seed), -1).flatten(-2)
    return words.gather(-1, (first & 3) + torch.arange(n, device=random.device)) >= least


def probabilities(scores: Tensor, logsumexp: Tensor) -> Tensor:
    """Return P of some rows. The logsumexp of large scores is rounded, so they are divided by their sums."""
    p = (scores - logsumexp).exp().masked_fill(scores == -math.inf, 0)
    return p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def attention_forward(query: Tensor, key: Tensor, value: Tensor, *of_all: Any) -> tuple[Tensor, Tensor]:
    """Return the output (N, H, T, V) and the logsumexp of the scores' rows (N, H, T), 0 where a row sees nothing.

    Args:
        query: (N, H, T, E).
        key: (N, Hk, U, E); Hk divides H.
        value: (N, Hk, U, V).
        of_all: bias, scale and diagonal as in :func:`.attention_double_backward.attention_double_backward`, and
            random: seed and offset, a multiple of 4, of the mask's stream: two int64 numbers. None: nothing is dropped;
            least: the least word that keeps a weight;
            kept: the factor of those that are kept.
    """
    wide, (batch, heads, length, _) = torch.promote_types(query.dtype, torch.float32), query.shape
    value5 = value.to(wide).unsqueeze(2)
    y = query.new_empty(batch, key.shape[1], heads // max(key.shape[1], 1), length, value.shape[3])
    logsumexp = torch.empty_like(y[..., 0], dtype=wide)
    for rows, n, scores, mask in blocks(query, key, wide, *of_all):
        lse = scores.logsumexp(-1, keepdim=True).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0)
        y[..., rows, :] = ((mask * probabilities(scores, lse)) @ value5[..., :n, :]).to(y.dtype)
        logsumexp[..., rows] = lse[..., 0]
    return y.flatten(1, 2), logsumexp.flatten(1, 2)


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, logsumexp: Tensor, *of_all: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; ``grad`` is the output's, the rest as for the forward pass."""
    wide, shared = logsumexp.dtype, (key.shape[1], query.shape[1] // max(key.shape[1], 1))
    grad5, query5, lse = (t.unflatten(1, shared) for t in (grad, query, logsumexp.unsqueeze(-1)))
    key5, value5 = (t.to(wide).unsqueeze(2) for t in (key, value))
    d_query = torch.empty_like(query5, dtype=wide)
    d_key, d_value = (torch.zeros_like(t, dtype=wide) for t in (key, value))
    scale = of_all[1]
    for rows, n, scores, mask in blocks(query, key, wide, *of_all):
        p, q, go = probabilities(scores, lse[..., rows, :]), query5[..., rows, :].to(wide), grad5[..., rows, :].to(wide)
        g = mask * (go @ value5[..., :n, :].mT)
        s_grad = p * (g - (p * g).sum(-1, keepdim=True))
        d_query[..., rows, :] = scale * (s_grad @ key5[..., :n, :])
        d_key[..., :n, :] += scale * (s_grad.mT @ q).sum(2)
        d_value[..., :n, :] += ((mask * p).mT @ go).sum(2)
    return d_query.flatten(1, 2).to(query.dtype), d_key.to(query.dtype), d_value.to(query.dtype)


@torch.library.register_fake("adahessian_fused::attention_forward", lib=library)
def _forward_shapes(query: Tensor, key: Tensor, value: Tensor, *of_all: Any, **options: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.register_fake("adahessian_fused::attention_backward", lib=library)
def _backward_shapes(grad: Tensor, *tensors: Any, **options: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors[:3])


library.impl("attention_forward", attention_forward, "CompositeExplicitAutograd")
library.impl("attention_backward", attention_backward, "CompositeExplicitAutograd")
forward = torch.ops.adahessian_fused.attention_forward.default
backward = torch.ops.adahessian_fused.attention_backward.default
