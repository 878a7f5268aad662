"""What the demo measures: agreement with the reference, time per step, peak memory.

Run as a program (``python measure.py JSON``) it is the subprocess that measures one optimizer's peak memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contestants import CONTESTANTS, Contestant, Run, Settings, reference
from memory import meter
from plain import PlainAdaHessian
from resnet import MODELS
from torch import Tensor, nn

from adahessian_fused import hutchinson_diagonal
from adahessian_fused.bench.measure import in_turns, wall_clock
from adahessian_fused.reference import rademacher_signs

MEMORY_STEPS = 6  # enough for Hessian steps and, at every frequency up to 5, off-steps between


# ---- agreement -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far one contestant's first update is from the reference's.

    Attributes:
        name: the contestant.
        difference: largest difference, relative to the largest update of the same parameter.
        of_tolerance: largest difference, relative to what rounding allows that element.
    """

    name: str
    difference: float
    of_tolerance: float

    @property
    def ok(self) -> bool:
        """Whether every element is within its tolerance."""
        return self.of_tolerance <= 1


def first_step(contestant: Contestant, model: nn.Module, settings: Settings, x: Tensor, y: Tensor) -> Run:
    """One step from the model's weights, with the probe all backends draw for this seed.

    Not compiled: a compiler rounds the gradient and Hz in other places.
    """
    run = Run(contestant, model, settings, compile=False)
    if isinstance(run.optimizer, PlainAdaHessian):
        run.optimizer.draw = lambda params: [
            rademacher_signs(p.numel(), i, torch.zeros((), dtype=torch.int64, device=p.device), settings.seed, 0)
            .reshape(p.shape)
            .to(p.dtype)
            for i, p in enumerate(params)
        ]
    run.step(x, y)
    return run


def rounding_bounds(right: Run, model: nn.Module, settings: Settings, x: Tensor, y: Tensor) -> list[Tensor]:
    """How far two float32 evaluations of the first update may differ, for every element.

    With u the unit roundoff, one evaluation is off by at most (the counts are those of tests/tolerances.py)

        4 u |p|                                  decay and the rounding of p itself
        25 u |update|                            m, the root, the sum with eps, the quotient, the factor lr
        |update| e / (1 - e),                    the block mean, e = 4 sqrt(b) u mean|D| / (|Ds| + eps), which grows
                                                 without bound where the terms of a mean cancel; and with shrinkage
                                                 2 sqrt(n) u for the mean of the n numbers of v, which are positive

    and two evaluations by twice that. The gradient and Hz are the same numbers in both.
    """
    u = torch.finfo(torch.float32).eps / 2
    params = list(model.parameters())
    loss = F.cross_entropy(model(x), y)
    magnitudes = hutchinson_diagonal(
        loss, params, block_size="auto", averaging="abs", seed=settings.seed, backend="reference"
    )
    group = right.optimizer.param_groups[0]
    bounds = []
    for p0, p1, magnitude in zip(params, right.model.parameters(), magnitudes, strict=True):
        update = (p1 - p0).detach().double().abs()
        block = p0.shape[2:].numel() if p0.dim() > 2 else 1
        root = right.optimizer.hessian_diag(p1).double()
        e = (4 * block**0.5 * u * magnitude.double() / (root + group["eps"])) * (block > 1)
        if group["shrink"]:  # half of the mean's error: its root is taken
            e = e + 2 * p0.numel() ** 0.5 * u
        mean_error = torch.where(e < 1, update * e / (1 - e), torch.inf)
        bounds.append(2 * (4 * u * p1.detach().double().abs() + 25 * u * update + mean_error))
    return bounds


def agreement(
    contestants: Sequence[Contestant], model: nn.Module, settings: Settings, x: Tensor, y: Tensor
) -> list[Agreement]:
    """Compare the first update of every AdaHessian with that of the reference backend.

    Both have the same weights, batch and seed, and the same operators: Hz of a told model, and of TrainStep, is rounded
    in other places. A contestant with options of its own is compared with the reference of these options.
    """
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True  # otherwise two gradients of the same loss differ already
    try:
        results = []
        for contestant in contestants:
            same_operators = {"told": contestant.told, "compiled": contestant.compiled}
            right = first_step(reference(**same_operators, **contestant.options), model, settings, x, y)
            bounds = rounding_bounds(right, model, settings, x, y)
            run = first_step(contestant, model, settings, x, y)
            difference = of_tolerance = 0.0
            for p0, p, expected, bound in zip(*map(_weights, (model, run.model, right.model)), bounds, strict=True):
                error = (p - expected).abs()
                difference = max(difference, float(error.max() / (expected - p0).abs().max()))
                of_tolerance = max(of_tolerance, float((error / bound).max()))
            results.append(Agreement(contestant.name, difference, of_tolerance))
        return results
    finally:
        torch.backends.cudnn.deterministic = deterministic


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().double() for p in model.parameters()]


# ---- time ------------------------------------------------------------------------------------------------------------


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile."""
    sample, levels = torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, median, p80 = sample.quantile(levels).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def time_steps(
    runs: Sequence[Run], x: Tensor, y: Tensor, rounds: int, on_round: Callable[[], None]
) -> dict[str, list[float]]:
    """Milliseconds a step, interleaved: in every round each run makes one period of steps on the same batch.

    A period is one step, or with Hutchinson frequency f the Hessian step and its f - 1 off-steps. What is done before
    the cost repeats itself, and one more round, warm up.
    """
    for run in runs:
        for _ in range(run.contestant.start - run.contestant.period):
            run.step(x, y)
    periods = {run.contestant.name: run.contestant.period for run in runs}
    steps = {r.contestant.name: lambda r=r: [r.step(x, y) for _ in range(r.contestant.period)] for r in runs}
    times = in_turns(steps, rounds, lambda step: 1e3 * wall_clock(step, x.device.type), on_round)
    return {name: [ms / periods[name] for ms in found] for name, found in times.items()}


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(
    contestant: str, model: str, shape: Sequence[int], settings: Settings, device: str, threads: int
) -> dict[str, Any]:
    """Peak memory of a few training steps over the level before the first, in a process of its own: {"mb", "what"}.

    Raises:
        RuntimeError: the process failed; the message has the end of what it said.
    """
    job = {
        "contestant": contestant,
        "model": model,
        "shape": list(shape),
        "settings": asdict(settings),
        "device": device,
        "threads": threads,
    }
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(job)]
    same_modules = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=same_modules, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that measures the memory of {contestant} ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(job: dict) -> dict:
    """In the subprocess: the steps of one contestant on random images; memory does not depend on what they show."""
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    batch, channels = job["shape"][:2]
    torch.manual_seed(0)
    x, y = torch.randn(job["shape"], device=device), torch.randint(10, (batch,), device=device)
    model = MODELS[job["model"]](channels).to(device)
    run = Run(CONTESTANTS[job["contestant"]], model, Settings(**job["settings"]))
    peak = meter(device)
    for _ in range(MEMORY_STEPS):
        run.step(x, y)
    return {"mb": peak.megabytes(), "what": peak.what}


if __name__ == "__main__":
    print(json.dumps(measure_memory(json.loads(sys.argv[1]))))
