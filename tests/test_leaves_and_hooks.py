"""Every way of stepping treats leaves and hooks as ``loss.backward()`` does, and knows whose gradients it meets."""

from __future__ import annotations

import _thread
import contextlib
import signal

import pytest
import torch
import ways
from fuzz.failures import FailsAt
from models import assert_same, batch, mlp
from published import AdaHessian
from torch import nn

from adahessian_fused.update import Parts


def split(opt, loss):
    opt.param_groups[0]["hessian_fraction"] = 0.5
    opt.backward_split(lambda x: loss() * x.mean(), torch.ones(2, dtype=torch.float64))


WAYS = {
    "given": ways.WAYS["backward"],
    "function": ways.WAYS["function"],
    "closure": ways.WAYS["closure_standard"],
    "closure_of_the_loss": ways.WAYS["closure_returns_loss"],
    "hooked": ways.WAYS["hook_backward"],
    "split": split,
}
EVALUATED = {"function", "closure", "closure_of_the_loss"}
CASES = [
    *((way, {}) for way in WAYS),
    *((way, {"update_each": 2}) for way in WAYS),  # the step looked at has no curvature then
    *((way, {"hvp": "forward_over_reverse"}) for way in sorted(EVALUATED)),
    *((way, {"hvp": "finite_difference"}) for way in sorted(EVALUATED)),
]


def name_of(case):
    way, options = case
    return "-".join([way, *map(str, options.values())])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_leaf_gets_what_backward_gives(case, device):
    """Parameters of another optimizer, an input, and one that has a gradient already."""
    way, options = case
    model = mlp(device=device)
    ours, others = model[:2], model[2:]
    x, y = batch(0, model)
    x.requires_grad_()
    opt = AdaHessian(ours.parameters(), lr=0.0, **options)
    loss = lambda: (model(x) - y).square().mean()  # noqa: E731
    if "update_each" in options:
        opt.step(loss)
        opt.zero_grad()
    leaves = [*model.parameters(), x]
    expected = torch.autograd.grad(loss(), leaves)
    for leaf in (x, *others.parameters()):
        leaf.grad = None
    x.grad = torch.ones_like(x)
    WAYS[way](opt, loss)
    for leaf, g in zip(leaves, expected, strict=True):
        assert not leaf.grad.requires_grad
        torch.testing.assert_close(leaf.grad, g + 1 if leaf is x else g, rtol=1e-6, atol=1e-8)


def test_other_leaves_lose_their_graph_after_create_graph(device):
    model = mlp(device=device)
    x, y = batch(0, model)
    x.requires_grad_()
    opt = AdaHessian(model[:2].parameters(), lr=0.0)
    loss = (model(x) - y).square().mean()
    expected = torch.autograd.grad(loss, [*model.parameters(), x], retain_graph=True)
    ways.WAYS["create_graph"](opt, lambda: loss)
    for leaf, g in zip([*model.parameters(), x], expected, strict=True):
        assert not leaf.grad.requires_grad
        torch.testing.assert_close(leaf.grad, g)


EVERY_WAY = [
    *((way, {}) for way in ways.WAYS),
    *((way, {"hvp": hvp}) for way in sorted(EVALUATED) for hvp in ("finite_difference", "forward_over_reverse")),
]


@pytest.mark.parametrize("how", ["in_place", "by_data", "replaces"])
@pytest.mark.parametrize("case", EVERY_WAY, ids=name_of)
def test_a_hook_that_changes_what_was_accumulated_leaves_curvature_alone(case, how, device):
    """It runs once, and what it makes of p.grad is the gradient of the step."""
    way, options = case
    found = []
    for hooked in (False, True):
        model, calls = mlp(device=device), []
        x, y = batch(0, model)
        opt = AdaHessian(model.parameters(), lr=0.0, seed=0, **options)
        for p in model.parameters() if hooked else ():

            def tripled(p, calls=calls):
                calls.append(p)
                if how == "replaces":
                    p.grad = 3 * p.grad
                elif how == "by_data":  # which no version counts
                    p.grad.data *= 3
                else:
                    p.grad *= 3

            p.register_post_accumulate_grad_hook(tripled)
        (WAYS | ways.WAYS)[way](opt, lambda: (model(x) - y).square().mean())  # noqa: B023
        found.append([(p.grad.detach(), opt.hessian_diag(p)) for p in model.parameters()])
        assert len(calls) == hooked * len(found[0])
    for (g, d), (tripled_g, same_d) in zip(*found, strict=True):
        assert_same([tripled_g, same_d], [3 * g, d])


def test_an_optimizer_in_a_hook_may_step():
    """Gradients that are used and dropped as they come."""
    body, head = nn.Linear(3, 3), nn.Linear(3, 1)
    opt, sgd = AdaHessian(body.parameters()), torch.optim.SGD(head.parameters(), lr=0.1)
    before = head.weight.detach().clone()

    def step(p):
        sgd.step()
        p.grad = None

    head.weight.register_post_accumulate_grad_hook(step)
    opt.backward(head(torch.tanh(body(torch.ones(2, 3)))).square().sum())
    opt.step()
    assert head.weight.grad is None
    assert not torch.equal(head.weight, before)


# ---- whose gradients they are ----------------------------------------------------------------------------------------


