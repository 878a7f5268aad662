"""Photographs with twice the pixels, by convolutions and a shuffle of channels (Shi et al. 2016)."""

from collections.abc import Iterator

from script import Script
from sources import photographs, some
from torch import nn
from torch.nn.functional import avg_pool2d, mse_loss
from torch.optim import Adam


def network() -> nn.Module:
    """Four convolutions with orthogonal weights."""
    layers = [nn.Conv2d(1, 32, 5, padding=2), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, nn.init.calculate_gain("relu"))
    last = nn.Conv2d(16, 4, 3, padding=1)
    nn.init.orthogonal_(last.weight)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), last, nn.PixelShuffle(2))


def train(script: Script) -> Iterator[float]:
    """Yield the mean squared error of each step."""
    sharp = photographs(24)
    model = network()
    opt = script.optimizer(model, lambda params: Adam(params, lr=0.01))
    for (y,) in some(sharp, n=16):
        yield script.descend(opt, mse_loss(model(avg_pool2d(y, 2)), y))
