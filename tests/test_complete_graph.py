"""Losses whose gradient lacks a part of its graph are refused in every way of stepping; what is linear is not."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import ways
from functions import function, kinds
from published import AdaHessian
from strategies import BOUND
from tolerances import assert_error
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from adahessian_fused import TrainStep, check_hvp, curvature_friendly, hutchinson_diagonal
from adahessian_fused.reference import rademacher_signs


class HandMade(Function):
    """A ReLU that has its double backward in a Function of its own, as many extensions do."""

    @staticmethod
    def forward(ctx, x):
        y = x.clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return HandMadeBackward.apply(g, ctx.saved_tensors[0])


class HandMadeBackward(Function):
    @staticmethod
    def forward(ctx, g, y):
        ctx.save_for_backward(y)
        return g * (y > 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, v):
        return v * (ctx.saved_tensors[0] > 0), None


def dropout(ctx, x):
    mask = (torch.linspace(0, 1, x.numel()).view_as(x) > 0.5).to(x) * 2
    ctx.save_for_backward(mask)
    return x * mask


INCOMPLETE = kinds(lambda x: x**3, lambda x: 3 * x**2)
COMPLETE = {
    "cube": INCOMPLETE.pop("complete"),
    "unused": function(  # as for logging
        lambda ctx, x: ctx.save_for_backward(x, 3 * x**2) or x**3, lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2
    ),
    "identity": function(lambda ctx, x: x.view_as(x), lambda ctx, g: g),
    "straight_through": function(
        lambda ctx, x: ctx.save_for_backward(x.abs() < 2) or x.round(), lambda ctx, g: g * ctx.saved_tensors[0]
    ),
    "sign": function(lambda ctx, x: x.sign(), lambda ctx, g: torch.zeros_like(g)),
    "dropout": function(dropout, lambda ctx, g: g * ctx.saved_tensors[0]),
    "hand_made": HandMade,
    "declared": function(
        lambda ctx, x: ctx.save_for_backward(x * 0 + 7) or x**3,
        lambda ctx, g: g * ctx.saved_tensors[0],
        twice_differentiable=True,
    ),
}


def linear_by_hand(ctx, x, weight):
    ctx.save_for_backward(x, weight)
    return x @ weight


def gradients_of_linear(ctx, g):
    x, weight = ctx.saved_tensors
    return g @ weight.t() if ctx.needs_input_grad[0] else None, x.t() @ g


Linear = function(linear_by_hand, gradients_of_linear)


WAYS = {
    "given": ways.WAYS["backward"],
    "function": ways.WAYS["function"],
    "closure": ways.WAYS["closure_standard"],
    "hooked": ways.WAYS["hook_backward"],
    "create_graph": ways.WAYS["create_graph"],
    "estimate": lambda opt, loss: hutchinson_diagonal(loss, opt.param_groups[0]["params"]),
}
TAILS = {
    "linear": lambda op, h: op(h).sum(),
    "square": lambda op, h: op(h).square().sum(),
    "residual": lambda op, h: (h + op(h)).square().sum(),
    "checkpoint": lambda op, h: checkpoint(op, h, use_reentrant=False).square().sum(),
}


def problem(op, tail):
    """Parameters, and a loss in which an operator comes last, or before a square, with a residual, in a checkpoint."""
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2))

    def loss():
        h = p * 1.5
        return TAILS[tail](op.apply, h) + (q * h.detach()).square().sum()

    return [p, q], loss


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", INCOMPLETE)
def test_a_gradient_without_its_whole_graph_is_refused(name, way, tail):
    params, loss = problem(INCOMPLETE[name], tail)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"autograd.Function.*cannot be differentiated twice.*save_for_backward"):
        WAYS[way](AdaHessian(params), loss)
    assert all(map(torch.equal, before, params))


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", INCOMPLETE)
def test_beside_a_process_group_it_is_refused_as_well(name, tail, one_rank):
    params, loss = problem(INCOMPLETE[name], tail)
    opt = AdaHessian(params, process_group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match=r"autograd.Function.*cannot be differentiated twice"):
        opt.backward(loss())


def test_no_rank_waits_for_a_call_out_of_turn(one_rank):
    calls = []

    def backward(ctx, g):
        calls.append("begun")
        dist.all_reduce(g.detach().clone())
        calls.append("done")
        return g * 3 * ctx.saved_tensors[0] ** 2

    params, loss = problem(function(lambda ctx, x: ctx.save_for_backward(x) or x**3, backward), "linear")
    AdaHessian(params, process_group=dist.group.WORLD).backward(loss())
    assert calls == ["begun", "done", "begun"]


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", COMPLETE)
def test_complete_graphs_pass(name, way, tail):
    params, loss = problem(COMPLETE[name], tail)
    WAYS[way](AdaHessian(params), loss)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("way", WAYS)
def test_a_linear_layer_of_ones_own_passes(way):
    """It keeps its input, which has no graph, beside a weight that its own gradient does not need."""
    a, b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 2))
    x = torch.randn(4, 3)
    WAYS[way](AdaHessian([a, b]), lambda: Linear.apply(torch.tanh(Linear.apply(x, a)), b).square().sum())


def test_a_checkpoint_is_run_again_without_a_trace():
    """Kinds of Functions that are new are looked at in one more forward pass of the checkpoint that they are in."""
    op = COMPLETE["cube"]
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    twin = copy.deepcopy(model)
    for net, custom in ((model, True), (twin, False)):
        x = torch.ones(4, 3).tril()
        opt = AdaHessian(net.parameters())
        cube = op.apply if custom else lambda x: x**3
        opt.backward(checkpoint(lambda x: cube(net(x)), x, use_reentrant=False).square().sum())  # noqa: B023
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_is_linear_in_all_parameters(way):
    p = nn.Parameter(torch.ones(3))
    WAYS[way](AdaHessian([p]), lambda: (p * torch.arange(3)).sum())
    assert torch.equal(p, torch.ones(3))


def test_a_train_step_of_a_loss_that_is_linear_in_all_parameters():
    p = nn.Parameter(torch.ones(3))
    TrainStep(lambda x: (p * x).sum(), optimizer=AdaHessian([p]), compile=False)(torch.arange(3.0))
    assert torch.equal(p, torch.ones(3))


# ---- what PyTorch differentiates wrong -------------------------------------------------------------------------------


def weight_norm(by_hand, v, g):
    return v * g / v.norm(dim=1, keepdim=True) if by_hand else torch._weight_norm(v, g, 0)


def layer_norm(by_hand, v, g):
    x = v * g
    centred = x - x.mean(1, keepdim=True)
    by_definition = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return by_definition if by_hand else nn.functional.layer_norm(x, (3,))


def batch_norm(by_hand, v, g):
    return layer_norm(True, (v * g).mT, 1).mT if by_hand else nn.functional.batch_norm(v * g, None, None, training=True)


def squared_slope(y, v):
    (slope,) = torch.autograd.grad(y.pow(3).sum(), v, create_graph=True)
    return slope.square().sum()


WRONG = {  # an operator, and a loss of its result that needs a derivative which PyTorch has wrong
    "weight_norm": (weight_norm, lambda y, v: y.pow(3).sum()),
    "layer_norm": (layer_norm, squared_slope),
    "batch_norm": (batch_norm, squared_slope),
}


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("friendly", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WRONG)
def test_derivatives_that_pytorch_has_wrong_are_right_or_refused(name, way, friendly):
    torch.manual_seed(0)
    op, of = WRONG[name]
    v, g = (nn.Parameter(torch.randn(4, n, dtype=torch.float64)) for n in (3, 1))

    def loss(by_hand=False):
        with curvature_friendly() if friendly else contextlib.nullcontext():
            return of(op(by_hand, v, g), v)

    opt = AdaHessian([v, g], lr=0.0, betas=(0.9, 0.0), block_size=1, seed=0)
    z = [rademacher_signs(p.numel(), i, torch.tensor(0), 0, 0).view_as(p) for i, p in enumerate((v, g))]
    grads = torch.autograd.grad(loss(by_hand=True), (v, g), create_graph=True)
    expected = torch.autograd.grad(grads, (v, g), [s.to(v) for s in z])
    if not friendly and way not in ("function", "closure"):
        with pytest.raises(RuntimeError, match=rf"{name}.*PyTorch has.*curvature_friendly\(model, opt\)"):
            WAYS[way](opt, loss)
        return
    found = WAYS[way](opt, loss)
    if way == "estimate":
        found = [d.abs() for d in hutchinson_diagonal(loss, [v, g], block_size=1, seed=0)]
    else:
        found = [opt.hessian_diag(p) for p in (v, g)]
    assert_error(found, [d.abs() for d in expected], BOUND["autograd"])


def unlike_the_first(op, loss):
    """A loss that has another term from its second evaluation on."""
    calls = []

    def lazy():
        calls.append(None)
        return loss() if len(calls) == 1 else loss() + op()

    return lazy


@pytest.mark.parametrize("way", ["given", "function", "closure", "hooked", "create_graph"])
def test_every_step_is_looked_at(way):
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    later = lambda: (q * checkpoint(lambda x: (p * x).tanh(), x, use_reentrant=True)).square().sum()  # noqa: E731
    loss = unlike_the_first(later, lambda: (p * q).pow(4).sum())
    opt = AdaHessian([p, q])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WAYS[way](opt, loss)
        opt.zero_grad()
        with pytest.raises(RuntimeError, match="use_reentrant=True"):
            WAYS[way](opt, loss)


def test_curvature_of_a_penalty_in_later_steps_is_right_or_refused():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    x = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)

    def loss(with_penalty):
        score = critic(x)
        penalty = torch.autograd.grad(score.sum(), x, create_graph=True)[0].square().mean() if with_penalty else 0
        return nn.functional.softplus(-score).mean() + penalty

    found = []
    for friendly in (False, True):
        opt = AdaHessian(critic.parameters(), lr=0.0, betas=(0.9, 0.0))
        for with_penalty in (False, True):
            opt.zero_grad()
            if not friendly:
                opt.backward(loss(with_penalty))
            else:
                try:
                    opt.backward(lambda: loss(with_penalty))  # noqa: B023
                except RuntimeError as refused:
                    assert "differentiated twice" in str(refused)  # noqa: PT017
                    return
            opt.step()
        found.append([opt.hessian_diag(p) for p in critic.parameters()])
    assert_error(*found, BOUND["autograd"])


def test_check_hvp_does_not_trust_an_incomplete_graph():
    model = nn.Linear(3, 3).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    loss = lambda m, x: INCOMPLETE["no_grad"].apply(m(x)).sum()  # noqa: E731
    result = check_hvp(model, loss, (x,), repeats=1, show=False)
    assert not result["autograd"].trusted
    assert result["finite_difference"].failure is None


def test_train_step_refuses_an_incomplete_graph():
    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    step = TrainStep(
        model, lambda y, _: INCOMPLETE["no_grad"].apply(y).sum(), AdaHessian(model.parameters()), compile=False
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        step(x, x)


def test_random_numbers_and_kept_tensors_stay_as_they_are():
    params, loss = problem(COMPLETE["cube"], "square")
    before, state = [p.detach().clone() for p in params], torch.get_rng_state()
    with curvature_friendly():
        AdaHessian(params).backward(loss())
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, before, params))
