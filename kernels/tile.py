"""How a kernel finds the elements of its tile and averages them over blocks.

A tile is a stretch of one segment in LOGICAL order. Its lanes access storage in one of two ways, chosen for each tile
at run time: VECTOR, for contiguous, aligned stretches of whole vectors, in 128-bit accesses; or one element at a time,
for everything else (tails of odd length, misaligned views, channels_last and other storage orders).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .adahessian_math import (
    ROUNDINGS_PER_CALL,
    SIGNS_PER_CALL,
    ProbeKey,
    RoundingKey,
    divide_rn,
    rademacher_words,
    rounding_words,
)
from .table import VECTOR as _VECTOR
from .table import Row

_COLUMNS = tl.constexpr(len(Row._fields))
WHOLE_VECTOR = tl.constexpr(_VECTOR)


def kernel(function: Callable) -> Callable:
    """Make a kernel by triton.jit: one binary, whatever the values and alignments of its arguments."""
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[p.name for p in parameters if "constexpr" not in str(p.annotation)])


class Lanes(NamedTuple):
    """Where each lane of a tile works."""

    logical: Any  # int32: logical index within the tile
    origin: Any  # scalar int64: storage index in the segment = origin + index
    index: Any
    mask: Any


@triton.jit
def load_row(rows, segment):
    """Load the segment's row; columns that a kernel does not use cost nothing."""
    row = rows + segment * _COLUMNS
    return Row(
        tl.load(row + 0),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
        tl.load(row + 7),
        tl.load(row + 8),
        tl.load(row + 9),
        tl.load(row + 10),
        tl.load(row + 11),
        tl.load(row + 12),
        tl.load(row + 13),
        tl.load(row + 14),
        tl.load(row + 15),
        tl.load(row + 16),
    )


@triton.jit
def load_probe_key(row, steps, seed_low, seed_high, sample):
    """Load the key of the probe of the segment's parameter at its coming Hessian step."""
    hessian_step = tl.load(steps + row.slot * 2 + 1)
    return ProbeKey(
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
        row.param_id.to(tl.uint32),
        hessian_step.to(tl.uint32),
        sample.to(tl.uint32, bitcast=True),
    )


@triton.jit
def load_rounding_key(row, steps, seed_low, seed_high):
    """Load the key of the rounding of the segment's states in the coming step."""
    step = tl.load(steps + row.slot * 2) + 1
    return RoundingKey(
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
        row.param_id.to(tl.uint32),
        step.to(tl.uint32),
    )


@triton.jit
def find_tile(row):
    """Return this program's stretch of the segment: first logical element (int64) and number of elements (int32)."""
    start = (tl.program_id(0) - row.first_tile) * row.tile_length
    return start, tl.minimum(row.tile_length, row.numel - start).to(tl.int32)


@triton.jit
def is_vector(row, start, count, addresses):
    """Tell whether a tile can use VECTOR: ``addresses`` is the bitwise or of all that it reads and writes."""
    return (row.period == 1) & (((start | count) % WHOLE_VECTOR) == 0) & (addresses % 16 == 0)


@triton.jit
def divide(start, offset, divisor):
    """Divide start + offset by divisor: the quotient is the scalar ``first`` plus ``local``.

    ``offset`` is int32 and less than a tile. There is one 64-bit division a program; the lanes' are 32-bit: a divisor
    that does not fit is passed at most once in a tile, so whatever is left before it can be cut short.
    """
    first = start // divisor
    rest = start - first * divisor
    short = tl.minimum(divisor, 1 << 30)
    rest = tl.maximum(rest - (divisor - short), -(1 << 30)).to(tl.int32)
    local = tl.maximum(rest + offset, 0) // short.to(tl.int32)
    return first, local


