"""State dicts, checkpoints, copies: training that was interrupted goes on as if it had not been."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from models import assert_same, conv_net, fresh, mlp, train, weights
from published import AdaHessian
from tolerances import assert_within
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from ways import STYLES

OPTIONS = {
    "defaults": {},
    "every_third": {"update_each": 3},
    "stale": {"update_each": 3, "off_step": "stale"},
    "stale_blocks": {"update_each": 3, "off_step": "stale", "block_size": 4, "averaging": "abs"},
    "samples": {"n_samples": 2, "block_size": "row"},
    "gaussian": {"probe": "gaussian", "update_each": 2},
    "capturable": {"capturable": True, "update_each": 2},
    "hyperparameters": {
        "lr": 0.01,
        "betas": (0.8, 0.9),
        "eps": 1e-3,
        "weight_decay": 0.1,
        "hessian_power": 0.5,
        "seed": 77,
    },
    "maximize": {"maximize": True, "lr": 0.001},
    "stabilised": {"shrink": 3.0, "clip": 0.2, "update_each": 2, "lr": 0.01},
    "warmup": {"warmup": 4, "lr": 1.0},
    "warmup_capturable": {"warmup": 4, "lr": 1.0, "capturable": True},
    "low_products": {"hvp_dtype": torch.bfloat16},
    "rounded": {"state_dtype": torch.bfloat16},
    "rounded_stale": {"state_dtype": torch.bfloat16, "update_each": 3, "off_step": "stale", "block_size": 4},
    "rounded_shrunk": {"state_dtype": torch.bfloat16, "shrink": 3.0},
    "rounded_masters": {"state_dtype": torch.bfloat16, "master_weights": True, "lr": 1e-3},
}
COPIED = ("defaults", "stale", "stabilised", "rounded")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def through_file(state):
    """What torch.save and torch.load with weights_only make of it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def uninterrupted_and_resumed(model, between=through_file, at=2, steps=6, **options):
    """Weights after ``steps`` steps in one go, and with a new model and optimizer (of default options) after ``at``."""
    (a, opt_a), (b, opt_b) = (fresh(model, **options) for _ in range(2))
    train(opt_a, a, steps)
    train(opt_b, b, at)
    c, opt_c = fresh(model, backend=opt_b.backend, state_dtype=opt_b.state_dtype)
    c.load_state_dict(through_file(b.state_dict()))
    opt_c.load_state_dict(between(opt_b.state_dict()))
    train(opt_c, c, range(at, steps))
    assert all(opt_c.param_groups[0][name] == value for name, value in options.items() if name in opt_c.param_groups[0])
    return [*weights(a), *moments(opt_a, a)], [*weights(c), *moments(opt_c, c)]


def moments(opt, model):
    return [
        opt.state[p][key]
        for p in model.parameters()
        for key in ("exp_avg", "exp_hessian_diag_sq", "step", "hessian_step", "hessian_diag_sq_mean")
        if key in opt.state[p]
    ]


@pytest.mark.filterwarnings("ignore:hvp_dtype")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_resumed_training_is_bit_identical(device, dtype, options):
    assert_same(*reversed(uninterrupted_and_resumed(mlp(dtype, device), **options)))


@pytest.mark.parametrize("between", [lambda s: s, copy.deepcopy, through_file], ids=["as_it_is", "deepcopy", "file"])
def test_resumed_through(engine, device, between):
    found, expected = uninterrupted_and_resumed(conv_net(device=device), between, backend=engine, update_each=2)
    assert_same(expected, found)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_resumed_with_parameters_that_come_and_go(device, probe):
    def run(opt, params, frozen):
        for i in frozen:
            opt.zero_grad()
            opt.backward(sum((p**3).sum() for j, p in enumerate(params) if j != i))
            opt.step()

    make = lambda: [nn.Parameter(torch.rand(n, generator=torch.Generator().manual_seed(n)) + 1) for n in (3, 70, 5)]  # noqa: E731
    options, schedule = {"update_each": 3, "probe": probe, "lr": 0.01}, (None, 0, 0, 0, 1, 1, 2, 0, None, None)
    for at in range(1, len(schedule)):
        a, b = make(), make()
        opt_a, opt_b = AdaHessian(a, **options), AdaHessian(b, **options)
        run(opt_a, a, schedule)
        run(opt_b, b, schedule[:at])
        c = [nn.Parameter(p.detach().clone()) for p in b]
        opt_c = AdaHessian(c)
        opt_c.load_state_dict(through_file(opt_b.state_dict()))
        run(opt_c, c, schedule[at:])
        assert_same([p.detach() for p in c], [p.detach() for p in a])


