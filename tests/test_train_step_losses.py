"""TrainStep takes any loss: forms of batches and of results, losses of all kinds, and what it tells of itself."""

from __future__ import annotations

import collections
import dataclasses
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import batch, conv_net, fresh, mlp, weights
from published import AdaHessian
from test_train_step import assert_close
from torch import Tensor

from adahessian_fused import TrainStep


@dataclasses.dataclass
class Example:
    x: Tensor
    y: Tensor
    name: str = "example"


Pair = collections.namedtuple("Pair", ["x", "y"])
FORMS = {
    "dataclass": (Example, lambda b: (b.x, b.y)),
    "named_tuple": (Pair, lambda b: (b.x, b.y)),
    "mapping": (lambda x, y: collections.UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "nested": (lambda x, y: {"more": [Example(x, y), None]}, lambda b: (b["more"][0].x, b["more"][0].y)),
}


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_batches(device, traced, form, fraction):
    make, values = FORMS[form]
    (a, opt_a), (b, opt_b) = (fresh(mlp(device=device), lr=0.01, hessian_fraction=fraction) for _ in range(2))

    def loss_of(model, data):
        x, y = values(data)
        return F.mse_loss(model(x), y)

    step = TrainStep(lambda data: loss_of(a, data), opt_a, cuda_graph=False)
    for i in range(3):
        data = make(*batch(i, a))
        opt_b.zero_grad()
        loss = opt_b.backward_split(lambda data: loss_of(b, data), data)
        opt_b.step()
        assert_close([step(data)], [loss])
    assert_close(weights(a), weights(b))
    assert len(step._graphs) == 1


def test_axes_count_only_where_a_part_is_asked_for(device, traced):
    model, opt = fresh(mlp(device=device), lr=0.01)
    step = TrainStep(lambda pair, extra: model(pair[0]).mean() * pair[1].mean(), opt, cuda_graph=False)
    pair = torch.ones(16, 3, dtype=torch.float64, device=device), torch.ones(5, device=device)
    expected = model(pair[0]).mean().detach()
    assert_close([step(pair, None)], [torch.ones((), dtype=torch.float64, device=device) * expected])
    opt.param_groups[0]["hessian_fraction"] = 0.5
    with pytest.raises(ValueError, match="first axes"):
        step(pair, None)


RESULTS = {
    "tuple": (lambda loss, out: (loss, out, "text"), lambda r: (r[0], r[1])),
    "mapping": (lambda loss, out: {"outputs": out, "loss": loss}, lambda r: (r["loss"], r["outputs"])),
}


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("how", ["eager", "traced"])
@pytest.mark.parametrize("form", RESULTS)
def test_more_than_the_loss_comes_back(device, traced, form, how, fraction):
    make, values = RESULTS[form]
    model, opt = fresh(mlp(device=device), lr=0.0, hessian_fraction=fraction)
    step = TrainStep(
        lambda x, y: make(F.mse_loss(model(x), y), model(x)), opt, compile=how == "traced", cuda_graph=False
    )
    x, y = batch(0, model)
    for _ in range(2):
        loss, outputs = values(step(x, y))
        assert not loss.requires_grad
        assert not outputs.requires_grad
        assert_close([loss, outputs], [F.mse_loss(model(x), y).detach(), model(x).detach()])


def with_tensor(device):
    w = torch.ones(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    return [w], lambda x, y: (torch.tanh(x @ w) - y).square().mean()


def with_hidden_module(device):
    """A loss that does not show what it uses."""
    held = [conv_net(device=device)]
    return list(held[0].parameters()), lambda x, y: F.mse_loss(held[0](x), y)


def with_derivative(device):
    model = mlp(device=device)

    def loss(x, y):
        x = x.requires_grad_()
        outputs = model(x)
        (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        return slope.square().mean() + (outputs - y).square().mean()

    return list(model.parameters()), loss


def with_inner_steps(device):
    """Of gradient descent from the weights, as in meta-learning."""
    model = mlp(device=device)
    loss_with = lambda w, x, y: F.mse_loss(torch.func.functional_call(model, w, (x,)), y)  # noqa: E731

    def loss(x, y):
        w = dict(model.named_parameters())
        for _ in range(2):
            grads = torch.autograd.grad(loss_with(w, x, y), list(w.values()), create_graph=True)
            w = {name: p - 0.1 * g for (name, p), g in zip(w.items(), grads, strict=True)}
        return loss_with(w, x.flip(0), y)

    return list(model.parameters()), loss


def with_fixed_point(device):
    """An implicit layer: Newton's steps from a solution that was found without a graph."""
    weight = torch.full((3, 3), 0.2, dtype=torch.float64, device=device, requires_grad=True)

    def loss(x, y):
        f = lambda z: torch.tanh(z @ weight.T + x)  # noqa: E731
        with torch.no_grad():
            z = functools.reduce(lambda z, _: f(z), range(40), torch.zeros_like(x))
        for _ in range(2):
            jacobian = (1 - f(z) ** 2)[:, :, None] * weight
            z = z + torch.linalg.solve(torch.eye(3, dtype=z.dtype, device=device) - jacobian, f(z) - z)
        return F.mse_loss(z[:, :2], y)

    return [weight], loss


KINDS = [with_tensor, with_hidden_module, with_derivative, with_inner_steps, with_fixed_point]


def with_compiled_model(device):
    model = mlp(device=device)
    compiled = torch.compile(model, backend="eager")
    return list(model.parameters()), lambda x, y: F.mse_loss(compiled(x), y)


@pytest.mark.parametrize("make", [*KINDS, with_compiled_model])
def test_losses_of_all_kinds(device, traced, make):
    (params_a, loss_a), (params_b, loss_b) = make(device), make(device)
    opt_a, opt_b = (AdaHessian(params, lr=0.01, update_each=2) for params in (params_a, params_b))
    step = TrainStep(loss_a, opt_a, cuda_graph=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "TrainStep")
        for i in range(4):
            x, y = batch(i, mlp(device=device))
            opt_b.zero_grad()
            loss = loss_b(x.clone(), y)
            opt_b.backward(loss)
            opt_b.step()
            assert_close([step(x.clone(), y)], [loss.detach()])
    assert_close([p.detach() for p in params_a], [p.detach() for p in params_b])
    assert len(step._graphs) == 2


MISTAKEN = {
    "a loss of the batch, and a model": (lambda m, f, opt: (m, f, opt), "mat1 and mat2 shapes", "for a loss_of"),
    "a loss of the model": (lambda m, f, opt: (lambda model, x, y: f(x, y), opt), "missing 1 required", "a loss_of"),
    "a model alone": (lambda m, f, opt: (m, opt), "takes 2 positional arguments", "a loss_of"),
}


@pytest.mark.parametrize(("arguments", "why", "instead"), MISTAKEN.values(), ids=MISTAKEN)
def test_a_loss_that_is_called_in_another_way(device, arguments, why, instead):
    model = torch.nn.Linear(3, 2).to(device)
    opt = AdaHessian(model.parameters())
    x, y, before = torch.ones(5, 3, device=device), torch.ones(5, 2, device=device), str(opt.state_dict())
    step = TrainStep(*arguments(model, lambda x, y: F.mse_loss(model(x), y), opt), compile=False)
    said = rf"called loss_.* with Tensor \(5, 3\), Tensor \(5, 2\), which failed: .*{why}.*; expected .*{instead}"
    with pytest.raises((TypeError, RuntimeError), match=said):
        step(x, y)
    assert str(opt.state_dict()) == before


def test_a_loss_that_fails_later_says_so_itself(device):
    model = torch.nn.Linear(3, 2).to(device)
    step = TrainStep(lambda x: model(x).square().mean(), AdaHessian(model.parameters()), compile=False)
    step(torch.ones(5, 3, device=device))
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes"):
        step(torch.ones(5, 4, device=device))


def test_what_it_tells_of_itself(device, traced):
    model, opt = fresh(mlp(device=device), lr=0.01, update_each=2)
    step = TrainStep(model, F.mse_loss, opt, cuda_graph=False)
    for i in range(3):
        step(*batch(i, model))
    assert repr(step) == "TrainStep(Sequential, mse_loss, AdaHessian; graphs: 1 with curvature, 1 without curvature)"
    again = pickle.loads(pickle.dumps(step))
    assert_close([again(*batch(3, model))], [step(*batch(3, model))])
    assert_close(weights(again.model), weights(model))


@pytest.mark.parametrize("value", [None, [], {"total": 1}, "text"], ids=str)
def test_a_loss_function_without_a_loss(device, value):
    _, opt = fresh(mlp(device=device))
    with pytest.raises(TypeError, match="the loss function returned"):
        TrainStep(lambda: value, opt, compile=False, cuda_graph=False)()


def test_it_says_what_is_waited_for(device, traced, caplog):
    model, opt = fresh(mlp(device=device), update_each=2)
    step = TrainStep(model, F.mse_loss, opt, cuda_graph=False)
    with caplog.at_level("INFO", "adahessian_fused"):
        step(*batch(0, model))
        step(*batch(1, model))
    first = [f"TrainStep makes a graph for steps {order} curvature; " for order in ("with", "without")]
    assert [m for m in caplog.messages if "makes" in m] == [f + "the compiler may take minutes" for f in first]
    # What comes in mid-training is heard where nobody has asked for it.
    assert [r.levelname for r in caplog.records if "makes" in r.getMessage()] == ["INFO", "WARNING"]
    assert repr(step).endswith("graphs: 1 with curvature, 1 without curvature)")
