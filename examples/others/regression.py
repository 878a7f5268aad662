"""Fit a polynomial of degree four by one layer, far from where it starts."""

from collections.abc import Iterator

import torch
from script import Script
from torch import nn
from torch.nn.functional import smooth_l1_loss
from torch.optim import SGD


def train(script: Script) -> Iterator[float]:
    """Yield the loss of each step."""
    weights, bias = 5 * torch.randn(4, 1), 5 * torch.randn(1)
    model = nn.Linear(4, 1)
    opt = script.optimizer(model, lambda params: SGD(params, lr=0.1))
    while True:
        x = torch.randn(32, 1) ** torch.arange(1, 5)
        yield script.descend(opt, smooth_l1_loss(model(x), x @ weights + bias))
