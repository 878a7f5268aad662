"""Log what AdaHessian does to TensorBoard.

::

    pip install tensorboard
    python examples/log_to_tensorboard.py --out runs
    tensorboard --logdir runs

The statistics are computed on the device when they are asked for, and read with one wait for it; every few steps is
plenty. With Weights & Biases the loop over ``add_scalar`` is one call, ``wandb.log({"loss": loss.item(), **numbers})``.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from adahessian_fused import AdaHessian, curvature_friendly


def train(out: str, steps: int, log_each: int) -> None:
    """Fit a small network, and write what the optimizer does to event files in ``out``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    # A group of its own for the last layer, with its own curves.
    opt = AdaHessian([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.05}], lr=0.1)
    curvature_friendly(model, opt)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    with SummaryWriter(out) as writer:
        for step in range(1, steps + 1):
            x = torch.randn(64, 8)
            opt.zero_grad()
            loss = nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True))
            opt.backward(loss)
            opt.step()
            if step % log_each == 0:
                writer.add_scalar("loss", loss.item(), step)
                for name, value in opt.statistics().as_dict().items():
                    writer.add_scalar(f"adahessian/{name}", value, step)
                for name, p in model.named_parameters():
                    writer.add_histogram(f"hessian_diag/{name}", opt.hessian_diag(p), step)
            scheduler.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="runs", help="folder for the event files")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log-each", type=int, default=10, metavar="N")
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.log_each)
