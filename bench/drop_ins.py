"""The drop-ins beside their originals: ``python -m bench.drop_ins``, in a source tree.

How far they drift apart over 50 steps with the same probes, and how much sooner a step is done. The originals are the
installed packages, and for those that are none the published rules as tests/originals.py has them.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cases
from .contestants import PEERS, Contestant, stepping
from .display import table
from .machine import machine
from .measure import interleaved
from .overhead.problems import problem as whole_problem
from .problem import Problem

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
STEPS = 50
# Originals whose update can be had without their Hessian-vector product.
UPDATES = {"torch_optimizer": cases.TORCH_OPTIMIZER, "pytorch_optimizer": cases.PYTORCH_OPTIMIZER}
HEADER = ["drop-in", "options", "deviation fp64", "deviation fp32", "update", "whole step"]


def deviation(origin: Any, dtype: torch.dtype) -> float:
    """Largest difference of any weight over 50 steps, relative to the largest weight of its parameter."""
    from originals import conv_net

    model = conv_net().to(dtype)
    theirs_model = copy.deepcopy(model)
    ours, theirs, most = origin.ours(model), origin.theirs(theirs_model), 0.0
    for i in range(STEPS):
        expected = origin.train_theirs(theirs, theirs_model, range(i, i + 1))
        ours.zero_grad()
        _loss(model, i).backward(create_graph=True)
        ours.step()
        for p, weight in zip(model.parameters(), expected, strict=True):
            most = max(most, float((p.detach() - weight).abs().max() / weight.abs().max()))
    return most


def _loss(model: nn.Module, i: int) -> Tensor:
    from models import loss_of

    return loss_of(model, i)


def update_ratio(origin: Any, seconds: float) -> float | None:
    """Time of the original's update over the drop-in's, for the 65 parameters of ResNet-20."""
    if origin.module not in UPDATES or origin.options:
        return None
    case = next(case for case in cases.cases("cpu") if case.name == "ResNet-20")
    ours = stepping(Problem(case, "cpu"), origin.drop_in)
    found = interleaved(
        {"ours": [ours], "theirs": [PEERS[UPDATES[origin.module]](Problem(case, "cpu"))]}, device="cpu", seconds=seconds
    )
    return found["theirs"].median / found["ours"].median


def step_ratio(origin: Any, seconds: float) -> float:
    """Time of the original's whole step over the drop-in's: ResNet-20, 8 images, the same script for both."""
    resnet = whole_problem("ResNet-20", batch=8)

    def script(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Contestant:
        model = resnet.fresh()
        opt = make(model)

        def step() -> None:
            opt.zero_grad()
            F.cross_entropy(model(resnet.batch[0]), resnet.batch[1]).backward(create_graph=True)
            opt.step()
            opt.zero_grad()

        return Contestant(step)

    found = interleaved(
        {"ours": [script(origin.ours)], "theirs": [script(origin.theirs)]}, device="cpu", seconds=seconds
    )
    return found["theirs"].median / found["ours"].median


def measure(name: str, seconds: float) -> dict[str, Any]:
    """One row."""
    from originals import ORIGINS

    origin = ORIGINS[name]
    return {
        "name": name,
        "options": {**origin.options, **origin.ours_only},
        "deviation": {str(dtype)[6:]: deviation(origin, dtype) for dtype in (torch.float64, torch.float32)},
        "update": update_ratio(origin, seconds),
        "step": step_ratio(origin, seconds),
    }


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
    drift = [f"{row['deviation'][dtype]:.1e}" for dtype in ("float64", "float32")]
    ratios = ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("update", "step")]
    return [row["name"], options or "defaults", *drift, *ratios]


def main() -> int:
    """Entry point; returns the exit code."""
    from originals import ORIGINS

    parser = argparse.ArgumentParser(prog="python -m bench.drop_ins", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ORIGINS, default=list(ORIGINS))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each ratio")
    parser.add_argument("--out", type=Path, default=Path("bench/results/drop_ins"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*create_graph=True.*")
    data: dict[str, Any] = {"machine": machine("cpu"), "steps": STEPS, "rows": []}
    for number, name in enumerate(args.only, 1):
        print(f"[{number}/{len(args.only)}] {name}", file=sys.stderr, flush=True)
        data["rows"].append(measure(name, args.seconds))
    table("Drop-ins: time of the original over ours", HEADER, [cells(row) for row in data["rows"]], texts=2)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"cpu-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
