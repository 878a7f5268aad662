"""The whole AdaHessian step (Eq. 6-9) of all parameters in one launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .adahessian_math import (
    Coefficients,
    denominator,
    is_measured,
    numerator,
    quotient,
    round_stochastically,
    round_to,
    square_of,
    swap_bytes,
    update_exp_avg,
    update_exp_hessian_diag_sq,
    update_param,
)
from .coefficients import coefficients_kernel, host_coefficients, load_coefficients
from .hessian_diag import average_long_blocks
from .table import LAUNCH, TILES, Mode, addresses, common_dtype, on, plan_of, seed_words, send, tl_dtype
from .tile import (
    at,
    block_means,
    divide,
    find_tile,
    general_lanes,
    hutchinson,
    is_vector,
    kernel,
    load_probe_key,
    load_rounding_key,
    load_row,
    rounding_bits,
    rows_in_tile,
    spread,
    tile_lanes,
    vector_lanes,
)


@triton.jit
def load_compact(diag, row, start, lanes, VECTOR: tl.constexpr):
    """Load Ds of every lane's block from the compact diagonal."""
    if row.block == 1:
        ds = tl.load(at(diag, start, lanes.logical, VECTOR), mask=lanes.mask, other=0)
    else:
        first, block = divide(start, lanes.logical, row.block)
        ds = tl.load(diag + first + block, mask=lanes.mask, other=0)
    return ds


class Arrays(NamedTuple):
    """Pointers to the segment's first element, and to its number of elements whose Ds was not finite."""

    param: Any
    grad: Any
    hessian: Any
    exp_avg: Any
    exp_hessian_diag_sq: Any
    master: Any
    missed: Any


@triton.jit
def load_state(arrays, lanes, S: tl.constexpr, VECTOR: tl.constexpr):
    """Load the weights, g, m and v, in the dtype S of all arithmetic."""
    weights = arrays.param if arrays.master is None else arrays.master
    p = tl.load(at(weights, lanes.origin, lanes.index, VECTOR), mask=lanes.mask, other=0)
    g = tl.load(at(arrays.grad, lanes.origin, lanes.index, VECTOR), mask=lanes.mask, other=0)
    m = tl.load(at(arrays.exp_avg, lanes.origin, lanes.index, VECTOR), mask=lanes.mask, other=0)
    v = tl.load(at(arrays.exp_hessian_diag_sq, lanes.origin, lanes.index, VECTOR), mask=lanes.mask, other=0)
    return p.to(S), g.to(S), m.to(S), v.to(S)


@triton.jit
def update(
    arrays, lanes, p, g, m, v, ds, c, rounding, CURVATURE: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr
):
    """Update by Eq. 8 and 9; ``ds`` is ignored on an off-step, ``rounding`` unless the states are bfloat16."""
    m = update_exp_avg(m, g, c)
    if CURVATURE != "none":
        square = square_of(ds, c)
        v = update_exp_hessian_diag_sq(v, square, c)
        if arrays.missed is not None:
            missed = lanes.mask & (is_measured(square) == 0)
            tl.atomic_add(arrays.missed + lanes.index * 0, 1, mask=missed, sem="relaxed")
    kept_m, kept_v = m, v
    if arrays.exp_avg.dtype.element_ty == tl.bfloat16:
        bits = rounding_bits(rounding, lanes, VECTOR, LANES)
        kept_m, kept_v = round_stochastically(m, bits), round_stochastically(v, swap_bytes(bits))
    tl.store(at(arrays.exp_avg, lanes.origin, lanes.index, VECTOR), kept_m, mask=lanes.mask)
    if CURVATURE != "none":
        tl.store(at(arrays.exp_hessian_diag_sq, lanes.origin, lanes.index, VECTOR), kept_v, mask=lanes.mask)
    rough: tl.constexpr = arrays.param.dtype.element_ty.primitive_bitwidth == 16
    q = quotient(numerator(m, g, c), denominator(v, c, rough), c, rough)
    p = tl.where(c.moves != 0, update_param(p, q, v, c), p)
    if arrays.master is not None:
        tl.store(at(arrays.master, lanes.origin, lanes.index, VECTOR), p, mask=lanes.mask)
    tl.store(
        at(arrays.param, lanes.origin, lanes.index, VECTOR), round_to(p, arrays.param.dtype.element_ty), mask=lanes.mask
    )


