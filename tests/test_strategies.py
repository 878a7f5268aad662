"""Every way to compute Hessian-vector products against double backward in float64."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from pathlib import Path

import pytest
import strategies
import torch
from models import assert_same, conv_net, fresh, loss_of, mlp, probe, train, weights
from published import AdaHessian
from strategies import BOUND, CASES, compare, exact, found, optimizer, step
from tolerances import assert_error, relative_error
from torch import nn
from ways import STYLES

import adahessian_fused.hvp.finite_difference as fd

EVALUATING = ("forward_over_reverse", "finite_difference")
CLOSURES = [style for style in STYLES if style.startswith("closure")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("hvp", BOUND)
def test_gradient_and_product(hvp, case, device):
    model, loss = strategies.build(case, device)
    g, hz = exact(model, loss)
    opt = optimizer(model, hvp)
    step(opt, model, loss)
    compare(opt, model, g, hz, hvp)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("make", [mlp, conv_net])
@pytest.mark.parametrize("style", CLOSURES)
@pytest.mark.parametrize("hvp", EVALUATING)
def test_every_closure_does_what_a_function_does(hvp, style, make, device):
    (a, opt_a), (b, opt_b) = (fresh(make(device=device), hvp=hvp, update_each=2, lr=0.01) for _ in range(2))
    for i in range(3):
        train(opt_a, a, [i], style)
        opt_b.zero_grad()
        opt_b.backward(lambda i=i: loss_of(b, i))
        opt_b.step()
    assert_same([*weights(a), *a.buffers()], [*weights(b), *b.buffers()])


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("hvp", EVALUATING)
def test_several_samples_of_either_probe(hvp, probe, device):
    diagonals, gradients = [], []
    for way in ("autograd", hvp):
        model, loss = strategies.build("mlp", device)
        opt = optimizer(model, way, n_samples=3, probe=probe)
        step(opt, model, loss)
        g, d = found(opt, model)
        gradients.append(g), diagonals.append(d)
    # A Gaussian probe is longer than a Rademacher one in some directions: its truncation error counts too.
    bound = BOUND[hvp] + (2.0**-23 if hvp == "finite_difference" and probe == "gaussian" else 0)
    assert_error(*gradients, bound=bound)
    assert_error(*diagonals, bound=bound)


@pytest.mark.parametrize("hvp", EVALUATING)
def test_step_returns_the_loss(hvp, device):
    model, loss = strategies.build("mlp", device)
    expected = loss(model).item()
    for value in (step(optimizer(model, hvp, lr=0.0), model, loss), optimizer(model, hvp).step(lambda: loss(model))):
        assert value.item() == pytest.approx(expected, rel=1e-12)
        assert not value.requires_grad


# ---- what is evaluated several times ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"n_samples": 3}], ids=["one_sample", "three_samples"])
@pytest.mark.parametrize(
    ("hvp", "case"),
    [
        *((hvp, case) for hvp in EVALUATING for case in ("batch_norm", "dropout")),
        ("finite_difference", "spectral_norm"),
    ],
)
def test_buffers_and_random_numbers_move_on_once(hvp, case, options, device):
    model, loss = strategies.build(case, device)
    once = copy.deepcopy(model)
    opt = optimizer(model, hvp, **options)
    step(opt, model, loss)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    loss(once)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b in zip(model.named_buffers(), once.buffers(), strict=True):
        exactly = hvp == "forward_over_reverse" or not a.is_floating_point()
        # With finite differences the statistics are those of p + eps z.
        torch.testing.assert_close(a, b, rtol=0 if exactly else 2.0**-20, atol=0 if exactly else 2.0**-20, msg=name)


class Counting(nn.Module):
    """The output depends on how often it has been called, which two buffers count: one in place, one replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("added", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.added += 1
        self.replaced = self.replaced + 1
        return torch.tanh(self.layer(x) * self.added * self.replaced)


@pytest.mark.parametrize("hvp", EVALUATING)
def test_every_evaluation_begins_with_the_same_buffers(hvp, device):
    model = Counting().double().to(device)
    fresh_copy = copy.deepcopy(model)
    g, hz = exact(model, strategies.square)
    opt = optimizer(model, hvp, n_samples=2)
    step(opt, model, strategies.square)
    assert (model.added.item(), model.replaced.item()) == (1, 1)
    assert_error(found(opt, model)[0], g, BOUND[hvp])
    other = exact(fresh_copy, strategies.square, sample=1)[1]
    z = [probe(p, i, 0) * probe(p, i, 0, sample=1) for i, p in enumerate(model.parameters())]
    mean = [(a + s * b).abs() / 2 for a, b, s in zip(hz, other, z, strict=True)]
    assert_error(found(opt, model)[1], mean, BOUND[hvp])


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("interrupt", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_are_put_back_bit_for_bit(engine, device, dtype, when, interrupt, probe):
    model = nn.Sequential(nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last), nn.Tanh()).to(device, dtype)
    model.strided = nn.Parameter(torch.randn(6, 4, dtype=dtype, device=device)[::2])
    x, calls = torch.randn(2, 3, 3, 3, dtype=dtype, device=device), []
    opt = optimizer(model, "finite_difference", n_samples=2, probe=probe, backend=engine, lr=0.0)
    before = weights(model)

    def closure():
        calls.append([not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)])
        if len(calls) == when:
            raise interrupt
        return model(x).square().mean() + model.strided.cos().sum()

    opt.backward(lambda: (0 * model.strided).sum(), curvature=0)
    kept = model.strided.grad
    with pytest.raises(interrupt):
        opt.backward(closure)
    assert all(map(all, calls))
    assert_same(weights(model), before)
    assert model.strided.grad is kept
    opt.step(closure)  # as if nothing had happened
    assert len(calls) == when + 4
    assert_same(weights(model), before)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_one_launch_for_each_move_and_dtype(device, probe, monkeypatch):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).double()]).to(device)
    opt = optimizer(model, "finite_difference", probe=probe, update_each=2)
    launches, tools = [], opt.layout.backends[device.split(":")[0]]

    class Counted:
        def __getattr__(self, name):
            launches.append(name)
            return getattr(tools, name)

    opt.layout.backends[device.split(":")[0]] = Counted()
    x = torch.ones(1, 2, device=device)
    for _ in range(2):
        opt.step(lambda: sum(layer(x.to(layer.weight)).square().sum() for layer in model))
    assert launches.count("perturb") == 2 * 3  # two dtypes; there, to the other side, back; nothing on the off-step


