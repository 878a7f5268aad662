"""A task's results with its plan, and what so few seeds can tell apart: what the pages are made of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from scipy.stats import ttest_1samp

from ..plan import Extent, Planner, Table, runs_of
from ..results import Results
from ..run import Run
from ..step_time import seconds
from ..tasks import MAKERS

Runs = Sequence[Run]


class Difference(NamedTuple):
    """How much better the first scores are than the second, seed by seed: the mean, positive if the first are better,
    the 95 % interval of the mean (Student's t), and the number of seeds.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """Either "better", "worse" or "even" (the interval contains zero)."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "even"

    def __str__(self) -> str:
        return f"{self.mean:+.2f} (95 % interval {self.low:+.2f} to {self.high:+.2f}, {self.n} seeds)"


def difference(gains: Sequence[float]) -> Difference | None:
    """From one gain for each seed; None if there are fewer than two."""
    if len(gains) < 2:
        return None
    interval = ttest_1samp(gains, 0).confidence_interval(0.95)
    low, high = (interval.low, interval.high) if len(set(gains)) > 1 else (gains[0], gains[0])
    return Difference(statistics.mean(gains), float(low), float(high), len(gains))


class Outcome:
    """One results file; ``settings`` are attributes of ``task``.

    Attributes:
        tables: by name, as far as their learning rates are known.
        lrs: best learning rates, by table and setting.
    """

    def __init__(self, path: Path, extent: Extent) -> None:
        self.results, self.extent, self.stem = Results(path), extent, path.stem
        self.task = SimpleNamespace(**self.results.settings)
        self.planner = Planner(self.task, extent)
        self.lrs = {name: self.results.best_lrs(self.planner, name) for name in self.task.tables}
        self.tables: dict[str, Table] = {
            name: Planner(self.task, extent, lrs).table(name) for name, lrs in self.lrs.items()
        }

    # ---- scores ------------------------------------------------------------------------------------------------------

    def scores(self, runs: Runs) -> list[float | None]:
        """One for each run that is done; None where the loss was not finite, or a perplexity is above the start's."""
        worse = self.task.metric == "perplexity"
        records = [self.results.runs[run.key] for run in runs if run.key in self.results.runs]
        return [None if worse and r["diverged"] else r["scores"]["test"] for r in records]

    def mean(self, runs: Runs) -> float | None:
        """Of the test scores; None if runs are missing or some are not finite."""
        scores = self.scores(runs)
        return statistics.mean(scores) if len(scores) == len(runs) and None not in scores else None

    def cell(self, runs: Runs) -> str:
        """Test scores as they stand in a table: mean, deviation; how many diverged, or are not there yet."""
        scores, digits = self.scores(runs), 1 if self.task.metric == "perplexity" else 2
        finite = [x for x in scores if x is not None]
        notes = [f"{len(scores)} of {len(runs)} seeds"] if len(scores) < len(runs) else []
        if len(finite) < len(scores):
            notes.append(f"{len(scores) - len(finite)} of {len(scores)} diverged")
        if not finite:
            return "diverged" if scores else "-"
        deviation = f" ± {statistics.stdev(finite):.{digits}f}" if len(finite) > 1 else ""
        text = f"{statistics.mean(finite):.{digits}f}{deviation}" + (f" ({', '.join(notes)})" if notes else "")
        rising = self.diverged(runs) > len(scores) - len(finite)
        return text + (" †" if rising else "")

    def diverged(self, runs: Runs) -> int:
        """How many ended in a loss that is not finite, or above their first."""
        return sum(self.results.runs[run.key]["diverged"] for run in runs if run.key in self.results.runs)

    def difference(self, first: Runs, second: Runs) -> Difference | None:
        """Of the test scores, seed by seed, where both are there and finite."""
        sign = 1 if self.task.higher_is_better else -1
        pairs = [self.scores(pair) for pair in zip(first, second, strict=True)]
        return difference([sign * (pair[0] - pair[1]) for pair in pairs if len(pair) == 2 and None not in pair])

    # ---- cost --------------------------------------------------------------------------------------------------------

    def seconds(self, run: Run) -> float | None:
        """Time of a run's steps."""
        return seconds(run, self.results.step_times)

    def cost(self, runs: Runs) -> float | None:
        """Time of a run over that of AdamW's of as many steps as the task has."""
        (adamw, *_), (run, *_) = self.tables["optimizers"]["AdamW", ""], runs
        times = self.seconds(run), self.seconds(adamw)
        return times[0] / times[1] if all(times) else None

    # ---- how far it is -----------------------------------------------------------------------------------------------

    def complete(self, runs: Runs) -> bool:
        """Whether all have a record."""
        return not self.results.missing(runs)

    def done(self) -> str:
        """Return what is missing, in words; empty if nothing is."""
        waiting = {name for t in self.task.tables for name in self.planner.settings(t) if name not in self.lrs[t]}
        runs = runs_of(self.tables.values())
        missing = len(self.results.missing(runs))
        parts = ([f"{missing} of {len(runs)} runs"] if missing else []) + (
            [f"tuning of {', '.join(sorted(waiting))}"] if waiting else []
        )
        return "; ".join(parts)


def load(folder: Path, extent: Extent) -> dict[str, Outcome]:
    """All results files of a folder, in the order of the tasks."""
    order = list(MAKERS)
    paths = sorted(folder.glob("*.json"), key=lambda path: (order.index(path.stem.split("-")[0]), path.stem))
    return {path.stem: Outcome(path, extent) for path in paths}
