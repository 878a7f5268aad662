"""What a step costs beside SGD's and AdamW's: the paper's Table 6, for every way to get curvature.

A row is timed only after its gradient and curvature were found equal to float64's. Steps of all rows take turns, each
right after a step of SGD's; a row's cost is the median of these ratios. The average cost at Hutchinson frequency f is
(cost with curvature + (f - 1) cost without) / f, both measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.memory import meter

from ..display import progress
from ..machine import machine
from ..measure import in_turns, wall_clock
from .check import MOST, errors
from .plot import draw
from .problems import HALF, LONG, NAMES, Problem, describe, problem
from .table import FREQUENCIES, show
from .ways import ADAMW, SGD, WAYS, Way

Step = Callable[[], Any]


def start(problem: Problem, way: Way, device: str) -> tuple[dict[str, Any], Step | None]:
    """Make a row, check its first step and time how long that takes; no step if the row is not to be timed."""
    row: dict[str, Any] = {"way": way.name, "floor": way.floor}
    missing = way.missing or (way.captured and device != "cuda" and "CUDA graphs need a CUDA device")
    if missing:
        return row | {"skipped": missing}, None
    model = problem.fresh()
    try:
        step, opt = way.make(problem, model)
        began = time.perf_counter()
        row["error_g"], row["error_d"] = errors(problem, way, model, step, opt)
        row["first_step"] = time.perf_counter() - began
    except Exception as error:  # whatever a peer or a compiler raises belongs into the table
        return row | {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}, None
    most_in_g, most_in_d = MOST[problem.precision]
    if row["error_g"] > most_in_g or (row["error_d"] or 0.0) > most_in_d:
        return row | {"wrong": True}, None
    if way.alternates:
        step()  # the first one without curvature
    return row, step


def ratios(steps: dict[str, Step], alternating: set[str], device: str, rounds: int) -> dict[str, list[list[float]]]:
    """Return the times over SGD's, with curvature and (for rows that alternate) without."""

    def after_sgd(step: Step) -> tuple[float, float]:
        return wall_clock(steps[SGD], device), wall_clock(step, device)

    kinds = {(name, kind): step for name, step in steps.items() for kind in range(1 + (name in alternating))}
    pairs = in_turns(kinds, rounds, after_sgd)
    found = {name: [[b / a for a, b in pairs.get((name, kind), [])] for kind in range(2)] for name in steps}
    found[SGD] = [[1.0], []]
    found[""] = [[a for each in pairs.values() for a, _ in each], []]
    return found


def peak_memory(name: str, way: str, device: str, batch: int | None) -> int | None:
    """Bytes that two steps take on top of the model, in a process of their own; None if they fail."""
    command = [sys.executable, "-m", __package__, "--memory", way, "--models", name, "--device", device]
    command += ["--batch", str(batch)] if batch else []
    same_packages = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=same_packages, capture_output=True, text=True)
    return int(result.stdout.split()[-1]) if result.returncode == 0 else None


def measure_memory(problem: Problem, way: Way, device: str) -> int:
    """Return what :func:`peak_memory` prints."""
    step, _ = way.make(problem, problem.fresh())
    gc.collect()
    peak = meter(torch.device(device))
    step(), step()
    return round(peak.megabytes() * 1e6)


def run_model(problem: Problem, ways: Iterable[Way], args: argparse.Namespace) -> dict[str, Any]:
    """All rows of one model."""
    rows, steps = {}, {}
    for way in progress(list(ways), f"{problem.name} "):
        rows[way.name], step = start(problem, way, args.device)
        if step is not None:
            steps[way.name] = step
    alternating = {way.name for way in ways if way.alternates}
    found = ratios(steps, alternating, args.device, args.rounds)
    base = found.pop("")[0]
    adamw = float(np.median(found[ADAMW][0]))
    for name, (with_curvature, without) in found.items():
        quartiles = np.percentile(with_curvature, (50, 25, 75)).tolist()
        row = rows[name] | {"cost": quartiles[0], "quartiles": quartiles[1:], "cost_adamw": quartiles[0] / adamw}
        if without:
            off = float(np.median(without))
            row |= {"off_step": off, "by_frequency": {f: (quartiles[0] + (f - 1) * off) / f for f in FREQUENCIES}}
        if not args.no_memory:
            row["peak_memory"] = peak_memory(problem.name, name, args.device, args.batch)
        rows[name] = row
    return {**describe(problem), "sgd_seconds": float(np.median(base)), "rows": list(rows.values())}


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--models", nargs="+", default=NAMES, choices=(*NAMES, *LONG, *HALF))
    parser.add_argument(
        "--ways", nargs="+", metavar="TEXT", help="only rows whose names contain one of these, and SGD's"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, help="examples; by default 128 images, 8 texts, 256 vectors")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="nothing that compiles, few rounds")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--out", type=Path, default=Path("bench/results/overhead"))
    parser.add_argument("--memory", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*create_graph=True.*")
    if args.memory:
        way = next(way for way in WAYS if way.name == args.memory)
        print(measure_memory(problem(args.models[0], device=args.device, batch=args.batch), way, args.device))
        return 0
    if args.quick:
        args.rounds = min(args.rounds, 5)
    ways = [way for way in WAYS if not (args.quick and way.compiled)]
    if args.ways:
        ways = [way for way in WAYS if way.name in (SGD, ADAMW) or any(text in way.name for text in args.ways)]
    data: dict[str, Any] = {"machine": machine(args.device), "rounds": args.rounds, "models": []}
    stem = args.out / f"overhead-{args.device}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        data["models"].append(run_model(problem(name, device=args.device, batch=args.batch), ways, args))
        show(data["models"][-1])
        stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")  # what there is: models take minutes
        draw(data, stem.with_suffix(".svg"))
    print(f"wrote {stem}.json and {stem}.svg")
    wrong = [row for model in data["models"] for row in model["rows"] if row.get("wrong")]
    unexpected = [row for row in wrong if "finite" not in row["way"]]
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
