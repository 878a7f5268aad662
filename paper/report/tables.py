"""Tables shaped like the paper's, each with the paper's own figures where it has them."""

from __future__ import annotations

from collections.abc import Sequence

from bench.table import markdown

from ..optimizers import OURS
from ..plan import IN_TIME
from ..run import Setup
from . import judged
from .outcome import Outcome

# The paper's figures (tables 2, 4, 5 and 6), which were measured on other, larger problems.
PAPER = {
    "nmt": ("IWSLT14", {"SGD": "28.57 ± .15", "AdamW": "35.66 ± .11", OURS: "35.79 ± .06"}),
    "lm": ("PTB", {"SGD": "59.9 ± 3.0", "AdamW": "54.2 ± 1.6", OURS: "51.5 ± 1.2"}),
}
PAPER_SCALING = {
    "AdamW": {"0.5": "35.42", "1": "35.66", "2": "35.37", "4": "34.79", "10": "diverges"},
    OURS: {"0.5": "35.33", "1": "35.79", "2": "35.21", "4": "34.19", "10": "32.48"},
}
PAPER_FREQUENCY = {"1": "92.13 ± .08", "2": "92.40 ± .04", "5": "92.16 ± .12"}
PAPER_BLOCKS = {"1": "35.67", "4": "35.78", "32": "35.79", "128": "35.67"}


def optimizers(outcomes: Sequence[Outcome]) -> str:
    """Tables 1 to 3: rows of optimizers, a column for each task, and the paper's column behind it."""
    columns = {}
    for o in outcomes:
        cells = {name: o.cell(runs) for (name, _), runs in o.tables["optimizers"].items() if IN_TIME not in name}
        columns[f"{o.task.title}, {o.task.metric}"] = cells
        if o.stem in PAPER:
            data, figures = PAPER[o.stem]
            columns[f"the paper, {data}"] = figures
    names = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    return markdown(["", *columns], [[name, *(cells.get(name, "") for cells in columns.values())] for name in names])


def scaling(o: Outcome) -> str:
    """Table 4."""
    return _grid(o, "lr_scaling", "learning rate x", PAPER_SCALING if o.stem == "nmt" else {})


def blocks(o: Outcome) -> str:
    """Table 5, with the rate of each block size."""
    found = _grid(o, "block_size", "block size", {OURS: PAPER_BLOCKS} if o.stem == "nmt" else {})
    rates = {b: runs[0].lr for (row, b), runs in o.tables["block_size"].items() if row == OURS}
    columns = sorted({column for _, column in o.tables["block_size"]}, key=float)
    row = [f"{OURS}, its learning rate", *(f"{rates[b]:g}" if b in rates else "-" for b in columns)]
    return f"{found}\n| {' | '.join(row)} |"


def frontier(o: Outcome) -> str:
    """Table 6 and beyond: scores and costs of curvature on every f-th step from a fraction r of the batch."""
    cells = o.tables["frontier"]
    columns, rows = dict.fromkeys(column for _, column in cells), []
    for r in dict.fromkeys(row for row, _ in cells):
        rows.append([f"r = {r}: {o.task.metric}", *(o.cell(cells[r, f]) for f in columns)])
        gains = [judged.beside_adamw(o, cells[r, f]) for f in columns]
        rows.append(["against AdamW", *("-" if d is None else f"{d.verdict}, {d.mean:+.2f}" for d in gains)])
        rows.append(["time / AdamW's", *(ratio(o.cost(cells[r, f])) for f in columns)])
    if o.stem == "resnet20":
        rows.append(["r = 1, the paper, CIFAR-10", *(PAPER_FREQUENCY.get(f, "") for f in columns)])
    return markdown([f"{o.task.title}; f =", *columns], rows)


def _grid(o: Outcome, name: str, corner: str, paper: dict[str, dict[str, str]]) -> str:
    """Any table as it is, with the paper's row behind each."""
    cells = o.tables[name]
    columns, rows = sorted({column for _, column in cells}, key=float), []
    for row in dict.fromkeys(row for row, _ in cells):
        rows.append([row, *(o.cell(cells.get((row, column), ())) for column in columns)])
        if row in paper:
            rows.append([f"{row}, the paper", *(paper[row].get(column, "") for column in columns)])
    return markdown([corner, *columns], rows)


def trials(outcomes: Sequence[Outcome]) -> str:
    """Learning rates that were tried, with their validation scores; the chosen one in bold."""
    rows = []
    for o in outcomes:
        for table, lrs in o.lrs.items():
            for name, runs in o.results.trials(o.planner, table).items():
                cells = []
                for run in sorted(runs, key=lambda run: run.lr):
                    for score in o.results.scores([run], "validation"):
                        text = f"{run.lr:g}: " + (
                            "diverged" if score is None else f"{score:.2f}" if score < 1e5 else f"{score:.0e}"
                        )
                        cells.append(f"**{text}**" if lrs.get(name) == run.lr else text)
                row = [f"{o.task.title}: {name}", ", ".join(cells)]
                rows += [row] if cells and row not in rows else []
    return markdown(["", "learning rate: score"], rows, texts=2)


def ratio(value: float | None) -> str:
    """To two places."""
    return "-" if value is None else f"{value:.2f}"


def options(setup: Setup, lr: float) -> str:
    """Return a setting as the arguments of AdaHessian."""
    return ", ".join(f"{name}={value!r}" for name, value in {"lr": lr, **setup.options}.items())
