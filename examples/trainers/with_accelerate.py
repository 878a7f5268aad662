"""AdaHessian in a loop of Hugging Face Accelerate: two lines more than for a first-order optimizer."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from digits import accuracy, batches, conv_net, images_and_labels
from torch.nn.functional import cross_entropy

from adahessian_fused import AdaHessian, curvature_friendly

EPOCHS = 3


def main() -> tuple[AdaHessian, float]:
    """Train for three epochs; the optimizer and the test accuracy."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    train, test = images_and_labels()
    loader, model = batches(train, 32), conv_net()
    adahessian = AdaHessian(model.parameters(), lr=0.15, update_each=2)
    adahessian.hook_backward()  # accelerator.backward(loss) gathers its curvature from now on
    curvature_friendly(model, adahessian)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adahessian, EPOCHS * len(loader) // 2)
    model, opt, loader, schedule = accelerator.prepare(model, adahessian, loader, schedule)
    for _ in range(EPOCHS):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(images), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                schedule.step()
                opt.zero_grad()
    return adahessian, accuracy(model, test)


if __name__ == "__main__":
    print(f"test accuracy {main()[1]:.3f}")
