"""A task's results with its plan: what the pages are made of."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

from ..plan import Comparison, Extent, comparisons
from ..results import Results
from ..run import Run, Setup
from ..tasks import MAKERS
from .statistics import Difference, Scores, cell, difference


class Outcome:
    """One results file; ``settings`` are attributes of ``task``."""

    def __init__(self, path: Path, extent: Extent) -> None:
        self.results, self.extent, self.stem = Results(path), extent, path.stem
        self.task = SimpleNamespace(**self.results.settings)

    @cached_property
    def lrs(self) -> dict[str, float] | None:
        """Chosen learning rates; None while trials are missing."""
        source = self.results
        if self.task.tuned_on:
            path = source.path.with_name(source.path.name.replace(self.task.name, self.task.tuned_on))
            if not path.exists():
                return None
            source = Results(path)
        return source.best_lrs(SimpleNamespace(**source.settings), self.extent)

    @cached_property
    def trials(self) -> dict[str, list[Run]]:
        """Those of this file that chose the learning rates, by optimizer."""
        return self.results.trials(self.task, self.extent)

    @cached_property
    def tables(self) -> dict[str, Comparison]:
        """By name; empty while trials are missing."""
        return {t.name: t for t in comparisons(self.task, self.lrs, self.extent)} if self.lrs else {}

    def scores(self, runs: tuple[Run, ...], split: str = "test") -> Scores:
        """One for each run that is done."""
        return self.results.scores(runs, split)

    def cell(self, runs: tuple[Run, ...]) -> str:
        """Test score as it stands in a table."""
        text = cell(self.scores(runs), len(runs), 1 if self.task.metric == "perplexity" else 2)
        above = [
            run
            for run in runs
            if (r := self.results.runs.get(run.key)) and r["diverged"] and r["scores"]["test"] is not None
        ]
        return text + (" †" if above else "")

    def difference(self, first: tuple[Run, ...], second: tuple[Run, ...]) -> Difference | None:
        """Of the test scores, seed by seed, where both are there."""
        runs = self.results.runs
        both = [(a, b) for a, b in zip(first, second, strict=True) if a.key in runs and b.key in runs]
        scores = [self.scores(column) for column in zip(*both, strict=True)] or ([], [])
        return difference(*scores, higher_is_better=self.task.higher_is_better)

    def step_time(self, setup: Setup) -> float | None:
        """Seconds."""
        found = self.results.step_times.get(setup.key)
        return found and found["median"]

    def done(self) -> tuple[int, int]:
        """Runs of the tables that have a record, and how many there are to be."""
        keys = {run.key for table in self.tables.values() for run in table.runs()}
        return sum(key in self.results.runs for key in keys), len(keys)

    def complete(self, runs: tuple[Run, ...]) -> bool:
        """Whether all have a record."""
        return not self.results.missing(runs)


def load(folder: Path, extent: Extent) -> dict[str, Outcome]:
    """All results files of a folder, in the order of the paper's tables."""
    order = list(MAKERS)
    found = {path.stem: Outcome(path, extent) for path in sorted(folder.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
