"""Which runs there are: the learning rates that are tried, then the cells of every table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .optimizers import OURS
from .run import Run, Setup
from .task import Task

TUNING_SEED = 100


@dataclass(frozen=True)
class Extent:
    """How much of everything there is."""

    seeds: tuple[int, ...] = (0, 1, 2)
    frequencies: tuple[int, ...] = (1, 2, 3, 4, 5)
    lr_scales: tuple[float, ...] = (0.5, 1, 2, 4, 6, 10, 20)
    block_sizes: tuple[int, ...] = (1, 4, 16, 32, 64, 128)
    trials: int | None = None  # learning rates an optimizer; None: its whole grid
    refine: bool = True  # two more trials around the grid's best
    steps: int | None = None  # of a run; None: the task's


FULL = Extent()
QUICK = Extent(seeds=(0,), frequencies=(1, 2), lr_scales=(1, 10), block_sizes=(1, 32), trials=1, refine=False, steps=4)


@dataclass(frozen=True)
class Comparison:
    """A table: runs, one for each seed, by row and column."""

    name: str
    cells: Mapping[tuple[str, str], tuple[Run, ...]]

    def runs(self) -> list[Run]:
        """All of them."""
        return [run for runs in self.cells.values() for run in runs]


def tuning(task: Task, extent: Extent) -> dict[str, list[Run]]:
    """The trials of every optimizer: the same number for each, on a seed that no table uses."""
    return {name: [trial(task, extent, name, lr) for lr in grid[: extent.trials]]
            for name, grid in task.learning_rates.items()}  # fmt: skip


def refinement(task: Task, extent: Extent, best: Mapping[str, float]) -> dict[str, list[Run]]:
    """Two more trials of every optimizer, around the best of its grid; none unless the extent refines."""
    return {name: [trial(task, extent, name, lr) for lr in around(best[name], grid) if extent.refine]
            for name, grid in task.learning_rates.items()}  # fmt: skip


def trial(task: Task, extent: Extent, optimizer: str, lr: float) -> Run:
    """One of them."""
    return Run(Setup(optimizer), lr, TUNING_SEED, extent.steps or task.steps)


def around(best: float, grid: tuple[float, ...]) -> tuple[float, float]:
    """Half-way, in the logarithm, to the neighbours in a grid; at an edge of it as far again on the other side."""
    i = grid.index(best)
    below = math.sqrt(best * grid[i - 1]) if i > 0 else best * best / grid[1]
    above = math.sqrt(best * grid[i + 1]) if i + 1 < len(grid) else best * best / grid[-2]
    return float(f"{below:.2g}"), float(f"{above:.2g}")


class Planner:
    """The tables of one task."""

    def __init__(self, task: Task, lrs: Mapping[str, float], extent: Extent) -> None:
        self.task, self.lrs, self.extent = task, lrs, extent
        self.steps = extent.steps or task.steps

    def runs(self, setup: Setup, *, scale: float = 1, steps: int | None = None) -> tuple[Run, ...]:
        """A run for each seed."""
        lr = self.lrs[setup.optimizer] * scale
        return tuple(Run(setup, lr, seed, steps or self.steps) for seed in self.extent.seeds)

    def optimizers(self) -> Comparison:
        """Tables 1 to 3: every optimizer at its best learning rate."""
        return Comparison("optimizers", {(name, self.task.name): self.runs(Setup(name)) for name in self.lrs})

    def frequency(self) -> Comparison:
        """Table 6: AdaHessian with the Hessian every f steps."""
        cells = {("", str(f)): self.runs(frequency(f)) for f in self.extent.frequencies}
        return Comparison("frequency", cells)

    def lr_scaling(self) -> Comparison:
        """Table 4: learning rates scaled."""
        cells = {
            (name, f"{scale:g}"): self.runs(Setup(name), scale=scale)
            for name in ("AdamW", OURS)
            for scale in self.extent.lr_scales
        }
        return Comparison("lr_scaling", cells)

    def block_size(self) -> Comparison:
        """Table 5: length of the averaging blocks."""
        default = self.task.block_size
        cells = {
            (OURS, str(b)): self.runs(Setup(OURS, {} if b == default else {"block_size": b}))
            for b in self.extent.block_sizes
        }
        return Comparison("block_size", cells)

    def cheap(self) -> Comparison:
        """AdaHessian's cheaper settings beside the first-order optimizers; the last rows fit into AdamW's time.

        A step with exact curvature from a fraction r of the batch on every f-th step counts 1 + 2r/f first-order ones.
        """
        ways = {
            OURS: {},
            "every 5 steps": {"update_each": 5},
            "from 1/4 of the batch": {"hessian_fraction": 0.25},
            "every 5 steps, from 1/4": {"update_each": 5, "hessian_fraction": 0.25},
        }
        cells = {(name, self.task.name): self.runs(Setup(name)) for name in self.lrs if name != OURS}
        for label, options in ways.items():
            label = label if label == OURS else f"{OURS}, {label}"
            cells[label, self.task.name] = self.runs(Setup(OURS, options))
        for label in ("every step", "every 5 steps"):
            options = {} if label == "every step" else ways[label]
            steps = max(1, round(self.steps / nominal_cost(options)))
            cells[f"{OURS}, {label}, fewer steps", self.task.name] = self.runs(Setup(OURS, options), steps=steps)
        return Comparison("cheap", cells)

    def bags(self) -> Comparison:
        """Three ways round the missing double backward of embedding bags."""
        ways = {
            "curvature_friendly": Setup(OURS),
            "dense embeddings": Setup(OURS, variant="dense"),
            "finite differences": Setup(OURS, {"hvp": "finite_difference"}, "gelu"),
            "curvature_friendly, GELU": Setup(OURS, variant="gelu"),
        }
        return Comparison("bags", {(label, self.task.name): self.runs(setup) for label, setup in ways.items()})


def frequency(f: int) -> Setup:
    """AdaHessian with a Hutchinson frequency."""
    return Setup(OURS, {"update_each": f} if f > 1 else {})


def nominal_cost(options: Mapping[str, float]) -> float:
    """First-order steps that a step costs by its matrix products."""
    return 1 + 2 * options.get("hessian_fraction", 1.0) / options.get("update_each", 1)


def comparisons(task: Task, lrs: Mapping[str, float], extent: Extent) -> list[Comparison]:
    """The task's tables."""
    planner = Planner(task, lrs, extent)
    return [getattr(planner, name)() for name in task.tables]


def small(runs: list[Run]) -> list[Run]:
    """Without repetitions, in order."""
    return list({run.key: run for run in runs}.values())
