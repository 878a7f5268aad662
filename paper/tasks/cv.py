"""Image classification: CIFAR ResNets on scikit-learn's digits, or on CIFAR-10 with the published settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.data import Dataset, load_cifar10, load_digits
from examples.resnet import MODELS

from .. import schedules
from ..task import Batch, Task

VALIDATION_SHARE = 0.2


def split(dataset: Dataset) -> tuple[Dataset, Tensor, Tensor]:
    """Training images with a fifth of them, the same in every run, put aside: what is left, and the part's x and y."""
    order = torch.randperm(len(dataset.train_y), generator=torch.Generator().manual_seed(0))
    held = order[: int(VALIDATION_SHARE * len(order))]
    kept = order[len(held) :]
    rest = replace(dataset, train_x=dataset.train_x[kept], train_y=dataset.train_y[kept])
    return rest, dataset.train_x[held], dataset.train_y[held]


class Images(Task):
    """A ResNet; learning rates are tuned on ResNet-20."""

    metric = "accuracy, %"
    betas = (0.9, 0.999)
    weight_decay = 5e-4
    learning_rates: ClassVar = {
        "SGD": (0.01, 0.03, 0.1, 0.3),
        "AdamW": (0.001, 0.003, 0.01, 0.03),
        "AdaHessian": (0.015, 0.05, 0.15, 0.5),
    }

    def __init__(self, name: str, data: str = "digits", root: Path | None = None) -> None:
        self.name, self.title = name, {"resnet20": "ResNet-20", "resnet32": "ResNet-32"}[name]
        dataset, self.x, self.y = split(load_digits() if data == "digits" else load_cifar10(root))
        self.dataset = dataset
        self.batch_size = 64 if data == "digits" else 256
        self.steps = (9 if data == "digits" else 160) * dataset.batches_per_epoch(self.batch_size)
        self.data = (
            f"{data}, {len(dataset.train_y):,} training images of {dataset.image_shape[1]} x {dataset.image_shape[2]}"
        )
        if name == "resnet20":
            self.tables = ("optimizers", "frequency", "cheap")
        else:
            self.tables, self.tuned_on = ("optimizers", "frequency"), "resnet20"

    def model(self, variant: str = "") -> nn.Module:
        del variant
        return MODELS[self.name](self.dataset.image_shape[0], self.dataset.n_classes)

    def batches(self, seed: int) -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from self.dataset.batches(self.batch_size, seed, epoch)
            epoch += 1

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)

    @torch.no_grad()
    def _logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([model(self.dataset.normalise(part).to(self.device)).cpu() for part in x.split(500)])

    def validation_loss(self, model: nn.Module) -> float:
        return F.cross_entropy(self._logits(model, self.x), self.y).item()

    def score(self, model: nn.Module, split: str) -> float:
        x, y = (self.x, self.y) if split == "validation" else (self.dataset.test_x, self.dataset.test_y)
        return 100 * (self._logits(model, x).argmax(1) == y).float().mean().item()

    def schedule(self, done: float) -> float:
        return schedules.steps(done)

    def decay(self, optimizer: str, lr: float) -> float:
        """Decoupled decay multiplies by lr, so the published settings divide by it."""
        return self.weight_decay if optimizer == "SGD" else self.weight_decay / lr
