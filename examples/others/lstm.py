"""Predict the next word of a text by an LSTM, with SGD and clipped gradients as usual."""

from collections.abc import Iterator

from script import Script
from sources import stretches, words
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

KINDS = 500


class Language(nn.Module):
    """Embedding, LSTM, one layer."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(KINDS, width), nn.Linear(width, KINDS)
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, text: Tensor) -> Tensor:
        """Scores (N, length, KINDS) of what comes next."""
        return self.out(self.lstm(self.embedding(text))[0])


def train(script: Script) -> Iterator[float]:
    """Yield the cross entropy of each step."""
    model = Language()
    opt = script.optimizer(model, lambda params: SGD(params, lr=20.0))
    for x, y in stretches(words(KINDS), length=12, n=20):
        yield script.descend(opt, cross_entropy(model(x).flatten(0, 1), y.flatten()), clip=0.25)
