"""Encode digits by a variational autoencoder (Kingma and Welling 2014); its loss is a sum, not a mean."""

from collections.abc import Iterator

import torch
from script import Script
from sources import digits, some
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, relu
from torch.optim import Adam


class VAE(nn.Module):
    """One hidden layer on either side of ten latent variables."""

    def __init__(self, pixels: int, hidden: int = 128, latent: int = 10) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(pixels, hidden), nn.Linear(hidden, pixels)
        self.code, self.decode = nn.Linear(hidden, 2 * latent), nn.Linear(latent, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative lower bound on the likelihood of images (N, pixels), summed over them."""
        mean, log_variance = self.code(relu(self.inner(x))).chunk(2, 1)
        sample = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        reconstruction = binary_cross_entropy_with_logits(self.outer(relu(self.decode(sample))), x, reduction="sum")
        return reconstruction - 0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()


def train(script: Script) -> Iterator[float]:
    """Yield the summed loss of each step."""
    images = digits(16)[0].flatten(1)
    model = VAE(images.shape[1])
    opt = script.optimizer(model, lambda params: Adam(params, lr=1e-3))
    for (x,) in some(images, n=128):
        yield script.descend(opt, model(x))
