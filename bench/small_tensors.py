"""Where the time of a step over many small tensors goes, one thread, in microseconds of the processor a tensor.

``python -m bench.small_tensors`` takes a minute; steps of ours and of AdamW(fused=True) take turns, each after a
backward pass, and the ratio is the median of those of neighbours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from adahessian_fused import backends
from adahessian_fused.bucket import Bucket
from adahessian_fused.hessian_step import HessianStep
from adahessian_fused.layout import ParameterLayout

from . import cases, shapes
from .contestants import PEERS, ours
from .machine import machine
from .problem import Problem

MANY = {
    "2,000 x 1,024": cases.Case("many", ((1024,),) * 2000),
    "200 x 1,024": cases.Case("some", ((1024,),) * 200),
    "ResNet-20": cases.Case("ResNet-20", tuple(shapes.resnet20()), "auto"),
}
PARTS = {
    "kernel": (backends.get("native"), "step_at_addresses"),
    "parameters and gradients": (ParameterLayout, "with_gradients"),
    "addresses": (Bucket, "addresses"),
    "notes for the next step": (HessianStep, "close"),
}


def clock(step: Callable[[], Any]) -> float:
    """Seconds of the processor."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


@contextmanager
def counted(found: Counter[str]) -> Iterator[None]:
    """Add the time of each part to a counter."""

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.process_time()
            result = function(*arguments, **options)
            found[part] += time.process_time() - begin  # type: ignore[assignment]
            return result

        return call

    with ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield


def measure(case: cases.Case, rounds: int) -> dict[str, float]:
    """Microseconds a tensor, and how much longer AdamW takes."""
    problem = Problem(case, "cpu")
    us, theirs = ours(problem, "native"), PEERS[cases.ADAMW](problem)
    samples: dict[str, list[float]] = {}
    for number in range(3 * rounds + 3):
        found: Counter[str] = Counter()
        us.prepare()
        if number % 3:  # what is counted in parts is slower
            found["step"] = clock(us.step)  # type: ignore[assignment]
        else:
            with counted(found):
                whole = clock(us.step)
            found["Python around them"] = whole - sum(found.values())  # type: ignore[assignment]
        found["AdamW"] = clock(theirs.step)  # type: ignore[assignment]
        if "step" in found:
            found["AdamW / step"] = found["AdamW"] / found["step"]  # type: ignore[assignment]
        for part, seconds in found.items() if number >= 3 else ():
            samples.setdefault(part, []).append(seconds)
    scales = {part: 1 if "/" in part else 1e6 / len(case.shapes) for part in samples}
    return {part: round(scales[part] * median(values), 3) for part, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("bench/results/programs"), help="folder for the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine("cpu")}
    for name, case in MANY.items():
        found[name] = measure(case, args.rounds)
        print(name, found[name], flush=True)
    (args.out / "small_tensors.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
