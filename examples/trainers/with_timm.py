"""AdaHessian from timm's factory, in a loop like that of timm's train.py."""

from __future__ import annotations

import torch
from digits import accuracy, batches, conv_net, images_and_labels
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch.nn.functional import cross_entropy

from adahessian_fused import AdaHessian, compat, curvature_friendly

EPOCHS = 3


def main() -> tuple[AdaHessian, float]:
    """Train for three epochs; the optimizer and the test accuracy of the averaged weights."""
    torch.manual_seed(0)
    train, test = images_and_labels()
    loader, model = batches(train), conv_net()
    compat.timm.register()
    opt = create_optimizer_v2(model, opt="fusedadahessian", lr=0.15, weight_decay=0.01, eps=1e-4)
    curvature_friendly(model, opt)
    schedule = CosineLRScheduler(opt, t_initial=EPOCHS * len(loader), t_in_epochs=False)
    ema = ModelEmaV3(model, decay=0.9)
    updates = 0
    for _ in range(EPOCHS):
        for images, labels in loader:
            opt.zero_grad()
            cross_entropy(model(images), labels).backward(create_graph=opt.is_second_order)
            dispatch_clip_grad(model.parameters(), 1.0)
            opt.step()
            updates += 1
            schedule.step_update(updates)
            ema.update(model, step=updates)
    return opt, accuracy(ema.module, test)


if __name__ == "__main__":
    print(f"test accuracy {main()[1]:.3f}")