@pytest.mark.parametrize("hvp", EVALUATING)
def test_off_steps_evaluate_once(hvp, device):
    model, loss = strategies.build("mlp", device)
    opt, calls = optimizer(model, hvp, update_each=2), []
    for _ in range(4):
        opt.step(lambda: calls.append(0) or loss(model))
    assert len(calls) == 2 * (1 if hvp == "forward_over_reverse" else 2) + 2


@pytest.mark.parametrize("hvp", BOUND)
def test_closures_that_differentiate_twice(hvp, device):
    model, _ = strategies.build("mlp", device)
    g, hz = exact(model, lambda m: loss_of(m, 0) + loss_of(m, 1))
    opt = optimizer(model, hvp)

    def closure():
        opt.zero_grad()
        loss_of(model, 0).backward()
        opt.backward(loss_of(model, 1))

    opt.step(closure)
    compare(opt, model, g, hz, hvp)


# ---- accumulation and schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hvp", BOUND)
def test_micro_batches_add_up(hvp, device):
    model, _ = strategies.build("mlp", device)
    g, hz = exact(model, lambda m: (loss_of(m, 0) + loss_of(m, 1)) / 2)
    opt = optimizer(model, hvp)
    for i in range(2):
        opt.backward(lambda i=i: loss_of(model, i) / 2)
    opt.step()
    compare(opt, model, g, hz, hvp)


@pytest.mark.parametrize("hvp", BOUND)
def test_curvature_of_one_of_several_micro_batches(hvp, device):
    model, _ = strategies.build("mlp", device)
    g, hz = (
        exact(model, lambda m: sum(loss_of(m, i) for i in range(3)) / 3)[0],
        exact(model, lambda m: loss_of(m, 1))[1],
    )
    opt = optimizer(model, hvp)
    for i in range(3):
        opt.backward(lambda i=i: loss_of(model, i) / 3, curvature=3 if i == 1 else 0)
    opt.step()
    compare(opt, model, g, hz, hvp)


@pytest.mark.parametrize("hvp", BOUND)
def test_a_group_that_is_not_due_is_not_probed(hvp, device):
    model, loss = strategies.build("mlp", device)
    params = list(model.parameters())
    opt = AdaHessian(
        [{"params": params[:2]}, {"params": params[2:], "update_each": 2}], betas=(0.0, 0.0), hvp=hvp, lr=0.0
    )
    step(opt, model, loss)
    opt.zero_grad()
    for p in params[:2]:
        opt.state[p]["hessian_step"].zero_()  # the same probe as at the first step
    step(opt, model, loss)
    hz = exact(model, loss, due=lambda i: i < 2)[1]
    ours = [opt.hessian_diag(p) for p in params[:2]]
    assert_error(ours, [h.abs() for h in hz[:2]], BOUND[hvp])


