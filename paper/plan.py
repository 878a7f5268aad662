"""Which runs there are: the learning rates that are tried, then the cells of every table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .optimizers import CHEAP, EXACT, OURS, SETUPS, SIGNED
from .run import Run, Setup

TUNING_SEED = 100
TABLES = ("optimizers", "lr_scaling", "block_size", "frontier")  # the first ones first
IN_TIME = ", in AdamW's time"  # of the labels of runs with fewer steps


@dataclass(frozen=True)
class Extent:
    """How much of everything there is."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    more_seeds: tuple[int, ...] = (5, 6, 7, 8, 9)  # of the optimizers, where a run takes seconds
    curve_seeds: tuple[int, ...] = (0, 1, 2)
    frequencies: tuple[int, ...] = (1, 2, 5, 10, 20)
    fractions: tuple[float, ...] = (1, 0.5, 0.25, 0.125)
    lr_scales: tuple[float, ...] = (0.5, 1, 2, 4, 10)
    block_sizes: tuple[int, ...] = (1, 4, 32, 128)
    trials: int | None = None  # learning rates a setting; None: its whole grid
    refine: bool = True  # two more trials around the grid's best
    steps: int | None = None  # of a run; None: the task's


FULL = Extent()
QUICK = Extent((0,), (), (0,), (1, 2), (1, 0.25), (1, 10), (1, 32), trials=1, refine=False, steps=4)
Table = Mapping[tuple[str, str], tuple[Run, ...]]  # runs, one for each seed, by row and column


def runs_of(tables: Iterable[Table]) -> list[Run]:
    """All of them, without repetitions; those of the first seed come first."""
    runs = {run.key: run for table in tables for runs in table.values() for run in runs}
    return sorted(runs.values(), key=lambda run: run.seed)


def around(best: float, grid: tuple[float, ...]) -> tuple[float, float]:
    """Half-way, in the logarithm, to the neighbours in a grid; at an edge of it as far again on the other side."""
    i = grid.index(best)
    below = math.sqrt(best * grid[i - 1]) if i > 0 else best * best / grid[1]
    above = math.sqrt(best * grid[i + 1]) if i + 1 < len(grid) else best * best / grid[-2]
    return float(f"{below:.2g}"), float(f"{above:.2g}")


class Planner:
    """The tables of one task.

    Args:
        task: its settings.
        extent: how much of each.
        lrs: best learning rates by setting, as far as they are known; a table leaves out what has none.
    """

    def __init__(self, task: Any, extent: Extent, lrs: Mapping[str, float] = {}) -> None:
        self.task, self.extent, self.lrs = task, extent, lrs
        self.steps = extent.steps or task.steps
        self.takes_seconds = task.tuning_steps == task.steps  # elsewhere trials are shorter than runs
        self.refines = extent.refine and self.takes_seconds

    # ---- learning rates ----------------------------------------------------------------------------------------------

    def settings(self, table: str) -> dict[str, Setup]:
        """Those whose learning rates a table needs."""
        if table == "block_size":
            blocks = {f"{OURS}, b = {b}": Setup(OURS, {**EXACT, "block_size": b}) for b in self._other_blocks()}
            return {name: SETUPS[name] for name in (OURS, SIGNED)} | blocks
        names = {"optimizers": self.task.learning_rates, "lr_scaling": ("AdamW", OURS), "frontier": (CHEAP,)}
        return {name: SETUPS[name] for name in names[table]}

    def trials(self, name: str, setup: Setup, best: float | None = None) -> list[Run]:
        """Return the learning rates that are tried for a setting: as many for each, on a seed that no table uses.

        Args:
            name: of the setting.
            setup: the setting.
            best: of the grid; two more trials around it.
        """
        grid = tuple(self.task.learning_rates.get(name, self.task.learning_rates[OURS]))
        rates = grid[: self.extent.trials] if best is None else around(best, grid)
        steps = self.extent.steps or self.task.tuning_steps
        return [Run(setup, lr, TUNING_SEED, steps) for lr in rates]

    # ---- tables ------------------------------------------------------------------------------------------------------

    def table(self, name: str) -> Table:
        """One of them."""
        return getattr(self, name)()

    def optimizers(self) -> Table:
        """Tables 1 to 3: every optimizer at its best learning rate, in as many steps and in as much time as AdamW."""
        settings = {name: setup for name, setup in self.settings("optimizers").items() if name in self.lrs}
        seeds = self.extent.seeds + (self.extent.more_seeds if self.takes_seconds else ())
        cells = {(name, ""): self._runs(setup, self.lrs[name], seeds=seeds) for name, setup in settings.items()}
        for name in (OURS, CHEAP):
            if name in settings:
                steps = max(n for n in range(1, self.steps + 1) if settings[name].cost(n) <= max(self.steps, 3))
                cells[name + IN_TIME, ""] = self._runs(settings[name], self.lrs[name], steps, seeds)
        return cells

    def frontier(self) -> Table:
        """Table 6 and beyond: the recipe with curvature on every f-th step from a fraction r of the batch."""
        if CHEAP not in self.lrs:
            return {}
        cells = {}
        for r in self.extent.fractions:
            for f in self.extent.frequencies:
                options = {**SETUPS[CHEAP].options, "update_each": f} | ({} if r == 1 else {"hessian_fraction": r})
                setup = Setup(OURS, options)
                cells[f"{r:g}", str(f)] = self._runs(setup, self.lrs[CHEAP], seeds=self.extent.curve_seeds)
        return cells

    def lr_scaling(self) -> Table:
        """Table 4: learning rates scaled."""
        return {
            (name, f"{scale:g}"): self._runs(setup, self.lrs[name] * scale)
            for name, setup in self.settings("lr_scaling").items()
            for scale in self.extent.lr_scales
            if name in self.lrs
        }

    def block_size(self) -> Table:
        """Table 5: length of the averaging blocks, each at its own learning rate, and signed averages, all at one."""
        cells = {}
        for b in self.extent.block_sizes:
            other = b in self._other_blocks()
            name = f"{OURS}, b = {b}" if other else OURS
            if name in self.lrs:
                cells[OURS, str(b)] = self._runs(self.settings("block_size")[name], self.lrs[name])
            if SIGNED in self.lrs:
                setup = Setup(OURS, SETUPS[SIGNED].options | ({"block_size": b} if other else {}))
                cells[SIGNED, str(b)] = self._runs(setup, self.lrs[SIGNED], seeds=self.extent.curve_seeds)
        return dict(sorted(cells.items(), key=lambda item: item[0][0]))

    def _other_blocks(self) -> list[int]:
        return [b for b in self.extent.block_sizes if b != self.task.block_size]

    def _runs(
        self, setup: Setup, lr: float, steps: int | None = None, seeds: tuple[int, ...] | None = None
    ) -> tuple[Run, ...]:
        return tuple(Run(setup, float(f"{lr:g}"), seed, steps or self.steps) for seed in seeds or self.extent.seeds)
