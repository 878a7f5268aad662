"""The double backward of attention: a kernel over blocks of queries and, with its sums, one over blocks of keys.

:mod:`adahessian_fused.friendly.attention_double_backward` has the formulas, and the names used here. A program over
queries goes through their keys twice, for the sums of the rows and for the gradients of ``grad`` and query; one over
keys goes through their queries once. Nobody adds to what another program wrote. Products are those of tensor cores,
with factors in the dtype of the tensors and sums in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .adahessian_math import philox4x32, round_to
from .table import INTERPRETED, on, signed32

_INTERPRETED = tl.constexpr(INTERPRETED)
# Queries (or keys) of a program, in 16 and 32 bits, and keys (or queries) it takes at a time.
BLOCKS, OTHER = {2: 64, 4: 16}, 32  # of the latter half with dropout, which needs registers
MOST = 128  # size of heads
MAX_GRID = 65535  # of a launch, but for its first dimension


@triton.jit
def _load(pointer, rows, length, size, SIZE: tl.constexpr):
    """Load some rows of (length, size), with zeros up to SIZE."""
    columns = tl.arange(0, SIZE)[None, :]
    return tl.load(
        pointer + rows[:, None] * size + columns, mask=(rows[:, None] < length) & (columns < size), other=0.0
    )


@triton.jit
def _store(pointer, rows, length, size, numbers, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)[None, :]
    mask = (rows[:, None] < length) & (columns < size)
    tl.store(pointer + rows[:, None] * size + columns, round_to(numbers, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _dot(x, y, PRECISION: tl.constexpr):
    if _INTERPRETED:  # the interpreter takes the bits of bfloat16 for integers
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _kept(random, head, rows, first, queries, keys, least, kept, N: tl.constexpr, ALIGNED: tl.constexpr):
    """Return what dropout multiplies the weights of some queries and of N keys from ``first`` on by: 0 or ``kept``."""
    seed = tl.load(random)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    number = tl.load(random + 1) + (head * queries + rows[:, None]) * keys + first
    if ALIGNED:  # each call of Philox has four weights of a row
        call = number // 4 + tl.arange(0, N // 4)[None, :]
    else:
        number += tl.arange(0, N)[None, :]
        call = number // 4
    zero = (call * 0).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(call.to(tl.uint32), (call >> 32).to(tl.uint32), zero, zero, low, high)
    if ALIGNED:
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], N))
    else:
        lane = number % 4
        words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return tl.where(words >= least.to(tl.uint32, bitcast=True), kept, 0.0)


@triton.jit
def _scores(
    a,
    b,
    c,
    grad,
    query,
    key,
    value,
    lse,
    bias,
    stride_row,
    stride_column,
    random,
    least,
    kept,
    head,
    rows,
    first,
    queries,
    keys,
    scale,
    diagonal,
    CAUSAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return P, the tangent of S, G and H of some queries and keys from ``first`` on and what dropout multiplies by."""
    columns = first + tl.arange(0, key.shape[0])
    seen = (rows[:, None] < queries) & (columns[None, :] < keys)
    if CAUSAL:
        seen = seen & (columns[None, :] <= rows[:, None] + diagonal)
    key_t = tl.trans(key)
    s = scale * _dot(query, key_t, PRECISION)
    if bias is not None:
        at = rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
        added = tl.load(bias + at, mask=seen, other=0.0)
        seen = seen & (added > float("-inf"))
        s = s + tl.where(seen, added, 0.0)
    p = tl.where(seen, tl.exp(tl.where(seen, s - lse[:, None], 0.0)), 0.0)
    tangent = scale * (_dot(a, key_t, PRECISION) + _dot(query, tl.trans(b), PRECISION))
    g, h = _dot(grad, tl.trans(value), PRECISION), _dot(grad, tl.trans(c), PRECISION)
    mask = 1.0
    if random is not None:
        mask = _kept(random, head, rows, first, queries, keys, least, kept, key.shape[0], ALIGNED)
        g, h = mask * g, mask * h
    return p, tangent, g, h, mask


@triton.jit
def _gradients(p, tangent, g, h, mu, d, w):
    """Return the tangent of P, S' and that of S'."""
    centred = tangent - mu[:, None]
    return p * centred, p * (g - d[:, None]), p * (centred * g - d[:, None] * tangent + h - w[:, None])


