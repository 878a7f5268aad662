"""Small transformers of PyTorch's layers: post-norm and ReLU, as the paper's translation model has them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PAD = 0


@dataclass(frozen=True)
class Size:
    """Width, feed-forward width, heads, layers (of each half), dropout; ``gpt`` means pre-norm and GELU."""

    width: int
    hidden: int
    heads: int
    layers: int
    dropout: float
    gpt: bool = False

    def options(self) -> dict:
        """For torch's layers."""
        form = {"norm_first": True, "activation": "gelu"} if self.gpt else {}
        sizes = {"nhead": self.heads, "dim_feedforward": self.hidden, "dropout": self.dropout}
        return {**sizes, **form, "batch_first": True}


class Tokens(nn.Module):
    """Embeddings of tokens and of their positions, and scores of tokens with the same matrix."""

    def __init__(self, n_tokens: int, size: Size, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(n_tokens, size.width), nn.Embedding(length, size.width)
        self.dropout, self.scale = nn.Dropout(size.dropout), math.sqrt(size.width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=size.width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, length) to (N, length, width)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.dropout(self.scale * self.tokens(tokens) + self.positions(positions))

    def scores(self, x: Tensor) -> Tensor:
        """(N, length, width) to (N, length, n_tokens)."""
        return x @ self.tokens.weight.T


def causal(length: int, device: torch.device) -> Tensor:
    """Return True where a position must not look."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


class Encoder(nn.Module):
    """A stack of self-attention layers; ``causal=True`` makes it a decoder-only language model."""

    def __init__(self, n_tokens: int, size: Size, length: int, *, causal: bool) -> None:
        super().__init__()
        self.embed, self.causal = Tokens(n_tokens, size, length), causal
        layer = nn.TransformerEncoderLayer(size.width, **size.options())
        norm = nn.LayerNorm(size.width) if size.gpt else None
        self.layers = nn.TransformerEncoder(layer, size.layers, norm, enable_nested_tensor=False)
        _xavier(self.layers)

    def hidden(self, tokens: Tensor) -> Tensor:
        """(N, length) to (N, length, width)."""
        mask = causal(tokens.shape[1], tokens.device) if self.causal else None
        padding = None if self.causal else tokens == PAD
        return self.layers(self.embed(tokens), mask, padding)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, length) to scores (N, length, n_tokens)."""
        return self.embed.scores(self.hidden(tokens))


class Classifier(nn.Module):
    """An encoder with a linear layer on its mean over the tokens."""

    def __init__(self, encoder: Encoder, width: int, n_classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, length) to (N, n_classes)."""
        present = (tokens != PAD).unsqueeze(-1)
        x = (self.encoder.hidden(tokens) * present).sum(1) / present.sum(1)
        return self.head(x)


class EncoderDecoder(nn.Module):
    """The transformer of Vaswani et al. 2017; the decoder shares its embedding with the output."""

    def __init__(self, n_source: int, n_target: int, size: Size, length: int) -> None:
        super().__init__()
        self.source, self.target = Tokens(n_source, size, length), Tokens(n_target, size, length)
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(size.width, **size.options()), size.layers, enable_nested_tensor=False
        )
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(size.width, **size.options()), size.layers)
        self.encoder, self.decoder = encoder, decoder
        _xavier(encoder)
        _xavier(decoder)

    def encode(self, source: Tensor) -> Tensor:
        """(N, length) to (N, length, width)."""
        return self.encoder(self.source(source), src_key_padding_mask=source == PAD)

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Scores of the token after each of ``target``."""
        mask = causal(target.shape[1], target.device)
        x = self.decoder(self.target(target), memory, mask, memory_key_padding_mask=source == PAD)
        return self.target.scores(x)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(N, length), (N, length) to (N, length, n_target)."""
        return self.decode(self.encode(source), source, target)

    @torch.no_grad()
    def translate(self, source: Tensor, start: int, end: int, length: int) -> Tensor:
        """Take the most probable token, one after the other, until every sentence has ended."""
        memory = self.encode(source)
        target = torch.full((len(source), 1), start, device=source.device)
        ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        while target.shape[1] < length and not ended.all():
            token = self.decode(memory, source, target)[:, -1].argmax(-1).masked_fill(ended, PAD)
            target, ended = torch.cat([target, token[:, None]], 1), ended | (token == end)
        return target[:, 1:]


def _xavier(module: nn.Module) -> None:
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
