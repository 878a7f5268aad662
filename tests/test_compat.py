"""The drop-ins take the steps of their originals, given the same probes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import assert_same, loss_of, mlp, train, weights
from originals import SAME, N, Origin, assert_close, conv_net, every_origin, pairs
from tolerances import assert_within, unit
from torch import nn

import adahessian_fused
from adahessian_fused import accelerate, compat

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True"),
]


@pytest.mark.parametrize("make", [mlp, conv_net], ids=["mlp", "conv_net"])
@every_origin
def test_steps_of_the_original(origin, make):
    theirs_model, theirs, model = pairs(origin, make)
    expected = origin.train_theirs(theirs, theirs_model, range(N))
    assert_close(train(origin.ours(model), model, N, "create_graph"), expected)


def test_the_period_is_corrected_for_hessian_steps_unless_faithful(monkeypatch):
    """pytorch-optimizer's bug, mended in theirs: then ours without ``faithful`` does the same."""
    origin = Origin("pytorch_optimizer", {"update_period": 3}, h=lambda i: -(-i // 3))
    theirs_model, theirs, model = pairs(origin, mlp)
    mend = {0.9: lambda step: step, 0.99: lambda step: -(-step // 3)}
    monkeypatch.setattr(theirs, "debias", lambda beta, step: 1 - beta ** mend[beta](step))
    other = copy.deepcopy(model)
    expected = origin.train_theirs(theirs, theirs_model, range(N))
    assert_close(train(origin.ours(model), model, N), expected)
    early = origin.theirs(other)
    origin.train_theirs(early, other, range(5))
    counts = [{(s["step"], s["hessian_step"]) for s in accelerate(early, faithful=f).state.values()} for f in (0, 1)]
    assert counts == [{(5, 2)}, {(5, 5)}]


def test_external_curvature_and_gaussian_probes_of_pytorch_optimizer(monkeypatch):
    origin = Origin("pytorch_optimizer", {"hessian_distribution": "gaussian", "update_period": 2}, {"faithful": True})
    theirs_model, theirs, model = pairs(origin, mlp)
    ours, drawn = origin.ours(model), []
    draw = adahessian_fused.curvature.draw_probe
    monkeypatch.setattr(
        adahessian_fused.curvature, "draw_probe", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1]
    )
    for i in range(N):
        hessian = [torch.cos(p.detach() * (i + 1)) for p in model.parameters()] if i % 3 == 1 else None
        for opt, net in ((ours, model), (theirs, theirs_model)):
            opt.zero_grad()
            loss_of(net, i).backward(create_graph=hessian is None)
            if opt is theirs and drawn:
                z = iter([x.clone() for x in drawn[-1].values()])
                monkeypatch.setattr(torch, "randn_like", lambda p, z=z: next(z))
            opt.step(None, None if hessian is None else [h.clone() for h in hessian])
    assert len(drawn) == 3  # steps 0, 2, 6; the step in between had a diagonal from outside
    assert_close(weights(model), weights(theirs_model))


def assert_diag(opt, p, expected):
    """The first step's |Ds|: a mean of at most 8 magnitudes, and sqrt(v / (1 - beta2)) with v = (1 - beta2) Ds^2."""
    assert_within(opt.hessian_diag(p), expected, (8 + 12) * unit(p.dtype) * expected, "diagonal")


@pytest.mark.parametrize("module", ["official", "torch_optimizer"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 2, 2, 2)], ids=["3d", "5d"])
def test_kernels_of_other_dimensions_are_averaged_over_their_spatial_axes(module, shape):
    """The originals crash, or use the tensor of the parameter before."""
    d = torch.linspace(-1, 2, math.prod(shape)).reshape(shape)
    p = nn.Parameter(torch.ones(shape))
    opt, p.grad = Origin(module).ours(nn.ParameterList([p])), torch.ones(shape)
    opt.step(hessian=[d])
    expected = d.abs().flatten(2).mean(2).repeat_interleave(math.prod(shape[2:])).reshape(shape)
    assert_diag(opt, p, expected)


def test_only_kernels_of_4d_parameters_are_averaged_by_timm():
    params = [nn.Parameter(torch.ones(2, 2, 2, *[2] * n)) for n in range(3)]
    opt = compat.timm.Adahessian(params, avg_conv_kernel=True)
    d = [torch.linspace(-1, 2, p.numel()).reshape(p.shape) for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step(hessian=d)
    assert_diag(opt, params[0], d[0].abs())
    assert_diag(opt, params[1], d[1].abs().mean([2, 3], keepdim=True).expand(2, 2, 2, 2))
    assert_diag(opt, params[2], d[2].abs())


@pytest.mark.parametrize("make", [compat.davda54.AdaHessian, compat.timm.Adahessian], ids=["davda54", "timm"])
def test_set_hessian_gathers_the_curvature_of_micro_batches(make):
    models = [mlp() for _ in range(2)]
    a, b = (make(model.parameters(), lr=0.02, eps=1e-3) for model in models)
    for i in range(3):
        a.zero_grad()
        b.zero_grad()
        for j in (i, i + 1):
            loss_of(models[0], j).backward(create_graph=True)
            a.set_hessian()
            b.backward(loss_of(models[1], j))
        a.step()
        b.step()
    assert_close(weights(models[0]), weights(models[1]))
    loss_of(models[0]).backward(create_graph=True)
    a.set_hessian()
    a.zero_hessian()
    with pytest.raises(RuntimeError, match="needs curvature"):
        a.step()


@pytest.mark.parametrize("options", [{"weight_decouple": False}, {"fixed_decay": True}, {}], ids=["L2", "fixed", ""])
def test_a_group_added_later_decays_like_the_first(options):
    a, b = mlp(), mlp()
    make = compat.pytorch_optimizer.AdaHessian
    one, two = make(a.parameters(), **SAME, **options), make(b[0].parameters(), **SAME, **options)
    two.add_param_group({"params": b[1:].parameters()})
    assert_same(train(two, b, 3), train(one, a, 3))


@pytest.mark.parametrize("options", [{"weight_decouple": False}, {"fixed_decay": True}], ids=["L2", "fixed"])
def test_decays_know_the_loss_scale(options):
    """A power of two in and out changes nothing; a step that overflows decays nothing."""
    (a, plain), (b, scaled) = (
        (model, compat.pytorch_optimizer.AdaHessian(model.parameters(), **SAME, **options)) for model in (mlp(), mlp())
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(plain, a, 3, "create_graph")
    for i in range(3):
        scaled.zero_grad()
        scaler.scale(loss_of(b, i)).backward(create_graph=True)
        scaler.step(scaled)
        scaler.update()
    assert_same(weights(b), weights(a))
    scaled.zero_grad()
    scaler.scale(loss_of(b, 3) * torch.inf).backward(create_graph=True)
    scaler.step(scaled)
    assert_same(weights(b), weights(a))
