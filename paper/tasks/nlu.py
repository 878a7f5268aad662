"""Classification of sentences, fine-tuned from an encoder that is pre-trained once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import schedules
from ..data.files import DataError
from ..data.sentences import MASK, RULES, SPECIAL, by_rule, padded, words_of
from ..models.transformer import Classifier, Encoder, Size
from ..optimizers import CAUTIOUS, CHEAP, OURS, SIGNED, SOPHIA
from ..task import Batch, Task

SMALL = Size(width=64, hidden=128, heads=4, layers=2, dropout=0.1)
LONGEST = 32  # words
SIZES = {"validation": 400, "test": 1000, "train": 2000, "unlabelled": 3000}
CHECKPOINT = "nlu-checkpoint.pt"
MASKED = 0.15  # share of the words that pre-training hides


class Acceptability(Task):
    """Accuracy of telling sentences whose verb agrees with its subject; all start from the same encoder."""

    name, title, metric = "acceptability", "acceptability", "accuracy, %"
    betas, weight_decay, block_size, batch_size, steps = (0.9, 0.999), 0.01, 32, 32, 120
    pretraining_steps = 400
    tables = ("optimizers", "frontier")
    learning_rates: ClassVar = {
        "SGD": (0.01, 0.03, 0.1, 0.3),
        **dict.fromkeys(("AdamW", CAUTIOUS), (0.0003, 0.001, 0.003, 0.01)),
        SIGNED: (0.005, 0.015, 0.05, 0.15),
        **dict.fromkeys((SOPHIA, OURS, CHEAP), (0.015, 0.05, 0.15, 0.5)),
    }
    folder = Path()

    def __init__(self, data: str = "rules", root: Path | None = None) -> None:
        del data, root  # of other tasks
        self.kinds = {name: by_rule(name, SIZES) for name in RULES}
        self.words = words_of([parts["unlabelled"] + parts["train"] for parts in self.kinds.values()])
        self.parts = {part: padded(rows, self.words, LONGEST) for part, rows in self.kinds[self.name].items()}
        self.data = f"sentences made by rules, {len(self.parts['train'].labels):,} to fine-tune on"

    # ---- the checkpoint ----------------------------------------------------------------------------------------------

    def encoder(self) -> Encoder:
        """Before any training."""
        return Encoder(len(self.words), SMALL, LONGEST, causal=False)

    def prepare(self) -> None:
        """Pre-train the encoder on the sentences of all kinds, to guess hidden words (Devlin et al. 2019)."""
        path = self.folder / CHECKPOINT
        if path.exists():
            return
        rows = [row for parts in self.kinds.values() for row in parts.get("unlabelled", []) + parts["train"]]
        tokens = padded(rows, self.words, LONGEST).tokens
        torch.manual_seed(0)
        encoder = self.encoder().to(self.device).train()
        steps = self.pretraining_steps
        opt = torch.optim.AdamW(encoder.parameters(), 0.003, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: schedules.linear(min((step + 0.5) / steps, 1.0)))
        for _ in range(steps):
            chosen = tokens[torch.randint(len(tokens), (64,))].to(self.device)
            opt.zero_grad()
            guess_hidden(encoder, chosen).backward()
            opt.step()
            schedule.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(encoder.state_dict(), path)

    @lru_cache(maxsize=1)  # noqa: B019 - tasks live as long as their process
    def _pretrained(self) -> Encoder:
        path = self.folder / CHECKPOINT
        if not path.exists():
            raise DataError(f"{path} is missing; task.prepare() makes it")
        encoder = self.encoder()
        encoder.load_state_dict(torch.load(path, map_location="cpu"))
        return encoder

    # ---- fine-tuning -------------------------------------------------------------------------------------------------

    def model(self) -> nn.Module:
        """Return the checkpoint and a new last layer."""
        return Classifier(copy.deepcopy(self._pretrained()), SMALL.width, 2)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        train = self.parts["train"]
        while True:
            for chosen in torch.randperm(len(train.labels), generator=generator).split(self.batch_size):
                if len(chosen) == self.batch_size:
                    yield train.tokens[chosen], train.labels[chosen]

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        tokens, labels = batch
        return F.cross_entropy(model(tokens), labels)

    @torch.no_grad()
    def _scores(self, model: nn.Module, part: str) -> Tensor:
        return torch.cat([model(tokens.to(self.device)).cpu() for tokens in self.parts[part].tokens.split(500)])

    def validation_loss(self, model: nn.Module) -> float:
        return F.cross_entropy(self._scores(model, "validation"), self.parts["validation"].labels).item()

    def score(self, model: nn.Module, split: str) -> float:
        return 100 * (self._scores(model, split).argmax(1) == self.parts[split].labels).float().mean().item()

    def schedule(self, done: float) -> float:
        return schedules.linear(done)


def guess_hidden(encoder: Encoder, tokens: Tensor) -> Tensor:
    """Cross-entropy of the words that are hidden from the encoder."""
    hidden = (torch.rand(tokens.shape, device=tokens.device) < MASKED) & (tokens >= len(SPECIAL))
    hidden[0] |= tokens[0] >= len(SPECIAL)  # never none at all
    seen = tokens.masked_fill(hidden, SPECIAL.index(MASK))
    return F.cross_entropy(encoder(seen)[hidden], tokens[hidden])
