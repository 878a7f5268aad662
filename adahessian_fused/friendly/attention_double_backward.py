r"""The double backward of scaled dot-product attention: an operator that graphs can hold and fused kernels implement.

With scores :math:`S = s Q K^T + B`, their softmax P by rows and :math:`O = P V`, a gradient :math:`O'` of the output
gives, with :math:`G = O' V^T` and :math:`D = \sum_j P G` for each row,

.. math:: S' = P (G - D), \qquad Q' = s S' K, \quad K' = s S'^T Q, \quad V' = P^T O'

(Dao et al. 2022, appendix B; products of matrices of the shape of S are elementwise). For cotangents a, b, c of the
three, :math:`\dot S = s (a K^T + Q b^T)` is the tangent of the scores in the direction (a, b), and
:math:`\dot P = P (\dot S - \mu)` with :math:`\mu = \sum_j P \dot S` that of P. The inner product
:math:`\langle a, Q' \rangle + \langle b, K' \rangle + \langle c, V' \rangle = \sum P (\dot S (G - D) + H)`, with
:math:`H = O' c^T`, has the gradients

.. math::
    O' &: \quad \dot P V + P c \\
    Q  &: \quad s (S' b + \bar S K) \\
    K  &: \quad s (S'^T a + \bar S^T Q) \\
    V  &: \quad \dot P^T O' \\
    \bar S &= P \big(W - \textstyle\sum_j P W\big), \qquad W = (\dot S - \mu) (G - D) + H.

These are twelve products of matrices (a first-order step has seven), and no more than some rows of S are there at a
time: P comes from the logsumexp of the rows, which the forward pass has left. That of large scores is rounded by more
than P may be: its rows have to add up to 1 for :math:`\bar S` to cancel where softmax is saturated, so they are divided
by their sums. With dropout, of mask M (:mod:`.attention_dropout`), G and H are multiplied by M, and so are
:math:`\dot P` and P in the gradients of O' and V.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .attention_dropout import OF_ALL, blocks, library, probabilities
from .double_backward import MOST

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
NAME = "adahessian_fused::attention_double_backward"

# The native library has the CPU's kernel of it.
library.define(
    "attention_double_backward(Tensor a, Tensor b, Tensor c, Tensor grad, Tensor query, Tensor key, Tensor value, "
    f"Tensor logsumexp, {OF_ALL}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attention_double_backward(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    bias: Tensor | None,
    scale: float,
    diagonal: int | None,
    random: Tensor | None = None,
    least: int = 0,
    kept: float = 1.0,
) -> Gradients:
    """Return the gradients of ``grad``, query, key and value, in plain PyTorch: the specification of the kernels.

    H heads of queries share Hk heads of keys and values; Hk divides H.

    Args:
        a: cotangent of the query's gradient, (N, H, T, E).
        b: cotangent of the key's gradient, (N, Hk, U, E).
        c: cotangent of the value's gradient, (N, Hk, U, V).
        grad: gradient of the output, (N, H, T, V).
        query: (N, H, T, E).
        key: (N, Hk, U, E).
        value: (N, Hk, U, V).
        logsumexp: of the rows of the scores, (N, H, T), in the dtype of arithmetic.
        bias: added to the scores, broadcasts to (N, H, T, U), in the dtype of arithmetic; minus infinity is masked.
        scale: factor on the products of queries and keys.
        diagonal: query i sees the keys up to i + ``diagonal``; None: all.
        random: seed and offset of the mask of dropout, two int64 numbers; None: nothing is dropped.
        least: as in :func:`.attention_dropout.attention_forward`.
        kept: likewise.
    """
    wide, shared = logsumexp.dtype, (key.shape[1], query.shape[1] // max(key.shape[1], 1))
    a5, grad5, query5, lse = (t.unflatten(1, shared) for t in (a, grad, query, logsumexp.unsqueeze(-1)))
    b5, c5, key5, value5 = (t.to(wide).unsqueeze(2) for t in (b, c, key, value))
    d_grad, d_query = (torch.empty_like(t, dtype=wide) for t in (grad5, query5))
    d_key, d_value = (torch.zeros_like(t, dtype=wide) for t in (key, value))
    for rows, n, s, mask in blocks(query, key, wide, bias, scale, diagonal, random, least, kept):
        k, v, bk, cv = (t[..., :n, :] for t in (key5, value5, b5, c5))
        q, aq, go = (t[..., rows, :].to(wide) for t in (query5, a5, grad5))
        p = probabilities(s, lse[..., rows, :])
        s_dot = scale * (aq @ k.mT + q @ bk.mT)
        g, h = mask * (go @ v.mT), mask * (go @ cv.mT)
        mu, d = ((p * t).sum(-1, keepdim=True) for t in (s_dot, g))
        p_dot, s_grad = p * (s_dot - mu), p * (g - d)
        w = (s_dot - mu) * (g - d) + h
        s_bar = p * (w - (p * w).sum(-1, keepdim=True))
        d_grad[..., rows, :] = (mask * p_dot) @ v + (mask * p) @ cv
        d_query[..., rows, :] = scale * (s_grad @ bk + s_bar @ k)
        d_key[..., :n, :] += scale * (s_grad.mT @ aq + s_bar.mT @ q).sum(2)
        d_value[..., :n, :] += ((mask * p_dot).mT @ go).sum(2)
    found = (d_grad.flatten(1, 2), d_query.flatten(1, 2), d_key, d_value)
    return tuple(t.to(query.dtype) for t in found)  # type: ignore[return-value]


@torch.library.register_fake(NAME, lib=library)
def _shapes(
    a: Tensor, b: Tensor, c: Tensor, grad: Tensor, query: Tensor, key: Tensor, *others: Any, **options: Any
) -> Gradients:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (grad, query, key, others[0]))  # type: ignore[return-value]


@torch.library.register_vmap(NAME, lib=library)
def _batched(info: Any, dims: tuple, *arguments: Any) -> tuple[Gradients, tuple[int, ...]]:
    """Take a batch of several as one long batch; with dropout, whose mask is the same for all of them, one by one."""
    *tensors, bias, scale, diagonal = arguments[:11]
    if len(arguments) > 11 and arguments[11] is not None:
        one = [
            [t if d is None else t.select(d, i) for t, d in zip(arguments, dims, strict=False)]
            for i in range(info.batch_size)
        ]
        return tuple(map(torch.stack, zip(*(run(*a) for a in one), strict=True))), (0,) * 4  # type: ignore[return-value]

    def long(t: Tensor, dim: int | None) -> Tensor:
        t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.flatten(0, 1)

    long_tensors = [long(t, dim) for t, dim in zip(tensors, dims, strict=False)]
    if bias is not None:
        bias = bias.unsqueeze(0) if dims[8] is None else bias.movedim(dims[8], 0)
        bias = bias.reshape(len(bias), *[1] * (5 - bias.dim()), *bias.shape[1:])
        n = long_tensors[4].shape[0] // info.batch_size
        bias = bias.expand(info.batch_size, n, *bias.shape[2:]).flatten(0, 1)
    found = run(*long_tensors, bias, scale, diagonal)
    return tuple(t.unflatten(0, (info.batch_size, -1)) for t in found), (0,) * 4


@functools.cache
def prepare(device_type: str) -> None:
    """Have the operator's kernel for this kind of device, if there is one; without, it is the plain version."""
    if device_type == "cpu":
        backends.unavailable_reason("native")  # loads the library that has it
    elif backends.unavailable_reason("triton", device_type) is None:
        library.impl("attention_double_backward", _by_triton, "CUDA")


def _by_triton(*arguments: Any) -> Gradients:
    query, value = arguments[4], arguments[6]
    size, length = max(query.shape[3], value.shape[3]), max(query.shape[2], value.shape[2])
    small = size <= 128 and query.dtype != torch.float64 and length * size <= MOST
    fits = small and query.numel() > 0 and value.numel() > 0
    return (backends.get("triton").attention_double_backward if fits else attention_double_backward)(*arguments)


library.impl("attention_double_backward", attention_double_backward, "CompositeExplicitAutograd")
run = torch.ops.adahessian_fused.attention_double_backward.default
