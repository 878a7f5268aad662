"""Learning rate schedules: share of the run, strictly between 0 and 1, to a factor."""

from __future__ import annotations

import math


def steps(done: float) -> float:
    """Return a tenth after half of the run, a hundredth after three quarters: the paper's for ResNets."""
    return 0.1 ** ((done >= 0.5) + (done >= 0.75))


def inverse_sqrt(done: float, warmup: float = 0.15) -> float:
    """Linear warm-up, then one over the square root of the step: the paper's for translation."""
    return done / warmup if done < warmup else math.sqrt(warmup / done)


def cosine(done: float, warmup: float = 0.1) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def linear(done: float, warmup: float = 0.1) -> float:
    """Linear warm-up, then linear to zero: what fine-tuning uses."""
    return done / warmup if done < warmup else (1 - done) / (1 - warmup)


def constant(done: float, warmup: float = 0.1) -> float:
    """Linear warm-up, then no change."""
    return min(done / warmup, 1.0)
