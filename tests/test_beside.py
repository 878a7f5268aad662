"""Every way of stepping beside another optimizer, a scheduler and an average of the weights, and autograd by hand."""

from __future__ import annotations

import pytest
import torch
import ways
from models import batch, mlp, weights
from published import AdaHessian
from torch.optim import SGD, AdamW, Muon, lr_scheduler, swa_utils

from adahessian_fused import TrainStep

OTHERS = {
    "AdamW": lambda params: AdamW(params, lr=0.01),
    "SGD": lambda params: SGD(params, lr=0.05, momentum=0.9),
    "Muon": lambda params: Muon([p for p in params if p.ndim == 2], lr=0.02),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=2),
}
SCHEDULERS = {  # the first two cycle betas
    "AdamW": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10),
    "SGD": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2, base_momentum=0.8, max_momentum=0.95),
    "Muon": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(opt, 5)], [2]
    ),
    "LBFGS": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5),
}


def train(way, other, device):
    """Five steps towards an average of the weights that follows them; weights and average."""
    model = mlp(device=device)
    ours, others = model[:2], model[2:]
    opt, another = AdaHessian(ours.parameters(), lr=0.05, seed=3, update_each=2), OTHERS[other](others.parameters())
    scheduler = SCHEDULERS[other](opt)
    teacher = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))

    def loss(x, y):
        with torch.no_grad():
            target = teacher(x)
        return (model(x) - y).square().mean() + (model(x) - target).square().mean()

    steps = TrainStep(loss, opt, cuda_graph=False) if way == "traced" else None
    for i in range(5):
        x, y = batch(i, model)
        if other == "LBFGS":

            def closure(x=x, y=y):
                another.zero_grad()
                value = loss(x, y)
                value.backward()
                return value

            another.step(closure)
        another.zero_grad()
        if way == "traced":
            steps(x, y)
        else:
            ways.EVERY[way](opt, loss, x, y)
        if other != "LBFGS":
            another.step()
        scheduler.step(*([float(i)] if other == "LBFGS" else []))
        teacher.update_parameters(model)
    assert steps is None or len(steps._graphs) == 2
    return [*weights(model), *weights(teacher)]


@pytest.fixture(scope="module")
def expected(device):
    return {other: train("by_hand", other, device) for other in OTHERS}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("way", [*ways.WAYS, "traced"])
def test_beside_another_optimizer(device, traced, expected, way, other):
    found = train(way, other, device)
    tolerance = (
        {"rtol": 0.02, "atol": 1e-3} if other == "Muon" else {"rtol": 1e-9, "atol": 1e-10}
    )  # it has bfloat16 inside
    torch.testing.assert_close(found, expected[other], **tolerance)
