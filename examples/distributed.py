"""Train a small network on scikit-learn's digits on several ranks.

::

    torchrun --nproc-per-node 2 examples/distributed.py                 # DDP, exact curvature
    torchrun --nproc-per-node 2 examples/distributed.py --mode fsdp     # sharded, finite differences

``--mode plain`` has no wrapper around the model at all. Every mode averages gradients and curvature over the ranks; the
last batch of an epoch is uneven, and weighted. With ``--checkpoint DIR`` a run saves itself at the end of every epoch
and goes on from there, on any number of ranks.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from adahessian_fused import AdaHessian, batch_weight


def make_model() -> nn.Module:
    """Return a smooth convolutional network, the same on every rank."""
    torch.manual_seed(0)
    features = nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.GELU()
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(16 * 16, 10))


def digits(device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images, (n, 1, 8, 8), with their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device).unsqueeze(1) / 16
    labels = torch.tensor(data.target, device=device)
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def my_parts(n: int, batch_size: int, epoch: int) -> Iterator[Tensor]:
    """Return this rank's part of each joint batch; in the last one it may be smaller than that of other ranks."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch))
    for joint in order.split(batch_size):
        yield joint[dist.get_rank() :: dist.get_world_size()]


def main() -> None:
    """Train; rank 0 reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("plain", "ddp", "fsdp"), default="ddp")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64, help="of all ranks together")
    parser.add_argument("--lr", type=float, default=0.15)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    (images, labels), (test_images, test_labels) = digits(device)

    model, options = make_model().to(device), {"lr": args.lr, "eps": 1e-2, "update_each": 2}
    if args.mode == "plain":
        opt = AdaHessian(model.parameters(), process_group=dist.group.WORLD, **options)
    elif args.mode == "ddp":
        model = DistributedDataParallel(model)
        opt = AdaHessian(model.parameters(), process_group=model, **options)
    else:
        fully_shard(model, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
        opt = AdaHessian(model.parameters(), hvp="finite_difference", **options)

    begin = 0
    if args.checkpoint is not None and (args.checkpoint / ".metadata").exists():
        model_state, opt_state = get_state_dict(model, opt)
        state = {"model": model_state, "optimizer": opt_state, "epoch": 0}
        checkpoint.load(state, checkpoint_id=args.checkpoint)
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        begin = state["epoch"]

    for epoch in range(begin, args.epochs):
        for part in my_parts(len(images), args.batch_size, epoch):
            x, y = images[part], labels[part]

            def loss_fn(x: Tensor = x, y: Tensor = y) -> Tensor:
                return F.cross_entropy(model(x), y)

            opt.zero_grad()
            if args.mode == "fsdp":  # which averages by itself, so the weight goes into the loss
                weight = batch_weight(len(x), dist.group.WORLD, like=images)
                opt.backward(lambda: loss_fn() * weight)  # noqa: B023 - called at once
            else:
                opt.backward(loss_fn, batch_size=len(x))
            opt.step()
        with torch.no_grad():
            accuracy = (model(test_images).argmax(1) == test_labels).float().mean()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: accuracy {accuracy:.1%}", flush=True)
        if args.checkpoint is not None:
            model_state, opt_state = get_state_dict(model, opt)
            state = {"model": model_state, "optimizer": opt_state, "epoch": epoch + 1}
            checkpoint.save(state, checkpoint_id=args.checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
