"""Tables shaped like the paper's, each with the paper's own figures where it has them."""

from __future__ import annotations

from collections.abc import Sequence

from bench.table import markdown

from ..optimizers import OURS
from ..plan import frequency, nominal_cost
from ..run import Setup
from .outcome import Outcome

# The paper's figures (tables 1, 2, 4, 5 and 6), which were measured on other, larger problems.
PAPER = {
    "nmt": {"SGD": "28.57 ± .15", "AdamW": "35.66 ± .11", OURS: "35.79 ± .06"},
    "lm": {"SGD": "59.9 ± 3.0", "AdamW": "54.2 ± 1.6", OURS: "51.5 ± 1.2"},
}
PAPER_ON = {"nmt": "IWSLT14", "lm": "PTB"}
PAPER_FREQUENCY = {
    "resnet20": ("92.13 ± .08", "92.40 ± .04", "92.06 ± .18", "92.17 ± .21", "92.16 ± .12"),
    "resnet32": ("93.08 ± .10", "92.91 ± .14", "92.95 ± .17", "92.93 ± .24", "93.00 ± .10"),
}
PAPER_COST = {"resnet20": (2.42, 1.71, 1.47, 1.36, 1.28), "resnet32": (3.23, 2.12, 1.74, 1.56, 1.45)}
SCALES = ("0.5", "1", "2", "3", "4", "5", "6", "10")
PAPER_SCALING = {
    "AdamW": dict(zip(SCALES, ("35.42", "35.66", "35.37", "35.18", "34.79", "14.41", "0.41", "diverges"), strict=True)),
    OURS: dict(zip(SCALES, ("35.33", "35.79", "35.21", "34.74", "34.19", "33.78", "32.70", "32.48"), strict=True)),
}
BLOCKS = ("1", "2", "4", "8", "16", "32", "64", "128")
PAPER_BLOCKS = dict(zip(BLOCKS, ("35.67", "35.66", "35.78", "35.77", "35.67", "35.79", "35.72", "35.67"), strict=True))


def optimizers(outcomes: Sequence[Outcome]) -> str:
    """Rows of optimizers, a column for each task, and the paper's column behind it."""
    names = list(dict.fromkeys(name for o in outcomes for name, _ in o.tables["optimizers"].cells))
    names.sort(key=lambda name: name == OURS)
    header, columns = [""], []
    for o in outcomes:
        cells = {name: o.cell(runs) for (name, _), runs in o.tables["optimizers"].cells.items()}
        header.append(f"{o.task.title}, {o.task.metric}")
        columns.append(cells)
        if o.stem in PAPER:
            header.append(f"the paper, {PAPER_ON[o.stem]}")
            columns.append(PAPER[o.stem])
    return markdown(header, [[name, *(column.get(name, "") for column in columns)] for name in names])


def frequencies(outcomes: Sequence[Outcome]) -> str:
    """Table 6."""
    columns = [column for _, column in outcomes[0].tables["frequency"].cells]
    fs = [int(column) for column in columns]
    rows = [
        ["cost in theory, the paper (x SGD)", *(f"{1 + 1 / f:.2f}" for f in fs)],
        ["cost by matrix products (x SGD)", *(f"{nominal_cost({'update_each': f}):.2f}" for f in fs)],
    ]
    for o in outcomes:
        title = o.task.title
        rows.append([f"**{title}**, {o.task.metric}", *(o.cell(runs) for runs in o.tables["frequency"].cells.values())])
        for name in ("SGD", "AdamW"):
            rows.append([f"{title}, measured cost (x {name})", *(_ratio(o, frequency(f), Setup(name)) for f in fs)])
        if o.stem in PAPER_FREQUENCY:
            rows.append([f"{title} on CIFAR-10, the paper", *(PAPER_FREQUENCY[o.stem][f - 1] for f in fs)])
            rows.append(["measured cost (x SGD), the paper", *(f"{PAPER_COST[o.stem][f - 1]:.2f}" for f in fs)])
    return markdown(["Hutchinson frequency", *columns], rows)


def _ratio(o: Outcome, setup: Setup, base: Setup) -> str:
    times = o.step_time(setup), o.step_time(base)
    return f"{times[0] / times[1]:.2f}" if all(times) else "-"


def scaling(o: Outcome) -> str:
    """Table 4."""
    cells = o.tables["lr_scaling"].cells
    columns = list(dict.fromkeys(column for _, column in cells))
    rows = []
    for name in ("AdamW", OURS):
        rows.append([name, *(o.cell(cells[name, column]) for column in columns)])
        if o.stem == "nmt":
            rows.append([f"{name}, the paper", *(PAPER_SCALING[name].get(column, "") for column in columns)])
    return markdown(["learning rate x", *columns], rows)


def blocks(o: Outcome) -> str:
    """Table 5."""
    cells = o.tables["block_size"].cells
    columns = [column for _, column in cells]
    rows = [[OURS, *(o.cell(runs) for runs in cells.values())]]
    if o.stem == "nmt":
        rows.append([f"{OURS}, the paper", *(PAPER_BLOCKS.get(column, "") for column in columns)])
    return markdown(["block size", *columns], rows)


def bags(o: Outcome) -> str:
    """Three ways to curvature through embedding bags."""
    rows = []
    for (label, _), runs in o.tables["bags"].cells.items():
        taken = o.step_time(runs[0].setup)
        rows.append([label, o.cell(runs), f"{1e3 * taken:.1f}" if taken else "-"])
    return markdown(["way", o.task.metric, "ms a step"], rows)


def trials(o: Outcome) -> str:
    """Learning rates that were tried, with their validation scores; the chosen one in bold."""
    rows = []
    for name, runs in o.trials.items():
        cells = []
        for run in sorted(runs, key=lambda run: run.lr):
            for score in o.scores((run,), "validation"):
                text = f"{run.lr:g}: " + ("diverged" if score is None else f"{score:.2f}")
                cells.append(f"**{text}**" if (o.lrs or {}).get(name) == run.lr else text)
        rows.append([f"{o.task.title}: {name}", ", ".join(cells)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
