"""The double backward of batch norm, and of layer, RMS and group norm: two kernels each.

:mod:`adahessian_fused.friendly.formulas` has the formulas and describes the arguments; the coefficients of batch norm
are those of csrc/cpu/batch_norm_double_backward.cpp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .adahessian_math import widen
from .table import FUSION, INTERPRETED, on
from .tile import kernel

TILE = 4096 if INTERPRETED else 1024  # elements of a tile
PROGRAMS = 2 if INTERPRETED else 1024  # that sums take, so that there are several for each multiprocessor
VECTOR = 8  # elements: 128 bits of the narrowest
HELD_BY_WARP = 1024  # elements of a row, of three tensors in registers; also of a block of longer rows
MAX_SPLITS = 32  # partial sums of a channel that each program of the next kernel adds up again
MAX_GRID = 65535  # of a launch, but for its first dimension
N_SUMS = tl.constexpr(5)


@triton.jit
def _numbers(pointer, index, mask, otherwise: tl.constexpr, STATE: tl.constexpr):
    """Load numbers in the dtype of arithmetic; ``otherwise`` without a pointer."""
    if pointer is None:
        numbers = tl.full(index.shape, otherwise, STATE)
    else:
        numbers = widen(tl.load(pointer + index, mask=mask, other=0), STATE)
    return numbers


# ---- elements of channels: (outer, channels, inner), with inner = 1 for channels_last -------------------------------
# A program takes BLOCK_I elements of BLOCK_C channels where these are LAST, else BLOCK_I vectors of BLOCK_C elements of
# one channel, with one division a vector. WIDE says that vectors are whole and aligned in all tensors.


@triton.jit
def _channels(LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the program's channels, (1, BLOCK_C), or its one, (1, 1)."""
    several: tl.constexpr = BLOCK_C if LAST else 1
    return tl.program_id(0) * several + tl.arange(0, several)[None, :]


