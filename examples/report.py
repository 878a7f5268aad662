"""What the demo shows: progress, the table, results.json and training.png."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import torch
from contestants import PAPER_COST, Contestant
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import adahessian_fused
from adahessian_fused.bench import machine as bench_machine

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend

# Okabe and Ito's colours, which colour-blind readers can tell apart; lines differ in dashes and markers as well.
COLOURS = ("#000000", "#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#999999")
DASHES = ("-", "--", "-.", "-", ":", "--", "-.", ":", "--")
MARKERS = "osD^vP*Xh"


# ---- progress --------------------------------------------------------------------------------------------------------


class Display:
    """Progress of the training: bars on a terminal, a line an epoch elsewhere."""

    def __init__(self, console: Console, contestants: Sequence[Contestant], steps: int) -> None:
        self.console = console
        self.bars = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self.bars = Progress(*columns, TextColumn("{task.fields[now]}"), TimeElapsedColumn(), console=console)
            self.tasks = {c.name: self.bars.add_task(c.label, total=steps, start=False, now="") for c in contestants}

    def __enter__(self) -> Display:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def step(self, contestant: Contestant, loss: float) -> None:
        """One step more."""
        if self.bars is not None:
            self.bars.start_task(self.tasks[contestant.name])
            self.bars.update(self.tasks[contestant.name], advance=1, now=f"loss {loss:.4f}")

    def epoch(self, contestant: Contestant, epoch: int, epochs: int, curves: dict[str, list[float]]) -> None:
        """Tell of the end of one contestant's epoch."""
        loss, accuracy = curves["train_loss"][-1], curves["test_accuracy"][-1]
        if self.bars is not None:
            self.bars.update(self.tasks[contestant.name], now=f"loss {loss:.4f}, test {accuracy:.2f} %")
            return
        self.console.print(
            f"epoch {epoch:3d}/{epochs}  {contestant.label}: loss {loss:.4f}, test {accuracy:.2f} %, "
            f"{curves['seconds'][-1]:.1f} s of training",
            highlight=False,
        )


@contextmanager
def progress_of(console: Console, what: str, total: int) -> Iterator[Any]:
    """Show a bar (a line where there is no terminal) while measuring; yields what to call after each item."""
    if not console.is_terminal:
        console.print(f"{what} ...", highlight=False)
        yield lambda: None
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console) as bars:
        task = bars.add_task(what, total=total)
        yield lambda: bars.advance(task)


# ---- figures and where they come from --------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures were measured on."""
    backends = adahessian_fused.available_backends(device.type)
    return bench_machine.machine(device.type) | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backend": next(name for name, why in backends.items() if why is None),
    }