@pytest.mark.parametrize("hvp", BOUND)
def test_unused_and_linear_parameters(hvp, device):
    model, loss = strategies.build("partial", device)
    opt = optimizer(model, hvp)
    unused = weights(model.unused)
    for _ in range(2):
        opt.zero_grad()
        step(opt, model, loss)
    assert not any(p in opt.state and opt.state[p] for p in [*model.unused.parameters(), model.frozen])
    assert_same(weights(model.unused), unused)
    assert torch.equal(opt.hessian_diag(model.linear), torch.zeros_like(model.linear))


@pytest.mark.parametrize("other", [lambda p: 0.0, torch.sum], ids=["unused", "linear"])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("hvp", BOUND)
def test_a_probe_does_not_depend_on_who_has_a_product(hvp, kind, other, device):
    """With a diagonal Hessian D is z^2 H: the same beside a parameter that has no product, or has one later."""
    diagonals = []
    for first in (lambda p: (p**3).sum(), other):
        u, w = (torch.arange(1.0, n + 1, dtype=torch.float64, device=device).requires_grad_() for n in (2, 5))
        opt = AdaHessian([u, w], hvp=hvp, probe=kind, betas=(0.0, 0.0), lr=0.0)
        for i in range(2):
            opt.step(lambda u=u, w=w, f=first, i=i: (w**3).sum() + (f(u) if i == 0 else (u**3).sum()))
            diagonals.append(opt.hessian_diag(w))
    assert_error(diagonals[:2], diagonals[2:], BOUND[hvp])


@pytest.mark.parametrize("hvp", BOUND)
def test_a_parameter_without_a_product_among_two_dtypes(hvp, device):
    """Some of one bucket, all of another, or with the gradient of one that has a product dropped."""
    for linear, dropped in (([1], None), ([2, 3], None), ([0, 1], None), ([1], 0)):
        params = [torch.ones(3, dtype=d, device=device, requires_grad=True) for d in (torch.float64, torch.float32) * 2]
        params.sort(key=lambda p: p.dtype == torch.float32)
        opt = AdaHessian(params, hvp=hvp, betas=(0.0, 0.0), lr=0.0)
        opt.backward(lambda ps=params, line=linear: sum((p if i in line else p**2).sum() for i, p in enumerate(ps)))
        if dropped is not None:
            params[dropped].grad = None
        opt.step()
        for i, p in enumerate(params):
            if i != dropped:
                torch.testing.assert_close(opt.hessian_diag(p), torch.full_like(p, 2.0 * (i not in linear)))


@pytest.mark.parametrize("hvp", EVALUATING)
def test_master_weights_do_not_see_the_moves(hvp, device):
    model = mlp(torch.bfloat16, device)
    opt, before = optimizer(model, hvp, master_weights=True, lr=0.0), weights(model)
    for i in range(2):
        opt.step(lambda i=i: loss_of(model, i))
    assert_same([opt.state[p]["master_param"].bfloat16() for p in model.parameters()], before)
    assert_same([opt.state[p]["master_param"] for p in model.parameters()], [w.float() for w in before])


@pytest.mark.filterwarnings("error:gradients were written to")
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("hvp", EVALUATING)
def test_scaled_losses(hvp, clips, device):
    found_steps = []
    for scaler in (torch.amp.GradScaler(device, init_scale=2.0**10), None):
        model, opt = fresh(mlp(torch.float32, device), hvp=hvp)
        for i in range(3):
            opt.zero_grad()
            opt.backward(lambda i=i, m=model: loss_of(m, i), grad_scaler=scaler)
            if clips:
                scaler and scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(opt) if scaler else opt.step()
            scaler and scaler.update()
        found_steps.append(weights(model))
    assert_same(*found_steps)


# ---- precision -------------------------------------------------------------------------------------------------------


def test_distance_of_the_coarsest_dtype_for_all():
    assert fd.epsilon_of([torch.float32, torch.float64]) == 2.0**-13
    assert fd.epsilon_of([torch.float32, torch.bfloat16, torch.float16]) == 2.0**-8


