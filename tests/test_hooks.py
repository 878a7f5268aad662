"""Hooks see each gradient once and never Hz, wherever they are; what they return is differentiated again."""

from __future__ import annotations

import functools
import re
import threading
from pathlib import Path

import pytest
import torch
import ways
from models import batch, mlp
from published import AdaHessian
from test_options import NAMES, WAYS
from torch import nn

from adahessian_fused import TrainStep
from adahessian_fused.hvp import without_hooks

EVALUATES = ("function", "closure_returns_loss", "closure_standard")
CASES = [
    *((way, {}) for way in ways.WAYS),
    *((way, {"hvp": hvp}) for way in EVALUATES for hvp in ("forward_over_reverse", "finite_difference")),
]
PLAIN = [(way, options) for way, options in CASES if way != "train_step" and "hvp" not in options]


def name_of(case):
    way, options = case
    return "-".join([way, *options.values()])


pytestmark = pytest.mark.filterwarnings(
    "ignore:Using backward\\(\\) with create_graph=True", "ignore:Full backward hook"
)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_hooks_between_the_leaves_run_once_with_the_gradient(case):
    way, options = case
    model = mlp()
    x, y = batch(0, model)
    opt = AdaHessian(model.parameters(), lr=0.0, **options)
    seen, held, modules = [], [], []

    def loss(x, y):
        h = model[0](x)
        h.retain_grad()
        held.append(h)
        h.register_hook(lambda g: seen.append(g.detach()))
        h.grad_fn.register_hook(lambda results, grads: seen.append(grads[0].detach()))
        h.grad_fn.register_prehook(lambda grads: seen.append(grads[0].detach()))
        torch.autograd.graph.register_multi_grad_hook((h,), lambda grads: seen.append(grads[0].detach()))
        return (model[1:](h) - y).square().mean()

    [expected] = torch.autograd.grad(loss(x, y), held[0])
    seen.clear()
    if options.get("hvp") != "forward_over_reverse":  # to which PyTorch's Function for these hooks is unknown
        model[2].register_full_backward_hook(lambda *args: modules.append("after"))
        model[2].register_full_backward_pre_hook(lambda *args: modules.append("before"))
    ways.WAYS[way](opt, loss, x, y)
    evaluations = 2 if options.get("hvp") == "finite_difference" else 1
    assert len(seen) == 4 * evaluations
    assert modules == ([] if options.get("hvp") == "forward_over_reverse" else ["before", "after"] * evaluations)
    rtol = 1e-4 if evaluations == 2 else 1e-12  # moved by 2^-23, or computed once
    for found in (*seen, held[-1].grad):
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(found).primal, expected, rtol=rtol, atol=1e-6)
        assert not found.requires_grad


def scaled(g):
    return 3 * g


def clipped(g):
    return g.clamp(-1, 1)


def powered(g):
    return g**2


CHANGES = {  # g with h = p^2 and a loss of h^2 / 2, and its derivative
    "scaled": (scaled, lambda p: 18 * p**2),
    "clipped": (clipped, lambda p: torch.where(p**2 < 1, 6 * p**2, 2)),
    "powered": (powered, lambda p: 10 * p**4),
    "stopped": (torch.zeros_like, lambda p: 0 * p),
}


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("change", CHANGES)
def test_curvature_is_of_what_a_hook_returned(case, change):
    way, options = case
    hook, d = CHANGES[change]
    p = nn.Parameter(torch.tensor([0.5, 2.0], dtype=torch.float64))
    opt = AdaHessian([p], lr=0.0, **options)

    def loss(ones):
        h = p.square()
        h.register_hook(hook)
        return h.square().sum() / 2 * ones.mean()

    ways.WAYS[way](opt, loss, torch.ones(2, dtype=torch.float64))
    rtol = 1e-5 if options.get("hvp") == "finite_difference" else 1e-12
    torch.testing.assert_close(opt.hessian_diag(p), d(p.detach()), rtol=rtol, atol=1e-12)


def in_place(g):
    with torch.no_grad():
        g.mul_(2)


LOST = r"hook.*which changes a gradient without a graph of how"
DROPPED = r"hook.*which changes a gradient and drops its tangent"
LOSES = {
    "detached": lambda g: 2 * g.detach(),
    "no_grad": torch.no_grad()(lambda g: 2 * g),
    "in_place": in_place,
    "numpy": lambda g: torch.from_numpy(2 * g.detach().numpy()),
    "constant": torch.ones_like,
    "in_part": lambda g: g + 2 * g.detach(),
    "norm": lambda g: g * (1 / g.detach().norm()).clamp(max=1),
}


def of_module(x, hook):
    module = nn.Identity()
    module.register_full_backward_hook(lambda module, results, grads: None if (g := hook(results[0])) is None else (g,))
    return module(x)


PLACES = {
    "leaf": lambda p, hook: p.register_hook(hook),
    "tensor": lambda h, hook: h.register_hook(hook),
    "node": lambda h, hook: h.grad_fn.register_prehook(lambda grads: None if (g := hook(grads[0])) is None else (g,)),
    "module": of_module,
}


