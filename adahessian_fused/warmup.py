"""The first steps of a parameter, while little is known of its curvature: they are bounded by its own size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bucket import MAX_SUBSETS, Bucket, Entry
from .segments import Hyper, Segment, Steps

_WARMUP = itemgetter("warmup")
SHARE = 0.2  # of the mean magnitude of its parameter, by which an element moves at most
LEAST = 0.1  # counts as the mean magnitude of parameters that have a smaller one, such as biases that begin at zero


class Rows(NamedTuple):
    """Rows of the table of hyperparameters for parameters that have one each.

    Attributes:
        segments: the parameters' segment table, which names these rows.
        group: rows of the parameters' groups, where the table of hyperparameters is.
        slot: the parameters' rows in the table of step counts, likewise.
        length: how many steps they warm up.
        wholes: segment table in which each parameter is one averaging block.
    """

    segments: Tensor
    group: Tensor
    slot: Tensor
    length: Tensor
    wholes: Tensor


def bounded(
    bucket: Bucket, members: Sequence[Entry], groups: Sequence[Mapping[str, Any]], table: Tensor, backend: Any
) -> tuple[Tensor, Tensor]:
    """Return segments and hyperparameters of a step; each parameter that warms up is cut by a bound of its own.

    In the first ``warmup`` steps of a parameter no element moves by more than SHARE of the parameter's mean magnitude,
    which is that of the whole parameter, as it is before the step.

    Args:
        bucket: where the states are.
        members: the parameters.
        groups: all parameter groups.
        table: their hyperparameters.
        backend: the ops.
    """
    lengths = tuple(map(_WARMUP, groups))
    segments = bucket.table_of(members)
    if not _are_new(bucket, members, groups, lengths):
        return segments, table
    rows = _rows(bucket, members, segments, lengths, table)
    own = table[rows.group]
    size = bucket.mean_magnitudes(members, rows.wholes, backend).to(table.device).clamp_min(LEAST)
    bound = torch.where(bucket.steps[rows.slot, Steps.STEP] < rows.length, SHARE * size / own[:, Hyper.LR], torch.inf)
    own[:, Hyper.CLIP] = torch.minimum(own[:, Hyper.CLIP], bound)
    for entry, row in zip(members, own, strict=True):
        entry.hyper = row
    return rows.segments, torch.cat((table, own))


def _are_new(
    bucket: Bucket, members: Sequence[Entry], groups: Sequence[Mapping[str, Any]], lengths: tuple[int, ...]
) -> bool:
    """Tell whether any of the parameters may warm up in this step.

    Counts on a device are not read: twice as many steps as the host has counted are enough for those that it skipped.
    """
    if bucket.warmed_up == lengths:
        return False
    if bucket.steps.device.type != "cpu":
        return any(groups[entry.group]["step"] < 2 * lengths[entry.group] for entry in members)
    left = [
        lengths[row[Segment.GROUP]] - t
        for row, t in zip(bucket.rows, bucket.steps[:, Steps.STEP].tolist(), strict=True)
    ]
    if any(left[entry.row] > 0 for entry in members):
        return True
    for entry in members:
        entry.hyper = None
    if max(left) <= 0:
        bucket.warmed_up = lengths
    return False


def _rows(bucket: Bucket, members: Sequence[Entry], segments: Tensor, lengths: tuple[int, ...], table: Tensor) -> Rows:
    key = (*(entry.row for entry in members), lengths)
    if len(bucket.warmup_rows) > MAX_SUBSETS:
        bucket.warmup_rows.clear()
    if key not in bucket.warmup_rows:
        own, group = segments.clone(), segments[:, Segment.GROUP]
        own[:, Segment.GROUP] = torch.arange(len(lengths), len(lengths) + len(own), device=own.device)
        length = torch.tensor(lengths, device=group.device)[group]
        group, slot, length = (x.to(table.device) for x in (group, segments[:, Segment.SLOT], length))
        bucket.warmup_rows[key] = Rows(own, group, slot, length, bucket.table_of_wholes(members, absolute=True))
    return bucket.warmup_rows[key]