def power(p, a):
    """A loss whose Hessian is diagonal, 12 a p^2."""
    return (a * p**4).sum()


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("zeroed", [False, True], ids=["none", "zeros"])
def test_backward_passes_of_both_kinds_do_not_mix(first, zeroed):
    p = nn.Parameter(torch.tensor([0.5, 2.0]))
    opt = AdaHessian([p], lr=0.1)
    if zeroed:
        p.grad = torch.zeros_like(p)
    passes = [lambda: opt.backward(power(p, 1.0)), lambda: power(p, 3.0).backward(), opt.step]
    if first == "theirs":
        passes[:2] = passes[1::-1]
    with pytest.raises(RuntimeError, match="added to gradients of this step without their curvature"):
        [run() for run in passes]
    assert torch.equal(p, torch.tensor([0.5, 2.0]))
    opt.zero_grad()
    opt.backward(power(p, 2.0))
    opt.step()
    torch.testing.assert_close(opt.hessian_diag(p), torch.tensor([6.0, 96.0]))


def test_other_models_and_clipping_are_no_mixture():
    p, q = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    opt = AdaHessian([p])
    for _ in range(3):
        opt.backward(power(p, 1.0) / 2)
        power(q, 1.0).backward()
        nn.utils.clip_grad_norm_([p], 0.1)
        opt.backward(power(p, 1.0) / 2)
        nn.utils.clip_grad_norm_([p], 0.1)
        opt.step()
        opt.zero_grad()
    assert opt.state[p]["hessian_step"] == 3


DROPS = {
    "none": lambda p: setattr(p, "grad", None),
    "zeros": lambda p: p.grad.zero_(),
    "replaced": lambda p: setattr(p, "grad", torch.zeros_like(p)),
}


PASSES = {"ours": lambda opt, loss: opt.backward(loss), "graphs": lambda opt, loss: loss.backward(create_graph=True)}


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
@pytest.mark.parametrize("differentiate", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("n_samples", [1, 2])
def test_curvature_goes_with_its_gradient(drop, differentiate, n_samples):
    """Of one of two parameters, whose batch was skipped."""
    p, q = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    opt = AdaHessian([p, q], lr=0.0, n_samples=n_samples)
    differentiate(opt, power(p, float("nan")) + power(q, 1.0))
    with torch.no_grad():
        drop(p)
    differentiate(opt, power(p, 3.0) + power(q, 1.0))
    opt.step()
    torch.testing.assert_close(opt.hessian_diag(p), torch.tensor([36.0, 144.0]))
    torch.testing.assert_close(opt.hessian_diag(q), torch.tensor([24.0, 96.0]))


# ---- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("again", [False, True], ids=["skipped", "repeated"])
def test_a_micro_batch_that_fails_leaves_those_before_it(n_samples, again):
    for n in range(1, 200):
        p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))
        opt = AdaHessian([p, q], lr=0.0, n_samples=n_samples)
        loss = lambda: power(p, 1.0) + power(q, 1.0)  # noqa: B023, E731
        opt.backward(loss())
        second = loss()
        with FailsAt(n, torch.OutOfMemoryError) as at, contextlib.suppress(torch.OutOfMemoryError):
            opt.backward(second, retain_graph=True)
        if not at.failed:
            break
        whole = float(p.grad[0]) == float(q.grad[0]) == 4.0
        if not whole:  # the addition of the gradients themselves has failed
            continue
        if again:
            opt.backward(second)
        opt.step()
        for x in (p, q):
            torch.testing.assert_close(opt.hessian_diag(x), torch.full_like(x, 24.0 if again else 12.0))
    assert n > 20


def _apart():
    """Parameters of three dtypes, one of them reached through copies, and a loss that couples their elements."""
    first = torch.arange(1.0, 25.0).view(2, 3, 4).permute(2, 1, 0)[::2]
    tensors = first, torch.ones(5, dtype=torch.float64), torch.linspace(1, 2, 6, dtype=torch.bfloat16)
    params = [nn.Parameter((x / 8).detach()) for x in tensors]
    params[0].data = first
    return params, lambda: sum((p.double().sin().sum() * p.double().square()).sum() for p in params) / 100


class EveryTime(torch.utils._python_dispatch.TorchDispatchMode):
    """Out of memory whenever an operator comes for the n-th time or later."""

    def __init__(self, name, n):
        super().__init__()
        self.name, self.left = name, n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= self.name in str(func)
        if self.left <= 0 and self.name in str(func):
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_nothing_is_updated_twice_by_a_step_that_keeps_failing(n):
    results = []
    for fails in (True, False):
        params, loss = _apart()
        opt = AdaHessian(params, backend="native")
        opt.backward(loss())
        for attempt in range(3 if fails else 0):
            with EveryTime("adahessian_step", 1 if attempt else n), pytest.raises(torch.OutOfMemoryError):
                opt.step()
            assert sum(bool(opt.state[p]["exp_avg"].any()) for p in params) == n - 1
        opt.step()
        results.append([params, [dict(opt.state[p]) for p in params]])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.fixture
def ctrl_c():
    """The handler of a program in the foreground; one that was started in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_during_an_op_comes_after_it_is_noted():
    calls = []
    parts = Parts([_thread.interrupt_main, lambda: calls.append(1)])
    with pytest.raises(KeyboardInterrupt):
        parts.do()
    parts.do()
    assert calls == [1]


def test_a_closure_that_raises_leaves_nothing_behind():
    results = []
    for fails in (False, True):
        p = nn.Parameter(torch.ones(2))
        opt = AdaHessian([p], lr=0.1)
        if fails:
            with pytest.raises(ZeroDivisionError):
                opt.step(lambda: 1 / 0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        opt.backward(scaler.scale((p**3).sum()))
        scaler.step(opt)
        results.append([p.detach(), opt.hessian_diag(p)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
