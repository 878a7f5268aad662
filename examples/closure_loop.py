"""The shortest training loop: a closure that returns the loss, and AdaHessian does the rest.

    python examples/closure_loop.py

A small network on scikit-learn's digits, once with Rademacher probes (the paper's Eq. 6) and once with Gaussian ones,
which are unbiased as well but add the variance of z squared to the diagonal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from adahessian_fused import AdaHessian

STEPS, BATCH = 100, 128


def train(probe: str, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """The loss at every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    opt = AdaHessian(model.parameters(), lr=0.15, betas=(0.9, 0.999), eps=1e-4, probe=probe)
    losses = []
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,))
        inputs, targets = x[chosen], y[chosen]
        loss = opt.step(lambda: F.cross_entropy(model(inputs), targets))  # noqa: B023 - called at once
        losses.append(loss.item())
    return losses


def main() -> None:
    """Print the loss now and then."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    for probe in ("rademacher", "gaussian"):
        losses = train(probe, x, y)
        print(f"{probe:<11}", "  ".join(f"step {i + 1}: {losses[i]:.3f}" for i in (0, 9, 29, 59, STEPS - 1)))


if __name__ == "__main__":
    main()