@triton.jit
def attention_queries_kernel(
    a,
    b,
    c,
    grad,
    query,
    key,
    value,
    logsumexp,
    bias,
    sums,
    d_grad,
    d_query,
    stride_batch,
    stride_head,
    stride_row,
    stride_column,
    random,
    least,
    kept,
    heads,
    shared,
    queries,
    keys,
    size,
    value_size,
    scale,
    diagonal,
    CAUSAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHER: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
):
    """Write the sums of a block of rows (mu, D, sum P W, 1 / sum P) and its gradients of ``grad`` and query."""
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    first = tl.program_id(0) * BLOCK
    rows = first + tl.arange(0, BLOCK)
    of_query, of_grad = head * queries * size, head * queries * value_size
    of_key, of_value = head // shared * keys * size, head // shared * keys * value_size
    if bias is not None:
        bias += head // heads * stride_batch + head % heads * stride_head
    query_rows = _load(query + of_query, rows, queries, size, SIZE)
    a_rows = _load(a + of_query, rows, queries, size, SIZE)
    grad_rows = _load(grad + of_grad, rows, queries, value_size, VALUE_SIZE)
    lse = tl.load(logsumexp + head * queries + rows, mask=rows < queries, other=0.0)
    end = keys
    if CAUSAL:
        end = tl.maximum(tl.minimum(keys, first + BLOCK + diagonal), 0)
    mu = tl.zeros([BLOCK], tl.float32)
    d, w, of_p = mu, mu, mu
    for start in range(0, end, OTHER):
        columns = start + tl.arange(0, OTHER)
        b_rows = _load(b + of_key, columns, keys, size, SIZE)
        c_rows = _load(c + of_value, columns, keys, value_size, VALUE_SIZE)
        key_rows = _load(key + of_key, columns, keys, size, SIZE)
        value_rows = _load(value + of_value, columns, keys, value_size, VALUE_SIZE)
        p, tangent, g, h, mask = _scores(
            a_rows, b_rows, c_rows, grad_rows, query_rows, key_rows, value_rows, lse, bias, stride_row, stride_column,
            random, least, kept, head, rows, start, queries, keys, scale, diagonal, CAUSAL, ALIGNED, PRECISION,
        )  # fmt: skip
        of_p += tl.sum(p, 1)
        mu += tl.sum(p * tangent, 1)
        d += tl.sum(p * g, 1)
        w += tl.sum(p * (tangent * g + h), 1)
    factor = 1 / tl.maximum(of_p, 1e-30)  # the logsumexp of large scores is rounded
    mu, d = factor * mu, factor * d
    w = factor * w - 2 * mu * d
    total = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * queries
    to = sums + head * queries + rows
    tl.store(to, mu, mask=rows < queries)
    tl.store(to + total, d, mask=rows < queries)
    tl.store(to + 2 * total, w, mask=rows < queries)
    tl.store(to + 3 * total, factor, mask=rows < queries)
    dtype: tl.constexpr = query.dtype.element_ty
    grad_sum, query_sum = tl.zeros([BLOCK, VALUE_SIZE], tl.float32), tl.zeros([BLOCK, SIZE], tl.float32)
    for start in range(0, end, OTHER):
        columns = start + tl.arange(0, OTHER)
        b_rows = _load(b + of_key, columns, keys, size, SIZE)
        c_rows = _load(c + of_value, columns, keys, value_size, VALUE_SIZE)
        key_rows = _load(key + of_key, columns, keys, size, SIZE)
        value_rows = _load(value + of_value, columns, keys, value_size, VALUE_SIZE)
        p, tangent, g, h, mask = _scores(
            a_rows, b_rows, c_rows, grad_rows, query_rows, key_rows, value_rows, lse, bias, stride_row, stride_column,
            random, least, kept, head, rows, start, queries, keys, scale, diagonal, CAUSAL, ALIGNED, PRECISION,
        )  # fmt: skip
        p *= factor[:, None]
        p_dot, s_grad, s_bar = _gradients(p, tangent, g, h, mu, d, w)
        grad_sum += _dot(round_to(mask * p_dot, dtype), value_rows, PRECISION)
        grad_sum += _dot(round_to(mask * p, dtype), c_rows, PRECISION)
        query_sum += _dot(round_to(s_grad, dtype), b_rows, PRECISION)
        query_sum += _dot(round_to(s_bar, dtype), key_rows, PRECISION)
    _store(d_grad + of_grad, rows, queries, value_size, grad_sum, VALUE_SIZE)
    _store(d_query + of_query, rows, queries, size, scale * query_sum, SIZE)


