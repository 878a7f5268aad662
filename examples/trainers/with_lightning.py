"""AdaHessian in Lightning, with automatic optimization: only ``configure_optimizers`` names it."""

from __future__ import annotations

import lightning as L
import torch
from digits import accuracy, batches, conv_net, images_and_labels
from torch.nn.functional import cross_entropy

from adahessian_fused import AdaHessian, curvature_friendly


class Classifier(L.LightningModule):
    """An ordinary module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        """Return the loss of a mini-batch."""
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        """AdaHessian, and a schedule as for any optimizer."""
        opt = AdaHessian(self.parameters(), lr=0.15, update_each=2)
        opt.hook_backward()  # needed for accumulate_grad_batches and 16-mixed only
        curvature_friendly(self, opt)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> tuple[AdaHessian, float]:
    """Train for three epochs; the optimizer and the test accuracy."""
    L.seed_everything(0, verbose=False)
    train, test = images_and_labels()
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = Classifier()
    trainer.fit(module, batches(train, 32))
    return trainer.optimizers[0], accuracy(module.net, test)


if __name__ == "__main__":
    print(f"test accuracy {main()[1]:.3f}")