@triton.jit
def rows_in_tile(row):
    """Return how many rows of ``row.lane_period`` elements a tile of the segment has."""
    return (row.tile_length // row.lane_period).to(tl.int32)


@triton.jit
def vector_lanes(start, count, TILE: tl.constexpr):
    """Return the lanes of a tile that is_vector."""
    lane = tl.arange(0, TILE)
    # A bound that is visibly a multiple of the vector lets the compiler mask whole vectors.
    return Lanes(lane, start, lane, lane < count // WHOLE_VECTOR * WHOLE_VECTOR)


@triton.jit
def general_lanes(row, start, count, n_rows, lane_period, lane):
    """Return some lanes of the tile that begins at logical element ``start``: ``n_rows`` rows of ``lane_period``."""
    # Neighbouring lanes take neighbouring rows of the matrix that is stored transposed: accesses coalesce.
    logical = lane % n_rows * lane_period + lane // n_rows
    mask = (lane < n_rows * lane_period) & (logical < count)
    logical = tl.where(mask, logical, 0)
    # Segment's formula for the storage index j, with r = l // period, k = l - r * period, o = r // stride and
    # i = r - o * stride:  j = l * stride - r * (period * stride - 1) + o * (period - 1) * stride.
    first_r, local_r = divide(start, logical, row.period)
    first_o, local_o = divide(first_r, local_r, row.stride)
    per_r, per_o = row.period * row.stride - 1, (row.period - 1) * row.stride
    origin = start * row.stride - first_r * per_r + first_o * per_o
    return Lanes(logical, origin, logical * row.stride - local_r * per_r + local_o * per_o, mask)


@triton.jit
def tile_lanes(row, start, count, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """Return all lanes of one of the segment's tiles."""
    if VECTOR:
        lanes = vector_lanes(start, count, TILE)
    else:
        lanes = general_lanes(row, start, count, rows_in_tile(row), row.lane_period.to(tl.int32), tl.arange(0, TILE))
    return lanes


@triton.jit
def lane_of(logical, row, VECTOR: tl.constexpr):
    """Return the lane that works on a logical index of the tile: the inverse of tile_lanes."""
    if VECTOR:
        lane = logical
    else:
        lane = logical % row.lane_period.to(tl.int32) * rows_in_tile(row) + logical // row.lane_period.to(tl.int32)
    return lane


@triton.jit
def at(base, origin, index, VECTOR: tl.constexpr):
    """Return pointers base + origin + index, with what is_vector found out about base + origin."""
    first = base + origin
    if VECTOR:
        first = tl.multiple_of(first, 16)
    return first + index


@triton.jit
def rademacher_bits(key, start, logical, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """Return the lanes' bits of the probe: 1 means z = -1. One Philox call serves 128 elements."""
    first_call = start // SIGNS_PER_CALL
    # The tile may begin within a call, so it touches up to one more than it has room for: twice as many, a power of 2.
    call = first_call + tl.arange(0, 2 * TILE // SIGNS_PER_CALL)
    w0, w1, w2, w3 = rademacher_words(key, call.to(tl.uint32))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(8 * TILE // SIGNS_PER_CALL)
    words = words.to(tl.int32, bitcast=True)
    first = (start - first_call * SIGNS_PER_CALL).to(tl.int32)
    if VECTOR:  # the signs of a vector are a byte
        bit = first + tl.arange(0, TILE // WHOLE_VECTOR) * WHOLE_VECTOR
        byte = tl.gather(words, bit // 32, 0) >> (bit % 32)
        bits = ((byte[:, None] >> tl.arange(0, WHOLE_VECTOR)[None, :]) & 1).reshape(TILE)
    else:
        bit = first + logical
        bits = (tl.gather(words, bit // 32, 0) >> (bit % 32)) & 1
    return bits


@triton.jit
def rounding_bits(key, lanes, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """Return the lanes' 16 bits, uint32. In a tile that is_vector one Philox call serves 8 lanes, otherwise one."""
    if VECTOR:
        call = lanes.origin // ROUNDINGS_PER_CALL + tl.arange(0, TILE // ROUNDINGS_PER_CALL)
        w0, w1, w2, w3 = rounding_words(key, call.to(tl.uint32))
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(TILE // 2)
        bits = tl.join(words & 0xFFFF, words >> 16).reshape(TILE)
    else:
        stored = tl.where(lanes.mask, lanes.origin + lanes.index, 0)
        w0, w1, w2, w3 = rounding_words(key, (stored // ROUNDINGS_PER_CALL).to(tl.uint32))
        low, high = tl.where((stored & 2) != 0, w1, w0), tl.where((stored & 2) != 0, w3, w2)
        word = tl.where((stored & 4) != 0, high, low)
        bits = tl.where((stored & 1) != 0, word >> 16, word & 0xFFFF)
    return bits


@triton.jit
def hutchinson(d, key, row, start, lanes, IS_HVP: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """Return D = z * Hz (Eq. 6) of a tile, or |D|."""
    if row.absolute != 0:
        d = tl.abs(d)
    else:
        if IS_HVP:
            d = tl.where(rademacher_bits(key, start, lanes.logical, VECTOR, TILE) != 0, -d, d)
    return d


@triton.jit
def block_means(d, row, count, lanes, VECTOR: tl.constexpr):
    """Return Ds (Eq. 7) of a tile that holds whole blocks, in the lane of each block's first element.

    Doubling: when a pass begins, a lane holds the sum of ``span`` elements from its own on, as far as they lie in its
    block; it adds what the lane ``span`` further on holds. The order of the additions is fixed, and their rounding
    error grows with log2(b).
    """
    block = row.block.to(tl.int32)
    position = lanes.logical % block
    span = block * 0 + 1
    while span < block:
        inside = lanes.mask & (position + span < block)
        later = tl.gather(d, lane_of(tl.where(inside, lanes.logical + span, 0), row, VECTOR), 0)
        d = tl.where(inside, d + later, d)
        span *= 2
    length = tl.where(lanes.mask, tl.minimum(block, count - lanes.logical), 1)
    return divide_rn(d, length.to(d.dtype))


@triton.jit
def spread(means, row, lanes, VECTOR: tl.constexpr):
    """Return the mean of each lane's block."""
    first = lanes.logical - lanes.logical % row.block.to(tl.int32)
    return tl.gather(means, lane_of(first, row, VECTOR), 0)