def with_hook(place, hook):
    """A parameter, and a function that gives a loss of it with a hook."""
    p = nn.Parameter(torch.tensor([0.5, 2.0], dtype=torch.float64))
    if place == "leaf":
        PLACES[place](p, hook)

    def loss(ones):
        h = p.square()
        if place == "module":
            h = of_module(h, hook)
        elif place != "leaf":
            PLACES[place](h, hook)
        return h.square().sum() * ones.mean()

    return p, loss


@pytest.mark.parametrize("case", PLAIN, ids=name_of)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hook", LOSES)
def test_a_hook_that_loses_the_graph_is_an_error(case, place, hook):
    p, loss = with_hook(place, LOSES[hook])
    opt = AdaHessian([p], lr=0.1)
    with pytest.raises(RuntimeError, match=LOST):
        ways.WAYS[case[0]](opt, loss, torch.ones(2, dtype=torch.float64))
    assert p.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("place", ["leaf", "tensor", "node"])
@pytest.mark.parametrize("hook", ["detached", "numpy", "constant"])
def test_a_hook_that_loses_the_tangent_is_an_error(place, hook):
    p, loss = with_hook(place, LOSES[hook])
    opt = AdaHessian([p], lr=0.1, hvp="forward_over_reverse")
    with pytest.raises(RuntimeError, match=DROPPED):
        opt.backward(lambda: loss(torch.ones(2)))


class FixedPoint(nn.Module):
    """z = tanh(W z + x), whose adjoint equation a hook solves; or by Newton's steps from there."""

    def __init__(self, how):
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.tensor([[0.2, -0.3], [0.4, 0.1]], dtype=torch.float64))

    def forward(self, x):
        f = lambda z: torch.tanh(z @ self.weight.T + x)  # noqa: E731
        with torch.no_grad():
            z = functools.reduce(lambda z, _: f(z), range(60), torch.zeros_like(x))
        if self.how == "newton":
            for _ in range(2):
                z1 = f(z)
                jacobian = (1 - z1**2)[:, :, None] * self.weight
                z = z + torch.linalg.solve(torch.eye(2, dtype=z.dtype) - jacobian, z1 - z)
            return z
        z = f(z)
        start = z.detach().clone().requires_grad_()
        again, graph = f(start), self.how == "hook with a graph"
        pull = lambda g: torch.autograd.grad(again, start, g, retain_graph=True, create_graph=graph)[0]  # noqa: E731
        z.register_hook(lambda grad: functools.reduce(lambda g, _: pull(g) + grad, range(60), grad))
        return z


def diagonal_of_fixed_point(how, **options):
    layer, x = FixedPoint(how), torch.tensor([[0.5, -1.0], [0.3, 0.2]], dtype=torch.float64)
    opt = AdaHessian(layer.parameters(), lr=0.0, seed=0, **options)
    opt.step(lambda: layer(x).pow(3).sum())
    return opt.hessian_diag(layer.weight)


@pytest.mark.parametrize("how", ["hook", "hook with a graph"])
def test_a_hook_that_solves_for_an_implicit_layers_gradient(how):
    """Its gradient is right and its graph is that of one step: a sixth of the diagonal is missing."""
    right = diagonal_of_fixed_point("newton")
    numbers = diagonal_of_fixed_point(how, hvp="finite_difference")
    torch.testing.assert_close(numbers, right, rtol=1e-6, atol=1e-8)
    for hvp, match in (("autograd", LOST), ("forward_over_reverse", DROPPED)):
        with pytest.raises(RuntimeError, match=match):
            diagonal_of_fixed_point(how, hvp=hvp)


@pytest.mark.parametrize("module", [nn.SiLU(), nn.Mish(), nn.GroupNorm(2, 4)], ids=str)
def test_hooks_run_once_where_forward_mode_needs_the_twice_differentiable_form(module):
    model, seen = nn.Sequential(nn.Linear(3, 4), module), []
    opt = AdaHessian(model.parameters(), hvp="forward_over_reverse")
    model[0].weight.register_hook(seen.append)

    def loss():
        h = model(torch.ones(2, 3))
        h.register_hook(seen.append)
        return h.square().sum()

    opt.step(loss)
    assert len(seen) == 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hook", ["detached", "no_grad", "numpy"])
def test_finite_differences_take_what_hooks_return(place, hook):
    p, loss = with_hook(place, LOSES[hook])
    opt = AdaHessian([p], lr=0.0, hvp="finite_difference")
    opt.step(lambda: loss(torch.ones(2, dtype=torch.float64)))
    torch.testing.assert_close(opt.hessian_diag(p), 24 * p.detach().square(), rtol=1e-6, atol=0)


def test_hooks_of_another_thread_are_called_meanwhile():
    p, seen = torch.ones(3, requires_grad=True), []
    h = 2 * p
    h.register_hook(seen.append)
    with without_hooks([]):
        other = threading.Thread(target=h.sum().backward)
        other.start()
        other.join()
    assert len(seen) == 1


