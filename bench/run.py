"""Time the update of every case beside its floor and its peers.

A case is timed only after its result was found equal to the float64 reference.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adahessian_fused import available_backends

from . import display, machine
from .cases import REFERENCE, SUITES, Case, cases
from .check import Expected, first_step
from .compiled import SkippedError
from .contestants import PEERS, Contestant, ours
from .measure import Timing, interleaved
from .problem import Problem

MOST_ROTATIONS = 32


def rotations(case: Case, device: str) -> int:
    """How many sets of tensors it takes that the first one has left the cache before its turn comes again."""
    return 1 if case.cached else min(math.ceil(2 * machine.last_level_cache(device) / case.footprint), MOST_ROTATIONS)


def run_case(case: Case, device: str, backends: Sequence[str], seconds: float) -> dict[str, Any]:
    """Check and time one case."""
    facts = {
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "state_dtype": str(case.state_dtype or "default").removeprefix("torch."),
        "block": case.block,
        "curvature": case.curvature,
        "numel": case.numel,
        "tensors": len(case.shapes),
        "groups": case.groups,
        "cached": case.cached,
        "bytes": case.bytes,
        "adamw_bytes": case.adamw_bytes,
        "backends": list(backends),
        "error_over_tolerance": {},
        "missing_peers": {},
        "seconds": {},
    }
    names, count = [*backends, "floor", *case.peers], rotations(case, device)
    needed, there = case.memory(len(names), count), machine.available_memory(device)
    if needed > 0.8 * there:
        return facts | {"skipped": f"needs {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} are available"}
    try:
        timings = check_and_time(facts, names, [Problem(case, device, seed) for seed in range(count)], seconds)
    except RuntimeError as error:  # out of memory, a launch that failed: the other cases still count
        return facts | {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}", "failed": True}
    return facts | {"seconds": {name: asdict(timing) for name, timing in timings.items()}}


def check_and_time(
    facts: dict[str, Any], names: Sequence[str], problems: Sequence[Problem], seconds: float
) -> dict[str, Timing]:
    """Return the times of the contestants whose first step is right; errors and absences go into ``facts``."""
    expected, contestants = Expected(problems[0]), {}
    for name in names:
        try:
            instances, error = enter(name, problems, expected)
        except (ImportError, SkippedError) as reason:  # a peer that is not installed has no column
            facts["missing_peers"][name] = str(reason)
            continue
        if instances[0].params is not None:
            facts["error_over_tolerance"][name] = error
        if error <= 1:
            contestants[name] = instances
    return interleaved(contestants, device=problems[0].device, seconds=seconds)


def enter(name: str, problems: Sequence[Problem], expected: Expected) -> tuple[list[Contestant], float]:
    """Return a contestant on each set of tensors after a first step, and how wrong that was on the first set."""
    make = PEERS.get(name, lambda problem: ours(problem, name))
    # The plain reference takes so long that the cache does not matter, and nobody wants to wait for it.
    instances = [make(problem) for problem in (problems[:1] if name == REFERENCE else problems)]
    error = first_step(instances[0], expected)
    for other in instances[1:]:
        other.prepare()
        other.step()
    return instances, error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m adahessian_fused bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    suite = parser.add_mutually_exclusive_group()
    suite.add_argument("--quick", action="store_const", const="quick", dest="suite", help="within a minute on 2 cores")
    suite.add_argument("--full", action="store_const", const="full", dest="suite", help="every case with every peer")
    suite.add_argument("--suite", choices=SUITES)
    parser.set_defaults(suite="default")
    parser.add_argument("--seconds", type=float, help="time to spend on a case (default: 3, with --quick 1)")
    parser.add_argument("--filter", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: native, on a GPU triton too")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the results")
    args = parser.parse_args(arguments)
    args.backends = args.backends or (["native", "triton"] if args.device == "cuda" else ["native"])
    args.seconds = args.seconds or (1.0 if args.suite == "quick" else 3.0)
    args.cases = [case for case in cases(args.device, args.suite) if args.filter in case.name]
    if not args.cases:
        parser.error(f'no case\'s name contains "{args.filter}"; --list prints them')
    able = available_backends(args.device)
    for name in args.backends if not args.list else ():
        reason = able.get(name, "there is no such backend")
        if reason is not None:
            parser.error(f"backend {name} cannot run on {args.device} here: {reason}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if any result was wrong or any case failed."""
    args = parse(arguments)
    if args.list:
        print("\n".join(case.name for case in args.cases))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    facts, results = machine.machine(args.device), []
    path = args.out / f"{args.device}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    for case in display.progress(args.cases):
        results.append(run_case(case, args.device, args.backends, args.seconds))
        # After every case: what was measured stays if a later one fails or time is up.
        path.write_text(json.dumps({"machine": facts, "suite": args.suite, "results": results}, indent=1) + "\n")
        gc.collect()  # optimizers are full of cycles
        if args.device == "cuda":
            torch.cuda.empty_cache()
    display.show(results)
    print(f"written to {path}")
    with contextlib.suppress(ImportError):
        from .plots import draw

        for plot in draw(json.loads(path.read_text()), path.with_suffix("")):
            print(f"written to {plot}")
    wrong = any(error > 1 for result in results for error in result["error_over_tolerance"].values())
    return int(wrong or any(result.get("failed", False) for result in results))


if __name__ == "__main__":
    sys.exit(main())
