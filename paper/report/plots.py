"""Training curves, over steps and over time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from bench.plots import COLOURS, panels

from ..optimizers import OURS
from ..plan import Comparison
from ..run import Run
from .outcome import Outcome
from .statistics import mean

NAMES = ("SGD", "AdamW", OURS, "AdaGrad")  # a colour each


def curve(o: Outcome, runs: Sequence[Run], kind: str) -> list[tuple[int, float, float, float]]:
    """Step, mean, least and largest value over the seeds, as far as all of them come; ``kind``: train or validation."""
    found = [o.results.runs[run.key][kind] for run in runs if run.key in o.results.runs]
    points = []
    for rows in zip(*found, strict=False):
        values = [value for _, value in rows]
        if None in values:
            break
        points.append((int(rows[0][0]), statistics.mean(values), min(values), max(values)))
    return points


def draw(o: Outcome, path: Path) -> None:
    """Training loss over steps, validation loss over steps and over time, for the optimizers of a task."""
    with panels(path, 3, 11 / 3, 3.6, f"{o.task.title}: {o.task.data}") as axes:
        for (name, _), runs in o.tables["optimizers"].cells.items():
            colour = COLOURS[NAMES.index(name)]
            _line(axes[0], curve(o, runs, "train"), name, colour)
            _line(axes[1], curve(o, runs, "validation"), name, colour)
            _line(axes[2], curve(o, runs, "validation"), name, colour, o.step_time(runs[0].setup))
        axes[0].set(xlabel="step", ylabel="training loss")
        axes[1].set(xlabel="step", ylabel="validation loss")
        axes[2].set(xlabel="seconds: steps x time of a step", ylabel="validation loss")
        _limit(axes)


def draw_sensitivity(o: Outcome, path: Path) -> None:
    """Test score over the factor of the learning rate and over the block size."""
    names = [name for name in ("lr_scaling", "block_size") if name in o.tables]
    with panels(path, len(names), 4.5, 3.6) as axes:
        for panel, name in zip(axes, names, strict=True):
            _scores(panel, o, o.tables[name])
            panel.set(xscale="log", ylabel=o.task.metric)
            panel.set_xlabel("learning rate x" if name == "lr_scaling" else "block size")


def draw_time(outcomes: Sequence[Outcome], path: Path) -> None:
    """Validation loss over time for AdaHessian's cheaper settings, a panel for each task."""
    with panels(path, len(outcomes), 4, 4.2) as axes:
        for panel, o in zip(axes, outcomes, strict=True):
            for number, ((label, _), runs) in enumerate(o.tables["cheap"].cells.items()):
                colour, dash = COLOURS[number % len(COLOURS)], "--" if "fewer steps" in label else "-"
                _line(panel, curve(o, runs, "validation"), label, colour, o.step_time(runs[0].setup), dash)
            panel.set(title=o.task.title, xlabel="seconds: steps x time of a step")
        _limit(axes)
        axes[0].set_ylabel("validation loss")


def _line(panel: Axes, points: list, label: str, colour: str, seconds: float | None = 1, dash: str = "-") -> None:
    if not points or seconds is None:
        return
    steps, means, least, largest = zip(*points, strict=True)
    x = [step * seconds for step in steps]
    panel.plot(x, means, dash, color=colour, label=label, linewidth=1.2)
    panel.fill_between(x, least, largest, color=colour, alpha=0.15, linewidth=0)


def _limit(axes: Sequence[Axes]) -> None:
    """Logarithmic where losses span a decade; cut off far above the middle, as one divergence would hide all else."""
    for panel in axes:
        values = sorted(y for line in panel.lines for y in line.get_ydata() if y > 0)
        if values:
            top = min(values[-1] * 1.05, values[len(values) // 2] * 30)
            panel.set_yscale("log" if top > 10 * values[0] else "linear")
            panel.set_ylim(top=top)


def _scores(panel: Axes, o: Outcome, table: Comparison) -> None:
    rows = list(dict.fromkeys(row for row, _ in table.cells))
    for row in rows:
        cells = {float(column): o.scores(runs) for (name, column), runs in table.cells.items() if name == row}
        finite = {x: [s for s in scores if s is not None] for x, scores in cells.items()}
        xs = [x for x in sorted(finite) if finite[x]]
        spread = [statistics.stdev(finite[x]) if len(finite[x]) > 1 else 0.0 for x in xs]
        panel.errorbar(
            xs, [mean(finite[x]) for x in xs], spread, marker="o", capsize=3, label=row, color=COLOURS[NAMES.index(row)]
        )
