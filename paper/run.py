"""What one training run is, and the key under which its record is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setup:
    """An optimizer without its learning rate, and the form of the model it trains.

    Attributes:
        optimizer: a name in :data:`paper.optimizers.MAKE`.
        options: arguments of AdaHessian that differ from the task's.
        variant: form of the model; "" is the task's own.
    """

    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""

    @property
    def key(self) -> str:
        """Unique name."""
        options = [f"{name}={value}" for name, value in sorted(self.options.items())]
        return " ".join([self.optimizer, *options, *([f"({self.variant})"] if self.variant else [])])


@dataclass(frozen=True)
class Run:
    """One training run; everything on which its outcome depends, given the task."""

    setup: Setup
    lr: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """Unique name within the task."""
        return f"{self.setup.key} lr={self.lr:g} steps={self.steps} seed={self.seed}"
