"""The block-averaged Hutchinson diagonal Ds (Eq. 6 and 7) of all parameters.

Blocks of up to a tile take one launch. Longer ones (rows, whole tensors) take two: partial sums, each by one program,
then their sum in a fixed order.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .table import (
    LAUNCH,
    TILES,
    Mode,
    Plan,
    addresses,
    common_dtype,
    double_tile,
    on,
    plan_of,
    seed_words,
    send,
    tl_dtype,
)
from .tile import (
    at,
    block_means,
    find_tile,
    general_lanes,
    hutchinson,
    is_vector,
    kernel,
    load_probe_key,
    load_row,
    tile_lanes,
    vector_lanes,
)


@triton.jit
def _write(target, means, scale, accumulate, mask):
    """Overwrite ``target`` by scale * means, or add them to it."""
    means *= scale
    if accumulate != 0:
        means += tl.load(target, mask=mask)
    tl.store(target, means, mask=mask)


@triton.jit
def _average_tile(
    hessian,
    diag,
    scale,
    accumulate,
    key,
    row,
    start,
    count,
    IS_HVP: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
):
    lanes = tile_lanes(row, start, count, VECTOR, TILE)
    d = tl.load(at(hessian, lanes.origin, lanes.index, VECTOR), mask=lanes.mask, other=0).to(diag.dtype.element_ty)
    d = hutchinson(d, key, row, start, lanes, IS_HVP, VECTOR, TILE)
    if row.block == 1:
        _write(at(diag, start, lanes.logical, VECTOR), d, scale, accumulate, lanes.mask)
    else:
        means = block_means(d, row, count, lanes, VECTOR)
        block = row.block.to(tl.int32)
        target = diag + start // row.block + lanes.logical // block
        _write(target, means, scale, accumulate, lanes.mask & (lanes.logical % block == 0))


@kernel
def hessian_diag_kernel(
    table,
    diag,
    rows,
    tiles,
    steps,
    scale,
    accumulate,
    seed_low,
    seed_high,
    sample,
    DTYPE: tl.constexpr,
    IS_HVP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Read a tile of Hz once in each program, and write the means of its blocks."""
    segment = tl.load(tiles + tl.program_id(0))
    row = load_row(rows, segment)
    start, count = find_tile(row)
    key = load_probe_key(row, steps, seed_low, seed_high, sample)
    hessian = tl.load(table + segment).to(tl.pointer_type(DTYPE))
    diag += row.diag_offset
    factor = tl.load(scale).to(diag.dtype.element_ty)
    touched = (hessian + start).to(tl.int64)
    if row.block == 1:
        touched |= (diag + start).to(tl.int64)
    if is_vector(row, start, count, touched):
        _average_tile(hessian, diag, factor, accumulate, key, row, start, count, IS_HVP, True, TILE)
    else:
        _average_tile(hessian, diag, factor, accumulate, key, row, start, count, IS_HVP, False, TILE)


# ---- blocks longer than a tile ---------------------------------------------------------------------------------------


@triton.jit
def _tile_sum(
    hessian,
    key,
    row,
    start,
    count,
    STATE: tl.constexpr,
    IS_HVP: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
):
    if VECTOR:
        lanes = vector_lanes(start, count, TILE)
    else:
        lanes = general_lanes(row, start, count, TILE, 1, tl.arange(0, TILE))
    d = tl.load(at(hessian, lanes.origin, lanes.index, VECTOR), mask=lanes.mask, other=0).to(STATE)
    return tl.sum(hutchinson(d, key, row, start, lanes, IS_HVP, VECTOR, TILE), 0).to(tl.float64)


