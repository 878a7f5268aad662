"""One run, from fresh weights to its scores."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from .optimizers import make, stepper
from .run import Run
from .task import Task

POINTS = 60  # of a training curve
VALIDATIONS = 10  # of a run


def thin(values: Sequence[float], points: int = POINTS) -> list[list[float]]:
    """Means over at most ``points`` equal stretches: [last step of the stretch, mean]."""
    size = max(1, math.ceil(len(values) / points))
    chunks = [values[i : i + size] for i in range(0, len(values), size)]
    ends = [min(i + size, len(values)) for i in range(0, len(values), size)]
    return [[end, float(f"{sum(chunk) / len(chunk):.5g}")] for end, chunk in zip(ends, chunks, strict=True)]


def train(task: Task, run: Run) -> dict[str, Any]:
    """Train and judge; the same seed gives every optimizer the same weights, batches and dropout.

    Returns:
        "train": thinned training losses; "validation": [step, loss]; "scores" by split, None where the loss was not
        finite; "diverged": whether that was so, or the last losses are above the first; "cpu_seconds".
    """
    began = time.process_time()
    torch.manual_seed(run.seed)
    model = task.model().to(task.device)
    opt = make(run.setup, run.lr, run.seed, task, model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: task.schedule(min((step + 0.5) / run.steps, 1.0)))
    step = stepper(opt, lambda *batch: task.loss(model, *batch))
    losses: list[float] = []
    validation: list[list[float | None]] = []
    every = max(1, run.steps // VALIDATIONS)
    for number, batch in zip(range(1, run.steps + 1), task.batches(run.seed)):  # noqa: B905 - batches never end
        model.train()
        losses.append(float(step(tuple(t.to(task.device) for t in batch))))
        schedule.step()
        if not math.isfinite(losses[-1]):
            break
        if number % every == 0:
            loss = task.validation_loss(model.eval())
            validation.append([number, float(f"{loss:.5g}") if math.isfinite(loss) else None])
    finite = math.isfinite(losses[-1]) and all(bool(p.isfinite().all()) for p in model.parameters())
    tail = losses[-max(1, len(losses) // 20) :]
    return {
        "train": thin(losses if finite else losses[:-1]),
        "validation": validation,
        "scores": {
            split: round(task.score(model.eval(), split), 4) if finite else None for split in ("validation", "test")
        },
        "diverged": not finite or sum(tail) / len(tail) >= losses[0],
        "cpu_seconds": round(time.process_time() - began, 2),
    }
