"""What is computed at which step: every option against Algorithm 1 by hand, and gradient accumulation."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from models import assert_follows_paper, assert_same, conv_net, fresh, loss_of, mlp, train, weights
from published import AdaHessian
from torch import nn

import adahessian_fused
from adahessian_fused import recipes

OPTIONS = {
    "defaults": {},
    "hyperparameters": {"lr": 0.03, "betas": (0.7, 0.95), "eps": 1e-2, "weight_decay": 0.1},
    "power_0": {"hessian_power": 0.0},
    "power_half": {"hessian_power": 0.5},
    "power_0.75": {"hessian_power": 0.75},
    "block_4": {"block_size": 4},
    "row": {"block_size": "row"},
    "tensor_abs": {"block_size": "tensor", "averaging": "abs"},
    "every_third": {"update_each": 3},
    "every_third_stale": {"update_each": 3, "off_step": "stale"},
    "three_samples": {"n_samples": 3},
    "three_samples_abs": {"n_samples": 3, "block_size": 4, "averaging": "abs"},
    "three_samples_stale": {"n_samples": 3, "block_size": 4, "update_each": 2, "off_step": "stale"},
    "maximize": {"maximize": True, "lr": 0.01, "weight_decay": 0.1},
    "seed": {"seed": 0x1234_5678_9ABC_DEF0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_follows_algorithm_1(engine, device, options):
    model, opt = fresh(mlp(device=device), backend=engine, **options)
    assert_follows_paper(opt, model)


RECIPES = {
    "cheap": (recipes.cheap, [*range(1, 6), 21, 41]),
    "cheap, with another option": ({**recipes.cheap, "update_each": 5}, [*range(1, 7), 11, 16, 21, 26, 31, 36, 41]),
    "update_each": ({"update_each": 10}, [*range(1, 22), 31, 41]),
}


@pytest.mark.parametrize(("options", "expected"), RECIPES.values(), ids=RECIPES)
def test_the_steps_with_curvature_that_the_documentation_names(options, expected):
    model = mlp()
    opt, found = adahessian_fused.AdaHessian(model, **options), []
    for t in range(1, 46):
        if opt.needs_hessian:
            found.append(t)
        train(opt, model, 1)
    assert found == expected


@pytest.mark.parametrize("block_size", ["auto", 5, "row"])
def test_follows_algorithm_1_with_convolutions(engine, device, block_size):
    model, opt = fresh(conv_net(device=device), backend=engine, block_size=block_size)
    assert_follows_paper(opt, model, steps=2)


def test_interpreted_triton_follows_algorithm_1(every_engine, device):
    model, opt = fresh(mlp(device=device), backend=every_engine, block_size=4, update_each=2, weight_decay=0.1)
    assert_follows_paper(opt, model, steps=3)


def test_options_of_groups(engine, device):
    model = mlp(device=device)
    first = {"block_size": "row", "update_each": 2, "lr": 0.02, "betas": (0.8, 0.9), "hessian_power": 0.5}
    second = {
        "averaging": "abs",
        "block_size": 3,
        "update_each": 3,
        "off_step": "stale",
        "weight_decay": 0.2,
        "eps": 1e-3,
    }
    groups = [{"params": model[0].parameters(), **first}, {"params": model[2:].parameters(), **second}]
    assert_follows_paper(AdaHessian(groups, backend=engine), model, steps=5)


def test_options_changed_while_training(engine, device):
    model, opt = fresh(mlp(device=device), backend=engine, off_step="stale")
    changes = [{}, {"lr": 0.01, "update_each": 2}, {"block_size": 2}, {"off_step": "hold", "averaging": "abs"}]
    for options in changes:
        opt.param_groups[0].update(options)
        assert_follows_paper(opt, model, steps=2)


def test_needs_hessian_follows_update_each():
    model = mlp()
    groups = [{"params": model[0].parameters(), "update_each": 2}, {"params": model[2:].parameters(), "update_each": 3}]
    opt, due = AdaHessian(groups), []
    for i in range(7):
        due.append(opt.needs_hessian)
        train(opt, model, [i])
    assert due == [True, False, True, True, True, False, True]
    assert [int(opt.state[p]["hessian_step"]) for p in model.parameters()] == [4, 4, 3, 3, 3, 3]


GROWING = [(0, "x.x..x...x"), (1, "x.x..x...x"), (2, "xx..x...x."), (3, "xxx...x...")]  # dense steps, Hessian steps


def growing(h):
    return 2 + h


def hessian_steps(opt, model, steps):
    found = ""
    for i in steps:
        found += "x" if opt.needs_hessian else "."
        train(opt, model, [i])
    return found


@pytest.mark.parametrize(("dense", "expected"), GROWING)
@pytest.mark.parametrize("half", [1, 4, 6])
def test_intervals_by_a_function(dense, expected, half):
    """A run that is resumed in the middle of an interval goes on there."""
    options = {"update_each": growing, "dense_steps": dense}
    model, opt = fresh(mlp(), **options)
    assert hessian_steps(opt, model, range(half)) == expected[:half]
    torch.save(opt.state_dict(), file := io.BytesIO())
    file.seek(0)
    again, resumed = fresh(model, **options)
    resumed.load_state_dict(torch.load(file))
    assert copy.deepcopy(resumed).param_groups[0]["update_each"] is growing
    for optimizer, module in ((opt, model), (resumed, again)):
        assert hessian_steps(optimizer, module, range(half, 10)) == expected[half:]
    assert_same(weights(again), weights(model))
    assert int(opt.statistics().hessian_step) == expected.count("x")


def test_a_function_for_a_number_and_back():
    model, opt = fresh(mlp(), update_each=3)
    assert hessian_steps(opt, model, range(3)) == "x.."
    opt.param_groups[0]["update_each"] = lambda h: 2
    assert hessian_steps(opt, model, range(3, 7)) == ".x.x"
    opt.param_groups[0]["update_each"] = lambda h: 7
    assert hessian_steps(opt, model, range(7, 9)) == "x."
    number = fresh(mlp(), update_each=4)[1]
    number.load_state_dict(opt.state_dict())
    assert number.param_groups[0]["update_each"] == 4


@pytest.mark.parametrize("length", [0, -1, 1.5, None, True])
def test_a_function_that_returns_no_number_of_steps(length):
    model, opt = fresh(mlp(), update_each=lambda h: length if h else 1, dense_steps=0)
    train(opt, model, [0, 1])
    before, moved = opt.state_dict(), weights(model)
    with pytest.raises(ValueError, match=rf"update_each\(1\)={length}; expected an int >= 1"):
        train(opt, model, [1])
    assert_same(weights(model), moved)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    other, another = fresh(mlp())  # while the first one lives
    train(another, other, [0])
    opt.param_groups[0]["update_each"] = 2
    assert hessian_steps(opt, model, [2, 3]) == "x."


def divided_by_zero(h):
    return 12 // h


BAD = {
    "no argument": (
        lambda: 3,
        {},
        TypeError,
        r"update_each\(0\) failed: .*0 positional.*function of the number",
    ),
    "no number": (lambda h: None, {}, ValueError, r"update_each\(0\)=None; expected an int >= 1"),
    "after the first": (
        lambda h: 19 - h,
        {"dense_steps": 20},
        ValueError,
        r"update_each\(19\)=0; expected an int",
    ),
    "raises": (divided_by_zero, {}, ZeroDivisionError, "zero"),
}


@pytest.mark.parametrize("name", BAD)
def test_functions_are_tried_when_they_are_given(name):
    function, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fresh(mlp(), update_each=function, **options)
    fresh(mlp(), update_each=divided_by_zero, dense_steps=2)  # it will not be asked for that
    fresh(mlp(), update_each=lambda h: made_later + h)  # noqa: F821


# ---- gradient accumulation -------------------------------------------------------------------------------------------


def exact_problem(device):
    """A model whose derivatives are exact in float64, in whatever order they are added: everything has few bits."""
    generator = torch.Generator().manual_seed(5)
    x, y, w = (torch.randint(-8, 9, size, generator=generator).double() / 4 for size in ((8, 3), (8, 2), (2, 3)))
    model = nn.Linear(3, 2).double().to(device)
    with torch.no_grad():
        model.weight.copy_(w)
        model.bias.copy_(w[:, 0])
    losses = ((model(x.to(device)) ** 2 - y.to(device)) ** 2).mean(1)
    return model, losses


def accumulate_backward(opt, parts):
    for loss in parts:
        opt.backward(loss, retain_graph=True)
    opt.step()


def accumulate_create_graph(opt, parts):
    for loss in parts:
        loss.backward(create_graph=True)
    opt.step()


def accumulate_in_closure(opt, parts):
    def closure():
        opt.zero_grad()
        for loss in parts:
            loss.backward(retain_graph=True)
        return sum(parts)

    opt.step(closure)


ACCUMULATIONS = {f.__name__: f for f in (accumulate_backward, accumulate_create_graph, accumulate_in_closure)}
AVERAGES = {
    "plain": {},
    "row_abs": {"block_size": 2, "averaging": "abs"},
    "samples": {"n_samples": 2, "block_size": 2},
    "stale": {"update_each": 2, "off_step": "stale"},
}


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("accumulate", ACCUMULATIONS.values(), ids=ACCUMULATIONS)
def test_micro_batches_equal_the_full_batch(engine, device, accumulate, options):
    found = []
    for size in (8, 2, 1):
        model, losses = exact_problem(device)
        opt = AdaHessian(model.parameters(), backend=engine, **options)
        accumulate(opt, [part.sum() / 8 for part in losses.split(size)])
        found.append([*weights(model), *(opt.state[p]["exp_hessian_diag_sq"] for p in model.parameters())])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_gradient_of_a_vector_valued_loss(device):
    (a, losses), (b, same) = exact_problem(device), exact_problem(device)
    opt_a, opt_b = AdaHessian(a.parameters()), AdaHessian(b.parameters())
    opt_a.backward(losses, gradient=torch.full_like(losses, 1 / 8))
    opt_b.backward(same.sum() / 8)
    opt_a.step(), opt_b.step()
    assert_same(weights(a), weights(b))


def test_gradient_tensor_of_the_user_is_not_kept():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt, gradient = AdaHessian([p, q]), torch.ones(3)
    for _ in range(2):
        opt.backward(p + q, gradient=gradient)
    assert_same([gradient, p.grad, q.grad], [torch.ones(3), torch.full((3,), 2.0), torch.full((3,), 2.0)])


def test_backward_adds_to_gradients_and_leaves_no_graph(device):
    model, opt = fresh(mlp(device=device))
    opt.backward(loss_of(model, 0))
    first = [p.grad.clone() for p in model.parameters()]
    opt.backward(loss_of(model, 0))
    assert_same([p.grad for p in model.parameters()], [2 * g for g in first])
    assert not any(p.grad.requires_grad for p in model.parameters())


@pytest.mark.parametrize("zero", ["opt", "opt_in_place", "model"])
def test_dropped_gradients_take_their_curvature_along(device, zero):
    (a, opt_a), (b, opt_b) = (fresh(mlp(device=device)) for _ in range(2))
    opt_a.backward(loss_of(a, 7))
    {"opt": opt_a.zero_grad, "opt_in_place": lambda: opt_a.zero_grad(set_to_none=False), "model": a.zero_grad}[zero]()
    opt_a.backward(loss_of(a, 0))
    opt_a.step()
    assert_same(weights(a), train(opt_b, b, 1))


def alternating(groups_of, steps=12):
    """Train two heads on a body in turn, with curvature at every second step; what was told, and which heads moved."""
    torch.manual_seed(0)
    body, heads = nn.Linear(4, 4), [nn.Linear(4, 1), nn.Linear(4, 1)]
    x, before = torch.randn(16, 4), [head.weight.detach().clone() for head in heads]
    opt = AdaHessian(groups_of(body, *heads), lr=0.05, update_each=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.filterwarnings("always", "parameter .* has had")
        for i in range(steps):
            opt.zero_grad()
            opt.backward(heads[i % 2](torch.tanh(body(x))).square().mean())
            opt.step()
    messages = [str(w.message) for w in told if "has had" in str(w.message)]
    return messages, [not torch.equal(head.weight, old) for head, old in zip(heads, before, strict=True)]


def test_parameters_that_miss_the_schedule_are_told():
    messages, moved = alternating(lambda *modules: [p for m in modules for p in m.parameters()])
    assert moved == [True, False]
    assert len(messages) == 2  # weight and bias, once each
    assert messages[0].startswith("parameter 4 of group 0 has had 4 gradients but curvature 0 times")


def test_heads_in_groups_of_their_own_train():
    messages, moved = alternating(lambda *modules: [{"params": list(m.parameters())} for m in modules])
    assert messages == []
    assert moved == [True, True]


def test_another_frequency_is_no_missed_schedule():
    p, opt = nn.Parameter(torch.ones(3)), None
    opt = AdaHessian([p], lr=0.01, update_each=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(40):
            opt.param_groups[0]["update_each"] = 10 if i < 30 else 2
            opt.zero_grad()
            opt.backward((p**4).sum())
            opt.step()