@kernel
def partial_sums_kernel(
    table,
    stride,
    column,
    partials,
    rows,
    parts,
    steps,
    seed_low,
    seed_high,
    sample,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    IS_HVP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum D over ``part_length`` elements of a block: a tree within a tile, float64 from tile to tile."""
    segment = tl.load(parts + tl.program_id(0))
    row = load_row(rows, segment)
    key = load_probe_key(row, steps, seed_low, seed_high, sample)
    hessian = tl.load(table + segment * stride + column).to(tl.pointer_type(DTYPE))
    part = tl.program_id(0) - row.first_part
    parts_per_block = tl.cdiv(row.block, row.part_length)
    block = part // parts_per_block
    begin = block * row.block + part % parts_per_block * row.part_length
    end = tl.minimum(tl.minimum(begin + row.part_length, (block + 1) * row.block), row.numel)
    total = tl.full((), 0, tl.float64)
    start = begin
    while start < end:
        count = tl.minimum(TILE, end - start).to(tl.int32)
        if is_vector(row, start, count, (hessian + start).to(tl.int64)):
            total += _tile_sum(hessian, key, row, start, count, STATE, IS_HVP, True, TILE)
        else:
            total += _tile_sum(hessian, key, row, start, count, STATE, IS_HVP, False, TILE)
        start += TILE
    tl.store(partials + tl.program_id(0), total)


@kernel
def combine_kernel(partials, diag, rows, blocks, scale, accumulate, WIDTH: tl.constexpr):
    """Add up one block's partial sums in each program, always in the same order."""
    row = load_row(rows, tl.load(blocks + tl.program_id(0)))
    block = tl.program_id(0) - row.first_block
    parts_per_block = tl.cdiv(row.block, row.part_length).to(tl.int32)
    first = partials + row.first_part + block * parts_per_block
    lane = tl.arange(0, WIDTH)
    sums = tl.zeros([WIDTH], tl.float64)
    part = parts_per_block * 0
    while part < parts_per_block:
        sums += tl.load(first + part + lane, mask=part + lane < parts_per_block, other=0)
        part += WIDTH
    mean = tl.sum(sums, 0) / tl.minimum(row.block, row.numel - block * row.block).to(tl.float64)
    mean = (mean * tl.load(scale)).to(diag.dtype.element_ty)
    _write(diag + row.diag_offset + block, mean, 1, accumulate, None)


def average_long_blocks(
    plan: Plan,
    table: Tensor,
    columns: tuple[int, int],
    diag: Tensor,
    steps: Tensor,
    scale: Tensor,
    accumulate: bool,
    probe: tuple[int, int, int],
    **config: object,
) -> None:
    """Write Ds of the plan's long blocks into ``diag``; ``columns``: width of the table of addresses, column of Hz."""
    if len(plan.blocks) == 0:
        return
    partials = torch.empty(len(plan.parts), dtype=torch.float64, device=diag.device)
    partial_sums_kernel[(len(plan.parts),)](
        table, *columns, partials, plan.rows, plan.parts, steps, *probe, STATE=tl_dtype(diag.dtype), **config
    )
    combine_kernel[(len(plan.blocks),)](
        partials, diag, plan.rows, plan.blocks, scale, int(accumulate), WIDTH=256, num_warps=1, **LAUNCH
    )


def diag_tile(size: int) -> tuple[int, dict[str, object]]:
    """Return a tile's size and launch options; 16-bit tiles have twice the warps, or some registers would spill."""
    tile, options = double_tile(size, 128 if size == 2 else 168)
    return tile, options | {"num_warps": 8 if size == 2 else options["num_warps"]}


def hessian_diag(
    hessians: list[Tensor],
    diag: Tensor,
    segments: Tensor,
    steps: Tensor,
    *,
    seed: int,
    sample: int,
    is_hvp: bool,
    scale: float,
    accumulate: bool,
) -> None:
    """Compute the block-averaged Hutchinson diagonal Ds (Eq. 6 and 7) into the compact buffer ``diag``.

    Args:
        hessians: Hz of every segment in its parameter's shape and storage order, or D itself if not ``is_hvp``.
        diag: flat float32 (float64 for float64 parameters) buffer with one number a block.
        segments: :class:`Segment` table, one row a tensor of ``hessians``.
        steps: :class:`Steps` table, on the CPU or on the device of ``diag``.
        seed: 64-bit Philox key.
        sample: number of the probe within the step.
        is_hvp: draw z again and multiply by it.
        scale: factor on the result, for example 1 / n_samples.
        accumulate: add to ``diag`` instead of overwriting it.

    Raises:
        ValueError: ``hessians`` has tensors of several dtypes, or not one a segment.
        RuntimeError: Triton cannot reach the device of ``diag`` in this process.
    """
    if len(segments) == 0:
        return
    dtype = common_dtype("hessian_diag", "hessians", hessians, segments)
    tile, num_warps = TILES[dtype.itemsize]
    double, options = diag_tile(dtype.itemsize)
    options["TILE"] = double
    with on("hessian_diag", diag.device):
        plan = plan_of(segments, Mode.DIAG, double, diag.device)
        table, factor, steps = send(plan, diag.device, addresses(hessians), np.array([scale], dtype=np.float64), steps)
        probe = seed_words(seed, sample)
        config: dict[str, object] = {"DTYPE": tl_dtype(dtype), "IS_HVP": is_hvp}
        if len(plan.tiles):
            numbers = table, diag, plan.rows, plan.tiles, steps, factor, int(accumulate), *probe
            hessian_diag_kernel[(len(plan.tiles),)](*numbers, **config, **options)
        config |= {"TILE": tile, "num_warps": num_warps, **LAUNCH}
        average_long_blocks(plan, table, (1, 0), diag, steps, factor, accumulate, probe, **config)
