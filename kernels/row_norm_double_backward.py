"""The double backward of layer, RMS and group norm: both gradients row by row, then those of the weights.

:func:`adahessian_fused.friendly.formulas.row_norm_double_backward` has the formulas and describes the arguments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .norm import (
    VECTOR,
    are_aligned,
    at_channel,
    channel_blocks,
    channel_grid,
    channels_of,
    elements_of_channels,
    load_numbers,
    store_sum,
    whole,
)
from .table import FUSION, on
from .tile import kernel

HELD_BY_WARP = 1024  # elements of a row, of three tensors in registers; also of a block of longer rows


@triton.jit
def _from(pointer, offset, WIDE: tl.constexpr):
    """Return the pointer, if there is one, moved on; aligned as rows of whole vectors are."""
    if pointer is not None:
        pointer += offset
        if WIDE:
            pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _elements_of_row(
    v, grad, x, center, s, begin, length, inner, ONE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    """Return a block's places in its row, whether there are such, the places of their weights; v, g and x_hat."""
    i = begin + tl.arange(0, BLOCK)
    mask = tl.full(i.shape, True, tl.int1) if WHOLE else i < length
    c = i if ONE else i // inner
    x_i = (load_numbers(x, i, mask, 0, s.dtype) - center) * s
    return i, mask, c, load_numbers(v, i, mask, 0, s.dtype), load_numbers(grad, i, mask, 0, s.dtype), x_i


@triton.jit
def _store_gradients(d_grad, d_x, v_weight, v_bias, weight, elements, coefficients):
    """Store both gradients of elements of a row, which are linear in v, g and x_hat."""
    i, mask, c, v_i, g_i, x_i = elements
    s, p_x, p_1, x_u, x_v, x_x, x_1 = coefficients
    w_i, vw_i = load_numbers(weight, c, mask, 1, s.dtype), load_numbers(v_weight, c, mask, 0, s.dtype)
    p_i = s * v_i + (p_x * x_i + p_1)
    tl.store(d_grad + i, w_i * p_i + (vw_i * x_i + load_numbers(v_bias, c, mask, 0, s.dtype)), mask=mask)
    tl.store(d_x + i, (s * vw_i + x_u * w_i) * g_i + (x_v * v_i + (x_x * x_i + x_1)), mask=mask)


@triton.jit
def _with(sums, v_weight, weight, elements):
    """Add to the sums of v, w g, v_w g, their products with x_hat, and v w g those of more elements."""
    _, mask, c, v_i, g_i, x_i = elements
    v, u, r, vx, ux, rx, vu = sums
    u_i, r_i = g_i * load_numbers(weight, c, mask, 1, g_i.dtype), g_i * load_numbers(v_weight, c, mask, 0, g_i.dtype)
    return v + v_i, u + u_i, r + r_i, vx + v_i * x_i, ux + u_i * x_i, rx + r_i * x_i, vu + v_i * u_i


@triton.jit
def _add_4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add_7(a0, a1, a2, a3, a4, a5, a6, b0, b1, b2, b3, b4, b5, b6):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6


