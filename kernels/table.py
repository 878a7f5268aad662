"""What the host prepares before a launch: which program works on what, and the tensors' addresses, on the device.

The *plan* of a segment table (its rows and the list of tiles) depends on the segments alone; it is uploaded once and
kept as long as the segment tensor lives. The *words* (addresses, step counts, coefficients) may change with every call;
they travel in one copy from pinned memory, and not at all if they are what the device already has.

CUDA graphs: a replay reads the tables again, so tables used under capture live as long as the process (some 40 bytes a
parameter tensor and capture), and a copy recorded under capture reads pinned memory that is never written again.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adahessian_fused.capture import capturing
from adahessian_fused.segments import Segment, n_blocks

# (elements of a tile, warps), by the size of the parameters' dtype. 8 elements a thread are what 16-bit parameters need
# for 128-bit accesses, and share one Philox call; with five streams in flight they take up to 128 registers, so that
# 16 warps fit a multiprocessor (sm_80 and later).
TILES = {2: (1024, 4), 4: (1024, 4), 8: (512, 4)}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    TILES = dict.fromkeys(TILES, (4096, 4))  # its time goes with the number of programs

FUSION: dict[str, object] = {"enable_fp_fusion": True}  # Triton's default changes with its version
LAUNCH: dict[str, object] = {"enable_fp_fusion": False}  # adahessian_math says which products are
if torch.version.hip is None:
    LAUNCH["maxnreg"] = 128  # nothing spills yet


def double_tile(size: int, max_registers: int = 128) -> tuple[int, dict[str, object]]:
    """Return a tile of twice the size, and launch options: where little is read, threads can have more elements."""
    tile, num_warps = TILES[size]
    options = {**LAUNCH, "num_warps": num_warps}
    return 2 * tile, options | ({"maxnreg": max_registers} if "maxnreg" in LAUNCH else {})


VECTOR = 8  # elements: tiles begin at multiples of this where they can, so that every access is 128 bits wide
MAX_PARTS = 4096  # of a long block; one program each


class Row(NamedTuple):
    """Columns of the device's segment table: those of :class:`Segment`, then what the plan adds. All int64."""

    offset: Any
    numel: Any
    block: Any  # at most numel
    period: Any  # 1 where the storage order does not matter
    stride: Any
    diag_offset: Any  # of long blocks in a step: in the scratch buffer
    param_id: Any
    group: Any
    slot: Any
    absolute: Any
    pair: Any  # row of the table of coefficients
    first_tile: Any  # number of the segment's first program
    tile_length: Any  # elements a program works on
    lane_period: Any  # lanes of a tile follow the storage of a (rows, lane_period) matrix
    first_part: Any  # of its long blocks in the list of parts
    part_length: Any  # elements whose partial sum one program takes
    first_block: Any  # of its long blocks in the list of blocks


class Mode(Enum):
    """What a launch needs of the logical order."""

    PROBE = "rademacher: every element's logical index"
    DIAG = "hessian_diag: whole blocks in a double tile"
    HESSIAN = "adahessian_step with Hz: whole blocks in a tile, unless b = 1"
    COMPACT = "adahessian_step with a compact diagonal: every element's block"
    ELEMENTWISE = "adahessian_step without curvature"


@dataclass
class Plan:
    """Device tables that depend on the segments only."""

    rows: Tensor  # int64 (n_segments, len(Row))
    tiles: Tensor  # int32: the segment of each program of the main launch
    parts: Tensor  # int32: the segment of each partial sum of a long block
    blocks: Tensor  # int32: the segment of each long block
    pairs: Tensor  # int64: the distinct (slot, group)
    slots: np.ndarray
    groups: np.ndarray
    words: dict[Any, tuple[np.ndarray, Tensor]] = field(default_factory=dict)


