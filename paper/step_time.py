"""What a step costs: measured apart from the runs, so that what else the machine did during them does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from bench.measure import in_turns, wall_clock

from .optimizers import EXACT, OURS, make, stepper
from .run import Run, Setup
from .task import Task

LR = 1e-3  # any: it does not change what is computed
OFF = "without curvature"  # a step of ours between those with it
StepTimes = dict[str, dict[str, float]]


def with_curvature(fraction: float) -> str:
    """Name of a step with curvature from a fraction of the batch."""
    return f"curvature, r = {fraction:g}"


def seconds(run: Run, times: StepTimes) -> float | None:
    """How long the steps of a run take; None where they were not measured."""
    setup, n = run.setup, run.setup.hessian_steps(run.steps)
    ours = setup.optimizer == OURS
    parts = {with_curvature(setup.options.get("hessian_fraction", 1)): n, OFF: run.steps - n}
    parts = {name: n for name, n in parts.items() if n} if ours else {setup.optimizer: run.steps}
    return sum(n * times[name]["median"] for name, n in parts.items()) if times.keys() >= parts.keys() else None


def measure(task: Task, first_order: Sequence[str], fractions: Sequence[float], rounds: int) -> StepTimes:
    """Time of each kind of step, {"median", "wall"} in seconds, over rounds in which all take turns on one batch.

    "median" is of processor time on a CPU, where others may use the cores too; "wall" is of the wall-clock.
    """
    batch = tuple(t.to(task.device) for t in next(task.batches(0)))
    kinds = {name: Setup(name) for name in first_order}
    kinds |= {with_curvature(r): Setup(OURS, EXACT | ({} if r == 1 else {"hessian_fraction": r})) for r in fractions}
    kinds[OFF] = Setup(OURS, {**EXACT, "warmup": 0, "update_each": 10**9})
    steps = {}
    for name, setup in kinds.items():
        torch.manual_seed(0)
        model = task.model().to(task.device)
        step = stepper(make(setup, LR, 0, task, model.parameters()), lambda *b, m=model: task.loss(m, *b))
        steps[name] = lambda step=step: step(batch)
    steps[OFF]()  # the only one with curvature
    found = in_turns(steps, rounds, lambda step: clock(step, task.device))
    medians = {name: map(statistics.median, zip(*times, strict=True)) for name, times in found.items()}
    return {
        name: {key: float(f"{value:.4g}") for key, value in zip(("median", "wall"), values, strict=True)}
        for name, values in medians.items()
    }


def clock(step: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of processor time on a CPU, and of wall-clock; on a GPU twice the latter."""
    began = time.process_time()
    wall = wall_clock(step, device)
    return (time.process_time() - began if device == "cpu" else wall), wall
