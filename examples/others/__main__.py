"""Train twelve scripts of usual kinds with the optimizer they usually have, and with AdaHessian in its place.

    python examples/others                           # all of them, three seeds: a few minutes
    python examples/others cnn vae --seeds 1 --lr 0.1 --option shrink=2

Nothing but the optimizer changes, and AdaHessian has the same settings in all of them. Results go to --out, which is
continued where it stopped, and to a table: loss at the start and at the end, and what a step costs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from script import Script

TASKS = ("cnn", "vae", "gan", "lstm", "gru", "transformer", "graph", "superres", "siamese", "actor_critic", "sine",
         "regression")  # fmt: skip
COLUMNS = ("own", "f = 1", "f = 10")
Record = dict[str, Any]


def run(task: str, script: Script, *, seed: int, steps: int) -> Record:
    """One run: first loss, mean loss of the last tenth (None: not finite), seconds a step in the second half."""
    torch.manual_seed(seed)
    losses, times = [], [time.process_time()]
    for loss in importlib.import_module(task).train(script):
        losses.append(loss)
        times.append(time.process_time())
        if len(losses) == steps or not math.isfinite(loss):
            break
    half = len(times) // 2
    seconds = (times[-1] - times[half]) / (len(times) - 1 - half)
    tail = losses[-max(1, steps // 10) :]
    return {"first": losses[0], "last": sum(tail) / len(tail) if math.isfinite(loss) else None, "seconds": seconds}


def option(text: str) -> tuple[str, Any]:
    """Return an argument of AdaHessian from ``name=value``."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def scripts(options: dict[str, Any]) -> dict[str, Script]:
    """How the scripts are trained, by column."""
    return dict(zip(COLUMNS, (Script(), Script(options), Script({**options, "update_each": 10})), strict=True))


def mean(values: list[Any]) -> float:
    """NaN where a run has come to nothing."""
    return math.nan if None in values else sum(values) / len(values)


def rows(records: dict[str, Record], tasks: list[str], seeds: int) -> list[list[str]]:
    """Return the table's cells: the task, losses from start to end by optimizer, costs beside the script's own."""
    table = []
    for task in tasks:
        by_column = [[records[f"{task}, {column}, seed {s}"] for s in range(seeds)] for column in COLUMNS]
        first, *lasts = mean([r["first"] for r in by_column[0]]), *(mean([r["last"] for r in rs]) for rs in by_column)
        own, *ours = (min(r["seconds"] for r in rs) for rs in by_column)
        costs = [f"{seconds / own:.1f}" for seconds in ours]
        table.append([task, f"{first:.3g} → {lasts[0]:.3g}", *(f"{last:.3g}" for last in lasts[1:]), *costs])
    return table


def main(arguments: list[str] | None = None) -> dict[str, Record]:
    """Train what the arguments ask for; the records by task, column and seed."""
    parser = argparse.ArgumentParser(prog="examples/others", description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", metavar="task", help=f"of {', '.join(TASKS)}; all of them")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.15, help="of AdaHessian, in all tasks")
    parser.add_argument("--option", type=option, action="append", default=[], metavar="name=value",
                        help="another argument of AdaHessian; may be repeated")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("others.json"))
    args = parser.parse_args(arguments)
    if unknown := set(args.tasks) - set(TASKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(TASKS)}")
    tasks, options = args.tasks or list(TASKS), {"lr": args.lr, **dict(args.option)}
    settings = {"steps": args.steps, "options": {name: repr(value) for name, value in options.items()}}
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    records = kept.get("records", {}) if kept.get("settings") == settings else {}
    torch.set_num_threads(1)  # of small operators, which other threads only disturb
    console = Console()
    wanted = [(t, c, s) for t in tasks for s in range(args.seeds) for c in COLUMNS]
    for task, column, seed in track(wanted, "training", console=console, transient=True):
        key = f"{task}, {column}, seed {seed}"
        if key not in records:
            records[key] = run(task, scripts(options)[column], seed=seed, steps=args.steps)
            partial = args.out.with_suffix(".partial")
            partial.write_text(json.dumps({"settings": settings, "records": records}, indent=1) + "\n")
            os.replace(partial, args.out)
    table = Table("task", "its own optimizer", "AdaHessian", "f = 10", "cost", "f = 10", box=None)
    for row in rows(records, tasks, args.seeds):
        table.add_row(*row)
    console.print(table)
    return records


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
