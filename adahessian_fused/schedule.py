"""When curvature is due, from the steps that each parameter group has taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from .capture import capturing
from .checks import dense_steps, has_off_steps, hessian_interval, warn
from .layout import ParameterLayout
from .segments import Segment, Steps

_REQUIRES_GRAD, _UPDATE_EACH = attrgetter("requires_grad"), itemgetter("update_each")


class Schedule:
    """Counts the steps of parameter groups, in ``group["step"]``.

    Args:
        layout: whose groups.
    """

    def __init__(self, layout: ParameterLayout) -> None:
        self._layout = layout
        self._uncertain: tuple[Tensor, Collection[int]] | None = None  # whether the device skipped a step of groups
        self._told: set[int] = set()  # numbers of parameters that have been warned of
        self._last: dict[int, tuple[Any, int, tuple[int, int]]] = {}  # of groups by a function: what was found last

    def due(self) -> list[bool]:
        """Tell for each group whether the coming step uses new curvature."""
        if self._uncertain is not None:
            self._settle()
        found = []
        for number, group in enumerate(self._layout.groups):
            step, every = group["step"], group["update_each"]
            spaced = not callable(every) and step % every == 0
            due = spaced or step < dense_steps(group) or (callable(every) and self._is_spaced(number, group))
            found.append(due and any(map(_REQUIRES_GRAD, group["params"])))
        return found

    def _is_spaced(self, number: int, group: Mapping[str, Any]) -> bool:
        """Tell whether the coming step of a group is a Hessian step by a function ``update_each``."""
        try:
            return self._last_hessian_step(number, group) == group["step"]
        except Exception:  # which check() raises where the optimizer is stepped; others only look at it
            return True

    def _last_hessian_step(self, number: int, group: Mapping[str, Any]) -> int:
        """Find the last Hessian step of a group up to the coming one."""
        old, every, dense = self._last.get(number), group["update_each"], dense_steps(group)
        known = old[2] if old is not None and old[0] is every and old[1] == dense else (0, 0)
        self._last[number] = every, dense, last_hessian_step(group, group["step"], known)
        return self._last[number][2][0]

    def check(self) -> None:
        """Raise what functions ``update_each`` raise for the coming step, or ValueError for no number of steps."""
        for number, group in enumerate(self._layout.groups):
            if callable(group["update_each"]) and group["step"] >= dense_steps(group):
                self._last_hessian_step(number, group)

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
        scheduled = any(map(has_off_steps, self._layout.groups))
        if (not scheduled and self._uncertain[0].is_cuda) or capturing(self._uncertain[0].device):
            return
        found_inf, numbers = self._uncertain
        skipped = found_inf.item() != 0
        self._uncertain = None
        for number in numbers if skipped else ():
            self._layout.groups[number]["step"] -= 1

    def warn_of_missed(self) -> None:
        """Warn once of parameters whose gradients keep coming between the Hessian steps of their group."""
        counts = list(map(_UPDATE_EACH, self._layout.groups))
        if counts.count(1) == len(counts):
            return
        counts = [1 if callable(f) else f for f in counts]  # 1: a late comer could not be told from one that misses
        entries = self._layout.entries.values()
        buckets = {entry.bucket for entry in entries}
        if any(bucket.steps.device.type != "cpu" for bucket in buckets):
            return
        every = torch.tensor(counts, device="cpu")
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
                    warn(
                        f"{entry.name} has had {int(steps[row])} gradients but curvature {int(updates[row])} times: "
                        f"they come between the Hessian steps of its group, update_each={int(f[row])} apart; "
                        "expected a group of its own, which counts its own steps, or update_each=1",
                    )


def last_hessian_step(group: Mapping[str, Any], step: int, known: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Find the last Hessian step of a group up to ``step``: which step it is, and how many Hessian steps are before it.

    A function of the step alone, so that a resumed run goes on in the middle of an interval.

    Args:
        group: the parameter group, whose ``update_each`` is a function.
        step: number of a step, from 0.
        known: what an earlier call has returned, from where to go on.

    Raises:
        TypeError: the function cannot be called with a number.
        ValueError: it returns what is no number of steps.
    """
    dense, every = dense_steps(group), group["update_each"]
    at, h = known if known[0] <= step else (0, 0)
    while at < step:
        length = 1 if at + 1 < dense else hessian_interval(every, h)
        if at + length > step:
            break
        at, h = at + length, h + 1
    return at, h
