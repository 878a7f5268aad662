"""From entries and curvature to one call of the ``adahessian_step`` op."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor

from . import warmup
from .bucket import MEAN, Bucket, Entry
from .capture import capturing
from .checks import check_lr
from .curvature import Curvature
from .layout import OPTIMIZER_WIDE, ParameterLayout
from .segments import Hyper, Steps

_PARAM, _LR = attrgetter("param"), itemgetter("lr")
_CALL = methodcaller("__call__")
_NUMBERS = itemgetter(
    *("lr", "eps", "weight_decay", "hessian_power", "maximize", "unmeasured", "clip", "shrink", "nesterov", "cautious")
)
_OPTIONS = itemgetter(
    *("betas", "eps", "weight_decay", "hessian_power", "maximize", "unmeasured", "clip", "shrink", "nesterov"),
    *("cautious", "block_size", "averaging", "update_each", "warmup", "dense_steps", "off_step", "nonfinite"),
    *OPTIMIZER_WIDE,
)
Part = Callable[[], Any]  # returns None, or the parts that are to be done in its place


class Parts:
    """What is left to do of a step, in this order.

    A part that raises is left, with those after it, to be done again: what it cannot do twice is the last it does.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self._left = deque(parts)
        self.begun = False

    def do(self) -> None:
        """Do what is left."""
        while self._left:
            results: list[Any] = []
            try:
                # Called and noted with no Python code between, where Ctrl-C would come after an op that goes unnoticed.
                results.extend(map(_CALL, (self._left[0],)))
            finally:
                if results:
                    self._left.popleft()
                    if results[0] is None:
                        self.begun = True
                    else:
                        self._left.extendleft(reversed(results[0]))

    def finish(self) -> None:
        """Do what is left; an error that comes when something is done is raised when the rest is, if that can be."""
        try:
            self.do()
        except BaseException:
            if self.begun:
                with contextlib.suppress(Exception):
                    self.do()
            raise


class HyperTable:
    """The hyperparameters of all groups as the table the ops take, in the memory where the step counts live.

    Attributes:
        grad_scale: the factor that the gradients of the last step carried, if any.
        found_inf: whether it was skipped, if only the device knows.
    """

    def __init__(self) -> None:
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._cached: dict[torch.device, tuple[list[list[float]], Tensor]] = {}
        self._last: tuple[Any, Any] = None, None  # the table of a CPU, and the options it was made of
        self._checked: list[tuple[Any, ...]] = []  # all options but lr, which schedules change
        self._captured: list[Tensor] = []  # older tables, which CUDA graphs may read

    def on(self, device: torch.device, groups: Sequence[Mapping[str, Any]], check: Callable[[], None]) -> Tensor:
        """Return the table on ``device``; where options of the groups have changed they are checked.

        On a GPU it stays where it is, since CUDA graphs read it: a number that changed is written to it, and so is in
        every step an lr that is a tensor on a GPU.

        Raises:
            ValueError: an option is out of its range.
            RuntimeError: a number changed while a CUDA graph is captured, where it cannot be copied.
        """
        options, lrs = [*map(_OPTIONS, groups)], [*map(_LR, groups)]
        if device.type == "cpu" and self._last[0] == (options, lrs):
            return self._last[1]
        if options != self._checked:
            check()
            options = self._checked = [*map(_OPTIONS, groups)]
        for lr in lrs:
            check_lr(lr)
        there = [device.type != "cpu" and isinstance(g["lr"], Tensor) and g["lr"].device.type != "cpu" for g in groups]
        rows = [self.row(g, 0.0 if t else g["lr"]) for g, t in zip(groups, there, strict=True)]
        old = self._cached.get(device)
        if old is None or old[0] != rows:
            self._cached[device] = rows, self._written(rows, device, None if old is None else old[1])
        table = self._cached[device][1]
        if device.type == "cpu" and not any(isinstance(group["lr"], Tensor) for group in groups):
            self._last = (options, lrs), table
        for n in (n for n, t in enumerate(there) if t):
            table[n, Hyper.LR].copy_(groups[n]["lr"].reshape(()))
        return table

    def _written(self, rows: list[list[float]], device: torch.device, old: Tensor | None) -> Tensor:
        """Return the table with these numbers: a new one on a CPU, and the old one on a GPU, if it is as large."""
        if capturing(device):
            raise RuntimeError(
                "a hyperparameter changed while a CUDA graph is captured, or before; expected a step outside the graph "
                "after the change, and an lr that keeps changing as a tensor on the GPU"
            )
        host = torch.tensor(rows, dtype=torch.float64, device="cpu", pin_memory=device.type == "cuda")
        if device.type == "cpu":
            return host
        if old is not None and old.shape == host.shape:
            return old.copy_(host, non_blocking=True)
        if old is not None:
            self._captured.append(old)
        return host.to(device, non_blocking=True)

    def last(self, device: torch.device) -> Tensor:
        """Return the table of the last step on ``device``."""
        return self._cached[device][1]

    @staticmethod
    def row(group: Mapping[str, Any], lr: float | Tensor) -> list[float]:
        """Return the numbers of one group."""
        _, eps, weight_decay, power, maximize, unmeasured, clip, *more = _NUMBERS(group)
        clip = math.inf if clip is None else clip
        numbers = (lr, *group["betas"], eps, weight_decay, power, maximize, unmeasured == "hold", clip, *more)
        return [*map(float, numbers)]


