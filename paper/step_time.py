"""What a step costs: measured apart from the runs, so that what else the machine did during them does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .optimizers import make, stepper
from .run import Setup
from .task import Task

LR = 1e-3  # any: it does not change what is computed


def clock(device: str) -> float:
    """Seconds: of processor time on a CPU, where others may use the cores too, of wall-clock on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    task: Task, setups: Sequence[Setup], rounds: int, on_round: Callable[[], None] = lambda: None
) -> dict[str, dict[str, float]]:
    """Time of a step by setup: {"median", "wall"} in seconds, over rounds in which all take turns.

    In a round every setup makes one period of steps (f with Hutchinson frequency f) with the same batches. "median" is
    by :func:`clock`, "wall" by the wall-clock: on a quiet machine they agree. One more round, the first, warms up.
    """
    contestants = []
    for setup in setups:
        torch.manual_seed(0)
        model = task.model(setup.variant).to(task.device)
        opt = make(setup, LR, 0, task, model.parameters())
        contestants.append((setup, model, stepper(opt, lambda *batch, model=model: task.loss(model, *batch))))
    period = max(setup.options.get("update_each", 1) for setup in setups)
    batches = [
        tuple(t.to(task.device) for t in batch) for batch, _ in zip(task.batches(0), range(period), strict=False)
    ]
    times: dict[str, list[tuple[float, float]]] = {setup.key: [] for setup in setups}
    for number in range(rounds + 1):
        for setup, _, step in (*contestants[number % len(contestants) :], *contestants[: number % len(contestants)]):
            steps = setup.options.get("update_each", 1)
            began, wall = clock(task.device), time.perf_counter()
            for batch in batches[:steps]:
                step(batch)
            taken = (clock(task.device) - began, time.perf_counter() - wall)
            if number:
                times[setup.key].append(tuple(t / steps for t in taken))
        on_round()
    return {
        key: {
            name: float(f"{statistics.median(column):.4g}")
            for name, column in zip(("median", "wall"), zip(*found, strict=True), strict=True)
        }
        for key, found in times.items()
    }
