"""Timing: contestants take turns, so that whatever else the machine does hits them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .contestants import Contestant

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """What was found about one contestant.

    Attributes:
        median: seconds a step; on a GPU the device's, from the first kernel's start to the last one's end.
        p20: 20th percentile.
        p80: 80th percentile.
        samples: how many steps were timed.
        host: seconds of the host alone; None where it cannot be told from the kernels.
        launches: kernels (on a CPU: calls of our ops) in a step; None where unknown.
    """

    median: float
    p20: float
    p80: float
    samples: int
    host: float | None = None
    launches: int | None = None


def interleaved(
    contestants: Mapping[str, Sequence[Contestant]], *, device: str, seconds: float = 2.0, samples: int = 7
) -> dict[str, Timing]:
    """Time contestants in turns after a warm-up.

    Args:
        contestants: by name; several instances of a contestant have tensors of their own and are called one after the
            other, so that none finds its tensors in the cache.
        device: "cpu" or "cuda".
        seconds: aim for this long in all.
        samples: take at least this many of each contestant.
    """
    clocks = {name: _GpuClock() if device == "cuda" else _CpuClock() for name in contestants}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}

    def lap() -> None:
        for name, instances in contestants.items():
            for instance in instances:
                instance.prepare()
            taken[name] += [clocks[name](instance.step) for instance in instances]

    lap()
    for warm_up in taken.values():
        warm_up.clear()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(found) < samples for found in taken.values()):
        lap()
    return {name: _timing(found, contestants[name][0], device) for name, found in taken.items()}


def _timing(samples: list[tuple[float, float]], contestant: Contestant, device: str) -> Timing:
    step = np.percentile([taken for taken, _ in samples], (50, 20, 80)).tolist()
    if device == "cuda":
        return Timing(*step, len(samples), median(host for _, host in samples), _kernels(contestant))
    calls, host = _calls(contestant) if contestant.watched else (0, 0.0)
    return Timing(*step, len(samples), host if calls else None, calls or None)


def in_turns(
    steps: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[Callable[[], Any]], T],
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[T]]:  # fmt: skip
    """Return what a clock says of steps that take turns; one more round, the first, warms up.

    The order changes from round to round, so that nobody always follows the same neighbour.
    """
    found: dict[str, list[T]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(rounds + 1):
        for name in order:
            taken = clock(steps[name])
            if number:
                found[name].append(taken)
        order.append(order.pop(0))
        on_round()
    return found


def wall_clock(step: Callable[[], Any], device: str) -> float:
    """Seconds that a step takes; on a GPU until the device has finished."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class _CpuClock:
    def __call__(self, step: Callable[[], None]) -> tuple[float, float]:
        start = time.perf_counter()
        step()
        taken = time.perf_counter() - start
        return taken, taken


class _GpuClock:
    """Device and host time of a step. The device first sleeps, so that no kernel waits for the host to launch it."""

    def __init__(self) -> None:
        self._sleep = 1e-3  # seconds; follows the host time of the last step

    def __call__(self, step: Callable[[], None]) -> tuple[float, float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self._sleep * 2e9))  # cycles of a clock of about 2 GHz
        begin.record()
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        self._sleep = min(max(2 * host, 1e-4), 0.05)
        return begin.elapsed_time(end) / 1e3, host


def _kernels(contestant: Contestant) -> int | None:
    """Kernels in a step; None if the profiler does not work here."""
    contestant.prepare()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        contestant.step()
        torch.cuda.synchronize()
    names = [event.name for event in found.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names) or None


def _calls(contestant: Contestant, steps: int = 5) -> tuple[int, float]:
    """Return the calls of our operators in a step, and the seconds outside them (a little more: it is watched)."""
    outside = []
    for _ in range(steps):
        contestant.prepare()
        start = time.perf_counter()
        with _Ops() as ops:
            contestant.step()
        outside.append(time.perf_counter() - start - ops.seconds)
    return ops.calls, median(outside)


class _Ops(TorchDispatchMode):
    """Counts and times the calls of our operators inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seconds = 0, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if func.namespace == "adahessian_fused":
            self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - start
        return result
