"""The ways of stepping: loss.backward, opt.backward, closures and external curvature do the same."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from models import assert_same, conv_net, fresh, loss_of, mlp, train, weights
from ways import STYLES, WAYS

from adahessian_fused import curvature_friendly

OPTIONS = {
    "plain": {},
    "every_third": {"update_each": 3},
    "stale": {"update_each": 2, "off_step": "stale"},
    "two_samples": {"n_samples": 2, "averaging": "abs"},
    "gaussian": {"probe": "gaussian"},
}
OTHERS = [style for style in STYLES if style != "backward"]


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("style", OTHERS)
def test_same_trajectory_as_backward(device, style, options):
    (a, opt_a), (b, opt_b) = (fresh(mlp(device=device), **options) for _ in range(2))
    assert_same(train(opt_a, a, 4, style), train(opt_b, b, 4, "backward"))


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("style", OTHERS)
def test_same_trajectory_for_convolutions(device, style):
    (a, opt_a), (b, opt_b) = (fresh(conv_net(device=device), lr=0.01, update_each=2) for _ in range(2))
    with curvature_friendly() if style.startswith(("closure", "function")) else nullcontext():  # they enter it
        expected = train(opt_b, b, 3, "backward")
    assert_same(train(opt_a, a, 3, style), expected)


def test_training_moves_every_parameter_and_lowers_the_loss(engine, device):
    model, opt = fresh(conv_net(torch.float32, device), lr=0.05, backend=engine)
    before, start = loss_of(model).item(), weights(model)
    train(opt, model, [0] * 10)
    assert loss_of(model).item() < before
    assert all((a != b).any() for a, b in zip(weights(model), start, strict=True))


@pytest.mark.parametrize("style", [s for s in STYLES if s.startswith("closure") and s != "closure_returns_nothing"])
def test_step_returns_what_the_closure_returned(device, style):
    model, opt = fresh(mlp(device=device))
    expected = loss_of(model).item()
    assert WAYS[style](opt, lambda: loss_of(model)).item() == expected