@triton.jit
def attention_keys_kernel(
    a,
    b,
    c,
    grad,
    query,
    key,
    value,
    logsumexp,
    bias,
    sums,
    d_key,
    d_value,
    stride_batch,
    stride_head,
    stride_row,
    stride_column,
    random,
    least,
    kept,
    heads,
    shared,
    queries,
    keys,
    size,
    value_size,
    scale,
    diagonal,
    CAUSAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHER: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
):
    """Write the gradients of a block of keys and values: sums over all queries of the heads that share them."""
    kv_head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    first = tl.program_id(0) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    of_key, of_value = kv_head * keys * size, kv_head * keys * value_size
    b_rows = _load(b + of_key, columns, keys, size, SIZE)
    c_rows = _load(c + of_value, columns, keys, value_size, VALUE_SIZE)
    key_rows = _load(key + of_key, columns, keys, size, SIZE)
    value_rows = _load(value + of_value, columns, keys, value_size, VALUE_SIZE)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(first - diagonal, 0) // OTHER * OTHER
    dtype: tl.constexpr = query.dtype.element_ty
    key_sum, value_sum = tl.zeros([BLOCK, SIZE], tl.float32), tl.zeros([BLOCK, VALUE_SIZE], tl.float32)
    total = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * shared * queries
    for number in range(shared):
        head = kv_head * shared + number
        of_query, of_grad = head * queries * size, head * queries * value_size
        bias_head = bias
        if bias is not None:
            bias_head = bias + head // heads * stride_batch + head % heads * stride_head
        for start in range(begin, queries, OTHER):
            rows = start + tl.arange(0, OTHER)
            query_rows = _load(query + of_query, rows, queries, size, SIZE)
            a_rows = _load(a + of_query, rows, queries, size, SIZE)
            grad_rows = _load(grad + of_grad, rows, queries, value_size, VALUE_SIZE)
            of_rows = head * queries + rows
            lse = tl.load(logsumexp + of_rows, mask=rows < queries, other=0.0)
            mu = tl.load(sums + of_rows, mask=rows < queries, other=0.0)
            d = tl.load(sums + total + of_rows, mask=rows < queries, other=0.0)
            w = tl.load(sums + 2 * total + of_rows, mask=rows < queries, other=0.0)
            factor = tl.load(sums + 3 * total + of_rows, mask=rows < queries, other=0.0)
            p, tangent, g, h, mask = _scores(
                a_rows, b_rows, c_rows, grad_rows, query_rows, key_rows, value_rows, lse, bias_head, stride_row,
                stride_column, random, least, kept, head, rows, first, queries, keys, scale, diagonal, CAUSAL, ALIGNED,
                PRECISION,
            )  # fmt: skip
            p *= factor[:, None]
            p_dot, s_grad, s_bar = _gradients(p, tangent, g, h, mu, d, w)
            key_sum += _dot(tl.trans(round_to(s_grad, dtype)), a_rows, PRECISION)
            key_sum += _dot(tl.trans(round_to(s_bar, dtype)), query_rows, PRECISION)
            value_sum += _dot(tl.trans(round_to(mask * p_dot, dtype)), grad_rows, PRECISION)
    _store(d_key + of_key, columns, keys, size, scale * key_sum, SIZE)
    _store(d_value + of_value, columns, keys, value_size, value_sum, VALUE_SIZE)


def launch_options(size: int, value_size: int, dtype: torch.dtype, drops: bool = False) -> dict:
    """Return blocks, warps and stages for heads of these sizes."""
    sizes = {"SIZE": max(triton.next_power_of_2(size), 16), "VALUE_SIZE": max(triton.next_power_of_2(value_size), 16)}
    large, narrow = max(sizes.values()) >= MOST, dtype.itemsize == 2
    blocks = {"BLOCK": BLOCKS[dtype.itemsize], "OTHER": OTHER // 2 if drops else OTHER}
    return {**sizes, **blocks, "num_warps": 8 if large else 4, "num_stages": 2 if narrow and not large else 1}


def attention_double_backward(
    a, b, c, grad, query, key, value, logsumexp, bias, scale, diagonal, random=None, least=0, kept=1.0
):
    """Compute :func:`adahessian_fused.friendly.attention_double_backward.attention_double_backward`.

    Not for float64, nor for heads larger than MOST.
    """
    (batch, heads, queries, size), (kv_heads, keys) = query.shape, key.shape[1:3]
    value_size, shared = value.shape[3], heads // kv_heads
    tensors = [a, b, c, grad, query, key, value, logsumexp]
    if batch > MAX_GRID:
        most, wide = MAX_GRID // 4 * 4, None if bias is None else bias.expand(batch, heads, queries, keys)
        several = []
        for first in range(0, batch, most):
            part = [None if t is None else t[first : first + most] for t in (*tensors, wide)]
            # The numbers of the part's weights; four of them share a call of Philox.
            stream = None if random is None else random + random.new_tensor([0, first * heads * queries * keys])
            several.append(attention_double_backward(*[*part, scale, diagonal, stream, least, kept]))
        return tuple(map(torch.cat, zip(*several, strict=True)))
    tensors = [t.contiguous() for t in tensors]
    results = [torch.empty_like(t) for t in (tensors[3], tensors[4], tensors[5], tensors[6])]
    sums = logsumexp.new_empty(4, batch, heads, queries)
    strides = [0] * 4
    if bias is not None:
        strides = bias.expand(batch, heads, queries, keys).stride()
    options = {
        "CAUSAL": diagonal is not None,
        "ALIGNED": keys % 4 == 0,
        # Three products of 11 bits are as good as one of 24, and tensor cores have them.
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3",
        **launch_options(size, value_size, query.dtype, random is not None),
    }
    dropout = random, signed32(least), kept
    numbers = (
        *strides,
        *dropout,
        heads,
        shared,
        queries,
        keys,
        size,
        value_size,
        scale,
        0 if diagonal is None else diagonal,
    )
    with on("attention_double_backward", query.device):
        by_queries = triton.cdiv(queries, options["BLOCK"]), heads, batch
        attention_queries_kernel[by_queries](*tensors, bias, sums, *results[:2], *numbers, **options)
        by_keys = triton.cdiv(keys, options["BLOCK"]), kv_heads, batch
        attention_keys_kernel[by_keys](*tensors, bias, sums, *results[2:], *numbers, **options)
    return tuple(results)
