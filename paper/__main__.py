"""The paper's experiments in small: trains what has no result yet, then writes the report.

python -m paper                                     # all experiments on data that need no download
python -m paper cv --data cifar10 --root DIR        # one of them on the paper's data, with its settings
python -m paper --report-only                       # from the results there are
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.machine import machine
from examples.data import DataError

from .plan import FULL, QUICK, Extent
from .pool import Pool, carry_out
from .report import write
from .results import OtherSettingsError, Results
from .tasks import BUILT_IN, EXPERIMENTS, MAKERS, Spec, make

ROOT = Path(__file__).resolve().parent.parent


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m paper", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("experiments", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    data = sorted({name for _, names in MAKERS.values() for name in names})
    parser.add_argument("--data", choices=data, help="for one experiment: other data than its own, with full settings")
    parser.add_argument("--root", type=Path, help="folder with the files of --data")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps: shows that everything runs")
    parser.add_argument("--recalibrate", action="store_true", help="measure the step times again")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, help="folder of the results; default: paper/results, quick: build/paper")
    parser.add_argument("--pages", type=Path, help="folder of the report; default: docs, quick: build/paper")
    args = parser.parse_args(argv)
    unknown = set(args.experiments) - set(EXPERIMENTS)
    if unknown:
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    args.experiments = args.experiments or list(EXPERIMENTS)
    args.out = args.out or ROOT / ("build/paper" if args.quick else "paper/results")
    args.pages = args.pages or (ROOT / "build/paper" if args.quick else ROOT / "docs")
    return args


def specs(args: argparse.Namespace) -> list[Spec]:
    """The tasks that are asked for.

    Raises:
        DataError: the experiment does not know the data.
    """
    wanted = BUILT_IN if args.data is None else (args.data,)
    found = []
    for experiment in args.experiments:
        chosen = [(name, data) for name in EXPERIMENTS[experiment] for data in MAKERS[name][1] if data in wanted]
        if not chosen:
            raise DataError(f"--data {args.data} is not for {experiment}; name the experiment it is for")
        found += [Spec(name, data, args.root, args.device, args.out) for name, data in chosen]
    return found


def train(args: argparse.Namespace, extent: Extent, console: Console) -> None:
    """All runs that have no result yet."""
    parts = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*parts, console=console) as bars, Pool(args.workers) as pool:
        for spec in specs(args):
            task = make(spec)
            task.prepare()
            bar = bars.add_task(spec.stem, total=0)
            results = Results(args.out / f"{spec.stem}.json", task.describe())
            results.machine = results.machine or machine(args.device)
            lender = task.tuned_on and Results(args.out / f"{replace(spec, name=task.tuned_on).stem}.json")

            pool.on_total = lambda n, bar=bar: bars.update(bar, total=bars.tasks[bar].total + n)
            pool.on_done = lambda bar=bar: bars.advance(bar)
            carry_out(pool, spec, results, lender or None, extent, 3 if args.quick else 15, args.recalibrate)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 cannot go on, 130 interrupted."""
    args = parse(argv)
    extent = QUICK if args.quick else FULL
    console = Console(stderr=True)
    torch.set_num_threads(1)
    try:
        if not args.report_only:
            train(args, extent, console)
        for path in write(args.out, args.pages, extent):
            print(f"wrote {path}")
    except (DataError, OtherSettingsError) as error:
        print(f"python -m paper: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what was done is kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
