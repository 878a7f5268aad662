"""Whether a benchmark became slower: compares two results files by ratios, since machines differ from day to day.

For every case and backend in both files: our time over the floor's, and over each peer's, all measured in the same run.
Exit code 1 if one of them grew by more than the threshold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Key = tuple[str, str, str]  # case, backend, what our time is divided by


@dataclass(frozen=True)
class Change:
    """One ratio in both files."""

    key: Key
    old: float
    new: float

    @property
    def growth(self) -> float:
        """New over old: above 1 is slower."""
        return self.new / self.old

    def __str__(self) -> str:
        case, backend, other = self.key
        return f"{case}, {backend}: time / {other} {self.old:.3f} -> {self.new:.3f} ({self.growth - 1:+.0%})"


def ratios(data: dict[str, Any]) -> Iterator[tuple[Key, float]]:
    """Our time over everybody else's, for each case and backend."""
    for result in data["results"]:
        timings = {name: timing["median"] for name, timing in result["seconds"].items()}
        for backend in timings.keys() & set(result["backends"]):
            for other in timings.keys() - set(result["backends"]):
                yield (result["case"], backend, other), timings[backend] / timings[other]


def missing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Cases whose result was right in the old file and is not in the new one, although the case ran."""
    wrong = {
        (result["case"], backend)
        for result in new["results"]
        for backend, error in result["error_over_tolerance"].items()
        if error > 1
    }
    known = {(case, backend) for (case, backend, _), _ in ratios(old)}
    return [f"{case}, {backend}: its result is wrong now" for case, backend in sorted(wrong & known)]


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Return the ratios that are in both files, the largest growth first."""
    before, after = dict(ratios(old)), dict(ratios(new))
    changes = [Change(key, before[key], after[key]) for key in before.keys() & after.keys()]
    return sorted(changes, key=lambda change: (-change.growth, change.key))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files; 0 if nothing became slower, 1 if something did, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.15, help="growth that counts (default: 0.15)")
    args = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (args.old, args.new))
    changes, wrong = compare(old, new), missing(old, new)
    if not changes and not wrong:
        print(f"{args.old} and {args.new} have no case in common", file=sys.stderr)
        return 2
    slower = [change for change in changes if change.growth > 1 + args.threshold]
    print(f"{len(changes)} ratios compared, {len(slower)} grew by more than {args.threshold:.0%}")
    for line in (*wrong, *slower):
        print(line)
    return int(bool(slower or wrong))


if __name__ == "__main__":
    sys.exit(main())
