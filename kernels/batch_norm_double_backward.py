"""The double backward of batch norm: sums over channels, then both gradients.

:func:`adahessian_fused.friendly.formulas.batch_norm_double_backward` has the formulas and describes the arguments; the
coefficients are those of csrc/cpu/batch_norm_double_backward.cpp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .norm import (
    at_channel,
    channel_blocks,
    channel_grid,
    channel_length,
    channels_of,
    elements_of_channels,
    load_numbers,
    store_sum,
    whole,
)
from .table import FUSION, on
from .tile import kernel

MAX_SPLITS = 32  # partial sums of a channel that each program of the next kernel adds up again
N_SUMS = tl.constexpr(5)


@triton.jit
def _of_channel(pointer, channels, otherwise: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load a number of each of the program's channels, in float64; ``otherwise`` without a pointer."""
    c = channels_of(LAST, BLOCK_C)
    if pointer is None:
        numbers = tl.full(c.shape, otherwise, tl.float64)
    else:
        numbers = tl.load(pointer + c, mask=c < channels, other=0).to(tl.float64)
    return numbers


@kernel
def batch_norm_sums_kernel(
    v,
    grad,
    x,
    mean,
    partials,
    count,
    channels,
    inner,
    length,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum v, g, v (x - mean), g (x - mean) and v g over ``length`` elements of the program's channels."""
    STATE: tl.constexpr = partials.dtype.element_ty
    length, inner, channels = whole(length, WIDE), whole(inner, WIDE and not LAST), whole(channels, WIDE and LAST)
    v = at_channel(v, inner, LAST, WIDE, BLOCK_C)
    grad, x = at_channel(grad, inner, LAST, WIDE, BLOCK_C), at_channel(x, inner, LAST, WIDE, BLOCK_C)
    center = _of_channel(mean, channels, 0, LAST, BLOCK_C).to(STATE)
    sum_v = tl.zeros([BLOCK_I, BLOCK_C], STATE)
    sum_g, sum_vx, sum_gx, sum_vg = sum_v, sum_v, sum_v, sum_v
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, count)
    while begin < end:
        _, index, mask = elements_of_channels(begin, end, channels, inner, LAST, BLOCK_I, BLOCK_C)
        v_i = load_numbers(v, index, mask, 0, STATE)
        g_i = load_numbers(grad, index, mask, 0, STATE)
        x_i = load_numbers(x, index, mask, 0, STATE) - center
        sum_v += v_i
        sum_g += g_i
        sum_vx += v_i * x_i
        sum_gx += g_i * x_i
        sum_vg += v_i * g_i
        begin += BLOCK_I if LAST else BLOCK_I * BLOCK_C
    target = partials + tl.program_id(1) * N_SUMS * channels
    store_sum(target, sum_v, channels, LAST, BLOCK_C)
    store_sum(target + channels, sum_g, channels, LAST, BLOCK_C)
    store_sum(target + 2 * channels, sum_vx, channels, LAST, BLOCK_C)
    store_sum(target + 3 * channels, sum_gx, channels, LAST, BLOCK_C)
    store_sum(target + 4 * channels, sum_vg, channels, LAST, BLOCK_C)