@triton.jit
def _elements(begin, end, channels, inner, LAST: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return numbers (BLOCK_I, 1) of vectors from ``begin`` on, the elements' indices, and which of them there are."""
    if LAST:
        i, c = begin + tl.arange(0, BLOCK_I)[:, None], _channels(LAST, BLOCK_C)
        index, mask = i * channels + tl.arange(0, BLOCK_C)[None, :], (i < end) & (c < channels)
    else:
        i = begin + tl.arange(0, BLOCK_I)[:, None] * BLOCK_C
        # Triton 3.6 does not find out by itself.
        first = tl.multiple_of(i // inner * (channels * inner) + i % inner, (1, BLOCK_C))
        index, mask = first + tl.arange(0, BLOCK_C)[None, :], i < end
    return i, index, mask


@triton.jit
def _of_channel(pointer, channels, otherwise: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load a number of each of the program's channels, in float64; ``otherwise`` without a pointer."""
    c = _channels(LAST, BLOCK_C)
    if pointer is None:
        numbers = tl.full(c.shape, otherwise, tl.float64)
    else:
        numbers = tl.load(pointer + c, mask=c < channels, other=0).to(tl.float64)
    return numbers


@triton.jit
def _store_sum(target, total, channels, LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store the sums of the program's channels."""
    if LAST:
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(target + c, tl.sum(total, 0), mask=c < channels)
    else:
        tl.store(target + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _whole(number, WIDE: tl.constexpr, VECTOR: tl.constexpr = 8):
    """Return the same number, visibly a multiple of VECTOR: the compiler believes no promises about arguments."""
    if WIDE:
        number = number // VECTOR * VECTOR
    return number


@triton.jit
def _of_program(pointer, inner, LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the first element of the program's channels."""
    pointer += tl.program_id(0) * (BLOCK_C if LAST else inner)
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


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
    length, inner, channels = _whole(length, WIDE), _whole(inner, WIDE and not LAST), _whole(channels, WIDE and LAST)
    v = _of_program(v, inner, LAST, WIDE, BLOCK_C)
    grad, x = _of_program(grad, inner, LAST, WIDE, BLOCK_C), _of_program(x, inner, LAST, WIDE, BLOCK_C)
    center = _of_channel(mean, channels, 0, LAST, BLOCK_C).to(STATE)
    sum_v = tl.zeros([BLOCK_I, BLOCK_C], STATE)
    sum_g, sum_vx, sum_gx, sum_vg = sum_v, sum_v, sum_v, sum_v
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, count)
    while begin < end:
        _, index, mask = _elements(begin, end, channels, inner, LAST, BLOCK_I, BLOCK_C)
        v_i = _numbers(v, index, mask, 0, STATE)
        g_i = _numbers(grad, index, mask, 0, STATE)
        x_i = _numbers(x, index, mask, 0, STATE) - center
        sum_v += v_i
        sum_g += g_i
        sum_vx += v_i * x_i
        sum_gx += g_i * x_i
        sum_vg += v_i * g_i
        begin += BLOCK_I if LAST else BLOCK_I * BLOCK_C
    target = partials + tl.program_id(1) * N_SUMS * channels
    _store_sum(target, sum_v, channels, LAST, BLOCK_C)
    _store_sum(target + channels, sum_g, channels, LAST, BLOCK_C)
    _store_sum(target + 2 * channels, sum_vx, channels, LAST, BLOCK_C)
    _store_sum(target + 3 * channels, sum_gx, channels, LAST, BLOCK_C)
    _store_sum(target + 4 * channels, sum_vg, channels, LAST, BLOCK_C)


@triton.jit
def _total(
    partials, number: tl.constexpr, splits, channels, SPLITS: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return one of the sums over all splits, of each of the program's channels."""
    c = _channels(LAST, BLOCK_C)
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
    length, inner, channels = _whole(length, WIDE), _whole(inner, WIDE and not LAST), _whole(channels, WIDE and LAST, 4)
    v = _of_program(v, inner, LAST, WIDE, BLOCK_C)
    grad, x = _of_program(grad, inner, LAST, WIDE, BLOCK_C), _of_program(x, inner, LAST, WIDE, BLOCK_C)
    d_grad, d_x = _of_program(d_grad, inner, LAST, WIDE, BLOCK_C), _of_program(d_x, inner, LAST, WIDE, BLOCK_C)
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
    c = _channels(LAST, BLOCK_C)
    tl.store(d_weight + c, dw.to(STATE), mask=c < tl.where(tl.program_id(1) == 0, channels, 0))
    grad_v, grad_x, grad_1 = (w * s).to(STATE), grad_x.to(STATE), grad_1.to(STATE)
    x_v, x_g, x_x, x_1 = x_v.to(STATE), x_g.to(STATE), x_x.to(STATE), x_1.to(STATE)
    center = _of_channel(mean, channels, 0, LAST, BLOCK_C).to(STATE)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, count)
    while begin < end:
        _, index, mask = _elements(begin, end, channels, inner, LAST, BLOCK_I, BLOCK_C)
        v_i = _numbers(v, index, mask, 0, STATE)
        g_i = _numbers(grad, index, mask, 0, STATE)
        x_i = _numbers(x, index, mask, 0, STATE) - center
        tl.store(d_grad + index, grad_v * v_i + (grad_x * x_i + grad_1), mask=mask)
        tl.store(d_x + index, (x_v * v_i + x_g * g_i) + (x_x * x_i + x_1), mask=mask)
        begin += BLOCK_I if LAST else BLOCK_I * BLOCK_C


def _blocks(channels: int, inner: int, *tensors: torch.Tensor) -> dict[str, int]:
    """Return how programs take the elements of channels, ``inner`` side by side: see above."""
    last, is_wide = inner == 1, (channels if inner == 1 else inner) % VECTOR == 0 and _are_aligned(*tensors)
    block_c = min(triton.next_power_of_2(channels), 32) if last else VECTOR if is_wide else 1
    return {"LAST": last, "WIDE": is_wide, "BLOCK_I": TILE // block_c, "BLOCK_C": block_c}


def _grid(count: int, channels: int, blocks: dict[str, int]) -> tuple[tuple[int, int], int, int]:
    """Return how many programs sum over elements of channels, how many elements each takes in one turn, and in all."""
    groups, block = (
        (triton.cdiv(channels, blocks["BLOCK_C"]), blocks["BLOCK_I"]) if blocks["LAST"] else (channels, TILE)
    )
    splits = min(triton.cdiv(PROGRAMS, groups), triton.cdiv(count, block), MAX_GRID)
    length = triton.cdiv(triton.cdiv(count, splits), VECTOR) * VECTOR
    return (groups, triton.cdiv(count, length)), block, length


def _length(count: int, block: int) -> int:
    """Return how many elements of a channel a program writes: some blocks, and as many as the grid makes it."""
    least = (1 << 20 if INTERPRETED else 8) * block
    return max(least, triton.cdiv(triton.cdiv(count, MAX_GRID), block) * block)


def batch_norm_double_backward(v, v_weight, v_bias, grad, x, weight, mean, invstd, fixed: bool):
    """Compute :func:`adahessian_fused.friendly.formulas.batch_norm_double_backward`."""
    last = not x.is_contiguous() or x.numel() == x.shape[0] * x.shape[1]
    channels = x.shape[1]
    count = x.numel() // channels
    sizes = count, channels, 1 if last else count // x.shape[0]
    blocks = _blocks(channels, sizes[2], v, grad, x)
    grid, block, length = _grid(count, channels, blocks)
    splits = grid[1]
    results = torch.empty_like(x), torch.empty_like(x), torch.empty_like(invstd)
    partials = torch.empty(splits, N_SUMS.value, channels, dtype=invstd.dtype, device=x.device)
    with on("batch_norm_double_backward", x.device):
        batch_norm_sums_kernel[grid](v, grad, x, mean, partials, *sizes, length, num_warps=4, **FUSION, **blocks)
        if splits > MAX_SPLITS:
            partials, splits = partials.sum(0, keepdim=True, dtype=torch.float64), 1
        length = _length(count, block)
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


# ---- rows -----------------------------------------------------------------------------------------------------------


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
    x_i = (_numbers(x, i, mask, 0, s.dtype) - center) * s
    return i, mask, c, _numbers(v, i, mask, 0, s.dtype), _numbers(grad, i, mask, 0, s.dtype), x_i


@triton.jit
def _store_gradients(d_grad, d_x, v_weight, v_bias, weight, elements, coefficients):
    """Store both gradients of elements of a row, which are linear in v, g and x_hat."""
    i, mask, c, v_i, g_i, x_i = elements
    s, p_x, p_1, x_u, x_v, x_x, x_1 = coefficients
    w_i, vw_i = _numbers(weight, c, mask, 1, s.dtype), _numbers(v_weight, c, mask, 0, s.dtype)
    p_i = s * v_i + (p_x * x_i + p_1)
    tl.store(d_grad + i, w_i * p_i + (vw_i * x_i + _numbers(v_bias, c, mask, 0, s.dtype)), mask=mask)
    tl.store(d_x + i, (s * vw_i + x_u * w_i) * g_i + (x_v * v_i + (x_x * x_i + x_1)), mask=mask)


@triton.jit
def _with(sums, v_weight, weight, elements):
    """Add to the sums of v, w g, v_w g, their products with x_hat, and v w g those of more elements."""
    _, mask, c, v_i, g_i, x_i = elements
    v, u, r, vx, ux, rx, vu = sums
    u_i, r_i = g_i * _numbers(weight, c, mask, 1, g_i.dtype), g_i * _numbers(v_weight, c, mask, 0, g_i.dtype)
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
    length = _whole(channels * inner, WIDE)
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
    length, inner, weights = _whole(length, WIDE), _whole(inner, WIDE and not LAST), _whole(weights, WIDE and LAST)
    v = _of_program(v, inner, LAST, WIDE, BLOCK_C)
    grad, x = _of_program(grad, inner, LAST, WIDE, BLOCK_C), _of_program(x, inner, LAST, WIDE, BLOCK_C)
    total = tl.zeros([BLOCK_I, BLOCK_C], STATE)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, count)
    while begin < end:
        i, index, mask = _elements(begin, end, weights, inner, LAST, BLOCK_I, BLOCK_C)
        row, seen = i, i < end
        if not LAST:
            row //= inner
        if not ONE:
            row, seen = row * groups + _channels(LAST, BLOCK_C) // channels, mask
        s = tl.load(invstd + row, mask=seen, other=0)
        v_i = _numbers(v, index, mask, 0, STATE)
        g_i = _numbers(grad, index, mask, 0, STATE)
        x_i = _numbers(x, index, mask, 0, STATE)
        if mean is not None:
            x_i -= tl.load(mean + row, mask=seen, other=0)
        v_mean = tl.load(means + row, mask=seen, other=0)
        vx = tl.load(means + rows + row, mask=seen, other=0)
        total += tl.where(mask, g_i * s * (v_i - v_mean - x_i * s * vx), 0)
        begin += BLOCK_I if LAST else BLOCK_I * BLOCK_C
    _store_sum(partials + tl.program_id(1) * weights, total, weights, LAST, BLOCK_C)


def _are_aligned(*tensors):
    """Tell whether all that there are begin at multiples of 128 bits."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


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
    blocks = _blocks(weights, inner, v, grad, x)
    grid, _, share = _grid(count, weights, blocks)
    partials = torch.empty(grid[1], weights, dtype=invstd.dtype, device=x.device)
    with on("row_norm_double_backward", x.device):
        row_norm_gradients_kernel[(rows,)](
            *(v, v_weight, v_bias, grad, x, weight, mean, invstd, d_grad, d_x, means),
            *(rows, channels, inner, groups),
            ONE=one,
            WIDE=channels * inner % 16 == 0 and _are_aligned(v, v_weight, v_bias, grad, x, weight),
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