def finite(value: Any) -> Any:
    """Return the same with None in the place of infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(results: dict[str, Any], path: Path) -> None:
    """All figures, readable."""
    path.write_text(json.dumps(finite(results), indent=2) + "\n")


def where(host: dict[str, Any]) -> str:
    """Return the device, for headings."""
    if host["device"] != "cpu":
        return host["device"]
    return f"{host['cpu']}, {host['threads']} thread{'s' if host['threads'] > 1 else ''}"


def heading(settings: dict[str, Any]) -> str:
    """Return what was trained."""
    return f"{settings['model'].replace('resnet', 'ResNet-')} on {settings['data']}, batch {settings['batch_size']}"


def paper_cost(model: str, contestant: Contestant) -> float | None:
    """Table 6's cost relative to SGD at the contestant's Hutchinson frequency."""
    return PAPER_COST[model].get(contestant.frequency)


# ---- the table -------------------------------------------------------------------------------------------------------


def spread(value: dict[str, float] | None, digits: int) -> str:
    """Median, and its percentiles on a second line."""
    if value is None:
        return "-"
    return f"{value['median']:.{digits}f}\n[dim]{value['p20']:.{digits}f}-{value['p80']:.{digits}f}[/]"


def number(value: float | None, form: str) -> str:
    """Return a number, or a dash for none."""
    return "-" if value is None else form.format(value)


def table(results: dict[str, Any]) -> Table:
    """One row an optimizer."""
    settings, memory = results["arguments"], results["memory"]
    out = Table(
        title=f"{heading(settings)}, {settings['epochs']} epochs",
        caption=f"Times: {settings['rounds']} interleaved rounds, median, 20th-80th percentile; Hessian and off-steps "
        "in proportion. Cost: time over SGD's in the same round. Paper: Table 6 for this frequency (RTX Titan, "
        f"CIFAR-10). Memory: {memory['what']}, {memory['over']}.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    out.add_column("optimizer", max_width=26)
    for name in ("train\nloss", "test\nacc. %", "ms\nper step", "cost\nx SGD", "paper\nx SGD", "memory\nMB"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in results["optimizers"].values():
        out.add_row(
            row["label"],
            number(row["final_train_loss"], "{:.4f}"),
            number(row["test_accuracy"], "{:.2f}"),
            spread(row["step_ms"], 1),
            spread(row["cost_x_sgd"], 2),
            number(row["paper_cost_x_sgd"], "{:.2f}"),
            number(row["peak_memory_mb"], "{:.0f}"),
        )
    return out


# ---- the figure ------------------------------------------------------------------------------------------------------


def plot_curves(axes: plt.Axes, rows: Sequence[dict], x_of: Any, y_key: str) -> None:
    """One line an optimizer."""
    for i, row in enumerate(rows):
        style = {"color": COLOURS[i], "linestyle": DASHES[i], "marker": MARKERS[i], "markersize": 4, "linewidth": 1.8}
        curve = row["curves"][y_key]
        axes.plot(x_of(row), curve, label=row["label"], markevery=max(1, len(curve) // 12), **style)
    axes.grid(alpha=0.3)


def accuracy_floor(rows: Sequence[dict]) -> float:
    """Where the accuracy axis starts, so that the differences at the end can be seen and the start is cut off."""
    last = [row["curves"]["test_accuracy"][-1] for row in rows]
    return max(0.0, min(last) - max(8.0, 0.5 * (100 - min(last))))


def plot_costs(axes: plt.Axes, rows: Sequence[dict], paper: dict[int, float]) -> None:
    """Bars of the measured cost relative to SGD, with the paper's figure beside them."""
    shown = [(i, row) for i, row in enumerate(rows) if row["cost_x_sgd"] is not None]
    labels = [row["label"].replace(", ", ",\n") for _, row in shown]
    medians = [row["cost_x_sgd"]["median"] for _, row in shown]
    errors = [
        [row["cost_x_sgd"]["median"] - row["cost_x_sgd"]["p20"] for _, row in shown],
        [row["cost_x_sgd"]["p80"] - row["cost_x_sgd"]["median"] for _, row in shown],
    ]
    axes.barh(labels, medians, xerr=errors, color=[COLOURS[i] for i, _ in shown], alpha=0.85, height=0.6, capsize=3)
    right = max([m + e for m, e in zip(medians, errors[1], strict=True)] + list(paper.values()))
    for k, (_, row) in enumerate(shown):
        axes.annotate(
            f"{medians[k]:.2f}",
            (max(row["cost_x_sgd"]["p80"], row["paper_cost_x_sgd"] or 0), k),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
        )
    quoted = [(row["paper_cost_x_sgd"], k) for k, (_, row) in enumerate(shown) if row["paper_cost_x_sgd"] is not None]
    if quoted:
        axes.scatter(
            *zip(*quoted, strict=True),
            marker="D",
            s=45,
            color="white",
            edgecolor="black",
            zorder=3,
            label="the paper's Table 6 (RTX Titan)",
        )
        axes.legend(loc="lower right")
    axes.set_xlim(0, 1.15 * right)
    axes.invert_yaxis()
    axes.set_xlabel("time per step, x SGD")
    axes.set_title("Cost of a step")
    axes.grid(axis="x", alpha=0.3)


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy and loss against epochs and seconds, and the cost of a step."""
    rows = list(results["optimizers"].values())
    settings, host = results["arguments"], results["machine"]
    figure, grid = plt.subplot_mosaic(
        [["accuracy epochs", "accuracy seconds", "cost"], ["loss epochs", "loss seconds", "cost"]],
        figsize=(16, 8.5),
        width_ratios=[1, 1, 0.9],
        layout="constrained",
    )
    compiling = "".join(
        f", without {row['compile_seconds']:.0f} s of compiling {row['label'].removeprefix('AdaHessian, ')}"
        for row in rows
        if row["compile_seconds"]
    )
    horizontal = {
        "epochs": (lambda row: range(1, len(row["curves"]["seconds"]) + 1), "epoch"),
        "seconds": (lambda row: row["curves"]["seconds"], f"seconds of training{compiling}"),
    }
    for kind, (x_of, x_label) in horizontal.items():
        accuracy, loss = grid[f"accuracy {kind}"], grid[f"loss {kind}"]
        plot_curves(accuracy, rows, x_of, "test_accuracy")
        plot_curves(loss, rows, x_of, "train_loss")
        accuracy.set(
            ylabel="test accuracy, %", title=f"Test accuracy against {kind}", ylim=(accuracy_floor(rows), 100.3)
        )
        loss.set(ylabel="training loss (mean of the epoch)", title=f"Training loss against {kind}", yscale="log")
        for axes in (accuracy, loss):
            axes.set_xlabel(x_label)
    plot_costs(grid["cost"], rows, {row["label"]: row["paper_cost_x_sgd"] or 0 for row in rows})
    handles, labels = grid["loss epochs"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    figure.suptitle(f"{heading(settings)}, {where(host)}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
