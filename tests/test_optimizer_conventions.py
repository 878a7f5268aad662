"""What users expect of any optimizer: schedulers, hooks, tied and empty parameters, groups, the functional form."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from models import assert_same, conv_net, fresh, loss_of, mlp, probe, train, weights
from published import AdaHessian
from seeds import manual_seed
from torch import nn

import adahessian_fused
from adahessian_fused import adahessian, recipes

SCHEDULERS = {
    "step": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6),
    "one_cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.3, total_steps=8),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_with_a_number_and_with_a_tensor(engine, device, scheduler):
    found = []
    for lr in (0.125, torch.tensor(0.125, dtype=torch.float64)):
        model, opt = fresh(mlp(device=device), lr=lr, betas=[0.9, 0.999], backend=engine)
        schedule = scheduler(opt)
        for i in range(4):
            train(opt, model, [i])
            schedule.step()
        found.append(weights(model))
    assert_same(found[1], found[0])


def test_step_hooks(device):
    model, opt = fresh(mlp(device=device))
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    train(opt, model, 2)
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("update_each", [1, 2])
def test_gradients_that_a_closure_has_zeroed_in_place_stay_where_they_are(device, update_each):
    p = torch.ones(3, device=device, requires_grad=True)
    opt = AdaHessian([p], lr=0.125, update_each=update_each)

    def closure():
        opt.zero_grad(set_to_none=False)
        return p.pow(3).sum()

    opt.step(closure)
    grad, before = p.grad, p.detach().clone()
    opt.step(closure)
    assert p.grad is grad
    torch.testing.assert_close(grad, 3 * before**2)


@pytest.mark.parametrize("differentiates", [True, False])
def test_a_closure_may_add_a_group(device, differentiates):
    def stepped(later: bool) -> list[torch.Tensor]:
        p, q = (torch.full((n,), 2.0, dtype=torch.float64, device=device, requires_grad=True) for n in (3, 2))
        opt = AdaHessian([p] if later else [{"params": [p]}, {"params": [q]}], lr=0.125, seed=0)

        def closure():
            opt.zero_grad()
            if len(opt.param_groups) < 2:
                opt.add_param_group({"params": [q]})
            loss = p.pow(4).sum() + q.pow(4).sum()
            if differentiates:
                opt.backward(loss)
            return loss

        opt.step(closure), opt.step(closure)
        return [p.detach(), q.detach()]

    torch.testing.assert_close(stepped(later=True), stepped(later=False), rtol=0, atol=0)


def test_many_groups_are_one_call(device, monkeypatch):
    model, calls = mlp(device=device), []
    opt = AdaHessian(
        [{"params": [p], "lr": 0.1 / (i + 1), "block_size": i + 1} for i, p in enumerate(model.parameters())]
    )
    ops = opt.layout.backends[device]
    spy = type("Spy", (), {n: staticmethod(_recorded(getattr(ops, n), n, calls)) for n in OPS})
    opt.layout.backends = {device: spy}
    train(opt, model, 1)
    assert sorted(calls) == ["adahessian_step", "rademacher"]


OPS = ("rademacher", "hessian_diag", "adahessian_step")


def _recorded(function, name, calls):
    def call(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return call


NUMBERS = {
    "lr": 0.1,
    "betas": (0.5, 0.75),
    "eps": 0.125,
    "weight_decay": 0.25,
    "hessian_power": 0.5,
    "update_each": 2,
    "n_samples": 3,
    "block_size": 4,
    "seed": 7,
    "maximize": True,
}
KINDS = {
    "scalar": lambda x: np.float64(x) if isinstance(x, float) else np.bool_(x) if x is True else np.int64(x),
    "array": np.asarray,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_numbers_of_numpy(kind):
    found = []
    for convert in (lambda x: x, kind):
        p = nn.Parameter(torch.linspace(0.5, 2.0, 8))
        options = {name: convert(x) if name != "betas" else tuple(map(convert, x)) for name, x in NUMBERS.items()}
        opt = AdaHessian([p], **options)
        for _ in range(3):
            opt.step(lambda p=p: (p**4).sum())
        opt.param_groups[0]["lr"] = convert(0.25)
        opt.step(lambda p=p: (p**4).sum())
        numbers = {name: opt.state_dict()["param_groups"][0][name] for name in NUMBERS}
        assert numbers == NUMBERS | {"lr": 0.25}
        assert {type(x).__module__ for x in numbers.values()} == {"builtins"}
        found.append(p.detach())
    assert_same(*[[x] for x in found])


def test_betas_of_any_kind():
    for betas in ([0.5, 0.75], np.array([0.5, 0.75])):
        assert AdaHessian([nn.Parameter(torch.ones(2))], betas=betas).param_groups[0]["betas"] == (0.5, 0.75)


# ---- averaging blocks ------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Parameters that have the shapes of kernels, beside kernels."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 3, 5), nn.Conv2d(2, 3, (2, 1))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
        self.conv3, self.transposed = nn.Conv3d(1, 1, 2), nn.ConvTranspose1d(2, 2, 4)
        self.experts, self.grouped = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(2, 2, 3, 4))
        self.linear = nn.Linear(2, 2)


KNOWN = {"conv1.weight": 5, "conv2.weight": 2, "conv3.weight": 8, "transposed.weight": 4}
KNOWN |= {"normed.parametrizations.weight.original1": 9}
BY_SHAPE = {"conv2.weight": 2, "conv3.weight": 8, "normed.parametrizations.weight.original1": 9, "grouped": 12}


def model_given(model):
    return AdaHessian(model, seed=1), KNOWN


def group_given(model):
    return AdaHessian([{"params": model, "lr": 0.1}], seed=1), KNOWN


def parameters_given(model):
    return AdaHessian(model.named_parameters(), seed=1), BY_SHAPE


def copied(model):
    opt, model = copy.deepcopy((AdaHessian(model, seed=1), model))
    return opt, KNOWN


def pickled(model):
    return pickle.loads(pickle.dumps(AdaHessian(model, seed=1))), KNOWN


def added(model):
    opt = AdaHessian([nn.Parameter(torch.ones(2, 3, 4))], seed=1)
    opt.add_param_group({"params": model})
    return opt, KNOWN


def named_conv2d(model):
    return AdaHessian(model, seed=1, block_size="conv2d"), {n: b for n, b in BY_SHAPE.items() if n != "conv3.weight"}


@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
@pytest.mark.parametrize(
    "make", [model_given, group_given, parameters_given, copied, pickled, added, named_conv2d], ids=lambda f: f.__name__
)
def test_which_parameters_are_averaged(make, hvp):
    """The loss is a sum over elements, so D is 12 p^2; what is not averaged has as many values as elements."""
    model = Stack().double()
    names = [name for name, _ in model.named_parameters()]
    opt, expected = make(model)
    opt.param_groups[0]["hvp"] = hvp
    params = opt.param_groups[-1]["params"]
    with torch.no_grad():
        for p in params:
            p.copy_(torch.linspace(0.5, 1.5, p.numel()).view(p.shape))
    opt.step(lambda: sum((p**4).sum() for p in params))
    for name, p in zip(names, params, strict=True):
        found = opt.hessian_diag(p).flatten()
        b = expected.get(name, 1)
        assert torch.equal(found, found[::b].repeat_interleave(b)[: p.numel()]), name
        assert len(found.unique()) == -(-p.numel() // b), name


def test_repr_says_what_is_averaged():
    assert "Averaged over blocks: conv1.weight (5), conv2.weight (2), " in repr(AdaHessian(Stack()))
    assert "Averaged over blocks: parameter 3 of group 0 (12)" in repr(
        AdaHessian([*nn.Linear(2, 2).parameters(), torch.ones(2, 3, 4), torch.ones(2, 2, 3, 4)])
    )
    assert "Averaged over blocks: nothing\n" in repr(AdaHessian(nn.Linear(2, 2).parameters()))
    assert "(3) and 12 more" in repr(AdaHessian([torch.ones(3) for _ in range(20)], block_size="tensor"))


# ---- seeds -----------------------------------------------------------------------------------------------------------


def drawn(given, steps=2, **options):
    """The sum of the probe's elements over some steps, which is their curvature."""
    manual_seed(given)
    p = nn.Parameter(torch.ones(64))
    opt = adahessian_fused.AdaHessian([p], lr=0.0, block_size="tensor", **{**recipes.published, **options})
    before, found = torch.get_rng_state(), []
    for _ in range(steps):
        opt.step(lambda: p.sum() ** 2 / 2)
        found.append(float(opt.hessian_diag(p)[0]))
    assert torch.equal(torch.get_rng_state(), before)
    return found, opt