def prepared_updates(
    entries: Sequence[Entry],
    grads: Sequence[Tensor],
    due: Sequence[bool],
    curvature: Curvature | None,
    layout: ParameterLayout,
    table: HyperTable,
    *,
    seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> list[Part]:
    """Prepare the updates of all buckets: everything in them that needs memory or may fail.

    Args:
        entries: the parameters that have a gradient.
        grads: their gradients.
        due: for each group, whether it uses new curvature.
        curvature: what has been gathered of it.
        layout: of the parameters.
        table: takes the groups' hyperparameters.
        seed: Philox key of the probe on this rank.
        grad_scale: as of :func:`prepared_update`.
        found_inf: likewise.

    Returns:
        The parts of all updates: the ops, then what they leave to be written, then what is kept for later steps.
    """
    table.grad_scale, table.found_inf = grad_scale, found_inf
    rescaled = grad_scale is not None and curvature is not None and curvature.unscaled
    if curvature is not None and (rescaled or curvature.must_fold(layout.buckets)):
        curvature.fold()
    grad_of: dict[Entry, Tensor] = {}
    updates = []
    param_groups = layout.groups
    for bucket, in_bucket in layout.by_bucket(entries).items():
        groups = table.on(bucket.steps.device, param_groups, layout.check_options)
        for kind, members in _by_kind(in_bucket, due, param_groups).items():
            backend = layout.backends[bucket.device.type]
            if len(members) < len(entries):
                grad_of = grad_of or dict(zip(entries, grads, strict=True))
            update = prepared_update(
                bucket,
                members,
                [grad_of[entry] for entry in members] if grad_of else grads,
                kind,
                curvature,
                *warmup.bounded(bucket, members, param_groups, groups, backend),
                backend,
                seed=seed,
                rounding_seed=param_groups[0]["seed"],
                grad_scale=None if grad_scale is None else grad_scale.to(bucket.device),
                found_inf=None if found_inf is None else found_inf.to(bucket.device),
            )
            updates.append(update)
    return parts_of(updates)


def parts_of(updates: Iterable[Sequence[Part | None]]) -> list[Part]:
    """Return the parts of several updates, those of the first kind first."""
    return [*filter(None, chain.from_iterable(zip(*updates, strict=True)))]


def _by_kind(
    entries: Sequence[Entry], due: Sequence[bool], groups: Sequence[Mapping[str, Any]]
) -> dict[str, list[Entry]]:
    """Split entries by where the curvature of this step comes from."""
    if all(due):
        return {"fresh": list(entries)}
    if not any(due) and all([group["off_step"] == "hold" for group in groups]):  # noqa: C419  faster
        return {"hold": list(entries)}
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        if due[entry.group]:
            kind = "fresh"
        elif groups[entry.group]["off_step"] == "stale" and "hessian_diag" in entry.views:
            kind = "stale"
        else:
            kind = "hold"
        kinds.setdefault(kind, []).append(entry)
    return kinds


def prepared_update(
    bucket: Bucket,
    members: Sequence[Entry],
    grads: Sequence[Tensor],
    kind: str,
    curvature: Curvature | None,
    segments: Tensor,
    groups: Tensor,
    backend: Any,
    *,
    seed: int,
    rounding_seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[Part, Part, Part | None]:
    """Prepare the update of some parameters of a bucket and their step counts.

    Nothing is changed that a second call would not find or make the same.

    Args:
        bucket: where their states are.
        members: the parameters.
        grads: their gradients.
        kind: "fresh" uses ``curvature``, "stale" the diagonal of the last Hessian step, "hold" none.
        curvature: what the backward passes gathered.
        segments: their segment table.
        groups: hyperparameter table.
        backend: the three ops.
        seed: Philox key of the probe on this rank.
        rounding_seed: Philox key of what all ranks draw alike.
        grad_scale: factor the gradients carry, and the curvature too unless it is marked as unscaled.
        found_inf: scalar on the device; nothing changes unless it is zero.

    Returns:
        The parts of the update: the op, what it leaves to be written and counted, and what is kept for later steps.
    """
    hessians, diag, kept, is_hvp, sample = [], None, None, False, 0
    if kind == "fresh" and bucket.diag is None and not curvature.folded:
        hessians, is_hvp, sample = curvature.hessians(members), curvature.is_hvp, curvature.sample
    elif kind == "fresh":
        diag = curvature.diag(bucket)
    elif kind == "stale":
        diag = bucket.diag
    if kind == "fresh" and bucket.diag is not None:
        if grad_scale is not None and not curvature.unscaled:
            diag = diag / grad_scale
        kept = diag
    diag_is_unscaled = kind == "stale" or bucket.diag is not None or (curvature is not None and curvature.unscaled)
    if grad_scale is not None and diag is not None and diag_is_unscaled:
        diag = diag * grad_scale  # the op divides both by it; gradients in 16 bits could not be divided here
    if bucket.master is not None:
        bucket.refresh_master(members)

    params = own = list(map(_PARAM, members))
    if bucket.has_copied:
        params = [p.contiguous() if entry.copied else p for p, entry in zip(params, members, strict=True)]
    arguments = {
        "diag": diag,
        "exp_avg": bucket.exp_avg,
        "exp_hessian_diag_sq": bucket.exp_hessian_diag_sq,
        "master": bucket.master,
        "segments": segments,
        "steps": bucket.steps,
        "groups": groups,
        "seed": seed,
        "sample": sample,
        "is_hvp": is_hvp,
        "rounding_seed": rounding_seed,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
        "means": bucket.means,
        "missed": bucket.missed,
    }
    op = getattr(backend, "step_at_addresses", None)
    addresses = None if op is None or bucket.means is not None else bucket.addresses(members, params, grads, hessians)
    if addresses is None:
        op = backend.adahessian_step
        lists = {"params": params, "grads": bucket.stored(members, grads)}
        arguments = {**lists, "hessians": bucket.stored(members, hessians) if hessians else []} | arguments
    else:
        arguments |= {"addresses": addresses, "first": params[0]}
    if bucket.means is not None:
        _first_means(bucket, members, kind, arguments, backend)

    def write() -> None:
        if bucket.has_copied:
            for entry, updated in zip(members, params, strict=True):
                if entry.copied:
                    entry.param.copy_(updated)
        torch.autograd.graph.increment_version(own)
        if bucket.master is not None:
            for entry in members:
                entry.version = entry.param._version
        if bucket.means is not None:
            for entry in members:
                entry.used_mean = bucket.means[entry.row].clone()
        bucket.count_step(members, with_curvature=kind != "hold", found_inf=found_inf)

    def keep() -> None:
        if kept is not None:
            bucket.keep_diag(kept, members)
        if bucket.means is not None and kind != "hold":
            _measure_means(bucket, members, bucket.exp_hessian_diag_sq, 0, groups, backend)

    update = partial(getattr(op, "_op", op), **arguments)  # a native op without the Python code around it
    update.tensors = grads, hessians  # type: ignore[attr-defined]  # which the op may know by address only
    return update, write, keep if kept is not None or bucket.means is not None else None


def _first_means(
    bucket: Bucket, members: Sequence[Entry], kind: str, arguments: Mapping[str, Any], backend: Any
) -> None:
    """Measure means that no step before has left: of v as it is or, in a first Hessian step, as it will be."""
    groups, more = arguments["groups"], int(kind != "hold")
    new = [entry for entry in members if MEAN not in entry.views and groups[entry.group, Hyper.SHRINK] > 0]
    if not new:
        return
    v = bucket.exp_hessian_diag_sq
    if more:
        copies = {name: arguments[name] for name in ("exp_avg", "exp_hessian_diag_sq", "master")}
        copies = {name: None if flat is None else flat.clone() for name, flat in copies.items()}
        copies |= {"params": [p.clone() for p in arguments["params"]], "means": None, "missed": None}
        backend.adahessian_step(**{**arguments, **copies})
        v = copies["exp_hessian_diag_sq"]
    _measure_means(bucket, new, v, more, groups, backend)


def _measure_means(
    bucket: Bucket, entries: Sequence[Entry], v: Tensor, more: int, groups: Tensor, backend: Any
) -> None:
    """Measure the means of the parameters that are drawn to them, once they have had curvature.

    Args:
        bucket: where they are.
        entries: the parameters.
        v: exp_hessian_diag_sq, or what it will be.
        more: how many Hessian steps it has had more than are counted.
        groups: hyperparameter table.
        backend: the ops.
    """
    counts, table = (bucket.steps[:, Steps.HESSIAN_STEP] + more).tolist(), groups.tolist()
    chosen = [entry for entry in entries if table[entry.group][Hyper.SHRINK] > 0 and counts[entry.row] > 0]
    if chosen:
        beta2s = [table[entry.group][Hyper.BETA2] for entry in chosen]
        bucket.keep_means_of(chosen, v, beta2s, [counts[entry.row] for entry in chosen], backend)
