"""All ways of stepping do the same; test_options.py has each of the options in most of them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from models import assert_same, conv_net, fresh, loss_of, mlp, train
from ways import STYLES, WAYS

from adahessian_fused import curvature_friendly

OTHERS = [style for style in STYLES if style != "backward"]


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("style", OTHERS)
def test_same_trajectory_as_backward(device, style):
    (a, opt_a), (b, opt_b) = (fresh(conv_net(device=device), lr=0.01, update_each=2) for _ in range(2))
    with curvature_friendly() if style.startswith(("closure", "function")) else nullcontext():  # they enter it
        expected = train(opt_b, b, 3, "backward")
    assert_same(train(opt_a, a, 3, style), expected)


@pytest.mark.parametrize("style", [s for s in STYLES if s.startswith("closure") and s != "closure_returns_nothing"])
def test_step_returns_what_the_closure_returned(device, style):
    model, opt = fresh(mlp(device=device))
    expected = loss_of(model).item()
    assert WAYS[style](opt, lambda: loss_of(model)).item() == expected