@pytest.mark.parametrize("options", [{}, {"probe": "gaussian"}, {"hvp": "finite_difference"}], ids=str)
def test_probes_follow_manual_seed_unless_there_is_a_seed(options):
    assert drawn(7, **options)[0] == drawn(7, **options)[0] == drawn(3, seed=7, **options)[0]
    assert len({drawn(s, **options)[0][0] for s in range(10)}) > 3
    assert len({drawn(s, seed=5, **options)[0][0] for s in range(10)}) == 1


def test_a_resumed_run_goes_on_with_its_seed():
    p = nn.Parameter(torch.ones(64))
    _, opt = drawn(7, steps=1)
    manual_seed(8)
    resumed = adahessian_fused.AdaHessian([p], lr=0.0, block_size="tensor")
    resumed.load_state_dict(opt.state_dict())
    resumed.step(lambda: p.sum() ** 2 / 2)
    assert float(resumed.hessian_diag(p)[0]) == drawn(7)[0][1]


# ---- the functional form ---------------------------------------------------------------------------------------------

HYPER = {
    "lr": 0.1,
    "eps": 1e-3,
    "weight_decay": 0.1,
    "hessian_power": 0.5,
    "block_size": 3,
    "averaging": "abs",
    "seed": 9,
}


def first_and_second_order(model, i, h):
    """Gradients and Hz on batch i for the probe of Hessian step h."""
    params = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model, i), params, create_graph=True)
    z = [probe(p, j, h, HYPER["seed"]) for j, p in enumerate(params)]
    return [g.detach() for g in grads], list(torch.autograd.grad(grads, params, z))