@pytest.mark.parametrize("hvp", EVALUATING)
def test_autocast_around_the_step(hvp, device):
    """Autocast keeps 16-bit copies of the weights: they must not outlive a move or a tangent."""
    diagonals = []
    for way in ("autograd", hvp):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)).to(device)
        opt = optimizer(model, way, fd_epsilon=2.0**-6 if way == "finite_difference" else None)
        x = torch.randn(64, 8, device=device)
        with torch.autocast(device, torch.bfloat16):
            model(x)
            opt.backward(lambda m=model, x=x: m(x).float().square().mean())
        opt.step()
        diagonals.append(found(opt, model)[1])
    assert_error(*diagonals, bound=0.1)  # bfloat16; with stale copies it is 1


def test_the_distance_follows_the_precision_that_the_loss_computes_in(device):
    """Known after an evaluation, which is repeated, and remembered; autocast is around the step or inside the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)).to(device)
    x, calls, inside = torch.randn(64, 8, device=device), [], [True]

    def loss():
        calls.append(0)
        with torch.autocast(device, torch.bfloat16, enabled=inside[0]):
            return model(x).float().square().mean()

    def diagonal(hvp, outside=False, **options):
        opt = optimizer(model, hvp, lr=0.0, n_samples=4, **options)
        calls.clear()
        with torch.autocast(device, torch.bfloat16, enabled=outside):
            opt.step(loss)
        return found(opt, model)[1], len(calls)

    exact = diagonal("autograd")[0]
    # Twice for each sample, and once more where the precision is another than in the step before.
    for inside[0], outside, n in ((True, False, 9), (True, False, 8), (False, True, 8), (False, False, 9)):
        ours, evaluations = diagonal("finite_difference", outside)
        assert_error(ours, exact, 0.1)
        assert evaluations == n
    inside[0] = True
    assert relative_error(diagonal("finite_difference", fd_epsilon=2.0**-13)[0], exact) > 0.1  # what is given is taken


# ---- interruptions ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted(line: int):
    """KeyboardInterrupt before line number ``line`` of the ways to evaluate a loss that is run."""
    package, left = str(Path(fd.__file__).parent), [line]

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield left
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_interrupted_at_any_line(kind, device):
    """Nothing that a finite difference moves stays moved; p.grad is what it was or what it shall be."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).to(device)
    model.strided = nn.Parameter(torch.randn(6, 4, device=device)[::2])
    x = torch.ones(2, 3, device=device)
    opt, line, left = optimizer(model, "finite_difference", probe=kind, lr=0.0), 0, [0]
    before = weights(model)
    while left[0] <= 0:
        line += 1 if line < 20 else 5
        opt.zero_grad()
        with contextlib.suppress(KeyboardInterrupt), interrupted(line) as left:
            opt.backward(lambda: model(x).square().mean() + model.strided.square().sum())
        assert_same(weights(model), before)
    assert line > 200


# ---- losses that write to their parameters ---------------------------------------------------------------------------


def renormalised(device):
    table = nn.Embedding(6, 4, max_norm=1.0, device=device, dtype=torch.float64)
    nn.init.uniform_(table.weight, 0.6, 1.5)  # all rows are too long
    return table, lambda: (table(torch.arange(6, device=device)) ** 4).sum()


def clipped(how):
    def make(device):
        model = mlp(device=device)

        def loss():
            how(model[0].weight)
            return loss_of(model)

        return model, loss

    return make


def replaced(p):
    p.data = p.data.clamp(-0.1, 0.1)


WRITING = {
    "max_norm": renormalised,
    "no_grad": clipped(torch.no_grad()(lambda p: p.clamp_(-0.1, 0.1))),
    "data": clipped(lambda p: p.data.clamp_(-0.1, 0.1)),
    "foreach": clipped(lambda p: torch._foreach_clamp_max_([p.data], 0.1)),
    "new_data": clipped(replaced),
}


