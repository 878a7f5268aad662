"""Models with a mini-batch each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {"ResNet-20": 3, "ResNet-32": 5}
N_CLASSES, N_TOKENS, WIDTH, LENGTH = 10, 512, 256, 128


@dataclass(frozen=True)
class Problem:
    """A model, a loss and a mini-batch."""

    name: str
    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batch: tuple[Tensor, Tensor]

    def fresh(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A copy of the model as it was made."""
        return copy.deepcopy(self.model).to(dtype)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.loss_fn(model(inputs), targets)


class Attention(nn.Module):
    """A pre-norm transformer layer with causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to the same."""
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Four layers over a small vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(N_TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Attention() for _ in range(4)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, N_TOKENS))

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
    tokens = torch.randint(N_TOKENS, (batch or 8, LENGTH + 1))
    return Gpt(), token_loss, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


NAMES = ("MLP", "GPT", "ResNet-20", "ResNet-32")


def problem(name: str, *, device: str = "cpu", batch: int | None = None) -> Problem:
    """A problem by name, the same every time."""
    torch.manual_seed(0)
    model, loss_fn, inputs, targets = _make(name, batch)
    return Problem(name, model.to(device), loss_fn, (inputs.to(device), targets.to(device)))


def describe(problem: Problem) -> Mapping[str, Any]:
    """What the JSON file says about a problem."""
    n_params = sum(p.numel() for p in problem.model.parameters())
    return {"model": problem.name, "parameters": n_params, "batch": list(problem.batch[0].shape)}
