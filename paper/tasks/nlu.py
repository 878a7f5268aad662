"""Sentence classification, fine-tuned from a checkpoint that is trained in the same run."""

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
from ..data.sentences import GLUE, MASK, RULES, SPECIAL, by_rule, padded, read_glue, words_of
from ..models.transformer import Classifier, Encoder, Size
from ..task import Batch, Task

SMALL = Size(width=64, hidden=128, heads=4, layers=2, dropout=0.1)
FULL = Size(width=256, hidden=1024, heads=4, layers=4, dropout=0.1)
SIZES = {"validation": 400, "test": 1000, "train": 2000, "unlabelled": 3000}
MASKED = 0.15  # share of the words that pre-training hides


@lru_cache(maxsize=1)
def corpus(data: str, root: Path | None) -> tuple[dict, list[str]]:
    """Examples by kind and part, and the words of all of them."""
    if data == "rules":
        kinds = {name: by_rule(name, SIZES) for name in RULES}
    else:
        kinds = {
            name: read_glue(root, name) for name, (folder, *_) in GLUE.items() if root and (root / folder).is_dir()
        }
    return kinds, words_of([parts.get("unlabelled", []) + parts["train"] for parts in kinds.values()])


class Sentences(Task):
    """Accuracy of one kind of classification; all start from the same encoder."""

    metric = "accuracy, %"
    betas, weight_decay, block_size = (0.9, 0.999), 0.01, 32
    tables = ("optimizers",)
    learning_rates: ClassVar = {
        "SGD": (0.01, 0.03, 0.1, 0.3),
        "AdamW": (0.0003, 0.001, 0.003, 0.01),
        "AdaHessian": (0.005, 0.015, 0.05, 0.15),
    }
    folder = Path()

    def __init__(self, name: str, data: str = "rules", root: Path | None = None) -> None:
        self.name = self.title = name
        small = data == "rules"
        self.kinds, self.words = corpus(data, root)
        self.size, self.longest, self.batch_size, self.steps = (SMALL, 32, 32, 120) if small else (FULL, 128, 32, 3000)
        self.pretraining_steps = 400 if small else 50_000
        if name not in self.kinds:
            raise DataError(f"{root} has no folder {GLUE[name][0]} of GLUE; pass the folder that has it as --root")
        self.parts = {part: padded(rows, self.words, self.longest) for part, rows in self.kinds[name].items()}
        self.checkpoint = "nlu-checkpoint.pt" if small else f"nlu-checkpoint-{data}.pt"
        self.classes = int(self.parts["train"].labels.max()) + 1
        what = "sentences made by rules" if small else "GLUE"
        self.data = f"{what}, {len(self.parts['train'].labels):,} to fine-tune on"

    # ---- the checkpoint ----------------------------------------------------------------------------------------------

    def encoder(self) -> Encoder:
        """Before any training."""
        return Encoder(len(self.words), self.size, self.longest, causal=False)

    def prepare(self) -> None:
        """Pre-train the encoder on the sentences of all kinds, to guess hidden words (Devlin et al. 2019)."""
        path = self.folder / self.checkpoint
        if path.exists():
            return
        rows = [row for parts in self.kinds.values() for row in parts.get("unlabelled", []) + parts["train"]]
        tokens = padded(rows, self.words, self.longest).tokens
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
        path = self.folder / self.checkpoint
        if not path.exists():
            raise DataError(f"{path} is missing; task.prepare() makes it")
        encoder = self.encoder()
        encoder.load_state_dict(torch.load(path, map_location="cpu"))
        return encoder

    # ---- fine-tuning -------------------------------------------------------------------------------------------------

    def model(self, variant: str = "") -> nn.Module:
        """The checkpoint and a new last layer."""
        del variant
        return Classifier(copy.deepcopy(self._pretrained()), self.size.width, self.classes)

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
