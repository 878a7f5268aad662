"""What the double backward of norms has in common: programs that sum over elements of channels.

Elements of channels are (outer, channels, inner), with inner = 1 for channels_last. A program takes BLOCK_I elements of
BLOCK_C channels where these are LAST, else BLOCK_I vectors of BLOCK_C elements of one channel, with one division a
vector. WIDE says that vectors are whole and aligned in all tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .adahessian_math import widen
from .table import INTERPRETED

TILE = 4096 if INTERPRETED else 1024  # elements of a tile
PROGRAMS = 2 if INTERPRETED else 1024  # that sums take, so that there are several for each multiprocessor
VECTOR = 8  # elements: 128 bits of the narrowest
MAX_GRID = 65535  # of a launch, but for its first dimension


@triton.jit
def load_numbers(pointer, index, mask, otherwise: tl.constexpr, STATE: tl.constexpr):
    """Load numbers in the dtype of arithmetic; ``otherwise`` without a pointer."""
    if pointer is None:
        numbers = tl.full(index.shape, otherwise, STATE)
    else:
        numbers = widen(tl.load(pointer + index, mask=mask, other=0), STATE)
    return numbers


@triton.jit
def channels_of(LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the program's channels, (1, BLOCK_C), or its one, (1, 1)."""
    several: tl.constexpr = BLOCK_C if LAST else 1
    return tl.program_id(0) * several + tl.arange(0, several)[None, :]


@triton.jit
def elements_of_channels(begin, end, channels, inner, LAST: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return numbers (BLOCK_I, 1) of vectors from ``begin`` on, the elements' indices, and which of them there are."""
    if LAST:
        i, c = begin + tl.arange(0, BLOCK_I)[:, None], channels_of(LAST, BLOCK_C)
        index, mask = i * channels + tl.arange(0, BLOCK_C)[None, :], (i < end) & (c < channels)
    else:
        i = begin + tl.arange(0, BLOCK_I)[:, None] * BLOCK_C
        # Triton 3.6 does not find out by itself.
        first = tl.multiple_of(i // inner * (channels * inner) + i % inner, (1, BLOCK_C))
        index, mask = first + tl.arange(0, BLOCK_C)[None, :], i < end
    return i, index, mask


@triton.jit
def store_sum(target, total, channels, LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store the sums of the program's channels."""
    if LAST:
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(target + c, tl.sum(total, 0), mask=c < channels)
    else:
        tl.store(target + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def whole(number, WIDE: tl.constexpr, VECTOR: tl.constexpr = 8):
    """Return the same number, visibly a multiple of VECTOR: the compiler believes no promises about arguments."""
    if WIDE:
        number = number // VECTOR * VECTOR
    return number


@triton.jit
def at_channel(pointer, inner, LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the first element of the program's channels."""
    pointer += tl.program_id(0) * (BLOCK_C if LAST else inner)
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def are_aligned(*tensors):
    """Tell whether all that there are begin at multiples of 128 bits."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def channel_blocks(channels: int, inner: int, *tensors: torch.Tensor) -> dict[str, int]:
    """Return how programs take the elements of channels, ``inner`` side by side: see above."""
    last, is_wide = inner == 1, (channels if inner == 1 else inner) % VECTOR == 0 and are_aligned(*tensors)
    block_c = min(triton.next_power_of_2(channels), 32) if last else VECTOR if is_wide else 1
    return {"LAST": last, "WIDE": is_wide, "BLOCK_I": TILE // block_c, "BLOCK_C": block_c}


def channel_grid(count: int, channels: int, blocks: dict[str, int]) -> tuple[tuple[int, int], int, int]:
    """Return how many programs sum over elements of channels, how many elements each takes in one turn, and in all."""
    groups, block = (
        (triton.cdiv(channels, blocks["BLOCK_C"]), blocks["BLOCK_I"]) if blocks["LAST"] else (channels, TILE)
    )
    splits = min(triton.cdiv(PROGRAMS, groups), triton.cdiv(count, block), MAX_GRID)
    length = triton.cdiv(triton.cdiv(count, splits), VECTOR) * VECTOR
    return (groups, triton.cdiv(count, length)), block, length


def channel_length(count: int, block: int) -> int:
    """Return how many elements of a channel a program writes: some blocks, and as many as the grid makes it."""
    least = (1 << 20 if INTERPRETED else 8) * block
    return max(least, triton.cdiv(triton.cdiv(count, MAX_GRID), block) * block)