@pytest.mark.parametrize("options", [{}, {"n_samples": 3}, {"probe": "gaussian"}], ids=str)
@pytest.mark.parametrize("case", WRITING)
@pytest.mark.parametrize("way", EVALUATING)
def test_losses_that_write_to_their_parameters(way, case, options, device):
    """What the loss writes where the parameters are stays; at the points beside them it writes nothing."""
    results = []
    if (way, case) == ("forward_over_reverse", "no_grad"):
        model, loss = WRITING[case](device)
        with pytest.raises(RuntimeError, match=r"writes to parameter 0 of group 0 and to its tangent.*detach"):
            optimizer(model, way, **options).step(loss)
        assert all(p.grad is None for p in model.parameters())
        return
    for hvp in ("autograd", way):
        torch.manual_seed(0)
        model, loss = WRITING[case](device)
        opt = optimizer(model, hvp, lr=0.1, **options)
        for _ in range(3):
            opt.step(loss)
        results.append((weights(model), *found(opt, model)))
    # A difference is off by some 2^-23 of the product, and three steps multiply that; wrong points are off by 0.1.
    for ours, theirs in zip(*results[::-1], strict=True):
        assert_error(ours, theirs, 1000 * 2.0**-23)


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_other_threads_are_left_alone(device):
    """Neither the statistics of another model go back in time, nor the random numbers that its thread draws."""
    ours, other = mlp(torch.float32, device), nn.BatchNorm1d(3, device=device)
    opt, stop, drawn = optimizer(ours, "finite_difference", lr=0.0), threading.Event(), []

    def use_it():
        while not stop.is_set():
            other(torch.ones(4, 3, device=device))
            drawn.append(torch.rand(()).item())

    thread = threading.Thread(target=use_it)
    thread.start()
    try:
        for i in range(40):
            opt.step(lambda i=i: loss_of(ours, i))
    finally:
        stop.set()
        thread.join()
    assert int(other.num_batches_tracked) == len(drawn)
    assert len(set(drawn)) >= 0.99 * len(drawn)  # of 2^24 numbers a few come twice


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hvp", EVALUATING)
def test_a_loss_that_is_there_already(hvp, device):
    model, loss = strategies.build("mlp", device)
    opt = optimizer(model, hvp, update_each=2)
    with pytest.raises(RuntimeError, match=rf'hvp="{hvp}".*opt\.backward\(lambda: .*instead of opt\.backward\(loss\)'):
        opt.backward(loss(model))
    loss(model).backward()
    with pytest.raises(RuntimeError, match=rf'hvp="{hvp}".*instead of .*loss\.backward\(\)'):
        opt.step()
    opt.zero_grad()
    step(opt, model, loss)
    opt.backward(loss(model))  # an off-step takes anything


@pytest.mark.parametrize("hvp", EVALUATING)
def test_a_closure_without_a_loss(hvp, device):
    model, loss = strategies.build("mlp", device)
    opt, before = optimizer(model, hvp), weights(model)
    with pytest.raises(RuntimeError, match="the closure returned"):
        opt.step(lambda: loss(model).detach())
    assert_same(weights(model), before)


@pytest.mark.parametrize("hvp", EVALUATING)
def test_resuming_gives_the_same_steps(hvp, device):
    model, opt = fresh(conv_net(device=device), hvp=hvp, update_each=2, lr=0.01)
    train(opt, model, 3, "closure_standard")
    again, other = fresh(model, hvp=hvp, update_each=2, lr=0.01)
    other.load_state_dict(opt.state_dict())
    assert_same(train(other, again, [3, 4, 5], "closure_standard"), train(opt, model, [3, 4, 5], "closure_standard"))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_product_that_autograd_hands_out_twice(device, scaled):
    """The sum of two parameters has one Hessian block, and its product is one tensor for both."""
    a, b = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    opt = AdaHessian([a, b], betas=(0.0, 0.0))
    scaler = torch.amp.GradScaler(device, init_scale=8.0) if scaled else None
    opt.backward((a + b).pow(3).sum(), grad_scaler=scaler, curvature=2.0)
    z = [probe(p, i, 0) for i, p in enumerate((a, b))]
    expected = 2.0 * 6 * 2.0 * (z[0] + z[1]).abs()
    scaler.step(opt) if scaled else opt.step()
    assert torch.equal(opt.hessian_diag(a), expected)
    assert torch.equal(opt.hessian_diag(b), expected)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("when", ["evaluating", "done"])
def test_interrupts_while_parameters_are_put_back(when, times, monkeypatch):
    model, loss = strategies.build("mlp", "cpu")
    opt, before = optimizer(model, "finite_difference"), weights(model)
    failures, launch = [KeyboardInterrupt] * times, fd.Perturbation._launch

    def interrupted(self, *work):
        if work[-2] == 0 and failures:
            raise failures.pop()
        launch(self, *work)

    monkeypatch.setattr(fd.Perturbation, "_launch", interrupted)
    with pytest.raises((KeyboardInterrupt, ValueError)):
        opt.backward(lambda: int("x") if when == "evaluating" else loss(model))
    assert not failures
    assert_same(weights(model), before)
