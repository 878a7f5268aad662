"""Flat buffers for the states of many parameters, and the place of each parameter in them.

A :class:`Bucket` holds the states of all parameters of one device and dtype in flat buffers and reaches parameters,
gradients and Hessian-vector products through the segment table; one call of an op serves the whole bucket. The state
tensors users see (``optimizer.state[p]["exp_avg"]``) are views of the buffers in the parameter's shape and strides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor

from .capture import capturing
from .distributed import sharded
from .looks import count, looks_of
from .segments import Segment, Steps, altered, averages_all, averages_magnitudes, n_blocks, segment_table

_DTYPE, _STRIDES, _BUCKET = attrgetter("dtype"), attrgetter("strides"), attrgetter("bucket")

_LIKE_PARAM = ("exp_avg", "exp_hessian_diag_sq", "master_param")  # states of the parameter's shape
MEAN = "hessian_diag_sq_mean"  # state, where v_hat is drawn to its mean
MAX_SUBSETS = 64  # of a bucket's parameters, whose tables are remembered
ALIGNMENT = 64  # elements between segment starts: whole cache lines, and any vector width


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of all arithmetic for parameters of ``dtype``, and of their states unless reduced."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stored_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return the dtype of exp_avg and exp_hessian_diag_sq of parameters; ``wanted`` is AdaHessian's option.

    Raises:
        ValueError: the parameters cannot have such states.
    """
    if wanted is None:
        return compute_dtype(dtype)
    if dtype == torch.float64:
        raise ValueError(f"state_dtype={wanted} with {dtype} parameters; expected None, their states are {dtype} too")
    return wanted


def storage_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Return (period, stride) of a dense tensor's storage order, see :class:`Segment`; None if no pair describes it."""
    dims = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    if 0 in shape:
        return 1, 1
    sizes = [size for size, _ in dims]
    for middle in range(len(dims) + 1):
        for last in range(middle, len(dims) + 1):
            # Logical (lead, middle, last) stored as (lead, last, middle).
            stride, period = math.prod(sizes[middle:last]), math.prod(sizes[last:])
            stored = dims[:middle] + dims[last:] + dims[middle:last]
            expected = 1
            for size, step in reversed(stored):
                if step != expected:
                    break
                expected *= size
            else:
                return (1, 1) if stride == 1 or period == 1 else (period, stride)
    return None


