"""Curvature from a part of the mini-batch: how it is cut, and what the optimizer makes of the parts."""

from __future__ import annotations

import pytest
import strategies
import torch
from models import assert_same, batch, conv_net, mlp, weights
from published import AdaHessian
from strategies import BOUND, exact, found, optimizer
from tolerances import assert_error
from torch import nn

from adahessian_fused import split_batch


def loss_on(model, x, y):
    return (model(x) - y).square().mean()


def split_step(opt, model):
    loss = opt.backward_split(lambda x, y: loss_on(model, x, y), *batch(0, model))
    opt.step()
    return loss


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.3, 1e-6])
@pytest.mark.parametrize("hvp", BOUND)
def test_gradient_of_the_whole_and_curvature_of_the_part(hvp, fraction, device):
    model, _ = strategies.build("mlp", device)
    x, y = batch(0, model)
    k = {0.25: 2, 0.5: 4, 0.3: 2, 1e-6: 1}[fraction]
    g, hz = exact(model, lambda m: loss_on(m, x, y))[0], exact(model, lambda m: loss_on(m, x[:k], y[:k]))[1]
    opt, expected = optimizer(model, hvp, hessian_fraction=fraction), loss_on(model, x, y).item()
    assert split_step(opt, model).item() == pytest.approx(expected, rel=1e-12)
    ours = found(opt, model)
    assert_error(ours[0], g, BOUND[hvp])
    assert_error(ours[1], [h.abs() for h in hz], BOUND[hvp])


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_calls_of_the_loss(device, fraction):
    """How many examples each call is given, and whether it is inside curvature_friendly()."""
    model = mlp(device=device)
    opt, calls = AdaHessian(model.parameters(), hessian_fraction=fraction, update_each=2), []

    def loss(x, y):
        normed = nn.functional.layer_norm(x.clone().requires_grad_(), x.shape[1:])
        inside = type(normed.grad_fn).__name__ != "NativeLayerNormBackward0"
        calls.append((len(x), inside))
        return loss_on(model, x, y)

    for _ in range(2):
        opt.zero_grad()
        opt.backward_split(loss, *batch(0, model))
        opt.step()
    assert calls == ([(8, True)] if fraction == 1 else [(2, True), (6, False)]) + [(8, False)]


def test_batch_norm_sees_each_part(device):
    model = conv_net(device=device)
    opt = AdaHessian(model.parameters(), hessian_fraction=0.25)
    split_step(opt, model)
    other = conv_net(device=device)
    x, _ = batch(0, other)
    other(x[:2]), other(x[2:])
    assert_same(list(model.buffers()), list(other.buffers()))


def test_scaled_losses(device):
    results = []
    for scaler in (torch.amp.GradScaler(device, init_scale=2.0**10), None):
        model = mlp(torch.float32, device)
        opt = AdaHessian(model.parameters(), hessian_fraction=0.5)
        opt.backward_split(lambda x, y, m=model: loss_on(m, x, y), *batch(0, model), grad_scaler=scaler)
        scaler.step(opt) if scaler else opt.step()
        results.append(weights(model))
    assert_same(*results)


def test_structures_and_what_is_no_tensor(device):
    x = torch.arange(8, device=device)
    data = {"x": x, "more": [x.reshape(4, 2).repeat(2, 1), None, "name"], "scale": 2.0}
    first, rest, share = split_batch(data, 0.5)
    assert share == 0.5
    assert (first["x"].tolist(), rest["x"].tolist()) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert first["more"][0].shape == rest["more"][0].shape == (4, 2)
    assert first["more"][1:] == rest["more"][1:] == [None, "name"]
    assert first["scale"] == 2.0


@pytest.mark.parametrize(
    "data", [(), (torch.ones(3), torch.ones(4)), (torch.ones(3), torch.ones(())), (torch.ones(0),), (1.0,)], ids=str
)
def test_batches_that_cannot_be_cut(data):
    with pytest.raises(ValueError, match=r"first axes of .* expected one number > 0"):
        split_batch(data, 0.5)


@pytest.mark.parametrize("fraction", [0, -0.5, 2, float("nan"), "x", None])
def test_what_is_no_fraction(fraction):
    with pytest.raises(ValueError, match=rf"fraction={fraction!r}; expected 0\.0 < fraction <= 1\.0"):
        split_batch(torch.ones(4), fraction)


def test_in_a_closure(device):
    model = mlp(device=device)
    x, y = batch(0, model)
    opt = AdaHessian(model.parameters(), hessian_fraction=0.5)
    opt.step(lambda: opt.zero_grad() or opt.backward_split(lambda x, y: loss_on(model, x, y), x, y))
    opt = AdaHessian(model.parameters(), hessian_fraction=0.5, hvp="finite_difference")
    with pytest.raises(RuntimeError, match=r"call it before opt\.step"):
        opt.step(lambda: opt.backward_split(lambda x, y: loss_on(model, x, y), x, y))
