"""Predict the next character of a text by a small transformer, as GPTs do."""

from collections.abc import Iterator

import torch
from script import Script
from sources import characters, stretches
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

KINDS, LENGTH = 64, 32


class GPT(nn.Module):
    """Embeddings of characters and places, two layers, one that scores."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(KINDS, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, KINDS)

    def forward(self, text: Tensor) -> Tensor:
        """Scores (N, LENGTH, KINDS) of what comes next."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.out(self.layers(self.tokens(text) + self.places(torch.arange(LENGTH)), mask, is_causal=True))


def train(script: Script) -> Iterator[float]:
    """Yield the cross entropy of each step."""
    model = GPT()
    opt = script.optimizer(model, lambda params: AdamW(params, lr=1e-3, weight_decay=0.1))
    for x, y in stretches(characters(KINDS), length=LENGTH, n=16):
        yield script.descend(opt, cross_entropy(model(x).flatten(0, 1), y.flatten()))
