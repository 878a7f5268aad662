"""Click prediction: DLRM on generated logs, or on Criteo's.

PyTorch's embedding bags cannot be differentiated twice; ``curvature_friendly()``, which closures enter by themselves,
has one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import schedules
from ..data.clicks import N_DENSE, N_SPARSE, SIZES, generate, in_order, read_criteo
from ..models.dlrm import Dlrm
from ..optimizers import CAUTIOUS, CHEAP, OURS, SIGNED, SOPHIA
from ..task import Batch, Task

N_TRAIN, N_HELD = 60_000, 20_000
N_CRITEO = 50_000  # rows of a table


class Recommendation(Task):
    """Accuracy of the more probable outcome, as the paper counts it."""

    name, title, metric = "recsys", "click prediction", "accuracy, %"
    betas, weight_decay = (0.9, 0.999), 0.0
    tables = ("optimizers", "frontier")
    learning_rates: ClassVar = {
        "SGD": (0.03, 0.1, 0.3, 1.0),
        "AdaGrad": (0.03, 0.1, 0.3, 1.0),
        **dict.fromkeys(("AdamW", CAUTIOUS), (0.001, 0.003, 0.01, 0.03)),
        **dict.fromkeys((SIGNED, SOPHIA, OURS, CHEAP), (0.015, 0.05, 0.15, 0.5)),
    }

    def __init__(self, data: str = "generated", root: Path | None = None) -> None:
        if data == "generated":
            logs, held = generate(N_TRAIN + 2 * N_HELD), N_HELD
            self.sizes, self.widths, self.batch_size, self.steps = (
                [n + 1 for n in SIZES],
                (16, (32,), (64, 32)),
                128,
                500,
            )
        else:
            logs = read_criteo(root, N_CRITEO)
            held = max(1, len(logs) // 10)
            self.sizes, self.widths = [N_CRITEO] * N_SPARSE, (16, (512, 256, 64), (512, 256))
            self.batch_size, self.steps = 128, 10_000
        self.parts = in_order(logs, held)
        self.data = f"{data} click logs, {len(self.parts['train']):,} to train on"

    def model(self) -> nn.Module:
        return Dlrm(N_DENSE, self.sizes, *self.widths)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        train = self.parts["train"]
        while True:
            for chosen in torch.randperm(len(train), generator=generator).split(self.batch_size):
                if len(chosen) == self.batch_size:
                    rows = train[chosen]
                    yield rows.dense, rows.sparse, rows.clicked

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        dense, sparse, clicked = batch
        return F.binary_cross_entropy_with_logits(model(dense, sparse), clicked)

    @torch.no_grad()
    def _odds(self, model: nn.Module, part: str, most: int | None = None) -> tuple[Tensor, Tensor]:
        rows = self.parts[part][slice(most)]
        starts = range(0, len(rows), 5000)
        pieces = [rows[i : i + 5000] for i in starts]
        return torch.cat([model(p.dense.to(self.device), p.sparse.to(self.device)).cpu() for p in pieces]), rows.clicked

    def validation_loss(self, model: nn.Module) -> float:
        """Over the first 5,000 rows: it is computed often."""
        return F.binary_cross_entropy_with_logits(*self._odds(model, "validation", 5000)).item()

    def score(self, model: nn.Module, split: str) -> float:
        odds, clicked = self._odds(model, split)
        return 100 * ((odds > 0) == (clicked > 0)).float().mean().item()

    def schedule(self, done: float) -> float:
        return schedules.constant(done, warmup=0.1)
