"""``opt.hook_backward()``: ``loss.backward()`` gathers curvature, and everything else stays PyTorch's."""

from __future__ import annotations

import copy
import gc
import re

import pytest
import torch
from models import assert_same, batch, fresh, loss_of, mlp, train, weights
from published import AdaHessian
from torch import Tensor

from adahessian_fused import hooks

PLAIN = Tensor.backward


@pytest.fixture(autouse=True)
def nothing_stays_hooked():
    yield
    gc.collect()
    assert Tensor.backward is PLAIN


def step(opt, model, i):
    opt.zero_grad()
    loss_of(model, i).backward()
    opt.step()


def test_other_losses_are_left_alone():
    model, other = mlp(), mlp()
    opt = AdaHessian(model.parameters())
    with opt.hook_backward():
        loss_of(other).backward()
        x = torch.ones(3, requires_grad=True)
        x.sum().backward()
    assert opt.coming_step.curvature is None
    assert x.grad is not None
    assert all(p.grad is not None for p in other.parameters())


def test_off_steps_are_plain():
    model, opt = fresh(mlp(), update_each=2)
    with opt.hook_backward():
        step(opt, model, 0)
        opt.zero_grad()
        passes = []
        loss = model(batch(1, model)[0].requires_grad_()).sum()
        loss.register_hook(passes.append)
        loss.backward()
        assert len(passes) == 1
        assert opt.coming_step.curvature is None
        opt.step()
    assert int(opt.state[model[0].weight]["hessian_step"]) == 1


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_create_graph_and_inputs_are_left_alone():
    (a, opt_a), (b, opt_b) = (fresh(mlp()) for _ in range(2))
    with opt_a.hook_backward():
        loss_of(a).backward(create_graph=True)
        assert all(p.grad.requires_grad for p in a.parameters())
        opt_a.step()
        opt_a.zero_grad()
        loss_of(a).backward(inputs=[a[0].weight])
    assert_same(weights(a), train(opt_b, b, 1))
    assert opt_a.coming_step.curvature is None
    assert a[2].weight.grad is None


def test_retained_graph():
    model, opt = fresh(mlp())
    with opt.hook_backward():
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters()]
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert_same([p.grad for p in model.parameters()], [2 * grad for grad in once])


def test_a_loss_that_is_no_number_names_its_shape():
    model, opt = fresh(mlp())
    with (
        opt.hook_backward(),
        pytest.raises(RuntimeError, match=re.escape("loss has shape (8, 2); expected one number")),
    ):
        model(batch(0, model)[0]).backward()


# ---- how long it lasts -----------------------------------------------------------------------------------------------


def test_the_hook_ends_with_its_handle_and_with_the_optimizer():
    _, opt = fresh(mlp())
    handle = opt.hook_backward()
    assert Tensor.backward is not PLAIN
    handle.remove()
    handle.remove()
    assert Tensor.backward is PLAIN
    opt.hook_backward()
    assert Tensor.backward is not PLAIN
    del opt
    gc.collect()
    assert Tensor.backward is PLAIN


def test_others_may_wrap_backward_too():
    """Before the hook and after it: each stays in the chain, and none is called twice."""
    calls = []

    def wrapped(name):
        inner = Tensor.backward

        def backward(self, *args, **kwargs):
            calls.append(name)
            inner(self, *args, **kwargs)

        return backward

    model, opt = fresh(mlp())
    x = torch.ones(2, requires_grad=True)
    try:
        Tensor.backward = wrapped("before")
        handle = opt.hook_backward()
        Tensor.backward = wrapped("after")
        x.sum().backward()
        handle.remove()  # is in the middle of the chain
        x.sum().backward()
        with opt.hook_backward():
            x.sum().backward()
            assert calls == ["after", "before"] * 3
            step(opt, model, 0)
        assert calls == ["after", "before"] * 3 + ["after"]
    finally:
        hooks._installed, Tensor.backward = False, PLAIN


