"""When curvature is due, from the steps that each parameter group has taken."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .capture import capturing
from .layout import ParameterLayout
from .segments import Segment, Steps

_REQUIRES_GRAD = attrgetter("requires_grad")


class Schedule:
    """Counts the steps of parameter groups, in ``group["step"]``.

    Args:
        layout: whose groups.
    """

    def __init__(self, layout: ParameterLayout) -> None:
        self._layout = layout
        self._uncertain: tuple[Tensor, Collection[int]] | None = None  # whether the device skipped a step of groups
        self._told: set[int] = set()  # numbers of parameters that have been warned of

    def due(self) -> list[bool]:
        """Tell for each group whether the coming step uses new curvature."""
        if self._uncertain is not None:
            self._settle()
        return [
            (group["step"] % group["update_each"] == 0 or group["step"] < _dense_steps(group))
            and any(map(_REQUIRES_GRAD, group["params"]))
            for group in self._layout.groups
        ]

    def count(self, numbers: Collection[int], found_inf: Tensor | None) -> None:
        """Count a step of these groups; with ``found_inf`` one that the device may skip, which is asked for later."""
        for number in numbers:
            self._layout.groups[number]["step"] += 1
        self._uncertain = None if found_inf is None else (found_inf, tuple(numbers))

    def settle_on_host(self) -> None:
        """Take back the count of a skipped step if the host can tell without waiting."""
        if self._uncertain is not None and self._uncertain[0].device.type == "cpu":
            self._settle()

    def _settle(self) -> None:
        """Take back the count of a step that GradScaler has skipped on the device, where the schedule depends on it."""
        if self._uncertain is None:
            return
        scheduled = any(group["update_each"] > 1 for group in self._layout.groups)
        if (not scheduled and self._uncertain[0].is_cuda) or capturing(self._uncertain[0].device):
            return
        found_inf, numbers = self._uncertain
        skipped = found_inf.item() != 0
        self._uncertain = None
        for number in numbers if skipped else ():
            self._layout.groups[number]["step"] -= 1

    def warn_of_missed(self) -> None:
        """Warn once of parameters whose gradients keep coming between the Hessian steps of their group."""
        entries = self._layout.entries.values()
        buckets = {entry.bucket for entry in entries}
        if all(group["update_each"] == 1 for group in self._layout.groups) or any(
            bucket.steps.device.type != "cpu" for bucket in buckets
        ):
            return
        every = torch.tensor([group["update_each"] for group in self._layout.groups], device="cpu")
        most = torch.zeros_like(every)  # updates of anybody in each group
        for bucket in buckets:
            groups = bucket.segments[:, Segment.GROUP]
            most.scatter_reduce_(0, groups, bucket.steps[:, Steps.HESSIAN_STEP], "amax")
        for bucket in buckets:
            groups = bucket.segments[:, Segment.GROUP]
            steps, updates, f = bucket.steps[:, Steps.STEP], bucket.steps[:, Steps.HESSIAN_STEP], every[groups]
            # Whoever has its gradients on Hessian steps has steps / f updates at least; late comers lack one.
            missed = (f > 1) & (steps >= 2 * f) & (2 * (updates + 1) * f <= steps + f) & (updates < most[groups])
            for row in missed.nonzero().flatten().tolist():
                entry = next(e for e in entries if e.bucket is bucket and e.row == row)
                if entry.param_id not in self._told:
                    self._told.add(entry.param_id)
                    warnings.warn(
                        f"{entry.name} has had {int(steps[row])} gradients but curvature {int(updates[row])} times: "
                        f"they come between the Hessian steps of its group, update_each={int(f[row])} apart; "
                        "expected a group of its own, which counts its own steps, or update_each=1",
                        stacklevel=8,
                    )


def _dense_steps(group: dict[str, Any]) -> int:
    """Return how many steps have curvature, from the first on, whatever ``update_each`` is."""
    return group["warmup"] if group["dense_steps"] is None else group["dense_steps"]
