"""torch.set_default_device, torch.device as a context and torch.set_default_dtype change nothing, however one steps."""

from __future__ import annotations

import contextlib

import pytest
import torch
from models import assert_same, batch, conv_net, mlp
from published import AdaHessian
from torch import nn
from ways import EVERY

from adahessian_fused import TrainStep, adahessian, check_hvp, hutchinson_diagonal

F32 = torch.float32


@contextlib.contextmanager
def default_device(device):
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before if before.type != "cpu" else None)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "set_default_device": lambda: default_device("meta"),
    "with_device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


# ---- ways of stepping: (model, optimizer, loss function of the model, inputs and targets) ----------------------------


def plain(name):
    def way(model, opt, loss_of, x, y):
        EVERY[name](opt, lambda x, y: loss_of(model(x), y), x, y)

    way.__name__ = name
    return way


def micro_batches(model, opt, loss_of, x, y):
    opt.zero_grad()
    for part in (slice(0, 3), slice(3, 8)):
        opt.backward(loss_of(model(x[part]), y[part]), batch_size=3)
    opt.step()


def scaler_given(model, opt, loss_of, x, y):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    opt.zero_grad()
    opt.backward(lambda: loss_of(model(x), y), grad_scaler=scaler)
    scaler.step(opt)
    scaler.update()


def train_step_scaled(model, opt, loss_of, x, y):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    TrainStep(model, loss_of, opt, compile=False, cuda_graph=False, grad_scaler=scaler)(x, y)


PLAIN = ("needs_hessian", "closure_standard", "hook_backward", "train_step", "scaled", "diagonal")
backward, closure, function, split = map(plain, ("backward", "closure_returns_loss", "function", "backward_split"))
WAYS = [*map(plain, PLAIN), backward, closure, function, split, micro_batches, scaler_given]
WAYS += [train_step_scaled]
OPTIONS = {
    "defaults": {},
    "averages": {"block_size": 4, "averaging": "abs", "n_samples": 2},
    "stale": {"update_each": 2, "off_step": "stale"},
    "gaussian": {"probe": "gaussian"},
    "rounded": {"state_dtype": torch.bfloat16},
    "capturable": {"capturable": True},
    "finite_difference": {"hvp": "finite_difference"},
    "forward_over_reverse": {"hvp": "forward_over_reverse"},
}
CASES = [(way, {"hessian_fraction": 0.5} if way in (split, train_step_scaled) else {}) for way in WAYS]
CASES += [(backward, OPTIONS[name]) for name in ("averages", "stale", "gaussian", "rounded", "capturable")]
CASES += [(way, OPTIONS[name]) for way in (closure, function, scaler_given) for name in [*OPTIONS][-2:]]
CASES += [(function, OPTIONS["finite_difference"] | {"probe": "gaussian"})]


def mse(output, target):
    return (output - target).square().mean()


def steps(way, options, where, make=mlp):
    """Parameters and statistics after three steps, of which the second leaves a parameter out."""
    model = make(F32)
    opt = AdaHessian(model.parameters(), lr=0.01, seed=1, **options)
    batches = [batch(i, model) for i in range(3)]
    with where():
        for i, (x, y) in enumerate(batches):
            model[0].bias.requires_grad_(i != 1)
            way(model, opt, mse, x, y)
        numbers = opt.statistics().as_dict()
        opt.load_state_dict(opt.state_dict())
        found = [*model.parameters(), *(s["exp_hessian_diag_sq"] for s in opt.state.values())]
    return [x.detach() for x in found], numbers


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("where", DEFAULTS.values(), ids=DEFAULTS)
@pytest.mark.parametrize(("way", "options"), CASES, ids=[f"{way.__name__}-{o}" for way, o in CASES])
def test_steps(way, options, where):
    expected, numbers = steps(way, options, contextlib.nullcontext)
    found, same_numbers = steps(way, options, where)
    assert_same(found, expected)
    assert same_numbers == numbers


@pytest.mark.parametrize("where", DEFAULTS.values(), ids=DEFAULTS)
@pytest.mark.parametrize("way", [closure, backward])
def test_models_of_other_operators(way, where):
    found = [steps(way, {}, each, conv_net) for each in (where, contextlib.nullcontext)]
    assert_same(found[0][0], found[1][0])


@pytest.mark.parametrize("where", DEFAULTS.values(), ids=DEFAULTS)
def test_master_weights_in_two_buckets(engine, where):
    found = []
    for each in (where, contextlib.nullcontext):
        params = [nn.Parameter(torch.linspace(0.5, 2, 6, dtype=d)) for d in (F32, torch.bfloat16, torch.float16)]
        opt = AdaHessian(params, master_weights=True, backend=engine, seed=1)
        with each():
            for _ in range(2):
                opt.step(lambda params=params: sum((p.float() ** 4).sum() for p in params))
        found.append([p.detach() for p in params])
    assert_same(*found)


@pytest.mark.parametrize("where", DEFAULTS.values(), ids=DEFAULTS)
def test_functions(engine, where):
    found = []
    for each in (where, contextlib.nullcontext):
        p, g, m, v = (torch.linspace(1, 2, 6, dtype=F32) for _ in range(4))
        q, counts = torch.linspace(1, 2, 6, dtype=F32, requires_grad=True), [torch.tensor(0), torch.tensor(0)]
        numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-4, "weight_decay": 0.1}
        with each():
            options = {"seed": 1, "backend": engine}
            adahessian([p], [g], [g], [m], [v], counts[:1], counts[1:], **numbers, **options)
            d = hutchinson_diagonal((q.sum() ** 3), [q], n_samples=3, block_size=2, **options)
            d += hutchinson_diagonal(lambda q=q: q.sum() ** 3, [q], probe="gaussian", averaging="abs", **options)
        found.append([p, m, v, *counts, *d])
    assert_same(*found)


@pytest.mark.parametrize("where", DEFAULTS.values(), ids=DEFAULTS)
def test_check_hvp(where):
    model = mlp(F32)
    x = batch(0, model)
    with where():
        found = check_hvp(model, lambda model, x, y: mse(model(x), y), x, show=False)
    assert {way.strategy: way.failure for way in found.strategies if way.failure} == {}
