"""The four ops alone, beside a mere pass over the arrays of a step: ``python -m bench.ops``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.benchmark import Timer

from adahessian_fused import backends
from adahessian_fused.segments import Hyper, Segment, Steps, segment_table

from .display import table
from .table import seconds

FLOAT, HALF = torch.float32, torch.bfloat16
KINDS = (("float32", FLOAT, FLOAT), ("bfloat16", HALF, FLOAT), ("bf16 states", FLOAT, HALF), ("bf16 all", HALF, HALF))
HYPER = {Hyper.LR: 1e-3, Hyper.BETA1: 0.9, Hyper.BETA2: 0.999, Hyper.EPS: 1e-4, Hyper.HESSIAN_POWER: 1.0}
HYPER |= {Hyper.WEIGHT_DECAY: 0.01, Hyper.CLIP: torch.inf}


def calls(ops, n: int, block: int, dtype: torch.dtype, stored: torch.dtype) -> Iterator[tuple[str, int, Callable]]:
    """Name, bytes and a call of each op on one parameter of n elements; the first one only streams."""
    p, g, h, z = (torch.randn(n).to(dtype) for _ in range(4))
    m, v, diag = torch.zeros(n, dtype=stored), torch.ones(n, dtype=stored), torch.zeros(-(-n // block))
    row = dict.fromkeys(Segment, 0) | {Segment.NUMEL: n, Segment.BLOCK: block, Segment.PERIOD: 1, Segment.STRIDE: 1}
    tables = segment_table([tuple(row[column] for column in Segment)]), torch.ones(1, len(Steps), dtype=torch.int64)
    hyper = torch.tensor([[HYPER.get(column, 0.0) for column in Hyper]], dtype=torch.float64)
    probe, one, state = {"seed": 1, "sample": 0}, dtype.itemsize, stored.itemsize
    rest = {**probe, "is_hvp": True, "rounding_seed": 7, "grad_scale": None, "found_inf": None}
    rest |= {"means": None, "missed": torch.zeros(1, dtype=torch.int64)}
    step = partial(ops.adahessian_step, [p], [g])
    yield "streaming", n * 4 * (one + state), lambda: (p.add_(g), m.add_(h), v.add_(1.0))
    yield "adahessian_step", n * 4 * (one + state), lambda: step([h], None, m, v, None, *tables, hyper, **rest)
    diagonal = {**probe, "is_hvp": True, "scale": 1.0, "accumulate": False}
    yield "hessian_diag", n * one + 4 * len(diag), lambda: ops.hessian_diag([h], diag, *tables, **diagonal)
    if block == 1:
        yield "off-step", n * 3 * (one + state), lambda: step([], None, m, v, None, *tables, hyper, **rest)
        yield "rademacher", n * one, lambda: ops.rademacher(z, *tables, *probe.values())
        yield "perturb", n * 3 * one, lambda: ops.perturb([p], z, *tables, **probe, scale=1e-3, save=True)
        yield "put back", n * 2 * one, lambda: ops.perturb([p], z, *tables, **probe, scale=0.0, save=False)


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each dtype and block length."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 9, 32, 1024])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each op")
    parser.add_argument("--backend", default="native")
    args = parser.parse_args(arguments)
    for (kind, dtype, stored), block in ((k, b) for k in KINDS for b in args.blocks):
        body, rate = [], None
        for name, nbytes, call in calls(backends.get(args.backend), args.numel, block, dtype, stored):
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            time = timer.blocked_autorange(min_run_time=args.seconds).median
            rate = rate or nbytes / time
            body.append([name, seconds(time), f"{nbytes / time / 1e9:.1f}", f"{rate * time / nbytes:.2f}"])
        table(f"{kind}, b={block}", ["", "time", "GB/s", "per byte / streaming"], body)


if __name__ == "__main__":
    main()
