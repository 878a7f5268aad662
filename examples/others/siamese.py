"""Learn a distance under which equal digits are near: one network for three images, and a margin."""

from collections.abc import Iterator

import torch
from script import Script
from sources import digits
from torch import nn
from torch.nn.functional import triplet_margin_loss
from torch.optim import Adadelta


def train(script: Script) -> Iterator[float]:
    """Yield the margin loss of each step."""
    images, labels = digits(16)
    classes = [images[labels == digit] for digit in range(10)]
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 64), nn.ReLU(), nn.Linear(64, 16)),
    )
    opt = script.optimizer(model, lambda params: Adadelta(params, lr=1.0))

    def draw(digit: int) -> torch.Tensor:
        return classes[digit][torch.randint(len(classes[digit]), ())]

    while True:
        kinds = torch.randint(10, (32,)).tolist()
        others = [(kind + int(torch.randint(1, 10, ()))) % 10 for kind in kinds]
        anchor, like, unlike = (model(torch.stack(list(map(draw, k)))) for k in (kinds, kinds, others))
        yield script.descend(opt, triplet_margin_loss(anchor, like, unlike, margin=1.0))
