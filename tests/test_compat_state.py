"""State dicts of the drop-ins load in their originals and back; accelerate() takes over live instances."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from models import assert_same, mlp, train, weights
from originals import SAME, STATE_KEYS, N, Official, Origin, assert_close, conv_net, every_origin, pairs

from adahessian_fused import accelerate, compat

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True"),
]


@every_origin
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


@every_origin
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


@every_origin
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


@every_origin
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
    origin = Origin("timm", {"update_each": 3})
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


@every_origin
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
