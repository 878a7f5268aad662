"""No way of stepping keeps a graph alive: neither through a reference cycle nor until the next step."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
from models import conv_net, fresh, loss_of, mlp, train
from ways import STYLES

from adahessian_fused import LongStepWarning, adahessian, hutchinson_diagonal

pytestmark = pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")

OPTIONS = {
    "plain": {},
    "every_second": {"update_each": 2},
    "samples": {"n_samples": 2, "block_size": 4},
    "gaussian": {"probe": "gaussian"},
}


@pytest.fixture
def no_garbage_collection():
    """Only reference counts free memory; what was there before is not looked at."""
    gc.disable()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.enable()


class Token:
    """Lives as long as the node of the graph that holds it."""


class Traced(torch.autograd.Function):
    """The identity; its nodes, of the graph of the gradient too, and what they saved are watched."""

    watched: ClassVar[list[weakref.ref]] = []

    @staticmethod
    def forward(ctx, x):
        ctx.token, saved = Token(), x.clone()
        ctx.save_for_backward(saved)
        Traced.watched += [weakref.ref(ctx.token), weakref.ref(saved)]
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return Traced.apply(g)


class Trace(torch.nn.Module):
    def forward(self, x):
        return Traced.apply(x)


def live_tensors():
    """Tensors that Python can see, and the bytes of their storages."""
    storages = {}
    for x in gc.get_objects():
        if isinstance(x, torch.Tensor) and x.layout is torch.strided:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return len(storages), sum(storages.values())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("style", STYLES)
def test_the_graph_of_a_step_is_gone_after_it(device, style, options, no_garbage_collection):
    model, opt = fresh(torch.nn.Sequential(mlp(device=device), Trace()), **options)
    Traced.watched.clear()
    train(opt, model, 4, style)
    assert len(Traced.watched) > 4
    assert not any(watched() is not None for watched in Traced.watched)


def test_the_graph_is_freed_while_it_is_walked_unless_it_is_to_be_kept(device):
    model, opt = fresh(mlp(device=device), n_samples=2)
    loss = loss_of(model, 0)
    opt.backward(loss, retain_graph=True)
    opt.backward(loss)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("style", STYLES)
def test_memory_is_steady(device, style, no_garbage_collection):
    model, opt = fresh(mlp(device=device), update_each=2, n_samples=2, block_size=4)
    train(opt, model, 4, style)
    first = live_tensors()
    train(opt, model, 10, style)
    assert live_tensors() == first


@pytest.mark.parametrize("style", ["backward", "create_graph", "closure_standard"])
def test_no_garbage_is_left_to_the_collector(device, style, no_garbage_collection):
    model, opt = fresh(conv_net(device=device))
    train(opt, model, 2, style)
    gc.collect()
    train(opt, model, 3, style)
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        tensors = [x for x in gc.garbage if isinstance(x, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert not tensors


def test_gradients_are_cut_from_their_graph_on_off_steps_too(device, no_garbage_collection):
    model, opt = fresh(mlp(device=device), update_each=2)
    for i in range(4):
        opt.zero_grad()
        loss_of(model, i).backward(create_graph=True)
        opt.step()
        assert not any(p.grad.requires_grad for p in model.parameters())


def test_gradients_are_cut_from_their_graph_beside_a_diagonal_of_the_users(device, no_garbage_collection):
    model, opt = fresh(mlp(device=device))
    loss_of(model).backward(create_graph=True)
    opt.step(hessian=[torch.ones_like(p) for p in model.parameters()])
    assert not any(p.grad.requires_grad for p in model.parameters())


@pytest.mark.parametrize("style", [s for s in STYLES if "create_graph" not in s and s != "needs_hessian"])
def test_no_warning(device, style):
    """Torch warns of the cycle that backward(create_graph=True) makes; here there is none."""
    model, opt = fresh(mlp(device=device))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", LongStepWarning)
        train(opt, model, 3, style)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_functions_leave_nothing_behind(device, probe, no_garbage_collection):
    p, n = torch.ones(5, device=device, requires_grad=True), torch.tensor(0)
    numbers = {"lr": 1.0, "beta1": 0.9, "beta2": 0.9, "eps": 0.0, "weight_decay": 0.0}
    before = live_tensors()
    for _ in range(3):
        hutchinson_diagonal((p**3).sum(), [p], probe=probe, n_samples=2)
        adahessian([p], [p.detach()], [p.detach()], [p.detach()], [p.detach()], [n], [n], **numbers)
    assert live_tensors() == before


def test_a_deleted_optimizer_frees_its_states(device, no_garbage_collection):
    model, opt = fresh(mlp(device=device))
    train(opt, model, 2)
    states = [weakref.ref(opt.state[p]["exp_avg"]) for p in model.parameters()]
    del opt
    assert not any(state() is not None for state in states)


@pytest.mark.parametrize("style", [style for style in STYLES if style.startswith("closure")])
def test_finite_differences_keep_no_graph(device, style, no_garbage_collection):
    model, opt = fresh(torch.nn.Sequential(mlp(device=device), Trace()), hvp="finite_difference", update_each=2)
    Traced.watched.clear()
    train(opt, model, 3, style)
    assert len(Traced.watched) > 4
    assert not any(watched() is not None for watched in Traced.watched)


@pytest.mark.parametrize("hvp", ["forward_over_reverse", "finite_difference"])
def test_strategies_leave_no_tensors_behind(device, hvp, no_garbage_collection):
    model, opt = fresh(conv_net(device=device), hvp=hvp)
    train(opt, model, 2, "closure_standard")
    before = live_tensors()
    train(opt, model, 3, "closure_standard")
    assert live_tensors() == before
