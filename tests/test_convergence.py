"""Cheap curvature trains as exact curvature does: three small tasks, frequencies and fractions of the batch."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from adahessian_fused import AdaHessian, curvature_friendly, recipes

STEPS, TAIL, BATCH = 100, 10, 32
CHEAPER = [
    {"update_each": f, "hessian_fraction": r} for f, r in ((1, 0.25), (5, 1.0), (5, 0.25), (10, 1.0), (10, 0.25))
]


class RareIds(nn.Module):
    """The class of the first of two ids, most of which are in few batches."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers = (
            nn.Embedding(200, 8),
            nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)),
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embedding(ids).flatten(1))

    @staticmethod
    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        ids = (200 ** torch.rand(BATCH, 2)).long() - 1
        return ids, 7 * ids[:, 0] % 4


class Copies(nn.Module):
    """The token before each: attention has to look one place back."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(8, 16), nn.Parameter(0.1 * torch.randn(12, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.out = nn.Linear(16, 8)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(self.tokens(text) + self.places)).transpose(1, 2)

    @staticmethod
    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.randint(8, (BATCH, 12))
        return text, text.roll(1, 1)


class Residual(nn.Module):
    """ResNet-8 of few channels on stripes of four directions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = self.layer(1, 6), nn.Linear(6, 4)
        self.blocks = nn.ModuleList(nn.Sequential(self.layer(6, 6), nn.ReLU(), self.layer(6, 6)) for _ in range(3))

    @staticmethod
    def layer(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.out(x.mean((2, 3)))

    @staticmethod
    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        kind, places = torch.randint(4, (BATCH,)), torch.arange(8.0)
        angle = (kind * torch.pi / 4)[:, None, None]
        wave = places[:, None] * angle.cos() + places * angle.sin() + 6 * torch.rand(BATCH, 1, 1)
        return (wave.sin() + 0.5 * torch.randn(BATCH, 8, 8))[:, None], kind


TASKS = {"rare_ids": RareIds, "transformer": Copies, "resnet8": Residual}


@functools.cache
def losses(task: str, **options: float) -> list[float]:
    torch.manual_seed(0)
    model = TASKS[task]()
    opt = AdaHessian(model, seed=0, **options)
    curvature_friendly(model, opt)
    found = []
    for _ in range(STEPS):
        opt.zero_grad()
        batch = model.batch()
        found.append(opt.backward_split(lambda x, y: cross_entropy(model(x), y), *batch).item())
        opt.step()
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "options", [*CHEAPER, {"lr": 0.3, **recipes.cheap}, {"lr": 0.3, **recipes.cheap, "hessian_fraction": 0.25}], ids=str
)
def test_trains_as_with_exact_curvature(task, options):
    exact, found = losses(task), losses(task, **options)
    fall, exact_fall = (values[0] - sum(values[-TAIL:]) / TAIL for values in (found, exact))
    assert max(found) < 1.5 * found[0], "the start is wild"
    assert exact_fall > 0.15 * exact[0], "nothing is learnt"
    assert fall > 0.6 * exact_fall
