"""The optimizers that are compared, and how each takes a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from adahessian_fused import AdaHessian, recipes

from .cautious_adamw import CautiousAdamW
from .run import Setup
from .task import Batch, Task

EPS = 1e-4  # of AdaHessian, as published
OURS, CHEAP, SIGNED, SOPHIA = "AdaHessian", "AdaHessian, cheap", "AdaHessian, Eq. 7", "Sophia's rule"
CAUTIOUS = "AdamW, the recipe's momentum"
EXACT = {**recipes.published, "averaging": "abs", "warmup": 20, "clip": 1.0, "update_each": 1}
SETUPS = {
    "SGD": Setup("SGD"),
    "AdaGrad": Setup("AdaGrad"),
    "AdamW": Setup("AdamW"),
    CAUTIOUS: Setup("CautiousAdamW"),
    SOPHIA: Setup(  # Liu et al. 2023: elements of m / h cut at rho = 0.05, curvature on every tenth step
        OURS,
        {
            **recipes.published,
            "update_each": 10,
            "averaging": "abs",
            "block_size": 1,
            "clip": 0.05,
            "unmeasured": "move",
        },
    ),
    SIGNED: Setup(OURS, {**recipes.published, "update_each": 1}),
    OURS: Setup(OURS, EXACT),
    CHEAP: Setup(OURS, recipes.cheap),
}


def make(setup: Setup, lr: float, seed: int, task: Task, params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer of a run; schedule, betas and weight decay of ours are AdamW's."""
    decay = task.decay(setup.optimizer, lr)
    if setup.optimizer == "SGD":
        return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=decay, fused=True)
    if setup.optimizer == "AdaGrad":
        return torch.optim.Adagrad(params, lr, weight_decay=decay)
    if setup.optimizer == "AdamW":
        return torch.optim.AdamW(params, lr, task.betas, weight_decay=decay, fused=True)
    if setup.optimizer == "CautiousAdamW":
        return CautiousAdamW(params, lr, task.betas, weight_decay=decay)
    return AdaHessian(
        params, lr, task.betas, EPS, decay, **{"block_size": task.block_size, "seed": seed, **setup.options}
    )


def stepper(opt: torch.optim.Optimizer, loss_fn: Callable[..., Tensor]) -> Callable[[Batch], Tensor]:
    """Return a function that takes one step with a mini-batch and returns the loss before it."""
    if not isinstance(opt, AdaHessian):
        return lambda batch: _first_order(opt, loss_fn, batch)
    if opt.param_groups[0]["hessian_fraction"] < 1:
        return lambda batch: _split(opt, loss_fn, batch)
    return lambda batch: opt.step(lambda: loss_fn(*batch))  # curvature-friendly by itself


def _first_order(opt: torch.optim.Optimizer, loss_fn: Callable[..., Tensor], batch: Batch) -> Tensor:
    opt.zero_grad()
    loss = loss_fn(*batch)
    loss.backward()
    opt.step()
    return loss.detach()


def _split(opt: AdaHessian, loss_fn: Callable[..., Tensor], batch: Batch) -> Tensor:
    opt.zero_grad()
    loss = opt.backward_split(loss_fn, *batch)
    opt.step()
    return loss
