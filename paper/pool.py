"""Carries out the plan: runs that have no record yet, in processes of one thread each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from .plan import Extent, comparisons, small
from .results import Results
from .run import Run, Setup
from .step_time import measure
from .tasks import Spec, make
from .training import train

CALIBRATED = ("optimizers", "frequency", "cheap", "bags")  # comparisons whose rows cost differently


def one_thread() -> None:
    """How a worker begins. On a CPU, PyTorch's math attention is the faster one for such short sequences."""
    torch.set_num_threads(1)
    torch.backends.cuda.enable_flash_sdp(torch.cuda.is_available())


def work(spec: Spec, run: Run) -> dict[str, Any]:
    """A run, in a worker."""
    return train(make(spec), run)


def calibrate(spec: Spec, setups: list[Setup], rounds: int) -> dict[str, dict[str, float]]:
    """Step times, in a worker."""
    return measure(make(spec), setups, rounds)


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
        missing = results.missing(small(list(runs)))
        self.on_total(len(missing))
        futures = {self.executor.submit(work, spec, run): run for run in missing}
        for future in as_completed(futures):
            results.add(futures[future], future.result())
            self.on_done()

    def calibrate(self, spec: Spec, results: Results, setups: list[Setup], rounds: int, again: bool) -> None:
        """The step times that are missing, or all of them; alone, so that workers do not slow each other down."""
        missing = [setup for setup in setups if again or setup.key not in results.step_times]
        if missing:
            first_order = [Setup("SGD"), Setup("AdamW")]
            missing = list({setup.key: setup for setup in (*first_order, *setups)}.values())
            results.step_times = self.executor.submit(calibrate, spec, missing, rounds).result()
            results.write()


def setups_of(tables: Iterable) -> list[Setup]:
    """Those whose cost the report shows."""
    runs = [run for table in tables if table.name in CALIBRATED for run in table.runs()]
    return list({run.setup.key: run.setup for run in runs}.values())


def learn_rates(pool: Pool, spec: Spec, results: Results, lender: Results | None, extent: Extent) -> dict[str, float]:
    """The learning rates of a task: tuned here, or taken over from the task it names."""
    task = make(spec)
    if lender is None:
        for _ in ("the grid", "around its best"):
            pool.carry_out(spec, results, [run for runs in results.trials(task, extent).values() for run in runs])
    return (lender or results).best_lrs(task, extent)


def carry_out(
    pool: Pool, spec: Spec, results: Results, lender: Results | None, extent: Extent, rounds: int, again: bool
) -> None:
    """Everything of one task."""
    lrs = learn_rates(pool, spec, results, lender, extent)
    tables = comparisons(make(spec), lrs, extent)
    pool.carry_out(spec, results, [run for table in tables for run in table.runs()])
    pool.calibrate(spec, results, setups_of(tables), rounds, again)