@triton.jit
def update_vector_tile(
    arrays,
    diag,
    c,
    key,
    rounding,
    row,
    start,
    count,
    S: tl.constexpr,
    CURVATURE: tl.constexpr,
    IS_HVP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Update a tile that is_vector."""
    lanes = vector_lanes(start, count, TILE)
    # All reads first: averaging has barriers, and reads do not move across them.
    p, g, m, v = load_state(arrays, lanes, S, True)
    ds = m
    if CURVATURE == "hessian":
        if row.block <= TILE:
            ds = tl.load(at(arrays.hessian, lanes.origin, lanes.index, True), mask=lanes.mask, other=0).to(S)
            if row.block > 1:  # otherwise only D^2 = Hz^2 enters
                ds = hutchinson(ds, key, row, start, lanes, IS_HVP, True, TILE)
                ds = spread(block_means(ds, row, count, lanes, True), row, lanes, True)
        else:
            ds = load_compact(diag, row, start, lanes, True)
    elif CURVATURE == "compact":
        ds = load_compact(diag, row, start, lanes, True)
    update(arrays, lanes, p, g, m, v, ds, c, rounding, CURVATURE, True, TILE)


@triton.jit
def update_general_tile(
    arrays,
    diag,
    c,
    key,
    rounding,
    row,
    start,
    count,
    S: tl.constexpr,
    CURVATURE: tl.constexpr,
    IS_HVP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Update any tile: blocks are averaged over the whole tile, then the rest is done a few lanes at a time.

    Addresses take two registers an element here; more lanes at a time would leave the tiles that are vectors with half
    the warps.
    """
    SOME: tl.constexpr = TILE // 4
    means = tl.zeros([TILE], S)
    if CURVATURE == "hessian" and row.block <= TILE:
        lanes = tile_lanes(row, start, count, False, TILE)
        means = tl.load(at(arrays.hessian, lanes.origin, lanes.index, False), mask=lanes.mask, other=0).to(means.dtype)
        if row.block > 1:
            means = hutchinson(means, key, row, start, lanes, IS_HVP, False, TILE)
            means = block_means(means, row, count, lanes, False)
    end = tl.where(row.lane_period == 1, count, TILE)
    first = end * 0
    while first < end:
        lane = first + tl.arange(0, SOME)
        lanes = general_lanes(row, start, count, rows_in_tile(row), row.lane_period.to(tl.int32), lane)
        p, g, m, v = load_state(arrays, lanes, S, False)
        ds = m
        if CURVATURE == "hessian" and row.block <= TILE:
            ds = spread(means, row, lanes, False)
        elif CURVATURE != "none":
            ds = load_compact(diag, row, start, lanes, False)
        update(arrays, lanes, p, g, m, v, ds, c, rounding, CURVATURE, False, SOME)
        first += SOME


@kernel
def adahessian_step_kernel(
    table,
    diag,
    exp_avg,
    exp_hessian_diag_sq,
    master,
    grad_scale,
    found_inf,
    means,
    missed,
    rows,
    tiles,
    steps,
    coefficients,
    seed_low,
    seed_high,
    sample,
    rounding_seed_low,
    rounding_seed_high,
    DTYPE: tl.constexpr,
    CURVATURE: tl.constexpr,  # "hessian", "compact" or "none"
    IS_HVP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Update one tile of one parameter in each program."""
    segment = tl.load(tiles + tl.program_id(0))
    row = load_row(rows, segment)
    start, count = find_tile(row)
    if found_inf is not None:
        count = tl.where(tl.load(found_inf) != 0, 0, count)  # an empty tile changes nothing
    key = load_probe_key(row, steps, seed_low, seed_high, sample)
    rounding = load_rounding_key(row, steps, rounding_seed_low, rounding_seed_high)
    S: tl.constexpr = tl.float64 if DTYPE.primitive_bitwidth == 64 else tl.float32
    c = load_coefficients(coefficients, row.pair, grad_scale, means, row.slot)

    table += segment * (3 if CURVATURE == "hessian" else 2)
    param = tl.load(table).to(tl.pointer_type(DTYPE))
    grad = tl.load(table + 1).to(tl.pointer_type(DTYPE))
    hessian = param
    exp_avg += row.offset
    exp_hessian_diag_sq += row.offset
    touched = (param + start).to(tl.int64) | (grad + start).to(tl.int64)
    touched |= (exp_avg + start).to(tl.int64) | (exp_hessian_diag_sq + start).to(tl.int64)
    if CURVATURE == "hessian":
        hessian = tl.load(table + 2).to(tl.pointer_type(DTYPE))
        touched |= (hessian + start).to(tl.int64)
    if CURVATURE != "none":
        diag += row.diag_offset
    if CURVATURE == "compact":
        touched |= tl.where(row.block == 1, (diag + start).to(tl.int64), 0)
    if master is not None:
        master += row.offset
        touched |= (master + start).to(tl.int64)

    if missed is not None:
        missed += row.slot
    arrays = Arrays(param, grad, hessian, exp_avg, exp_hessian_diag_sq, master, missed)
    if is_vector(row, start, count, touched):
        update_vector_tile(arrays, diag, c, key, rounding, row, start, count, S, CURVATURE, IS_HVP, TILE)
    else:
        update_general_tile(arrays, diag, c, key, rounding, row, start, count, S, CURVATURE, IS_HVP, TILE)


# ---- the op ----------------------------------------------------------------------------------------------------------


def adahessian_step(
    params: list[Tensor],
    grads: list[Tensor],
    hessians: list[Tensor],
    diag: Tensor | None,
    exp_avg: Tensor,
    exp_hessian_diag_sq: Tensor,
    master: Tensor | None,
    segments: Tensor,
    steps: Tensor,
    groups: Tensor,
    *,
    seed: int,
    sample: int,
    is_hvp: bool,
    rounding_seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    means: Tensor | None,
    missed: Tensor | None,
) -> None:
    """Perform one AdaHessian step (Eq. 6-9) on every segment, in place.

    Everything is as in :func:`adahessian_fused.reference.adahessian_step`. With ``steps`` or ``groups`` on the device
    the call never waits for it and can be captured in a CUDA graph, after a call outside of one.

    Args:
        params: parameters of one dtype, updated in place; dense, in the storage order their segments declare.
        grads: gradients, same shapes, strides and dtype as ``params``.
        hessians: Hz (or D, if not ``is_hvp``) like ``grads``; empty if there is none or ``diag`` is given.
        diag: compact block-averaged diagonal of :func:`hessian_diag`.
        exp_avg: flat buffer of m, float32 (float64 for float64 parameters) or bfloat16, updated in place.
        exp_hessian_diag_sq: flat buffer of v, likewise.
        master: flat buffer of float32 weights that 16-bit parameters are rounded from, updated in place.
        segments: :class:`Segment` table, one row a parameter.
        steps: :class:`Steps` table before this step, on the CPU or on the device.
        groups: :class:`Hyper` table, on the CPU or on the device.
        seed: 64-bit Philox key.
        sample: number of the probe within the step.
        is_hvp: ``hessians`` are Hz and have to be multiplied by z.
        rounding_seed: 64-bit Philox key of the bits that round to bfloat16.
        grad_scale: gradients and curvature are divided by this scalar tensor (GradScaler).
        found_inf: scalar tensor; nothing at all changes if it is not zero.
        means: float64, on the device: for each row of ``steps`` the mean of v / (1 - beta2^h); None: no shrinking.
        missed: int64, likewise, increased by the number of elements whose Ds v could not take in.

    Raises:
        ValueError: a list of tensors has several dtypes, or not one tensor a segment.
        RuntimeError: Triton cannot reach the device of ``exp_avg`` in this process.
    """
    if len(segments) == 0:
        return
    device = exp_avg.device
    lists = [params, grads, hessians] if hessians and diag is None else [params, grads]
    dtype, *others = (
        common_dtype("adahessian_step", name, tensors, segments)
        for name, tensors in zip(("params", "grads", "hessians"), lists, strict=False)
    )
    if any(other != dtype for other in others):
        raise ValueError(f"adahessian_step: params are {dtype}, grads and hessians {others}; expected the same dtype")
    mode = Mode.COMPACT if diag is not None else Mode.HESSIAN if len(lists) == 3 else Mode.ELEMENTWISE
    with on("adahessian_step", device):
        _launch(
            lists, dtype, diag, exp_avg, exp_hessian_diag_sq, master, segments, steps, groups, mode,
            probe=seed_words(seed, sample),
            is_hvp=is_hvp,
            rounding_seed=rounding_seed,
            scalars=[None if x is None else x.to(device) for x in (grad_scale, found_inf)],
            per_slot=[means, missed],
            on_device=steps.device.type != "cpu" or groups.device.type != "cpu",
        )  # fmt: skip


def _launch(
    lists: list[list[Tensor]],
    dtype: torch.dtype,
    diag: Tensor | None,
    exp_avg: Tensor,
    exp_hessian_diag_sq: Tensor,
    master: Tensor | None,
    segments: Tensor,
    steps: Tensor,
    groups: Tensor,
    mode: Mode,
    probe: tuple[int, int, int],
    is_hvp: bool,
    rounding_seed: int,
    scalars: list[Tensor | None],
    per_slot: list[Tensor | None],
    on_device: bool,
) -> None:
    device = exp_avg.device
    tile, num_warps = TILES[dtype.itemsize]
    plan = plan_of(segments, mode, tile, device)
    curvature, has_means = mode is not Mode.ELEMENTWISE, per_slot[0] is not None
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    table, scale = addresses(*lists), np.ones(1)
    if on_device:
        table, scale, steps, groups = send(plan, device, table, scale, steps, groups)
        coefficients = torch.empty(len(plan.pairs), len(Coefficients._fields), dtype=computed, device=device)
        coefficients_kernel[(len(plan.pairs),)](
            coefficients, plan.pairs, groups, steps, int(curvature), int(has_means), num_warps=1, **LAUNCH
        )
    else:
        rows = host_coefficients(groups.numpy()[plan.groups], steps.numpy()[plan.slots], curvature, has_means)
        rows = rows.astype(np.float64 if computed == torch.float64 else np.float32)
        table, scale, steps, coefficients = send(plan, device, table, scale, steps, rows)

    config = {"DTYPE": tl_dtype(dtype), "IS_HVP": is_hvp, "TILE": tile, "num_warps": num_warps, **LAUNCH}
    if mode is Mode.HESSIAN:
        # Blocks longer than a tile are averaged ahead, so that Hz is read once.
        diag = torch.empty(len(plan.blocks), dtype=computed, device=device)
        average_long_blocks(plan, table, (3, 2), diag, steps, scale, False, probe, **config)
    if len(plan.tiles):
        adahessian_step_kernel[(len(plan.tiles),)](
            table,
            diag,
            exp_avg,
            exp_hessian_diag_sq,
            master,
            *scalars,
            *per_slot,
            plan.rows,
            plan.tiles,
            steps,
            coefficients,
            *probe,
            *seed_words(rounding_seed, 0)[:2],
            CURVATURE={Mode.HESSIAN: "hessian", Mode.COMPACT: "compact", Mode.ELEMENTWISE: "none"}[mode],
            **config,
        )
