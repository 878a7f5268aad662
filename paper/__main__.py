"""The paper's experiments in small: trains what has no result yet, then writes the report.

python -m paper                                     # all experiments on data that need no download
python -m paper resnet20 --data cifar10 --root DIR        # one of them on the paper's data, with its settings
python -m paper --report-only                       # from the results there are
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.machine import machine
from examples.data import DataError

from .plan import FULL, QUICK, TABLES, Extent
from .pool import Pool
from .report import write
from .results import OtherSettingsError, Results
from .tasks import MAKERS, Spec, make

ROOT = Path(__file__).resolve().parent.parent


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(prog="python -m paper", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("experiments", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)}; default: all")
    data = sorted({name for _, names in MAKERS.values() for name in names[1:]})
    parser.add_argument("--data", choices=data, help="for one experiment: other data than its own, with full settings")
    parser.add_argument("--root", type=Path, help="folder with the files of --data")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps: shows that everything runs")
    parser.add_argument("--recalibrate", action="store_true", help="only measure the step times again")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, help="folder of the results; default: paper/results, quick: build/paper")
    parser.add_argument("--pages", type=Path, help="folder of the report; default: docs, quick: build/paper")
    args = parser.parse_args(argv)
    unknown = set(args.experiments) - set(MAKERS)
    if unknown:
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(MAKERS)}")
    args.experiments = args.experiments or list(MAKERS)
    args.out = args.out or ROOT / ("build/paper" if args.quick else "paper/results")
    args.pages = args.pages or (ROOT / "build/paper" if args.quick else ROOT / "docs")
    return args


def specs(args: argparse.Namespace) -> list[Spec]:
    """Return the tasks that are asked for.

    Raises:
        DataError: a task does not know the data.
    """
    found = []
    for name in args.experiments:
        data = args.data or MAKERS[name][1][0]
        if data not in MAKERS[name][1]:
            raise DataError(f"--data {data} is not for {name}; name the experiment it is for")
        found.append(Spec(name, data, args.root, args.device, args.out))
    return found


def train(args: argparse.Namespace, extent: Extent, console: Console) -> None:
    """All runs and step times that are missing: table by table, each for all tasks."""
    parts = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*parts, console=console) as bars, Pool(args.workers) as pool:
        chosen = []
        for spec in specs(args):
            task = make(spec)
            task.prepare()
            results = Results(args.out / f"{spec.stem}.json", task.describe())
            results.machine = machine(args.device)
            if args.recalibrate or not results.step_times:
                pool.calibrate(spec, results, extent, 3 if args.quick else 15)
            chosen.append((spec, task, results))
        for name, (spec, task, results) in itertools.product([] if args.recalibrate else TABLES, chosen):
            if name in task.tables:
                bar = bars.add_task(f"{spec.stem}: {name}", total=0)
                pool.on_total = lambda n, bar=bar: bars.update(bar, total=bars.tasks[bar].total + n)
                pool.on_done = lambda bar=bar: bars.advance(bar)
                pool.table(spec, results, extent, name)


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
