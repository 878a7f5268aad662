"""Carries out the plan: runs that have no record yet, in processes of one thread each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from .optimizers import OURS, SETUPS
from .plan import Extent, Planner, runs_of
from .results import Results
from .run import Run
from .step_time import StepTimes, measure
from .tasks import Spec, make
from .training import train


def one_thread() -> None:
    """How a worker begins. On a CPU, PyTorch's math attention is the faster one for such short sequences."""
    torch.set_num_threads(1)
    torch.backends.cuda.enable_flash_sdp(torch.cuda.is_available())


def work(spec: Spec, run: Run) -> dict[str, Any]:
    """Carry out a run, in a worker."""
    return train(make(spec), run)


def calibrate(spec: Spec, extent: Extent, rounds: int) -> StepTimes:
    """Step times, in a worker."""
    task = make(spec)
    first_order = [SETUPS[name].optimizer for name in task.learning_rates if SETUPS[name].optimizer != OURS]
    return measure(task, first_order, extent.fractions, rounds)


class Pool:
    """Workers, and what to call with the number of runs there will be, and when one is done."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.executor = ProcessPoolExecutor(workers, mp_context=context, initializer=one_thread)
        self.on_total: Callable[[int], None] = lambda n: None
        self.on_done: Callable[[], None] = lambda: None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.executor.shutdown(cancel_futures=True)

    def carry_out(self, spec: Spec, results: Results, runs: Iterable[Run]) -> None:
        """Those of the runs that are missing; each is on the disk as soon as it is done."""
        missing = results.missing(runs)
        self.on_total(len(missing))
        futures = {self.executor.submit(work, spec, run): run for run in missing}
        for future in as_completed(futures):
            results.add(futures[future], future.result())
            self.on_done()

    def table(self, spec: Spec, results: Results, extent: Extent, name: str) -> None:
        """Train for a table of a task: first its settings' learning rates, on the grid and around the grid's best."""
        task = make(spec)
        for _ in ("the grid", "around its best"):
            trials = results.trials(Planner(task, extent), name)
            self.carry_out(spec, results, [run for runs in trials.values() for run in runs])
        lrs = results.best_lrs(Planner(task, extent), name)
        self.carry_out(spec, results, runs_of([Planner(task, extent, lrs).table(name)]))

    def calibrate(self, spec: Spec, results: Results, extent: Extent, rounds: int) -> None:
        """Measure the step times, alone, so that workers do not slow each other down."""
        results.step_times = self.executor.submit(calibrate, spec, extent, rounds).result()
        results.write()
