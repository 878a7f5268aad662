"""Validation loss over time, and the score over the cost of curvature."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from bench.plots import COLOURS, panels

from ..optimizers import CHEAP, OURS, SOPHIA
from .outcome import Outcome, Runs

NAMES = ("SGD", "AdamW", OURS, CHEAP, SOPHIA)


def curve(o: Outcome, runs: Runs) -> list[tuple[int, float, float, float]]:
    """Step, mean, least and largest validation loss over the seeds, as far as all of them come."""
    found = [o.results.runs[run.key]["validation"] for run in runs if run.key in o.results.runs]
    points = []
    for rows in zip(*found, strict=False):
        values = [value for _, value in rows]
        if None in values:
            break
        points.append((int(rows[0][0]), statistics.mean(values), min(values), max(values)))
    return points


def draw_time(outcomes: Sequence[Outcome], path: Path) -> None:
    """Plot a panel for each task."""
    with panels(path, len(outcomes), 3.4, 3.8) as axes:
        for panel, o in zip(axes, outcomes, strict=True):
            cells = {name: runs for (name, _), runs in o.tables["optimizers"].items()}
            for name, colour in zip(NAMES, COLOURS, strict=False):
                points = curve(o, cells.get(name, ()))
                if not points or (seconds := o.seconds(cells[name][0])) is None:
                    continue
                step, means, least, largest = zip(*points, strict=True)
                x = [n * seconds / cells[name][0].steps for n in step]
                panel.plot(x, means, color=colour, label=name, linewidth=1.2)
                panel.fill_between(x, least, largest, color=colour, alpha=0.15, linewidth=0)
            panel.set(title=o.task.title, xlabel="seconds")
            _limit(panel)
        axes[0].set_ylabel("validation loss")


def draw_frontier(outcomes: Sequence[Outcome], path: Path) -> None:
    """Plot a panel for each task: a line for each r over f, and AdamW's mean and standard deviation."""
    with panels(path, len(outcomes), 3.4, 3.8) as axes:
        for panel, o in zip(axes, outcomes, strict=True):
            cells = o.tables["frontier"]
            for r, colour in zip(dict.fromkeys(row for row, _ in cells), COLOURS, strict=False):
                points = [(o.cost(runs), o.mean(runs)) for (row, _), runs in cells.items() if row == r]
                points = [point for point in points if None not in point]
                if points:
                    panel.plot(*zip(*points, strict=True), marker="o", color=colour, label=f"r = {r}", linewidth=1.2)
            seeds = len(next(iter(cells.values())))
            adamw = [x for x in o.scores(o.tables["optimizers"]["AdamW", ""][:seeds]) if x is not None]
            if len(adamw) > 1:
                mean, deviation = statistics.mean(adamw), statistics.stdev(adamw)
                panel.axhspan(mean - deviation, mean + deviation, color=COLOURS[-1], alpha=0.2)
                panel.plot(1, mean, "*", color=COLOURS[-1], markersize=10, label="AdamW")
            panel.set(title=o.task.title, xlabel="time / AdamW's", ylabel=o.task.metric)


def _limit(panel: Axes) -> None:
    """Logarithmic where losses span a decade; cut off far above the middle, as one divergence would hide all else."""
    values = sorted(y for line in panel.lines for y in line.get_ydata() if y > 0)
    if values:
        top = min(values[-1] * 1.05, values[len(values) // 2] * 30)
        panel.set_yscale("log" if top > 10 * values[0] else "linear")
        panel.set_ylim(top=top)
