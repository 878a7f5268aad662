"""The Rademacher probe z (Eq. 5) of all parameters in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .adahessian_math import signs
from .table import Mode, double_tile, on, plan_of, seed_words, send
from .tile import at, find_tile, is_vector, kernel, load_probe_key, load_row, rademacher_bits, tile_lanes


@triton.jit
def _write_signs(z, key, row, start, count, VECTOR: tl.constexpr, TILE: tl.constexpr):
    lanes = tile_lanes(row, start, count, VECTOR, TILE)
    bits = rademacher_bits(key, start, lanes.logical, VECTOR, TILE)
    tl.store(at(z, lanes.origin, lanes.index, VECTOR), signs(bits, z.dtype.element_ty), mask=lanes.mask)


@kernel
def rademacher_kernel(z, rows, tiles, steps, seed_low, seed_high, sample, TILE: tl.constexpr):
    row = load_row(rows, tl.load(tiles + tl.program_id(0)))
    start, count = find_tile(row)
    key = load_probe_key(row, steps, seed_low, seed_high, sample)
    z += row.offset
    if is_vector(row, start, count, (z + start).to(tl.int64)):
        _write_signs(z, key, row, start, count, True, TILE)
    else:
        _write_signs(z, key, row, start, count, False, TILE)


def rademacher(z: Tensor, segments: Tensor, steps: Tensor, seed: int, sample: int) -> None:
    """Write the Rademacher probe of every segment into the flat buffer ``z``, each in its parameter's storage order.

    Args:
        z: flat buffer, any floating dtype; elements outside the segments stay as they are.
        segments: :class:`Segment` table.
        steps: :class:`Steps` table, on the CPU or on the device of ``z``.
        seed: 64-bit Philox key.
        sample: number of the probe within the step.
    """
    tile, options = double_tile(z.element_size())
    with on("rademacher", z.device):
        plan = plan_of(segments, Mode.PROBE, tile, z.device)
        if len(plan.tiles) == 0:
            return
        (steps,) = send(plan, z.device, steps)
        rademacher_kernel[(len(plan.tiles),)](
            z, plan.rows, plan.tiles, steps, *seed_words(seed, sample), TILE=tile, **options
        )
