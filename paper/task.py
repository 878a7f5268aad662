"""What an experiment trains and how it is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Batch = tuple[Tensor, ...]


class Task(ABC):
    """Data, model, loss, metric and the settings that all optimizers share.

    Attributes:
        name: of the results file.
        title: in the report.
        data: what it is trained on, in words.
        metric, unit, higher_is_better: of :meth:`score`.
        steps: length of a run.
        betas, weight_decay, block_size: as AdamW and AdaHessian get them.
        learning_rates: the grid of every setting of :data:`paper.optimizers.SETUPS` that is compared, equally long.
        tables: the comparisons of :class:`paper.plan.Planner` it takes part in.
    """

    name: str
    title: str
    data: str
    metric: str
    higher_is_better: bool = True
    steps: int
    batch_size: int
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 1e-4
    block_size: int | str = "auto"
    learning_rates: Mapping[str, Sequence[float]]
    tables: tuple[str, ...]
    device: str = "cpu"

    @property
    def tuning_steps(self) -> int:
        """As long as a run; less where a run takes minutes."""
        return self.steps

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a fresh model, from torch's global generator."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Mini-batches without end, a function of the seed; every tensor has the examples along its first axis."""

    @abstractmethod
    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Mean loss of a mini-batch."""

    @abstractmethod
    def validation_loss(self, model: nn.Module) -> float:
        """Mean loss over the validation data."""

    @abstractmethod
    def score(self, model: nn.Module, split: str) -> float:
        """Return the metric on "validation" or "test"."""

    @abstractmethod
    def schedule(self, done: float) -> float:
        """Factor of the learning rate at a share of the run, strictly between 0 and 1."""

    def prepare(self) -> None:  # noqa: B027 - most need nothing
        """Make what has to be there before the first run."""

    def decay(self, optimizer: str, lr: float) -> float:
        """Return the ``weight_decay`` an optimizer is given at a learning rate."""
        del optimizer, lr
        return self.weight_decay

    def describe(self) -> dict[str, Any]:
        """Everything the runs have in common; results are only kept together if it is the same."""
        return {
            "name": self.name,
            "title": self.title,
            "data": self.data,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "parameters": sum(p.numel() for p in self.model().parameters()),
            "steps": self.steps,
            "tuning_steps": self.tuning_steps,
            "batch_size": self.batch_size,
            "betas": list(self.betas),
            "weight_decay": self.weight_decay,
            "block_size": self.block_size,
            "learning_rates": {name: list(grid) for name, grid in self.learning_rates.items()},
            "tables": list(self.tables),
            "schedule": [round(self.schedule((i + 0.5) / 8), 4) for i in range(8)],
        }
