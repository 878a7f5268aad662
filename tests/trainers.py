"""One training run in several trainers: the digits, a small network, a schedule, and what a recipe asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import weights
from published import AdaHessian
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler

STEPS = 3  # in an epoch; odd, so that a period of two ends in the middle of the next one
BATCH = 16


@dataclass(frozen=True)
class Recipe:
    """How to train: micro-batches in a step, the gradient's largest norm, autocast to bfloat16, and the optimizer's."""

    accumulate: int = 1
    clip: float = 0.0
    bf16: bool = False
    epochs: int = 1
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.05})


class Run(NamedTuple):
    """What a run leaves: parameters, the optimizer and its last learning rate."""

    weights: list[Tensor]
    opt: AdaHessian
    lr: float


class Net(nn.Module):
    """Takes what the digits' data set yields and returns the loss, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(pixels)
        # Not by cross_entropy, which rounds otherwise in curvature_friendly(): some of the trainers are in it.
        return {"loss": nn.functional.nll_loss(logits.log_softmax(1), labels), "logits": logits}


def examples(recipe: Recipe) -> list[dict[str, Tensor]]:
    """As many of the digits as make up an epoch."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    n = STEPS * recipe.accumulate * BATCH
    pixels, labels = torch.from_numpy(digits.data[:n]).float() / 16, torch.from_numpy(digits.target[:n])
    return [{"pixels": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]


def schedule(opt: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(opt, lambda step: 1 / (1 + step))


def plain(recipe: Recipe) -> Run:
    """The loop that the others have to agree with."""
    model = Net()
    opt = AdaHessian(model.parameters(), **recipe.options)
    scheduler = schedule(opt)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            return model(**batch)["loss"] / recipe.accumulate

    for _ in range(recipe.epochs):
        for i, batch in enumerate(DataLoader(examples(recipe), BATCH), start=1):
            opt.backward(partial(loss, batch))
            if i % recipe.accumulate == 0:
                if recipe.clip:
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                opt.step()
                scheduler.step()
                opt.zero_grad()
    return Run(weights(model), opt, scheduler.get_last_lr()[0])


# ---- the trainers ----------------------------------------------------------------------------------------------------
# Each trains a fresh network; with a folder, one epoch that is saved there, then the others in a new run that resumes.


def lightning(recipe: Recipe, folder: Path | None = None, *, hook: bool = True, manual: bool = False) -> Run:
    L = pytest.importorskip("lightning", reason="needs lightning")

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            loss = self.net(**batch)["loss"]
            if manual:
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
                self.lr_schedulers().step()
            return loss

        def configure_optimizers(self):
            self.opt = AdaHessian(self.parameters(), **recipe.options)
            if hook:
                self.opt.hook_backward()
            self.scheduler = schedule(self.opt)
            return {"optimizer": self.opt, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}

    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    checkpoint = folder and folder / "epoch.ckpt"
    for epochs in [1, recipe.epochs] if folder else [recipe.epochs]:
        module = Module()
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            accumulate_grad_batches=recipe.accumulate,
            gradient_clip_val=recipe.clip or None,
            precision="bf16-mixed" if recipe.bf16 else 32,
            **silent,
        )
        trainer.fit(
            module, DataLoader(examples(recipe), BATCH), ckpt_path=checkpoint if epochs > 1 and folder else None
        )
        if epochs == 1 and folder:
            trainer.save_checkpoint(checkpoint)
    return Run(weights(module.net), module.opt, module.scheduler.get_last_lr()[0])


def accelerate(recipe: Recipe, folder: Path | None = None) -> Run:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    for epochs in [range(1), range(1, recipe.epochs)] if folder else [range(recipe.epochs)]:
        accelerate.state.AcceleratorState._reset_state()  # as in a process of its own
        accelerator = accelerate.Accelerator(
            cpu=True,
            gradient_accumulation_steps=recipe.accumulate,
            mixed_precision="bf16" if recipe.bf16 else "no",
        )
        model = Net()
        plain_opt = AdaHessian(model.parameters(), **recipe.options)
        plain_opt.hook_backward()
        model, opt, loader, scheduler = accelerator.prepare(
            model, plain_opt, DataLoader(examples(recipe), BATCH), schedule(plain_opt)
        )
        if epochs.start:
            accelerator.load_state(folder)
        for _ in epochs:
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch)["loss"])
                    if recipe.clip and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
                    opt.step()
                    scheduler.step()
                    opt.zero_grad()
        if folder and not epochs.start:
            accelerator.save_state(folder)
    return Run(weights(model), plain_opt, scheduler.get_last_lr()[0])


def transformers(recipe: Recipe, folder: Path | None = None) -> Run:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    transformers = pytest.importorskip("transformers", reason="needs transformers")

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    for epochs in [1, recipe.epochs] if folder else [recipe.epochs]:
        model = Net()
        opt = AdaHessian(model.parameters(), **recipe.options)
        scheduler = schedule(opt)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=recipe.accumulate,
            max_grad_norm=recipe.clip,
            bf16=recipe.bf16,
            use_cpu=True,
            save_strategy="epoch" if folder else "no",
            report_to="none",
            disable_tqdm=True,
        )
        with opt.hook_backward():
            InOrder(model, arguments, train_dataset=examples(recipe), optimizers=(opt, scheduler)).train(
                resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}") if epochs > 1 and folder else None
            )
    return Run(weights(model), opt, scheduler.get_last_lr()[0])