def test_functional_form_equals_the_optimizer(engine, device):
    model, opt = fresh(conv_net(device=device), backend=engine, update_each=2, **HYPER)
    params, (m, v) = weights(model), ([torch.zeros_like(p) for p in model.parameters()] for _ in range(2))
    t, h = ([torch.zeros((), dtype=torch.int64) for _ in params] for _ in range(2))
    for i in range(4):
        grads, products = first_and_second_order(model, i, int(h[0]))
        products = products if opt.needs_hessian else None
        adahessian(params, grads, products, m, v, t, h, beta1=0.9, beta2=0.999, backend=engine, **HYPER)
        train(opt, model, [i])
    assert_same(params, weights(model))
    assert_same(m, [opt.state[p]["exp_avg"] for p in model.parameters()])
    assert_same(v, [opt.state[p]["exp_hessian_diag_sq"] for p in model.parameters()])
    assert [(int(a), int(b)) for a, b in zip(t, h, strict=True)] == [(4, 2)] * len(params)


FUNCTIONAL = {
    "stabilised": {"clip": 0.4, "shrink": 2.0},
    "rounded": {"state_dtype": torch.bfloat16, "seed": 5},
    "move": {"unmeasured": "move", "maximize": True},
}


@pytest.mark.parametrize("options", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_functional_form_with_options_and_a_diagonal(engine, device, options):
    p = nn.Parameter(torch.linspace(-1, 1, 300, device=device))
    q, opt = p.detach().clone(), AdaHessian([p], lr=0.1, backend=engine, **options)
    options = {name: value for name, value in options.items() if name != "state_dtype"}
    m, v = (torch.zeros_like(q, dtype=opt.state_dtype) for _ in range(2))
    mean = torch.zeros((), dtype=torch.float64, device=device)
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-4, "weight_decay": 0.0, "is_hvp": False}
    for i in range(3):
        g, d = torch.sin((i + 7) * q), torch.cos((i + 5) * q) * (q > -0.5)  # some have none
        p.grad = g.clone()
        opt.step(hessian=[d])
        adahessian([q], [g], [d], [m], [v], counts[:1], counts[1:], [mean], **hyper, **options, backend=engine)
    assert_same([q, m, v], [p.detach(), opt.state[p]["exp_avg"], opt.state[p]["exp_hessian_diag_sq"]])
    assert "shrink" not in options or mean == opt.state[p]["hessian_diag_sq_mean"]
    for wrong, message in (
        ({"unmeasured": 1}, 'unmeasured=1; expected "hold" or "move"'),
        ({"nesterov": "yes"}, "nesterov='yes'; expected True or False"),
        ({"cautious": None}, "cautious=None; expected True or False"),
        ({"maximize": 2}, "maximize=2; expected True or False"),
        ({"clip": -1}, r"clip=-1; expected 0\.0 < clip"),
        ({"hessian_power": 2}, r"hessian_power=2; expected 0\.0 <= hessian_power <= 1\.0"),
        ({"seed": "x"}, "seed='x'; expected a 64-bit int"),
        ({"shrink": 2.0}, r"shrink=2\.0 without hessian_diag_sq_means"),
    ):
        with pytest.raises(ValueError, match=message):
            adahessian([q], [g], [d], [m], [v], counts[:1], counts[1:], **hyper, **(options | wrong), backend=engine)
    with pytest.raises(ValueError, match="expected all of them in torch"):
        adahessian([q], [g], [d], [m.bfloat16()], [v.float()], counts[:1], counts[1:], **hyper, backend=engine)


