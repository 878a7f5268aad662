"""AdaHessian with the weight averages of torch.optim.swa_utils: stochastic (SWA) and exponential (EMA)."""

from __future__ import annotations

import torch
from digits import accuracy, batches, conv_net, images_and_labels
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from adahessian_fused import AdaHessian, curvature_friendly

EPOCHS, SWA_FROM = 4, 2


def main() -> tuple[AdaHessian, float, float]:
    """Train for four epochs; the optimizer and the test accuracies of both averages."""
    torch.manual_seed(0)
    train, test = images_and_labels()
    loader, model = batches(train), conv_net()
    opt = AdaHessian(model.parameters(), lr=0.15, update_each=2)
    curvature_friendly(model, opt)
    swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    schedule, swa_schedule = CosineAnnealingLR(opt, SWA_FROM), SWALR(opt, swa_lr=0.05, anneal_epochs=1)
    for epoch in range(EPOCHS):
        for images, labels in loader:
            opt.zero_grad()
            opt.backward(cross_entropy(model(images), labels))
            opt.step()
            ema.update_parameters(model)
        if epoch < SWA_FROM:
            schedule.step()
        else:
            swa.update_parameters(model)
            swa_schedule.step()
    update_bn(loader, swa)
    return opt, accuracy(swa, test), accuracy(ema, test)


if __name__ == "__main__":
    print("test accuracy: SWA {:.3f}, EMA {:.3f}".format(*main()[1:]))
