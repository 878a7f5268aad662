"""From entries and curvature to one call of the ``adahessian_step`` op."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .curvature import Curvature
from .layout import Bucket, Entry
from .segments import Hyper

_PARAM = attrgetter("param")


class HyperTable:
    """The hyperparameters of all groups as the table the ops take, in the memory where the step counts live."""

    def __init__(self) -> None:
        self._cached: dict[torch.device, tuple[list[list[float]], Tensor]] = {}

    def on(self, device: torch.device, groups: Sequence[Mapping[str, Any]]) -> Tensor:
        """The table on ``device``. On a GPU it is uploaded when a number changed; lr tensors are copied there."""
        on_gpu = device.type != "cpu"
        lrs = [0.0 if on_gpu and isinstance(group["lr"], Tensor) else group["lr"] for group in groups]
        rows = [self._row(group, lr) for group, lr in zip(groups, lrs, strict=True)]
        old = self._cached.get(device)
        if old is None or old[0] != rows:
            table = torch.tensor(rows, dtype=torch.float64, device=device)
            self._cached[device] = rows, table
        table = self._cached[device][1]
        for number, group in enumerate(groups):
            if on_gpu and isinstance(group["lr"], Tensor):
                table[number, Hyper.LR].copy_(group["lr"].reshape(()))
        return table

    def last(self, device: torch.device) -> Tensor:
        """The table of the last step on ``device``."""
        return self._cached[device][1]

    @staticmethod
    def _row(group: Mapping[str, Any], lr: float | Tensor) -> list[float]:
        beta1, beta2 = group["betas"]
        numbers = (lr, beta1, beta2, group["eps"], group["weight_decay"], group["hessian_power"], group["maximize"])
        return [*map(float, numbers), float(group["unmeasured"] == "hold"), math.inf, 0.0]


def update_bucket(
    bucket: Bucket,
    members: Sequence[Entry],
    grads: Sequence[Tensor],
    kind: str,
    curvature: Curvature | None,
    groups: Tensor,
    backend: Any,
    *,
    seed: int,
    rounding_seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Update some parameters of a bucket and their step counts.

    Args:
        bucket: where their states are.
        members: the parameters.
        grads: their gradients.
        kind: "fresh" uses ``curvature``, "stale" the diagonal of the last Hessian step, "hold" none.
        curvature: what the backward passes gathered.
        groups: hyperparameter table.
        backend: the three ops.
        seed: Philox key of the probe on this rank.
        rounding_seed: Philox key of what all ranks draw alike.
        grad_scale: factor the gradients carry, and the curvature too unless it is marked as unscaled.
        found_inf: scalar on the device; nothing changes unless it is zero.
    """
    grads = bucket.stored(members, grads)
    hessians, diag, draw, sample = [], None, False, 0
    if kind == "fresh" and bucket.diag is None and not curvature.folded:
        hessians, draw, sample = curvature.hessians(members), curvature.draw, curvature.sample
    elif kind == "fresh":
        diag = curvature.diag(bucket)
    elif kind == "stale":
        diag = bucket.diag
    if kind == "fresh" and bucket.diag is not None:
        if grad_scale is not None and not curvature.unscaled:
            diag.div_(grad_scale)
        bucket.keep_diag(diag, members)
    diag_is_unscaled = kind == "stale" or bucket.diag is not None or (curvature is not None and curvature.unscaled)
    if grad_scale is not None and diag is not None and diag_is_unscaled:
        diag = diag * grad_scale  # the op divides both by it; gradients in 16 bits could not be divided here
    if bucket.master is not None:
        bucket.refresh_master(members)

    params = own = list(map(_PARAM, members))
    if bucket.has_copied:
        params = [p.contiguous() if entry.copied else p for p, entry in zip(params, members, strict=True)]
    backend.adahessian_step(
        params,
        grads,
        hessians,
        diag,
        bucket.exp_avg,
        bucket.exp_hessian_diag_sq,
        bucket.master,
        bucket.table_of(members),
        bucket.steps,
        groups,
        seed=seed,
        sample=sample,
        draw=draw,
        rounding_seed=rounding_seed,
        grad_scale=grad_scale,
        found_inf=found_inf,
        means=None,
        missed=bucket.missed,
    )
    if bucket.has_copied:
        for entry, updated in zip(members, params, strict=True):
            if entry.copied:
                entry.param.copy_(updated)
    torch.autograd.graph.increment_version(own)
    if bucket.master is not None:
        for entry in members:
            entry.version = entry.param._version
    bucket.count_step(members, with_curvature=kind != "hold", found_inf=found_inf)