def test_functional_form_with_a_diagonal_and_gradient_scaling(engine, device):
    p, g, d = (torch.tensor(x, device=device) for x in ([1.0, 2.0], [4.0, -8.0], [8.0, 16.0]))
    m, v, t, h = torch.zeros(2, device=device), torch.zeros(2, device=device), torch.tensor(0), torch.tensor(0)
    scale, flags = (
        torch.tensor(4.0, device=device),
        [torch.tensor(1.0, device=device), torch.tensor(0.0, device=device)],
    )
    for found_inf in flags:  # the first call does nothing
        options = {"is_hvp": False, "grad_scale": scale, "found_inf": found_inf, "backend": engine}
        adahessian(
            [p], [g], [d], [m], [v], [t], [h], lr=1.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, **options
        )
    assert_same([p, m, v, t, h], [torch.tensor(x).to(y) for x, y in (
        ([0.5, 2.5], p), ([1.0, -2.0], p), ([4.0, 16.0], p), (1, t), (1, t))])  # fmt: skip


def test_functional_form_names_what_does_not_fit(device):
    p, q, n = torch.ones(2, 3, device=device), torch.ones(3, device=device), torch.tensor(0)
    numbers = {"lr": 1.0, "beta1": 0.9, "beta2": 0.9, "eps": 0.0, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="hvps has 0 tensors; expected 1"):
        adahessian([p], [p], [], [p], [p], [n], [n], **numbers)
    for name, args in {"grads": ([q], [p], [p]), "hvps": ([p], [q], [p]), "exp_avg": ([p], [p], [q])}.items():
        with pytest.raises(ValueError, match=rf"{name}.*\(3,\); expected.*\(2, 3\)"):
            adahessian([p], args[0], args[1], args[2], [p], [n], [n], **numbers)


@pytest.mark.parametrize("compiled", ["step", "loop"])
def test_in_a_compiled_function(compiled):
    results = []
    for compile_ in (lambda f: f, partial(torch.compile, backend="eager")):
        model, opt = fresh(mlp(), update_each=2)

        def train(x, model=model, opt=opt, compile_=compile_):
            opt.zero_grad()
            loss = model(x).square().mean()
            opt.backward(loss)
            (opt.step if compiled == "loop" else compile_(opt.step))()
            return loss

        call = compile_(train) if compiled == "loop" else train
        results.append([call(torch.full((2, 3), 0.1 * i, dtype=torch.float64)).item() for i in range(4)])
    assert results[0] == results[1]
