"""What one training run is, and the key under which its record is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setup:
    """An optimizer without its learning rate; ``options`` are arguments of AdaHessian beside the task's."""

    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Unique name."""
        return " ".join([self.optimizer, *(f"{name}={value}" for name, value in sorted(self.options.items()))])

    def hessian_steps(self, steps: int) -> int:
        """How many of that many steps, from the first on, have curvature."""
        if "update_each" not in self.options:
            return 0
        dense = self.options.get("dense_steps", self.options["warmup"])
        return sum(step < dense or step % self.options["update_each"] == 0 for step in range(steps))

    def cost(self, steps: int) -> float:
        """First-order steps that they take, by their matrix products."""
        return steps + 2 * self.options.get("hessian_fraction", 1.0) * self.hessian_steps(steps)


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