@triton.jit
def _total(
    partials, number: tl.constexpr, splits, channels, SPLITS: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return one of the sums over all splits, of each of the program's channels."""
    c = channels_of(LAST, BLOCK_C)
    split = tl.arange(0, SPLITS)[:, None]
    parts = partials + (split * N_SUMS + number) * channels + c
    return tl.sum(tl.load(parts, mask=(split < splits) & (c < channels), other=0).to(tl.float64), 0)[None, :]


@kernel
def batch_norm_gradients_kernel(
    v,
    v_weight,
    v_bias,
    grad,
    x,
    weight,
    mean,
    invstd,
    partials,
    d_grad,
    d_x,
    d_weight,
    count,
    channels,
    inner,
    length,
    splits,
    FIXED: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write ``length`` elements of the program's channels' gradients, which are linear in v, g and x."""
    STATE: tl.constexpr = d_weight.dtype.element_ty
    n = count.to(tl.float64)
    length, inner, channels = whole(length, WIDE), whole(inner, WIDE and not LAST), whole(channels, WIDE and LAST, 4)
    v = at_channel(v, inner, LAST, WIDE, BLOCK_C)
    grad, x = at_channel(grad, inner, LAST, WIDE, BLOCK_C), at_channel(x, inner, LAST, WIDE, BLOCK_C)
    d_grad, d_x = at_channel(d_grad, inner, LAST, WIDE, BLOCK_C), at_channel(d_x, inner, LAST, WIDE, BLOCK_C)
    s, w = _of_channel(invstd, channels, 1.0, LAST, BLOCK_C), _of_channel(weight, channels, 1.0, LAST, BLOCK_C)
    vw, vb = _of_channel(v_weight, channels, 0.0, LAST, BLOCK_C), _of_channel(v_bias, channels, 0.0, LAST, BLOCK_C)
    sum_vg = _total(partials, 4, splits, channels, SPLITS, LAST, BLOCK_C)
    if FIXED:
        dw = s * sum_vg
        grad_x, grad_1, x_v, x_g, x_x, x_1 = vw * s, vb, 0 * s, vw * s, 0 * s, 0 * s
    else:
        v_mean = _total(partials, 0, splits, channels, SPLITS, LAST, BLOCK_C) / n
        g_mean = _total(partials, 1, splits, channels, SPLITS, LAST, BLOCK_C) / n
        vx = s * _total(partials, 2, splits, channels, SPLITS, LAST, BLOCK_C)
        gx = s * _total(partials, 3, splits, channels, SPLITS, LAST, BLOCK_C)
        dw = s * (sum_vg - n * v_mean * g_mean - vx * gx / n)
        x_g, x_v = s * (vw - w * s * vx / n), -s * w * s * gx / n
        grad_x, grad_1 = x_g, vb - w * s * v_mean
        x_x = -s * ((x_v * vx + x_g * gx) / n + w * s * dw / n)
        x_1 = -x_v * v_mean - x_g * g_mean
    c = channels_of(LAST, BLOCK_C)
    tl.store(d_weight + c, dw.to(STATE), mask=c < tl.where(tl.program_id(1) == 0, channels, 0))
    grad_v, grad_x, grad_1 = (w * s).to(STATE), grad_x.to(STATE), grad_1.to(STATE)
    x_v, x_g, x_x, x_1 = x_v.to(STATE), x_g.to(STATE), x_x.to(STATE), x_1.to(STATE)
    center = _of_channel(mean, channels, 0, LAST, BLOCK_C).to(STATE)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, count)
    while begin < end:
        _, index, mask = elements_of_channels(begin, end, channels, inner, LAST, BLOCK_I, BLOCK_C)
        v_i = load_numbers(v, index, mask, 0, STATE)
        g_i = load_numbers(grad, index, mask, 0, STATE)
        x_i = load_numbers(x, index, mask, 0, STATE) - center
        tl.store(d_grad + index, grad_v * v_i + (grad_x * x_i + grad_1), mask=mask)
        tl.store(d_x + index, (x_v * v_i + x_g * g_i) + (x_x * x_i + x_1), mask=mask)
        begin += BLOCK_I if LAST else BLOCK_I * BLOCK_C


def batch_norm_double_backward(v, v_weight, v_bias, grad, x, weight, mean, invstd, fixed: bool):
    """Compute :func:`adahessian_fused.friendly.formulas.batch_norm_double_backward`."""
    last = not x.is_contiguous() or x.numel() == x.shape[0] * x.shape[1]
    channels = x.shape[1]
    count = x.numel() // channels
    sizes = count, channels, 1 if last else count // x.shape[0]
    blocks = channel_blocks(channels, sizes[2], v, grad, x)
    grid, block, length = channel_grid(count, channels, blocks)
    splits = grid[1]
    results = torch.empty_like(x), torch.empty_like(x), torch.empty_like(invstd)
    partials = torch.empty(splits, N_SUMS.value, channels, dtype=invstd.dtype, device=x.device)
    with on("batch_norm_double_backward", x.device):
        batch_norm_sums_kernel[grid](v, grad, x, mean, partials, *sizes, length, num_warps=4, **FUSION, **blocks)
        if splits > MAX_SPLITS:
            partials, splits = partials.sum(0, keepdim=True, dtype=torch.float64), 1
        length = channel_length(count, block)
        batch_norm_gradients_kernel[(grid[0], triton.cdiv(count, length))](
            *(v, v_weight, v_bias, grad, x, weight, mean, invstd, partials),
            *results,
            *sizes,
            length,
            splits,
            FIXED=fixed,
            SPLITS=triton.next_power_of_2(splits),
            num_warps=4,
            **FUSION,
            **blocks,
        )
    return results
