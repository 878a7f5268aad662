"""Translation: an encoder-decoder transformer on the sentences of a grammar, or on IWSLT14's files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import schedules
from ..data.parallel import END, PAD, START, from_grammar, read
from ..models.transformer import EncoderDecoder, Size
from ..optimizers import CAUTIOUS, CHEAP, OURS, SIGNED, SOPHIA
from ..task import Batch, Task

SMALL = Size(width=64, hidden=128, heads=4, layers=1, dropout=0.1)
IWSLT = Size(width=512, hidden=1024, heads=4, layers=6, dropout=0.3)


class Translation(Task):
    """BLEU of greedy translations."""

    name, title, metric = "nmt", "translation", "BLEU"
    block_size = 32
    tables = ("optimizers", "lr_scaling", "block_size", "frontier")
    learning_rates: ClassVar = {
        "SGD": (0.03, 0.1, 0.3, 1.0),
        **dict.fromkeys(("AdamW", CAUTIOUS), (0.001, 0.003, 0.01, 0.03)),
        SIGNED: (0.005, 0.015, 0.05, 0.15),
        **dict.fromkeys((SOPHIA, OURS, CHEAP), (0.05, 0.15, 0.5, 1.5)),
    }

    def __init__(self, data: str = "grammar", root: Path | None = None) -> None:
        small = data == "grammar"
        self.text = from_grammar() if small else read(root)
        self.size, self.batch_size, self.steps = (SMALL, 32, 250) if small else (IWSLT, 160, 50_000)
        self.longest = max(t.shape[1] for pair in self.text.tokens.values() for t in pair)
        what = "sentences of a grammar, English to German" if small else data
        self.data = f"{what}, {len(self.text.references['train']):,} training pairs"

    def model(self) -> nn.Module:
        return EncoderDecoder(len(self.text.source.words), len(self.text.target.words), self.size, self.longest)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        source, target = self.text.tokens["train"]
        while True:
            for chosen in torch.randperm(len(source), generator=generator).split(self.batch_size):
                if len(chosen) == self.batch_size:
                    yield shortened(source[chosen]), shortened(target[chosen])

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """With label smoothing 0.1."""
        return self._loss(model, *batch, smoothing=0.1)

    @staticmethod
    def _loss(model: nn.Module, source: Tensor, target: Tensor, smoothing: float) -> Tensor:
        scores = model(source, target[:, :-1]).flatten(0, 1)
        return F.cross_entropy(scores, target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=smoothing)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        source, target = (t.to(self.device) for t in self.text.tokens["validation"])
        losses = [
            self._loss(model, *part, smoothing=0.0) for part in zip(source.split(200), target.split(200), strict=True)
        ]
        return torch.stack(losses).mean().item()

    def score(self, model: nn.Module, split: str) -> float:
        """BLEU (Papineni et al. 2002) of the words as they are, by sacrebleu."""
        import sacrebleu

        source = self.text.tokens[split][0].to(self.device)
        length = self.text.tokens[split][1].shape[1] + 5
        length = min(length, self.longest)
        found = [line for part in source.split(200) for line in model.translate(part, START, END, length).cpu()]
        hypotheses = [self.text.target.decode(line).replace("@@ ", "") for line in found]
        references = [line.replace("@@ ", "") for line in self.text.references[split]]
        return sacrebleu.corpus_bleu(hypotheses, [references], tokenize="none", force=True).score

    def schedule(self, done: float) -> float:
        return schedules.inverse_sqrt(done)


def shortened(tokens: Tensor) -> Tensor:
    """Without the columns that are padding in every row."""
    return tokens[:, : int((tokens != PAD).any(0).sum())]