def tile_shape(block: int, period: int, tile: int) -> tuple[int, int]:
    """Return how many elements a segment's tiles have, and the period of their lanes' order.

    A tile holds whole blocks. It also begins at a multiple of VECTOR and holds whole rows of a transposed matrix if
    such a length fits; otherwise accesses are narrower, or not coalesced.
    """
    for unit, lane_period in ((math.lcm(block, period, VECTOR), period), (math.lcm(block, period), period), (block, 1)):
        if unit <= tile:
            return tile // unit * unit, lane_period
    raise ValueError(f"a block of {block} elements does not fit a tile of {tile}")


def _row(segment: list[int], mode: Mode, tile: int) -> dict[str, int]:
    """Return a segment's row, but for the numbers that depend on its predecessors."""
    row = {column.name.lower(): segment[column] for column in Segment}
    row["block"] = min(row["block"], max(row["numel"], 1))
    averaged = mode in (Mode.DIAG, Mode.HESSIAN)
    most = tile // 2 if mode is Mode.DIAG else tile  # blocks are as long, and sums as they are, as in a step's tiles
    long = averaged and row["block"] > most
    if mode is Mode.ELEMENTWISE or (mode is Mode.HESSIAN and row["block"] == 1):
        row["period"] = row["stride"] = 1  # elements are independent: any order will do
    in_tile = row["block"] if averaged and not long else 1
    row["tile_length"], row["lane_period"] = tile_shape(in_tile, row["period"], tile)
    row["part_length"] = most * -(-row["block"] // (most * MAX_PARTS)) if long else 0
    return row


def build_plan(segments: Tensor, mode: Mode, tile: int, device: torch.device) -> Plan:
    """Plan the launches over a segment table, and upload it."""
    rows: list[list[int]] = []
    pairs: dict[tuple[int, int], int] = {}
    counts: dict[str, list[int]] = {"first_tile": [], "first_part": [], "first_block": []}
    totals = dict.fromkeys(counts, 0)
    for segment in segments.tolist():
        row = _row(segment, mode, tile)
        n_tiles, n_parts, n_long = n_blocks(row["numel"], row["tile_length"]), 0, 0
        if row["part_length"]:
            n_long = n_blocks(row["numel"], row["block"])
            n_parts = n_long * n_blocks(row["block"], row["part_length"])
            if mode is Mode.DIAG:
                n_tiles = 0
            else:
                row["diag_offset"] = totals["first_block"]
        row["pair"] = pairs.setdefault((row["slot"], row["group"]), len(pairs))
        for name, n in zip(counts, (n_tiles, n_parts, n_long), strict=True):
            row[name] = totals[name]
            totals[name] += n
            counts[name].append(n)
        rows.append([row[name] for name in Row._fields])

    lists = [np.repeat(np.arange(len(rows), dtype=np.int32), n) for n in counts.values()]
    slots_groups = np.array(list(pairs), dtype=np.int64).reshape(-1, 2)
    tables = (np.array(rows, dtype=np.int64), *lists, slots_groups)
    on_device = (upload(table, device) for table in tables)
    return Plan(*on_device, slots_groups[:, 0], slots_groups[:, 1])  # type: ignore[call-arg]


_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()
_captured: list[Any] = []  # tables that CUDA graphs read at replay


def plan_of(segments: Tensor, mode: Mode, tile: int, device: torch.device) -> Plan:
    """Return the plan of this segment tensor, from the cache unless the tensor has been written since."""
    cached = _plans.setdefault(segments, {})
    key = (segments._version, mode, tile, device)
    if key in cached:
        plan = cached[key]
    else:
        plan = build_plan(segments, mode, tile, device)
        if not capturing(device):  # a captured upload has not happened yet
            cached[key] = plan
    if capturing(device):
        _captured.append(plan)
    return plan


def send(plan: Plan, device: torch.device, *parts: np.ndarray | Tensor) -> list[Tensor]:
    """Send what changes from call to call to the device: one copy for all parts, and none if they were sent last.

    Tensors that are on the device already are passed through.
    """
    hosted = [i for i, part in enumerate(parts) if not (isinstance(part, Tensor) and part.device == device)]
    arrays = [np.ascontiguousarray(parts[i]).reshape(-1) for i in hosted]
    words = [np.pad(array.view(np.uint8), (0, -array.nbytes % 16)) for array in arrays]
    sent = _send_words(plan, np.concatenate(words) if words else np.empty(0, np.uint8), device)
    tensors: list[Any] = list(parts)
    begin = 0
    for i, array, word in zip(hosted, arrays, words, strict=True):
        dtype = torch.from_numpy(array[:0]).dtype
        tensors[i] = sent[begin : begin + array.nbytes].view(dtype)
        begin += word.nbytes
    return tensors


def _send_words(plan: Plan, words: np.ndarray, device: torch.device) -> Tensor:
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    last = plan.words.get(stream)
    if last is not None and np.array_equal(last[0], words):
        sent = last[1]
    else:
        sent = upload(words, device)
        if not capturing(device):  # a captured upload has not happened yet
            plan.words[stream] = (words, sent)
    if capturing(device):
        _captured.append(sent)
    return sent


def addresses(*lists: list[Tensor]) -> np.ndarray:
    """Return the tensors' addresses, those of one segment side by side: int64, flat."""
    columns = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    return np.array(columns, dtype=np.int64).T.reshape(-1)


# ---- copies ----------------------------------------------------------------------------------------------------------

_ARENA_BYTES = 1 << 20
_arena: Tensor | None = None  # pinned memory for copies under capture, where none can be allocated; handed out once
_arena_used = 0


def _pinned(n_bytes: int, device: torch.device) -> Tensor:
    global _arena, _arena_used
    if not capturing(device):
        if _arena is None or _arena_used > _ARENA_BYTES // 2:
            _captured.append(_arena)
            _arena, _arena_used = torch.empty(_ARENA_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True), 0
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    begin, _arena_used = _arena_used, _arena_used + -(-n_bytes // 16) * 16
    if _arena is None or _arena_used > _ARENA_BYTES:
        raise RuntimeError(
            f"adahessian_fused: no pinned memory left for a table of {n_bytes} bytes while a CUDA graph is captured; "
            "take a step outside the graph before capturing"
        )
    return _arena[begin : begin + n_bytes]


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a NumPy array to the device, without waiting for the copy."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu" or host.numel() == 0:
        return host.to(device)
    pinned = _pinned(host.nbytes, device).view(host.dtype).reshape(host.shape)
    pinned.copy_(host)
    return torch.empty(host.shape, dtype=host.dtype, device=device).copy_(pinned, non_blocking=True)


# ---- checks and launches ---------------------------------------------------------------------------------------------


def common_dtype(op: str, name: str, tensors: list[Tensor], segments: Tensor) -> torch.dtype:
    """Return the one dtype of a list of tensors, one a segment."""
    if len(tensors) != len(segments):
        raise ValueError(f"{op}: {name} has {len(tensors)} tensors, segments has {len(segments)} rows")
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        found = " and ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{op}: {name} has {found} tensors; expected one dtype a call")
    return tensors[0].dtype


def on(op: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Make ``device`` current for a launch; refuses devices that this process's Triton cannot reach."""
    if (device.type == "cpu") != INTERPRETED:
        way = "interprets Triton (TRITON_INTERPRET=1), for CPU tensors" if INTERPRETED else "compiles Triton, for GPUs"
        raise RuntimeError(f"{op}: tensors are on {device}, but this process {way}")
    return contextlib.nullcontext() if INTERPRETED else torch.cuda.device(device)


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of a dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def signed32(word: int) -> int:
    """Return the low 32 bits of an integer as Triton's i32, whose type then does not depend on the value."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def seed_words(seed: int, sample: int) -> tuple[int, int, int]:
    """Return the low and high word of the Philox key and the sample's word of the counter."""
    return signed32(seed), signed32(seed >> 32), signed32(sample)
