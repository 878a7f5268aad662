"""Translate numbers to words, letter by letter, by two GRUs: 417 to "four hundred seventeen"."""

from collections.abc import Iterator

import torch
from script import Script
from sources import some
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

TO_NINE, TEENS = "one two three four five six seven eight nine", "thir four fif six seven eigh nine"
TENS = ["", "", *(f"{ten}ty" for ten in ["twen", "thir", "for", "fif", "six", "seven", "eigh", "nine"])]
ONES = ["", *TO_NINE.split(), "ten", "eleven", "twelve", *(f"{one}teen" for one in TEENS.split())]
LETTERS = "\0 abcdefghijklmnopqrstuvwxyz0123456789"


def spelt(n: int) -> str:
    """Return a number below 1,000 in words."""
    hundreds, rest = [f"{ONES[n // 100]} hundred"] * (n >= 100), n % 100
    return " ".join([*hundreds, *([ONES[rest]] if rest < 20 else [TENS[rest // 10], ONES[rest % 10]])]).strip()


def numbered(texts: list[str], length: int) -> Tensor:
    """Return the letters' numbers, filled up with zeros: (N, length)."""
    return torch.tensor([[LETTERS.index(c) for c in text.ljust(length, "\0")[:length]] for text in texts])


class Translator(nn.Module):
    """An encoder and a decoder that is given what it should have said so far."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(len(LETTERS), width), nn.Linear(width, len(LETTERS))
        self.read, self.write = (nn.GRU(width, width, batch_first=True) for _ in range(2))

    def forward(self, figures: Tensor, said: Tensor) -> Tensor:
        """Scores (N, length, letters)."""
        _, meaning = self.read(self.embedding(figures))
        return self.out(self.write(self.embedding(said), meaning)[0])


def train(script: Script) -> Iterator[float]:
    """Yield the cross entropy of each step."""
    figures, words = numbered([str(n) for n in range(1, 1000)], 3), numbered([spelt(n) for n in range(1, 1000)], 27)
    model = Translator()
    opt = script.optimizer(model, lambda params: Adam(params, lr=3e-3))
    for x, y in some(figures, words, n=64):
        scores = model(x, torch.nn.functional.pad(y[:, :-1], (1, 0)))
        yield script.descend(opt, cross_entropy(scores.flatten(0, 1), y.flatten()))
