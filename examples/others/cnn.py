"""Classify digits by a small convolutional network with max pooling and dropout."""

from collections.abc import Iterator

from script import Script
from sources import digits, some
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Adadelta


def network() -> nn.Module:
    """Two convolutions, two layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), nn.Linear(32 * 6 * 6, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10)),
    )


def train(script: Script) -> Iterator[float]:
    """Yield the cross entropy of each step."""
    images, labels = digits(16)
    model = network()
    opt = script.optimizer(model, lambda params: Adadelta(params, lr=1.0))
    for x, y in some((images - images.mean()) / images.std(), labels, n=64):
        yield script.descend(opt, cross_entropy(model(x), y))
