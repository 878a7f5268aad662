"""Models with a mini-batch each."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {"ResNet-20": 3, "ResNet-32": 5}
N_CLASSES = 10
# Layers, width, tokens, length, examples. GPT-2's own 50,257 tokens are rounded up to whole tiles, as everybody does.
SIZES = {"GPT": (4, 256, 512, 128, 8), "GPT-2 124M": (12, 768, 50_304, 1024, 4)}
LONG = {f"attention T={length}": length for length in (256, 1024, 2048)}  # in all 2,048 tokens, 8 heads of 32


@dataclass(frozen=True)
class Problem:
    """A model, a loss and a mini-batch; ``precision`` is autocast's dtype, None without autocast."""

    name: str
    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batch: tuple[Tensor, Tensor]
    precision: torch.dtype | None = None

    def fresh(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a copy of the model as it was made."""
        return copy.deepcopy(self.model).to(dtype)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch."""
        with self.autocast():
            return self.loss_fn(model(inputs), targets)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return what a forward pass runs in; float64 stays float64 there."""
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.batch[0].device.type, self.precision)


class Attention(nn.Module):
    """A pre-norm transformer layer with causal attention."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to the same."""
        q, k, v = (y.unflatten(-1, (-1, self.head)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """A transformer with heads of size ``head``; input and output embedding are one with ``tied``, as in GPT-2."""

    def __init__(
        self, n_layers: int, width: int, n_tokens: int, length: int, *, head: int = 64, tied: bool = False
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(n_tokens, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Attention(width, head) for _ in range(n_layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_tokens, bias=not tied))
        if tied:
            nn.init.normal_(self.tokens.weight, std=0.02)
            self.head[1].weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, length) to (N, length, tokens)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.layers(self.tokens(tokens) + self.positions(positions)))


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all tokens."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, N_CLASSES))


def _make(name: str, batch: int | None) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    if name in BLOCKS:
        from examples.resnet import ResNet

        n = batch or 128
        return ResNet(BLOCKS[name]), F.cross_entropy, torch.randn(n, 3, 32, 32), torch.randint(N_CLASSES, (n,))
    if name == "MLP":
        n = batch or 256
        return _mlp(), F.cross_entropy, torch.randn(n, 784), torch.randint(N_CLASSES, (n,))
    length = LONG.get(name, 0)
    *sizes, examples = (4, 256, 512, length, 2048 // length) if length else SIZES[name]
    _, _, n_tokens, length = sizes
    tokens = torch.randint(n_tokens, (batch or examples, length + 1))
    model = Gpt(*sizes, head=32 if name in LONG else 64, tied=name in HALF)
    return model, token_loss, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


NAMES = ("MLP", "GPT", "ResNet-20", "ResNet-32")
HALF = ("GPT-2 124M",)  # trained in bfloat16 autocast; for a GPU


def problem(name: str, *, device: str = "cpu", batch: int | None = None) -> Problem:
    """Return a problem by name, the same every time."""
    torch.manual_seed(0)
    model, loss_fn, inputs, targets = _make(name, batch)
    precision = torch.bfloat16 if name in HALF else None
    return Problem(name, model.to(device), loss_fn, (inputs.to(device), targets.to(device)), precision)


def describe(problem: Problem) -> Mapping[str, Any]:
    """Return what the JSON file says about a problem."""
    n_params = sum(p.numel() for p in problem.model.parameters())
    return {"model": problem.name, "parameters": n_params, "batch": list(problem.batch[0].shape)}
