"""Parameters in every kind of memory, and parameters whose memory changes between two steps."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from models import assert_same, conv_net, fresh, loss_of, mlp, train, weights
from published import AdaHessian
from tolerances import assert_trajectory
from torch import nn


def kernel(device, memory_format):
    """A convolution kernel of few-bit fractions, so that sums are exact in any order."""
    values = ((torch.arange(4 * 6 * 3 * 3, dtype=torch.float64, device=device) * 7) % 33 - 16.5) / 8
    return nn.Parameter(values.reshape(4, 6, 3, 3).contiguous(memory_format=memory_format))


@pytest.mark.parametrize(
    "options", [{}, {"block_size": 16, "averaging": "abs", "n_samples": 2}], ids=["auto", "block_16_abs"]
)
def test_channels_last_equals_contiguous(every_engine, device, options):
    found = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        p = kernel(device, memory_format)
        opt = AdaHessian([p], backend=every_engine, **options)
        opt.backward((p**3).sum() / 4 + p.sum() ** 2)
        opt.step()
        found.append([p.detach(), opt.state[p]["exp_avg"], opt.state[p]["exp_hessian_diag_sq"]])
    assert_same(*found)


def test_gaussian_probes_do_not_depend_on_the_memory_format(engine, device):
    found = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        p = kernel(device, memory_format)
        opt = AdaHessian([p], backend=engine, probe="gaussian", block_size=1)
        opt.backward((p**3).sum())
        opt.step()
        found.append(p.detach())
    assert_same(found[:1], found[1:])


# ---- memory that changes ---------------------------------------------------------------------------------------------


def _new_tensor(model):
    for p in model.parameters():
        p.data = p.data.clone()


def _transposed(model):
    for p in model.parameters():
        p.data = p.data.mT.contiguous().mT if p.dim() > 1 else p.data.clone()


def _transposed_and_back_in_the_same_memory(model):
    for p in model.parameters():
        if p.dim() == 2:
            values, memory = p.data.clone(), p.data.view(-1)
            p.data = memory.as_strided(p.shape, (1, p.shape[0]))
            p.data.copy_(values)


def _slice_of_something_larger(model):
    for p in model.parameters():
        p.data = torch.stack([p.data, p.data.new_full(p.shape, 7.0)], -1)[..., 0]


REBINDS = [_new_tensor, _transposed, _transposed_and_back_in_the_same_memory, _slice_of_something_larger]


@pytest.mark.parametrize("rebind", REBINDS, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("when", ["between_steps", "between_backward_and_step", "between_micro_batches"])
def test_rebinding_data(engine, device, rebind, when):
    found = []
    for change in (rebind, lambda model: None):
        model, opt = fresh(mlp(device=device), backend=engine)
        train(opt, model, 2)
        opt.zero_grad()
        opt.backward(loss_of(model, 2))
        if when == "between_micro_batches":
            change(model)
            opt.backward(loss_of(model, 3))
        if when == "between_backward_and_step":
            change(model)
        opt.step()
        if when == "between_steps":
            change(model)
        train(opt, model, [4])
        found.append(weights(model))
    # Strides decide in which order a matrix product adds up.
    assert_same(*found) if rebind is _new_tensor else assert_trajectory(*found, steps=4)


def test_an_empty_parameter_changes_its_dtype(engine, device):
    """Its address, 0, stays as it is."""
    a, empty = nn.Parameter(torch.ones(3, device=device)), nn.Parameter(torch.ones(0, device=device))
    opt = AdaHessian([a, empty], backend=engine)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        empty.grad = None
        empty.data = empty.data.to(dtype)
        opt.step(lambda: (a**3).sum() + (empty**3).sum().float())
    assert int(opt.state[empty]["step"]) == int(opt.state[a]["step"]) == 3


SAME_ADDRESS = {"bfloat16": lambda p: p.view(torch.bfloat16), "slice": lambda p: p[:2]}


@pytest.mark.parametrize("change", SAME_ADDRESS.values(), ids=SAME_ADDRESS)
def test_what_changes_at_the_same_address(engine, device, change):
    p = nn.Parameter(torch.ones(4, dtype=torch.float16, device=device))
    opt = AdaHessian([p], backend=engine)
    opt.step(lambda: (p.float() ** 2).sum())
    p.grad, p.data = None, change(p.data)
    if len(p) == 2:
        with pytest.raises(ValueError, match=r"state exp_avg of .* has shape \(4,\); expected \(2,\)"):
            opt.step(lambda: (p.float() ** 2).sum())
        return
    with torch.no_grad():
        p.fill_(1)
    opt.step(lambda: (p.float() ** 2).sum())
    assert p.lt(1).all()


def test_layouts_are_made_without_a_graph(engine, device):
    """Backward passes make them, where gradients are recorded."""
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16, device=device))
    opt = AdaHessian([p], master_weights=True, backend=engine)
    opt.backward((p**3).sum())
    opt.step()
    assert not any(x.requires_grad for x in opt.state[p].values())
    copy.deepcopy(opt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_changes_while_training(engine, device, dtype):
    model, opt = fresh(mlp(device=device), backend=engine)
    train(opt, model, 2)
    m = [opt.state[p]["exp_avg"].float() for p in model.parameters()]
    model.to(dtype)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step(hessian=[torch.ones_like(p) for p in model.parameters()])
    assert_same([opt.state[p]["exp_avg"] for p in model.parameters()], [x * torch.tensor(0.9) for x in m])
    assert [int(opt.state[p]["step"]) for p in model.parameters()] == [3] * 6


def test_the_user_replaces_a_state(engine, device):
    found = []
    for in_place in (True, False):
        model, opt = fresh(mlp(device=device), backend=engine)
        train(opt, model, 2)
        for p in model.parameters():
            if in_place:
                opt.state[p]["exp_avg"].zero_()
            else:
                opt.state[p]["exp_avg"] = torch.zeros_like(p)
        found.append(train(opt, model, [2, 3]))
    assert_same(found[1], found[0])


def _new_dicts(opt):
    for p in list(opt.state):
        opt.state[p] = {}


RESETS = {
    "clear": lambda opt: opt.state.clear(),
    "new_defaultdict": lambda opt: setattr(opt, "state", collections.defaultdict(dict)),
    "new_dicts": _new_dicts,
}


@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS)
def test_the_user_resets_the_state(engine, device, reset):
    model, opt = fresh(mlp(device=device), backend=engine)
    train(opt, model, 2)
    reset(opt)
    again = copy.deepcopy(model)
    fresh_opt = AdaHessian(again.parameters(), backend=engine)
    assert_same(train(opt, model, [2, 3]), train(fresh_opt, again, [2, 3]))
    assert [int(opt.state[p]["step"]) for p in model.parameters()] == [2] * 6


def test_states_are_views_in_the_shape_of_the_parameter(device):
    model, opt = fresh(conv_net(device=device).to(memory_format=torch.channels_last))
    train(opt, model, 1)
    for p in model.parameters():
        for key in ("exp_avg", "exp_hessian_diag_sq"):
            assert (opt.state[p][key].shape, opt.state[p][key].stride()) == (p.shape, p.stride())
