"""Classify the nodes of a graph by attention to their neighbours (Velickovic et al. 2018)."""

from collections.abc import Iterator

import torch
from script import Script
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, elu, leaky_relu
from torch.optim import Adam


class Attention(nn.Module):
    """Each node becomes the mean of its neighbours, with learned weights, in several heads."""

    def __init__(self, inputs: int, outputs: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, inputs, outputs)))
        self.pair = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, outputs, 2)))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Features (heads, nodes, outputs)."""
        features = dropout(x, 0.3, self.training) @ self.weight
        left, right = (features @ self.pair).unbind(-1)
        scores = leaky_relu(left[:, :, None] + right[:, None, :], 0.2).masked_fill(~edges, -torch.inf)
        return dropout(scores.softmax(-1), 0.3, self.training) @ features


class Network(nn.Module):
    """Two layers of attention."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = Attention(inputs, 8, 4), Attention(4 * 8, classes, 1)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Scores (nodes, classes)."""
        return self.second(elu(self.first(x, edges)).transpose(0, 1).flatten(1), edges)[0]


def train(script: Script) -> Iterator[float]:
    """Yield the cross entropy of each step on a graph whose nodes mostly know their like."""
    labels = torch.arange(300) % 5
    alike = (labels[:, None] == labels) * 0.05 + 0.005
    edges = (torch.rand(300, 300) < alike) | torch.eye(300, dtype=torch.bool)
    words = (torch.rand(300, 100) < 0.04 + 0.1 * (torch.arange(100) % 5 == labels[:, None])).float()
    x = words / words.sum(1, keepdim=True).clamp_min(1)
    model = Network(100, 5)
    opt = script.optimizer(model, lambda params: Adam(params, lr=5e-3, weight_decay=5e-4))
    while True:
        yield script.descend(opt, cross_entropy(model(x, edges), labels))
