"""The drop-ins take the steps of their originals, given the same probes, and their state dicts go both ways."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
import sys

import pytest
import torch
from models import assert_same, loss_of, mlp, train, weights
from originals import (
    SAME,
    Official,
    Origin,
    stand_ins,  # noqa: F401
)
from test_peers import assert_close
from torch import nn

import adahessian_fused
from adahessian_fused import AdaHessian, accelerate, compat

pytestmark = pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")

N = 8
EVERY_THIRD = {"update_each": 3}
ORIGINS = {
    "torch_optimizer": Origin("torch_optimizer"),
    "torch_optimizer-k": Origin("torch_optimizer", {"hessian_power": 1.0, "seed": 7}, h=lambda i: i),
    "pytorch_optimizer": Origin("pytorch_optimizer"),
    "pytorch_optimizer-L2": Origin("pytorch_optimizer", {"weight_decouple": False, "hessian_power": 0.5}),
    "pytorch_optimizer-fixed": Origin("pytorch_optimizer", {"fixed_decay": True, "foreach": False}),
    "pytorch_optimizer-up": Origin("pytorch_optimizer", {"maximize": True, "weight_decouple": False, "lr": 1e-3}),
    "pytorch_optimizer-samples": Origin("pytorch_optimizer", {"num_samples": 2}),
    "pytorch_optimizer-period": Origin("pytorch_optimizer", {"update_period": 3}, {"faithful": True}),
    "official": Origin("official"),
    "davda54": Origin("davda54", {"n_samples": 2}),
    "davda54-stale": Origin("davda54", EVERY_THIRD),
    "timm": Origin("timm", {"avg_conv_kernel": True}),
    "timm-stale": Origin("timm", {**EVERY_THIRD, "avg_conv_kernel": True, "n_samples": 2}),
}
origins = pytest.mark.parametrize("origin", ORIGINS.values(), ids=ORIGINS)


def conv_net():
    """Without batch normalisation: a bias before it has g = Hz = 0 but for rounding, and its steps are noise."""
    torch.manual_seed(2)
    layers = nn.Linear(3, 50), nn.Unflatten(1, (2, 5, 5)), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3)
    return nn.Sequential(*layers, nn.Flatten()).double()


def pairs(origin, make=conv_net):
    """A model with the original, and a copy with nothing yet."""
    model = make()
    return model, origin.theirs(model), copy.deepcopy(model)


# ---- trajectories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, conv_net], ids=["mlp", "conv_net"])
@origins
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


@pytest.mark.parametrize("module", ["official", "torch_optimizer"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 2, 2, 2)], ids=["3d", "5d"])
def test_kernels_of_other_dimensions_are_averaged_over_their_spatial_axes(module, shape):
    """The originals crash, or use the tensor of the parameter before."""
    d = torch.linspace(-1, 2, math.prod(shape)).reshape(shape)
    p = nn.Parameter(torch.ones(shape))
    opt, p.grad = Origin(module).ours(nn.ParameterList([p])), torch.ones(shape)
    opt.step(hessian=[d])
    expected = d.abs().flatten(2).mean(2).repeat_interleave(math.prod(shape[2:])).reshape(shape)
    torch.testing.assert_close(opt.hessian_diag(p), expected)


def test_only_kernels_of_4d_parameters_are_averaged_by_timm():
    params = [nn.Parameter(torch.ones(2, 2, 2, *[2] * n)) for n in range(3)]
    opt = compat.timm.Adahessian(params, avg_conv_kernel=True)
    d = [torch.linspace(-1, 2, p.numel()).reshape(p.shape) for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step(hessian=d)
    torch.testing.assert_close(opt.hessian_diag(params[0]), d[0].abs())
    torch.testing.assert_close(opt.hessian_diag(params[1]), d[1].abs().mean([2, 3], keepdim=True).expand(2, 2, 2, 2))
    torch.testing.assert_close(opt.hessian_diag(params[2]), d[2].abs())


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


# ---- state dicts and live instances ----------------------------------------------------------------------------------

STATE_KEYS = {
    "torch_optimizer": {"step", "exp_avg", "exp_hessian_diag_sq"},
    "pytorch_optimizer": {"exp_avg", "exp_hessian_diag_sq"},
    "official": {"step", "exp_avg", "exp_hessian_diag_sq"},
    "davda54": {"step", "hessian step", "exp_avg", "exp_hessian_diag_sq"},
    "timm": {"step", "hessian step", "exp_avg", "exp_hessian_diag_sq"},
}


@origins
def test_state_dict_has_the_keys_of_the_original(origin):
    model, theirs, other = pairs(origin)
    origin.train_theirs(theirs, model, range(6))
    ours = origin.ours(other)
    train(ours, other, 6)
    found, expected = ours.state_dict(), theirs.state_dict()
    for group, original in zip(found["param_groups"], expected["param_groups"], strict=True):
        assert group.keys() == original.keys() | {"seed"}
        assert {k: group[k] for k in original} == original
    for state, original in zip(found["state"].values(), expected["state"].values(), strict=True):
        assert state.keys() - {"adahessian_fused"} == STATE_KEYS[origin.module] == original.keys() - {"hessian"}
        numbers = {k: v for k, v in original.items() if isinstance(v, int)}
        assert {k: state[k] for k in numbers} == numbers
        assert all(type(state[k]) is int for k in numbers)


@origins
def test_training_goes_on_in_ours_and_back_in_theirs(origin):
    """Three steps here, three there and so on, against the original alone; a period begins at every change of hands."""
    model, theirs, other = pairs(origin)
    expected = origin.train_theirs(theirs, model, range(12))
    opt = origin.theirs(other)
    for begin in range(0, 12, 6):
        origin.train_theirs(opt, other, range(begin, begin + 3))
        ours = origin.ours(other)
        ours.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(ours, other, range(begin + 3, begin + 6))
        opt = origin.theirs(other)
        opt.load_state_dict(ours.state_dict())
    assert_close(weights(other), expected)


@origins
def test_accelerate_goes_on_as_the_original_would_have(origin):
    """Five steps of the original, which leaves it in the middle of a period of three, and three of ours."""
    model, theirs, other = pairs(origin)
    opt = origin.theirs(other)
    expected = origin.train_theirs(theirs, model, range(N))
    origin.train_theirs(opt, other, range(5))
    ours = accelerate(opt, **origin.ours_only)
    assert type(ours) is origin.drop_in
    assert all(a is b for a, b in zip(ours.param_groups[0]["params"], other.parameters(), strict=True))
    assert_close(train(ours, other, range(5, N), "create_graph"), expected)
    assert accelerate(ours) is ours


@origins
def test_resuming_is_exact(origin):
    model = conv_net()
    opt = origin.ours(model)
    train(opt, model, 4)
    again = copy.deepcopy(model)
    resumed = origin.ours(again)
    resumed.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    assert_same(train(resumed, again, range(4, N)), train(opt, model, range(4, N)))


def test_what_ours_left_in_a_state_dict_is_forgotten_when_the_original_has_gone_on():
    """Ours mid-period, one step of theirs, and ours again: not with the diagonal and the counts of before."""
    origin = Origin("timm", EVERY_THIRD)
    model = mlp()
    ours, theirs = origin.ours(model), origin.theirs(model)
    train(ours, model, 2)
    theirs.load_state_dict(ours.state_dict())
    for p in model.parameters():
        p.hess = torch.ones_like(p)
    origin.train_theirs(theirs, model, range(2, 3))
    ours.load_state_dict(theirs.state_dict())
    train(ours, model, range(3, 4))  # a Hessian step
    assert {(int(s["step"]), int(s["hessian_step"])) for s in ours.state.values()} == {(4, 4)}


@origins
def test_copies_and_pickles_keep_the_options(origin):
    model = conv_net()
    opt = origin.ours(model)
    train(opt, model, 2)
    (other, copied), pickled = copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))
    expected = train(opt, model, range(2, 5))
    assert_same(train(copied, other, range(2, 5)), expected)
    assert_same(train(pickled[1], pickled[0], range(2, 5)), expected)
    for argument, attribute in type(opt).attributes.items():
        value = {**SAME, **origin.options}.get(argument, inspect.signature(type(opt)).parameters[argument].default)
        assert getattr(copied, attribute) == getattr(opt, attribute) == value


def test_attributes_of_the_original_can_be_set():
    model = mlp()
    opt = compat.timm.Adahessian(model.parameters())
    opt.update_each = 5
    train(opt, model, 1)
    assert not opt.needs_hessian
    assert opt.update_each == 5
    assert opt.is_second_order


def test_a_scheduler_follows_its_optimizer():
    model = mlp()
    opt = Official(model.parameters(), lr=0.8)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    Origin("official").train_theirs(opt, model, range(1))
    scheduler.step()
    opt.param_groups[0]["lr_scale"] = 2.0
    ours = accelerate(opt)
    scheduler.optimizer = ours
    scheduler.step()
    assert (ours.param_groups[0]["lr"], opt.param_groups[0]["lr"]) == (0.2, 0.4)
    assert (ours.param_groups[0]["initial_lr"], ours.param_groups[0]["lr_scale"]) == (0.8, 2.0)


def test_step_hooks_run_once():
    model, calls = mlp(), []
    opt = compat.pytorch_optimizer.AdaHessian(model.parameters())
    opt.register_step_post_hook(lambda *_: calls.append(1))
    train(opt, model, 2)
    assert len(calls) == 2


# ---- constructors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", STATE_KEYS)
def test_signature_and_defaults_of_the_original(module):
    """Ours has keyword-only arguments besides."""
    found = inspect.signature(Origin(module).drop_in).parameters.values()
    extra = {"backend", "faithful"}
    found = [(p.name, p.default, p.kind) for p in found if p.name not in extra]
    expected = inspect.signature(Origin(module).original).parameters.values()
    assert found == [(p.name, p.default, p.kind) for p in expected]


def test_seeds():
    make = compat.torch_optimizer.Adahessian
    seed_of = lambda *args, **kwargs: make([nn.Parameter(torch.ones(1))], *args, **kwargs).param_groups[0]["seed"]  # noqa: E731
    torch.manual_seed(11)
    before = torch.get_rng_state()
    assert (seed_of(), seed_of(seed=5)) == (11, 5)
    assert torch.equal(torch.get_rng_state(), before)
    seed_of(seed=5, faithful=True)
    assert torch.initial_seed() == 5
    torch.manual_seed(2**64 - 1)
    assert seed_of() == 2**63 - 1


REFUSED = {
    "single_gpu": ("official", {"single_gpu": False}, ValueError, "single_gpu=False; expected True"),
    "adam_debias": ("pytorch_optimizer", {"adam_debias": True}, ValueError, "adam_debias=True; expected False"),
    "unknown": ("pytorch_optimizer", {"block_size": 3}, TypeError, "block_size=3; expected those of pytorch_opt"),
    "distribution": (
        "pytorch_optimizer",
        {"hessian_distribution": "uniform"},
        ValueError,
        "hessian_distribution='uniform'; expected \"rademacher\" or",
    ),
    "period": ("pytorch_optimizer", {"update_period": 0}, ValueError, "update_period=0; expected an int >= 1"),
    "samples": ("pytorch_optimizer", {"num_samples": 0}, ValueError, "num_samples=0; expected an int >= 1"),
    "update_each": ("timm", {"update_each": 0}, ValueError, "update_each=0; expected an int >= 1"),
    "faithful": ("official", {"faithful": True}, TypeError, "faithful"),
    "lr": ("davda54", {"lr": -1.0}, ValueError, "lr=-1.0; expected 0.0 <= lr"),
}


@pytest.mark.parametrize(("module", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_cannot_be_had(module, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Origin(module).drop_in(mlp().parameters(), **options)


def test_a_group_with_an_option_that_cannot_be_had_is_refused():
    opt = compat.pytorch_optimizer.AdaHessian(mlp().parameters())
    with pytest.raises(ValueError, match="adam_debias=True; expected False"):
        opt.add_param_group({"params": mlp().parameters(), "adam_debias": True})
    assert len(opt.param_groups) == 1


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


def test_accelerate_refuses_what_it_does_not_know():
    with pytest.raises(
        TypeError, match=r"torch.optim.sgd.SGD; expected one of torch_optimizer.adahessian.Adahessian, "
    ):
        accelerate(torch.optim.SGD(mlp().parameters()))


def test_accelerate_takes_a_copy_under_another_name():
    class Renamed(Official):
        pass

    opt = Renamed(mlp().parameters())
    with pytest.raises(TypeError, match="pass like="):
        accelerate(opt)
    assert type(accelerate(opt, like=compat.official.Adahessian)) is compat.official.Adahessian


# ---- timm's registry -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_ins")
def test_timms_factory_makes_ours_once_registered():
    """Against a stand-in with the interface that timm publishes; timm itself is not installed."""
    from timm.optim import create_optimizer_v2

    compat.timm.register()
    model = mlp()
    opt = create_optimizer_v2(model, opt="fusedadahessian", lr=0.3, weight_decay=0.1, betas=(0.8, 0.9))
    assert type(opt) is compat.timm.Adahessian
    assert [opt.param_groups[0][k] for k in ("lr", "weight_decay", "betas")] == [0.3, 0.1, (0.8, 0.9)]
    with pytest.raises(ValueError, match="name='fused_adahessian'; expected no underscore"):
        compat.timm.register("fused_adahessian")


def test_without_timm_registering_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=re.escape("expected timm >= 1.0.12")):
        compat.timm.register()


def test_drop_ins_are_adahessians():
    assert all(issubclass(Origin(module).drop_in, AdaHessian) for module in STATE_KEYS)
