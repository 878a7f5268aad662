"""All parameters moved along the Rademacher probe, or put back, in one launch."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from .adahessian_math import round_to, signs
from .table import LAUNCH, TILES, Mode, addresses, common_dtype, on, plan_of, seed_words, send, tl_dtype
from .tile import at, find_tile, is_vector, kernel, load_probe_key, load_row, rademacher_bits, tile_lanes


@triton.jit
def _move(
    param, saved, scale, key, row, start, count,
    SAVE: tl.constexpr, RESTORE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    lanes = tile_lanes(row, start, count, VECTOR, TILE)
    param = at(param, lanes.origin, lanes.index, VECTOR)
    saved = at(saved, lanes.origin, lanes.index, VECTOR)
    if SAVE:
        p = tl.load(param, mask=lanes.mask, other=0)
        tl.store(saved, p, mask=lanes.mask)
    else:
        p = tl.load(saved, mask=lanes.mask, other=0)
    if not RESTORE:
        z = signs(rademacher_bits(key, start, lanes.logical, VECTOR, TILE), scale.dtype)
        p = round_to(p.to(scale.dtype) + scale * z, p.dtype)
    tl.store(param, p, mask=lanes.mask)


@kernel
def perturb_kernel(
    table,
    saved,
    scale,
    rows,
    tiles,
    steps,
    seed_low,
    seed_high,
    sample,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    SAVE: tl.constexpr,
    RESTORE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Move one tile of one parameter in each program."""
    segment = tl.load(tiles + tl.program_id(0))
    row = load_row(rows, segment)
    start, count = find_tile(row)
    key = load_probe_key(row, steps, seed_low, seed_high, sample)
    param = tl.load(table + segment).to(tl.pointer_type(DTYPE))
    saved += row.offset
    length = tl.load(scale).to(STATE)
    if is_vector(row, start, count, (param + start).to(tl.int64) | (saved + start).to(tl.int64)):
        _move(param, saved, length, key, row, start, count, SAVE, RESTORE, True, TILE)
    else:
        _move(param, saved, length, key, row, start, count, SAVE, RESTORE, False, TILE)


def perturb(
    params: list[Tensor],
    saved: Tensor,
    segments: Tensor,
    steps: Tensor,
    *,
    seed: int,
    sample: int,
    scale: float,
    save: bool,
) -> None:
    """Move every parameter along its probe, p = saved + scale * z, for a finite difference of gradients.

    The probe is that of :func:`rademacher`. With ``scale=0`` the saved values are put back bit for bit.

    Args:
        params: parameters of one dtype, overwritten; dense, in the storage order their segments declare.
        saved: flat buffer of their dtype; elements outside the segments stay as they are.
        segments: :class:`Segment` table, one row a parameter.
        steps: :class:`Steps` table, on the CPU or on the device of ``saved``.
        seed: 64-bit Philox key.
        sample: number of the probe within the step.
        scale: length of the move in every element, rounded to the precision of the states.
        save: first copy the parameters into ``saved``.

    Raises:
        ValueError: ``params`` has tensors of several dtypes, or not one a segment.
        RuntimeError: Triton cannot reach the device of ``saved`` in this process.
    """
    if len(segments) == 0:
        return
    dtype = common_dtype("perturb", "params", params, segments)
    tile, num_warps = TILES[dtype.itemsize]
    with on("perturb", saved.device):
        plan = plan_of(segments, Mode.PROBE, tile, saved.device)
        if len(plan.tiles) == 0:
            return
        length = np.array([scale], dtype=np.float64)
        table, length, steps = send(plan, saved.device, addresses(params), length, steps)
        perturb_kernel[(len(plan.tiles),)](
            table, saved, length, plan.rows, plan.tiles, steps, *seed_words(seed, sample),
            DTYPE=tl_dtype(dtype), STATE=tl.float64 if dtype.itemsize == 8 else tl.float32, SAVE=save,
            RESTORE=scale == 0, TILE=tile, num_warps=num_warps, **LAUNCH,
        )  # fmt: skip
