"""Means, deviations and what three seeds can tell apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import ttest_1samp

Scores = Sequence[float | None]


def cell(scores: Scores, expected: int, digits: int = 2) -> str:
    """Mean and standard deviation over the seeds; how many diverged, or are not there yet."""
    finite = [x for x in scores if x is not None]
    notes = []
    if len(scores) < expected:
        notes.append(f"{len(scores)} of {expected} seeds")
    if len(finite) < len(scores):
        notes.append(f"{len(scores) - len(finite)} of {len(scores)} diverged")
    if not scores:
        return "-"
    if not finite:
        return "diverged"
    deviation = f" ± {statistics.stdev(finite):.{digits}f}" if len(finite) > 1 else ""
    return f"{statistics.mean(finite):.{digits}f}{deviation}" + (f" ({', '.join(notes)})" if notes else "")


@dataclass(frozen=True)
class Difference:
    """How much better the first scores are than the second, seed by seed.

    Attributes:
        mean: positive if the first are better.
        low, high: 95 % confidence interval of the mean, from Student's distribution.
        n: seeds.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """Either "better", "worse" or "even" (the interval contains zero)."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "even"

    def __str__(self) -> str:
        return f"{self.mean:+.2f} (95 % interval {self.low:+.2f} to {self.high:+.2f}, {self.n} seeds)"


def difference(first: Scores, second: Scores, *, higher_is_better: bool) -> Difference | None:
    """The paired difference; None if fewer than two seeds have both scores."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return None
    sign = 1 if higher_is_better else -1
    gains = [sign * (a - b) for a, b in pairs]
    mean = statistics.mean(gains)
    if statistics.stdev(gains) == 0:
        return Difference(mean, mean, mean, len(pairs))
    interval = ttest_1samp(gains, 0).confidence_interval(0.95)
    return Difference(mean, float(interval.low), float(interval.high), len(pairs))


def mean(scores: Scores) -> float:
    """Of the finite ones; not a number if there are none."""
    finite = [x for x in scores if x is not None]
    return statistics.mean(finite) if finite else math.nan
