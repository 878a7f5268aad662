"""Every way of stepping treats leaves and hooks as ``loss.backward()`` does, and knows whose gradients it meets."""

from __future__ import annotations

import contextlib

import pytest
import torch
from models import batch, mlp
from torch import Tensor, nn

from adahessian_fused import AdaHessian, TrainStep


def closure_of(opt, loss, others=()):
    def closure():
        for other in (opt, *others):
            other.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def hooked(opt, loss):
    with opt.hook_backward():
        loss().backward()


def split(opt, loss):
    opt.param_groups[0]["hessian_fraction"] = 0.5
    opt.backward_split(lambda x: loss() * x.mean(), torch.ones(2, dtype=torch.float64))


WAYS = {
    "given": lambda opt, loss: opt.backward(loss()),
    "function": lambda opt, loss: opt.backward(loss),
    "closure": lambda opt, loss: opt.step(closure_of(opt, loss)),
    "closure_of_the_loss": lambda opt, loss: opt.step(loss),
    "hooked": hooked,
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


@pytest.mark.parametrize("way", WAYS)
def test_hooks_run_once_and_see_the_gradient(way, device):
    model = mlp(device=device)
    x, y = batch(0, model)
    x.requires_grad_()
    opt = AdaHessian(model.parameters(), lr=0.0)
    loss = lambda: (model(x) - y).square().mean()  # noqa: E731
    expected = dict(zip([*model.parameters(), x], torch.autograd.grad(loss(), [*model.parameters(), x]), strict=True))
    seen, after = [], []
    for p in expected:
        p.register_hook(lambda g, p=p: seen.append((p, g.detach().clone())))
        p.register_post_accumulate_grad_hook(lambda p: after.append((p, p.grad.clone())))
    WAYS[way](opt, loss)
    parts = 2 if way == "split" else 1  # two backward passes with half of the gradient each
    assert len(seen) == len(after) == parts * len(expected)
    for number, (p, g) in enumerate(after):
        torch.testing.assert_close(g, expected[p] * (number // len(expected) + 1) / parts)
    for p, g in seen:
        torch.testing.assert_close(g, expected[p] / parts)


def test_hooks_in_a_train_step():
    model = nn.Linear(3, 2)
    x = torch.ones(4, 3)
    step = TrainStep(model, nn.functional.mse_loss, AdaHessian(model.parameters(), lr=0.0), compile=False)
    seen, after = [], []
    for p in model.parameters():
        p.register_hook(lambda g: seen.append(g.detach()))
        p.register_post_accumulate_grad_hook(lambda p: after.append(p.grad))
    step(x, x[:, :2])
    assert len(seen) == len(after) == 2
    for a, b in zip(sorted(seen, key=Tensor.numel), sorted(after, key=Tensor.numel), strict=True):
        torch.testing.assert_close(a, b)


def test_a_hook_that_changes_the_gradient_changes_its_curvature_once():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    p.register_hook(lambda g: 2 * g)
    opt = AdaHessian([p], lr=0.0)
    opt.backward((p**3).sum())
    opt.step()
    torch.testing.assert_close(opt.hessian_diag(p), 12 * p.detach())


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


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
@pytest.mark.parametrize("n_samples", [1, 2])
def test_curvature_goes_with_its_gradient(drop, n_samples):
    """Of one of two parameters, whose batch was skipped."""
    p, q = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    opt = AdaHessian([p, q], lr=0.0, n_samples=n_samples)
    opt.backward(power(p, float("nan")) + power(q, 1.0))
    drop(p)
    opt.backward(power(p, 3.0) + power(q, 1.0))
    opt.step()
    torch.testing.assert_close(opt.hessian_diag(p), torch.tensor([36.0, 144.0]))
    torch.testing.assert_close(opt.hessian_diag(q), torch.tensor([24.0, 96.0]))


# ---- what fails ------------------------------------------------------------------------------------------------------


class FailsAt(torch.utils._python_dispatch.TorchDispatchMode):
    """Out of memory at the n-th operator."""

    def __init__(self, n):
        super().__init__()
        self.left, self.failed = n, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            self.failed = True
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("again", [False, True], ids=["skipped", "repeated"])
def test_a_micro_batch_that_fails_leaves_those_before_it(n_samples, again):
    for n in range(1, 200):
        p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))
        opt = AdaHessian([p, q], lr=0.0, n_samples=n_samples)
        loss = lambda: power(p, 1.0) + power(q, 1.0)  # noqa: B023, E731
        opt.backward(loss())
        second = loss()
        with FailsAt(n) as at, contextlib.suppress(torch.OutOfMemoryError):
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


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["scaled", "given", "unscaled"])
def test_the_default_dtype_does_not_matter_to_grad_scaler(default, way):
    torch.set_default_dtype(default)
    try:
        p = nn.Parameter(torch.ones(2, dtype=torch.float32))
        opt, scaler = AdaHessian([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=3.0e5)
        loss = (p**3).sum()
        opt.backward(loss, grad_scaler=scaler) if way == "given" else opt.backward(scaler.scale(loss))
        if way == "unscaled":
            opt.unscale_(scaler)
        scaler.step(opt)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(opt.hessian_diag(p), torch.full((2,), 6.0))
