"""What a step costs: measured apart from the runs, so that what else the machine did during them does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from bench.measure import in_turns, wall_clock

from .optimizers import make, stepper
from .run import Setup
from .task import Task

LR = 1e-3  # any: it does not change what is computed


def clock(steps: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of processor time on a CPU, where others may use the cores too, and of wall-clock, on a GPU twice."""
    began = time.process_time()
    wall = wall_clock(steps, device)
    return (time.process_time() - began if device == "cpu" else wall), wall


def measure(task: Task, setups: Sequence[Setup], rounds: int) -> dict[str, dict[str, float]]:
    """Time of a step by setup: {"median", "wall"} in seconds, over rounds in which all take turns.

    In a round every setup makes one period of steps (f with Hutchinson frequency f) with the same batches. "median" is
    of processor time, "wall" of the wall-clock: on a quiet machine they agree.
    """
    period = max(setup.options.get("update_each", 1) for setup in setups)
    batches = [
        tuple(t.to(task.device) for t in batch) for batch, _ in zip(task.batches(0), range(period), strict=False)
    ]
    steps, periods = {}, {}
    for setup in setups:
        torch.manual_seed(0)
        model = task.model(setup.variant).to(task.device)
        opt = make(setup, LR, 0, task, model.parameters())
        step = stepper(opt, lambda *batch, model=model: task.loss(model, *batch))
        n = periods[setup.key] = setup.options.get("update_each", 1)
        steps[setup.key] = lambda step=step, n=n: [step(batch) for batch in batches[:n]]
    found = in_turns(steps, rounds, lambda step: clock(step, task.device))
    return {
        key: {
            name: float(f"{statistics.median(column) / periods[key]:.4g}")
            for name, column in zip(("median", "wall"), zip(*times, strict=True), strict=True)
        }
        for key, times in found.items()
    }
