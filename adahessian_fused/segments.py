"""The segment table: how the ops see a list of parameters over flat buffers.

Parameters, gradients and Hessian-vector products stay where their owners put them. The probe z, the moving
averages and the averaged diagonal live in flat buffers. A row of the table ties one parameter to its place in them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
from torch.utils.weak import WeakIdKeyDictionary


class Segment(IntEnum):
    """Columns of the segment table, an int64 CPU tensor of shape ``(n_segments, len(Segment))``.

    ``period`` and ``stride`` describe the storage order. Block averaging and the probe follow the LOGICAL row-major
    index; a dense parameter that is stored in another order (channels_last, transposed) is a batch of logical
    ``(stride, period)`` matrices that are stored transposed:

        logical index  l = o * period * stride + i * period + k
        storage index  j = o * period * stride + k * stride + i,     0 <= k < period, 0 <= i < stride

    A contiguous parameter has period = stride = 1. All flat buffers of a parameter's size (z, the moving averages,
    the master weights) use the parameter's storage order, so elementwise work never has to look at these two columns.
    """

    OFFSET = 0  # first element in the flat buffers of the parameters' size
    NUMEL = 1
    BLOCK = 2  # b, the length of an averaging block (Eq. 7); the last block may be shorter
    PERIOD = 3
    STRIDE = 4
    DIAG_OFFSET = 5  # first block in the compact diagonal; blocks are in logical order
    PARAM_ID = 6  # the parameter's word of the Philox counter
    GROUP = 7  # row of the table of hyperparameters
    SLOT = 8  # row of the table of step counts
    ABSOLUTE = 9  # 1: average |D|, as the official code does; 0: average D (Eq. 7)


class Hyper(IntEnum):
    """Columns of the hyperparameter table, a float64 tensor of shape ``(n_groups, len(Hyper))``."""

    LR = 0
    BETA1 = 1
    BETA2 = 2
    EPS = 3
    WEIGHT_DECAY = 4
    HESSIAN_POWER = 5
    MAXIMIZE = 6  # 1: ascend
    HOLDS = 7  # 1: elements that have not seen any curvature (v = 0) do not move, unless the Hessian power is 0
    CLIP = 8  # bound of |u|, what lr is multiplied by; infinite: none
    SHRINK = 9  # c in (n v_hat + c mean(v_hat)) / (n + c), n = (1 - beta2^h) / (1 - beta2)
    NESTEROV = 10  # 1: the gradient is averaged into what moves the parameter once more than into m
    CAUTIOUS = 11  # 1: elements that would go against their gradient's descent do not move


class Steps(IntEnum):
    """Columns of the table of step counts, an int64 tensor of shape ``(n_slots, len(Steps))``."""

    STEP = 0  # t - 1: optimizer steps this parameter has completed
    HESSIAN_STEP = 1  # h: updates of its exp_hessian_diag_sq so far; numbers the probe of the coming one


def n_blocks(numel: int, block: int) -> int:
    """Return the number of averaging blocks of a parameter with ``numel`` elements."""
    return -(-numel // block)


def segment_table(rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Return the int64 table the ops take, from one tuple a parameter in the order of :class:`Segment`."""
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), len(Segment))


_altered: WeakIdKeyDictionary = WeakIdKeyDictionary()


def altered(table: torch.Tensor, change: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Return a copy of a table that a function has changed; the same each time, for backends keep plans of tables."""
    copies = _altered.setdefault(table, {})
    if change not in copies:
        copy = table.clone()
        change(copy)
        copies[change] = copy  # not before it is whole: an error may come in between
    return copies[change]


def averages_nothing(table: torch.Tensor) -> None:
    """Make the table one for a diagonal that is not averaged: signed blocks of one element, in logical order."""
    table[:, Segment.BLOCK] = 1
    table[:, Segment.ABSOLUTE] = 0
    table[:, Segment.DIAG_OFFSET] = table[:, Segment.OFFSET]


def averages_all(table: torch.Tensor) -> None:
    """Make each parameter flat, and one averaging block."""
    of_logical_order(table)
    table[:, Segment.ABSOLUTE] = 0
    table[:, Segment.BLOCK] = table[:, Segment.NUMEL].clamp_min(1)
    table[:, Segment.DIAG_OFFSET] = torch.arange(len(table), device=table.device)


def averages_magnitudes(table: torch.Tensor) -> None:
    """Make each parameter flat, and one averaging block of its magnitudes."""
    averages_all(table)
    table[:, Segment.ABSOLUTE] = 1


def of_logical_order(table: torch.Tensor) -> None:
    """Make the table one for what is stored in logical order, whatever its parameters are."""
    table[:, [Segment.PERIOD, Segment.STRIDE]] = 1