@dataclass(slots=True, eq=False)
class Entry:
    """One parameter's place in its bucket."""

    param: Tensor  # of a sharded parameter the part that this rank has
    name: str  # for messages
    param_id: int
    group: int
    state: dict[str, Any]
    block: int = 1  # length b of its averaging blocks
    absolute: bool = False
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    strides: tuple[int, ...] = ()
    order: tuple[int, int] | None = None  # None: neither dense nor transposed; reached through contiguous copies
    bucket: Bucket | None = None
    row: int = -1
    pointer: int = 0
    version: int = -1  # of the parameter after our last write; -1: others may have written since
    views: dict[str, Tensor] = field(default_factory=dict)
    used_mean: Tensor | None = None  # what the last step has drawn v_hat to
    hyper: Tensor | None = None  # hyperparameters of the last step, if they were not its group's
    owner: Tensor | None = None  # the parameter as the user sees it, which has the gradient
    first: int | None = 0  # number, in the whole parameter, of the first element here; None: it is no range of them

    def __post_init__(self) -> None:
        self.owner, self.param = self.param, sharded.local(self.param)

    def describe(self, block: int, averaging: str) -> None:
        """Note how the parameter is stored now, and how it is averaged over blocks of ``block`` elements."""
        self.param = p = sharded.local(self.owner)
        self.block, self.first = block, sharded.first_element(self.owner)
        sharded.check_blocks(self.owner, self.block, self.name)
        self.absolute = averaging == "abs"
        self.shape, self.dtype, self.strides = p.shape, p.dtype, p.stride()
        self.order = storage_order(p.shape, self.strides)

    @property
    def missed(self) -> Tensor:
        """How many elements had no finite curvature in Hessian steps so far, a scalar on the parameter's device."""
        return self.bucket.missed[self.row]

    @property
    def copied(self) -> bool:
        """Whether the ops see contiguous copies of this parameter's tensors."""
        return self.order is None

    @property
    def dense_strides(self) -> tuple[int, ...]:
        """Strides of everything that is stored in this parameter's storage order."""
        if not self.copied:
            return self.strides
        return torch.empty(self.param.shape, device="meta").stride()

    def fits(self) -> bool:
        """Tell whether the parameter still is what this entry was made for (users rebind ``p.data``)."""
        p = self.param = sharded.local(self.owner)
        if (p.stride(), p.dtype, p.shape, p.device) != (self.strides, self.dtype, self.shape, self.bucket.device):
            return False
        if p.data_ptr() != self.pointer:
            self.pointer, self.version = p.data_ptr(), -1
        return True

    def probe_words(self) -> tuple[int, int]:
        """Return what tells this parameter's probe from others of the same seed and sample."""
        return self.param_id, int(self.bucket.steps[self.row, Steps.HESSIAN_STEP])

    def become(self, other: Entry) -> None:
        """Take over everything from another entry of the same parameter."""
        for name in self.__slots__:
            setattr(self, name, getattr(other, name))

    def publish(self) -> None:
        """Put the views of the buffers where users see the parameter's state."""
        for key in {"hessian_diag", MEAN} - self.views.keys():
            self.state.pop(key, None)
        for key, view in self.views.items():
            self.state[key] = sharded.joined(view, self.owner) if key in _LIKE_PARAM else view

    def stored(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of the parameter's shape in the storage order the ops expect and the given (or its) dtype.

        The tensor itself, if it is like that already.
        """
        p, dtype = self.param, dtype or self.param.dtype
        if tensor.dtype == dtype and not self.copied and _same_order(tensor, p):
            return tensor
        out = torch.empty_strided(p.shape, self.dense_strides, dtype=dtype, device=p.device)
        return out.copy_(tensor)

    def product(self, z: Tensor, h: Tensor) -> Tensor:
        """Compute D = z * Hz (Eq. 6) for a probe that the ops cannot draw again, in the precision of all arithmetic."""
        dtype = compute_dtype(self.param.dtype)
        return self.stored(z.to(dtype) * h.to(dtype), dtype)


@dataclass(slots=True)
class Subset:
    """What the ops take for some entries of a bucket: kept, as most steps are of the same ones."""

    segments: Tensor
    rows: Tensor | None = None  # their numbers, unless all are in it
    looks: Any = None  # of the parameters
    addresses: Tensor | None = None
    has_hessians: bool = False  # among the addresses
    places: list[tuple[Any, Any, int]] | None = None  # shape, strides and offset in flat buffers


class Bucket:
    """Flat states of the parameters of one device and dtype.

    Args:
        entries: the parameters; each gets its ``bucket``, ``row`` and ``views`` set, and what its ``state`` holds is
            copied into the buffers.
        capturable: keep the step counts on the device.
        master_weights: keep float32 weights for 16-bit parameters.
        keep_diag: keep the compact diagonal of the last Hessian step (``off_step="stale"``).
        keep_means: keep the mean of v / (1 - beta2^h) of every parameter (``shrink``).
        state_dtype: dtype of exp_avg and exp_hessian_diag_sq; None for that of all arithmetic.
        with_states: False for an estimate of the diagonal alone.
    """

    def __init__(
        self,
        entries: list[Entry],
        *,
        capturable: bool = False,
        master_weights: bool = False,
        keep_diag: bool = False,
        keep_means: bool = False,
        state_dtype: torch.dtype | None = None,
        with_states: bool = True,
    ) -> None:
        first = entries[0].param
        # The entries know their bucket, not the other way round: a reference cycle would keep its buffers alive.
        self.count = len(entries)
        self.has_copied = any(entry.copied for entry in entries)
        self.is_row_major = all(entry.param.is_contiguous() for entry in entries)
        # Where |D| is averaged, D has to be summed up over probes and micro-batches, element by element, before.
        self.averages_magnitudes = any(entry.absolute for entry in entries)
        self.device, self.dtype = first.device, first.dtype
        self.compute_dtype = compute_dtype(first.dtype)
        self._make_table(entries)
        count_device = self.device if capturable else torch.device("cpu")
        self.steps = torch.zeros(len(entries), len(Steps), dtype=torch.int64, device=count_device)
        # How many elements of each parameter had no finite curvature in Hessian steps so far.
        self.missed = torch.zeros(len(entries), dtype=torch.int64, device=self.device)
        self._all, self._subsets = Subset(self.segments), dict[tuple[int, ...], Subset]()  # least recently used first
        self._captured: list[Any] = []  # what CUDA graphs read
        self.warmed_up: tuple[int, ...] | None = (
            None  # lengths of the groups' warm-ups that no parameter is in any more
        )
        self.warmup_rows: dict[Any, Any] = {}
        if not with_states:
            return
        stored = stored_dtype(first.dtype, state_dtype)
        self.exp_avg, self.exp_hessian_diag_sq = self.new_flat(stored), self.new_flat(stored)
        use_master = master_weights and first.dtype in (torch.bfloat16, torch.float16)
        self.master = self.new_flat() if use_master else None
        self.diag = self.new_diag() if keep_diag else None
        self.means = torch.zeros(self.count, dtype=torch.float64, device=self.device) if keep_means else None
        for entry in entries:
            self._adopt(entry)

    def _make_table(self, entries: Sequence[Entry]) -> None:
        rows: list[tuple[int, ...]] = []
        offset = diag_offset = 0
        for row, entry in enumerate(entries):
            entry.bucket, entry.row, entry.pointer = self, row, entry.param.data_ptr()
            numel = entry.param.numel()
            period, stride = entry.order or (1, 1)
            rows.append(
                (
                    *(offset, numel, entry.block, period, stride, diag_offset),
                    *(entry.param_id, entry.group, row, int(entry.absolute)),
                )
            )
            offset += -(-numel // ALIGNMENT) * ALIGNMENT
            diag_offset += n_blocks(numel, entry.block)
        self.rows, self.numel, self.diag_numel = rows, offset, diag_offset
        self.segments = segment_table(rows)

    def new_flat(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return zeros of the size of all parameters, padding included."""
        return torch.zeros(self.numel, dtype=dtype or self.compute_dtype, device=self.device)

    def new_diag(self) -> Tensor:
        """Return zeros of the size of the compact diagonal."""
        return torch.zeros(self.diag_numel, dtype=self.compute_dtype, device=self.device)

    def view(self, flat: Tensor, entry: Entry) -> Tensor:
        """Return the part of a flat buffer that belongs to a parameter, in its shape and storage order."""
        return flat.as_strided(entry.param.shape, entry.dense_strides, self.rows[entry.row][Segment.OFFSET])

    def views(self, flat: Tensor, entries: Sequence[Entry]) -> list[Tensor]:
        """Return the parts of a flat buffer that belong to some parameters, see :meth:`view`."""
        subset = self._subset(entries)
        if subset.places is None:
            subset.places = [(e.param.shape, e.dense_strides, self.rows[e.row][Segment.OFFSET]) for e in entries]
        return [flat.as_strided(*place) for place in subset.places]

    def logical_view(self, flat: Tensor, entry: Entry) -> Tensor:
        """Return the part of a flat buffer that belongs to a parameter, in its shape and row-major order."""
        begin = self.rows[entry.row][Segment.OFFSET]
        return flat[begin : begin + entry.param.numel()].view(entry.param.shape)

    def diag_view(self, diag: Tensor, entry: Entry) -> Tensor:
        """Return the blocks of a compact diagonal that belong to a parameter, in logical order."""
        begin = self.rows[entry.row][Segment.DIAG_OFFSET]
        return diag[begin : begin + n_blocks(entry.param.numel(), entry.block)]

    def stored(self, entries: Sequence[Entry], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor in its parameter's dtype and storage order; itself where it is like that."""
        if any(map(Tensor._is_zerotensor, tensors)):  # autograd's zeros (of sgn, once) have no memory
            tensors = [t.clone() if t._is_zerotensor() else t for t in tensors]
        strided = all(map(Tensor.is_contiguous, tensors)) if self.is_row_major else _same_strides(entries, tensors)
        if strided and not self.has_copied and set(map(_DTYPE, tensors)) == {self.dtype}:
            return list(tensors)
        return [entry.stored(tensor) for entry, tensor in zip(entries, tensors, strict=True)]

    def spread(self, diag: Tensor, entry: Entry) -> Tensor:
        """Give every element of a parameter its block's mean, in the parameter's shape."""
        width = min(entry.block, entry.param.numel())  # a block may be longer than its parameter
        blocks = self.diag_view(diag, entry).repeat_interleave(width)
        return blocks[: entry.param.numel()].reshape(entry.param.shape)

    def _adopt(self, entry: Entry) -> None:
        """Copy what the parameter's state holds into the buffers."""
        views = {
            "step": self.steps[entry.row, Steps.STEP],
            "hessian_step": self.steps[entry.row, Steps.HESSIAN_STEP],
            "exp_avg": self.view(self.exp_avg, entry),
            "exp_hessian_diag_sq": self.view(self.exp_hessian_diag_sq, entry),
        }
        if self.master is not None:
            views["master_param"] = self.view(self.master, entry)
        d = entry.state.get("hessian_diag")
        if self.diag is not None and d is not None and d.shape == self.diag_view(self.diag, entry).shape:
            views["hessian_diag"] = self.diag_view(self.diag, entry)
        if self.means is not None and MEAN in entry.state:
            views[MEAN] = self.means[entry.row]
        for key, view in views.items():
            old = entry.state.get(key)
            if isinstance(old, Tensor) and old.ndim:
                old = sharded.part_of(old, entry.owner)
            if isinstance(old, Tensor) and old.shape != view.shape:
                raise ValueError(
                    f"state {key} of {entry.name} has shape {tuple(old.shape)}; expected {tuple(view.shape)}. Was it "
                    "saved with another model or another block_size?"
                )
            if old is not None:
                view.copy_(old) if isinstance(old, Tensor) else view.fill_(old)
            elif key == "master_param":
                view.copy_(entry.param)
        entry.views, entry.version = views, -1

    def keep_diag(self, diag: Tensor, entries: Iterable[Entry]) -> None:
        """Remember the diagonal of a Hessian step, where it is finite, for the stale steps after it."""
        for entry in entries:
            view, new = self.diag_view(self.diag, entry), self.diag_view(diag, entry)
            torch.where(new.isfinite(), new, view, out=view)
            entry.state["hessian_diag"] = entry.views.setdefault("hessian_diag", view)

    def keep_means_of(
        self, entries: Sequence[Entry], v: Tensor, beta2s: Sequence[float], updates: Sequence[int], backend: Any
    ) -> None:
        """Measure the means of v / (1 - beta2^h), over all ranks, whatever the number of threads.

        Every rank has to call it.

        Args:
            entries: the parameters.
            v: exp_hessian_diag_sq, or what it will be.
            beta2s: their beta2.
            updates: how many Hessian steps each v has had, at least 1.
            backend: the ops.
        """
        flat = [v[r[Segment.OFFSET] : r[Segment.OFFSET] + r[Segment.NUMEL]] for r in self.table_of(entries).tolist()]
        found = self._means_of(entries, flat, self.table_of_wholes(entries, absolute=False), backend)
        for entry, mean, beta2, h in zip(entries, found, beta2s, updates, strict=True):
            view = entry.views.get(MEAN, self.means[entry.row]).copy_(mean / (1 - beta2**h))
            entry.views[MEAN] = entry.state[MEAN] = view

    def mean_magnitudes(self, entries: Sequence[Entry], table: Tensor, backend: Any) -> Tensor:
        """Return the mean of each parameter's magnitudes, over all ranks, in float64, whatever the number of threads.

        Every rank has to call it.

        Args:
            entries: the parameters.
            table: what :meth:`table_of_wholes` has returned for them.
            backend: the ops.
        """
        flat = [entry.stored(entry.param).as_strided((entry.param.numel(),), (1,)) for entry in entries]
        return self._means_of(entries, flat, table, backend)

    def table_of_wholes(self, entries: Sequence[Entry], *, absolute: bool) -> Tensor:
        """Return a segment table in which each parameter is flat, and one averaging block, of its magnitudes or not."""
        return altered(self.table_of(entries), averages_magnitudes if absolute else averages_all)

    def _means_of(self, entries: Sequence[Entry], tensors: Sequence[Tensor], table: Tensor, backend: Any) -> Tensor:
        """Return the means, in float64 and over all ranks, of flat tensors that belong to the entries of a table."""
        found = torch.zeros(len(table), dtype=self.compute_dtype, device=self.device)
        options = {"is_hvp": False, "scale": 1.0, "accumulate": False}
        backend.hessian_diag(tensors, found, table, self.steps, seed=0, sample=0, **options)
        means, owners = found.double(), [entry.owner for entry in entries]
        if not sharded.any_sharded(owners):
            return means
        sums = [mean * tensor.numel() for mean, tensor in zip(means, tensors, strict=True)]
        whole = sharded.whole(list(zip(sums, owners, strict=True)))
        return torch.stack([x / max(owner.numel(), 1) for x, owner in zip(whole, owners, strict=True)])

    def refresh_master(self, entries: Iterable[Entry]) -> None:
        """Take over what was written to 16-bit parameters since the last step; other master weights stay."""
        for entry in entries:
            if entry.param._version != entry.version:
                master, p = entry.views["master_param"], entry.param
                torch.where(master.to(p.dtype) == p, master, p.to(master.dtype), out=master)

    def _subset(self, entries: Sequence[Entry]) -> Subset:
        if len(entries) == self.count:
            return self._all
        rows = tuple(entry.row for entry in entries)
        found = self._subsets.pop(rows, None)
        if found is None:
            found = Subset(self.segments[list(rows)], torch.tensor(rows, device=self.steps.device))
        self._subsets[rows] = found
        if len(self._subsets) > MAX_SUBSETS:
            del self._subsets[next(iter(self._subsets))]
        if capturing(self.steps.device):
            self._captured.append(found)
        return found

    def table_of(self, entries: Sequence[Entry]) -> Tensor:
        """Return the segment table of some entries, in their order; those asked for last are remembered."""
        return self._subset(entries).segments

    def addresses(
        self, entries: Sequence[Entry], params: Sequence[Tensor], grads: Sequence[Tensor], hessians: Sequence[Tensor]
    ) -> Tensor | None:
        """Return where the tensors of some entries are, one row each: parameter, gradient, and Hz or 0.

        They are looked at in every step, in C, and have to be kept as they are until the op has run.

        Returns:
            An int64 table of shape (n, 3), valid until the next call; None if the ops cannot take the tensors as they
            are, or somebody watches operators and is to see which tensors they change.
        """
        if self.has_copied or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return None
        subset = self._subset(entries)
        if subset.looks is None:
            subset.looks = looks_of(params)
            subset.addresses = torch.zeros(len(entries), 3, dtype=torch.int64, device="cpu")
        table = subset.addresses
        if subset.has_hessians and not hessians:
            table[:, 2] = 0
        subset.has_hessians = bool(hessians)
        lists, begin = (params, grads, hessians) if hessians else (params, grads), table.data_ptr()
        for column, tensors in enumerate(lists):
            if not subset.looks.addresses(tensors if type(tensors) is list else list(tensors), begin, 3, column):
                return None
        return table

    def count_step(self, entries: Sequence[Entry], *, with_curvature: bool, found_inf: Tensor | None) -> None:
        """Advance the step counts of some entries, unless ``found_inf`` says that the step was skipped."""
        if found_inf is None and len(entries) == self.count and self.steps.device.type == "cpu":
            count(self.steps, len(Steps) if with_curvature else Steps.HESSIAN_STEP)
            return
        counted = self.steps if with_curvature else self.steps[:, : Steps.HESSIAN_STEP]
        if len(entries) == self.count:
            counted.add_(1 if found_inf is None else (found_inf == 0))
            return
        increment = torch.ones((), dtype=torch.int64, device=self.steps.device)
        if found_inf is not None:
            increment = (found_inf == 0).to(torch.int64)
        counted.index_add_(0, self._subset(entries).rows, increment.expand(len(entries), counted.shape[1]))


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Tell whether two dense tensors of one shape are stored in one order; axes of one element may have any stride."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _same_strides(entries: Iterable[Entry], tensors: Iterable[Tensor]) -> bool:
    return all(map(eq, map(Tensor.stride, tensors), map(_STRIDES, entries)))


def make_buckets(entries: Iterable[Entry], **options: Any) -> list[Bucket]:
    """Sort parameters into buckets by device and dtype."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.param_id):
        by_kind.setdefault((entry.param.device, entry.param.dtype), []).append(entry)
    return [Bucket(members, **options) for members in by_kind.values()]


def by_bucket(entries: Sequence[Entry]) -> dict[Bucket, list[Entry]]:
    """Return the entries of each bucket, in the bucket's order."""
    groups: dict[Bucket, list[Entry]] = {}
    if len(set(map(_BUCKET, entries))) == 1:  # nearly always
        return {entries[0].bucket: list(entries)}
    for entry in entries:
        groups.setdefault(entry.bucket, []).append(entry)
    return groups
