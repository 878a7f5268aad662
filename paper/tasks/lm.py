"""Language modelling: a causal transformer on the text of Python's language reference, PTB or WikiText."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import schedules
from ..data.text import python_library, python_topics, read
from ..models.transformer import Encoder, Size
from ..optimizers import CAUTIOUS, CHEAP, OURS, SIGNED, SOPHIA
from ..task import Batch, Task

SMALL = Size(width=64, hidden=128, heads=4, layers=2, dropout=0.1)
FULL = Size(width=256, hidden=2100, heads=1, layers=3, dropout=0.3)


MOST = 512  # windows of a test
GPT = Size(width=128, hidden=512, heads=4, layers=5, dropout=0.0, gpt=True)


class Language(Task):
    """Perplexity of the next word; the same windows of text for every optimizer."""

    name, title, metric, higher_is_better = "lm", "language modelling", "perplexity", False
    block_size = 32
    tables = ("optimizers", "frontier")
    learning_rates: ClassVar = {
        "SGD": (0.03, 0.1, 0.3, 1.0),
        **dict.fromkeys(("AdamW", CAUTIOUS), (0.001, 0.003, 0.01, 0.03)),
        SIGNED: (0.005, 0.015, 0.05, 0.15),
        **dict.fromkeys((SOPHIA, OURS, CHEAP), (0.05, 0.15, 0.5, 1.5)),
    }

    def __init__(self, data: str = "topics", root: Path | None = None) -> None:
        self.corpus = python_topics() if data == "topics" else read(root, data)
        small = data == "topics"
        self.size, self.length, self.batch_size, self.steps = (SMALL, 32, 16, 250) if small else (FULL, 64, 64, 20_000)
        what = "Python's language reference" if small else data
        self.data = f"{what}: {len(self.corpus.train):,} words of training text, {len(self.corpus.words):,} different"

    def model(self) -> nn.Module:
        return Encoder(len(self.corpus.words), self.size, self.length, causal=True)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        windows = self.corpus.train.unfold(0, self.length + 1, 1)
        while True:
            chosen = windows[torch.randint(len(windows), (self.batch_size,), generator=generator)]
            yield chosen[:, :-1], chosen[:, 1:]

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def _mean_loss(self, model: nn.Module, text: Tensor, most: int | None = None) -> float:
        windows = text.unfold(0, self.length + 1, self.length)[:most].to(self.device)
        parts = windows.split(128)
        losses = [self.loss(model, part[:, :-1], part[:, 1:]).item() * len(part) for part in parts]
        return sum(losses) / len(windows)

    def validation_loss(self, model: nn.Module) -> float:
        """Over the first 64 windows: it is computed often."""
        return self._mean_loss(model, self.corpus.validation, 64)

    def score(self, model: nn.Module, split: str) -> float:
        return math.exp(min(self._mean_loss(model, getattr(self.corpus, split), MOST), 100.0))

    def schedule(self, done: float) -> float:
        return schedules.cosine(done)


class Bytes(Language):
    """A small GPT on bytes, at a size that is real for a CPU."""

    name, title, tables = "gpt", "byte-level GPT", ("optimizers",)
    learning_rates: ClassVar = {
        "SGD": (0.03, 0.1, 0.3, 1.0),
        **dict.fromkeys(("AdamW", CAUTIOUS), (0.0003, 0.001, 0.003, 0.01)),
        **dict.fromkeys((SOPHIA, OURS, CHEAP), (0.015, 0.05, 0.15, 0.5)),
    }
    tuning_steps = 250

    def __init__(self, data: str = "library", root: Path | None = None) -> None:
        del data, root  # of other tasks
        self.corpus = python_library()
        self.size, self.length, self.batch_size, self.steps = GPT, 64, 8, 2000
        self.data = f"the sources of Python's library: {len(self.corpus.train):,} bytes of training text"