@kernel
def row_norm_gradients_kernel(
    v,
    v_weight,
    v_bias,
    grad,
    x,
    weight,
    mean,
    invstd,
    d_grad,
    d_x,
    means,
    rows,
    channels,
    inner,
    groups,
    ONE: tl.constexpr,
    WIDE: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute a row's sums, then its two gradients, in each program. The means of v and v x_hat go to ``means``.

    ``ONE`` says that there is one element to a weight, ``WIDE`` that rows are whole vectors in all tensors. A row of
    at most ``HELD`` blocks stays in registers; 0: it is read twice.
    """
    STATE: tl.constexpr = means.dtype.element_ty
    row = tl.program_id(0)
    s, center = tl.load(invstd + row), tl.full((), 0, STATE)
    if mean is not None:
        center = tl.load(mean + row)
    length = whole(channels * inner, WIDE)
    v, grad, x = _from(v, row * length, WIDE), _from(grad, row * length, WIDE), _from(x, row * length, WIDE)
    d_grad, d_x = _from(d_grad, row * length, WIDE), _from(d_x, row * length, WIDE)
    first = tl.program_id(1) if ONE else row % groups * channels  # 0: promises are believed about sums only
    weight, v_weight = _from(weight, first, WIDE and ONE), _from(v_weight, first, WIDE and ONE)
    v_bias = _from(v_bias, first, WIDE and ONE)
    zero = tl.zeros([BLOCK], STATE)
    sums = (zero, zero, zero, zero, zero, zero, zero)
    held = ()
    if HELD:
        for block in tl.static_range(HELD):
            e = _elements_of_row(v, grad, x, center, s, block * BLOCK, length, inner, ONE, block + 1 < HELD, BLOCK)
            held += (e,)
            sums = _with(sums, v_weight, weight, e)
    else:
        begin = row * 0
        while begin < length:
            e = _elements_of_row(v, grad, x, center, s, begin, length, inner, ONE, False, BLOCK)
            sums = _with(sums, v_weight, weight, e)
            begin += BLOCK
    n = length.to(STATE)
    # Together: the warps of a program meet once.
    if mean is None:
        vx, ux, rx, vu = tl.reduce((sums[3], sums[4], sums[5], sums[6]), 0, _add_4)
        v_mean, u_mean, r_mean = tl.full((), 0, STATE), tl.full((), 0, STATE), tl.full((), 0, STATE)
    else:
        v_mean, u_mean, r_mean, vx, ux, rx, vu = tl.reduce(sums, 0, _add_7)
        v_mean, u_mean, r_mean = v_mean / n, u_mean / n, r_mean / n
    vx, ux = vx / n, ux / n
    inner_mean = r_mean - s * (vx * u_mean + ux * v_mean)
    inner_x = rx / n - 2 * s * vx * ux
    k = s * s * (vu / n - v_mean * u_mean - vx * ux)
    tl.store(means + row, v_mean)
    tl.store(means + rows + row, vx)
    x_u, x_v = -s * s * vx, -s * s * ux
    coefficients = s, -s * vx, -s * v_mean, x_u, x_v, -s * inner_x - k, -s * inner_mean
    if HELD:
        for block in tl.static_range(HELD):
            _store_gradients(d_grad, d_x, v_weight, v_bias, weight, held[block], coefficients)
    else:
        begin = row * 0
        while begin < length:
            e = _elements_of_row(v, grad, x, center, s, begin, length, inner, ONE, False, BLOCK)
            _store_gradients(d_grad, d_x, v_weight, v_bias, weight, e, coefficients)
            begin += BLOCK


@kernel
def row_norm_weight_kernel(
    v,
    grad,
    x,
    mean,
    invstd,
    means,
    partials,
    count,
    weights,
    inner,
    length,
    rows,
    channels,
    groups,
    ONE: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum g P(v) over ``length`` of the elements that have the program's weights."""
    STATE: tl.constexpr = partials.dtype.element_ty
    length, inner, weights = whole(length, WIDE), whole(inner, WIDE and not LAST), whole(weights, WIDE and LAST)
    v = at_channel(v, inner, LAST, WIDE, BLOCK_C)
    grad, x = at_channel(grad, inner, LAST, WIDE, BLOCK_C), at_channel(x, inner, LAST, WIDE, BLOCK_C)
    total = tl.zeros([BLOCK_I, BLOCK_C], STATE)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, count)
    while begin < end:
        i, index, mask = elements_of_channels(begin, end, weights, inner, LAST, BLOCK_I, BLOCK_C)
        row, seen = i, i < end
        if not LAST:
            row //= inner
        if not ONE:
            row, seen = row * groups + channels_of(LAST, BLOCK_C) // channels, mask
        s = tl.load(invstd + row, mask=seen, other=0)
        v_i = load_numbers(v, index, mask, 0, STATE)
        g_i = load_numbers(grad, index, mask, 0, STATE)
        x_i = load_numbers(x, index, mask, 0, STATE)
        if mean is not None:
            x_i -= tl.load(mean + row, mask=seen, other=0)
        v_mean = tl.load(means + row, mask=seen, other=0)
        vx = tl.load(means + rows + row, mask=seen, other=0)
        total += tl.where(mask, g_i * s * (v_i - v_mean - x_i * s * vx), 0)
        begin += BLOCK_I if LAST else BLOCK_I * BLOCK_C
    store_sum(partials + tl.program_id(1) * weights, total, weights, LAST, BLOCK_C)


def row_blocks(length: int, held: bool) -> dict[str, int]:
    """Return how a program takes its row: ``held`` in registers, up to four blocks of 8 elements a thread, or twice."""
    warps = next((n for n in (1, 2, 4) if length <= n * HELD_BY_WARP), None)
    if warps is None or not held:
        return {"HELD": 0, "BLOCK": min(triton.next_power_of_2(length), HELD_BY_WARP), "num_warps": 4}
    block = min(triton.next_power_of_2(length), warps * 32 * VECTOR)
    return {"HELD": triton.cdiv(length, block), "BLOCK": block, "num_warps": warps}


def row_norm_double_backward(v, v_weight, v_bias, grad, x, weight, mean, invstd, groups: int):
    """Compute :func:`adahessian_fused.friendly.formulas.row_norm_double_backward`."""
    rows, channels, inner = x.shape
    weights, count = groups * channels, rows // groups * inner
    one = inner == groups == 1
    d_grad, d_x = torch.empty_like(x), torch.empty_like(x)
    means = torch.empty(2, rows, dtype=invstd.dtype, device=x.device)
    blocks = channel_blocks(weights, inner, v, grad, x)
    grid, _, share = channel_grid(count, weights, blocks)
    partials = torch.empty(grid[1], weights, dtype=invstd.dtype, device=x.device)
    with on("row_norm_double_backward", x.device):
        row_norm_gradients_kernel[(rows,)](
            *(v, v_weight, v_bias, grad, x, weight, mean, invstd, d_grad, d_x, means),
            *(rows, channels, inner, groups),
            ONE=one,
            WIDE=channels * inner % 16 == 0 and are_aligned(v, v_weight, v_bias, grad, x, weight),
            **FUSION,
            **row_blocks(channels * inner, one and invstd.dtype != torch.float64),  # places or numbers of two registers
        )
        row_norm_weight_kernel[grid](
            *(v, grad, x, mean, invstd, means, partials),
            *(count, weights, inner, share, rows, channels, groups),
            ONE=groups == 1,
            num_warps=4,
            **FUSION,
            **blocks,
        )
    return d_grad, d_x, partials.sum(0)