def test_a_pass_leaves_nothing_with_its_thread():
    """What is left there needs the GIL when the thread ends, which may be when somebody waits for it."""
    p, key = torch.ones(3, requires_grad=True), "adahessian_fused.hvp.treatment"
    opt, seen = AdaHessian([p], lr=0.0), []
    h = p * p
    h.register_hook(seen.append)
    opt.backward(h.sum())
    assert len(seen) == 1
    left = torch._C._get_obj_in_tls(key) if torch._C._is_key_in_tls(key) else "nothing"
    assert left == ("nothing" if hasattr(torch._C, "_remove_obj_from_tls") else None)


def test_a_compiled_step_calls_hooks():
    """By running eagerly where they are not on parameters, in both kinds of step."""
    model = mlp()
    seen, values = [], []
    model[0].weight.register_hook(seen.append)
    opt = AdaHessian(model.parameters(), lr=0.0, update_each=2)
    step = TrainStep(model, nn.functional.mse_loss, opt)
    x, y = batch(0, model)
    model[2].register_full_backward_hook(lambda *args: values.append(1))
    for _ in range(2):
        with pytest.warns(UserWarning, match="eagerly.*a full backward hook of a module is Python code"):
            step(x, y)
    step(x, y)
    assert len(seen) == len(values) == 3


STEPPED = {
    "scaled": (scaled, 3.0),
    "in_place": (lambda g: g.mul_(2), 2.0),
    "stopped": (torch.zeros_like, 0.0),
    "looked_at": (lambda g: None, 1.0),
    "powered": (powered, 12.0),  # 2 g
    "masked": (lambda g: g * torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 0.0]).double()),
}


@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("hook", STEPPED)
def test_curvature_in_a_graph_follows_the_hooks_of_parameters(traced, hook, n_samples):
    change, factor = STEPPED[hook]
    p = nn.Parameter(torch.tensor([2.0, 2.0], dtype=torch.float64))
    model = nn.ParameterList([p])
    opt = AdaHessian([p], lr=0.0, n_samples=n_samples)
    step = TrainStep(lambda x: (model[0] ** 3 * x).sum() / 2, opt, cuda_graph=False)
    p.register_hook(change)
    step(torch.ones(2, dtype=torch.float64))
    assert "1 with" in repr(step)
    torch.testing.assert_close(opt.hessian_diag(p), 6 * factor * torch.ones_like(p), rtol=1e-12, atol=0)


@pytest.mark.parametrize("hook", LOSES)
def test_hooks_of_parameters_beside_a_graph_may_not_lose_it(traced, hook):
    model = nn.ParameterList([torch.ones(2, dtype=torch.float64)])
    step = TrainStep(lambda x: (model[0] ** 3 * x).sum(), AdaHessian(model.parameters(), lr=0.1))
    model[0].register_hook(LOSES[hook])
    with pytest.raises(RuntimeError, match=LOST):
        step(torch.ones(2, dtype=torch.float64))
    assert model[0].tolist() == [1.0, 1.0]


# ---- docs/options.md -------------------------------------------------------------------------------------------------

HOOKS = {"once": 1, "PyTorch's": 1, "once for each part": 2, "once for each sample": 2}
HOOKS["once for each evaluation, two a sample"] = 4


def rows():
    """The page's table of leaves, hooks and ranks."""
    page = (Path(__file__).parents[1] / "docs" / "options.md").read_text()
    table = page.partition("| way | other leaves | hooks | ranks |\n")[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_the_page_has_every_way():
    strategies = ['any with `hvp="forward_over_reverse"`', 'any with `hvp="finite_difference"`']
    assert [row[0] for row in rows()] == [*NAMES, *strategies]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_page_says_what_leaves_and_hooks_get(row):
    way, leaves, hooks, _ = row
    hvp = re.search(r'hvp="(\w+)"', way)
    options = {} if hvp is None else {"hvp": hvp[1], "n_samples": 2}
    if way == "`opt.backward_split`":
        options["hessian_fraction"] = 0.5
    model, others = mlp(), nn.ParameterList([torch.ones(4, dtype=torch.float64)])
    x, y = batch(0, model)
    x.requires_grad_()
    opt = AdaHessian(model.parameters(), lr=0.0, **options)
    seen, after = [], []

    def loss(x, y):
        h = model[:3](x)
        h.register_hook(lambda g: seen.append(1))
        return (model[3:](h * others[0]) - y).square().mean()

    other = others[0]
    expected = torch.autograd.grad(loss(x, y), [other, x])
    seen.clear()
    for leaf in (other, x, model[0].weight):
        leaf.register_hook(lambda g: seen.append(1))
    other.register_post_accumulate_grad_hook(lambda p: after.append(1))
    named = dict(zip(NAMES, WAYS.values(), strict=True)) | {"`opt.step(hessian=)`": ways.diagonal}  # of one pass
    run = WAYS["backward_function"] if hvp else named[way]
    run(opt, loss, x, y)
    assert len(seen) == 4 * HOOKS[hooks]
    if leaves == "yours":
        return
    assert len(after) == (2 if "part" in hooks else 1)
    for leaf, g in zip((other, x), expected, strict=True):
        assert not leaf.grad.requires_grad
        torch.testing.assert_close(leaf.grad, g, rtol=1e-6, atol=1e-9)
