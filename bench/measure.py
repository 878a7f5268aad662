"""Timing: contestants take turns, so that whatever else the machine does hits them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds: median, 20th and 80th percentile, and how many rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


def interleaved(
    contestants: Mapping[str, Callable[[], None]],
    *,
    device: str,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (7, 200),
) -> dict[str, Timing]:
    """Time contestants in turns after a warm-up.

    Args:
        contestants: what to call, by name. If it has a function ``prepare``, that is called before, and not timed.
        device: "cpu" or "cuda"; a GPU is timed with events on its stream.
        seconds: aim for this long in all.
        rounds: fewest and most rounds.
    """
    once = _on_gpu if device == "cuda" else _on_cpu
    for call in contestants.values():
        for _ in range(3):
            once(call)
    spent = sum(once(call) for call in contestants.values())
    count = int(np.clip(seconds / max(spent, 1e-9), *rounds))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(count):
        for name, call in contestants.items():
            samples[name].append(once(call))
    return {name: Timing(*np.percentile(taken, (50, 20, 80)).tolist(), count) for name, taken in samples.items()}


def _prepare(call: Callable[[], None]) -> None:
    getattr(call, "prepare", lambda: None)()


def _on_cpu(call: Callable[[], None]) -> float:
    _prepare(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_gpu(call: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _prepare(call)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