@pytest.mark.parametrize("style", ["backward", "closure_standard"])
@pytest.mark.parametrize("first", ["reference", "native"])
def test_resumed_in_another_backend(engine, device, first, style):
    (a, opt_a), (b, opt_b) = fresh(mlp(device=device), backend=first), fresh(mlp(device=device), backend=engine)
    train(opt_a, a, 2, style)
    b.load_state_dict(a.state_dict())
    opt_b.load_state_dict(opt_a.state_dict())
    for x, y in zip(train(opt_b, b, [2], style), train(opt_a, a, [2], style), strict=True):
        assert_within(x, y, 64 * torch.finfo(x.dtype).eps * (y.abs().max() + 0.15), "weight")


def test_state_has_the_names_and_shapes_people_know(device):
    model, opt = fresh(mlp(torch.bfloat16, device))
    train(opt, model, 2)
    for p, state in opt.state_dict()["state"].items():
        shape = list(model.parameters())[p].shape
        assert (int(state["step"]), int(state["hessian_step"])) == (2, 2)
        for key in ("exp_avg", "exp_hessian_diag_sq"):
            assert (state[key].shape, state[key].dtype) == (shape, torch.float32)


def test_a_file_holds_no_more_than_its_tensors(device):
    small, large = nn.Parameter(torch.ones(3, device=device)), nn.Parameter(torch.ones(100_000, device=device))
    opt = AdaHessian([small, large])
    opt.backward((small**2).sum() + (large**2).sum())
    opt.step()
    state = opt.state_dict()["state"][0]
    sizes = [len(data(x)) for x in (state, {k: v for k, v in opt.state_dict()["state"][1].items() if k == "exp_avg"})]
    assert sizes[0] < 10_000
    assert sizes[1] < 450_000


def data(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_state_dict_is_a_copy(device):
    model, opt = fresh(mlp(device=device))
    train(opt, model, 1)
    state = opt.state_dict()
    before = copy.deepcopy(state["state"][0])
    train(opt, model, [1])
    assert_same([state["state"][0][key] for key in before], list(before.values()))


@pytest.mark.parametrize("options", [{}, {"update_each": 2}, {"hvp": "finite_difference"}, {"capturable": True}])
def test_states_that_are_made_by_a_blank_step_leave_training_as_it_was(options, device):
    """As torch.distributed.checkpoint makes them before it loads: gradients of zero, a step with lr = 0."""
    (a, opt_a), (b, opt_b) = (fresh(mlp(device=device), **options) for _ in range(2))
    way = "function" if "hvp" in options else "backward"
    saved = get_optimizer_state_dict(a, opt_a)
    assert {int(state["step"]) for state in saved["state"].values()} == {0}
    assert len(saved["state"]) == len(weights(a))
    assert opt_a.param_groups[0]["lr"] == 0.15
    assert_same(train(opt_a, a, 3, way), train(opt_b, b, 3, way))


def test_a_step_without_curvature_that_is_not_blank_raises(device):
    model, opt = fresh(mlp(device=device), lr=0.0)
    for grad in (torch.ones_like, torch.zeros_like):
        for p in model.parameters():
            p.grad = grad(p)
        if grad is torch.zeros_like:
            opt.param_groups[0]["lr"] = 0.1
        with pytest.raises(RuntimeError, match="this step needs curvature, but"):
            opt.step()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("options", [OPTIONS[name] for name in COPIED], ids=COPIED)
def test_copies_are_independent_and_go_on_identically(engine, device, clone, options):
    model, opt = fresh(mlp(torch.float32, device), backend=engine, **options)
    train(opt, model, 2)
    twin, twin_opt = clone((model, opt))
    before = [x.clone() for x in moments(twin_opt, twin)]
    expected = train(opt, model, [2, 3])
    assert_same(moments(twin_opt, twin), before)
    assert_same(train(twin_opt, twin, [2, 3]), expected)
    assert twin_opt.backend == engine


def test_a_pickle_is_small(device):
    model, opt = fresh(nn.Linear(300, 300).to(device))
    opt.step(lambda: model(torch.ones(1, 300, device=device)).square().sum())
    assert len(pickle.dumps(opt)) < 4 * 3 * 301 * 300 + 20_000


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_a_copy_in_the_middle_of_a_step_forgets_the_curvature(device, style):
    model, opt = fresh(mlp(device=device))
    opt.backward(model(torch.ones(1, 3, device=device).double()).sum())
    twin, twin_opt = copy.deepcopy((model, opt))
    a, opt_a = fresh(mlp(device=device))
    assert_same(train(twin_opt, twin, 2, style), train(opt_a, a, 2, style))