def test_a_later_optimizer_of_the_same_parameters_takes_over():
    """As in a notebook whose cell is run again while something still holds the old optimizer."""
    (model, old), (expected, other) = (fresh(mlp()) for _ in range(2))
    first = old.hook_backward()
    new = AdaHessian(model.parameters())
    with new.hook_backward(), new.hook_backward():
        for i in range(2):
            step(new, model, i)
        first.remove()  # does not end the new one
        step(new, model, 2)
    assert old.coming_step.curvature is None
    assert_same(weights(model), train(other, expected, 3))


def test_copies_and_loaded_states():
    """A state dict that is loaded, as Accelerate does, leaves the hook; a copy has none."""
    model, opt = fresh(mlp())
    with opt.hook_backward():
        opt.load_state_dict(opt.state_dict())
        step(opt, model, 0)
        twin = copy.deepcopy(opt)
    assert Tensor.backward is PLAIN
    twin.param_groups[0]["params"][0].sum().backward()
    assert twin.coming_step.curvature is None


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hvp", ["finite_difference", "forward_over_reverse"])
def test_strategies_that_evaluate_the_loss(hvp):
    with pytest.raises(ValueError, match=f'hvp="{hvp}" evaluates the loss itself.*expected hvp="autograd"'):
        fresh(mlp(), hvp=hvp)[1].hook_backward()


def test_several_processes(monkeypatch):
    model, opt = fresh(mlp())
    for name, value in {"is_initialized": True, "get_world_size": 2}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with opt.hook_backward(), pytest.raises(RuntimeError, match=r"this is one of 2 processes"):
        loss_of(model).backward()
    assert all(p.grad is None for p in model.parameters())


def test_without_a_hook_the_error_names_it():
    model, opt = fresh(mlp())
    with pytest.raises(RuntimeError, match=re.escape("call opt.hook_backward() once")):
        step(opt, model, 0)


# ---- closures of trainers --------------------------------------------------------------------------------------------


def accumulating(opt, model, zero_grad=lambda: None):
    """A step as Lightning's: one micro-batch before the closure, one in it."""
    (loss_of(model, 0) / 2).backward()

    def closure():
        zero_grad()
        loss = loss_of(model, 1) / 2
        loss.backward()
        return loss

    opt.step(closure)


def test_a_closure_that_adds_to_gradients_without_curvature():
    model, opt = fresh(mlp())
    before = weights(model)
    with pytest.raises(
        RuntimeError, match=r"loss\.backward\(\) has added to gradients of this step without their curvature"
    ):
        accumulating(opt, model)
    assert_same(weights(model), before)


def test_a_closure_that_adds_to_gradients_with_curvature():
    (a, opt_a), (b, opt_b) = (fresh(mlp()) for _ in range(2))
    with opt_a.hook_backward():
        accumulating(opt_a, a)
    for i in range(2):
        opt_b.backward(loss_of(b, i) / 2)
    opt_b.step()
    assert_same(weights(a), weights(b))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("owner", ["optimizer", "model"])
def test_a_closure_that_drops_gradients_may_find_some(set_to_none, owner):
    model, opt = fresh(mlp())
    reset = opt.zero_grad if owner == "optimizer" else model.zero_grad
    accumulating(opt, model, lambda: reset(set_to_none=set_to_none))
    assert int(opt.state[model[0].weight]["hessian_step"]) == 1


def test_a_closure_that_does_nothing():
    """As Lightning's under manual optimization, where everything is ready before the step."""
    (a, opt_a), (b, opt_b) = (fresh(mlp()) for _ in range(2))
    opt_a.backward(loss_of(a))
    assert opt_a.step(lambda: None) is None
    assert_same(weights(a), train(opt_b, b, 1))
    opt_a.zero_grad()
    loss_of(a, 1).backward()
    with pytest.raises(RuntimeError, match="needs curvature, but no gradient carries a graph"):
        opt_a.step(lambda: None)
    opt_a.zero_grad()
    with pytest.raises(RuntimeError, match="the closure returned NoneType"):
        opt_a.step(lambda: None)
