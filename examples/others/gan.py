"""Generate digits by two networks that play against each other (Goodfellow et al. 2014), each with its optimizer."""

from collections.abc import Iterator

import torch
from script import Script
from sources import digits, some
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Adam


def distance(x: Tensor, y: Tensor) -> float:
    """Between two sets of as many images: mean distance of their sorted shadows on 64 fixed directions."""
    shadows = torch.randn(x[0].numel(), 64, generator=torch.Generator().manual_seed(0)) / 8
    return (x.flatten(1) @ shadows).sort(0).values.sub((y.flatten(1) @ shadows).sort(0).values).abs().mean().item()


def train(script: Script) -> Iterator[float]:
    """Yield the distance of generated from real images at each step."""
    generator = nn.Sequential(
        *(nn.ConvTranspose2d(16, 32, 2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Sigmoid()),
    )
    critic = nn.Sequential(
        *(nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(16, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(128, 1)),
    )
    opt_g, opt_c = (script.optimizer(m, lambda p: Adam(p, lr=1e-3, betas=(0.5, 0.999))) for m in (generator, critic))
    for (real,) in some(digits(8)[0], n=128):
        false = generator(torch.randn(len(real), 16, 1, 1))
        scores = torch.cat([critic(real), -critic(false.detach())])
        script.descend(opt_c, binary_cross_entropy_with_logits(scores, torch.ones_like(scores)))
        verdict = critic(false)
        script.descend(opt_g, binary_cross_entropy_with_logits(verdict, torch.ones_like(verdict)))
        yield distance(real, false.detach())
